"""schedule_prefixes against reference/schedule.py: every field, every element, for every policy, option and shape of table."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels import scheduling
from reference import schedule
from tests.blocks import anchored, block_of, ints
from tests.ops.far import far_apart
from tests.ops.fields import assert_same, poisoned
from tests.ops.schedule_cases import POLICIES, TABLES, arguments, generator, small_pieces, table


def check(given):
    want = schedule.schedule_prefixes(**given)
    assert_same(dk.schedule_prefixes(**given), want)
    out = poisoned(want)
    assert dk.schedule_prefixes(**given, out=out) is out
    assert_same(out, want)
    return want


@st.composite
def batches(draw):
    requests, drafts = draw(st.sampled_from([1, 2, 5, 13])), draw(st.sampled_from([1, 3, 7]))
    scattered = draw(st.booleans())
    given = arguments(
        seed := draw(st.integers(0, 10**6)),
        requests,
        drafts,
        draw(st.sampled_from(POLICIES)),
        kind=draw(st.sampled_from(TABLES)),
        coarse=draw(st.booleans()),
        scattered=scattered,
        padding=draw(st.integers(0, requests - 1)) if scattered else 0,
        missing=draw(st.booleans()),
        min_len=draw(st.sampled_from([0, 0, 1, 2])),
        survival_floor=draw(st.sampled_from([0.0, 0.0, 0.2, 1.0])),
        bypass=draw(st.sampled_from([None, None, 0.0, 0.3, 1024.0])),
    )
    g = generator(seed)
    slots = given["anchors"].shape[0]
    limit = draw(st.sampled_from(["none", "int", "tensor"]))
    if limit == "int":
        given["max_len"] = draw(st.integers(0, drafts + 1))
    elif limit == "tensor":
        dtype = draw(st.sampled_from([torch.int32, torch.int64]))
        given["max_len"] = torch.randint(-1, drafts + 2, (requests,), generator=g).to(dtype)
    prompts = draw(st.booleans())
    if prompts:
        prompt = torch.randint(0, 9, (requests,), generator=g) * (torch.rand(requests, generator=g) < 0.4)
        given |= dict(num_prefill_tokens=prompt.int(), emits=torch.rand(requests, generator=g) < 0.7)
    if prompts or draw(st.booleans()):
        given["max_rows"] = draw(st.integers(requests, requests * (drafts + 2) + 9))
    if draw(st.booleans()):
        page = draw(st.sampled_from([1, 24]))
        tables = torch.randint(0, 10**6, (slots, 50010 // page if draw(st.booleans()) else 3), generator=g)
        given |= dict(block_tables=tables.int(), page_size=page)
    return given


@settings(max_examples=25, deadline=None)
@given(batches())
def test_equals_reference(given):
    check(given)


@settings(max_examples=18, deadline=None)
@given(batches())
def test_equals_reference_in_pieces(given):
    with small_pieces():
        check(given)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("requests, drafts, coarse", [(256, 7, True), (700, 13, False)])
def test_large_batches(policy, requests, drafts, coarse):
    """(700, 13) is scheduled in pieces of 2048; survivals of few values tie across whole pieces."""
    given = arguments(3, requests, drafts, policy, kind="steps", coarse=coarse, scattered=True, padding=2, missing=True)
    given["cost"] = dk.CostTable(2e-3 + 1e-7 * torch.arange(6000.0))
    assert 100 < int(check(given).draft_lens.sum()) < 0.9 * requests * drafts


def test_a_flat_table_admits_everything():
    """All 1792 drafts, the last of them as unlikely as 2^-24 can say: sums in fp32 would stop before."""
    given = arguments(0, 256, 7, "causal", kind="flat")
    confidence = torch.full((256, 7), 0.093)
    given["block"] = block_of(confidence, given["block"].tokens)
    assert dk.schedule_prefixes(**given).draft_lens.tolist() == [7] * 256
    confidence[:, 6] = 0.0  # never admitted, whatever it costs
    given["block"] = block_of(confidence, given["block"].tokens)
    assert check(given).draft_lens.tolist() == [6] * 256


def test_a_falling_table_admits_no_draft_without_survival():
    """A row that makes the step cheaper would pay for a draft that cannot survive, or that is not there."""
    given = dict(block=block_of([[0.5, 0.5, 0.0]] * 5), cost=dk.CostTable(1e-3 - 1e-6 * torch.arange(40.0)), **anchored(5))
    assert check(given).draft_lens.tolist() == [2] * 5
    given |= dict(policy="budget", stale_confidence=given["block"].confidence.clone())
    assert check(given).draft_lens.tolist() == [2] * 5


def test_a_steep_table_admits_nothing():
    given = arguments(0, 8, 7, "causal", kind="steep")
    given["block"] = block_of(torch.full((8, 7), 0.99), given["block"].tokens)
    assert check(given).draft_lens.tolist() == [0] * 8


def test_a_draft_that_gains_exactly_nothing_is_not_admitted():
    """1.5 tokens in 1.5 times the time, which is rounded to 100 ns; 100 ns less decides otherwise."""
    for seconds, lens in (([1, 1e-4, 1.5e-4], [0]), ([1, 1e-4, 1.4996e-4], [0]), ([1, 1e-4, 1.499e-4], [1])):
        given = dict(block=block_of([[0.5]]), cost=dk.CostTable(torch.tensor(seconds)), **anchored(1))
        assert check(given).draft_lens.tolist() == lens
        given |= dict(policy="budget", stale_confidence=torch.tensor([[0.5]]))
        assert check(given).draft_lens.tolist() == lens


def test_survival_is_rounded_down():
    """0.1 in fp32 is 1677721.625 steps of 2^-24: below a floor of 1677722."""
    for floor, lens in ((1677721 / 2**24, [1]), (1677722 / 2**24, [0])):
        given = dict(block=block_of([[0.1]]), cost=table("flat"), survival_floor=floor, **anchored(1))
        assert check(given).draft_lens.tolist() == lens


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cap_on_rows_takes_the_likeliest(policy):
    """Five drafts fit, and they are not those of the first requests."""
    confidence = [[0.5, 0.5, 0.5], [0.9, 0.9, 0.9], [0.8, 0.8, 0.8]]
    chosen = dict(
        causal={},
        budget=dict(policy="budget", budget=ints(9)),
        stale=dict(policy="budget", stale_confidence=torch.full((3, 3), 0.7)),
    )[policy]
    given = dict(block=block_of(confidence), cost=table("flat"), max_rows=8, **anchored(3), **chosen)
    with small_pieces():
        check(given)
    assert check(given).draft_lens.tolist() == [0, 3, 2]


def test_a_budget_from_older_rounds_is_the_best_that_fits():
    """Two drafts more would pay and one would not: where one fits, none is verified."""
    cost = dk.CostTable(torch.tensor([0, 1e-3, 1.9e-3, 1.9e-3]))
    given = dict(block=block_of([[0.9, 0.9]]), cost=cost, policy="budget", stale_confidence=torch.full((1, 2), 0.8), **anchored(1))
    assert check(given).draft_lens.tolist() == [2]
    assert check(given | dict(max_rows=2)).draft_lens.tolist() == [0]


@pytest.mark.parametrize("policy", ["causal", "stale"])
@pytest.mark.parametrize("seed", range(2))
def test_ties_across_pieces(policy, seed):
    """Survivals of few values, more of each than a piece holds, and times that stop in the middle."""
    given = arguments(seed, 13, 7, policy, coarse=True)
    given["cost"] = dk.CostTable(2e-3 + (1 + seed % 4) * 1e-6 * torch.arange(120.0) ** 1.5)
    with small_pieces():
        admitted = int(check(given).draft_lens.sum())
    assert 8 < admitted < 60


def test_rows_that_end_with_a_piece():
    """16 drafts fit, as many as a piece holds, and more would pay."""
    given = arguments(0, 5, 5, "causal", kind="flat", max_rows=21)
    with small_pieces():
        assert int(check(given).draft_lens.sum()) == 16


def test_prompts_weigh_in_the_cost_and_what_emits_in_the_gain():
    """One decode beside 3 prompt rows, which start at B = 4 and tau = 2, or 1 where the prompt does not emit."""
    cost = dk.CostTable(1e-7 * torch.tensor([0.0, 9999, 9999, 9999, 1000, 1300, 1700]))
    given = dict(block=block_of([[0.9, 0.9], [1, 1]]), cost=cost, num_prefill_tokens=ints(0, 3), max_rows=9, **anchored(2))
    # 2.9 * 1000 > 2 * 1300 but 3.71 * 1300 < 2.9 * 1700; 1.9 * 1000 > 1300 and 2.71 * 1300 > 1.9 * 1700.
    assert check(given).draft_lens.tolist() == [1, 0]
    assert check(given | dict(emits=torch.tensor([True, False]))).draft_lens.tolist() == [2, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_times_that_nobody_can_have_measured(bad):
    """A table on a device is not looked at when it is made: NaN and infinity are the dearest, the others the cheapest."""
    cost = dk.CostTable(torch.full((9,), 1e-3))
    cost.seconds[4] = bad
    given = dict(block=block_of([[0.9] * 5]), cost=cost, **anchored(1))
    assert check(given).draft_lens.tolist() == [2 if bad != bad or bad > 0 else 3]
    check(given | dict(policy="budget", stale_confidence=torch.full((1, 5), 0.8)))


def test_numbers_beyond_32_bits():
    """Lengths of 64 bits are clamped, not cut; a prompt that no batch holds is cut as one that is a little too long."""
    tokens = torch.tensor([[1, 2, 3]] * 3)
    given = dict(block=block_of([[0.9] * 3] * 3, tokens), cost=table("flat"), **anchored(3))
    assert check(given | dict(max_len=torch.tensor([2**32, 2**31, -(2**32)]))).draft_lens.tolist() == [3, 3, 0]
    prompts = torch.tensor([0, 2**31 - 1, 2**40])
    # The reference would make a list of every row that it is asked for.
    want = schedule.schedule_prefixes(**given, num_prefill_tokens=prompts.clamp(max=9), max_rows=8)
    assert_same(dk.schedule_prefixes(**given, num_prefill_tokens=prompts, max_rows=8), want)
    assert_same(dk.schedule_prefixes(**given, num_prefill_tokens=prompts.clamp(max=2**31 - 1).int(), max_rows=8), want)


def test_beyond_a_table_of_one_entry_costs_do_not_rise():
    """Entry 0 is no measurement, so there is no slope."""
    given = dict(block=block_of([[0.5, 0.5]]), cost=dk.CostTable(torch.tensor([0.0, 1e-3])), **anchored(1))
    assert check(given).draft_lens.tolist() == [2]


def test_beyond_tables_costs_rise_as_before():
    """Three anchors, where the tables of steps and of drafting end at two: 2 ms for the step without drafts, 3 ms for drafting."""
    seconds = torch.tensor([0.0, 1e-3, 1.5e-3])
    given = dict(block=block_of([[0.9]] * 3), cost=dk.CostTable(seconds), **anchored(3))
    # 3.9 * 2 > 3 * 2.5, and so on; without the entry between, 3.9 * 1.5 < 3 * 2.
    assert check(given).draft_lens.tolist() == [1, 1, 1]
    # 3.35 * 5 > 3 * 5.5, and so on; with 2 ms for drafting, 3.35 * 4 < 3 * 4.5.
    given |= dict(block=block_of([[0.35]] * 3), cost=dk.CostTable(seconds, torch.tensor([0.0, 1e-3, 2e-3])))
    assert check(given).draft_lens.tolist() == [1, 1, 1]


def test_beyond_the_longest_cost_drafts_are_free():
    """Entries that only a device table may have: 2 s and 3 s, infinity and NaN count as 2^24 - 1 units, so nothing is dearer."""
    block, nan, inf = block_of([[0.9, 0.9, 0.9]]), float("nan"), float("inf")

    def lens(seconds, **options):
        cost = dk.CostTable(torch.full((5,), 0.5))
        cost.seconds.copy_(torch.tensor([0.0, *seconds]))  # behind the host's back
        given = dict(block=block, cost=cost, **anchored(1)) | options
        have = check(given).draft_lens.tolist()
        if not options:
            assert scheduling.plan_lengths(block.confidence, cost).tolist() == have
        return have

    # tau is 1, 1.9, 2.71, 3.439. A thousandth of the same times: 1.9 * 1 > 1 * 1.6; 2.71 * 1.6 > 1.9 * 2; 3.439 * 2 < 2.71 * 3.
    assert lens([1e-3, 1.6e-3, 2e-3, 3e-3]) == [2]
    # 2.71 * 1.6 > 1.9 * 1.6777215, and then 3.439 > 2.71 at the same cost: the third draft looks free.
    assert lens([1.0, 1.6, 2.0, 3.0]) == lens([1.0, 1.6, inf, nan]) == [3]
    # In milliseconds every entry is the longest cost, and all is verified.
    assert lens([1e3, 1.6e3, 2e3, 3e3]) == [3]
    # tau / cost is 1, 1.19, 1.36, 1.15; with the longest cost 1, 1.19, 1.62, 2.05.
    stale = dict(policy="budget", stale_confidence=torch.full((1, 3), 0.9))
    assert lens([1.0, 1.6, 2.0, 3.0], **stale) == [3] and lens([1e-3, 1.6e-3, 2e-3, 3e-3], **stale) == [2]


def test_counterexample_of_the_global_maximum():
    """R = 1, SPS(1..3) = 1, 0.5, 0.45, a_1 = 0.8: whatever the second confidence, which knows the first draft, the length is 0."""
    cost = dk.CostTable(1e-3 / torch.tensor([1.0, 1.0, 0.5, 0.45]))
    for second in (0.9, 0.0):
        layout = dk.schedule_prefixes(block_of([[0.8, second]]), cost, **anchored(1))
        assert layout.draft_lens.tolist() == [0]


@pytest.mark.parametrize("policy", POLICIES)
def test_odd_confidences(policy):
    nan, inf = float("nan"), float("inf")
    given = arguments(1, 6, 3, policy, kind="flat")
    odd = [[nan, 1, 1], [1, nan, 1], [0, 1, 1], [1, 1, 1], [-1, 2, inf], [1e-45, 0.5, 1]]
    given["block"] = block_of(odd)
    if policy == "stale":
        given["stale_confidence"] = block_of(odd[::-1]).confidence
    flags = check(given).flags.tolist()
    with small_pieces():
        check(given)
    assert flags[:4] == [dk.Flag.NAN, dk.Flag.NAN, 0, 0]
    assert flags[4:] == ([dk.Flag.NAN] * 2 if policy == "stale" else [0, 0])


def test_no_budget_and_too_much():
    for budget, lens in ((0, [0, 0]), (-5, [0, 0]), (3, [2, 1]), (99, [2, 2])):
        given = dict(block=block_of([[0.9, 0.8], [0.5, 0.4]]), cost=None, **anchored(2), policy="budget", budget=ints(budget))
        assert check(given).draft_lens.tolist() == lens


def test_empty_batches():
    given = arguments(0, 0, 3, "causal", max_rows=4)
    layout = dk.schedule_prefixes(**given)
    assert layout.query_start_loc.tolist() == layout.cu_num_logits.tolist() == layout.num_rows.tolist() == [0]
    assert layout.batch_indices.tolist() == [-1] * 4 and layout.token_ids.tolist() == [0] * 4
    for policy in POLICIES:
        check(arguments(0, 3, 2, policy, scattered=True, padding=3))


def test_rows_far_apart():
    """Offsets of slots in 64 bits: drafts and confidences more than 2^31 elements after the first."""
    given = arguments(2, 3, 4, "stale")

    def far(tensor):
        return far_apart(tensor[None].contiguous().expand(1, 3, -1).clone())[0]

    block = given["block"]
    given["block"] = dataclasses.replace(block, tokens=far(block.tokens), confidence=far(block.confidence))
    given["stale_confidence"] = far(given["stale_confidence"])
    check(given)


def test_a_workspace_serves_smaller_batches():
    """What it lends covers every batch up to its size."""
    workspace = dk.Workspace(1024, 16, 32, "cpu")
    for requests, drafts in ((700, 13), (400, 11), (1, 1)):
        given = arguments(requests, requests, drafts, "causal", kind="flat")
        assert_same(dk.schedule_prefixes(**given, workspace=workspace), schedule.schedule_prefixes(**given))
    with pytest.raises(ValueError, match="^workspace: expected room for 700 requests x 13 drafts"):
        dk.schedule_prefixes(**arguments(0, 700, 13, "causal"), workspace=dk.Workspace(2, 2, 32, "cpu"))


def test_requests_and_their_order():
    """Without ties a request's share depends on its confidences and the batch as a set, not on its row or slot."""
    given = arguments(5, 13, 7, "causal", kind="rising")
    want = dk.schedule_prefixes(**given).draft_lens
    order = torch.randperm(13, generator=generator(1)).int()
    assert 0 < int(want.sum()) < 91
    assert torch.equal(dk.schedule_prefixes(**given | dict(state_indices=order)).draft_lens, want[order.long()])


@pytest.mark.parametrize(
    "change, error, name",
    [
        (dict(block=None), TypeError, "block"),
        (dict(block=dk.DraftBlock(torch.zeros(3, 2).long(), dk.OneHotProposal(), ints(0, 0, 0))), ValueError, "block.confidence"),
        (dict(cost=None), TypeError, "cost"),
        (dict(cost=torch.ones(3)), TypeError, "cost"),
        (dict(cost=dk.CostTable(torch.ones(3, device="meta"))), ValueError, "cost.seconds"),
        (dict(policy="best"), ValueError, "policy"),
        (dict(policy="budget"), ValueError, "budget"),
        (dict(budget=ints(1)), ValueError, "budget"),
        (dict(policy="budget", budget=torch.ones(1)), TypeError, "budget"),
        (dict(policy="budget", budget=ints(1, 2)), ValueError, "budget"),
        (dict(policy="budget", stale_confidence=torch.ones(3, 3)), ValueError, "stale_confidence"),
        (dict(min_len=-1), ValueError, "min_len"),
        (dict(min_len=1.0), TypeError, "min_len"),
        (dict(max_len=-1), ValueError, "max_len"),
        (dict(max_len=ints(1, 2)), ValueError, "max_len"),
        (dict(max_rows=2), ValueError, "max_rows"),
        (dict(num_prefill_tokens=ints(0, 0, 1)), ValueError, "max_rows"),
        (dict(emits=torch.ones(3)), TypeError, "emits"),
        (dict(survival_floor=1.5), ValueError, "survival_floor"),
        (dict(survival_floor=float("nan")), ValueError, "survival_floor"),
        (dict(bypass=-0.1), ValueError, "bypass"),
        (dict(bypass="a lot"), TypeError, "bypass"),
        (dict(anchors=torch.zeros(2).long()), ValueError, "anchors"),
        (dict(anchor_positions=torch.zeros(3)), TypeError, "anchor_positions"),
        (dict(state_indices=torch.zeros(2)), TypeError, "state_indices"),
        (dict(page_size=16), ValueError, "page_size"),
        (dict(workspace=3), TypeError, "workspace"),
        (dict(out=3), TypeError, "out"),
        (dict(max_rows=2**40), ValueError, "max_rows"),
    ],
)
def test_bad_arguments_are_named(change, error, name):
    given = dict(block=block_of([[0.5, 0.5]] * 3), cost=table("flat"), **anchored(3)) | change
    with pytest.raises(error, match=f"^{name.replace('.', chr(92) + '.')}: expected"):
        dk.schedule_prefixes(**given)


def test_this_rounds_confidences_are_no_older_ones():
    block = block_of([[0.5, 0.5]])
    with pytest.raises(ValueError, match="^stale_confidence: expected confidences of older rounds"):
        dk.schedule_prefixes(block, table("flat"), policy="budget", stale_confidence=block.confidence, **anchored(1))


def test_layouts_of_another_shape_are_not_written():
    given = dict(block=block_of([[0.5, 0.5]] * 3), cost=table("flat"), **anchored(3))
    out = dk.schedule_prefixes(**given)
    fewer = dk.schedule_prefixes(**dict(given, block=block_of([[0.5]] * 3)))
    with pytest.raises(ValueError, match="^out.max_drafts: expected 2, got 1"):
        dk.schedule_prefixes(**given, out=dataclasses.replace(fewer, max_drafts=1), max_rows=6)
    rows = {n: getattr(out, n)[:2] for n in ("token_ids", "positions", "batch_indices", "logits_indices")}
    with pytest.raises(ValueError, match=r"^out.token_ids: expected at least 3 rows \(one per request\), got 2"):
        dk.schedule_prefixes(**given, out=dataclasses.replace(out, **rows))


def test_a_batch_that_no_program_can_hold_is_refused():
    given = arguments(0, 2049, 7, "causal")
    with pytest.raises(ValueError, match="^block: expected at most 16384 drafts .* got 2049 x 7, padded 32768"):
        dk.schedule_prefixes(**given)
