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
from ..primitives.slots import state_slots
from ..primitives.sumexp import fixed_sums, log2_scale
from ..primitives.sync import arrive
from . import tree_proposals
from .args import Lineage, Scales, Sizes, View
from .dense import invert_map, map_used
from .first_pass import item_of, sweep_draft, sweep_target
from .tree_outputs import write_no_outputs
from .tree_rows import has_children, merge_nodes, node_distributions
from .tree_rules import DECIDED, WALK, decide, left_in_blocks
from .tree_state import load_rejected


@triton.jit
def _sweep(
    request, item, view, layout, draft, parents_ptr, scratch, scales, sizes,
    PROPOSAL: tl.constexpr, WITHOUT: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, CANDIDATES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """SPAN times TILE blocks of the residual at the node that a request's decision waits for."""
    state, num_blocks = scratch.state, sizes.num_blocks
    m = tl.arange(0, WIDTH)
    has_row = m <= view.length
    node = tl.load(state.current_ptr + request * 2, volatile=True)
    parent = tl.load(parents_ptr + view.slot * sizes.num_drafts + m, mask=has_row & (m > node), other=-1)
    forward = tl.load(layout.logits_indices_ptr + view.row0 + m, mask=has_row, other=0)
    tokens = tl.load(layout.token_ids_ptr + forward, mask=has_row, other=-1)
    rejected = load_rejected(state, request, node, has_row & (parent == node), tokens, m, WIDTH)
    target, drawn_from = node_distributions(view.row0.to(tl.int64) + node, node >= 0, scratch.stats)
    for span in range(SPAN):
        block = (item * SPAN + span) * TILE + tl.arange(0, TILE)
        at = request.to(tl.int64) * num_blocks + block
        left, weight = left_in_blocks(node, block, target, drawn_from, rejected, view, draft, scales, m,
                                      PROPOSAL, CANDIDATES, WITHOUT, WIDTH)  # fmt: skip
        tl.store(scratch.residual.target_ptr + at, fixed_sums(left, TILE, VOCAB_BLOCK, RESIDUAL_ONE), mask=block < num_blocks)
        if WITHOUT and PROPOSAL.sum_left is None:
            if PROPOSAL.weights_left is not None:
                weight = PROPOSAL.weights_left(
                    node, block, view.slot, draft, drawn_from, rejected.taken, tokens, scales.draft, m, WIDTH
                )
            tl.store(scratch.residual.draft_ptr + at, fixed_sums(weight, TILE, VOCAB_BLOCK, SUMEXP_ONE), mask=block < num_blocks)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward", "steps"])
def accept_tree_kernel(
    target,  # Target
    layout,  # Layout
    parents_ptr, ancestors_ptr,  # [S, M]; ancestors int64 or None: no setting asks for a node's path
    draft,  # of the children: DenseDraft or SparseDraft; None = a deterministic tree
    sampling,  # Sampling
    slots_ptr,  # int32 [R] or None
    outputs,  # TreeOutputs
    counters,  # TreeCounters
    map_progress,  # MapProgress, or None
    scratch,  # TreeScratch
    num_requests, num_slots, num_rows, num_forward, num_nodes, vocab, num_blocks,
    steps,  # chunks of a first-phase item
    map_parts,
    RULE: tl.constexpr, PROPOSAL: tl.constexpr, WITHOUT: tl.constexpr, JOINT: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, CANDIDATES: tl.constexpr, BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    SWEEPS: tl.constexpr = RULE != WALK
    chunks = tl.cdiv(num_blocks, CHUNK * steps)
    num_groups = tl.cdiv(num_nodes, GROUP)
    first_items = num_groups * chunks
    parts = tl.cdiv(num_blocks, TILE * SPAN)
    sweeps = 0
    if SWEEPS:
        sweeps = num_nodes - 1

    # Tickets, not program ids, order the work: a sweep waits for items with earlier tickets alone.
    ticket = tl.atomic_add(counters.ticket_ptr, 1, sem="relaxed", scope="gpu")
    before = 0
    if map_progress is not None:
        before = map_parts
    if ticket == before + num_requests * (first_items + sweeps * parts) - 1:
        tl.store(counters.ticket_ptr, 0)
    place = tl.maximum(ticket - before, 0)
    number = -1
    request = place // first_items
    item = place % first_items
    if SWEEPS:
        if place >= num_requests * first_items:
            behind = place - num_requests * first_items
            number = behind // (num_requests * parts)
            request = behind // parts % num_requests
            item = behind % parts
    if map_progress is not None:
        if ticket < before:
            number = -2
            invert_map(ticket, draft, vocab, map_progress.ready_ptr)

    slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
    row0 = tl.load(layout.cu_logits_ptr + request)
    length = tl.minimum(tl.minimum(tl.load(layout.cu_logits_ptr + request + 1), num_rows) - row0, num_nodes) - 1
    if slot < 0:
        length = length * 0 - 1
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
    scales = Scales(scale, draft_scale)
    sizes = Sizes(num_requests, num_forward, num_nodes, num_blocks)
    lineage = None
    if ancestors_ptr is not None:
        lineage = Lineage(ancestors_ptr, num_nodes)
    unlimited = View(target.logits_ptr, target.stride, vocab, target.adjustments, layout.token_ids_ptr, lineage,
                     layout.logits_indices_ptr, row0, slot, length, None)  # fmt: skip
    view = View(target.logits_ptr, target.stride, vocab, target.adjustments, layout.token_ids_ptr, lineage,
                layout.logits_indices_ptr, row0, slot, length, scratch.limits)  # fmt: skip

    decides = 0
    sweep = 0
    if number == -1:
        if length < 0:
            if item == 0:
                write_no_outputs(request, slot, layout, outputs, sizes, WIDTH)
                if map_progress is not None:
                    map_used(map_progress, num_requests, map_parts)
        else:
            group = item // chunks
            if group * GROUP <= length:
                part = item_of(group, item % chunks, steps, GROUP, CHUNK)
                sweep_target(part, unlimited, layout, sampling, scratch, scale, num_blocks, CHUNK)
                if scratch.draft is not None:
                    inner = has_children(part.i, slot, length, parents_ptr, num_nodes, WIDTH)
                    sweep_draft(part, (part.i <= length) & inner, view, draft, scratch.draft, draft_scale, num_blocks, CHUNK)
                if arrive(counters.groups_ptr + request * num_groups + group, chunks):
                    merge_nodes(
                        group * GROUP, unlimited, view, layout, draft, sampling, parents_ptr, scratch, walks, scales, sizes,
                        PROPOSAL, JOINT, GROUP, GROUPS, CANDIDATES, BLOCKS, WIDTH,
                    )  # fmt: skip
                    if arrive(counters.requests_ptr + request, length // GROUP + 1):
                        decides = 1
    elif SWEEPS:
        state = tl.full((), DECIDED, tl.int32)
        if (length >= 0) & (number >= 0):
            state = tl.atomic_add(counters.published_ptr + request, 0, sem="acquire", scope="gpu")
            while state <= number:
                state = tl.atomic_add(counters.published_ptr + request, 0, sem="acquire", scope="gpu")
            tl.debug_barrier()
        if state < DECIDED:
            _sweep(request, item, view, layout, draft, parents_ptr, scratch, scales, sizes,
                   PROPOSAL, WITHOUT, TILE, SPAN, CANDIDATES, WIDTH)  # fmt: skip
            if arrive(counters.sweeps_ptr + request, parts):
                decides = 1
                sweep = number + 1
    if decides > 0:
        decide(
            request, sweep, view, layout, draft, parents_ptr, sampling, outputs, scratch, counters.published_ptr, map_progress,
            map_parts, walks, scales, sizes, RULE, PROPOSAL, WITHOUT, CANDIDATES, BLOCKS, WIDTH,
        )  # fmt: skip
    if SWEEPS:
        if number >= 0:
            if length >= 0:
                if arrive(counters.items_ptr + request, sweeps * parts):
                    tl.store(counters.published_ptr + request, 0)


_PROPOSALS = {"none": None, "stored": tree_proposals.STORED, "mapped": tree_proposals.MAPPED, "sparse": tree_proposals.SPARSE}


def launch_accept_tree(items, args, *, rule, proposal, without_replacement, joint, candidates, blocks, groups, width, config):
    """Launch one program per item (a part of a map to invert, a first-phase part of a request, or a part of a sweep)."""
    accept_tree_kernel[(items,)](
        *args,
        RULE=rule,
        PROPOSAL=_PROPOSALS[proposal],
        WITHOUT=without_replacement,
        JOINT=joint,
        GROUP=config.group,
        CHUNK=config.chunk,
        TILE=config.tile,
        SPAN=config.span,
        CANDIDATES=candidates,
        BLOCKS=blocks,
        GROUPS=groups,
        WIDTH=width,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
