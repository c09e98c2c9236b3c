"""Draft trees of the most probable paths under a sequential head, each distribution that of the whole vocabulary, in one launch.

    survival(child) = survival(node) c(node) q(child | node),  q = softmax of (base + bias(node's token)) / T

Symbols: R requests, S request slots, K positions, V vocabulary, M nodes, r rank, H hidden size, sub-block = 256 ids, group = 32
ids, row = a node of the depth at hand. Reference: reference/tree_draft.py. Source: DSpark, arXiv 2607.05147.

Depth by depth, in two phases. A sweep: items are parts of the vocabulary; each reads its part of W2 once, for all nodes of the
depth that are among the best so far, and keeps the maximum and the integer sum of exponentials of every sub-block and the maximum
of every group. Then an item per row: the row's normaliser, and its M - 1 largest groups, which hold its M - 1 best children: only
their logits are computed again. The last row of a request merges what the rows found into the best nodes (nodes.py) and opens the
next depth. Every phase waits for what the last item of the one before publishes, an earlier ticket: no barrier, no co-residency.
"""

import triton
import triton.language as tl

from ..draft.candidate_heads import awaited, hidden_score, latent_item, latent_programs, weighted
from ..draft.selection import slot_of
from ..primitives.constants import (
    BAD_TOKEN_ID,
    DOT_ROWS,
    NAN,
    NEG_INF,
    NODE_FIELDS,
    NONFINITE_ROW,
    POS_INF,
    SUMEXP_ONE,
    TREE_MAX_GROUP,
    TREE_SUB_BLOCK,
)
from ..primitives.options import options_of
from ..primitives.select import ABSENT, ordered_key, select
from ..primitives.sumexp import below_max, fixed_sums, numbers
from ..primitives.sync import arrive, stores_done, take_item, wait_for
from ..primitives.vocab_blocks import SAW_FINITE, SAW_NAN, merge_blocks
from .args import DepthScratch, PhaseTile, RowScratch
from .heads import advance_gated_nodes, advance_rnn_nodes, latents_of, node_bias
from .nodes import (
    DEPTH,
    ORIGIN,
    SEEN,
    TOKEN,
    field,
    init_tree,
    log_confidence,
    log_shares,
    merge_children,
    row_scale,
    survivals,
    write_tree,
)

__all__ = ["latent_programs", "launch_draft_paths_dense"]

GROWN = tl.constexpr(1 << 20)  # published instead of a number of phases


@triton.jit
def _publish(published_ptr, phase):
    stores_done()
    tl.atomic_xchg(published_ptr, phase, sem="release", scope="gpu")


@triton.jit
def _open(
    d, count, request, slot, anchor, budgets_ptr, head, latent, hidden, confidence, own, out, published_ptr, num_nodes, num_drafts,
    TILE: tl.constexpr,
):  # fmt: skip
    """Everything that the sweep of depth d needs, or the finished tree. own: DepthScratch of the request."""
    kept_ptr = own.kept_ptr
    NODES: tl.constexpr = TILE.NODES
    i = tl.arange(0, NODES)
    depth = field(kept_ptr, DEPTH, i, count, NODES)
    live = (i < count) & (depth == d)
    size = tl.sum(live.to(tl.int32), axis=0)
    if (d == num_drafts) | (size == 0) | (num_nodes == 1):
        flags = tl.where((anchor < 0) | (anchor >= head.vocab), BAD_TOKEN_ID, 0)
        write_tree(kept_ptr, count, budgets_ptr, slot, anchor, request, flags, out, num_nodes, num_drafts, NODES)
        _publish(published_ptr, GROWN)
    else:
        tl.store(own.sizes_ptr + d, size)
        tl.store(own.sizes_ptr + num_drafts, count)
        tl.store(own.frontier_ptr + tl.cumsum(live.to(tl.int32), axis=0) - 1, i, mask=live)
        tl.debug_barrier()
        there = i < size
        nodes = tl.load(own.frontier_ptr + i, mask=there, other=0, volatile=True)
        token = tl.load(kept_ptr + TOKEN * NODES + nodes, mask=there, other=-1, volatile=True)
        origin = tl.load(kept_ptr + ORIGIN * NODES + nodes, mask=there, other=0, volatile=True)
        reached = tl.gather(survivals(kept_ptr, i, count, NODES), nodes, axis=0)
        if confidence is not None:
            score = tl.load(own.score_ptr + d, volatile=True)
            reached += log_confidence(token, there, score, d, confidence, hidden.size, NODES)
        tl.store(own.entries_ptr + i, reached, mask=there)
        tl.store(own.tokens_ptr + i, token, mask=there)
        if latent is not None:
            known = there & (token >= 0) & (token < head.vocab)
            row_ptrs = head.w1_ptr + token.to(tl.int64) * head.stride_w1
            TILE.ADVANCE(
                d, there, row_ptrs, known, origin, latent, hidden.size, own.latents, head.rank, TILE.BLOCK_O, TILE.BLOCK_J,
            )  # fmt: skip
        _publish(published_ptr, 2 * d + 1)


@triton.jit
def _latents_of(rows, there, head, latent, own):
    """(where the latents of rows begin, whether they have one, else 0)."""
    if latent is None:
        token = tl.load(own.tokens_ptr + rows, mask=there, other=-1, volatile=True)
        known = there & (token >= 0) & (token < head.vocab)
        row_ptrs = head.w1_ptr + token.to(tl.int64) * head.stride_w1
    else:
        known = there
        row_ptrs = own.latents.latent_ptr + rows.to(tl.int64) * head.rank
    return row_ptrs, known


@triton.jit
def _sweep(
    size, part, parts, row_ptr, head, latent, own, sub_block_max_ptr, sub_block_sumexp_ptr, groups_ptr, stride_groups, scale, vocab,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sub-blocks and groups of one part of the vocabulary, for all rows of the depth."""
    sub_blocks = tl.cdiv(vocab, TREE_SUB_BLOCK)
    for sub_block in range(part * sub_blocks // parts, (part + 1) * sub_blocks // parts):
        ids = sub_block * TREE_SUB_BLOCK + tl.arange(0, TREE_SUB_BLOCK)
        used = ids < vocab
        base = tl.load(row_ptr + ids, mask=used, other=NEG_INF).to(tl.float32)
        for first in range(0, size, DOT_ROWS):
            rows = (first + tl.arange(0, DOT_ROWS)).to(tl.int64)
            there = rows < size
            row_ptrs, known = _latents_of(rows, there, head, latent, own)
            x = base[None, :] + node_bias(ids, used, row_ptrs, known, head, BLOCK_R)
            inside = there[:, None] & used[None, :]
            nan = tl.max(tl.where(inside & (x != x), 1, 0), axis=1)
            x = tl.where(inside, numbers(x), NEG_INF)
            top = tl.max(x, axis=1)
            sumexp = fixed_sums(tl.exp2(below_max(x, top[:, None]) * scale), DOT_ROWS, TREE_SUB_BLOCK, SUMEXP_ONE)
            sumexp |= tl.where(nan > 0, SAW_NAN, 0)
            sumexp |= tl.where(tl.max(tl.where(tl.abs(x) < POS_INF, 1, 0), axis=1) > 0, SAW_FINITE, 0)
            tl.store(sub_block_max_ptr + rows * sub_blocks + sub_block, top, mask=there)
            tl.store(sub_block_sumexp_ptr + rows * sub_blocks + sub_block, sumexp, mask=there)
            best = tl.max(tl.reshape(x, [DOT_ROWS, TREE_SUB_BLOCK // TREE_MAX_GROUP, TREE_MAX_GROUP]), axis=2)
            group = sub_block * (TREE_SUB_BLOCK // TREE_MAX_GROUP) + tl.arange(0, TREE_SUB_BLOCK // TREE_MAX_GROUP)
            where = groups_ptr + rows[:, None] * stride_groups + group[None, :]
            tl.store(where, best, mask=there[:, None] & (group < tl.cdiv(vocab, TREE_MAX_GROUP))[None, :])


@triton.jit
def _best_of_row(row, node, row_ptr, head, latent, own, of_row, scale, vocab, children, TILE: tl.constexpr):
    """The best children of a row, ascending ids, with their survival; what its distribution showed.

    own: DepthScratch of the request; of_row: RowScratch of the row.
    """
    CHILDREN: tl.constexpr = TILE.CHILDREN
    sub_blocks, num_groups = tl.cdiv(vocab, TREE_SUB_BLOCK), tl.cdiv(vocab, TREE_MAX_GROUP)
    one = tl.zeros([1], tl.int64)
    top, sumexp, words, _ = merge_blocks(
        of_row.sub_block_max_ptr, of_row.sub_block_sumexp_ptr, one, sub_blocks, scale, TILE.SUB_BLOCKS
    )
    seen = tl.where(tl.max(tl.max(words & SAW_NAN, axis=1), axis=0) > 0, NAN, 0)
    seen |= tl.where(tl.max(tl.max(words & SAW_FINITE, axis=1), axis=0) > 0, 0, NONFINITE_ROW)
    tl.store(own.kept_ptr + SEEN * TILE.NODES + node, seen)

    group = tl.arange(0, TILE.GROUPS // 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    best = tl.load(of_row.groups_ptr + group, mask=group < num_groups, other=NEG_INF, volatile=True)
    keys = tl.where(group < num_groups, ordered_key(best, 0), ABSENT)
    wanted = tl.minimum(children, num_groups)
    _, selected, place = select(keys, wanted)
    tl.store(of_row.chosen_ptr + place, group, mask=selected)
    tl.debug_barrier()
    # The maxima have been read: their place takes the logits of the chosen groups.
    row_ptr_of_latent, known = _latents_of(row, row >= 0, head, latent, own)
    known_ranks = tl.where(known, head.rank, 0)
    for first in range(0, wanted * TREE_MAX_GROUP, TILE.PIECE):
        at = first + tl.arange(0, TILE.PIECE)
        there = at < wanted * TREE_MAX_GROUP
        ids = (
            tl.load(of_row.chosen_ptr + at // TREE_MAX_GROUP, mask=there, other=0, volatile=True) * TREE_MAX_GROUP
            + at % TREE_MAX_GROUP
        )
        there = there & (ids < vocab)
        x = tl.load(row_ptr + ids, mask=there, other=NEG_INF).to(tl.float32)
        x += weighted(tl.where(there, ids, -1), row_ptr_of_latent, known_ranks, head, TILE.BLOCK_R)
        tl.store(of_row.groups_ptr + at, numbers(x), mask=there)
    tl.debug_barrier()
    c = tl.arange(0, CHILDREN)
    chosen = tl.load(of_row.chosen_ptr + c, mask=c < wanted, other=0, volatile=True)
    inner = tl.arange(0, TREE_MAX_GROUP)
    ids = chosen[:, None] * TREE_MAX_GROUP + inner[None, :]
    there = (c < wanted)[:, None] & (ids < vocab)
    x = tl.load(of_row.groups_ptr + c[:, None] * TREE_MAX_GROUP + inner[None, :], mask=there, other=NEG_INF, volatile=True)
    keys = tl.where(x > NEG_INF, ordered_key(x, 0), ABSENT)
    wanted = tl.minimum(children, tl.sum((keys != ABSENT).to(tl.int32)))
    tl.store(of_row.keys_ptr + c, tl.full([CHILDREN], NEG_INF, tl.float32), mask=(c >= wanted) & (c < children))
    _, taken, place_in_list = select(keys, wanted)
    every = tl.zeros([CHILDREN], tl.int64)
    # A +inf among them has the lowest id that any has, as it must.
    first_id = tl.min(tl.min(tl.where(x == POS_INF, ids, 2147483647), axis=1), axis=0)
    share = log_shares(x, ids, top + every.to(tl.float32), sumexp + every, scale)
    share = tl.where((x == POS_INF) & (ids != first_id), NEG_INF, share)
    reached = tl.load(own.entries_ptr + row, volatile=True)
    tl.store(of_row.keys_ptr + place_in_list, reached + share, mask=taken)
    tl.store(of_row.ids_ptr + place_in_list, ids, mask=taken)


@triton.jit
def _latent_item(
    ticket, state, latent, hidden, products_ptr, finished_ptr, num_requests, num_slots, num_drafts, BLOCK_J: tl.constexpr
):  # fmt: skip
    """The products with hidden states that are this program's; it counts for each of the requests they are for."""
    first, count = latent_item(
        ticket, state.slots_ptr, latent, hidden, products_ptr, num_requests, num_slots, num_drafts, BLOCK_J
    )  # fmt: skip
    stores_done()
    for request in range(first, first + count):
        tl.atomic_add(finished_ptr + request, 1, sem="release", scope="gpu")


@triton.jit
def _order(number, num_requests, parts, children):
    """(phase, request, item) of a place in the order of work behind the products: phase -1 is a request's start, then depth d has a
    sweep, 2 d, and 2 d + 1, which finds the best children of its rows."""
    phase = tl.full((), -1, tl.int32)
    request = number
    item = number * 0
    if number >= num_requests:
        number -= num_requests
        first_depth = num_requests * (parts + 1)
        later = num_requests * (parts + children)
        d = number * 0
        inside = number
        rows = d + 1
        if number >= first_depth:
            d = 1 + (number - first_depth) // later
            inside = (number - first_depth) % later
            rows = children
        phase = tl.where(inside < num_requests * parts, 2 * d, 2 * d + 1)
        inside = tl.where(inside < num_requests * parts, inside, inside - num_requests * parts)
        per_request = tl.where(phase % 2 == 0, parts, rows)
        request = inside // per_request
        item = inside % per_request
    return phase, request, item


@triton.jit
def _start(request, slot, anchor, latent, hidden, confidence, own, out, products_done_ptr, num_drafts, NODES: tl.constexpr):
    """The tree of the anchor alone, scores of all depths, and a wait for the products with hidden states; returns the depth that is
    to be opened."""
    opens = tl.full((), -1, tl.int32)
    if slot >= 0:
        init_tree(own.kept_ptr, anchor, NODES)
        if confidence is not None:
            for k in range(num_drafts):
                tl.store(own.score_ptr + k, hidden_score(request, k, hidden, confidence.weight_ptr))
            tl.debug_barrier()
        opens = opens * 0
    else:
        tl.store(out.flags_ptr + request, 0)
    if latent is not None:
        wait_for(products_done_ptr + request, awaited(request, latent, 0))
        tl.store(products_done_ptr + request, 0)
    return opens


@triton.jit
def _merge_rows(d, size, first_row, children, own, rows_of, num_nodes, num_drafts, TILE: tl.constexpr):
    """The best children of all rows of depth d into the best nodes: how many there are then."""
    i = tl.arange(0, TILE.NODES)
    c = tl.arange(0, TILE.CHILDREN)
    where = (first_row + i)[:, None] * children + c[None, :]
    there = (i < size)[:, None] & (c < children)[None, :]
    keys = tl.load(rows_of.keys_ptr + where, mask=there, other=NEG_INF, volatile=True)
    ids = tl.load(rows_of.ids_ptr + where, mask=there & (keys > NEG_INF), other=0, volatile=True)
    nodes = tl.load(own.frontier_ptr + i, mask=i < size, other=0, volatile=True)
    count = tl.load(own.sizes_ptr + num_drafts, volatile=True)
    count, _ = merge_children(own.kept_ptr, count, num_nodes, d + 1, keys, ids, nodes, TILE.NODES)
    return count


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_drafts", "num_nodes", "latent_items", "parts"])
def draft_paths_dense_kernel(
    # Records of kernels/draft_tree/args.py and kernels/draft/args.py.
    base,  # BaseLogits
    state,  # PathState
    head,  # Head
    latent,  # Latent of a gated or rnn head, or None
    hidden,  # Hidden or None
    confidence,  # NodeConfidence or None
    out,  # PathTree
    ticket_ptr,  # int32 [1], zero before and after
    counters,  # PhaseCounters
    depths,  # DepthScratch
    rows_of,  # RowScratch
    num_requests, num_slots, num_drafts, num_nodes, vocab, stride_groups, latent_items, parts,
    TILE: tl.constexpr,  # PhaseTile
):  # fmt: skip
    NODES: tl.constexpr = TILE.NODES
    children = tl.maximum(num_nodes - 1, 1)
    ticket = take_item(ticket_ptr)
    items = num_drafts * parts + 1 + (num_drafts - 1) * children  # of all phases of a request
    if ticket == latent_items + num_requests * (1 + items) - 1:
        tl.store(ticket_ptr, 0)
    if ticket < latent_items:
        if latent is not None:
            _latent_item(ticket, state, latent, hidden, depths.latents.products_ptr, counters.products_ptr, num_requests, num_slots,
                         num_drafts, TILE.BLOCK_J)  # fmt: skip
    else:
        phase, request, item = _order(ticket - latent_items, num_requests, parts, children)
        slot = slot_of(state.slots_ptr, request, num_requests, num_slots)
        wide = request.to(tl.int64)
        own = DepthScratch(
            depths.kept_ptr + wide * (NODE_FIELDS * NODES), depths.frontier_ptr + wide * NODES,
            depths.sizes_ptr + wide * (num_drafts + 1), depths.entries_ptr + wide * NODES, depths.tokens_ptr + wide * NODES,
            depths.score_ptr + wide * num_drafts, latents_of(depths.latents, wide, num_drafts, latent, head, NODES),
        )  # fmt: skip
        opens = tl.full((), -1, tl.int32)  # the depth that this program opens
        count = tl.full((), 1, tl.int32)
        anchor = tl.zeros((), tl.int64)
        if slot >= 0:
            anchor = tl.load(state.anchors_ptr + slot * state.stride_anchors).to(tl.int64)
        if phase < 0:
            opens = _start(request, slot, anchor, latent, hidden, confidence, own, out, counters.products_ptr, num_drafts, NODES)
        elif slot >= 0:
            now = wait_for(counters.published_ptr + request, phase + 1)
            if now < GROWN:
                d = phase // 2
                size = tl.load(own.sizes_ptr + d, volatile=True)
                scale = row_scale(state.temperature_ptr, slot)
                row_ptr = base.ptr + wide * base.stride_request + d.to(tl.int64) * base.stride_position
                sub_blocks = tl.cdiv(vocab, TREE_SUB_BLOCK)
                first_row = wide * children
                if phase % 2 == 0:
                    _sweep(
                        size, item, parts, row_ptr, head, latent, own, rows_of.sub_block_max_ptr + first_row * sub_blocks,
                        rows_of.sub_block_sumexp_ptr + first_row * sub_blocks, rows_of.groups_ptr + first_row * stride_groups,
                        stride_groups,
                        scale, vocab, TILE.BLOCK_R,
                    )  # fmt: skip
                    if arrive(counters.chunks_ptr + request, parts):
                        _publish(counters.published_ptr + request, phase + 2)
                elif item < size:
                    row = first_row + item
                    node = tl.load(own.frontier_ptr + item, volatile=True)
                    of_row = RowScratch(
                        rows_of.sub_block_max_ptr + row * sub_blocks, rows_of.sub_block_sumexp_ptr + row * sub_blocks,
                        rows_of.groups_ptr + row * stride_groups, rows_of.chosen_ptr + row * children,
                        rows_of.keys_ptr + row * children, rows_of.ids_ptr + row * children,
                    )  # fmt: skip
                    _best_of_row(item, node, row_ptr, head, latent, own, of_row, scale, vocab, children, TILE)
                    if arrive(counters.rows_ptr + request, size):
                        count = _merge_rows(d, size, first_row, children, own, rows_of, num_nodes, num_drafts, TILE)
                        opens = d + 1
        if opens >= 0:
            _open(
                opens, count, request, slot, anchor, state.budgets_ptr, head, latent, hidden, confidence, own, out,
                counters.published_ptr + request, num_nodes, num_drafts, TILE,
            )  # fmt: skip
        if (phase >= 0) & (slot >= 0):
            if arrive(counters.items_ptr + request, items):
                tl.store(counters.published_ptr + request, 0)


_ADVANCE = {"vanilla": None, "gated": advance_gated_nodes, "rnn": advance_rnn_nodes}


def launch_draft_paths_dense(items, args, *, kind, config):
    """Launch one program per item: products of gated and rnn heads, a start per request, then the phases."""
    draft_paths_dense_kernel[(items,)](
        *args,
        TILE=PhaseTile(
            ADVANCE=_ADVANCE[kind],
            SUB_BLOCKS=config.sub_blocks,
            GROUPS=config.groups,
            NODES=config.nodes,
            CHILDREN=config.children,
            PIECE=config.piece,
            BLOCK_R=config.block_r,
            BLOCK_O=config.block_o,
            BLOCK_J=config.block_j,
        ),
        **options_of(config),
    )
