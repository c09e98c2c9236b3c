"""reference/schedule.py against layouts and integers worked by hand."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from dspark_kernels.types import CostTable, DraftBlock, Flag, OneHotProposal
from reference.layout import fixed_layout
from reference.schedule import (
    COST_LIMIT,
    StepCost,
    cost_units,
    schedule_prefixes,
    survival_units,
    threshold_lengths,
)
from tests.blocks import anchored, block_of, ints

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
FEW = settings(max_examples=150, deadline=None, derandomize=True)


def table_of(units, draft_units=None):
    """A cost table from integers of 100 ns for 1, 2, ... rows."""

    def seconds(values):
        return torch.tensor([0.0, *(u * 1e-7 for u in values)], dtype=torch.float32)

    return CostTable(seconds(units), None if draft_units is None else seconds(draft_units))


def lengths(confidence, units, tokens=None, **rules):
    layout = schedule_prefixes(block_of(confidence, tokens), table_of(units), **anchored(len(confidence)), **rules)
    return layout.draft_lens.tolist()


# --- integers -------------------------------------------------------------------------------------


def test_survival_is_the_floor_of_the_running_product():
    confidence = torch.tensor([[1.0, 0.5, 0.3, 1e-6, 0.5], [0.0, 1.0, 1.0, 1.0, 1.0]])
    one = 1 << 24
    third = int(np.float32(0.3) * np.float32(0.5) * one)
    fourth = int(np.float32(np.float32(0.3) * np.float32(0.5)) * np.float32(1e-6) * one)
    assert survival_units(confidence).tolist() == [[one, one // 2, third, fourth, fourth // 2], [0] * 5]
    assert fourth == 2


def test_survival_of_odd_confidences():
    confidence = torch.tensor([[2.0, -1.0], [float("inf"), float("nan")], [0.5, 1.0 + 1e-6]])
    one = 1 << 24
    assert survival_units(confidence).tolist() == [[one, 0], [one, 0], [one // 2, one // 2]]


@FEW
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=16))
def test_survival_never_rises(confidence):
    units = survival_units(torch.tensor([confidence]))[0].tolist()
    product = np.float32(1)
    for value, unit in zip(confidence, units, strict=True):
        product = np.float32(product * np.float32(value))
        assert Fraction(float(product)) * 2**24 - 1 < unit <= Fraction(float(product)) * 2**24
    assert units == sorted(units, reverse=True)


def test_cost_conversion():
    seconds = torch.tensor([0.0, 3.2e-9, 1.0e-7, 2.5e-3, 5.0, 2.0**-26])
    # 2^-26 s = 0.149 units; 3.2 ns = 0.032 units; both count as one.
    assert cost_units(seconds) == [1, 1, 1, 25000, COST_LIMIT, 1]
    halves = torch.tensor([1.5, 2.5, 2.4999998, 3.5]) * 2.0**-7  # times 1e7 = 78125 * 2^7 is exact
    assert cost_units(halves) == [117188, 195313, 195312, 273438]
    broken = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    assert cost_units(broken) == [10_000_000, COST_LIMIT, COST_LIMIT, 1]
    assert cost_units(torch.tensor([COST_LIMIT * 1e-7, COST_LIMIT * 1e-7 + 1e-6])) == [COST_LIMIT, COST_LIMIT]


def test_cost_beyond_the_table():
    rising = StepCost(table_of([10, 20, 50]), 1)
    assert [rising(rows) for rows in (1, 2, 3, 4, 5, 10**7)] == [10, 20, 50, 80, 110, COST_LIMIT]
    falling = StepCost(table_of([10, 60, 50]), 1)
    assert [falling(rows) for rows in (3, 4, 99)] == [50, 50, 50]
    single = StepCost(table_of([40]), 1)
    assert [single(rows) for rows in (1, 2, 99)] == [40, 40, 40]
    drafting = StepCost(table_of([10, 20, 50], [5, 7]), 4)
    assert [drafting(rows) for rows in (1, 4)] == [10 + 11, 80 + 11]
    assert StepCost(table_of([10, 20, 50], [5, 7]), 0)(1) == 10


# --- the causal policy ----------------------------------------------------------------------------


def first_token_probability(policy_length):
    """Probability of emitting A first: target (0.7, 0.3), draft (0.5, 0.5), c_1 = 0.8, c_2 = 0.9 after A and 0 after B."""
    target, draft = {"A": Fraction(7, 10), "B": Fraction(3, 10)}, {"A": Fraction(1, 2), "B": Fraction(1, 2)}
    emitted = Fraction(0)
    for first, probability in draft.items():
        length = policy_length([[0.8, 0.9 if first == "A" else 0.0]])
        if length == 0:
            emitted += probability * target["A"]
            continue
        accept = min(Fraction(1), target[first] / draft[first])
        residual = {token: max(Fraction(0), target[token] - draft[token]) for token in target}
        emitted += probability * accept * (first == "A")
        emitted += probability * (1 - accept) * (residual["A"] / sum(residual.values()))
    return emitted


COUNTEREXAMPLE = [10_000, 20_000, 22_222]  # 1 / SPS for SPS(1..3) = 1.0, 0.5, 0.45


def global_maximum_length(confidence):
    """The lossy rule: the length with the best throughput under this round's own survivals."""
    survival, cost = survival_units(torch.tensor(confidence))[0].tolist(), COUNTEREXAMPLE
    throughput = [Fraction(2**24 + sum(survival[:n]), cost[n]) for n in range(len(survival) + 1)]
    return throughput.index(max(throughput))


def test_counterexample_of_the_global_maximum():
    assert lengths([[0.8, 0.9]], COUNTEREXAMPLE) == [0]
    assert lengths([[0.8, 0.0]], COUNTEREXAMPLE) == [0]
    assert first_token_probability(lambda c: lengths(c, COUNTEREXAMPLE)[0]) == Fraction(7, 10)
    assert [global_maximum_length([[0.8, c]]) for c in (0.9, 0.0)] == [2, 0]
    assert first_token_probability(global_maximum_length) == Fraction(85, 100)


def test_flat_cost_verifies_everything():
    confidence = np.random.default_rng(0).uniform(0.3, 1.0, (256, 7))
    assert lengths(confidence, [5000, 5000]) == [7] * 256
    # The last drafts add one part in 2^24 to tau = 1792: lost in fp32, not in integers.
    confidence = np.ones((256, 7))
    confidence[:, 6] = 2.0**-24
    assert lengths(confidence, [5000, 5000]) == [7] * 256
    confidence[:, 6] = 2.0**-25
    assert lengths(confidence, [5000, 5000]) == [6] * 256


def test_steep_cost_verifies_nothing():
    units = [1000 * n * n for n in range(1, 33)]
    assert lengths(np.full((4, 7), 0.999), units) == [0] * 4
    # Proportional cost with certain drafts: throughput stays equal, which is not a rise.
    assert lengths(np.ones((4, 7)), [1000 * n for n in range(1, 33)]) == [0] * 4


def test_causal_stops_at_the_first_that_does_not_pay():
    # Rows 1, 2: free; row 3: dear; row 4: free again. The draft behind the dear row would pay for both, but is not
    # looked at.
    assert lengths([[1.0, 1.0, 1.0]], [1000, 1000, 2500, 2500]) == [1]
    assert lengths([[1.0, 1.0, 1.0]], [1000, 1000, 1499, 1500]) == [3]


def test_drafting_cost_counts():
    rules = dict(anchors=torch.tensor([1]), anchor_positions=torch.tensor([0]))
    block = block_of([[0.5, 0.5]])
    # Without drafting cost 1.5 * 100 > 160 fails. With it 1.5 * 200 > 260 holds, and 1.75 * 260 > 1.5 * 360 fails.
    assert schedule_prefixes(block, table_of([100, 160, 260]), **rules).draft_lens.tolist() == [0]
    assert schedule_prefixes(block, table_of([100, 160, 260], [100]), **rules).draft_lens.tolist() == [1]


def test_ties_go_by_position_then_request():
    confidence = np.full((3, 3), 1.0)
    for number, expected in enumerate(
        [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 1, 1], [2, 2, 1], [2, 2, 2], [3, 2, 2], [3, 3, 2], [3, 3, 3]]
    ):
        assert lengths(confidence, [1], policy="budget", budget=ints(number)) == expected
    # Equal survivals at different positions: the earlier position first, whichever request it is in.
    assert lengths([[0.5, 1.0], [1.0, 0.5]], [1], policy="budget", budget=ints(2)) == [1, 1]
    # Causal under a cost that jumps after row 5 stops inside the tie.
    assert lengths(confidence, [1000, 1000, 1000, 1000, 1000, 9000]) == [1, 1, 0]


# --- the budget policy ----------------------------------------------------------------------------


def test_budget_takes_exactly_the_best():
    confidence = np.random.default_rng(1).uniform(0.2, 1.0, (13, 7))
    survival = survival_units(torch.tensor(confidence, dtype=torch.float32))
    for budget in (0, 1, 5, 40, 90, 91, 1000):
        admitted = lengths(confidence, [1], policy="budget", budget=ints(budget))
        assert sum(admitted) == min(budget, 91)
        inside = [survival[r, k].item() for r in range(13) for k in range(admitted[r])]
        outside = [survival[r, k].item() for r in range(13) for k in range(admitted[r], 7)]
        assert not inside or not outside or min(inside) >= max(outside)
    assert lengths(confidence, [1], policy="budget", budget=ints(-3)) == [0] * 13


def test_budget_never_admits_survival_zero():
    confidence = [[0.5, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 2.0**-25]]
    assert lengths(confidence, [1], policy="budget", budget=ints(9)) == [1, 0, 2]
    assert lengths(confidence, [1]) == [1, 0, 2]


def test_survival_floor():
    confidence = [[0.5, 0.5, 0.5], [0.9, 0.1, 1.0]]
    for floor, expected in ((0.0, [3, 3]), (0.125, [3, 1]), (0.13, [2, 1]), (0.6, [0, 1]), (1.0, [0, 0])):
        assert lengths(confidence, [5, 5], survival_floor=floor) == expected
        assert lengths(confidence, [5], survival_floor=floor, policy="budget", budget=ints(6)) == expected


def test_a_given_budget_needs_no_cost():
    layout = schedule_prefixes(block_of([[0.5, 0.5]]), None, policy="budget", budget=ints(1), **anchored(1))
    assert layout.draft_lens.tolist() == [1]


def test_stale_budget_is_the_best_under_the_older_confidences():
    units = [1000, 1000, 2500, 2500]
    stale = torch.tensor([[1.0, 1.0, 1.0]])
    now = [[1.0, 0.5, 0.25]]
    # Throughput 1, 2, 1.2, 1.6 per 1000 units: one draft. With dear rows 1.3 instead: 1, 2, 2.31, 3.08: three.
    assert lengths(now, units, policy="budget", stale_confidence=stale) == [1]
    assert lengths(now, [1000, 1000, 1300, 1300], policy="budget", stale_confidence=stale) == [3]
    # Unlike causal, older confidences may look over a dear row.
    assert lengths([[1.0, 1.0, 1.0]], [1000, 1600, 2500, 1100]) == [1]
    assert lengths([[1.0, 1.0, 1.0]], [1000, 1600, 2500, 1100], policy="budget", stale_confidence=stale) == [3]
    # Equal throughput: fewer rows.
    assert lengths(now, [1000, 2000, 3000, 4000], policy="budget", stale_confidence=stale) == [0]


def test_stale_budget_does_not_read_this_round():
    stale = torch.tensor([[0.9, 0.9, 0.9], [0.8, 0.8, 0.8]])
    units = [1000 + 220 * n for n in range(9)]  # tau / cost is greatest at five drafts
    counts = set()
    for now in ([[0.9] * 3] * 2, [[0.4] * 3, [0.2] * 3], [[0.999, 0.1, 0.1], [0.3] * 3]):
        counts.add(sum(lengths(now, units, policy="budget", stale_confidence=stale)))
    assert counts == {5}
    # A missing draft of this round leaves the number as it is; another request's draft takes its place.
    tokens = [[-1, 4, 5], [6, 7, 8]]
    stale = torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.1, 0.1]])
    assert lengths([[0.9] * 3] * 2, units, policy="budget", stale_confidence=stale) == [2, 1]
    assert lengths([[0.9] * 3] * 2, units, tokens, policy="budget", stale_confidence=stale) == [0, 3]


# --- bounds, bypass, mixed batches ----------------------------------------------------------------


def test_min_len_comes_first_and_untested():
    steep = [1000 * n * n for n in range(1, 33)]
    confidence = [[0.9, 0.9, 0.9], [0.0, 0.5, 0.5], [0.1, float("nan"), 0.9]]
    assert lengths(confidence, steep, min_len=2) == [2, 2, 2]
    assert lengths(confidence, steep, min_len=2, max_len=1) == [1, 1, 1]
    assert lengths(confidence, steep, min_len=9) == [3, 3, 3]
    # Not all fit: position 1 of every request before position 2 of any.
    assert lengths(confidence, steep, min_len=2, max_rows=3 + 4) == [2, 1, 1]
    # They count in the budget, and are taken even beyond it.
    assert lengths(confidence, [1], min_len=1, policy="budget", budget=ints(4)) == [2, 1, 1]
    assert lengths(confidence, [1], min_len=1, policy="budget", budget=ints(2)) == [1, 1, 1]
    # Their survival counts: tau = 1 + 0.9 + 0.81 at cost 300, so the third pays at cost 379 and does not at 381.
    assert lengths([[0.9, 0.9, 0.9]], [100, 200, 300, 379], min_len=2) == [3]
    assert lengths([[0.9, 0.9, 0.9]], [100, 200, 300, 381], min_len=2) == [2]


def test_max_len():
    confidence = np.full((4, 5), 0.9)
    assert lengths(confidence, [1, 1], max_len=2) == [2] * 4
    assert lengths(confidence, [1, 1], max_len=torch.tensor([0, 3, 99, -4])) == [0, 3, 5, 0]


def test_max_rows_caps_by_survival():
    confidence = [[0.5, 0.5, 0.5], [0.9, 0.9, 0.9]]
    for rows, expected in ((2, [0, 0]), (3, [0, 1]), (5, [0, 3]), (6, [1, 3]), (8, [3, 3])):
        layout = schedule_prefixes(block_of(confidence), table_of([1, 1]), max_rows=rows, **anchored(2))
        assert layout.draft_lens.tolist() == expected
        assert layout.token_ids.shape == (rows,) and layout.num_rows.tolist() == [rows]


def test_bypass_looks_at_rows_alone():
    confidence = [[0.01, 0.01, 0.0], [0.01, float("nan"), 0.5]]
    units = [1000] * 2 + [1100] * 6  # 2 anchors cost 1000, all 8 rows 1100
    # One row more costs 10 % and adds half a per cent of tau.
    assert lengths(confidence, units) == [0, 0]
    assert lengths(confidence, units, bypass=0.1) == [3, 3]
    assert lengths(confidence, units, bypass=0.0999) == [0, 0]
    assert lengths(confidence, units, bypass=0.0) == [0, 0]
    assert lengths(confidence, [1000], bypass=0.0) == [3, 3]
    assert lengths(confidence, units, bypass=0.1, max_len=2) == [2, 2]
    assert lengths(confidence, units, [[1, -1, 1], [1, 1, 1]], bypass=0.1) == [1, 3]
    # A budget is set aside too, and a row cap counts as the full load.
    assert lengths(confidence, units, bypass=0.1, policy="budget", budget=ints(0)) == [3, 3]
    dear_end = [1000] * 6 + [3000] * 2
    assert lengths(confidence, dear_end, bypass=0.1, policy="budget", budget=ints(0)) == [0, 0]
    # Where not all of them fit there is nothing to bypass: what fits is left to the confidences, whatever the rows allocated.
    assert lengths(confidence, units, bypass=0.1, policy="budget", budget=ints(0), max_rows=7) == [0, 0]
    assert lengths(confidence, dear_end, bypass=0.1, policy="budget", budget=ints(0), max_rows=6) == [0, 0]


def test_nan_confidence_is_zero_and_flagged():
    nan = float("nan")
    layout = schedule_prefixes(block_of([[nan, 0.9], [0.9, nan], [0.9, 0.9]]), table_of([1, 1]), **anchored(3))
    assert layout.draft_lens.tolist() == [0, 1, 2]
    assert layout.flags.tolist() == [Flag.NAN, Flag.NAN, 0]
    stale = torch.tensor([[1.0, 1.0], [1.0, 1.0], [nan, 1.0]])
    block = block_of([[0.9, 0.9]] * 3)
    layout = schedule_prefixes(block, table_of([1, 1]), policy="budget", stale_confidence=stale, **anchored(3))
    assert layout.flags.tolist() == [0, 0, Flag.NAN]
    assert layout.draft_lens.sum() == 4


def test_missing_draft_cuts_and_is_flagged():
    tokens = [[5, -1, 6], [-1, 5, 6], [5, 6, -1], [5, 6, 7], [5, 6, -2]]
    layout = schedule_prefixes(block_of(np.full((5, 3), 0.9), tokens), table_of([1, 1]), max_len=2, **anchored(5))
    assert layout.draft_lens.tolist() == [1, 0, 2, 2, 2]
    assert layout.flags.tolist() == [Flag.MISSING_DRAFT, Flag.MISSING_DRAFT, 0, 0, 0]


def test_whole_layout_of_a_mixed_batch():
    """Batch rows: slot 2 decodes, padding, slot 0 prefills, slot 3 decodes, slot 1 prefills a chunk without a token."""
    confidence = [[0.9, 0.9, 0.9], [0.9, 0.9, 0.9], [0.9, 0.9, 0.1], [0.9, 0.5, 0.1]]
    tokens = [[1, 2, 3], [4, 5, 6], [21, 22, 23], [31, 32, 33]]
    layout = schedule_prefixes(
        block_of(confidence, tokens, requests=5),
        None,
        policy="budget",
        budget=ints(3),
        anchors=torch.tensor([100, 101, 102, -7]),
        anchor_positions=torch.tensor([0, 9, 5, 3], dtype=torch.int32),
        num_prefill_tokens=ints(0, 9, 3, 0, 2),
        emits=torch.tensor([True, True, True, True, False]),
        max_rows=14,
        block_tables=ints(10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21).reshape(4, 3),
        page_size=4,
        state_indices=ints(2, -1, 0, 3, 1),
    )
    assert layout.draft_lens.tolist() == [2, 0, 0, 1, 0]
    assert layout.query_start_loc.tolist() == [0, 3, 3, 6, 8, 10]
    assert layout.cu_num_logits.tolist() == [0, 3, 3, 4, 6, 6]
    assert layout.token_ids.tolist() == [102, 21, 22, 0, 0, 0, 0, 31, 0, 0, 0, 0, 0, 0]
    assert layout.positions.tolist() == [5, 6, 7, 0, 1, 2, 3, 4, 9, 10, 0, 0, 0, 0]
    assert layout.batch_indices.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 4, 4, -1, -1, -1, -1]
    assert layout.logits_indices.tolist() == [0, 1, 2, 5, 6, 7] + [0] * 8
    assert layout.slot_mapping.tolist() == [69, 70, 71, 40, 41, 42, 79, 80, 61, 62, -1, -1, -1, -1]
    assert layout.num_rows.tolist() == [10]
    assert layout.flags.tolist() == [0, 0, 0, Flag.BAD_TOKEN_ID, 0]
    assert layout.max_drafts == 3
    # Lengths chosen elsewhere give the same rows.
    again = fixed_layout(
        block_of(confidence, tokens, requests=5),
        ints(2, 3, 3, 1, 3),
        anchors=torch.tensor([100, 101, 102, -7]),
        anchor_positions=torch.tensor([0, 9, 5, 3]),
        num_prefill_tokens=ints(0, 9, 3, 0, 2),
        emits=torch.tensor([True, True, True, True, False]),
        max_rows=14,
        block_tables=ints(10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21).reshape(4, 3),
        page_size=4,
        state_indices=ints(2, -1, 0, 3, 1),
    )
    for field in (
        "draft_lens",
        "query_start_loc",
        "cu_num_logits",
        "token_ids",
        "positions",
        "batch_indices",
        "logits_indices",
    ):
        assert torch.equal(getattr(layout, field), getattr(again, field)), field
    assert torch.equal(layout.slot_mapping, again.slot_mapping) and torch.equal(layout.flags, again.flags)


def test_prefill_rows_weigh_in_the_cost():
    # One decode beside 3 prefill rows: B starts at 4 and tau at 2 (the prefill emits too), or 1 (it does not).
    units = [9999] * 3 + [1000, 1300, 1700]
    rules = dict(num_prefill_tokens=ints(0, 3), max_rows=9)
    # 2.9 * 1000 > 2 * 1300 but 3.71 * 1300 < 2.9 * 1700; 1.9 * 1000 > 1300 and 2.71 * 1300 > 1.9 * 1700.
    assert lengths([[0.9, 0.9], [1, 1]], units, **rules) == [1, 0]
    assert lengths([[0.9, 0.9], [1, 1]], units, emits=torch.tensor([True, False]), **rules) == [2, 0]
    # A decode request that does not emit is one row and no logits.
    layout = schedule_prefixes(block_of([[0.9], [0.9]]), table_of([1, 1]), emits=torch.tensor([False, True]), **anchored(2))
    assert layout.draft_lens.tolist() == [0, 1]
    assert layout.query_start_loc.tolist() == [0, 1, 3] and layout.cu_num_logits.tolist() == [0, 0, 2]


def test_empty_batches():
    empty = torch.zeros(0, dtype=torch.int64)
    layout = schedule_prefixes(block_of(np.zeros((0, 3))), table_of([1, 1]), anchors=empty, anchor_positions=empty, bypass=0.1)
    assert layout.query_start_loc.tolist() == layout.cu_num_logits.tolist() == layout.num_rows.tolist() == [0]
    assert layout.token_ids.numel() == layout.draft_lens.numel() == 0
    # Only padding rows of the batch.
    layout = schedule_prefixes(block_of([[0.9]], requests=2), table_of([1, 1]), state_indices=ints(-1, -1), **anchored(1))
    assert layout.query_start_loc.tolist() == [0, 0, 0] and layout.batch_indices.tolist() == [-1] * 4
    assert layout.num_rows.tolist() == [0] and layout.flags.tolist() == [0, 0]


def test_one_draft():
    assert lengths([[0.9]], [1000, 1500]) == [1]
    assert lengths([[0.5]], [1000, 1500]) == [0]


# --- thresholds -----------------------------------------------------------------------------------


def test_threshold_lengths():
    confidence = torch.tensor([[0.9, 0.5, 0.4, 0.9], [0.4, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9], [0.6, float("nan"), 0.9, 0.9]])
    assert threshold_lengths(confidence, 0.5).tolist() == [2, 0, 4, 1]
    assert threshold_lengths(confidence, 0.0).tolist() == [4, 4, 4, 4]
    assert threshold_lengths(confidence, 1.0).tolist() == [0, 0, 0, 0]
    assert threshold_lengths(confidence, 0.5).dtype == torch.int32


@pytest.mark.skipif(not (GOLDEN / "qwen3_tiny" / "greedy_cases.json").exists(), reason="golden data is not beside the checkout")
def test_threshold_lengths_match_the_research_loop():
    """Cases come in pairs of one prompt, whole block and threshold: round 0 is theirs in common, and mostly round 1."""
    cases = json.loads((GOLDEN / "qwen3_tiny" / "greedy_cases.json").read_text())
    rounds = np.load(GOLDEN / "qwen3_tiny" / "first_rounds.npz")
    seen = set()
    for index in range(0, len(cases), 2):
        whole, cut = cases[index], cases[index + 1]
        assert whole["prompt"] == cut["prompt"]
        for step in range(2 if whole["acceptance_lengths"][0] == cut["acceptance_lengths"][0] else 1):
            logits = torch.from_numpy(rounds[f"case{index}_round{step}_confidence_logits"])[None]
            for case in (whole, cut):
                length = threshold_lengths(logits.sigmoid(), case["confidence_threshold"]).item()
                assert length == case["proposal_lengths"][step]
                seen.add(length)
    assert len(seen) >= 4


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules, message",
    [
        (dict(policy="best"), "policy"),
        (dict(policy="budget"), "budget"),
        (dict(policy="budget", budget=ints(1), stale_confidence=torch.ones(1, 2)), "budget"),
        (dict(budget=ints(1)), "budget"),
        (dict(min_len=-1), "min_len"),
        (dict(max_len=-1), "max_len"),
        (dict(max_rows=-1), "max_rows"),
        (dict(survival_floor=1.5), "survival_floor"),
        (dict(bypass=-0.1), "bypass"),
        (dict(page_size=4), "page_size"),
        (dict(page_size=0, block_tables=ints(1).reshape(1, 1)), "page_size"),
        (dict(out=object()), "out"),
        (dict(workspace=object()), "workspace"),
    ],
)
def test_refused_arguments(rules, message):
    with pytest.raises(ValueError, match=message):
        lengths([[0.5, 0.5]], [1, 2], **rules)


def test_refused_inputs():
    with pytest.raises(TypeError, match="cost"):
        schedule_prefixes(block_of([[0.5]]), None, **anchored(1))
    without = DraftBlock(tokens=torch.zeros(1, 2, dtype=torch.int64), proposal=OneHotProposal(), flags=ints(0))
    with pytest.raises(ValueError, match="block.confidence"):
        schedule_prefixes(without, table_of([1]), **anchored(1))
