"""What a step costs by the drafts it verifies: measured seconds as integers of 100 ns, so that every comparison is exact.

    cost(n) = min(limit, table[rows + n] + cost of drafting),  beyond a table the line through its last two measured entries

Symbols: n drafts, rows of the step without drafts. Reference: reference/schedule.py, StepCost.
"""

import triton
import triton.language as tl

COST_LIMIT = tl.constexpr((1 << 24) - 1)
COST_UNITS_PER_SECOND = tl.constexpr(1e7)


@triton.jit
def _cost_units(seconds):
    """Integers of 100 ns, halves up; what nobody measured (NaN) never looks cheap."""
    halves = seconds * (2 * COST_UNITS_PER_SECOND)
    halves = tl.where(halves < 2.0 * COST_LIMIT, halves, 2.0 * COST_LIMIT)  # NaN and +inf, too
    halves = tl.where(halves > 2.0, halves, 2.0)
    return (halves.to(tl.int32) + 1) >> 1


@triton.jit
def table_slope(table_ptr, last):
    """What an entry beyond the table adds, int64: a line through its last two measured entries, which never falls."""
    at_end = tl.load(table_ptr + last)
    before = tl.load(table_ptr + tl.maximum(last - 1, 0))
    slope = tl.maximum(_cost_units(at_end).to(tl.int64) - _cost_units(before).to(tl.int64), 0)
    return tl.where(last >= 2, slope, 0)  # entry 0 is no measurement


@triton.jit
def load_seconds(costs, drafts):
    """Of the table, for a step with that many drafts. costs: StepCosts."""
    return tl.load(costs.seconds_ptr + tl.minimum(drafts, costs.left))


@triton.jit
def load_run(costs, n, RUN: tl.constexpr):
    """`load_seconds` of n .. n + RUN drafts, early, so that nothing waits for them where they are needed."""
    seconds = ()
    for k in tl.static_range(RUN + 1):
        seconds += (load_seconds(costs, n + k),)
    return seconds


@triton.jit
def step_cost(costs, drafts, seconds):
    """int32 in units of a step with that many drafts; seconds: what `load_seconds` loaded."""
    beyond = (drafts - tl.minimum(drafts, costs.left) + costs.beyond).to(tl.int64)
    cost = _cost_units(seconds)
    if costs.draft_seconds is not None:
        # Cut once more, as costs add up to less than 2^26.
        cost += tl.minimum(_cost_units(costs.draft_seconds) + costs.draft_beyond, COST_LIMIT).to(tl.int32)
    return tl.minimum(cost.to(tl.int64) + beyond * costs.slope, COST_LIMIT).to(tl.int32)
