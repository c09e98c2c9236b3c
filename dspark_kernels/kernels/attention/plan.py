"""The work table of attention: the context of every request cut into parts, and which rows each part is for, in one launch.

An item is a part of a tile's keys; a tile holds BLOCK_M packed rows of one request. A part is as long as an even share of all
work, or of the request's own context alone. Records: args.py. Symbols: R requests, S request slots, N rows, G = Hq / Hkv.
Reference: reference/attention.py. Source: split-KV decoding (Flash-Decoding, Dao et al. 2023).
"""

import triton
import triton.language as tl

from ..primitives.constants import PLAN_COLUMNS
from ..primitives.packing import owner_of
from ..primitives.slots import state_slots
from .args import PlanTile

TREE_SLOTS = tl.constexpr(64)  # bits of an ancestor word
OVERHEAD = tl.constexpr(2)  # blocks of keys that an item costs beyond its own: queries, own rows, partial result

# Columns of an item.
SLOT = tl.constexpr(0)
CONTEXT = tl.constexpr(1)
FIRST_ROW = tl.constexpr(2)
ROWS = tl.constexpr(3)
ROW_TILE = tl.constexpr(4)
PART = tl.constexpr(5)
PARTS = tl.constexpr(6)
KEY_BEGIN = tl.constexpr(7)
KEY_END = tl.constexpr(8)
PARTIAL = tl.constexpr(9)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "max_items", "max_keys", "partial_rows"])
def plan_attention_kernel(
    inputs,  # PlanInputs
    table,  # WorkTable
    num_requests, num_slots, num_rows, max_items, max_keys, partial_rows,
    window,  # int or None
    TILE: tl.constexpr,  # PlanTile
):  # fmt: skip
    """Cut every request's context into parts. Each program scans the whole batch and writes its own items."""
    GROUP: tl.constexpr = TILE.GROUP
    KV_HEADS: tl.constexpr = TILE.KV_HEADS
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    PROGRAMS: tl.constexpr = TILE.PROGRAMS
    MIN_BLOCKS: tl.constexpr = TILE.MIN_BLOCKS
    INVARIANT_PARTS: tl.constexpr = TILE.INVARIANT_PARTS
    REQUESTS: tl.constexpr = TILE.REQUESTS
    BLOCK: tl.constexpr = TILE.BLOCK
    r = tl.arange(0, REQUESTS)
    batch = r < num_requests
    slots = state_slots(inputs.slots_ptr, r, num_requests, num_slots).to(tl.int32)
    start = tl.minimum(tl.maximum(tl.load(inputs.query_start_ptr + r, mask=batch, other=0), 0), num_rows)
    end = tl.minimum(tl.maximum(tl.load(inputs.query_start_ptr + r + 1, mask=batch, other=0), start), num_rows)
    rows = tl.where(batch, end - start, 0)
    context = tl.load(inputs.context_lens_ptr + slots, mask=batch & (slots >= 0), other=0)
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
        # An even share of all blocks per program, or a fraction of it where that blocks fewer programs waiting at the end.
        total = tl.sum(tiles.to(tl.int64) * blocks, axis=0)
        share = tl.maximum(tl.cdiv(total * KV_HEADS, PROGRAMS), 1).to(tl.int32)
        parts = tl.zeros([REQUESTS], tl.int32)
        least = total * 0 + 9223372036854775807
        for finer in tl.static_range(1, TILE.FINER + 1):
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
        tl.store(table.counts_ptr, tl.minimum(tl.max(ends, axis=0), max_items))
        tl.store(table.counts_ptr + 1, tl.min(tl.where(batch, start, num_rows), axis=0))
        tl.store(table.counts_ptr + 2, tl.max(tl.where(batch, end, 0), axis=0))

    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < max_items
    used = n < tl.max(ends, axis=0)
    owner = tl.where(used, owner_of(tl.where(batch, ends, 2147483647), n, REQUESTS, TILE.LOG_REQUESTS, BLOCK), 0)
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
    item = table.items_ptr + n * PLAN_COLUMNS
    tl.store(item + SLOT, tl.where(used, tl.gather(slots, owner, axis=0), -1), mask=inside)
    tl.store(item + CONTEXT, tl.where(used, of_context, 0), mask=inside)
    tl.store(item + FIRST_ROW, tl.where(used, tl.gather(start, owner, axis=0), 0), mask=inside)
    tl.store(item + ROWS, tl.where(used, of_rows, 0), mask=inside)
    tl.store(item + ROW_TILE, tl.where(used, tile, 0), mask=inside)
    tl.store(item + PART, tl.where(used, part, 0), mask=inside)
    tl.store(item + PARTS, tl.where(used, of_parts, 0), mask=inside)
    tl.store(item + KEY_BEGIN, tl.where(used, key_begin, 0), mask=inside)
    tl.store(item + KEY_END, tl.where(used, key_end, 0), mask=inside)
    tl.store(item + PARTIAL, tl.where(used, first, 0), mask=inside)


def launch_plan_attention(programs, args, *, constants, num_warps):
    """Launch one program per block of items. constants: of PlanTile, by name."""
    plan_attention_kernel[(programs,)](*args, TILE=PlanTile(**constants), num_warps=num_warps, enable_fp_fusion=False)
