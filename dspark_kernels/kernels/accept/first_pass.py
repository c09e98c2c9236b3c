"""The first pass over logits: maximum and sum of exponentials of every vocabulary block. Chains and trees share it.

An item = `steps` chunks, one after the other, each of CHUNK blocks of GROUP rows. Rows of which nothing else is asked are streamed:
a warp owns whole blocks, the next chunk's loads are on their way while this one is summed, and no logit is looked at twice. A NaN
or +inf shows in what is kept of the maxima, and then the general pass goes over the item again. What is stored of a block depends
neither on `steps` nor on which of the two passes it was. Symbols: PAIRS = GROUP * CHUNK pairs of a row and a block, block = 1024
ids.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from ..primitives.constants import LOG2E, MAX_GROUP, NEG_INF, POS_INF, SUMEXP_ONE, VOCAB_BLOCK
from ..primitives.race import pack
from ..primitives.sumexp import numbers
from ..primitives.vocab_blocks import SAW_FINITE, SAW_NAN, block_sums
from .rows import coupled_keys, load_block
from .target import read_raw


class ItemBlocks(NamedTuple):
    """Rows of a request, and the blocks of the first chunk."""

    i: Any  # [PAIRS]
    block: Any  # [PAIRS]
    steps: Any


@triton.jit
def item_of(group, item, steps, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """What work item `item` of a group of rows goes through."""
    pair = tl.arange(0, GROUP * CHUNK)
    return ItemBlocks(group * GROUP + pair // CHUNK, item * steps * CHUNK + pair % CHUNK, steps)


@triton.jit
def _target_ptrs(item, view):
    return view.logits_ptr + tl.where(item.i <= view.length, (view.row0 + item.i).to(tl.int64), 0) * view.stride


@triton.jit
def first_logits(item, view, scratch):
    """The item's first chunk, where rows are streamed: on its way while the caller asks for other things."""
    ahead = item.i
    if view.adjustments is None and scratch.raw is None and scratch.filters is None and scratch.target.best_ptr is None:
        ahead = _first(_target_ptrs(item, view), item.block, item.i <= view.length, view.vocab)
        tl.debug_barrier()  # the compiler would ask for the rest first, and wait for that
    return ahead


@triton.jit
def sweep_target(item, ahead, view, layout, sampling, scratch, scale, num_blocks, CHUNK: tl.constexpr):
    """The item's part of scratch.target, .raw and .filters. ahead: first_logits."""
    has_row = item.i <= view.length
    rows = (view.row0 + item.i).to(tl.int64)
    again = True
    if view.adjustments is None and scratch.raw is None and scratch.filters is None and scratch.target.best_ptr is None:
        again = _stream(item, ahead, _target_ptrs(item, view), view.vocab, has_row, rows, scratch.target, scale, num_blocks,
                        CHUNK, sampling.temperature_ptr is not None)  # fmt: skip
    if again:
        for step in range(item.steps):
            block = item.block + step * CHUNK
            _general(item.i, block, has_row & (block < num_blocks), view, layout, sampling, scratch, scale, num_blocks)


@triton.jit
def sweep_draft(item, has_row, view, draft, partials, draft_scale, num_blocks, CHUNK: tl.constexpr):
    """The same of draft rows whose log-sum-exp is not stored, over their columns. has_row: [PAIRS]."""
    rows = (view.row0 + item.i).to(tl.int64)
    row_ptrs = draft.logits_ptr + view.slot * draft.stride_slot + tl.where(has_row, item.i, 0).to(tl.int64) * draft.stride_row
    ahead = _first(row_ptrs, item.block, has_row, draft.width)
    if _stream(item, ahead, row_ptrs, draft.width, has_row, rows, partials, draft_scale, num_blocks, CHUNK, True):
        for step in range(item.steps):
            block = item.block + step * CHUNK
            keep = has_row & (block < num_blocks)
            columns = block[:, None] * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)[None, :]
            x = load_block(row_ptrs[:, None], columns, keep[:, None] & (columns < draft.width))
            top, sumexp = block_sums(x, draft_scale, item.i.shape[0])
            tl.store(partials.max_ptr + rows * num_blocks + block, top, mask=keep)
            tl.store(partials.sumexp_ptr + rows * num_blocks + block, sumexp, mask=keep)


# --- rows of numbers and -inf -----------------------------------------------------------------------------------------


@triton.jit
def _first(row_ptrs, block, has_row, width):
    """Blocks [PAIRS] of rows as `_load` gives them."""
    LANES: tl.constexpr = 64 if is_hip() else 32
    WIDTH: tl.constexpr = LANES * 128 // row_ptrs.dtype.element_ty.primitive_bitwidth  # that a warp loads at once, 16 bytes a lane
    return _load(row_ptrs, block, has_row, width, VOCAB_BLOCK // WIDTH, WIDTH)


@triton.jit
def _stream(item, ahead, row_ptrs, width, has_row, rows, partials, scale, num_blocks, CHUNK: tl.constexpr, SUMS: tl.constexpr):
    """Maxima (and, if SUMS, sums) of the item's blocks; says whether there was a NaN or +inf, which makes them void.

    ahead: the first chunk, from `_first`.
    """
    PAIRS: tl.constexpr = row_ptrs.shape[0]
    DTYPE: tl.constexpr = row_ptrs.dtype.element_ty
    LANES: tl.constexpr = 64 if is_hip() else 32
    PARTS: tl.constexpr = ahead.shape[0]
    WIDTH: tl.constexpr = ahead.shape[2]
    # One store for each block: a column per lane keeps the block's results in the warp that has them.
    lane = tl.arange(0, LANES)[None, :]
    highest = tl.full([PARTS, PAIRS, WIDTH // 4], float("-inf"), tl.float32)
    for step in range(item.steps):
        block = item.block + step * CHUNK
        x = _floats(ahead, DTYPE)
        if SUMS:
            ahead = _load(row_ptrs, block + CHUNK, has_row & (step + 1 < item.steps), width, PARTS, WIDTH)
        maxima = _quad_maxima(x, PARTS, PAIRS, WIDTH)
        if (
            not SUMS
        ):  # nobody needs x any more: what comes next takes its registers, and is not moved there, which would wait for it
            ahead = _load(row_ptrs, block + CHUNK, has_row & (step + 1 < item.steps), width, PARTS, WIDTH)
        highest = tl.maximum(highest, maxima, propagate_nan=tl.PropagateNan.ALL)
        top = tl.max(tl.max(maxima, axis=0), axis=1)
        word = tl.where(top > NEG_INF, SAW_FINITE, 0)
        if SUMS:
            reference = tl.where(top > NEG_INF, top, 0.0)
            octets = _octets(tl.exp2((x - reference[None, :, None]) * scale), PARTS, PAIRS, WIDTH)
            word |= _sum_of_warp(tl.sum((octets * SUMEXP_ONE).to(tl.int64), axis=0))
        keep = (has_row & (block < num_blocks))[:, None] & (lane == 0)
        where = (rows * num_blocks + block)[:, None] + lane
        tl.store(partials.max_ptr + where, tl.broadcast_to(top[:, None], [PAIRS, LANES]), mask=keep)
        tl.store(partials.sumexp_ptr + where, tl.broadcast_to(word[:, None], [PAIRS, LANES]), mask=keep)
    tl.debug_barrier()  # the general pass may store in the same places
    return tl.max(tl.max(tl.max(tl.where(highest < POS_INF, 0, 1), axis=0), axis=1), axis=0) > 0


@triton.jit
def _load(row_ptrs, block, has_row, width, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Blocks [PAIRS] of rows as [PARTS, PAIRS, WIDTH], as bits: floats that a loop carries are taken apart and put together
    again."""
    ids = block[None, :, None] * VOCAB_BLOCK + tl.arange(0, PARTS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    x = tl.load(row_ptrs[None, :, None] + ids, mask=has_row[None, :, None] & (ids < width), other=NEG_INF)
    return x.to(tl.int32 if x.dtype == tl.float32 else tl.int16, bitcast=True)


@triton.jit
def _floats(bits, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        x = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = bits.to(DTYPE, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _quad_maxima(x, PARTS: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    """Of every 4 neighbours the largest, NaN where one is."""
    a, b = tl.split(tl.reshape(x, [PARTS * PAIRS * WIDTH // 4, 2, 2]))
    a, b = tl.split(tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    return tl.reshape(tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL), [PARTS, PAIRS, WIDTH // 4])


@triton.jit
def _octets(e, PARTS: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    """sumexp.octet_sums, where a lane may hold half an octet."""
    a, b = tl.split(tl.reshape(e, [PARTS * PAIRS * WIDTH // 4, 2, 2]))
    a, b = tl.split(a + b)
    return tl.sum(tl.reshape(a + b, [PARTS, PAIRS, WIDTH // 8, 2]), axis=3)


@triton.jit
def _sum_of_warp(fixed):
    """Sums over axis 1 of integers below 2^46, by halves: there is one instruction for a warp's sum of 32 bits."""
    low = tl.sum((fixed & 4194303).to(tl.int32), axis=1)
    return (tl.sum((fixed >> 22).to(tl.int32), axis=1).to(tl.int64) << 22) + low


# --- whatever is asked of any row -------------------------------------------------------------------------------------


@triton.jit
def _general(i, block, keep, view, layout, sampling, scratch, scale, num_blocks):
    """PAIRS blocks of target rows: maximum and sum of exponentials.

    Coupled: the block's best key of logit * scale + noise, too. Raw log-probabilities: maximum and sum of exponentials of what the
    target gave, at temperature 1. Filters: maxima of groups of ids.
    """
    PAIRS: tl.constexpr = i.shape[0]
    partials, raw, filters = scratch.target, scratch.raw, scratch.filters
    row = (view.row0 + i).to(tl.int64)
    ids = block[:, None] * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)[None, :]
    inside = keep[:, None] & (ids < view.vocab)
    adjusted = read_raw(view, i, ids, inside)
    x = numbers(adjusted)
    top, sumexp = block_sums(x, scale, PAIRS)
    sumexp |= tl.where(tl.max(tl.where(adjusted != adjusted, 1, 0), axis=1) > 0, SAW_NAN, 0)
    sumexp |= tl.where(tl.max(tl.where(tl.abs(x) < POS_INF, 1, 0), axis=1) > 0, SAW_FINITE, 0)
    where = row * num_blocks + block
    tl.store(partials.max_ptr + where, top, mask=keep)
    tl.store(partials.sumexp_ptr + where, sumexp, mask=keep)
    if filters is not None:
        maxima = tl.max(tl.reshape(x, [PAIRS, VOCAB_BLOCK // MAX_GROUP, MAX_GROUP]), axis=2)
        group = block[:, None] * (VOCAB_BLOCK // MAX_GROUP) + tl.arange(0, VOCAB_BLOCK // MAX_GROUP)[None, :]
        num_groups = tl.cdiv(view.vocab, MAX_GROUP)
        tl.store(filters.maxima_ptr + row[:, None] * num_groups + group, maxima, mask=keep[:, None] & (group < num_groups))
    if raw is not None:
        raw_x = x
        if view.adjustments is not None:
            raw_x = numbers(tl.load(view.logits_ptr + row[:, None] * view.stride + ids, mask=inside, other=NEG_INF).to(tl.float32))
        raw_max, raw_sumexp = block_sums(raw_x, LOG2E, PAIRS)
        tl.store(raw.max_ptr + where, raw_max, mask=keep)
        tl.store(raw.sumexp_ptr + where, raw_sumexp, mask=keep)
    if partials.best_ptr is not None:
        position = tl.load(layout.positions_ptr + tl.load(layout.logits_indices_ptr + view.row0)) + 1 + i
        temperature, seed = tl.load(sampling.temperature_ptr + view.slot), tl.load(sampling.seed_ptr + view.slot)
        key = coupled_keys(x, block, position, temperature, seed, scale, PAIRS)
        tl.store(partials.best_ptr + where, tl.max(tl.where(inside, pack(key, ids), 0), axis=1), mask=keep)
