"""Rows of logits by leaves of 1024 ids: their maxima and masses, the arg-max, and the two races of a draw, many rows at once.

    draw: leaf = arg-max log2(mass of leaf) - log2(Exp), then id = arg-max log2(weight) - log2(Exp) inside it

Symbols: LEAVES leaves of a row (padded), ROWS rows, node = slot of a draft tree. Exponential clocks: the winner has the law of the
weights. Oracle: `draw` in reference/sources.py.
"""

import triton
import triton.language as tl

from .mass import LEAF, NEG_INF, ONE, below_max, masses
from .philox import CORRECT, LEAF as LEAF_STREAM, lane_words, log2_exponential
from .race import pack, unpack_id

# A leaf's mass is below 2^51; the bits above it carry what the leaf showed.
SAW_FINITE = tl.constexpr(1 << 61)
SAW_NAN = tl.constexpr(1 << 62)
MASS_BITS = tl.constexpr((1 << 61) - 1)


@triton.jit
def leaf_masses(x, scale, PAIRS: tl.constexpr):
    """Maximum fp32 [PAIRS] and mass int64 [PAIRS] of leaves x [PAIRS, LEAF], NaN read as -inf before."""
    top = tl.max(x, axis=1)
    return top, masses(tl.exp2(below_max(x, top[:, None]) * scale), PAIRS, LEAF, ONE)


@triton.jit
def merge_leaves(top_ptr, mass_ptr, rows, num_leaves, scale, LEAVES: tl.constexpr):
    """Leaf partials of rows [ROWS] (-1 = none) -> row maximum, row mass (integer, relative to it), what the leaves showed, their
    maxima."""
    leaf = tl.arange(0, LEAVES)[None, :]
    where = rows[:, None] * num_leaves + leaf
    inside = (rows >= 0)[:, None] & (leaf < num_leaves)
    tops = tl.load(top_ptr + where, mask=inside, other=NEG_INF, volatile=True)
    words = tl.load(mass_ptr + where, mask=inside, other=0, volatile=True)
    top = tl.max(tops, axis=1)
    relative = (words & MASS_BITS).to(tl.float32) * tl.exp2(below_max(tops, top[:, None]) * scale)
    return top, tl.sum(relative.to(tl.int64), axis=1), words, tops


@triton.jit
def first_leaf(tops, top, LEAVES: tl.constexpr):
    """Ids [ROWS, LEAF] of the first leaf that has each row's maximum."""
    leaf = tl.arange(0, LEAVES)[None, :]
    winner = tl.min(tl.where(tops == top[:, None], leaf, LEAVES - 1), axis=1)
    return winner[:, None] * LEAF + tl.arange(0, LEAF)[None, :]


@triton.jit
def first_of(x, ids, top, width):
    """Lowest id whose logit x is the row's maximum, int32 [ROWS]."""
    return tl.min(tl.where((x == top[:, None]) & (ids < width), ids, 2147483647), axis=1)


@triton.jit
def race_leaves(log_weight, seed, position, anchor, node, ROWS: tl.constexpr, LEAVES: tl.constexpr,
                STREAM: tl.constexpr = LEAF_STREAM):  # fmt: skip
    """Leaf that wins by log2 weight [ROWS, LEAVES] (-inf = empty): int32 [ROWS]. position, node: [ROWS, 1]."""
    words = lane_words(seed, 0, position, anchor, STREAM, ROWS, LEAVES, node)
    key = tl.where(log_weight > NEG_INF, log_weight - log2_exponential(words), NEG_INF)
    return unpack_id(tl.max(pack(key, tl.arange(0, LEAVES)[None, :]), axis=1)).to(tl.int32)


@triton.jit
def race_ids(log_weight, leaf, seed, position, anchor, node, ROWS: tl.constexpr, STREAM: tl.constexpr = CORRECT):
    """Id that wins inside a leaf [ROWS] by log2 weight [ROWS, LEAF] (-inf = excluded): int32 [ROWS]."""
    words = lane_words(seed, leaf[:, None] * LEAF, position, anchor, STREAM, ROWS, LEAF, node)
    key = tl.where(log_weight > NEG_INF, log_weight - log2_exponential(words), NEG_INF)
    ids = leaf[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    return unpack_id(tl.max(pack(key, ids), axis=1)).to(tl.int32)
