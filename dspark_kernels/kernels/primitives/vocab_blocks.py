"""Rows of logits by blocks of 1024 ids: their maxima and sums, the arg-max, and the two races of a draw, many rows at once.

    draw: block = arg-max log2(sum of exponentials of block) - log2(Exp), then id = arg-max log2(weight) - log2(Exp) inside it

Symbols: BLOCKS blocks of a row (padded), ROWS rows, node = slot of a draft tree. Exponential clocks: the winner has the
distribution of the weights. Reference: `draw` in reference/sources.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .constants import NEG_INF, SUMEXP_ONE, VOCAB_BLOCK
from .philox import CORRECT, LEAF as LEAF_STREAM, lane_words, log2_exponential
from .race import pack, unpack_id
from .sumexp import below_max, fixed_sums

# A block's sum of exponentials is below 2^51; the bits above it carry what the block showed.
SAW_FINITE = tl.constexpr(1 << 61)
SAW_NAN = tl.constexpr(1 << 62)
SUMEXP_BITS = tl.constexpr((1 << 61) - 1)


@triton.jit
def block_sums(x, scale, PAIRS: tl.constexpr):
    """Maximum fp32 [PAIRS] and sum of exponentials int64 [PAIRS] of blocks x [PAIRS, VOCAB_BLOCK], NaN read as -inf before."""
    top = tl.max(x, axis=1)
    return top, fixed_sums(tl.exp2(below_max(x, top[:, None]) * scale), PAIRS, VOCAB_BLOCK, SUMEXP_ONE)


class RowBlocks(NamedTuple):
    """Block partials of rows [ROWS, BLOCKS]: maxima, and sums of exponentials with what the blocks showed."""

    tops: Any
    words: Any


@triton.jit
def load_blocks(top_ptr, sumexp_ptr, rows, num_blocks, BLOCKS: tl.constexpr):
    """rows: [ROWS], -1 = none."""
    block = tl.arange(0, BLOCKS)[None, :]
    where = rows[:, None] * num_blocks + block
    inside = (rows >= 0)[:, None] & (block < num_blocks)
    return RowBlocks(
        tl.load(top_ptr + where, mask=inside, other=NEG_INF, volatile=True),
        tl.load(sumexp_ptr + where, mask=inside, other=0, volatile=True),
    )


@triton.jit
def row_sumexp(blocks, top, scale):
    """Sums of exponentials of rows with maxima `top`: integers, relative to these."""
    relative = (blocks.words & SUMEXP_BITS).to(tl.float32) * tl.exp2(below_max(blocks.tops, top[:, None]) * scale)
    return tl.sum(relative.to(tl.int64), axis=1)


@triton.jit
def merge_blocks(top_ptr, sumexp_ptr, rows, num_blocks, scale, BLOCKS: tl.constexpr):
    """Block partials of rows [ROWS] (-1 = none) -> row maximum, row sum of exponentials (integer, relative to it), what the blocks
    showed, their maxima."""
    blocks = load_blocks(top_ptr, sumexp_ptr, rows, num_blocks, BLOCKS)
    top = tl.max(blocks.tops, axis=1)
    return top, row_sumexp(blocks, top, scale), blocks.words, blocks.tops


@triton.jit
def first_block(tops, top, BLOCKS: tl.constexpr):
    """Ids [ROWS, VOCAB_BLOCK] of the first block that has each row's maximum."""
    block = tl.arange(0, BLOCKS)[None, :]
    winner = tl.min(tl.where(tops == top[:, None], block, BLOCKS - 1), axis=1)
    return winner[:, None] * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)[None, :]


@triton.jit
def first_of(x, ids, top, width):
    """Lowest id whose logit x is the row's maximum, int32 [ROWS]."""
    return tl.min(tl.where((x == top[:, None]) & (ids < width), ids, 2147483647), axis=1)


@triton.jit
def race_blocks(log_weight, seed, position, anchor, node, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
                STREAM: tl.constexpr = LEAF_STREAM):  # fmt: skip
    """Block that wins by log2 weight [ROWS, BLOCKS] (-inf = empty): int32 [ROWS]. position, node: [ROWS, 1]."""
    words = lane_words(seed, 0, position, anchor, STREAM, ROWS, BLOCKS, node)
    key = tl.where(log_weight > NEG_INF, log_weight - log2_exponential(words), NEG_INF)
    return unpack_id(tl.max(pack(key, tl.arange(0, BLOCKS)[None, :]), axis=1)).to(tl.int32)


@triton.jit
def race_ids(log_weight, block, seed, position, anchor, node, ROWS: tl.constexpr, STREAM: tl.constexpr = CORRECT):
    """Id that wins inside a block [ROWS] by log2 weight [ROWS, VOCAB_BLOCK] (-inf = excluded): int32 [ROWS]."""
    words = lane_words(seed, block[:, None] * VOCAB_BLOCK, position, anchor, STREAM, ROWS, VOCAB_BLOCK, node)
    key = tl.where(log_weight > NEG_INF, log_weight - log2_exponential(words), NEG_INF)
    ids = block[:, None] * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)[None, :]
    return unpack_id(tl.max(pack(key, ids), axis=1)).to(tl.int32)
