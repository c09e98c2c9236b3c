"""Draft trees of the most probable paths under a sequential head, each distribution that of the whole vocabulary, in one launch.

    survival(child) = survival(node) c(node) q(child | node),  q = softmax of (base + bias(node's token)) / T

Symbols: R requests, S state slots, K positions, V vocabulary, M nodes, r rank, H hidden size, unit = 256 ids, group = 32 ids, row =
a node of the depth at hand. Oracle: reference/tree_draft.py. Source: DSpark, arXiv 2607.05147.

Depth by depth, in two waves. A sweep: items are parts of the vocabulary; each reads its part of W2 once, for all nodes of the depth
that are among the best so far, and keeps the maximum and the integer mass of every unit and the maximum of every group. Then an
item per row: the row's normaliser, and its M - 1 largest groups, which hold its M - 1 best children: only their logits are
computed again. The last row of a request merges what the rows found into the best nodes (nodes.py) and opens the next depth.
Every wave waits for what the last item of the one before publishes, an earlier ticket: no barrier, no co-residency.
"""

import triton
import triton.language as tl

from ..draft.candidate_heads import hidden_products, weighted
from ..draft.candidates import PAIRS, _hidden_score, _slot, latent_programs
from ..primitives.fence import stores_done
from ..primitives.leaves import SAW_FINITE, SAW_NAN, merge_leaves
from ..primitives.mass import NEG_INF, ONE, POS_INF, below_max, masses, numbers
from ..primitives.select import ABSENT, ordered_key, select
from ..primitives.slots import state_slots
from ..primitives.ticket import arrive
from .args import DepthScratch, RowScratch, WaveTile
from .heads import advance_gated_nodes, advance_rnn_nodes, node_bias
from .nodes import (
    BAD_TOKEN_ID,
    DEPTH,
    FIELDS,
    NAN,
    NONFINITE_ROW,
    ORIGIN,
    SEEN,
    TOKEN,
    emit_tree,
    field,
    log_confidence,
    log_shares,
    merge_children,
    plant,
    row_scale,
    survivals,
)

__all__ = ["GROUP", "UNIT", "latent_programs", "launch_draft_paths_dense"]

UNIT = tl.constexpr(256)  # ids whose mass is summed relative to their own maximum: part of what a mass is
GROUP = tl.constexpr(32)  # ids of which the maximum is kept
ROWS = tl.constexpr(16)  # nodes of a tile
DONE = tl.constexpr(1 << 20)  # published instead of a number of waves


@triton.jit
def _await(published_ptr, wave):
    """What is published, once it is at least `wave`."""
    now = tl.atomic_add(published_ptr, 0, sem="acquire", scope="gpu")
    while now < wave:
        now = tl.atomic_add(published_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return now


@triton.jit
def _publish(published_ptr, wave):
    stores_done()
    tl.atomic_xchg(published_ptr, wave, sem="release", scope="gpu")


@triton.jit
def _open(
    d, count, request, slot, anchor, budgets_ptr, head, latent, hidden, confidence, own, out, published_ptr, num_nodes, num_drafts,
    ADVANCE: tl.constexpr, TILE: tl.constexpr,
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
        emit_tree(kept_ptr, count, budgets_ptr, slot, anchor, request, flags, out, num_nodes, num_drafts, NODES)
        _publish(published_ptr, DONE)
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
            ADVANCE(
                d, there, row_ptrs, known, origin, latent, hidden.size, own.products_ptr + d * latent.outputs, own.latent_ptr,
                own.states_ptr, head.rank, TILE.BLOCK_O, TILE.BLOCK_J,
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
        row_ptrs = own.latent_ptr + rows.to(tl.int64) * head.rank
    return row_ptrs, known


@triton.jit
def _sweep(
    size, part, parts, row_ptr, head, latent, own, unit_max_ptr, unit_sumexp_ptr, groups_ptr, stride_groups, scale, vocab,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Units and groups of one part of the vocabulary, for all rows of the depth."""
    units = tl.cdiv(vocab, UNIT)
    for unit in range(part * units // parts, (part + 1) * units // parts):
        ids = unit * UNIT + tl.arange(0, UNIT)
        used = ids < vocab
        base = tl.load(row_ptr + ids, mask=used, other=NEG_INF).to(tl.float32)
        for first in range(0, size, ROWS):
            rows = (first + tl.arange(0, ROWS)).to(tl.int64)
            there = rows < size
            row_ptrs, known = _latents_of(rows, there, head, latent, own)
            x = base[None, :] + node_bias(ids, used, row_ptrs, known, head, BLOCK_R)
            inside = there[:, None] & used[None, :]
            nan = tl.max(tl.where(inside & (x != x), 1, 0), axis=1)
            x = tl.where(inside, numbers(x), NEG_INF)
            top = tl.max(x, axis=1)
            sumexp = masses(tl.exp2(below_max(x, top[:, None]) * scale), ROWS, UNIT, ONE)
            sumexp |= tl.where(nan > 0, SAW_NAN, 0)
            sumexp |= tl.where(tl.max(tl.where(tl.abs(x) < POS_INF, 1, 0), axis=1) > 0, SAW_FINITE, 0)
            tl.store(unit_max_ptr + rows * units + unit, top, mask=there)
            tl.store(unit_sumexp_ptr + rows * units + unit, sumexp, mask=there)
            best = tl.max(tl.reshape(x, [ROWS, UNIT // GROUP, GROUP]), axis=2)
            group = unit * (UNIT // GROUP) + tl.arange(0, UNIT // GROUP)
            where = groups_ptr + rows[:, None] * stride_groups + group[None, :]
            tl.store(where, best, mask=there[:, None] & (group < tl.cdiv(vocab, GROUP))[None, :])


@triton.jit
def _best_of_row(row, node, row_ptr, head, latent, own, of_row, scale, vocab, children, TILE: tl.constexpr):
    """The best children of a row, ascending ids, with their survival; what its distribution showed.

    own: DepthScratch of the request; of_row: RowScratch of the row.
    """
    CHILDREN: tl.constexpr = TILE.CHILDREN
    units, num_groups = tl.cdiv(vocab, UNIT), tl.cdiv(vocab, GROUP)
    one = tl.zeros([1], tl.int64)
    top, mass, words, _ = merge_leaves(of_row.unit_max_ptr, of_row.unit_sumexp_ptr, one, units, scale, TILE.UNITS)
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
    for first in range(0, wanted * GROUP, TILE.PIECE):
        at = first + tl.arange(0, TILE.PIECE)
        there = at < wanted * GROUP
        ids = tl.load(of_row.chosen_ptr + at // GROUP, mask=there, other=0, volatile=True) * GROUP + at % GROUP
        there = there & (ids < vocab)
        x = tl.load(row_ptr + ids, mask=there, other=NEG_INF).to(tl.float32)
        x += weighted(tl.where(there, ids, -1), row_ptr_of_latent, known_ranks, head, TILE.BLOCK_R)
        tl.store(of_row.groups_ptr + at, numbers(x), mask=there)
    tl.debug_barrier()
    c = tl.arange(0, CHILDREN)
    chosen = tl.load(of_row.chosen_ptr + c, mask=c < wanted, other=0, volatile=True)
    inner = tl.arange(0, GROUP)
    ids = chosen[:, None] * GROUP + inner[None, :]
    there = (c < wanted)[:, None] & (ids < vocab)
    x = tl.load(of_row.groups_ptr + c[:, None] * GROUP + inner[None, :], mask=there, other=NEG_INF, volatile=True)
    keys = tl.where(x > NEG_INF, ordered_key(x, 0), ABSENT)
    wanted = tl.minimum(children, tl.sum((keys != ABSENT).to(tl.int32)))
    tl.store(of_row.keys_ptr + c, tl.full([CHILDREN], NEG_INF, tl.float32), mask=(c >= wanted) & (c < children))
    _, taken, place_in_list = select(keys, wanted)
    every = tl.zeros([CHILDREN], tl.int64)
    # A +inf among them has the lowest id that any has, as it must.
    first_id = tl.min(tl.min(tl.where(x == POS_INF, ids, 2147483647), axis=1), axis=0)
    share = log_shares(x, ids, top + every.to(tl.float32), mass + every, scale)
    share = tl.where((x == POS_INF) & (ids != first_id), NEG_INF, share)
    reached = tl.load(own.entries_ptr + row, volatile=True)
    tl.store(of_row.keys_ptr + place_in_list, reached + share, mask=taken)
    tl.store(of_row.ids_ptr + place_in_list, ids, mask=taken)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_drafts", "num_nodes", "latent_items", "parts"])
def draft_paths_dense_kernel(
    # Records of kernels/draft_tree/args.py and kernels/draft/args.py.
    base,  # BaseLogits
    state,  # PathState
    head,  # CandidateHead
    latent,  # Latent of a gated or rnn head, or None
    hidden,  # Hidden or None
    confidence,  # NodeConfidence or None
    out,  # PathTree
    ticket_ptr,  # int32 [1], zero before and after
    counters,  # WaveCounters
    depths,  # DepthScratch
    rows_of,  # RowScratch
    num_requests, num_slots, num_drafts, num_nodes, vocab, stride_groups, latent_items, parts,
    ADVANCE: tl.constexpr,
    TILE: tl.constexpr,  # WaveTile
):  # fmt: skip
    NODES: tl.constexpr = TILE.NODES
    stride_anchors = state.stride_anchors
    children = tl.maximum(num_nodes - 1, 1)
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    items = num_drafts * parts + 1 + (num_drafts - 1) * children  # of all waves of a request
    if ticket == latent_items + num_requests * (1 + items) - 1:
        tl.store(ticket_ptr, 0)
    if ticket < latent_items:
        if latent is not None:
            outputs = tl.cdiv(latent.outputs, 16)
            pairs = ticket // outputs * PAIRS + tl.arange(0, PAIRS)
            requests = pairs // num_drafts
            slots = state_slots(state.slots_ptr, requests, num_requests, num_slots)
            hidden_products(
                pairs, requests, slots, ticket % outputs, latent, hidden, depths.products_ptr, num_drafts, TILE.BLOCK_J
            )  # fmt: skip
            stores_done()
            first = ticket // outputs * PAIRS // num_drafts
            end = tl.minimum((ticket // outputs * PAIRS + PAIRS - 1) // num_drafts, num_requests - 1) + 1
            for request in range(first, end):
                tl.atomic_add(counters.products_ptr + request, 1, sem="release", scope="gpu")
    else:
        # Which wave, -1 for the start; waves of depth d: 2 d sweeps, 2 d + 1 finds the best of rows.
        number = ticket - latent_items
        wave = tl.full((), -1, tl.int32)
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
            wave = tl.where(inside < num_requests * parts, 2 * d, 2 * d + 1)
            inside = tl.where(inside < num_requests * parts, inside, inside - num_requests * parts)
            per_request = tl.where(wave % 2 == 0, parts, rows)
            request = inside // per_request
            item = inside % per_request
        slot = _slot(state.slots_ptr, request, num_requests, num_slots)
        wide = request.to(tl.int64)
        products_ptr, latent_ptr, states_ptr = depths.products_ptr, depths.latent_ptr, depths.states_ptr
        if latent is not None:
            products_ptr += wide * num_drafts * latent.outputs
            latent_ptr += wide * (NODES * head.rank)
            states_ptr += wide * (2 * NODES * head.rank)
        own = DepthScratch(
            depths.kept_ptr + wide * (FIELDS * NODES), depths.frontier_ptr + wide * NODES,
            depths.sizes_ptr + wide * (num_drafts + 1), depths.entries_ptr + wide * NODES, depths.tokens_ptr + wide * NODES,
            depths.score_ptr + wide * num_drafts, products_ptr, latent_ptr, states_ptr,
        )  # fmt: skip
        opens = tl.full((), -1, tl.int32)  # the depth that this program opens
        count = tl.full((), 1, tl.int32)
        anchor = tl.zeros((), tl.int64)
        if slot >= 0:
            anchor = tl.load(state.anchors_ptr + slot * stride_anchors).to(tl.int64)
        if wave < 0:
            if slot >= 0:
                plant(own.kept_ptr, anchor, NODES)
                if confidence is not None:
                    for k in range(num_drafts):
                        row_ptr = hidden.ptr + wide * hidden.stride_request + tl.cast(k, tl.int64) * hidden.stride_position
                        tl.store(own.score_ptr + k, _hidden_score(row_ptr, confidence.weight_ptr, hidden.size))
                    tl.debug_barrier()
                opens = opens * 0
            else:
                tl.store(out.flags_ptr + request, 0)
            if latent is not None:
                tiles = (request * num_drafts + num_drafts - 1) // PAIRS - request * num_drafts // PAIRS + 1
                _await(counters.products_ptr + request, tiles * tl.cdiv(latent.outputs, 16))
                tl.store(counters.products_ptr + request, 0)
        elif slot >= 0:
            now = _await(counters.published_ptr + request, wave + 1)
            if now < DONE:
                d = wave // 2
                size = tl.load(own.sizes_ptr + d, volatile=True)
                scale = row_scale(state.temperature_ptr, slot)
                row_ptr = base.ptr + wide * base.stride_request + d.to(tl.int64) * base.stride_position
                units = tl.cdiv(vocab, UNIT)
                first_row = wide * children
                if wave % 2 == 0:
                    _sweep(
                        size, item, parts, row_ptr, head, latent, own, rows_of.unit_max_ptr + first_row * units,
                        rows_of.unit_sumexp_ptr + first_row * units, rows_of.groups_ptr + first_row * stride_groups, stride_groups,
                        scale, vocab, TILE.BLOCK_R,
                    )  # fmt: skip
                    if arrive(counters.chunks_ptr + request, parts):
                        _publish(counters.published_ptr + request, wave + 2)
                elif item < size:
                    row = first_row + item
                    node = tl.load(own.frontier_ptr + item, volatile=True)
                    of_row = RowScratch(
                        rows_of.unit_max_ptr + row * units, rows_of.unit_sumexp_ptr + row * units,
                        rows_of.groups_ptr + row * stride_groups, rows_of.chosen_ptr + row * children,
                        rows_of.keys_ptr + row * children, rows_of.ids_ptr + row * children,
                    )  # fmt: skip
                    _best_of_row(item, node, row_ptr, head, latent, own, of_row, scale, vocab, children, TILE)
                    if arrive(counters.rows_ptr + request, size):
                        i = tl.arange(0, NODES)
                        c = tl.arange(0, TILE.CHILDREN)
                        where = (first_row + i)[:, None] * children + c[None, :]
                        there = (i < size)[:, None] & (c < children)[None, :]
                        keys = tl.load(rows_of.keys_ptr + where, mask=there, other=NEG_INF, volatile=True)
                        ids = tl.load(rows_of.ids_ptr + where, mask=there & (keys > NEG_INF), other=0, volatile=True)
                        nodes = tl.load(own.frontier_ptr + i, mask=i < size, other=0, volatile=True)
                        count = tl.load(own.sizes_ptr + num_drafts, volatile=True)
                        count, _ = merge_children(own.kept_ptr, count, num_nodes, d + 1, keys, ids, nodes, NODES)
                        opens = d + 1
        if opens >= 0:
            _open(
                opens, count, request, slot, anchor, state.budgets_ptr, head, latent, hidden, confidence, own, out,
                counters.published_ptr + request, num_nodes, num_drafts, ADVANCE, TILE,
            )  # fmt: skip
        if (wave >= 0) & (slot >= 0):
            if arrive(counters.items_ptr + request, items):
                tl.store(counters.published_ptr + request, 0)


_ADVANCE = {"vanilla": None, "gated": advance_gated_nodes, "rnn": advance_rnn_nodes}


def launch_draft_paths_dense(items, args, *, kind, config):
    """Launch one program per item: products of gated and rnn heads, a start per request, then the waves."""
    draft_paths_dense_kernel[(items,)](
        *args,
        ADVANCE=_ADVANCE[kind],
        TILE=WaveTile(
            UNITS=config.units,
            GROUPS=config.groups,
            NODES=config.nodes,
            CHILDREN=config.children,
            PIECE=config.piece,
            BLOCK_R=config.block_r,
            BLOCK_O=config.block_o,
            BLOCK_J=config.block_j,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
