"""From confidences to draft lengths and packed rows, in one launch.

    survival a_{r,k} = product of c_{r,i} for i <= k,  admit in descending order of a while tau_n cost_{n-1} > tau_{n-1} cost_n

All programs schedule the whole batch, which is small, and each writes its own tile of rows (layout/rows.py). What a large batch
stores meanwhile is the same from every program, each kind in a place of its own, so none waits for another. The drafts are
[K, R] values: -1 what may not be admitted, else the survival in units of 2^-24, FORCED for the first min_len of a request; their
order is by value, descending, then by index k R + r. A length comes from the rank of a draft in that order, a number of drafts from
tests between neighbours; all in integers. A request belongs to a thread and so do successive ranks, for up to 8 drafts, so that
little is exchanged between threads: primitives/sort.py. Symbols: R requests, K drafts, N rows allocated, S request slots. Reference:
reference/schedule.py. Source: DSpark, arXiv 2607.05147, algorithm 1.
"""

import triton
import triton.language as tl

from ..primitives.constants import MISSING_DRAFT, NAN
from ..primitives.options import options_of
from ..primitives.sort import merge_columns, sort_columns
from .args import AnchorRows, BlockTables, Depths, Drafts, ScheduleTile, StepCosts
from .costs import COST_LIMIT, load_run, load_seconds, step_cost, table_slope
from .rows import first_missing, fixed_rows, made_drafts, of_draft, of_drafts, read_requests, write_rows

SURVIVAL_ONE = tl.constexpr(1 << 24)
FORCED = tl.constexpr(1 << 25)
ABOVE = tl.constexpr(1 << 26)  # every value
NEVER = tl.constexpr(1 << 62)


# --- values and their order -------------------------------------------------------------------------------------------


@triton.jit
def _value(confidence, limits, i, min_len, least, product):
    """Of draft i of every request [REQUESTS]: (the product of confidences so far, its value, survival int32, NaN flag)."""
    nan = tl.where(confidence != confidence, NAN, 0)
    confidence = tl.where(confidence > 0.0, confidence, 0.0)  # NaN, too
    product = product * tl.where(confidence < 1.0, confidence, 1.0)
    survival = (product * SURVIVAL_ONE).to(tl.int32)
    # The first min_len count whatever their survival.
    value = tl.where(i < min_len, FORCED, tl.where(survival >= least, survival, -1))
    return product, tl.where(i < limits, value, -1), survival, nan


@triton.jit
def _row(tile, k, ROWS: tl.constexpr):
    """Row k of a tile [ROWS, COLUMNS]."""
    return tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == k, tile, 0), axis=0)


@triton.jit
def _read_values(
    confidences, confidence_ptr, slots, limits, num_drafts, min_len, least, stride_cs, stored_ptr, tiles,
    REQUESTS: tl.constexpr, DRAFTS: tl.constexpr, SORT: tl.constexpr,
):  # fmt: skip
    """(values int32 [DRAFTS, REQUESTS], how many there are, what the forced ones of each request [REQUESTS] add to tau, NaN flag
    [REQUESTS]).

    confidences: what `of_drafts` loaded. Where SORT does not cover all drafts they are loaded here, and their values are in
    `stored` instead.
    """
    r = tl.arange(0, REQUESTS)
    product = tl.full([REQUESTS], 1.0, tl.float32)
    count = tl.zeros([REQUESTS], tl.int32)
    forced_tau = tl.zeros([REQUESTS], tl.int64)
    nan = tl.zeros([REQUESTS], tl.int32)
    if SORT == REQUESTS * DRAFTS:
        k = tl.arange(0, DRAFTS)[:, None]
        values = tl.zeros([DRAFTS, REQUESTS], tl.int32)
        for i in tl.static_range(DRAFTS):
            product, value, survival, bad = _value(confidences[i], limits, i, min_len, least, product)
            values = tl.where(k == i, value[None, :], values)
            count += (value >= 0).to(tl.int32)
            forced_tau += tl.where(value == FORCED, survival, 0).to(tl.int64)
            nan |= bad
    else:
        # Rows of padding are stored, too. (tiles is not known to the compiler, which therefore keeps the loop.)
        for i in range(tiles * SORT // REQUESTS):
            confidence = of_draft(confidence_ptr, slots, i, num_drafts, stride_cs)
            product, value, survival, bad = _value(confidence, limits, i, min_len, least, product)
            tl.store(stored_ptr + i * REQUESTS + r, value)
            count += (value >= 0).to(tl.int32)
            forced_tau += tl.where(value == FORCED, survival, 0).to(tl.int64)
            nan |= bad
        values = tl.full([1, 1], -1, tl.int32)
        tl.debug_barrier()
    return values, tl.sum(count, axis=0), forced_tau, nan


@triton.jit
def _count(values, stored_ptr, tiles, least, SORT: tl.constexpr, CANDIDATES: tl.constexpr):
    """How many values are at least `least`."""
    if SORT == CANDIDATES:
        found = tl.sum((values >= least).to(tl.int32), axis=0)
    else:
        found = tl.zeros([SORT], tl.int32)
        # tiles, a number the compiler does not know, keeps it from unrolling the loop in each of the many counts.
        for t in range(tiles):
            found += (tl.load(stored_ptr + t * SORT + tl.arange(0, SORT)) >= least).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def _value_of_rank(values, stored_ptr, tiles, number, SORT: tl.constexpr, CANDIDATES: tl.constexpr):
    """The number-th value in order, by bisection on its bits; more than any for number = 0."""
    value = number * 0
    for bit in range(26):
        higher = value | (FORCED >> bit)
        value = tl.where(_count(values, stored_ptr, tiles, higher, SORT, CANDIDATES) >= number, higher, value)
    return value


@triton.jit
def _next_in_order(values, stored_ptr, gathered_ptr, tiles, first, upto, before, CANDIDATES: tl.constexpr, TILE: tl.constexpr):
    """(values int32 [RUN, COLUMNS] of the ranks from `first` on in order, as primitives/sort.py has them; the value of rank
    upto - 1). before: the value of the rank before them.

    What lies strictly between the two bounds is gathered and sorted; copies of the bounds fill the ranks around it.
    """
    SORT: tl.constexpr = TILE.SORT
    RUN: tl.constexpr = TILE.RUN
    COLUMNS: tl.constexpr = SORT // RUN
    last = _value_of_rank(values, stored_ptr, tiles, upto, SORT, CANDIDATES)
    begin = tl.where(first > 0, _count(values, stored_ptr, tiles, before, SORT, CANDIDATES), 0)
    end = begin
    for t in range(tiles):
        tile = tl.load(stored_ptr + t * SORT + tl.arange(0, SORT))
        between = (tile < before) & (tile > last)
        place = end + tl.cumsum(between.to(tl.int32), axis=0) - 1
        tl.store(gathered_ptr + place, tile, mask=between)
        end += tl.sum(between.to(tl.int32), axis=0)
    tl.debug_barrier()
    rank = first + tl.arange(0, RUN)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    found = tl.load(gathered_ptr + rank, mask=(rank >= begin) & (rank < end), other=0)
    ranked = tl.where(rank < begin, before, tl.where(rank < end, found, last))
    ranked = sort_columns(ranked, TILE.LOG_RUN, RUN, COLUMNS)  # what was gathered comes in any order
    return merge_columns(ranked, TILE.LOG_RUN, RUN, TILE.LOG_COLUMNS, COLUMNS), last


@triton.jit
def _admitted_lens(
    values, stored_ptr, tiles, num_drafts, number, value, REQUESTS: tl.constexpr, DRAFTS: tl.constexpr, SORT: tl.constexpr
):
    """int32 [REQUESTS]: drafts of each request among the first `number`, which have all that exceed `value` and some of those that
    equal it. Drafts of equal value go by index, which takes scans: none where all of them or none are admitted."""
    if SORT == REQUESTS * DRAFTS:
        lens = tl.sum((values > value).to(tl.int32), axis=0)
        tied = tl.sum((values == value).to(tl.int32), axis=0)
        both = tl.sum(lens + (tied << 16), axis=0)
        wanted = number - (both & 0xFFFF)
        whole = wanted >= both >> 16
        lens += tl.where(whole, tied, 0)
        searched = tl.where(whole | (wanted == 0), 0, num_drafts)
    else:
        lens = tl.zeros([REQUESTS], tl.int32)
        wanted = number - _count(values, stored_ptr, tiles, value + 1, SORT, REQUESTS * DRAFTS)
        searched = num_drafts
    for k in range(searched):
        if SORT == REQUESTS * DRAFTS:
            tied = (_row(values, k, DRAFTS) == value).to(tl.int32)
        else:
            of_k = tl.load(stored_ptr + k * REQUESTS + tl.arange(0, REQUESTS))
            tied = (of_k == value).to(tl.int32)
            lens += (of_k > value).to(tl.int32)
        lens += tl.where(tl.cumsum(tied, axis=0) <= wanted, tied, 0)
        wanted -= tl.sum(tied, axis=0)
    return lens


# --- numbers of drafts ------------------------------------------------------------------------------------------------


@triton.jit
def _better(tau, cost, number, other_tau, other_cost, other_number):
    """The larger of two fractions tau / cost; of equal ones that with the smaller number."""
    left, right = tau * other_cost, other_tau * cost
    take = (left > right) | ((left == right) & (number < other_number))
    return tl.where(take, tau, other_tau), tl.where(take, cost, other_cost), tl.where(take, number, other_number)


@triton.jit
def _gain(value):
    """What a draft adds to tau when it is tested: the forced ones are not, and were counted before."""
    return tl.maximum(value, 0) & (FORCED - 1)


@triton.jit
def _tau_before(ranked, tau, RUN: tl.constexpr, COLUMNS: tl.constexpr):
    """int64 [COLUMNS]: tau before each column of drafts in order, and after the last."""
    gains = tl.zeros([COLUMNS], tl.int32)  # at most 8 of 2^24
    for k in tl.static_range(RUN):
        gains += _gain(_row(ranked, k, RUN))
    gains = gains.to(tl.int64)
    return tau + tl.cumsum(gains, axis=0) - gains, tau + tl.sum(gains, axis=0)


@triton.jit
def _first_stop(ranked, n, bound, tau, costs, seconds, RUN: tl.constexpr):
    """The first draft that is not there, is at rank `bound` or beyond, or does not raise tau / cost, as rank << 32 | value + 1; else
    NEVER. n, tau [COLUMNS]: ranks of the first row, and tau before them. seconds: what `load_run` loaded."""
    stops = ()
    cost = step_cost(costs, n, seconds[0])
    for k in tl.static_range(RUN):
        value = _row(ranked, k, RUN)
        gain = _gain(value).to(tl.int64)
        cost_after = step_cost(costs, n + k + 1, seconds[k + 1])
        pays = (value == FORCED) | (gain * cost > tau * (cost_after - cost))
        stops += ((value < 0) | (n >= bound - k) | (pays == 0),)
        tau += gain
        cost = cost_after
    found = n * 0 + RUN
    of = n * 0
    for back in tl.static_range(RUN):
        found = tl.where(stops[RUN - 1 - back], RUN - 1 - back, found)
        of = tl.where(stops[RUN - 1 - back], _row(ranked, RUN - 1 - back, RUN) + 1, of)
    return tl.min(tl.where(found < RUN, ((n + found).to(tl.int64) << 32) | of, NEVER), axis=0)


@triton.jit
def _best_of(ranked, n, bound, tau, costs, seconds, RUN: tl.constexpr):
    """(tau, cost, number) of the step with the largest tau / cost after a draft that is tested; n, tau, seconds: as above."""
    best_tau, best_cost, best_number = tau * 0, tau * 0 + 1, n * 0 + 2147483647
    for k in tl.static_range(RUN):
        value = _row(ranked, k, RUN)
        tau += _gain(value)
        tested = (value >= 0) & (value < FORCED) & (n < bound - k)
        cost = step_cost(costs, n + k + 1, seconds[k + 1])
        own = tl.where(tested, tau, 0), tl.where(tested, cost, 1).to(tl.int64), tl.where(tested, n + k + 1, 2147483647)
        best_tau, best_cost, best_number = _better(best_tau, best_cost, best_number, own[0], own[1], own[2])
    return tl.reduce((best_tau, best_cost, best_number), 0, _better)


@triton.jit
def _number_of_drafts(
    values, stored_ptr, gathered_ptr, tiles, total, room, forced, tau, costs,
    BEST: tl.constexpr, CANDIDATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(how many of the first `total` drafts to take, the value of the last of them, or of the next): up to the first that does not
    raise tau / cost, or, with BEST, the smallest number that makes it largest (and no value). The `forced` ones come first and are
    not tested.

    tau: int64, of the step with the forced drafts. Only values matter here, so drafts of equal survival need no order.
    """
    SORT: tl.constexpr = TILE.SORT
    RUN: tl.constexpr = TILE.RUN
    COLUMNS: tl.constexpr = SORT // RUN
    column = tl.arange(0, COLUMNS) * RUN
    if BEST:
        # Values of their own: the loop would not carry a name that holds another one's value before it (Triton up to 3.9).
        best_tau, best_number = tau + 0, forced + 0
        best_cost = step_cost(costs, forced, load_seconds(costs, forced)).to(tl.int64)
    number = total
    first = total * 0
    last = first + ABOVE
    value = first + ABOVE
    if SORT == CANDIDATES:
        seconds = load_run(costs, column, RUN)
        # Drafts of a request never become likelier.
        ranked = merge_columns(values, TILE.LOG_DRAFTS, TILE.DRAFTS, TILE.LOG_REQUESTS, TILE.REQUESTS)
        ranked = tl.trans(tl.reshape(tl.trans(ranked), [COLUMNS, RUN]))
        tau_before, _ = _tau_before(ranked, tau, RUN, COLUMNS)
        if BEST:
            found = _best_of(ranked, column, room, tau_before, costs, seconds, RUN)
            _, _, number = _better(best_tau, best_cost, best_number, found[0], found[1], found[2])
        else:
            stop = _first_stop(ranked, column, room, tau_before, costs, seconds, RUN)
            number = tl.where(stop < NEVER, stop >> 32, SORT).to(tl.int32)
            value = tl.where(stop < NEVER, (stop & 0xFFFFFFFF) - 1, -1).to(tl.int32)
    else:
        while first < number:
            seconds = load_run(costs, first + column, RUN)
            upto = tl.minimum(first + SORT, total)
            ranked, last = _next_in_order(values, stored_ptr, gathered_ptr, tiles, first, upto, last, CANDIDATES, TILE)
            tau_before, tau = _tau_before(ranked, tau, RUN, COLUMNS)
            if BEST:
                found = _best_of(ranked, first + column, total, tau_before, costs, seconds, RUN)
                best_tau, best_cost, best_number = _better(best_tau, best_cost, best_number, found[0], found[1], found[2])
            else:
                stop = _first_stop(ranked, first + column, total, tau_before, costs, seconds, RUN)
                number = tl.where(stop < NEVER, stop >> 32, total).to(tl.int32)
                value = tl.where(stop < NEVER, (stop & 0xFFFFFFFF) - 1, last).to(tl.int32)
            first += SORT
        if BEST:
            number = best_number
    return number, value


@triton.jit
def _batch_sums(slots, prompt, emits, takes, PROMPTS: tl.constexpr):
    """(rows int64 that requests bring whatever is drafted, how many requests are drafted for, how many emit)."""
    live = slots >= 0
    emitting = (live & (emits != 0)).to(tl.int32)
    if PROMPTS:
        rows = tl.sum(fixed_rows(slots, prompt).to(tl.int64), axis=0)
        counts = tl.sum(takes.to(tl.int32) + (emitting << 16), axis=0)
        drafting = counts & 0xFFFF
    else:  # who emits is drafted for
        counts = tl.sum(live.to(tl.int32) + (emitting << 16), axis=0)
        rows = (counts & 0xFFFF).to(tl.int64)
        drafting = counts >> 16
    return rows, drafting, counts >> 16


# --- the kernel -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[
    "num_requests", "num_slots", "num_rows", "max_pages", "last_cost", "last_draft_cost", "min_len", "max_len", "least", "bypass",
    "tiles",
])  # fmt: skip
def schedule_prefixes_kernel(
    chosen_from,  # ScheduleInputs
    inputs,  # LayoutInputs
    out,  # LayoutOutputs
    scratch,  # ScheduleScratch
    num_requests, num_slots, num_rows, num_drafts, max_pages, page_size, last_cost, last_draft_cost,
    min_len, max_len,  # of every request
    least,  # smallest survival that is admitted
    bypass,  # 2^-20 of the cost of a step without drafts; below 2^20: off
    tiles,  # CANDIDATES / SORT
    strides,  # ScheduleStrides
    TILE: tl.constexpr,  # ScheduleTile
):  # fmt: skip
    REQUESTS: tl.constexpr = TILE.REQUESTS
    DRAFTS: tl.constexpr = TILE.DRAFTS
    SORT: tl.constexpr = TILE.SORT
    r = tl.arange(0, REQUESTS)
    # Tables need nothing else, so they are asked for first.
    slope = tl.zeros((), tl.int64)
    draft_slope = tl.zeros((), tl.int64)
    if chosen_from.seconds_ptr is not None:
        slope = table_slope(chosen_from.seconds_ptr, last_cost)
    if chosen_from.draft_seconds_ptr is not None:
        draft_slope = table_slope(chosen_from.draft_seconds_ptr, last_draft_cost)
    slots, prompt, emits, anchor_position, flags = read_requests(r, inputs, strides, num_requests, num_slots, num_rows)
    # All that is read of a request, then a barrier: without one the compiler has each load wait where it is used.
    tokens, confidences, older_confidences = (), (), ()
    if SORT == REQUESTS * DRAFTS:
        tokens = of_drafts(chosen_from.drafts_ptr, slots, num_drafts, strides.drafts, DRAFTS)
        confidences = of_drafts(chosen_from.confidence_ptr, slots, num_drafts, strides.confidence, DRAFTS)
        if chosen_from.stale_ptr is not None:
            older_confidences = of_drafts(chosen_from.stale_ptr, slots, num_drafts, strides.stale, DRAFTS)
        tl.debug_barrier()
        made = first_missing(tokens, slots, num_drafts, DRAFTS)
    else:
        made = made_drafts(chosen_from.drafts_ptr, slots, num_drafts, strides.drafts)
    takes = (slots >= 0) & (prompt == 0) & (emits != 0)
    caps = tl.full([REQUESTS], max_len, tl.int32)
    if chosen_from.max_lens_ptr is not None:
        caps = tl.load(chosen_from.max_lens_ptr + r, mask=slots >= 0, other=0)
        caps = tl.minimum(tl.maximum(caps, 0), num_drafts).to(tl.int32)
    caps = tl.where(takes, tl.minimum(caps, num_drafts), 0)
    flags |= tl.where(caps > made, MISSING_DRAFT, 0)
    # The step without drafts, and the cost of drafting, which is paid whatever is verified.
    rows, drafting, emitting = _batch_sums(slots, prompt, emits, takes, inputs.prefill_ptr is not None)
    tau = emitting.to(tl.int64) * SURVIVAL_ONE
    room = tl.maximum(num_rows - rows, 0).to(tl.int32)
    if chosen_from.seconds_ptr is not None:
        draft_seconds = None
        if chosen_from.draft_seconds_ptr is not None:
            draft_seconds = tl.load(chosen_from.draft_seconds_ptr + tl.minimum(drafting, last_draft_cost))
        # More rows than there are get no drafts, whatever they cost.
        rows = tl.minimum(rows, num_rows).to(tl.int32)
        costs = StepCosts(
            chosen_from.seconds_ptr + tl.minimum(rows, last_cost), tl.maximum(last_cost - rows, 0),
            tl.minimum(tl.maximum(rows - last_cost, 0), COST_LIMIT), slope, draft_seconds,
            tl.maximum(drafting - last_draft_cost, 0) * draft_slope,
        )  # fmt: skip
        if bypass >= 1 << 20:
            all_drafts = drafting * num_drafts
            cost_with_all = step_cost(costs, all_drafts, load_seconds(costs, all_drafts)).to(tl.int64)
            cost_without = step_cost(costs, drafting * 0, load_seconds(costs, drafting * 0)).to(tl.int64)
            cheap = (drafting > 0) & (all_drafts <= room) & (cost_with_all * (1 << 20) <= cost_without * bypass)
            min_len = tl.where(cheap, num_drafts, min_len)

    CANDIDATES: tl.constexpr = REQUESTS * DRAFTS
    number = room
    if chosen_from.stale_ptr is not None:
        # The number comes from older rounds alone: not even what this round's drafts are missing counts.
        older, older_count, forced_tau, nan = _read_values(
            older_confidences, chosen_from.stale_ptr, slots, caps, num_drafts, min_len, least, strides.stale, scratch.older_ptr, tiles,
            REQUESTS, DRAFTS, SORT,
        )  # fmt: skip
        flags |= tl.where(takes, nan, 0)
        total = tl.minimum(older_count, room)
        forced = total * 0
        if min_len > 0:
            forced = tl.minimum(_count(older, scratch.older_ptr, tiles, FORCED, SORT, CANDIDATES), total)
            tau += tl.sum(forced_tau, axis=0)
        number, _ = _number_of_drafts(
            older, scratch.older_ptr, scratch.gathered_ptr, tiles, total, room, forced, tau, costs,
            True, CANDIDATES, TILE,
        )  # fmt: skip
    values, count, forced_tau, nan = _read_values(
        confidences, chosen_from.confidence_ptr, slots, tl.minimum(caps, made), num_drafts, min_len, least, strides.confidence,
        scratch.stored_ptr, tiles, REQUESTS, DRAFTS, SORT,
    )  # fmt: skip
    flags |= tl.where(takes, nan, 0)
    total = tl.minimum(count, room)
    if (chosen_from.stale_ptr is None) and (chosen_from.budget_ptr is None):
        if min_len > 0:
            tau += tl.sum(forced_tau, axis=0)
        number, value = _number_of_drafts(
            values, scratch.stored_ptr, scratch.gathered_ptr, tiles, total, room, total * 0, tau, costs,
            False, CANDIDATES, TILE,
        )  # fmt: skip
    else:
        if chosen_from.budget_ptr is not None:
            number = tl.load(chosen_from.budget_ptr).to(tl.int32)
            number = tl.maximum(number, _count(values, scratch.stored_ptr, tiles, FORCED, SORT, CANDIDATES))
        number = tl.minimum(number, total)
        value = _value_of_rank(values, scratch.stored_ptr, tiles, number, SORT, CANDIDATES)
    lens = _admitted_lens(values, scratch.stored_ptr, tiles, num_drafts, number, value, REQUESTS, DRAFTS, SORT)
    write_rows(
        slots, prompt, emits, anchor_position, lens, flags,
        AnchorRows(inputs.anchors_ptr, strides.anchors),
        Drafts(chosen_from.drafts_ptr, strides.drafts),
        Depths(None, 0),
        BlockTables(inputs.block_tables_ptr, strides.block_tables, max_pages, page_size),
        out, num_requests, num_rows, num_drafts, 0, 0, inputs.prefill_ptr is not None, REQUESTS, TILE.LOG_REQUESTS, TILE.BLOCK,
    )  # fmt: skip


def launch_schedule_prefixes(programs, args, *, log_requests, drafts, block, config):
    """Launch one program per `block` rows."""
    run = 8 if config.sort < drafts << log_requests else min(8, drafts)  # drafts in a column of what is sorted
    schedule_prefixes_kernel[(programs,)](
        *args,
        TILE=ScheduleTile(
            REQUESTS=1 << log_requests,
            LOG_REQUESTS=log_requests,
            DRAFTS=drafts,
            LOG_DRAFTS=drafts.bit_length() - 1,
            SORT=config.sort,
            RUN=run,
            LOG_RUN=run.bit_length() - 1,
            LOG_COLUMNS=(config.sort // run).bit_length() - 1,
            BLOCK=block,
        ),
        **options_of(config),
    )
