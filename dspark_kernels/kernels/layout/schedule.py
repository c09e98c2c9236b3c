"""From confidences to draft lengths and packed rows, in one launch.

    survival a_{r,k} = product of c_{r,i} for i <= k,  admit in descending order of a while tau_n cost_{n-1} > tau_{n-1} cost_n

All programs schedule the whole batch, which is small, and each writes its own tile of rows (layout/rows.py). What a large batch
stores meanwhile is the same from every program, each kind in a place of its own, so none waits for another. The drafts are
[K, R] values: -1 what may not be admitted, else the survival in units of 2^-24, FORCED for the first min_len of a request; their
order is by value, descending, then by index k R + r. A length comes from the rank of a draft in that order, a number of drafts from
tests between neighbours; all in integers. Symbols: R requests, K drafts, N rows allocated, S request slots. Reference:
reference/schedule.py. Source: DSpark, arXiv 2607.05147, algorithm 1.
"""

import triton
import triton.language as tl

from ..primitives.constants import MISSING_DRAFT, NAN
from .args import AnchorRows, BlockTables, Depths, Drafts, ScheduleTile, StepCosts
from .rows import first_missing, fixed_rows, made_drafts, read_drafts, read_requests, write_rows

SURVIVAL_ONE = tl.constexpr(1 << 24)
FORCED = tl.constexpr(1 << 25)
ABOVE = tl.constexpr(1 << 26)  # every value
COST_LIMIT = tl.constexpr((1 << 24) - 1)
COST_UNITS_PER_SECOND = tl.constexpr(1e7)


# --- integers ---------------------------------------------------------------------------------------------------------


@triton.jit
def _cost_units(seconds):
    """Integers of 100 ns, halves up; what nobody measured (NaN) never looks cheap."""
    scaled = seconds * COST_UNITS_PER_SECOND
    scaled = tl.where(scaled < COST_LIMIT, scaled, COST_LIMIT)  # NaN and +inf, too
    scaled = tl.where(scaled > 1.0, scaled, 1.0)
    whole = scaled.to(tl.int32)
    return whole + (scaled - whole.to(tl.float32) >= 0.5).to(tl.int32)


@triton.jit
def _slope(table_ptr, last):
    """What an entry beyond the table adds, int64: a line through its last two measured entries, which never falls."""
    at_end = tl.load(table_ptr + last)
    before = tl.load(table_ptr + tl.maximum(last - 1, 0))
    slope = tl.maximum(_cost_units(at_end).to(tl.int64) - _cost_units(before).to(tl.int64), 0)
    return tl.where(last >= 2, slope, 0)  # entry 0 is no measurement


@triton.jit
def _entry(table_ptr, last, slope, index):
    """Entry `index` int64, beyond the table by its slope."""
    beyond = tl.maximum(index - last, 0)
    inside = _cost_units(tl.load(table_ptr + tl.minimum(index, last))).to(tl.int64)
    return tl.minimum(inside + beyond * slope, COST_LIMIT)


@triton.jit
def _step_cost(costs, drafting_cost, rows):
    """costs: StepCosts."""
    return tl.minimum(_entry(costs.seconds_ptr, costs.last, costs.slope, rows) + drafting_cost, COST_LIMIT)


# --- values and their order -------------------------------------------------------------------------------------------


@triton.jit
def _confidence(confidence_ptr, slots, i, num_drafts, stride_cs):
    """Of draft i, or beyond the last of that: a condition per load would have them wait for one another."""
    here = tl.where(num_drafts > 0, slots, -1)
    return tl.load(confidence_ptr + here * stride_cs + tl.minimum(i, num_drafts - 1), mask=here >= 0, other=0.0)


@triton.jit
def _confidences(confidence_ptr, slots, num_drafts, stride_cs, DRAFTS: tl.constexpr):
    """Of each draft, [REQUESTS]."""
    loaded = ()
    for i in tl.static_range(DRAFTS):
        loaded += (_confidence(confidence_ptr, slots, i, num_drafts, stride_cs),)
    return loaded


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
def _read_values(
    confidences, confidence_ptr, slots, limits, num_drafts, min_len, least, stride_cs, stored_ptr, tiles,
    REQUESTS: tl.constexpr, DRAFTS: tl.constexpr, SORT: tl.constexpr,
):  # fmt: skip
    """(values int32 [SORT] in the order of index, how many there are, what the forced ones add to tau, NaN flag [REQUESTS]).

    confidences: what `_confidences` loaded. Where SORT does not cover all drafts they are loaded here, and their values are in
    `stored` instead.
    """
    r = tl.arange(0, REQUESTS)
    product = tl.full([REQUESTS], 1.0, tl.float32)
    count = tl.zeros([REQUESTS], tl.int32)
    forced_tau = tl.zeros([REQUESTS], tl.int64)
    nan = tl.zeros([REQUESTS], tl.int32)
    if SORT == REQUESTS * DRAFTS:
        k = tl.arange(0, DRAFTS)[:, None]
        tile = tl.zeros([DRAFTS, REQUESTS], tl.int32)
        for i in tl.static_range(DRAFTS):
            product, value, survival, bad = _value(confidences[i], limits, i, min_len, least, product)
            tile = tl.where(k == i, value[None, :], tile)
            count += (value >= 0).to(tl.int32)
            forced_tau += tl.where(value == FORCED, survival, 0).to(tl.int64)
            nan |= bad
        values = tl.reshape(tile, [SORT])
    else:
        # Rows of padding are stored, too. (tiles is not known to the compiler, which therefore keeps the loop.)
        for i in range(tiles * SORT // REQUESTS):
            confidence = _confidence(confidence_ptr, slots, i, num_drafts, stride_cs)
            product, value, survival, bad = _value(confidence, limits, i, min_len, least, product)
            tl.store(stored_ptr + i * REQUESTS + r, value)
            count += (value >= 0).to(tl.int32)
            forced_tau += tl.where(value == FORCED, survival, 0).to(tl.int64)
            nan |= bad
        values = tl.full([SORT], -1, tl.int32)
        tl.debug_barrier()
    return values, tl.sum(count, axis=0), tl.sum(forced_tau, axis=0), nan


@triton.jit
def _count(values, stored_ptr, tiles, least, SORT: tl.constexpr, CANDIDATES: tl.constexpr):
    """How many values are at least `least`."""
    found = (values >= least).to(tl.int32)
    if SORT < CANDIDATES:
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
def _column_index(column, low, ROWS: tl.constexpr):
    """The index of what stands in row 0 of a column, in a tile whose rows are numbered by the bits of the index from `low` on."""
    return ((column >> low) * ROWS << low) | (column & ((1 << low) - 1))


@triton.jit
def _place_in_tile(index, low, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where an index stands in such a tile, row by row."""
    column = ((index >> low) // ROWS << low) | (index & ((1 << low) - 1))
    return ((index >> low) % ROWS) * COLUMNS + column


@triton.jit
def _exchange(tile, BIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The larger of two rows, whose numbers differ in one bit, to the first of them."""
    pairs = tl.reshape(tile, [ROWS >> (BIT + 1), 2, 1 << BIT, COLUMNS])
    first = (tl.arange(0, 2) == 0)[None, :, None, None]
    pairs = tl.where(first, tl.max(pairs, axis=1, keep_dims=True), tl.min(pairs, axis=1, keep_dims=True))
    return tl.reshape(pairs, [ROWS, COLUMNS])


@triton.jit
def _sorted(values, SORT: tl.constexpr, LOG_SORT: tl.constexpr, LOG_RUN: tl.constexpr):
    """values [SORT] in descending order; value i stands at (i % RUN) SORT / RUN + i / RUN, each RUN = 2^LOG_RUN descending already.

    A bitonic network in a loop: tl.sort writes out every step of it, thousands of instructions that a launch fetches once and that
    compile for a minute. A column of the tile [ROWS, COLUMNS] belongs to a thread, so steps between its rows exchange nothing
    with other threads; rows are numbered by the bits of the index that the next steps compare.
    """
    COLUMNS: tl.constexpr = SORT if SORT <= 128 else 128 if SORT <= 512 else 256
    ROWS: tl.constexpr = SORT // COLUMNS
    if LOG_RUN < LOG_SORT:
        i = tl.arange(0, SORT)
        if LOG_RUN > 0:
            # Every other run the other way round, as a network expects.
            run = i >> LOG_RUN
            inside = (i & ((1 << LOG_RUN) - 1)) ^ ((run & 1) * ((1 << LOG_RUN) - 1))
            values = tl.gather(values, inside * (SORT >> LOG_RUN) + run, axis=0)
        if ROWS == 1:
            for stage in range(LOG_RUN + 1, LOG_SORT + 1):
                for step in range(stage):
                    distance = 1 << (stage - 1 - step)
                    other = tl.gather(values, i ^ distance, axis=0)
                    larger = ((i >> stage) & 1) == ((i & distance) != 0).to(tl.int32)
                    values = tl.where(larger, tl.maximum(values, other), tl.minimum(values, other))
        else:
            ROW_BITS: tl.constexpr = 1 if ROWS == 2 else 2 if ROWS == 4 else 3
            column = tl.arange(0, COLUMNS)
            row = tl.arange(0, ROWS)
            before = LOG_SORT - ROW_BITS  # as the values come
            for stage in range(LOG_RUN + 1, LOG_SORT + 1):
                for turn in range((stage + ROW_BITS - 1) // ROW_BITS):
                    top = stage - 1 - turn * ROW_BITS
                    low = tl.maximum(top - (ROW_BITS - 1), 0)
                    index = _column_index(column, low, ROWS)
                    source = _place_in_tile(index, before, ROWS, COLUMNS)[None, :] + tl.zeros([ROWS, 1], tl.int32)
                    for bit in tl.static_range(ROW_BITS):
                        step = _place_in_tile(1 << (low + bit), before, ROWS, COLUMNS)
                        source += tl.where(((row >> bit) & 1) != 0, step, 0)[:, None]
                    tile = tl.reshape(tl.gather(values, tl.reshape(source, [SORT]), axis=0), [ROWS, COLUMNS])
                    # Complements of what is to ascend, which descend.
                    ascending = -((index >> stage) & 1)[None, :]
                    tile ^= ascending
                    for step in tl.static_range(ROW_BITS):
                        if low + (ROW_BITS - 1 - step) <= top:
                            tile = _exchange(tile, ROW_BITS - 1 - step, ROWS, COLUMNS)
                    values = tl.reshape(tile ^ ascending, [SORT])
                    before = low
            values = tl.reshape(tl.trans(tl.reshape(values, [ROWS, COLUMNS])), [SORT])
    return values


@triton.jit
def _in_order(
    values, stored_ptr, gathered_ptr, tiles, first, upto, before,
    SORT: tl.constexpr, LOG_SORT: tl.constexpr, LOG_DRAFTS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """(values int32 [SORT] of the ranks first .. upto - 1 in order, -1 beyond; the last of them). before: the value of the rank
    before them.

    What lies strictly between the two bounds is gathered and sorted; copies of the bounds fill the ranks around it.
    """
    last = before
    if SORT < CANDIDATES:
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
        rank = first + tl.arange(0, SORT)
        found = tl.load(gathered_ptr + rank, mask=(rank >= begin) & (rank < end), other=0)
        values = tl.where(rank < begin, before, tl.where(rank < end, found, tl.where(rank < upto, last, -1)))
    # Drafts of a request never become likelier; what was gathered comes in any order.
    return _sorted(values, SORT, LOG_SORT, LOG_DRAFTS if SORT == CANDIDATES else 0), last


@triton.jit
def _admitted_lens(
    values, stored_ptr, tiles, num_drafts, number, value, REQUESTS: tl.constexpr, DRAFTS: tl.constexpr, SORT: tl.constexpr
):
    """int32 [REQUESTS]: drafts of each request among the first `number`, the last of which has the value `value`. Drafts of equal
    value go by index."""
    wanted = number - _count(values, stored_ptr, tiles, value + 1, SORT, REQUESTS * DRAFTS)
    if SORT == REQUESTS * DRAFTS:
        tied = (values == value).to(tl.int32)
        admitted = tl.where(values > value, 1, tl.where(tl.cumsum(tied, axis=0) <= wanted, tied, 0))
        lens = tl.sum(tl.reshape(admitted, [DRAFTS, REQUESTS]), axis=0)
    else:
        lens = tl.zeros([REQUESTS], tl.int32)
        for k in range(num_drafts):
            of_k = tl.load(stored_ptr + k * REQUESTS + tl.arange(0, REQUESTS))
            tied = (of_k == value).to(tl.int32)
            lens += tl.where(of_k > value, 1, tl.where(tl.cumsum(tied, axis=0) <= wanted, tied, 0))
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
def _number_of_drafts(
    values, stored_ptr, gathered_ptr, tiles, total, forced_tau, tau, rows, costs, drafting_cost,
    BEST: tl.constexpr, SORT: tl.constexpr, LOG_SORT: tl.constexpr, LOG_DRAFTS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """(how many of the first `total` drafts to take, the value of the last of them): up to the first that does not raise
    tau / cost, or, with BEST, the smallest number that makes it largest (and no value). The forced ones come first and are not
    tested.

    tau, rows: int64, of the step without drafts; forced_tau: what the forced drafts add. Only values matter here,
    so drafts of equal survival need no order.
    """
    forced = tl.minimum(_count(values, stored_ptr, tiles, FORCED, SORT, CANDIDATES), total)
    tau += forced_tau
    # Values of their own: the loop would not carry a name that holds another one's value before it (Triton up to 3.9).
    best_tau, best_number = tau + 0, forced + 0
    best_cost = _step_cost(costs, drafting_cost, rows + forced)
    number = total
    first = total * 0
    last = first + ABOVE
    value = first + ABOVE
    while first < number:
        ranked, last = _in_order(
            values,
            stored_ptr,
            gathered_ptr,
            tiles,
            first,
            tl.minimum(first + SORT, total),
            last,
            SORT,
            LOG_SORT,
            LOG_DRAFTS,
            CANDIDATES,
        )
        n = first + tl.arange(0, SORT)  # drafts before this one
        tested = (n >= forced) & (n < total)
        gain = tl.where(tested, ranked, 0).to(tl.int64)
        after = tau + tl.cumsum(gain, axis=0)
        cost_after = _step_cost(costs, drafting_cost, rows + n + 1)
        if BEST:
            fraction = tl.where(tested, after, 0), tl.where(tested, cost_after, 1), tl.where(tested, n + 1, 2147483647)
            found_tau, found_cost, found_number = tl.reduce(fraction, 0, _better)
            best_tau, best_cost, best_number = _better(best_tau, best_cost, best_number, found_tau, found_cost, found_number)
        else:
            cost_before = _step_cost(costs, drafting_cost, rows + n)
            fails = tested & (after * cost_before <= (after - gain) * cost_after)
            number = tl.minimum(number, tl.min(tl.where(fails, n, total), axis=0))
            if first < number:
                value = tl.min(tl.where(n < number, ranked, ABOVE), axis=0)
        tau += tl.sum(gain, axis=0)
        first += SORT
    if BEST:
        number = best_number
    return number, value


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
    LOG_SORT: tl.constexpr = TILE.LOG_SORT
    r = tl.arange(0, REQUESTS)
    # Tables need nothing else, so they are asked for first.
    slope = tl.zeros((), tl.int64)
    draft_slope = tl.zeros((), tl.int64)
    if chosen_from.seconds_ptr is not None:
        slope = _slope(chosen_from.seconds_ptr, last_cost)
    if chosen_from.draft_seconds_ptr is not None:
        draft_slope = _slope(chosen_from.draft_seconds_ptr, last_draft_cost)
    costs = StepCosts(chosen_from.seconds_ptr, last_cost, slope)
    slots, prompt, emits, flags = read_requests(r, inputs, strides.anchors, num_requests, num_slots, num_rows)
    # All that is read of a request, then a barrier: without one the compiler has each load wait where it is used.
    tokens, confidences, older_confidences = (), (), ()
    if SORT == REQUESTS * DRAFTS:
        tokens = read_drafts(chosen_from.drafts_ptr, slots, num_drafts, strides.drafts, DRAFTS)
        confidences = _confidences(chosen_from.confidence_ptr, slots, num_drafts, strides.confidence, DRAFTS)
        if chosen_from.stale_ptr is not None:
            older_confidences = _confidences(chosen_from.stale_ptr, slots, num_drafts, strides.stale, DRAFTS)
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
    rows = tl.sum(fixed_rows(slots, prompt).to(tl.int64), axis=0)
    drafting = tl.sum(takes.to(tl.int32), axis=0)
    tau = tl.sum(((slots >= 0) & (emits != 0)).to(tl.int64), axis=0) * SURVIVAL_ONE
    room = tl.maximum(num_rows - rows, 0).to(tl.int32)
    drafting_cost = tl.zeros_like(tau)
    if chosen_from.draft_seconds_ptr is not None:
        cost = _entry(chosen_from.draft_seconds_ptr, last_draft_cost, draft_slope, drafting.to(tl.int64))
        drafting_cost = tl.where(drafting > 0, cost, 0)
    if chosen_from.seconds_ptr is not None:
        with_all = rows + drafting * num_drafts
        cost_with_all = _step_cost(costs, drafting_cost, with_all)
        cost_without = _step_cost(costs, drafting_cost, rows)
        cheap = (bypass >= 1 << 20) & (drafting > 0) & (with_all <= num_rows)
        cheap = cheap & (cost_with_all * (1 << 20) <= cost_without * bypass)
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
        number, _ = _number_of_drafts(
            older, scratch.older_ptr, scratch.gathered_ptr, tiles, tl.minimum(older_count, room), forced_tau, tau, rows,
            costs, drafting_cost, True, SORT, LOG_SORT,
            TILE.LOG_DRAFTS, CANDIDATES,
        )  # fmt: skip
    values, count, forced_tau, nan = _read_values(
        confidences, chosen_from.confidence_ptr, slots, tl.minimum(caps, made), num_drafts, min_len, least, strides.confidence,
        scratch.stored_ptr, tiles, REQUESTS, DRAFTS, SORT,
    )  # fmt: skip
    flags |= tl.where(takes, nan, 0)
    total = tl.minimum(count, room)
    if (chosen_from.stale_ptr is None) and (chosen_from.budget_ptr is None):
        number, value = _number_of_drafts(
            values, scratch.stored_ptr, scratch.gathered_ptr, tiles, total, forced_tau, tau, rows, costs, drafting_cost, False, SORT, LOG_SORT, TILE.LOG_DRAFTS, CANDIDATES,
        )  # fmt: skip
    else:
        if chosen_from.budget_ptr is not None:
            number = tl.load(chosen_from.budget_ptr).to(tl.int32)
            number = tl.maximum(number, _count(values, scratch.stored_ptr, tiles, FORCED, SORT, CANDIDATES))
        number = tl.minimum(number, total)
        value = _value_of_rank(values, scratch.stored_ptr, tiles, number, SORT, CANDIDATES)
    lens = _admitted_lens(values, scratch.stored_ptr, tiles, num_drafts, number, value, REQUESTS, DRAFTS, SORT)
    write_rows(
        r, slots, prompt, emits, lens, flags,
        AnchorRows(inputs.anchors_ptr, strides.anchors, inputs.positions_ptr, strides.positions),
        Drafts(chosen_from.drafts_ptr, strides.drafts),
        Depths(None, 0),
        BlockTables(inputs.block_tables_ptr, strides.block_tables, max_pages, page_size),
        out, num_requests, num_rows, num_drafts, 0, 0, REQUESTS, TILE.LOG_REQUESTS, TILE.BLOCK,
    )  # fmt: skip


def launch_schedule_prefixes(programs, args, *, log_requests, drafts, sort, block, num_warps, max_registers):
    """Launch one program per `block` rows."""
    schedule_prefixes_kernel[(programs,)](
        *args,
        TILE=ScheduleTile(
            REQUESTS=1 << log_requests,
            LOG_REQUESTS=log_requests,
            DRAFTS=drafts,
            SORT=sort,
            LOG_SORT=sort.bit_length() - 1,
            LOG_DRAFTS=drafts.bit_length() - 1,
            BLOCK=block,
        ),
        num_warps=num_warps,
        enable_fp_fusion=False,
        **({} if max_registers is None else {"maxnreg": max_registers}),
    )
