"""Lossless acceptance of draft trees straight from target logits, in one launch.

    walk       y ~ p_v, go to the child whose token is y, else emit y (greedy: y = argmax p_v)
    recursive  accept child c while u q_c(x) < p(x), else p <- norm [p - q_c]+; after the last child y ~ p
    traversal  leaf to root: accept while u < P, then y ~ M; else P M <- [P M - q_c]+ / (Z + 1 - P) at the parent

Symbols: R requests, M nodes, V vocabulary, leaf = 1024 ids, NL leaves; v a node, c a child of it, x its token; p, q target and
draft law; P chance that v's prefix is kept, M its residual law, Z = sum [P M - q_c]+. Oracle: reference/tree.py. Sources:
SpecInfer arXiv 2305.09781, Sequoia arXiv 2402.12374, traversal arXiv 2505.12398.

Wave 1, an item = nodes x leaves of a request, as in accept.py: maximum and integer mass of each leaf. The last item of a node
group merges its rows (tree_rows.py), the last group of a request decides (tree_rules.py). Where a child is rejected, the residual
at its parent is summed over the vocabulary by a sweep, whose last item decides on: sweep s of a request waits for what publishes
it, an earlier ticket. A node is rejected at most once, so M - 1 sweeps suffice; those that are not needed end at once.
"""

import triton
import triton.language as tl

from ..primitives.mass import LEAF, ONE, log2_scale, masses
from ..primitives.slots import state_slots
from ..primitives.ticket import arrive
from .proposals import RESIDUAL_ONE, column_is_id, column_of_id, invert_map, map_used, sweep_draft
from .rows import sweep_rows
from .tree_outputs import emit_nothing
from .tree_proposals import (
    at_listed,
    at_stored,
    left_listed,
    left_mapped,
    record_listed,
    record_stored,
    weights_listed,
    weights_stored,
)
from .tree_rows import has_children, merge_nodes, node_laws
from .tree_rules import DONE, ENTRY, FACTOR, MULTIPLIER, NODE_IDS, NODE_VALUES, REJECTED, WALK, decide, left_in_leaves


@triton.jit
def _sweep(
    request, item, row0, length, view, layout, law, parents_ptr, residuals, records, states, scale, draft_scale, num_nodes,
    num_leaves, WEIGHTS: tl.constexpr, REST: tl.constexpr, LEFT: tl.constexpr, COLUMN: tl.constexpr, WITHOUT: tl.constexpr,
    TILE: tl.constexpr, SPAN: tl.constexpr, CANDIDATES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """SPAN times TILE leaves of the residual at the node that a request's decision waits for."""
    _starts, _logits, logits_indices_ptr, token_ids_ptr, _positions = layout
    _, _, _, _, _, _, _, slot, _, _ = view
    node_values_ptr, node_ids_ptr, _, record_ptr = states
    residual_ptr, rest_ptr = residuals
    m = tl.arange(0, WIDTH)
    has_row = m <= length
    node = tl.load(record_ptr + request * 2, volatile=True)
    parent = tl.load(parents_ptr + slot * num_nodes + m, mask=has_row & (m > node), other=-1)
    forward = tl.load(logits_indices_ptr + row0 + m, mask=has_row, other=0)
    tokens = tl.load(token_ids_ptr + forward, mask=has_row, other=-1)
    values = node_values_ptr + request.to(tl.int64) * NODE_VALUES * WIDTH
    rejected = tl.load(node_ids_ptr + (request.to(tl.int64) * NODE_IDS + REJECTED) * WIDTH + m, volatile=True)
    taken = has_row & (parent == node) & (rejected > 0)
    entry = tl.load(values + ENTRY * WIDTH + node, volatile=True)
    multiplier = tl.load(values + MULTIPLIER * WIDTH + m, volatile=True)
    factor = tl.load(values + FACTOR * WIDTH + m, volatile=True)
    laws = node_laws(row0.to(tl.int64) + node, node >= 0, records)
    _, draft_law = laws
    draft_of, reference = draft_law
    for span in range(SPAN):
        leaf = (item * SPAN + span) * TILE + tl.arange(0, TILE)
        at = request.to(tl.int64) * num_leaves + leaf
        left, weight = left_in_leaves(node, leaf, laws, entry, taken, tokens, multiplier, factor, view, law, scale, draft_scale, m,
                                      WEIGHTS, COLUMN, CANDIDATES, WITHOUT, WIDTH)  # fmt: skip
        tl.store(residual_ptr + at, masses(left, TILE, LEAF, RESIDUAL_ONE), mask=leaf < num_leaves)
        if WITHOUT and LEFT is None:
            if REST is not None:
                weight = REST(node, leaf, slot, law, draft_of, reference, taken, tokens, draft_scale, m, WIDTH)
            tl.store(rest_ptr + at, masses(weight, TILE, LEAF, ONE), mask=leaf < num_leaves)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward"])
def accept_tree_kernel(
    target,  # ([L, V], its row stride, settings of primitives/adjust.py or None)
    layout,  # query_start, cu_logits [R+1], logits_indices [L], token_ids, positions [N_max]
    parents_ptr, ancestors_ptr,  # [S, M]; ancestors int64 or None: no setting asks for a node's path
    law,  # of the children, see tree_proposals.py; None = they were made without chance
    draft_temperature_ptr,  # [S] or None
    temperature_ptr, seed_ptr,  # [S]; None = every row greedy
    filters,  # (top_k, top_p, min_p), each [S] or None; or None
    slots_ptr,  # [R] or None
    outputs,  # (tokens [R, M], five of [R], commit [N_max], flags [R], log_probs [R, M] or None), (anchors and positions [S]),
    # (path, source [R, M])
    counters,  # int32, zero before and after: ticket, arrivals of node groups, of requests, of sweeps, of all items; published
    mapping,  # int32, zero before and after: parts of the inverted map, requests that finished; or None
    memory,  # [L, NL]: maxima, masses; None
    raw_memory,  # [L, NL]: maxima and masses of what the target gave, or None
    draft_memory,  # [L, NL]: maxima and masses of the laws' columns, or (None, None)
    residuals,  # [R, NL]: masses of a residual, of the draft weights left
    groups,  # (maxima fp32 [L, G], groups int32 [L, G], lists int32 [L, 2 * 1024]), or (None, None, None)
    limits,  # (threshold int64 [L], cut int32 [L]), or None
    records,  # of rows: [L, VALUES], [L, IDS] of rows.py, weight of the law int64 [L], the walk's token int32 [L]
    states,  # of nodes between sweeps: [R, NODE_VALUES, WIDTH], [R, NODE_IDS, WIDTH], int64 [R, WIDTH]; [R, 2] node and its child
    num_requests, num_slots, num_rows, num_forward, num_nodes, vocab, num_leaves, map_parts,
    RULE: tl.constexpr, RECORD: tl.constexpr, WEIGHTS: tl.constexpr, AT: tl.constexpr, REST: tl.constexpr, LEFT: tl.constexpr,
    COLUMN: tl.constexpr, WITHOUT: tl.constexpr, JOINT: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, SPAN: tl.constexpr, CANDIDATES: tl.constexpr, LEAVES: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = GROUP * CHUNK
    SWEEPS: tl.constexpr = RULE != WALK
    ticket_ptr, group_count_ptr, request_count_ptr, sweep_count_ptr, item_count_ptr, published_ptr = counters
    _starts, cu_logits_ptr, logits_indices_ptr, token_ids_ptr, positions_ptr = layout
    draft_top_ptr, _draft_mass = draft_memory
    maxima_ptr, _groups, _lists = groups
    chunks = tl.cdiv(num_leaves, CHUNK)
    num_groups = tl.cdiv(num_nodes, GROUP)
    first_wave = num_groups * chunks
    parts = tl.cdiv(num_leaves, TILE * SPAN)
    sweeps = 0
    if SWEEPS:
        sweeps = num_nodes - 1

    # Tickets, not program ids, order the work: a sweep waits for items with earlier tickets alone.
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    before = 0
    if mapping is not None:
        before = map_parts
    if ticket == before + num_requests * (first_wave + sweeps * parts) - 1:
        tl.store(ticket_ptr, 0)
    place = tl.maximum(ticket - before, 0)
    number = -1
    request = place // first_wave
    item = place % first_wave
    if SWEEPS:
        if place >= num_requests * first_wave:
            behind = place - num_requests * first_wave
            number = behind // (num_requests * parts)
            request = behind // parts % num_requests
            item = behind % parts
    if mapping is not None:
        ready_ptr, _finished_ptr = mapping
        if ticket < before:
            number = -2
            invert_map(ticket, law, vocab, ready_ptr)

    slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
    row0 = tl.load(cu_logits_ptr + request)
    length = tl.minimum(tl.minimum(tl.load(cu_logits_ptr + request + 1), num_rows) - row0, num_nodes) - 1
    if slot < 0:
        length = length * 0 - 1
    scale = tl.full((), 1.4426950408889634, tl.float32)
    draft_scale = scale
    walks = tl.full((), 1, tl.int32)
    if length >= 0:
        if temperature_ptr is not None:
            temperature = tl.load(temperature_ptr + slot)
            scale = log2_scale(temperature)
            if SWEEPS:
                draft_temperature = temperature
                if draft_temperature_ptr is not None:
                    draft_temperature = tl.load(draft_temperature_ptr + slot)
                draft_scale = log2_scale(draft_temperature)
                walks = tl.where((temperature > 0.0) & (draft_temperature > 0.0), 0, 1)
    target_ptr, stride_t, settings = target
    if ancestors_ptr is not None:
        tokens = (token_ids_ptr, (ancestors_ptr, num_nodes))
    else:
        tokens = (token_ids_ptr, None)
    whole_view = (target_ptr, stride_t, vocab, settings, tokens, logits_indices_ptr, row0, slot, length, None)
    view = (target_ptr, stride_t, vocab, settings, tokens, logits_indices_ptr, row0, slot, length, limits)

    decides = 0
    sweep = 0
    if number == -1:
        if length < 0:
            if item == 0:
                emit_nothing(request, slot, layout, outputs, num_requests, num_forward, num_nodes, WIDTH)
                if mapping is not None:
                    map_used(mapping, num_requests, map_parts)
        else:
            group = item // chunks
            if group * GROUP <= length:
                # Leaves of this item: PAIRS (node, leaf) pairs.
                pair = tl.arange(0, PAIRS)
                i = group * GROUP + pair // CHUNK
                leaf = (item % chunks) * CHUNK + pair % CHUNK
                keep = (i <= length) & (leaf < num_leaves)
                sweep_rows(i, leaf, keep, whole_view, layout, temperature_ptr, seed_ptr, memory, raw_memory, maxima_ptr, scale,
                           num_leaves, PAIRS)  # fmt: skip
                if draft_top_ptr is not None:
                    inner = has_children(i, slot, length, parents_ptr, num_nodes, WIDTH)
                    sweep_draft(i, leaf, keep & inner, row0, slot, law, draft_memory, draft_scale, num_leaves, PAIRS)
                if arrive(group_count_ptr + request * num_groups + group, chunks):
                    merge_nodes(
                        group * GROUP, row0, length, whole_view, view, layout, law, temperature_ptr, seed_ptr, filters, parents_ptr,
                        memory, raw_memory, draft_memory, groups, records, walks, scale, draft_scale, num_leaves, num_nodes,
                        RECORD, JOINT, GROUP, GROUPS, CANDIDATES, LEAVES, WIDTH,
                    )  # fmt: skip
                    if arrive(request_count_ptr + request, length // GROUP + 1):
                        decides = 1
    elif SWEEPS:
        state = tl.full((), DONE, tl.int32)
        if (length >= 0) & (number >= 0):
            state = tl.atomic_add(published_ptr + request, 0, sem="acquire", scope="gpu")
            while state <= number:
                state = tl.atomic_add(published_ptr + request, 0, sem="acquire", scope="gpu")
            tl.debug_barrier()
        if state < DONE:
            _sweep(request, item, row0, length, view, layout, law, parents_ptr, residuals, records, states, scale, draft_scale,
                   num_nodes, num_leaves, WEIGHTS, REST, LEFT, COLUMN, WITHOUT, TILE, SPAN, CANDIDATES, WIDTH)  # fmt: skip
            if arrive(sweep_count_ptr + request, parts):
                decides = 1
                sweep = number + 1
    if decides > 0:
        decide(
            request, row0, length, sweep, view, layout, law, parents_ptr, temperature_ptr, seed_ptr, outputs, memory, raw_memory,
            residuals, records, states, published_ptr, mapping, map_parts, walks, scale, draft_scale, num_requests, num_forward,
            num_nodes, num_leaves, RULE, AT, WEIGHTS, LEFT, COLUMN, WITHOUT, CANDIDATES, LEAVES, WIDTH,
        )  # fmt: skip
    if SWEEPS:
        if number >= 0:
            if length >= 0:
                if arrive(item_count_ptr + request, sweeps * parts):
                    tl.store(published_ptr + request, 0)


# kind of proposal -> record, weights of a tile, at one id; what is left without replacement where the sweep does not give it, by
# column or from a list; and the column of an id
_LAWS = {
    "none": (None, None, None, None, None, None),
    "stored": (record_stored, weights_stored, at_stored, None, None, column_is_id),
    "mapped": (record_stored, weights_stored, at_stored, left_mapped, None, column_of_id),
    "listed": (record_listed, weights_listed, at_listed, None, left_listed, None),
}


def launch_accept_tree(items, args, *, rule, law, without_replacement, joint, candidates, leaves, groups, width, config):
    """Launch one program per item (a part of a map to invert, a wave-1 part of a request, or a part of a sweep)."""
    record, weights, at, rest, left, column = _LAWS[law]
    accept_tree_kernel[(items,)](
        *args,
        RULE=rule,
        RECORD=record,
        WEIGHTS=weights,
        AT=at,
        REST=rest,
        LEFT=left,
        COLUMN=column,
        WITHOUT=without_replacement,
        JOINT=joint,
        GROUP=config.group,
        CHUNK=config.chunk,
        TILE=config.tile,
        SPAN=config.span,
        CANDIDATES=candidates,
        LEAVES=leaves,
        GROUPS=groups,
        WIDTH=width,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
