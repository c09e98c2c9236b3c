"""Attention of a step's packed rows over paged contexts and over the rows of the same step, in one launch.

    score_{i,j} = softcap(scale * q_i . k_j),  out_i = sum over visible j of exp(score_{i,j} - lse_i) v_j

A tile holds BLOCK_M packed rows of one request and one KV head: forward row x group head, so that keys are read once for a group
and once for all rows. A request's context is cut into parts by the work table; each part is an item, the last part of a tile also
has the request's own rows. The item that arrives last merges the parts of a tile in their order. Symbols: R requests, S state
slots, N rows, Hq/Hkv query and KV heads, G = Hq / Hkv, D head size, M tree slots. Reference: reference/attention.py. Sources:
FlashAttention (arXiv 2205.14135), split-KV decoding (Flash-Decoding, Dao et al. 2023), tree masks (SpecInfer, arXiv 2305.09781).
"""

import triton
import triton.language as tl

from ..primitives.activations import tanh
from ..primitives.constants import LN2, LOG2E, NEG_INF, PLAN_COLUMNS
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


@triton.jit
def _join(q, k, v, seen, scale, softcap, acc, top, total):
    """One block of keys joins the running softmax: scores in sub-blocks of log2, `top` their maximum, `total` the sum of 2^score.

    q [BLOCK_M, HEAD], k, v [BLOCK_N, HEAD], seen [BLOCK_M, BLOCK_N].
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if softcap is not None:
        scores = tanh(scores / softcap) * (softcap * LOG2E)
    else:
        scores *= LOG2E
    scores = tl.where(seen, scores, NEG_INF)
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == NEG_INF, 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def _attend(
    queries, keys, values, pages, slot_mapping_ptr, new_keys, new_values, ancestors, sinks_ptr, table, out, out_lse, scratch,
    num_rows, max_items, scale, softcap, window, WIDEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All items of this program, and its share of the rows of no request. Records: args.py."""
    FULL: tl.constexpr = TILE.FULL
    KV_HEADS: tl.constexpr = TILE.KV_HEADS
    GROUP: tl.constexpr = TILE.GROUP
    D: tl.constexpr = TILE.D
    HEAD: tl.constexpr = TILE.HEAD
    PAGE_SIZE: tl.constexpr = TILE.PAGE_SIZE
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    OWN_BLOCK: tl.constexpr = TILE.OWN_BLOCK
    dtype: tl.constexpr = queries.ptr.dtype.element_ty
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD)
    in_head = (d < D)[None, :]
    count = tl.minimum(tl.load(table.counts_ptr), max_items)
    before = tl.load(table.counts_ptr + 1)
    behind = tl.load(table.counts_ptr + 2)

    # Rows of no request: before the first, behind the last.
    padding = (before + num_rows - behind) * (KV_HEADS * GROUP)
    for block in range(tl.program_id(0), tl.cdiv(padding, BLOCK_M), tl.num_programs(0)):
        pair = block * BLOCK_M + m
        row = pair // (KV_HEADS * GROUP)
        row = tl.where(row < before, row, row - before + behind).to(tl.int64)
        head = (pair % (KV_HEADS * GROUP)).to(tl.int64)
        at = out.ptr + row * out.stride_row + head * out.stride_head
        tl.store(at[:, None] + d[None, :], tl.zeros([BLOCK_M, HEAD], dtype), mask=(pair < padding)[:, None] & in_head)
        if out_lse.ptr is not None:
            tl.store(
                out_lse.ptr + row * out_lse.stride_row + head * out_lse.stride_head,
                tl.full([BLOCK_M], NEG_INF, tl.float32),
                mask=pair < padding,
            )

    for work in range(tl.program_id(0), count * KV_HEADS, tl.num_programs(0)):
        kv_head = (work % KV_HEADS).to(tl.int64)
        number = work // KV_HEADS
        item = table.items_ptr + number * PLAN_COLUMNS
        slot = tl.load(item + SLOT).to(tl.int64)
        context = tl.load(item + CONTEXT)
        first_row = tl.load(item + FIRST_ROW).to(tl.int64)
        rows = tl.load(item + ROWS)
        tile = tl.load(item + ROW_TILE)
        part = tl.load(item + PART)
        parts = tl.load(item + PARTS)
        key_begin = tl.load(item + KEY_BEGIN)
        key_end = tl.load(item + KEY_END)
        partial = tl.load(item + PARTIAL)

        packed = tile * BLOCK_M + m
        valid = packed < rows * GROUP
        living = packed < tl.where(slot >= 0, rows * GROUP, 0)
        own_row = packed // GROUP
        row = first_row + own_row
        head = kv_head * GROUP + packed % GROUP
        q = tl.load(
            queries.ptr + (row * queries.stride_row + head * queries.stride_head)[:, None] + d[None, :],
            mask=valid[:, None] & in_head,
            other=0.0,
        )

        # Depth: where a row stands behind the context.
        depth = own_row
        words = tl.zeros([BLOCK_M], tl.int64)
        if ancestors.ptr is not None:
            tree = ancestors.ptr + slot * ancestors.stride_slot + first_row * ancestors.stride_row
            words = tl.load(tree + own_row * ancestors.stride_index, mask=living & (own_row < ancestors.slots), other=0)
            depth = tl.where(rows <= TREE_SLOTS, _depths(words), own_row)  # more rows are no tree but a piece of a prompt
        hidden = tl.zeros([BLOCK_M], tl.int32)  # keys at positions below are outside the window
        lowest = 0
        if window is not None:
            hidden = context + depth - window + 1
            lowest = tl.min(tl.where(valid, hidden, 2147483647), axis=0)

        k_scale = scale
        v_scale = 1.0
        if keys.scale_ptr is not None:
            k_scale *= tl.load(keys.scale_ptr + kv_head * keys.stride_scale)
        if values.scale_ptr is not None:
            v_scale = tl.load(values.scale_ptr + kv_head * values.stride_scale)
        k_base = keys.ptr + kv_head * keys.stride_head
        v_base = values.ptr + kv_head * values.stride_head
        acc = tl.zeros([BLOCK_M, HEAD], tl.float32)
        top = tl.full([BLOCK_M], NEG_INF, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)

        for begin in tl.range(key_begin, key_end, BLOCK_N, num_stages=TILE.STAGES):
            key = begin + n
            there = key < key_end
            if window is not None:
                there = there & (key >= lowest)
            page = tl.load(pages.ptr + slot * pages.stride + key // PAGE_SIZE, mask=there, other=-1).to(tl.int64)
            there = there & (page >= 0) & (page < pages.num_pages)
            within = (key % PAGE_SIZE).to(tl.int64)
            here = there[:, None] & in_head
            k = tl.load(k_base + (page * keys.stride_page + within * keys.stride_slot)[:, None] + d[None, :], mask=here, other=0)
            v = tl.load(
                v_base + (page * values.stride_page + within * values.stride_slot)[:, None] + d[None, :], mask=here, other=0
            )
            seen = there[None, :] & (m >= 0)[:, None]
            if window is not None:
                seen = seen & (key[None, :] >= hidden[:, None])
            acc, top, total = _join(q, WIDEN(k, dtype), WIDEN(v, dtype), seen, k_scale, softcap, acc, top, total)

        # Own rows, with the last part of the context.
        own_scale = k_scale
        if new_keys.ptr is not None:
            acc *= v_scale
            v_scale = 1.0
            own_scale = scale
        own_begin = tile * 0
        own_end = rows
        if ancestors.ptr is None:
            if not FULL:
                own_end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, rows)
            if window is not None:
                own_begin = tl.maximum(tile * BLOCK_M // GROUP - window + 1, 0) // OWN_BLOCK * OWN_BLOCK
        own_end = tl.where((part == parts - 1) & (slot >= 0), own_end, 0)
        for begin in tl.range(own_begin, own_end, OWN_BLOCK, num_stages=TILE.OWN_STAGES):
            own = begin + tl.arange(0, OWN_BLOCK)
            there = own < own_end
            key_row = first_row + own
            seen = there[None, :] & valid[:, None]
            own_depth = own
            if ancestors.ptr is not None:
                # In halves of 32 bits, which take half the registers.
                half = tl.where((own < 32)[None, :], words.to(tl.int32)[:, None], (words >> 32).to(tl.int32)[:, None])
                named = ((half >> (own & 31)[None, :]) & 1) != 0
                seen = seen & tl.where(rows <= TREE_SLOTS, named, own[None, :] <= own_row[:, None])
                if window is not None:
                    own_words = tl.load(tree + own * ancestors.stride_index, mask=there & (own < ancestors.slots), other=0)
                    own_depth = tl.where(rows <= TREE_SLOTS, _depths(own_words), own)
            elif not FULL:
                seen = seen & (own[None, :] <= own_row[:, None])
            if window is not None:
                seen = seen & ((context + own_depth)[None, :] >= hidden[:, None])
            if new_keys.ptr is not None:
                here = there[:, None] & in_head
                k = tl.load(
                    new_keys.ptr + (key_row * new_keys.stride_row + kv_head * new_keys.stride_head)[:, None] + d[None, :],
                    mask=here,
                    other=0.0,
                )
                v = tl.load(
                    new_values.ptr + (key_row * new_values.stride_row + kv_head * new_values.stride_head)[:, None] + d[None, :],
                    mask=here,
                    other=0.0,
                )
            else:
                at = tl.load(slot_mapping_ptr + key_row, mask=there, other=-1)
                page = at // PAGE_SIZE
                within = at % PAGE_SIZE
                there = there & (at >= 0) & (page < pages.num_pages)
                seen = seen & there[None, :]
                here = there[:, None] & in_head
                k = tl.load(
                    k_base + (page * keys.stride_page + within * keys.stride_slot)[:, None] + d[None, :], mask=here, other=0
                )
                v = tl.load(
                    v_base + (page * values.stride_page + within * values.stride_slot)[:, None] + d[None, :], mask=here, other=0
                )
                k = WIDEN(k, dtype)
                v = WIDEN(v, dtype)
            # A draft whose values overflowed must not reach the rows before it: 0 * NaN is NaN.
            broken = (tl.abs(v.to(tl.float32)) <= LARGEST) == 0
            acc, top, total = _join(q, k, tl.where(broken, 0.0, v).to(dtype), seen, own_scale, softcap, acc, top, total)
            spoilt = tl.max(broken.to(tl.int32), axis=1)
            hit = tl.max(tl.where(seen, spoilt[None, :], 0), axis=1)
            acc = tl.where((hit > 0)[:, None], float("nan"), acc)
        acc *= v_scale

        # A tile of one part is done; otherwise the last part to arrive adds all of them up again, in their order.
        last = parts == 1
        merged = 0
        size = tl.minimum(rows * GROUP - tile * BLOCK_M, BLOCK_M)
        if parts > 1:
            mine = (partial + m).to(tl.int64) * KV_HEADS + kv_head
            tl.store(scratch.partial_ptr + (mine * HEAD)[:, None] + d[None, :], acc, mask=valid[:, None])
            tl.store(scratch.norms_ptr + mine * 2, top, mask=valid)
            tl.store(scratch.norms_ptr + mine * 2 + 1, total, mask=valid)
            last = arrive(scratch.arrivals_ptr + (number - part).to(tl.int64) * KV_HEADS + kv_head, parts)
            merged = tl.where(last, parts, 0)
        acc = tl.where(parts > 1, 0.0, acc)
        top = tl.where(parts > 1, NEG_INF, top)
        total = tl.where(parts > 1, 0.0, total)
        for other in tl.range(0, merged, num_stages=1):
            theirs = (partial + (other - part) * size + m).to(tl.int64) * KV_HEADS + kv_head
            its_top = tl.load(scratch.norms_ptr + theirs * 2, mask=valid, other=NEG_INF)
            its_total = tl.load(scratch.norms_ptr + theirs * 2 + 1, mask=valid, other=0.0)
            its_acc = tl.load(scratch.partial_ptr + (theirs * HEAD)[:, None] + d[None, :], mask=valid[:, None], other=0.0)
            higher = tl.maximum(top, its_top)
            base = tl.where(higher == NEG_INF, 0.0, higher)
            keep = tl.exp2(top - base)
            add = tl.exp2(its_top - base)
            acc = acc * keep[:, None] + its_acc * add[:, None]
            total = total * keep + its_total * add
            top = higher
        if last:
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
            tl.store(at[:, None] + d[None, :], result.to(dtype), mask=valid[:, None] & in_head)
            if out_lse.ptr is not None:
                lse = tl.where(total == 0.0, NEG_INF, (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN2)
                tl.store(out_lse.ptr + row * out_lse.stride_row + head * out_lse.stride_head, lse, mask=valid)


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
        TILE=AttentionTile(**constants, STAGES=config.num_stages, OWN_STAGES=config.own_stages, OWN_BLOCK=config.own_block),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
