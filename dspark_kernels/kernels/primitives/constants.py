"""Constants of kernels, one name for each number: sizes, flags, and what arithmetic needs."""

import triton.language as tl

from .. import sizes

VOCAB_BLOCK = tl.constexpr(sizes.VOCAB_BLOCK)
SUB_BLOCK = tl.constexpr(sizes.SUB_BLOCK)
TREE_SUB_BLOCK = tl.constexpr(sizes.TREE_SUB_BLOCK)
MAX_GROUP = tl.constexpr(sizes.MAX_GROUP)
TREE_MAX_GROUP = tl.constexpr(sizes.TREE_MAX_GROUP)
FILTER_LIST = tl.constexpr(sizes.FILTER_LIST)
MAP_COLUMNS = tl.constexpr(sizes.MAP_COLUMNS)
DOT_ROWS = tl.constexpr(sizes.DOT_ROWS)
NODE_FIELDS = tl.constexpr(sizes.NODE_FIELDS)
ROW_VALUES = tl.constexpr(sizes.ROW_VALUES)
ROW_IDS = tl.constexpr(sizes.ROW_IDS)
NODE_VALUES = tl.constexpr(sizes.NODE_VALUES)
NODE_IDS = tl.constexpr(sizes.NODE_IDS)
PLAN_COLUMNS = tl.constexpr(sizes.PLAN_COLUMNS)

# Bits of `flags`; the public names are dspark_kernels.types.Flag (a test keeps both equal).
NONFINITE_ROW = tl.constexpr(1)
NAN = tl.constexpr(2)
BAD_TOKEN_ID = tl.constexpr(4)
MISSING_DRAFT = tl.constexpr(8)
EMPTY_RESIDUAL = tl.constexpr(16)

NEG_INF = tl.constexpr(float("-inf"))
POS_INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_ID = tl.constexpr(2147483647)  # above every token id
SUMEXP_ONE = tl.constexpr(1099511627776.0)  # 2^40, an exponential of 1 in fixed point
RESIDUAL_ONE = tl.constexpr(1152921504606846976.0)  # 2^60, a residual of 1: those of a row add up to at most 1
