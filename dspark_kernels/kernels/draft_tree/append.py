"""The children that a depth of a draft tree gives its nodes, and the links of a finished tree.

A node's children are the first words of all blocks' lists together, sorted; or, i.i.d., a draw each: block = arg-max log2(sum of
exponentials of block) - log2(Exp), then id = arg-max log2(weight) - log2(Exp) inside it, on the noise of the child's own slot.
Nodes of a depth in order, a node's children in order, until the request has no room. Symbols as in kernels/draft_tree/static.py; n
nodes a tree has. Records: state TreeState, tree StaticTree, distributions NodeLogits, scratch StaticScratch, step DepthStep, sizes
TreeSizes (args.py)."""

import triton
import triton.language as tl

from ..primitives.constants import BAD_TOKEN_ID, NAN, NEG_INF, NONFINITE_ROW, POS_INF, VOCAB_BLOCK
from ..primitives.philox import DRAFT, DRAFT_LEAF
from ..primitives.race import unpack_id
from ..primitives.slots import state_slots
from ..primitives.sumexp import below_max, log2_scale, numbers
from ..primitives.vocab_blocks import first_block, first_of, merge_blocks, race_blocks, race_ids

TOP_K = tl.constexpr(0)
IID = tl.constexpr(1)
WITHOUT_REPLACEMENT = tl.constexpr(2)

# Of the status of a row, beside the bit NAN.
HAS_FINITE = tl.constexpr(1)


@triton.jit
def _rooms(requests, slots, budgets_ptr, num_nodes):
    """Nodes that each request may have: its budget, at least the anchor."""
    rooms = tl.zeros_like(requests) + num_nodes
    if budgets_ptr is not None:
        budgets = tl.load(budgets_ptr + requests, mask=slots >= 0, other=1)
        rooms = tl.minimum(tl.maximum(budgets, 1), rooms)
    return rooms


@triton.jit
def frontier(requests, slots, step, state, tree, scratch, num_nodes, WIDTH: tl.constexpr):
    """(first node that is to get children, how many such nodes, their depth, n) of each request; count 0: no more children."""
    depth = step.depth
    rooms = _rooms(requests, slots, state.budgets_ptr, num_nodes)
    there = slots >= 0
    if step.level is None:
        record_ptr = scratch.record_ptr + requests * 3
        grown = there & (requests * 0 + depth > 0)
        start = tl.load(record_ptr, mask=grown, other=0, volatile=True)
        count = tl.load(record_ptr + 1, mask=grown, other=0, volatile=True)
        count = tl.where((depth == 0) & (rooms > 1), 1, count)
        total = tl.where(depth == 0, 1, start + count)
        at_depth = depth
    else:
        total = tl.minimum(tl.load(tree.num_nodes_ptr + slots, mask=there, other=0), num_nodes)
        i = tl.arange(0, WIDTH)[None, :]
        depths = tl.load(tree.depths_ptr + slots[:, None] * num_nodes + i, mask=i < total[:, None], other=-1)
        start = tl.min(tl.where(depths == step.level, i, WIDTH), axis=1)
        count = tl.minimum(tl.sum(tl.where(depths == step.level, 1, 0), axis=1), step.width)
        count = tl.where(total < rooms, count, 0)
        at_depth = step.level
    return start, tl.where(there, count, 0), at_depth, total


@triton.jit
def _merge_lists(request, count, step, scratch, sizes, TILE: tl.constexpr):
    """The best words of each row, sorted, from the sorted lists of its blocks; and how many there are."""
    wanted = step.wanted
    ROWS: tl.constexpr = TILE.ROWS
    BLOCKS: tl.constexpr = TILE.BLOCKS
    block = tl.arange(0, BLOCKS)[None, :]
    for first in range(0, count, ROWS):
        f = first + tl.arange(0, ROWS)
        row = request.to(tl.int64) * step.width + f
        inside = (f < count)[:, None] & (block < sizes.chunks)
        heads_ptr = scratch.lists_ptr + (row[:, None] * sizes.chunks + block) * wanted
        taken = tl.zeros([ROWS, BLOCKS], tl.int32)
        words = tl.load(heads_ptr, mask=inside, other=0, volatile=True)
        found = tl.zeros([ROWS], tl.int32)
        for j in range(wanted):
            best = tl.max(words, axis=1)
            tl.store(scratch.best_ptr + row * wanted + j, best, mask=f < count)
            found += tl.where(best > 0, 1, 0)
            won = inside & (words == best[:, None]) & (words > 0)
            taken += tl.where(won, 1, 0)
            more = tl.load(heads_ptr + taken, mask=won & (taken < wanted), other=0, volatile=True)
            words = tl.where(won, more, words)
        tl.store(scratch.found_ptr + request.to(tl.int64) * sizes.num_nodes + f, found, mask=f < count)


@triton.jit
def _count_draws(request, count, step, scratch, sizes, TILE: tl.constexpr):
    """All wanted i.i.d. children for a row that has any token, none for another."""
    block = tl.arange(0, TILE.BLOCKS)[None, :]
    for first in range(0, count, TILE.ROWS):
        f = first + tl.arange(0, TILE.ROWS)
        row = request.to(tl.int64) * step.width + f
        inside = (f < count)[:, None] & (block < sizes.chunks)
        tops = tl.load(scratch.block_max_ptr + row[:, None] * sizes.chunks + block, mask=inside, other=NEG_INF, volatile=True)
        found = tl.where(tl.max(tops, axis=1) > NEG_INF, step.wanted, 0)
        tl.store(scratch.found_ptr + request.to(tl.int64) * sizes.num_nodes + f, found, mask=f < count)


@triton.jit
def _draw_children(
    request, slot, start, total, new, f, at_depth, width, scale, state, distributions, scratch, tokens_ptr, sizes,
    TILE: tl.constexpr,
):  # fmt: skip
    """Tokens of the i.i.d. children total .. total + new - 1, PAIRS at a time. f [WIDTH]: row of each node's parent."""
    vocab = sizes.vocab
    PAIRS: tl.constexpr = TILE.PAIRS
    BLOCKS: tl.constexpr = TILE.BLOCKS
    seed = tl.load(state.seed_ptr + slot)
    anchor = tl.load(state.positions_ptr + slot * state.stride_positions).to(tl.int64)
    position = tl.full([1, 1], 1, tl.int64) + anchor + at_depth
    for first in range(0, new, PAIRS):
        rank = first + tl.arange(0, PAIRS)
        there = rank < new
        node = tl.where(there, total + rank, 0)
        row = tl.gather(f, node, axis=0)
        row_ptrs = distributions.ptr + slot * distributions.stride_slot
        row_ptrs = row_ptrs + tl.where(there, start + row, 0).to(tl.int64) * distributions.stride_node
        rows = tl.where(there, request.to(tl.int64) * width + row, -1)
        top, _, words, tops = merge_blocks(
            scratch.block_max_ptr, scratch.block_sumexp_ptr, rows, sizes.chunks, scale, BLOCKS
        )  # fmt: skip
        weight = tl.log2(tl.maximum(words, 1).to(tl.float32)) + below_max(tops, top[:, None]) * scale
        weight = tl.where(words > 0, weight, NEG_INF)
        block = race_blocks(weight, seed, position, anchor, node[:, None], PAIRS, BLOCKS, DRAFT_LEAF)
        ids = block[:, None] * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)[None, :]
        x = tl.load(row_ptrs[:, None] + ids, mask=there[:, None] & (ids < vocab), other=NEG_INF, volatile=True)
        x = numbers(x.to(tl.float32))
        weight = tl.where(x == NEG_INF, NEG_INF, below_max(x, top[:, None]) * scale)
        token = race_ids(weight, block, seed, position, anchor, node[:, None], PAIRS, DRAFT)
        infinite = there & (top == POS_INF)
        if tl.max(tl.where(infinite, 1, 0), axis=0) > 0:
            ids = first_block(tops, top, BLOCKS)
            x = numbers(tl.load(row_ptrs[:, None] + ids, mask=ids < vocab, other=NEG_INF).to(tl.float32))
            token = tl.where(infinite, first_of(x, ids, top, vocab), token)
        tl.store(tokens_ptr + slot * sizes.num_nodes + node, token.to(tl.int64), mask=there)


@triton.jit
def _store_links(slot, n, tree, num_nodes, WIDTH: tl.constexpr):
    """What follows from the parents of the n nodes of a finished tree, and -1 (ancestors 0) for nodes that are not there."""
    i = tl.arange(0, WIDTH)
    at = slot * num_nodes + i
    there = i < n
    parent = tl.load(tree.parents_ptr + at, mask=there & (i > 0), other=-1, volatile=True)
    depth = tl.load(tree.depths_ptr + at, mask=there, other=-1, volatile=True)
    child = tl.min(tl.where(parent[None, :] == i[:, None], i[None, :], WIDTH), axis=1)
    younger = (parent[None, :] == parent[:, None]) & (i[None, :] > i[:, None]) & there[None, :]
    sibling = tl.min(tl.where(younger, i[None, :], WIDTH), axis=1)
    own = tl.full([WIDTH], 1, tl.int64) << i.to(tl.int64)
    word = tl.where(there, own, 0)
    for at_depth in range(1, tl.max(depth, axis=0) + 1):
        above = tl.gather(word, tl.where((parent >= 0) & (parent < WIDTH), parent, 0), axis=0)
        word = tl.where(depth == at_depth, own | above, word)
    room = i < num_nodes
    none = tl.full([WIDTH], -1, tl.int32)
    tl.store(tree.first_child_ptr + at, tl.where(there & (child < WIDTH), child, none), mask=room)
    tl.store(tree.next_sibling_ptr + at, tl.where(there & (sibling < WIDTH), sibling, none), mask=room)
    tl.store(tree.ancestors_ptr + at, word, mask=room)
    missing = room & (i >= n)
    tl.store(tree.tokens_ptr + at, none.to(tl.int64), mask=missing)
    tl.store(tree.parents_ptr + at, none, mask=missing)
    tl.store(tree.depths_ptr + at, none, mask=missing)
    tl.store(tree.num_nodes_ptr + slot, n)


@triton.jit
def append(
    request, step, last, state, head, tree, distributions, scratch, row_status_ptr, sizes,
    TILE: tl.constexpr,
):  # fmt: skip
    """Children of one request's nodes of a depth, whose rows are there. last: no other depth follows."""
    METHOD: tl.constexpr = TILE.METHOD
    depth, width, num_nodes = step.depth, step.width, sizes.num_nodes
    WIDTH: tl.constexpr = TILE.WIDTH
    requests = request + tl.arange(0, 1)
    slots = state_slots(state.slots_ptr, requests, sizes.num_requests, sizes.num_slots)
    starts, counts, at_depth, totals = frontier(requests, slots, step, state, tree, scratch, num_nodes, WIDTH)
    slot = tl.max(slots, axis=0)
    start = tl.max(starts, axis=0)
    count = tl.max(counts, axis=0)
    total = tl.max(totals, axis=0)
    room = tl.max(_rooms(requests, slots, state.budgets_ptr, num_nodes), axis=0)
    begins = (depth == 0) & (slot >= 0)
    grows = count > 0
    i = tl.arange(0, WIDTH)
    record_ptr = scratch.record_ptr + request * 3
    flags = tl.zeros((), tl.int32)
    if step.level is None:
        # The anchor alone is a tree, too.
        grows = grows | begins
        if begins:
            anchor = tl.load(state.anchors_ptr + slot * state.stride_anchors).to(tl.int64)
            if head is not None:
                flags = tl.where((anchor < 0) | (anchor >= head.vocab), BAD_TOKEN_ID, 0)
            tl.store(tree.tokens_ptr + slot * num_nodes, anchor)
            tl.store(tree.parents_ptr + slot * num_nodes, -1)
            tl.store(tree.depths_ptr + slot * num_nodes, 0)
        elif slot >= 0:
            flags = tl.load(record_ptr + 2, volatile=True)
        if (depth == 0) & (slot < 0):
            tl.store(tree.flags_ptr + request, 0)
    elif slot >= 0:
        flags = tl.load(tree.flags_ptr + request)
    if grows:
        rows = request * width + i
        status = tl.load(row_status_ptr + rows, mask=i < count, other=HAS_FINITE, volatile=True)
        tl.debug_barrier()  # every warp has read what is put back to zero
        tl.store(row_status_ptr + rows, tl.zeros([WIDTH], tl.int32), mask=i < count)
        flags |= tl.max(status & NAN, axis=0)
        flags |= tl.where(tl.min(status & HAS_FINITE, axis=0) == 0, NONFINITE_ROW, 0)
        draws = tl.zeros((), tl.int32)
        scale = tl.full((), 1.0, tl.float32)
        if METHOD == IID:
            temperature = tl.load(state.temperature_ptr + slot)
            draws = tl.where(temperature > 0.0, 1, 0)
            scale = log2_scale(temperature)
        if draws > 0:
            if METHOD == IID:
                _count_draws(request, count, step, scratch, sizes, TILE)
        else:
            _merge_lists(request, count, step, scratch, sizes, TILE)
        tl.debug_barrier()
        found = tl.load(scratch.found_ptr + request.to(tl.int64) * num_nodes + i, mask=i < count, other=0, volatile=True)
        ends = tl.cumsum(found, axis=0)
        new = tl.minimum(tl.sum(found, axis=0), tl.maximum(room - total, 0))
        rank = i - total
        is_new = (rank >= 0) & (rank < new)
        # The row a child comes from: those whose children end at or before it are not it.
        f = tl.sum(tl.where((ends[None, :] <= rank[:, None]) & (i < count)[None, :], 1, 0), axis=1)
        f = tl.where(is_new, f, 0)
        at = slot * num_nodes + i
        tl.store(tree.parents_ptr + at, start + f, mask=is_new)
        tl.store(tree.depths_ptr + at, tl.zeros([WIDTH], tl.int32) + (at_depth + 1), mask=is_new)
        if draws > 0:
            if METHOD == IID:
                _draw_children(
                    request, slot, start, total, new, f, at_depth, width, scale, state, distributions, scratch, tree.tokens_ptr,
                    sizes, TILE,
                )  # fmt: skip
        else:
            place = rank - tl.gather(ends - found, f, axis=0)
            row = request.to(tl.int64) * width + f
            words = tl.load(scratch.best_ptr + row * step.wanted + place, mask=is_new, other=0, volatile=True)
            tl.store(tree.tokens_ptr + at, unpack_id(words), mask=is_new)
        n = total + new
        if last | (new == 0) | (n >= room):
            tl.debug_barrier()
            _store_links(slot, n, tree, num_nodes, WIDTH)
            tl.store(tree.flags_ptr + request, flags)
            new = new * 0
        if step.level is None:
            tl.store(record_ptr, total)
            tl.store(record_ptr + 1, new)
            tl.store(record_ptr + 2, flags)
