"""Lossless acceptance of draft trees straight from target logits, in one launch.

    walk       y ~ p_v, go to the child whose token is y, else emit y (greedy: y = argmax p_v)
    recursive  accept child c while u q_c(x) < p(x), else p <- norm [p - q_c]+; after the last child y ~ p
    traversal  block to root: accept while u < P, then y ~ M; else P M <- [P M - q_c]+ / (Z + 1 - P) at the parent

Symbols: R requests, M nodes, V vocabulary, block = 1024 ids, NB blocks; v a node, c a child of it, x its token; p, q target and
draft distribution; P probability that v's prefix is kept, M its residual distribution, Z = sum [P M - q_c]+. Reference:
reference/tree.py. Sources: SpecInfer arXiv 2305.09781, Sequoia arXiv 2402.12374, traversal arXiv 2505.12398.

First phase, an item = nodes x blocks of a request, as in accept.py: maximum and integer sum of exponentials of each block. The last
item of a node group merges its rows (tree_rows.py), the last group of a request decides (tree_rules.py). Where a child is rejected,
the residual at its parent is summed over the vocabulary by a sweep, whose last item decides on: sweep s of a request waits for what
publishes it, an earlier ticket. A node is rejected at most once, so M - 1 sweeps suffice; those that are not needed end at once.
"""

import triton
import triton.language as tl

from ..primitives.constants import RESIDUAL_ONE, SUMEXP_ONE, VOCAB_BLOCK
from ..primitives.options import options_of
from ..primitives.sumexp import fixed_sums, log2_scale
from ..primitives.sync import arrive, wait_for
from . import tree_proposals
from .args import AcceptTile, SweepTile
from .dense import invert_map
from .first_pass import first_logits, item_of, sweep_draft, sweep_target
from .requests import release_map, rows_of, take_place
from .tree_outputs import write_no_outputs
from .tree_rows import has_children, merge_nodes, node_distributions
from .tree_rules import DECIDED, WALK, decide, left_in_blocks
from .tree_state import load_rejected
from .values import Lineage, Scales, Sizes, View


@triton.jit
def _order(place, num_requests, first_items, parts, SWEEPS: tl.constexpr):
    """(sweep, request, item) of a place in the order of work: sweep -1 is the first phase."""
    number = -1
    request = place // first_items
    item = place % first_items
    if SWEEPS:
        if place >= num_requests * first_items:
            behind = place - num_requests * first_items
            number = behind // (num_requests * parts)
            request = behind // parts % num_requests
            item = behind % parts
    return number, request, item


@triton.jit
def _temperatures(sampling, slot, length, SWEEPS: tl.constexpr):
    """(Scales of a request, whether its tree is walked: 1 or 0)."""
    scale = tl.full((), 1.4426950408889634, tl.float32)
    draft_scale = scale
    walks = tl.full((), 1, tl.int32)
    if length >= 0:
        if sampling.temperature_ptr is not None:
            temperature = tl.load(sampling.temperature_ptr + slot)
            scale = log2_scale(temperature)
            if SWEEPS:
                draft_temperature = temperature
                if sampling.draft_temperature_ptr is not None:
                    draft_temperature = tl.load(sampling.draft_temperature_ptr + slot)
                draft_scale = log2_scale(draft_temperature)
                walks = tl.where((temperature > 0.0) & (draft_temperature > 0.0), 0, 1)
    return Scales(scale, draft_scale), walks


@triton.jit
def _first_item(
    request, item, chunks, steps, view, layout, links, draft, sampling, counters, scratch, walks, scales, sizes,
    PROPOSAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Blocks of a group of nodes; the group's last item merges its rows. Returns whether all groups of the request are there."""
    length, num_nodes, num_blocks = view.length, sizes.num_drafts, sizes.num_blocks
    decides = 0
    group = item // chunks
    if group * TILE.GROUP <= length:
        part = item_of(group, item % chunks, steps, TILE.GROUP, TILE.CHUNK)
        ahead = first_logits(part, view, scratch)
        sweep_target(part, ahead, view, layout, sampling, scratch, scales.target, num_blocks, TILE.CHUNK)
        if scratch.draft is not None:
            inner = has_children(part.i, view.slot, length, links.parents_ptr, num_nodes, TILE.WIDTH)
            sweep_draft(part, (part.i <= length) & inner, view, draft, scratch.draft, scales.draft, num_blocks, TILE.CHUNK)
        if arrive(counters.groups_ptr + request * tl.cdiv(num_nodes, TILE.GROUP) + group, chunks):
            merge_nodes(
                group * TILE.GROUP, view, layout, draft, sampling, links.parents_ptr, scratch, walks, scales, sizes, PROPOSAL, TILE
            )
            if arrive(counters.requests_ptr + request, length // TILE.GROUP + 1):
                decides = 1
    return decides


@triton.jit
def _sweep_item(
    request, number, item, parts, view, layout, links, draft, counters, scratch, scales, sizes,
    PROPOSAL: tl.constexpr, WITHOUT: tl.constexpr, TILE: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """Blocks of the residual of sweep `number`, where the request needs it. Returns whether all of its blocks are there."""
    decides = 0
    state = tl.full((), DECIDED, tl.int32)
    if (view.length >= 0) & (number >= 0):
        state = wait_for(counters.published_ptr + request, number + 1)
    if state < DECIDED:
        _sweep(request, item, view, layout, links, draft, scratch, scales, sizes, PROPOSAL, WITHOUT, TILE, SWEEP)
        if arrive(counters.sweeps_ptr + request, parts):
            decides = 1
    return decides


@triton.jit
def _sweep(
    request, item, view, layout, links, draft, scratch, scales, sizes,
    PROPOSAL: tl.constexpr, WITHOUT: tl.constexpr, TILE: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """SPAN times PAIRS blocks of the residual at the node that a request's decision waits for."""
    PAIRS: tl.constexpr = SWEEP.PAIRS
    WIDTH: tl.constexpr = TILE.WIDTH
    state, num_blocks = scratch.state, sizes.num_blocks
    m = tl.arange(0, WIDTH)
    has_row = m <= view.length
    node = tl.load(state.current_ptr + request * 2, volatile=True)
    parent = tl.load(links.parents_ptr + view.slot * sizes.num_drafts + m, mask=has_row & (m > node), other=-1)
    forward = tl.load(layout.logits_indices_ptr + view.row0 + m, mask=has_row, other=0)
    tokens = tl.load(layout.token_ids_ptr + forward, mask=has_row, other=-1)
    rejected = load_rejected(state, request, node, has_row & (parent == node), tokens, m, WIDTH)
    target, drawn_from = node_distributions(view.row0.to(tl.int64) + node, node >= 0, scratch.stats)
    for span in range(SWEEP.SPAN):
        block = (item * SWEEP.SPAN + span) * PAIRS + tl.arange(0, PAIRS)
        at = request.to(tl.int64) * num_blocks + block
        left, weight = left_in_blocks(node, block, target, drawn_from, rejected, view, draft, scales, m,
                                      PROPOSAL, TILE.CANDIDATES, WITHOUT, WIDTH)  # fmt: skip
        tl.store(scratch.residual.target_ptr + at, fixed_sums(left, PAIRS, VOCAB_BLOCK, RESIDUAL_ONE), mask=block < num_blocks)
        if WITHOUT and PROPOSAL.sum_left is None:
            if PROPOSAL.weights_left is not None:
                weight = PROPOSAL.weights_left(
                    node, block, view.slot, draft, drawn_from, rejected.taken, tokens, scales.draft, m, WIDTH
                )
            tl.store(scratch.residual.draft_ptr + at, fixed_sums(weight, PAIRS, VOCAB_BLOCK, SUMEXP_ONE), mask=block < num_blocks)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward", "steps"])
def accept_tree_kernel(
    target,  # Target
    layout,  # Layout
    links,  # NodeLinks
    draft,  # of the children: DenseDraft or SparseDraft; None = a deterministic tree
    sampling,  # Sampling
    outputs,  # Outputs
    counters,  # TreeCounters
    map_progress,  # MapProgress, or None
    scratch,  # TreeScratch
    num_requests, num_slots, num_rows, num_forward,
    extent,  # Extent
    steps,  # chunks of a first-phase item
    RULE: tl.constexpr,  # a rule of tree_rules.py
    PROPOSAL: tl.constexpr,  # TreeProposal or None
    WITHOUT: tl.constexpr,  # whether children were drawn without replacement
    TILE: tl.constexpr,  # AcceptTile
    SWEEP: tl.constexpr,  # SweepTile
):  # fmt: skip
    SWEEPS: tl.constexpr = RULE != WALK
    num_nodes, vocab, num_blocks = extent.num_drafts, extent.vocab, extent.num_blocks
    chunks = tl.cdiv(num_blocks, TILE.CHUNK * steps)
    first_items = tl.cdiv(num_nodes, TILE.GROUP) * chunks
    parts = tl.cdiv(num_blocks, SWEEP.PAIRS * SWEEP.SPAN)
    sweeps = 0
    if SWEEPS:
        sweeps = num_nodes - 1

    ticket, before = take_place(counters.ticket_ptr, map_progress, num_requests, first_items, sweeps * parts, SWEEPS)
    number, request, item = _order(tl.maximum(ticket - before, 0), num_requests, first_items, parts, SWEEPS)
    if map_progress is not None:
        if ticket < before:
            number = -2
            invert_map(ticket, draft, vocab, map_progress.ready_ptr)

    rows = rows_of(request, sampling, layout, num_requests, num_slots, num_rows)
    length = tl.minimum(rows.count, num_nodes) - 1
    length = tl.where(rows.slot < 0, -1, length)
    scales, walks = _temperatures(sampling, rows.slot, length, SWEEPS)
    sizes = Sizes(num_requests, num_forward, num_nodes, num_blocks)
    lineage = None
    if links.ancestors_ptr is not None:
        lineage = Lineage(links.ancestors_ptr, num_nodes)
    view = View(target.logits_ptr, target.stride, vocab, target.adjustments, layout.token_ids_ptr, lineage,
                layout.logits_indices_ptr, rows.row0, rows.slot, length, scratch.limits)  # fmt: skip
    decides = 0
    sweep = 0
    if number == -1:
        if length < 0:
            if item == 0:
                write_no_outputs(request, rows.slot, layout, outputs, sizes, TILE.WIDTH)
                release_map(map_progress, num_requests)
        else:
            decides = _first_item(request, item, chunks, steps, view, layout, links, draft, sampling, counters, scratch, walks,
                                  scales, sizes, PROPOSAL, TILE)  # fmt: skip
    elif SWEEPS:
        decides = _sweep_item(request, number, item, parts, view, layout, links, draft, counters, scratch, scales, sizes,
                              PROPOSAL, WITHOUT, TILE, SWEEP)  # fmt: skip
        sweep = number + 1
    if decides > 0:
        decide(
            request, sweep, view, layout, links, draft, sampling, outputs, scratch, counters.published_ptr, map_progress, walks,
            scales, sizes, RULE, PROPOSAL, WITHOUT, TILE,
        )  # fmt: skip
    if SWEEPS:
        if number >= 0:
            if length >= 0:
                if arrive(counters.items_ptr + request, sweeps * parts):
                    tl.store(counters.published_ptr + request, 0)


_PROPOSALS = {"none": None, "stored": tree_proposals.STORED, "mapped": tree_proposals.MAPPED, "sparse": tree_proposals.SPARSE}


def launch_accept_tree(items, args, *, rule, proposal, without_replacement, config, **tile):
    """Launch one program per item (a part of a map to invert, a first-phase part of a request, or a part of a sweep)."""
    accept_tree_kernel[(items,)](
        *args,
        RULE=rule,
        PROPOSAL=_PROPOSALS[proposal],
        WITHOUT=without_replacement,
        TILE=AcceptTile(GROUP=config.group, CHUNK=config.chunk, **tile),
        SWEEP=SweepTile(PAIRS=config.tile, SPAN=config.span),
        **options_of(config),
    )
