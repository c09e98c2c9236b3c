"""Lossless acceptance of a chain of drafts straight from target logits, in one launch.

Wave 1, an item = rows x leaves of a request: partial results of each leaf, one pass over the logits. The last item of a row group
merges its rows; the last group of a request judges its drafts. Where residuals of whole rows are needed (a dense proposal; the
block rule), wave-2 items of that request (later tickets, so that the wait cannot deadlock on any grid) sum them per leaf, and the
last of them draws. Only the winning leaf is read again. Nothing of the size of a row is written. Symbols: R requests, K drafts, V
vocabulary, leaf = 1024 ids, NL leaves. Rules: rules.py; laws of drafts: proposals.py. Oracle: reference/accept.py.
"""

import triton
import triton.language as tl

from ..primitives.fence import stores_done
from ..primitives.mass import log2_scale
from ..primitives.slots import state_slots
from ..primitives.ticket import arrive
from .outputs import draw, emit, emit_nothing
from .proposals import (
    await_map,
    column_is_id,
    column_of_id,
    inner_dense,
    inner_listed,
    invert_map,
    map_used,
    record_dense,
    record_listed,
    residual_dense,
    residual_listed,
    sweep_draft,
)
from .rows import FIRST, IDS, NONFINITE_ROW, STATUS, limit_rows, merge_rows, rows_status, sweep_rows
from .rules import DONE, NEEDS_RESIDUAL, PENDING, choose_block, judge_block, judge_forced, judge_match, judge_token


@triton.jit
def _order(ticket, num_requests, first_wave, second_wave, LAG: tl.constexpr, TWO_WAVES: tl.constexpr):
    """(wave, request, item) of a ticket: a request's second wave comes LAG requests after its first, while its rows are still in
    the L2 cache."""
    wave = 0
    request = ticket // first_wave
    item = ticket % first_wave
    if TWO_WAVES:
        lag = tl.minimum(LAG, num_requests)
        head = lag * first_wave
        middle = (num_requests - lag) * (first_wave + second_wave)
        if ticket >= head + middle:
            rest = ticket - head - middle
            wave = 1
            request = num_requests - lag + rest // second_wave
            item = rest % second_wave
        elif ticket >= head:
            rest = ticket - head
            request = rest // (first_wave + second_wave)
            item = rest % (first_wave + second_wave)
            if item < first_wave:
                request += lag
            else:
                item -= first_wave
                wave = 1
    return wave, request, item


@triton.jit
def _conclude(
    request, row0, length, accepted, wants_residual, view, layout, law, temperature_ptr, seed_ptr, outputs, memory, raw_memory,
    residual_ptr, listing, row_values_ptr, row_ids_ptr, scale, draft_scale, num_requests, num_drafts, num_forward, num_leaves,
    RESIDUAL: tl.constexpr, INNER: tl.constexpr, COLUMN: tl.constexpr, DRAWS: tl.constexpr, TWO_WAVES: tl.constexpr,
    PAIRS: tl.constexpr, CANDIDATES: tl.constexpr, LEAVES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What follows the accepted drafts, and every output."""
    _, _, logits_indices_ptr, _tokens, positions_ptr = layout
    _, _, _, _, _, _, _, slot, _, _ = view
    removed_ptr, patch_ptr = listing
    anchor = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0))
    row = (row0 + accepted).to(tl.int64)
    token = tl.load(row_ids_ptr + row * IDS + FIRST, volatile=True).to(tl.int64)
    sampled = length < 0
    empty = sampled
    if temperature_ptr is not None:
        sampled = tl.load(temperature_ptr + slot) > 0.0
        finite = (tl.load(row_ids_ptr + row * IDS + STATUS, volatile=True) & NONFINITE_ROW) == 0
        if DRAWS:
            if sampled & finite:
                if RESIDUAL is not None and not TWO_WAVES:
                    if wants_residual:
                        RESIDUAL(0, accepted, row, view, law, removed_ptr, memory, residual_ptr, row_values_ptr, row_ids_ptr,
                                 scale, draft_scale, num_leaves, COLUMN, PAIRS, LEAVES, CANDIDATES)  # fmt: skip
                token, empty = draw(
                    accepted, row, request, wants_residual, tl.load(seed_ptr + slot), anchor + accepted + 1, anchor, view, law,
                    memory, residual_ptr, patch_ptr, row_values_ptr, row_ids_ptr, scale, draft_scale, num_leaves,
                    INNER, COLUMN, LEAVES, CANDIDATES,
                )  # fmt: skip
    emit(request, slot, row0, length, accepted, token, empty, anchor, sampled, view, layout, outputs, raw_memory, row_values_ptr,
         row_ids_ptr, scale, num_requests, num_drafts, num_forward, RESIDUAL is not None, WIDTH)  # fmt: skip


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward"])
def accept_chain_kernel(
    target,  # ([L, V], its row stride, settings of primitives/adjust.py or None)
    layout,  # query_start, cu_logits [R+1], logits_indices [L], token_ids, positions [N_max]
    law,  # of the drafts, see proposals.py; None = one-hot
    draft_temperature_ptr,  # [S] or None
    temperature_ptr, seed_ptr,  # [S]; None = every row greedy
    filters,  # (top_k, top_p, min_p), each [S] or None; or None
    rates_ptr,  # [K] or None
    slots_ptr,  # [R] or None
    outputs,  # (tokens [R, K+1], five of [R], commit [N_max], flags [R], log_probs [R, K+1] or None), (anchors and positions [S])
    counters,  # int32, zero before and after: ticket, arrivals of row groups, of requests, of wave-2 items, states
    mapping,  # int32, zero before and after: parts of the inverted map, requests that finished; or None
    memory,  # [L, NL]: maxima, masses; best keys or None
    raw_memory,  # [L, NL]: maxima and masses of what the target gave, or None
    draft_memory,  # [L, NL]: maxima and masses of the draft's rows, or (None, None)
    residual_ptr,  # [L, NL]
    listing,  # (masses removed [L, NL], one leaf per request [R, LEAF])
    groups,  # (maxima fp32 [L, G], groups int32 [L, G], lists int32 [L, 2 * 1024]), or (None, None, None)
    limits,  # (threshold int64 [L], cut int32 [L]), or None
    row_values_ptr, row_ids_ptr,  # [L, VALUES], [L, IDS]
    record_ptr,  # [R]
    num_requests, num_slots, num_rows, num_forward, num_drafts, vocab, num_leaves, parts, map_parts,
    JUDGE: tl.constexpr, CHOOSE: tl.constexpr, RECORD: tl.constexpr, RESIDUAL: tl.constexpr, INNER: tl.constexpr,
    COLUMN: tl.constexpr, DRAWS: tl.constexpr, TWO_WAVES: tl.constexpr, JOINT: tl.constexpr,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, CANDIDATES: tl.constexpr, LEAVES: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = GROUP * CHUNK
    ticket_ptr, group_count_ptr, request_count_ptr, residual_count_ptr, state_ptr = counters
    _starts, cu_logits_ptr, logits_indices_ptr, token_ids_ptr, positions_ptr = layout
    _tops, mass_ptr, _best = memory
    draft_top_ptr, _draft_mass = draft_memory
    removed_ptr, _patch = listing
    maxima_ptr, _groups, _lists = groups
    chunks = tl.cdiv(num_leaves, CHUNK)
    num_groups = tl.cdiv(num_drafts + 1, GROUP)
    first_wave = num_groups * chunks
    # Wave 2: `parts` items for each of the rows that may need a residual, one under the token rule.
    second_wave = parts
    if CHOOSE is not None:
        second_wave = parts * num_drafts
    if not TWO_WAVES:
        second_wave = 0

    # Tickets, not program ids, order the work: an item that waits has a later ticket than the items it waits for.
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    before = 0
    if mapping is not None:
        before = map_parts
    if ticket == before + num_requests * (first_wave + second_wave) - 1:
        tl.store(ticket_ptr, 0)
    wave, request, item = _order(tl.maximum(ticket - before, 0), num_requests, first_wave, second_wave, LAG, TWO_WAVES)
    if mapping is not None:
        ready_ptr, _finished_ptr = mapping
        if ticket < before:
            wave = 2
            invert_map(ticket, law, vocab, ready_ptr)

    slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
    row0 = tl.load(cu_logits_ptr + request)
    length = tl.minimum(tl.minimum(tl.load(cu_logits_ptr + request + 1), num_rows) - row0 - 1, num_drafts)
    if slot < 0:
        length = length * 0 - 1
    scale = tl.full((), 1.4426950408889634, tl.float32)
    draft_scale = scale
    draft_temperature = tl.zeros((), tl.float32)
    if length >= 0:
        if temperature_ptr is not None:
            draft_temperature = tl.load(temperature_ptr + slot)
            scale = log2_scale(draft_temperature)
            if draft_temperature_ptr is not None:
                draft_temperature = tl.load(draft_temperature_ptr + slot)
            draft_scale = log2_scale(draft_temperature)
    target_ptr, stride_t, settings = target
    tokens = (token_ids_ptr, None)
    whole_view = (target_ptr, stride_t, vocab, settings, tokens, logits_indices_ptr, row0, slot, length, None)
    view = (target_ptr, stride_t, vocab, settings, tokens, logits_indices_ptr, row0, slot, length, limits)

    if wave == 0:
        if length < 0:
            if item == 0:
                emit_nothing(request, slot, layout, outputs, num_requests, num_drafts, num_forward, WIDTH)
                if mapping is not None:
                    map_used(mapping, num_requests, map_parts)
        else:
            group = item // chunks
            if group * GROUP <= length:
                pair = tl.arange(0, PAIRS)
                i = group * GROUP + pair // CHUNK
                leaf = (item % chunks) * CHUNK + pair % CHUNK
                keep = (i <= length) & (leaf < num_leaves)
                sweep_rows(i, leaf, keep, whole_view, layout, temperature_ptr, seed_ptr, memory, raw_memory, maxima_ptr, scale,
                           num_leaves, PAIRS)  # fmt: skip
                if draft_top_ptr is not None:
                    sweep_draft(i, leaf, keep & (i < length), row0, slot, law, draft_memory, draft_scale, num_leaves, PAIRS)

                if arrive(group_count_ptr + request * num_groups + group, chunks):
                    member = group * GROUP + tl.arange(0, GROUP)
                    rows = tl.where(member <= length, row0 + member, -1).to(tl.int64)
                    status = rows_status(rows, mass_ptr, num_leaves, LEAVES)
                    if limits is not None:
                        limit_rows(group * GROUP, whole_view, view, filters, layout, temperature_ptr, seed_ptr, memory, groups,
                                   scale, num_leaves, length, JOINT, GROUP, GROUPS, LEAVES)  # fmt: skip
                    draft = merge_rows(member, rows, status, view, layout, temperature_ptr, memory, raw_memory, row_values_ptr,
                                       row_ids_ptr, scale, num_leaves, length, LEAVES)  # fmt: skip
                    if RECORD is not None:
                        if mapping is not None:
                            await_map(ready_ptr, map_parts)
                        RECORD(member, tl.where(member < length, rows, -1), draft, view, law, draft_memory, row_values_ptr,
                               row_ids_ptr, draft_scale, draft_temperature, num_leaves, COLUMN, LEAVES, CANDIDATES)  # fmt: skip
                    if arrive(request_count_ptr + request, length // GROUP + 1):
                        every = tl.arange(0, WIDTH)
                        anchor = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0))
                        sampled = length < 0
                        seed = tl.zeros((), tl.int64)
                        if temperature_ptr is not None:
                            sampled = tl.load(temperature_ptr + slot) > 0.0
                            seed = tl.load(seed_ptr + slot)
                        accepted, wants = JUDGE(every, (row0 + every).to(tl.int64), length, layout, row_values_ptr, row_ids_ptr,
                                                rates_ptr, sampled, seed, anchor, vocab)  # fmt: skip
                        if TWO_WAVES:
                            tl.store(record_ptr + request, accepted)
                            stores_done()
                            tl.atomic_xchg(state_ptr + request, tl.where(wants, NEEDS_RESIDUAL, DONE), sem="release", scope="gpu")
                        else:
                            _conclude(
                                request, row0, length, accepted, wants, view, layout, law, temperature_ptr, seed_ptr, outputs,
                                memory, raw_memory, residual_ptr, listing, row_values_ptr, row_ids_ptr, scale, draft_scale,
                                num_requests, num_drafts, num_forward, num_leaves,
                                RESIDUAL, INNER, COLUMN, DRAWS, TWO_WAVES, PAIRS, CANDIDATES, LEAVES, WIDTH,
                            )  # fmt: skip
    elif wave == 1:
        if TWO_WAVES:
            if length >= 0:
                state = tl.atomic_add(state_ptr + request, 0, sem="acquire", scope="gpu")
                while state == PENDING:
                    state = tl.atomic_add(state_ptr + request, 0, sem="acquire", scope="gpu")
                tl.debug_barrier()
                accepted = tl.load(record_ptr + request, volatile=True)
                if state == NEEDS_RESIDUAL:
                    judged = accepted
                    part = item
                    inside = item >= 0
                    if CHOOSE is not None:
                        judged = item // parts
                        part = item % parts
                        inside = judged < accepted
                    if inside:
                        RESIDUAL(part, judged, (row0 + judged).to(tl.int64), view, law, removed_ptr, memory, residual_ptr,
                                 row_values_ptr, row_ids_ptr, scale, draft_scale, num_leaves,
                                 COLUMN, PAIRS, LEAVES, CANDIDATES)  # fmt: skip
                if arrive(residual_count_ptr + request, second_wave):
                    tl.store(state_ptr + request, PENDING)
                    wants = state == NEEDS_RESIDUAL
                    if CHOOSE is not None:
                        if wants:
                            every = tl.arange(0, WIDTH)
                            anchor = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0))
                            stop = accepted
                            accepted = CHOOSE(every, (row0 + every).to(tl.int64), stop, row_values_ptr, residual_ptr, num_leaves,
                                              tl.load(seed_ptr + slot), anchor, WIDTH, LEAVES)  # fmt: skip
                            wants = accepted < stop
                    _conclude(
                        request, row0, length, accepted, wants, view, layout, law, temperature_ptr, seed_ptr, outputs, memory,
                        raw_memory, residual_ptr, listing, row_values_ptr, row_ids_ptr, scale, draft_scale, num_requests,
                        num_drafts, num_forward, num_leaves,
                        RESIDUAL, INNER, COLUMN, DRAWS, TWO_WAVES, PAIRS, CANDIDATES, LEAVES, WIDTH,
                    )  # fmt: skip
                    if mapping is not None:
                        map_used(mapping, num_requests, map_parts)


_JUDGES = {"token": judge_token, "block": judge_block, "match": judge_match, "forced": judge_forced}
# kind of proposal -> record, residual, inner, and the column of an id
_LAWS = {
    "none": (None, None, None, None),
    "listed": (record_listed, residual_listed, inner_listed, None),
    "stored": (record_dense, residual_dense, inner_dense, column_is_id),
    "mapped": (record_dense, residual_dense, inner_dense, column_of_id),
}


def launch_accept_chain(items, args, *, judge, law, two_waves, draws, joint, candidates, leaves, groups, width, config):
    """Launch one program per item (a wave-1 or wave-2 part of a request)."""
    record, residual, inner, column = _LAWS[law]
    accept_chain_kernel[(items,)](
        *args,
        JUDGE=_JUDGES[judge],
        CHOOSE=choose_block if judge == "block" else None,
        RECORD=record,
        RESIDUAL=residual,
        INNER=inner,
        COLUMN=column,
        DRAWS=draws,
        TWO_WAVES=two_waves,
        JOINT=joint,
        GROUP=config.group,
        CHUNK=config.chunk,
        CANDIDATES=candidates,
        LEAVES=leaves,
        GROUPS=groups,
        WIDTH=width,
        LAG=config.lag,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
