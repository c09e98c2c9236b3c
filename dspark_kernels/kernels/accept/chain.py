"""Lossless acceptance of a chain of drafts straight from target logits, in one launch.

First phase, an item = rows x blocks of a request: partial results of each block, one pass over the logits. The last item of a row
group merges its rows; the last group of a request verifies its drafts. Where residuals of whole rows are needed (a dense proposal;
the block rule), second-phase items of that request (later tickets, so that the wait cannot deadlock on any grid) sum them per
block, and the last of them draws. Only the winning block is read again. Nothing of the size of a row is written. Symbols: R
requests, K drafts, V vocabulary, block = 1024 ids, NB blocks. Rules: rules.py; proposals: proposals.py; records: args.py.
Reference: reference/accept.py."""

import triton
import triton.language as tl

from ..primitives.constants import NONFINITE_ROW
from ..primitives.options import options_of
from ..primitives.sumexp import log2_scale
from ..primitives.sync import announce, arrive, wait_for
from ..primitives.vocab_blocks import load_blocks
from . import dense, sparse
from .args import AcceptTile, ChainRule
from .dense import invert_map
from .first_pass import first_logits, item_of, sweep_draft, sweep_target
from .outputs import draw, write_no_outputs, write_outputs
from .proposals import row_pair
from .requests import release_map, rows_of, take_place
from .rows import limit_rows, merge_target, pick, read_stats, store_target_prob
from .rules import (
    draft_rows,
    drafts_at,
    forward_rows,
    query_rows,
    select_block_length,
    verify_block,
    verify_forced,
    verify_match,
    verify_token,
)
from .target import read_each
from .values import Known, Scales, Sizes, Temperatures, Verdict, View


@triton.jit
def _second_items(parts, num_drafts, RULE: tl.constexpr):
    """Items of a request's second phase: `parts` for each of the rows that may need a residual, one under the token rule."""
    items = parts
    if RULE.SELECT is not None:
        items = parts * num_drafts
    if not RULE.TWO_PHASES:
        items = 0
    return items


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
def _known(request, rows, drafts, sampled, slot, layout, sampling, num_forward):
    """rows: ForwardRows."""
    anchor = tl.load(layout.positions_ptr + rows.anchor)
    seed = tl.zeros((), tl.int64)
    if sampling.seed_ptr is not None:
        seed = tl.load(sampling.seed_ptr + slot)
    return Known(anchor, sampled, seed, drafts, rows, query_rows(request, num_forward, layout))


@triton.jit
def _temperatures(sampling, slot, length):
    """Temperatures of a request; greedy where it has no rows."""
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
    return Temperatures(Scales(scale, draft_scale), sampled, draft_temperature)


@triton.jit
def _first_item(
    request, item, chunks, steps, view, layout, draft, sampling, outputs, counters, map_progress, scratch, sizes,
    RULE: tl.constexpr, PROPOSAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Blocks of a group of rows. The group's last item merges its rows, the request's last group verifies its drafts."""
    row0, length = view.row0, view.length
    group = item // chunks
    if group * TILE.GROUP <= length:
        part = item_of(group, item % chunks, steps, TILE.GROUP, TILE.CHUNK)
        ahead = first_logits(part, view, scratch)
        # While the first logits are on their way, what only the last arriver needs is asked for, so that nobody waits for it.
        every = tl.arange(0, TILE.WIDTH)
        member = group * TILE.GROUP + tl.arange(0, TILE.GROUP)
        rows = tl.where(member <= length, row0 + member, -1).to(tl.int64)
        forward = forward_rows(every, row0, length, layout)
        own_forward = draft_rows(member, rows, length, layout)
        temperatures = _temperatures(sampling, view.slot, length)
        scales = temperatures.scales
        if scratch.target.best_ptr is None:
            own = drafts_at(own_forward, member, length, layout, view.vocab)
        sweep_target(part, ahead, view, layout, sampling, scratch, scales.target, sizes.num_blocks, TILE.CHUNK)
        if scratch.draft is not None:
            sweep_draft(part, part.i < length, view, draft, scratch.draft, scales.draft, sizes.num_blocks, TILE.CHUNK)
        if scratch.target.best_ptr is not None:  # the noise of a coupled sweep needs the registers
            own = drafts_at(own_forward, member, length, layout, view.vocab)
        drafts = drafts_at(forward.drafts, every, length, layout, view.vocab)
        known = _known(request, forward, drafts, temperatures.sampled, view.slot, layout, sampling, sizes.num_forward)
        if arrive(counters.groups_ptr + request * tl.cdiv(sizes.num_drafts + 1, TILE.GROUP) + group, chunks):
            _merge_group(
                group * TILE.GROUP, rows, own, view, temperatures, layout, draft, sampling, map_progress, scratch, sizes.num_blocks,
                PROPOSAL, TILE,
            )  # fmt: skip
            groups = length // TILE.GROUP + 1
            if RULE.TWO_PHASES:
                announce(counters.requests_ptr + request)
            elif arrive(counters.requests_ptr + request, groups):
                stats = _stats(every, view, draft, scratch, PROPOSAL)
                verdict = RULE.VERIFY(every, length, known, stats, sampling.rates_ptr)
                _conclude(request, verdict, known, stats, view, draft, outputs, scratch, scales, sizes,
                          RULE, PROPOSAL, TILE)  # fmt: skip


@triton.jit
def _stats(every, view, draft, scratch, PROPOSAL: tl.constexpr):
    rows = (view.row0 + every).to(tl.int64)
    removed_ptr = None
    if PROPOSAL is not None and draft is None:
        removed_ptr = scratch.sparse.removed_ptr
    stats = read_stats(
        rows, every <= view.length, every < view.length, scratch.raw, removed_ptr, scratch.stats, PROPOSAL is not None
    )
    tl.debug_barrier()  # as in _merge_group
    return stats


@triton.jit
def _merge_group(
    first, rows, drafts, view, temperatures, layout, draft, sampling, map_progress, scratch, num_blocks,
    PROPOSAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All blocks of a group of rows from row `first` of a request on are there: their statistics. drafts: RowDrafts of these."""
    scales = temperatures.scales
    member = first + tl.arange(0, TILE.GROUP)
    if scratch.limits is not None:
        limit_rows(first, view, layout, sampling, scratch.target, scratch.filters, scales.target, num_blocks,
                   TILE.JOINT, TILE.GROUP, TILE.GROUPS, TILE.BLOCKS)  # fmt: skip
    if PROPOSAL is not None:
        if map_progress is not None:
            wait_for(map_progress.ready_ptr, map_progress.parts)
    with_draft = tl.where(member < view.length, rows, -1)
    blocks = load_blocks(scratch.target.max_ptr, scratch.target.sumexp_ptr, rows, num_blocks, TILE.BLOCKS)
    x = read_each(view, tl.minimum(member, view.length), tl.where(drafts.inside, drafts.ids, 0).to(tl.int32), drafts.inside)
    if PROPOSAL is not None:
        logits = PROPOSAL.draft_logits(member, with_draft, drafts.ids, view, draft, PROPOSAL)
        tl.debug_barrier()  # all of it is asked for before anything is made of it: the compiler would wait in between
        PROPOSAL.draft_stats(
            member, with_draft, drafts.ids, logits, blocks, view, draft, scratch, scales, temperatures.draft, num_blocks,
            PROPOSAL, TILE.BLOCKS, TILE.CANDIDATES,
        )  # fmt: skip
    merged = merge_target(member, rows, view, temperatures.sampled, blocks, scratch.target, scratch.raw, scratch.stats, scales.target,
                          num_blocks, TILE.BLOCKS)  # fmt: skip
    store_target_prob(rows, x, drafts, merged.target, scratch.stats, scales.target)


@triton.jit
def _second_item(
    request, item, span, parts, view, layout, draft, sampling, outputs, counters, map_progress, scratch, sizes,
    RULE: tl.constexpr, PROPOSAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Residual sums of blocks of a row, once the request's drafts are verified. The request's last item draws."""
    row0, length, num_blocks = view.row0, view.length, sizes.num_blocks
    every = tl.arange(0, TILE.WIDTH)
    temperatures = _temperatures(sampling, view.slot, length)
    forward = forward_rows(every, row0, length, layout)
    drafts = drafts_at(forward.drafts, every, length, layout, view.vocab)
    known = _known(request, forward, drafts, temperatures.sampled, view.slot, layout, sampling, sizes.num_forward)
    wait_for(counters.requests_ptr + request, length // TILE.GROUP + 1)
    # Every item verifies for itself: that takes less time than waiting for one that does.
    stats = _stats(every, view, draft, scratch, PROPOSAL)
    verdict = RULE.VERIFY(every, length, known, stats, sampling.rates_ptr)
    if verdict.wants_residual:
        verified = verdict.accepted
        part = item
        inside = item >= 0
        if RULE.SELECT is not None:
            verified = item // parts
            part = item % parts
            inside = verified < verdict.accepted
        if inside:
            pair = row_pair(verified, stats, verdict.prefix_prob, every)
            PROPOSAL.residual_sums(
                part, span, verified, (row0 + verified).to(tl.int64), pair, view, draft, scratch, temperatures.scales, num_blocks,
                PROPOSAL, TILE.RESIDUAL, TILE.BLOCKS, TILE.CANDIDATES,
            )  # fmt: skip
    if arrive(counters.residuals_ptr + request, _second_items(parts, sizes.num_drafts, RULE)):
        tl.store(counters.requests_ptr + request, 0)
        accepted, wants = verdict.accepted, verdict.wants_residual
        if RULE.SELECT is not None:
            if wants:
                stop = accepted
                accepted = RULE.SELECT(every, (row0 + every).to(tl.int64), stop, verdict.prefix_prob, scratch.residual_ptr,
                                       num_blocks, known.seed, known.anchor, TILE.WIDTH, TILE.BLOCKS)  # fmt: skip
                wants = accepted < stop
        _conclude(request, Verdict(accepted, wants, verdict.prefix_prob), known, stats, view, draft, outputs, scratch,
                  temperatures.scales, sizes, RULE, PROPOSAL, TILE)  # fmt: skip
        release_map(map_progress, sizes.num_requests)


@triton.jit
def _conclude(
    request, verdict, known, stats, view, draft, outputs, scratch, scales, sizes,
    RULE: tl.constexpr, PROPOSAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What follows the accepted drafts, and every output. stats: RequestStats."""
    every = tl.arange(0, TILE.WIDTH)
    accepted = verdict.accepted
    row = (view.row0 + accepted).to(tl.int64)
    token = pick(stats.first, accepted, every).to(tl.int64)
    empty = view.length < 0
    if RULE.DRAWS:
        finite = (pick(stats.status, accepted, every) & NONFINITE_ROW) == 0
        if known.sampled & finite:
            pair = row_pair(accepted, stats, verdict.prefix_prob, every)
            token, empty = draw(
                accepted, row, request, verdict.wants_residual, pair, known.seed, known.anchor + accepted + 1, known.anchor,
                view, draft, scratch, scales, sizes.num_blocks, PROPOSAL, RULE.TWO_PHASES, TILE.BLOCKS, TILE.CANDIDATES,
            )  # fmt: skip
    write_outputs(request, accepted, token, empty, known, view, outputs, scratch.raw, stats, scales.target, sizes,
                  PROPOSAL is not None, TILE.WIDTH)  # fmt: skip


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward", "steps", "lag", "span", "parts"])
def accept_chain_kernel(
    target,  # Target
    layout,  # Layout
    draft,  # DenseDraft or SparseDraft; None = one-hot
    sampling,  # Sampling
    outputs,  # Outputs
    counters,  # ChainCounters
    map_progress,  # MapProgress, or None
    scratch,  # ChainScratch
    num_requests, num_slots, num_rows, num_forward,
    extent,  # Extent
    steps,  # chunks of a first-phase item
    lag,  # requests between the phases
    span, parts,  # chunks of a second-phase item, such items per row
    RULE: tl.constexpr,  # ChainRule
    PROPOSAL: tl.constexpr,  # ChainProposal, or None: drafts are compared with a token of each row
    TILE: tl.constexpr,  # AcceptTile
):  # fmt: skip
    num_drafts, vocab, num_blocks = extent.num_drafts, extent.vocab, extent.num_blocks
    chunks = tl.cdiv(num_blocks, TILE.CHUNK * steps)
    first_items = tl.cdiv(num_drafts + 1, TILE.GROUP) * chunks
    second_items = _second_items(parts, num_drafts, RULE)

    ticket, before = take_place(counters.ticket_ptr, map_progress, num_requests, first_items, second_items, RULE.TWO_PHASES)
    phase, request, item = _order(tl.maximum(ticket - before, 0), num_requests, first_items, second_items, lag, RULE.TWO_PHASES)
    if map_progress is not None:
        if ticket < before:
            phase = 2
            invert_map(ticket, draft, vocab, map_progress.ready_ptr)

    rows = rows_of(request, sampling, layout, num_requests, num_slots, num_rows)
    length = tl.minimum(rows.count - 1, num_drafts)
    length = tl.where(rows.slot < 0, -1, length)
    sizes = Sizes(num_requests, num_forward, num_drafts, num_blocks)
    view = View(target.logits_ptr, target.stride, vocab, target.adjustments, layout.token_ids_ptr, None,
                layout.logits_indices_ptr, rows.row0, rows.slot, length, scratch.limits)  # fmt: skip
    if phase == 0:
        if length < 0:
            if item == 0:
                write_no_outputs(request, rows.slot, layout, outputs, sizes, TILE.WIDTH)
                release_map(map_progress, num_requests)
        else:
            _first_item(
                request, item, chunks, steps, view, layout, draft, sampling, outputs, counters, map_progress,
                scratch, sizes, RULE, PROPOSAL, TILE,
            )  # fmt: skip
    elif phase == 1:
        if RULE.TWO_PHASES:
            if length >= 0:
                _second_item(
                    request, item, span, parts, view, layout, draft, sampling, outputs, counters, map_progress,
                    scratch, sizes, RULE, PROPOSAL, TILE,
                )  # fmt: skip


_RULES = {"token": verify_token, "block": verify_block, "match": verify_match, "forced": verify_forced}
_PROPOSALS = {"none": None, "sparse": sparse.SPARSE, "stored": dense.STORED, "mapped": dense.MAPPED, "probs": dense.PROBS}


def launch_accept_chain(items, args, *, rule, proposal, two_phases, draws, config, **tile):
    """Launch one program per item (a part of a map to invert, a first- or second-phase part of a request)."""
    accept_chain_kernel[(items,)](
        *args,
        RULE=ChainRule(
            VERIFY=_RULES[rule],
            SELECT=select_block_length if rule == "block" else None,
            DRAWS=draws,
            TWO_PHASES=two_phases,
        ),
        PROPOSAL=_PROPOSALS[proposal],
        TILE=AcceptTile(GROUP=config.group, CHUNK=config.chunk, RESIDUAL=config.residual, **tile),
        **options_of(config),
    )
