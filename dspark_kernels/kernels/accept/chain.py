"""Lossless acceptance of a chain of drafts straight from target logits, in one launch.

First phase, an item = rows x blocks of a request: partial results of each block, one pass over the logits. The last item of a row
group merges its rows; the last group of a request verifies its drafts. Where residuals of whole rows are needed (a dense proposal;
the block rule), second-phase items of that request (later tickets, so that the wait cannot deadlock on any grid) sum them per
block, and the last of them draws. Only the winning block is read again. Nothing of the size of a row is written. Symbols: R
requests, K drafts, V vocabulary, block = 1024 ids, NB blocks. Rules: rules.py; proposals: proposals.py; records: args.py.
Reference: reference/accept.py."""

import triton
import triton.language as tl

from ..primitives.constants import NONFINITE_ROW, ROW_IDS
from ..primitives.slots import state_slots
from ..primitives.sumexp import log2_scale
from ..primitives.sync import arrive, stores_done, wait_for
from . import dense, sparse
from .args import Known, Scales, Sizes, View
from .dense import invert_map, map_used
from .first_pass import item_of, sweep_draft, sweep_target
from .outputs import draw, write_no_outputs, write_outputs
from .rows import FIRST, STATUS, limit_rows, merge_rows
from .rules import (
    DONE,
    NEEDS_RESIDUAL,
    PENDING,
    draft_rows,
    drafts_at,
    select_block_length,
    verify_block,
    verify_forced,
    verify_match,
    verify_token,
)


@triton.jit
def _order(ticket, num_requests, first_items, second_items, lag, TWO_PHASES: tl.constexpr):
    """(phase, request, item) of a ticket: a request's second phase comes `lag` requests after its first."""
    phase = 0
    request = ticket // first_items
    item = ticket % first_items
    if TWO_PHASES:
        lag = tl.minimum(lag, num_requests)
        head = lag * first_items
        middle = (num_requests - lag) * (first_items + second_items)
        if ticket >= head + middle:
            rest = ticket - head - middle
            phase = 1
            request = num_requests - lag + rest // second_items
            item = rest % second_items
        elif ticket >= head:
            rest = ticket - head
            request = rest // (first_items + second_items)
            item = rest % (first_items + second_items)
            if item < first_items:
                request += lag
            else:
                item -= first_items
                phase = 1
    return phase, request, item


@triton.jit
def _known(every, forward, first_row, sampled, slot, length, layout, sampling, vocab):
    """forward [WIDTH], first_row: rows of the forward pass that the request's drafts and its anchor have."""
    seed = tl.zeros((), tl.int64)
    if sampling.seed_ptr is not None:
        seed = tl.load(sampling.seed_ptr + slot)
    return Known(tl.load(layout.positions_ptr + first_row), sampled, seed, drafts_at(forward, every, length, layout, vocab))


@triton.jit
def _conclude(
    request, accepted, wants_residual, known, view, layout, draft, outputs, scratch, scales, sizes,
    PROPOSAL: tl.constexpr, DRAWS: tl.constexpr, TWO_PHASES: tl.constexpr, PAIRS: tl.constexpr, CANDIDATES: tl.constexpr,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What follows the accepted drafts, and every output."""
    row = (view.row0 + accepted).to(tl.int64)
    token = tl.load(scratch.stats.ids_ptr + row * ROW_IDS + FIRST, volatile=True).to(tl.int64)
    empty = view.length < 0
    if DRAWS:
        finite = (tl.load(scratch.stats.ids_ptr + row * ROW_IDS + STATUS, volatile=True) & NONFINITE_ROW) == 0
        if known.sampled & finite:
            if PROPOSAL is not None and not TWO_PHASES:
                if wants_residual:
                    PROPOSAL.residual_sums(0, 1, accepted, row, view, draft, scratch, scales, sizes.num_blocks,
                                           PROPOSAL, PAIRS, BLOCKS, CANDIDATES)  # fmt: skip
            token, empty = draw(
                accepted, row, request, wants_residual, known.seed, known.anchor + accepted + 1, known.anchor,
                view, draft, scratch, scales, sizes.num_blocks, PROPOSAL, BLOCKS, CANDIDATES,
            )  # fmt: skip
    write_outputs(request, accepted, token, empty, known, view, layout, outputs, scratch.raw, scratch.stats,
                  scales.target, sizes, PROPOSAL is not None, WIDTH)  # fmt: skip


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward", "steps", "lag", "span", "parts"])
def accept_chain_kernel(
    target,  # Target
    layout,  # Layout
    draft,  # DenseDraft or SparseDraft; None = one-hot
    sampling,  # Sampling
    rates_ptr,  # fp32 [K] or None
    slots_ptr,  # int32 [R] or None
    outputs,  # Outputs
    counters,  # ChainCounters
    map_progress,  # MapProgress, or None
    scratch,  # ChainScratch
    num_requests, num_slots, num_rows, num_forward, num_drafts, vocab, num_blocks,
    steps,  # chunks of a first-phase item
    lag,  # requests between the phases
    span, parts,  # chunks of a second-phase item, such items per row
    map_parts,  # items that invert the id map
    VERIFY: tl.constexpr, SELECT: tl.constexpr, PROPOSAL: tl.constexpr, DRAWS: tl.constexpr, TWO_PHASES: tl.constexpr,
    JOINT: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, CANDIDATES: tl.constexpr, BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = GROUP * CHUNK
    chunks = tl.cdiv(num_blocks, CHUNK * steps)
    num_groups = tl.cdiv(num_drafts + 1, GROUP)
    first_items = num_groups * chunks
    # Second phase: `parts` items for each of the rows that may need a residual, one under the token rule.
    second_items = parts
    if SELECT is not None:
        second_items = parts * num_drafts
    if not TWO_PHASES:
        second_items = 0

    # Tickets, not program ids, order the work: an item that waits has a later ticket than the items it waits for.
    ticket = tl.atomic_add(counters.ticket_ptr, 1, sem="relaxed", scope="gpu")
    before = 0
    if map_progress is not None:
        before = map_parts
    if ticket == before + num_requests * (first_items + second_items) - 1:
        tl.store(counters.ticket_ptr, 0)
    phase, request, item = _order(tl.maximum(ticket - before, 0), num_requests, first_items, second_items, lag, TWO_PHASES)
    if map_progress is not None:
        if ticket < before:
            phase = 2
            invert_map(ticket, draft, vocab, map_progress.ready_ptr)

    slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
    row0 = tl.load(layout.cu_logits_ptr + request)
    length = tl.minimum(tl.minimum(tl.load(layout.cu_logits_ptr + request + 1), num_rows) - row0 - 1, num_drafts)
    if slot < 0:
        length = length * 0 - 1
    scale = tl.full((), 1.4426950408889634, tl.float32)
    draft_scale = scale
    sampled = length < -1
    draft_temperature = tl.zeros((), tl.float32)
    if length >= 0:
        if sampling.temperature_ptr is not None:
            draft_temperature = tl.load(sampling.temperature_ptr + slot)
            sampled = draft_temperature > 0.0
            scale = log2_scale(draft_temperature)
            if sampling.draft_temperature_ptr is not None:
                draft_temperature = tl.load(sampling.draft_temperature_ptr + slot)
            draft_scale = log2_scale(draft_temperature)
    scales = Scales(scale, draft_scale)
    sizes = Sizes(num_requests, num_forward, num_drafts, num_blocks)
    unlimited = View(target.logits_ptr, target.stride, vocab, target.adjustments, layout.token_ids_ptr, None,
                     layout.logits_indices_ptr, row0, slot, length, None)  # fmt: skip
    view = View(target.logits_ptr, target.stride, vocab, target.adjustments, layout.token_ids_ptr, None,
                layout.logits_indices_ptr, row0, slot, length, scratch.limits)  # fmt: skip

    if phase == 0:
        if length < 0:
            if item == 0:
                write_no_outputs(request, slot, layout, outputs, sizes, WIDTH)
                if map_progress is not None:
                    map_used(map_progress, num_requests, map_parts)
        else:
            group = item // chunks
            if group * GROUP <= length:
                # What only the last arriver needs is asked for before the sweep (where it is) and before the arrival, so that it
                # waits for neither.
                every = tl.arange(0, WIDTH)
                member = group * GROUP + tl.arange(0, GROUP)
                rows = tl.where(member <= length, row0 + member, -1).to(tl.int64)
                forward = draft_rows(every, row0 + every, length, layout)
                own_forward = draft_rows(member, rows, length, layout)
                first_row = tl.load(layout.logits_indices_ptr + row0)
                part = item_of(group, item % chunks, steps, GROUP, CHUNK)
                sweep_target(part, unlimited, layout, sampling, scratch, scale, num_blocks, CHUNK)
                if scratch.draft is not None:
                    sweep_draft(part, part.i < length, view, draft, scratch.draft, draft_scale, num_blocks, CHUNK)
                known = _known(every, forward, first_row, sampled, slot, length, layout, sampling, vocab)
                own = drafts_at(own_forward, member, length, layout, vocab)
                if arrive(counters.groups_ptr + request * num_groups + group, chunks):
                    if scratch.limits is not None:
                        limit_rows(group * GROUP, unlimited, view, layout, sampling, scratch.target, scratch.filters, scale,
                                   num_blocks, JOINT, GROUP, GROUPS, BLOCKS)  # fmt: skip
                    merge_rows(member, rows, view, own, sampled, scratch.target, scratch.raw, scratch.stats, scale, num_blocks,
                               BLOCKS)  # fmt: skip
                    if PROPOSAL is not None:
                        if map_progress is not None:
                            wait_for(map_progress.ready_ptr, map_parts)
                        PROPOSAL.draft_stats(
                            member, tl.where(member < length, rows, -1), own.ids, view, draft, scratch.draft, scratch.stats,
                            draft_scale, draft_temperature, num_blocks, PROPOSAL, BLOCKS, CANDIDATES,
                        )  # fmt: skip
                    if arrive(counters.requests_ptr + request, length // GROUP + 1):
                        accepted, wants = VERIFY(every, (row0 + every).to(tl.int64), length, known, scratch.stats, rates_ptr)
                        if TWO_PHASES:
                            tl.store(scratch.accepted_ptr + request, accepted)
                            stores_done()
                            state_ptr = counters.states_ptr + request
                            tl.atomic_xchg(state_ptr, tl.where(wants, NEEDS_RESIDUAL, DONE), sem="release", scope="gpu")
                        else:
                            _conclude(request, accepted, wants, known, view, layout, draft, outputs, scratch, scales, sizes,
                                      PROPOSAL, DRAWS, TWO_PHASES, PAIRS, CANDIDATES, BLOCKS, WIDTH)  # fmt: skip
    elif phase == 1:
        if TWO_PHASES:
            if length >= 0:
                every = tl.arange(0, WIDTH)
                forward = draft_rows(every, row0 + every, length, layout)
                first_row = tl.load(layout.logits_indices_ptr + row0)
                known = _known(every, forward, first_row, sampled, slot, length, layout, sampling, vocab)
                state = tl.atomic_add(counters.states_ptr + request, 0, sem="acquire", scope="gpu")
                while state == PENDING:
                    state = tl.atomic_add(counters.states_ptr + request, 0, sem="acquire", scope="gpu")
                tl.debug_barrier()
                accepted = tl.load(scratch.accepted_ptr + request, volatile=True)
                if state == NEEDS_RESIDUAL:
                    verified = accepted
                    part = item
                    inside = item >= 0
                    if SELECT is not None:
                        verified = item // parts
                        part = item % parts
                        inside = verified < accepted
                    if inside:
                        PROPOSAL.residual_sums(part, span, verified, (row0 + verified).to(tl.int64), view, draft, scratch, scales,
                                               num_blocks, PROPOSAL, PAIRS, BLOCKS, CANDIDATES)  # fmt: skip
                if arrive(counters.residuals_ptr + request, second_items):
                    tl.store(counters.states_ptr + request, PENDING)
                    wants = state == NEEDS_RESIDUAL
                    if SELECT is not None:
                        if wants:
                            stop = accepted
                            accepted = SELECT(every, (row0 + every).to(tl.int64), stop, scratch.stats, scratch.residual_ptr,
                                              num_blocks, known.seed, known.anchor, WIDTH, BLOCKS)  # fmt: skip
                            wants = accepted < stop
                    _conclude(request, accepted, wants, known, view, layout, draft, outputs, scratch, scales, sizes,
                              PROPOSAL, DRAWS, TWO_PHASES, PAIRS, CANDIDATES, BLOCKS, WIDTH)  # fmt: skip
                    if map_progress is not None:
                        map_used(map_progress, num_requests, map_parts)


_RULES = {"token": verify_token, "block": verify_block, "match": verify_match, "forced": verify_forced}
_PROPOSALS = {"none": None, "sparse": sparse.SPARSE, "stored": dense.STORED, "mapped": dense.MAPPED}


def launch_accept_chain(items, args, *, rule, proposal, two_phases, draws, joint, candidates, blocks, groups, width, config):
    """Launch one program per item (a part of a map to invert, a first- or second-phase part of a request)."""
    accept_chain_kernel[(items,)](
        *args,
        VERIFY=_RULES[rule],
        SELECT=select_block_length if rule == "block" else None,
        PROPOSAL=_PROPOSALS[proposal],
        DRAWS=draws,
        TWO_PHASES=two_phases,
        JOINT=joint,
        GROUP=config.group,
        CHUNK=config.chunk,
        CANDIDATES=candidates,
        BLOCKS=blocks,
        GROUPS=groups,
        WIDTH=width,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
