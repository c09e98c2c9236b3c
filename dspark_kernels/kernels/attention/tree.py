"""Attention of a step's packed rows over paged contexts and over the rows of the same step, in one launch.

    score_{i,j} = softcap(scale * q_i . k_j),  out_i = sum over visible j of exp(score_{i,j} - lse_i) v_j

A tile holds BLOCK_M packed rows of one request and one KV head: forward row x group head, so that keys are read once for a group
and once for all rows. A request's context is cut into parts by the work table; each part is an item, the last part of a tile also
has the request's own rows. The item that arrives last merges the parts of a tile in their order. Symbols: R requests, S state
slots, N rows, Hq/Hkv query and KV heads, G = Hq / Hkv, D head size, M tree slots. Reference: reference/attention.py. Sources:
FlashAttention (arXiv 2205.14135), split-KV decoding (Flash-Decoding, Dao et al. 2023), tree masks (SpecInfer, arXiv 2305.09781).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives.activations import tanh
from ..primitives.constants import LN2, LOG2E, NEG_INF, PLAN_COLUMNS
from ..primitives.options import options_of
from ..primitives.sync import arrive
from ..primitives.widen import as_stored, fp8_by_bits, fp8_by_cast
from .args import Ancestors, AttentionTile, Cache, Pages, Rows
from .plan import CONTEXT, FIRST_ROW, KEY_BEGIN, KEY_END, PART, PARTIAL, PARTS, ROW_TILE, ROWS, SLOT, TREE_SLOTS

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _depths(words):
    """Number of proper ancestors: bits of int64 words, less one."""
    x = words - ((words >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x += x >> 8
    x += x >> 16
    x += x >> 32
    return (x & 0x7F).to(tl.int32) - 1


class Running(NamedTuple):
    """A softmax that keys join block by block: scores in powers of 2, `top` their maximum, `total` the sum of 2^(score - top)."""

    acc: Any  # fp32 [BLOCK_M, HEAD], the sum of 2^(score - top) v
    top: Any  # fp32 [BLOCK_M]
    total: Any  # fp32 [BLOCK_M]


class TileRows(NamedTuple):
    """The packed rows [BLOCK_M] of a tile, and what they may see."""

    q: Any  # [BLOCK_M, HEAD]
    slot: Any
    context: Any  # keys of the request's context
    first_row: Any  # of the request
    count: Any  # rows of the request
    own_row: Any  # int32 [BLOCK_M], counted from first_row
    valid: Any
    words: Any  # int64 [BLOCK_M], ancestors; 0 without trees
    lowest_key: Any  # int32 [BLOCK_M], keys at positions below are outside the window


@triton.jit
def _join(q, k, v, seen, scale, softcap, running):
    """One block of keys joins: k, v [BLOCK_N, HEAD], seen [BLOCK_M, BLOCK_N]."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if softcap is not None:
        scores = tanh(scores / softcap) * (softcap * LOG2E)
    else:
        scores *= LOG2E
    scores = tl.where(seen, scores, NEG_INF)
    higher = tl.maximum(running.top, tl.max(scores, axis=1))
    base = tl.where(higher == NEG_INF, 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(running.top - base)
    acc = tl.dot(weights.to(v.dtype), v, running.acc * shrink[:, None], input_precision="ieee")
    return Running(acc, higher, running.total * shrink + tl.sum(weights, axis=1))


@triton.jit
def _write_padding(before, behind, num_rows, out, out_lse, TILE: tl.constexpr):
    """This program's share of the rows of no request: before the first, behind the last."""
    HEADS: tl.constexpr = TILE.KV_HEADS * TILE.GROUP
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    HEAD: tl.constexpr = TILE.HEAD
    d = tl.arange(0, HEAD)
    padding = (before + num_rows - behind) * HEADS
    for block in range(tl.program_id(0), tl.cdiv(padding, BLOCK_M), tl.num_programs(0)):
        pair = block * BLOCK_M + tl.arange(0, BLOCK_M)
        row = pair // HEADS
        row = tl.where(row < before, row, row - before + behind).to(tl.int64)
        head = (pair % HEADS).to(tl.int64)
        at = out.ptr + row * out.stride_row + head * out.stride_head
        zeros = tl.zeros([BLOCK_M, HEAD], out.ptr.dtype.element_ty)
        tl.store(at[:, None] + d[None, :], zeros, mask=(pair < padding)[:, None] & (d < TILE.D)[None, :])
        if out_lse.ptr is not None:
            lse_ptrs = out_lse.ptr + row * out_lse.stride_row + head * out_lse.stride_head
            tl.store(lse_ptrs, tl.full([BLOCK_M], NEG_INF, tl.float32), mask=pair < padding)


@triton.jit
def _load_rows(base_ptr, offsets, there, TILE: tl.constexpr):
    """[N, HEAD] of a tensor whose rows begin at these offsets; 0 where nothing is `there` and beyond D."""
    d = tl.arange(0, TILE.HEAD)
    return tl.load(base_ptr + offsets[:, None] + d[None, :], mask=there[:, None] & (d < TILE.D)[None, :], other=0)


@triton.jit
def _join_context(
    running, rows, kv_head, keys, values, pages, key_begin, key_end, scale, softcap, window, WIDEN: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A part of the context.

    PAGES_AHEAD: the pages of a block are loaded with the block before. Then two blocks of keys and values are on their way at a
    time, where loads of pages in between would leave one.
    """
    dtype: tl.constexpr = rows.q.dtype
    n = tl.arange(0, TILE.BLOCK_N)
    m = tl.arange(0, TILE.BLOCK_M)
    k_base = keys.ptr + kv_head * keys.stride_head
    v_base = values.ptr + kv_head * values.stride_head
    table = pages.ptr + rows.slot * pages.stride
    least = 0
    if window is not None:
        least = tl.min(tl.where(rows.valid, rows.lowest_key, 2147483647), axis=0)
    if TILE.PAGES_AHEAD:
        ahead = tl.load(table + (key_begin + n) // TILE.PAGE_SIZE, mask=key_begin + n < key_end, other=-1)
    for begin in tl.range(key_begin, key_end, TILE.BLOCK_N, num_stages=TILE.STAGES):
        key = begin + n
        there = key < key_end
        if window is not None:
            there = there & (key >= least)
        if TILE.PAGES_AHEAD:
            page = ahead.to(tl.int64)
            following = key + TILE.BLOCK_N
            ahead = tl.load(table + following // TILE.PAGE_SIZE, mask=following < key_end, other=-1)
        else:
            page = tl.load(table + key // TILE.PAGE_SIZE, mask=there, other=-1).to(tl.int64)
        there = there & (page >= 0) & (page < pages.num_pages)
        within = (key % TILE.PAGE_SIZE).to(tl.int64)
        k = _load_rows(k_base, page * keys.stride_page + within * keys.stride_slot, there, TILE)
        v = _load_rows(v_base, page * values.stride_page + within * values.stride_slot, there, TILE)
        seen = there[None, :] & (m >= 0)[:, None]
        if window is not None:
            seen = seen & (key[None, :] >= rows.lowest_key[:, None])
        running = _join(rows.q, WIDEN(k, dtype), WIDEN(v, dtype), seen, scale, softcap, running)
    return running


@triton.jit
def _sees_own(own, there, rows, ancestors, window, TILE: tl.constexpr):
    """Which own rows [OWN_BLOCK] each packed row sees, bool [BLOCK_M, OWN_BLOCK]."""
    seen = there[None, :] & rows.valid[:, None]
    own_depth = own
    if ancestors.ptr is not None:
        # In halves of 32 bits, which take half the registers.
        half = tl.where((own < 32)[None, :], rows.words.to(tl.int32)[:, None], (rows.words >> 32).to(tl.int32)[:, None])
        named = ((half >> (own & 31)[None, :]) & 1) != 0
        seen = seen & tl.where(rows.count <= TREE_SLOTS, named, own[None, :] <= rows.own_row[:, None])
        if window is not None:
            tree = ancestors.ptr + rows.slot * ancestors.stride_slot + rows.first_row * ancestors.stride_row
            own_words = tl.load(tree + own * ancestors.stride_index, mask=there & (own < ancestors.slots), other=0)
            own_depth = tl.where(rows.count <= TREE_SLOTS, _depths(own_words), own)
    elif not TILE.FULL:
        seen = seen & (own[None, :] <= rows.own_row[:, None])
    if window is not None:
        seen = seen & ((rows.context + own_depth)[None, :] >= rows.lowest_key[:, None])
    return seen


@triton.jit
def _join_own(
    running, rows, tile, with_own, kv_head, keys, values, pages, slot_mapping_ptr, new_keys, new_values, ancestors, scale, softcap,
    window, WIDEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The request's own rows, where `with_own`: given apart, or where the cache has them by now."""
    dtype: tl.constexpr = rows.q.dtype
    OWN_BLOCK: tl.constexpr = TILE.OWN_BLOCK
    own_begin = tile * 0
    own_end = rows.count
    if ancestors.ptr is None:
        if not TILE.FULL:
            own_end = tl.minimum((tile * TILE.BLOCK_M + TILE.BLOCK_M - 1) // TILE.GROUP + 1, rows.count)
        if window is not None:
            own_begin = tl.maximum(tile * TILE.BLOCK_M // TILE.GROUP - window + 1, 0) // OWN_BLOCK * OWN_BLOCK
    own_end = tl.where(with_own, own_end, 0)
    for begin in tl.range(own_begin, own_end, OWN_BLOCK, num_stages=TILE.OWN_STAGES):
        own = begin + tl.arange(0, OWN_BLOCK)
        there = own < own_end
        key_row = rows.first_row + own
        seen = _sees_own(own, there, rows, ancestors, window, TILE)
        if new_keys.ptr is not None:
            k = _load_rows(new_keys.ptr, key_row * new_keys.stride_row + kv_head * new_keys.stride_head, there, TILE)
            v = _load_rows(new_values.ptr, key_row * new_values.stride_row + kv_head * new_values.stride_head, there, TILE)
        else:
            at = tl.load(slot_mapping_ptr + key_row, mask=there, other=-1)
            page = at // TILE.PAGE_SIZE
            within = at % TILE.PAGE_SIZE
            there = there & (at >= 0) & (page < pages.num_pages)
            seen = seen & there[None, :]
            k_base = keys.ptr + kv_head * keys.stride_head
            v_base = values.ptr + kv_head * values.stride_head
            k = WIDEN(_load_rows(k_base, page * keys.stride_page + within * keys.stride_slot, there, TILE), dtype)
            v = WIDEN(_load_rows(v_base, page * values.stride_page + within * values.stride_slot, there, TILE), dtype)
        # A draft whose values overflowed must not reach the rows before it: 0 * NaN is NaN.
        broken = (tl.abs(v.to(tl.float32)) <= LARGEST) == 0
        running = _join(rows.q, k, tl.where(broken, 0.0, v).to(dtype), seen, scale, softcap, running)
        hit = tl.max(tl.where(seen, tl.max(broken.to(tl.int32), axis=1)[None, :], 0), axis=1)
        running = Running(tl.where((hit > 0)[:, None], float("nan"), running.acc), running.top, running.total)
    return running


@triton.jit
def _merge_parts(running, rows, item, kv_head, scratch, TILE: tl.constexpr):
    """(Running of all parts of a tile, whether this program writes it): the last part to arrive adds all up again, in their
    order."""
    m = tl.arange(0, TILE.BLOCK_M)
    d = tl.arange(0, TILE.HEAD)
    acc, top, total = running.acc, running.top, running.total
    last = item.parts == 1
    merged = 0
    size = tl.minimum(rows.count * TILE.GROUP - item.tile * TILE.BLOCK_M, TILE.BLOCK_M)
    if item.parts > 1:
        mine = (item.partial + m).to(tl.int64) * TILE.KV_HEADS + kv_head
        tl.store(scratch.partial_ptr + (mine * TILE.HEAD)[:, None] + d[None, :], acc, mask=rows.valid[:, None])
        tl.store(scratch.norms_ptr + mine * 2, top, mask=rows.valid)
        tl.store(scratch.norms_ptr + mine * 2 + 1, total, mask=rows.valid)
        last = arrive(scratch.arrivals_ptr + (item.number - item.part).to(tl.int64) * TILE.KV_HEADS + kv_head, item.parts)
        merged = tl.where(last, item.parts, 0)
    acc = tl.where(item.parts > 1, 0.0, acc)
    top = tl.where(item.parts > 1, NEG_INF, top)
    total = tl.where(item.parts > 1, 0.0, total)
    for other in tl.range(0, merged, num_stages=1):
        theirs = (item.partial + (other - item.part) * size + m).to(tl.int64) * TILE.KV_HEADS + kv_head
        its_top = tl.load(scratch.norms_ptr + theirs * 2, mask=rows.valid, other=NEG_INF)
        its_total = tl.load(scratch.norms_ptr + theirs * 2 + 1, mask=rows.valid, other=0.0)
        its_acc = tl.load(scratch.partial_ptr + (theirs * TILE.HEAD)[:, None] + d[None, :], mask=rows.valid[:, None], other=0.0)
        higher = tl.maximum(top, its_top)
        base = tl.where(higher == NEG_INF, 0.0, higher)
        keep = tl.exp2(top - base)
        add = tl.exp2(its_top - base)
        acc = acc * keep[:, None] + its_acc * add[:, None]
        total = total * keep + its_total * add
        top = higher
    return Running(acc, top, total), last


@triton.jit
def _write_tile(running, rows, row, head, living, sinks_ptr, out, out_lse, TILE: tl.constexpr):
    """Outputs of a tile whose keys have all joined; the sinks join last."""
    d = tl.arange(0, TILE.HEAD)
    acc, top, total = running.acc, running.top, running.total
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=living, other=NEG_INF).to(tl.float32) * LOG2E
        higher = tl.maximum(top, sink)
        base = tl.where(higher == NEG_INF, 0.0, higher)
        shrink = tl.exp2(top - base)
        acc *= shrink[:, None]
        total = total * shrink + tl.exp2(sink - base)
        top = higher
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = out.ptr + row * out.stride_row + head * out.stride_head
    tl.store(at[:, None] + d[None, :], result.to(rows.q.dtype), mask=rows.valid[:, None] & (d < TILE.D)[None, :])
    if out_lse.ptr is not None:
        lse = tl.where(total == 0.0, NEG_INF, (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN2)
        tl.store(out_lse.ptr + row * out_lse.stride_row + head * out_lse.stride_head, lse, mask=rows.valid)


class Item(NamedTuple):
    """A row of the work table: some keys of a request's context for one tile of its rows."""

    number: Any
    tile: Any
    part: Any  # of `parts` of the tile
    parts: Any
    partial: Any  # first row of the part's partial result


@triton.jit
def _attend(
    queries, keys, values, pages, slot_mapping_ptr, new_keys, new_values, ancestors, sinks_ptr, table, out, out_lse, scratch,
    num_rows, max_items, scale, softcap, window, WIDEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All items of this program, and its share of the rows of no request. Records: args.py."""
    KV_HEADS: tl.constexpr = TILE.KV_HEADS
    GROUP: tl.constexpr = TILE.GROUP
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    HEAD: tl.constexpr = TILE.HEAD
    m = tl.arange(0, BLOCK_M)
    count = tl.minimum(tl.load(table.counts_ptr), max_items)
    _write_padding(tl.load(table.counts_ptr + 1), tl.load(table.counts_ptr + 2), num_rows, out, out_lse, TILE)
    for work in range(tl.program_id(0), count * KV_HEADS, tl.num_programs(0)):
        kv_head = (work % KV_HEADS).to(tl.int64)
        number = work // KV_HEADS
        entry = table.items_ptr + number * PLAN_COLUMNS
        slot = tl.load(entry + SLOT).to(tl.int64)
        context = tl.load(entry + CONTEXT)
        first_row = tl.load(entry + FIRST_ROW).to(tl.int64)
        rows_of_request = tl.load(entry + ROWS)
        tile = tl.load(entry + ROW_TILE)
        item = Item(number, tile, tl.load(entry + PART), tl.load(entry + PARTS), tl.load(entry + PARTIAL))

        packed = tile * BLOCK_M + m
        valid = packed < rows_of_request * GROUP
        living = packed < tl.where(slot >= 0, rows_of_request * GROUP, 0)
        own_row = packed // GROUP
        row = first_row + own_row
        head = kv_head * GROUP + packed % GROUP
        q = _load_rows(queries.ptr, row * queries.stride_row + head * queries.stride_head, valid, TILE)
        depth = own_row  # where a row stands behind the context
        words = tl.zeros([BLOCK_M], tl.int64)
        if ancestors.ptr is not None:
            tree = ancestors.ptr + slot * ancestors.stride_slot + first_row * ancestors.stride_row
            words = tl.load(tree + own_row * ancestors.stride_index, mask=living & (own_row < ancestors.slots), other=0)
            depth = tl.where(
                rows_of_request <= TREE_SLOTS, _depths(words), own_row
            )  # more rows are no tree but a piece of a prompt
        lowest_key = tl.zeros([BLOCK_M], tl.int32)
        if window is not None:
            lowest_key = context + depth - window + 1
        rows = TileRows(q, slot, context, first_row, rows_of_request, own_row, valid, words, lowest_key)

        k_scale = scale
        v_scale = 1.0
        if keys.scale_ptr is not None:
            k_scale *= tl.load(keys.scale_ptr + kv_head * keys.stride_scale)
        if values.scale_ptr is not None:
            v_scale = tl.load(values.scale_ptr + kv_head * values.stride_scale)
        running = Running(
            tl.zeros([BLOCK_M, HEAD], tl.float32),
            tl.full([BLOCK_M], NEG_INF, tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
        )
        running = _join_context(
            running, rows, kv_head, keys, values, pages, tl.load(entry + KEY_BEGIN), tl.load(entry + KEY_END), k_scale, softcap,
            window, WIDEN, TILE,
        )  # fmt: skip
        # Own rows, with the last part of the context. Those given apart have no scales.
        acc, own_scale = running.acc, k_scale
        if new_keys.ptr is not None:
            acc *= v_scale
            v_scale = 1.0
            own_scale = scale
        running = _join_own(
            Running(acc, running.top, running.total), rows, tile, (item.part == item.parts - 1) & (slot >= 0), kv_head, keys, values,
            pages, slot_mapping_ptr, new_keys, new_values, ancestors, own_scale, softcap, window, WIDEN, TILE,
        )  # fmt: skip
        running = Running(running.acc * v_scale, running.top, running.total)
        running, last = _merge_parts(running, rows, item, kv_head, scratch, TILE)
        if last:
            _write_tile(running, rows, row, head, living, sinks_ptr, out, out_lse, TILE)


@triton.jit(do_not_specialize=["num_rows", "num_pages", "max_items", "scale", "tree_slots", "stride_block_tables", "stride_trees"])
def tree_attention_kernel(
    inputs,  # AttentionInputs
    table,  # WorkTable
    results,  # AttentionResults
    scratch,  # AttentionScratch
    num_rows, num_pages, max_items, scale,
    softcap,  # float or None
    window,  # int or None
    tree_slots,  # M where ancestors go by slot, 64 where by row
    strides,  # CacheStrides
    stride_block_tables,
    new_strides,  # NewStrides
    stride_trees,  # of ancestors from slot to slot
    row_strides,  # RowStrides
    WIDEN: tl.constexpr,
    TILE: tl.constexpr,  # AttentionTile
):  # fmt: skip
    # The records are made in the call: a variable would hold a stride of 1 as a number that the compiler does not know.
    _attend(
        Rows(inputs.q_ptr, strides.q_row, strides.q_head),
        Cache(inputs.k_ptr, strides.k_page, strides.k_slot, strides.k_head, inputs.k_scale_ptr, strides.k_scale),
        Cache(inputs.v_ptr, strides.v_page, strides.v_slot, strides.v_head, inputs.v_scale_ptr, strides.v_scale),
        Pages(inputs.block_tables_ptr, stride_block_tables, num_pages),
        inputs.slot_mapping_ptr,
        Rows(inputs.k_new_ptr, new_strides.k_row, new_strides.k_head),
        Rows(inputs.v_new_ptr, new_strides.v_row, new_strides.v_head),
        Ancestors(inputs.ancestors_ptr, stride_trees, row_strides.ancestors_row, row_strides.ancestors_index, tree_slots),
        inputs.sinks_ptr,
        table,
        Rows(results.out_ptr, row_strides.out_row, row_strides.out_head),
        Rows(results.lse_ptr, row_strides.lse_row, row_strides.lse_head),
        scratch,
        num_rows,
        max_items,
        scale,
        softcap,
        window,
        WIDEN,
        TILE,
    )


WIDENINGS = {"as_stored": as_stored, "fp8_by_cast": fp8_by_cast, "fp8_by_bits": fp8_by_bits}


def launch_tree_attention(programs, args, *, widening, constants, config):
    """Launch `programs` programs that share the items of a work table. constants: of AttentionTile, by name."""
    tree_attention_kernel[(programs,)](
        *args,
        WIDEN=WIDENINGS[widening],
        TILE=AttentionTile(
            **constants,
            STAGES=config.num_stages,
            PAGES_AHEAD=config.pages_ahead,
            OWN_STAGES=config.own_stages,
            OWN_BLOCK=config.own_block,
        ),
        **options_of(config, fuse=True),
    )
