"""Attention of a step's packed rows over paged contexts and over the rows of the same step, in one launch.

    score_{i,j} = softcap(scale * q_i . k_j),  out_i = sum over visible j of exp(score_{i,j} - lse_i) v_j

A tile holds BLOCK_M packed rows of one request and one KV head: forward row x group head, so that keys are read once for a group
and once for all rows. A request's context is cut into parts by the work table; each part is an item, the last part of a tile also
has the request's own rows. The item that arrives last merges the parts of a tile in their order. Symbols: R requests, S state
slots, N rows, Hq/Hkv query and KV heads, G = Hq / Hkv, D head size, M tree slots. Oracle: reference/attention.py. Sources:
FlashAttention (arXiv 2205.14135), split-KV decoding (Flash-Decoding, Dao et al. 2023), tree masks (SpecInfer, arXiv 2305.09781).
"""

import triton
import triton.language as tl

from .primitives.activations import tanh
from .primitives.packing import owner_of
from .primitives.slots import state_slots
from .primitives.ticket import arrive
from .primitives.widen import as_stored, fp8_by_bits, fp8_by_cast

NEG_INF = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(3.4028234663852886e38)
TREE_SLOTS = tl.constexpr(64)  # bits of an ancestor word
OVERHEAD = tl.constexpr(2)  # blocks of keys that an item costs beyond its own: queries, own rows, partial result

# Columns of an item.
SLOT = tl.constexpr(0)
CONTEXT = tl.constexpr(1)
FIRST_ROW = tl.constexpr(2)
ROWS = tl.constexpr(3)
TILE = tl.constexpr(4)
PART = tl.constexpr(5)
PARTS = tl.constexpr(6)
KEY_BEGIN = tl.constexpr(7)
KEY_END = tl.constexpr(8)
PARTIAL = tl.constexpr(9)
COLUMNS = tl.constexpr(10)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "max_items", "max_keys", "partial_rows"])
def plan_attention_kernel(
    query_start_ptr,  # [R+1]
    context_lens_ptr,  # [S]
    slots_ptr,  # [R] or None
    items_ptr,  # [max_items, 10]
    counts_ptr,  # [3]
    num_requests, num_slots, num_rows, max_items, max_keys, partial_rows,
    window,  # int or None
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PROGRAMS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr, FINER: tl.constexpr, INVARIANT_PARTS: tl.constexpr, REQUESTS: tl.constexpr,
    LOG_REQUESTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cut every request's context into parts. Each program scans the whole batch and writes its own items."""
    r = tl.arange(0, REQUESTS)
    batch = r < num_requests
    slots = state_slots(slots_ptr, r, num_requests, num_slots).to(tl.int32)
    start = tl.minimum(tl.maximum(tl.load(query_start_ptr + r, mask=batch, other=0), 0), num_rows)
    end = tl.minimum(tl.maximum(tl.load(query_start_ptr + r + 1, mask=batch, other=0), start), num_rows)
    rows = tl.where(batch, end - start, 0)
    context = tl.load(context_lens_ptr + slots, mask=batch & (slots >= 0), other=0)
    context = tl.minimum(tl.maximum(context, 0), max_keys).to(tl.int32)
    # Keys before `low` are outside the window of every row: depths are at least -1 (an ancestor word of 0).
    low = tl.zeros([REQUESTS], tl.int32)
    if window is not None:
        low = tl.maximum(context - window, 0) // BLOCK_N * BLOCK_N
    blocks = tl.cdiv(context - low, BLOCK_N)
    tiles = tl.cdiv(rows * GROUP, BLOCK_M)

    if INVARIANT_PARTS > 0:
        # By the request's own context alone.
        parts = tl.minimum(tl.cdiv(blocks, MIN_BLOCKS), INVARIANT_PARTS)
    else:
        # An even share of all blocks per program, or a fraction of it where that leaves fewer programs waiting at the end.
        total = tl.sum(tiles.to(tl.int64) * blocks, axis=0)
        share = tl.maximum(tl.cdiv(total * KV_HEADS, PROGRAMS), 1).to(tl.int32)
        parts = tl.zeros([REQUESTS], tl.int32)
        least = total * 0 + 9223372036854775807
        for finer in tl.static_range(1, FINER + 1):
            chunk = tl.maximum(tl.cdiv(share, finer), MIN_BLOCKS)
            some = tl.maximum(tl.cdiv(blocks, chunk), 1)
            longest = tl.max(tl.where(tiles > 0, tl.cdiv(blocks, some), 0), axis=0)
            rounds = tl.cdiv(tl.sum((tiles * some).to(tl.int64), axis=0) * KV_HEADS, PROGRAMS)
            cost = rounds * (longest + OVERHEAD)
            parts = tl.where(cost < least, some, parts)
            least = tl.minimum(cost, least)
    parts = tl.maximum(parts, 1)
    chunk = tl.cdiv(blocks, parts)
    parts = tl.maximum(tl.cdiv(blocks, tl.maximum(chunk, 1)), 1)
    # Where partial results would not fit, a request stays whole.
    needed = tl.where(parts > 1, (rows * GROUP).to(tl.int64) * parts, 0)
    parts = tl.where(tl.cumsum(needed, axis=0) <= partial_rows, parts, 1)
    # Starts that do not ascend may ask for more items than there are. The table then ends somewhere: all tiles stay whole, as
    # one cut off between its parts would wait for the rest and leave its counter dirty.
    parts = tl.where(tl.sum(tiles.to(tl.int64) * parts, axis=0) <= max_items, parts, 1)
    chunk = tl.where(parts > 1, chunk, blocks) * BLOCK_N
    needed = tl.where(parts > 1, rows * GROUP * parts, 0)
    partial = tl.cumsum(needed, axis=0) - needed
    ends = tl.minimum(tl.cumsum((tiles * parts).to(tl.int64), axis=0), 2147483646).to(tl.int32)
    begins = ends - tiles * parts

    if tl.program_id(0) == 0:
        tl.store(counts_ptr, tl.minimum(tl.max(ends, axis=0), max_items))
        tl.store(counts_ptr + 1, tl.min(tl.where(batch, start, num_rows), axis=0))
        tl.store(counts_ptr + 2, tl.max(tl.where(batch, end, 0), axis=0))

    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < max_items
    used = n < tl.max(ends, axis=0)
    owner = tl.where(used, owner_of(tl.where(batch, ends, 2147483647), n, REQUESTS, LOG_REQUESTS, BLOCK), 0)
    of_parts = tl.gather(parts, owner, axis=0)
    of_rows = tl.gather(rows, owner, axis=0)
    of_context = tl.gather(context, owner, axis=0)
    of_chunk = tl.gather(chunk, owner, axis=0)
    index = n - tl.gather(begins, owner, axis=0)
    tile = index // of_parts
    part = index % of_parts
    key_begin = tl.gather(low, owner, axis=0) + part * of_chunk
    key_end = tl.minimum(key_begin + of_chunk, of_context)
    if window is not None:
        # Later tiles of a prompt see less; a tree's depths begin at 0 wherever its rows stand.
        behind = tl.maximum(tile * BLOCK_M // GROUP - (TREE_SLOTS - 1), 0)
        key_begin = tl.maximum(key_begin, tl.maximum(of_context - window + behind, 0) // BLOCK_N * BLOCK_N)
    packed = tl.minimum(of_rows * GROUP - tile * BLOCK_M, BLOCK_M)
    first = tl.gather(partial, owner, axis=0) + of_parts * tile * BLOCK_M + part * packed
    item = items_ptr + n * COLUMNS
    tl.store(item + SLOT, tl.where(used, tl.gather(slots, owner, axis=0), -1), mask=inside)
    tl.store(item + CONTEXT, tl.where(used, of_context, 0), mask=inside)
    tl.store(item + FIRST_ROW, tl.where(used, tl.gather(start, owner, axis=0), 0), mask=inside)
    tl.store(item + ROWS, tl.where(used, of_rows, 0), mask=inside)
    tl.store(item + TILE, tl.where(used, tile, 0), mask=inside)
    tl.store(item + PART, tl.where(used, part, 0), mask=inside)
    tl.store(item + PARTS, tl.where(used, of_parts, 0), mask=inside)
    tl.store(item + KEY_BEGIN, tl.where(used, key_begin, 0), mask=inside)
    tl.store(item + KEY_END, tl.where(used, key_end, 0), mask=inside)
    tl.store(item + PARTIAL, tl.where(used, first, 0), mask=inside)


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
    """One block of keys joins the running softmax: scores in units of log2, `top` their maximum, `total` the sum of 2^score.

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


@triton.jit(do_not_specialize=["num_rows", "num_pages", "max_items", "scale", "tree_slots", "stride_b", "stride_as"])
def tree_attention_kernel(
    q_ptr,  # [N, Hq, D]
    k_ptr, v_ptr,  # [pages, page_size, Hkv, D], e4m3 as bytes
    k_scale_ptr, v_scale_ptr,  # [1] or [Hkv], or None
    block_tables_ptr,  # [S, max_pages]
    slot_mapping_ptr,  # [N], or None with k_new
    k_new_ptr, v_new_ptr,  # [N, Hkv, D] or None
    ancestors_ptr,  # [N] or [S, M], or None
    sinks_ptr,  # [Hq] or None
    items_ptr,  # [max_items, 10]
    counts_ptr,  # [3]
    out_ptr,  # [N, Hq, D]
    lse_ptr,  # [N, Hq] or None
    arrivals_ptr,  # [max_items, Hkv]
    partial_ptr,  # [partial_rows, Hkv, HEAD]
    norms_ptr,  # [partial_rows, Hkv, 2]
    num_rows, num_pages, max_items, scale,
    softcap,  # float or None
    window,  # int or None
    tree_slots,  # M where ancestors go by slot, 64 where by row
    stride_qn, stride_qh, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh, stride_ksc, stride_vsc, stride_b,
    stride_nn, stride_nh, stride_wn, stride_wh, stride_as, stride_an, stride_ai, stride_on, stride_oh, stride_ln, stride_lh,
    WIDEN: tl.constexpr, FULL: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OWN_STAGES: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD)
    in_head = (d < D)[None, :]
    count = tl.minimum(tl.load(counts_ptr), max_items)
    before = tl.load(counts_ptr + 1)
    behind = tl.load(counts_ptr + 2)

    # Rows of no request: before the first, behind the last.
    padding = (before + num_rows - behind) * (KV_HEADS * GROUP)
    for block in range(tl.program_id(0), tl.cdiv(padding, BLOCK_M), tl.num_programs(0)):
        pair = block * BLOCK_M + m
        row = pair // (KV_HEADS * GROUP)
        row = tl.where(row < before, row, row - before + behind).to(tl.int64)
        head = (pair % (KV_HEADS * GROUP)).to(tl.int64)
        at = out_ptr + row * stride_on + head * stride_oh
        tl.store(at[:, None] + d[None, :], tl.zeros([BLOCK_M, HEAD], dtype), mask=(pair < padding)[:, None] & in_head)
        if lse_ptr is not None:
            tl.store(lse_ptr + row * stride_ln + head * stride_lh, tl.full([BLOCK_M], NEG_INF, tl.float32), mask=pair < padding)

    for work in range(tl.program_id(0), count * KV_HEADS, tl.num_programs(0)):
        kv_head = (work % KV_HEADS).to(tl.int64)
        number = work // KV_HEADS
        item = items_ptr + number * COLUMNS
        slot = tl.load(item + SLOT).to(tl.int64)
        context = tl.load(item + CONTEXT)
        first_row = tl.load(item + FIRST_ROW).to(tl.int64)
        rows = tl.load(item + ROWS)
        tile = tl.load(item + TILE)
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
        q = tl.load(q_ptr + (row * stride_qn + head * stride_qh)[:, None] + d[None, :], mask=valid[:, None] & in_head, other=0.0)

        # Depth: where a row stands behind the context.
        depth = own_row
        words = tl.zeros([BLOCK_M], tl.int64)
        if ancestors_ptr is not None:
            tree = ancestors_ptr + slot * stride_as + first_row * stride_an
            words = tl.load(tree + own_row * stride_ai, mask=living & (own_row < tree_slots), other=0)
            depth = tl.where(rows <= TREE_SLOTS, _depths(words), own_row)  # more rows are no tree but a piece of a prompt
        hidden = tl.zeros([BLOCK_M], tl.int32)  # keys at positions below are outside the window
        lowest = 0
        if window is not None:
            hidden = context + depth - window + 1
            lowest = tl.min(tl.where(valid, hidden, 2147483647), axis=0)

        k_scale = scale
        v_scale = 1.0
        if k_scale_ptr is not None:
            k_scale *= tl.load(k_scale_ptr + kv_head * stride_ksc)
        if v_scale_ptr is not None:
            v_scale = tl.load(v_scale_ptr + kv_head * stride_vsc)
        k_base = k_ptr + kv_head * stride_kh
        v_base = v_ptr + kv_head * stride_vh
        acc = tl.zeros([BLOCK_M, HEAD], tl.float32)
        top = tl.full([BLOCK_M], NEG_INF, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)

        for begin in tl.range(key_begin, key_end, BLOCK_N, num_stages=STAGES):
            key = begin + n
            there = key < key_end
            if window is not None:
                there = there & (key >= lowest)
            page = tl.load(block_tables_ptr + slot * stride_b + key // PAGE_SIZE, mask=there, other=-1).to(tl.int64)
            there = there & (page >= 0) & (page < num_pages)
            within = (key % PAGE_SIZE).to(tl.int64)
            here = there[:, None] & in_head
            k = tl.load(k_base + (page * stride_kp + within * stride_ks)[:, None] + d[None, :], mask=here, other=0)
            v = tl.load(v_base + (page * stride_vp + within * stride_vs)[:, None] + d[None, :], mask=here, other=0)
            seen = there[None, :] & (m >= 0)[:, None]
            if window is not None:
                seen = seen & (key[None, :] >= hidden[:, None])
            acc, top, total = _join(q, WIDEN(k, dtype), WIDEN(v, dtype), seen, k_scale, softcap, acc, top, total)

        # Own rows, with the last part of the context.
        own_scale = k_scale
        if k_new_ptr is not None:
            acc *= v_scale
            v_scale = 1.0
            own_scale = scale
        own_begin = tile * 0
        own_end = rows
        if ancestors_ptr is None:
            if not FULL:
                own_end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, rows)
            if window is not None:
                own_begin = tl.maximum(tile * BLOCK_M // GROUP - window + 1, 0) // OWN_BLOCK * OWN_BLOCK
        own_end = tl.where((part == parts - 1) & (slot >= 0), own_end, 0)
        for begin in tl.range(own_begin, own_end, OWN_BLOCK, num_stages=OWN_STAGES):
            own = begin + tl.arange(0, OWN_BLOCK)
            there = own < own_end
            key_row = first_row + own
            seen = there[None, :] & valid[:, None]
            own_depth = own
            if ancestors_ptr is not None:
                # In halves of 32 bits, which take half the registers.
                half = tl.where((own < 32)[None, :], words.to(tl.int32)[:, None], (words >> 32).to(tl.int32)[:, None])
                named = ((half >> (own & 31)[None, :]) & 1) != 0
                seen = seen & tl.where(rows <= TREE_SLOTS, named, own[None, :] <= own_row[:, None])
                if window is not None:
                    own_words = tl.load(tree + own * stride_ai, mask=there & (own < tree_slots), other=0)
                    own_depth = tl.where(rows <= TREE_SLOTS, _depths(own_words), own)
            elif not FULL:
                seen = seen & (own[None, :] <= own_row[:, None])
            if window is not None:
                seen = seen & ((context + own_depth)[None, :] >= hidden[:, None])
            if k_new_ptr is not None:
                here = there[:, None] & in_head
                k = tl.load(k_new_ptr + (key_row * stride_nn + kv_head * stride_nh)[:, None] + d[None, :], mask=here, other=0.0)
                v = tl.load(v_new_ptr + (key_row * stride_wn + kv_head * stride_wh)[:, None] + d[None, :], mask=here, other=0.0)
            else:
                at = tl.load(slot_mapping_ptr + key_row, mask=there, other=-1)
                page = at // PAGE_SIZE
                within = at % PAGE_SIZE
                there = there & (at >= 0) & (page < num_pages)
                seen = seen & there[None, :]
                here = there[:, None] & in_head
                k = tl.load(k_base + (page * stride_kp + within * stride_ks)[:, None] + d[None, :], mask=here, other=0)
                v = tl.load(v_base + (page * stride_vp + within * stride_vs)[:, None] + d[None, :], mask=here, other=0)
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
            tl.store(partial_ptr + (mine * HEAD)[:, None] + d[None, :], acc, mask=valid[:, None])
            tl.store(norms_ptr + mine * 2, top, mask=valid)
            tl.store(norms_ptr + mine * 2 + 1, total, mask=valid)
            last = arrive(arrivals_ptr + (number - part).to(tl.int64) * KV_HEADS + kv_head, parts)
            merged = tl.where(last, parts, 0)
        acc = tl.where(parts > 1, 0.0, acc)
        top = tl.where(parts > 1, NEG_INF, top)
        total = tl.where(parts > 1, 0.0, total)
        for other in tl.range(0, merged, num_stages=1):
            theirs = (partial + (other - part) * size + m).to(tl.int64) * KV_HEADS + kv_head
            its_top = tl.load(norms_ptr + theirs * 2, mask=valid, other=NEG_INF)
            its_total = tl.load(norms_ptr + theirs * 2 + 1, mask=valid, other=0.0)
            its_acc = tl.load(partial_ptr + (theirs * HEAD)[:, None] + d[None, :], mask=valid[:, None], other=0.0)
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
            at = out_ptr + row * stride_on + head * stride_oh
            tl.store(at[:, None] + d[None, :], result.to(dtype), mask=valid[:, None] & in_head)
            if lse_ptr is not None:
                lse = tl.where(total == 0.0, NEG_INF, (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN2)
                tl.store(lse_ptr + row * stride_ln + head * stride_lh, lse, mask=valid)


def launch_plan_attention(programs, args, *, constants, num_warps):
    """Launch one program per block of items."""
    plan_attention_kernel[(programs,)](*args, **constants, num_warps=num_warps, enable_fp_fusion=False)


WIDENINGS = {"as_stored": as_stored, "fp8_by_cast": fp8_by_cast, "fp8_by_bits": fp8_by_bits}


def launch_tree_attention(programs, args, *, widening, constants, config):
    """Launch `programs` programs that share the items of a work table."""
    tree_attention_kernel[(programs,)](
        *args,
        WIDEN=WIDENINGS[widening],
        **constants,
        STAGES=config.num_stages,
        OWN_STAGES=config.own_stages,
        OWN_BLOCK=config.own_block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
