"""dspark_kernels.scheduling: the host's budget is the device's, and confidences of older rounds arrive on both alike."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.scheduling import ConfidenceHistory, plan_budget, plan_lengths
from reference import schedule
from tests.blocks import anchored, block_of, ints
from tests.ops.schedule_cases import TABLES, arguments, small_pieces, table


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def batches(draw):
    """(arguments for all, this round's block, older confidences)."""
    requests, drafts = draw(st.sampled_from([1, 2, 5, 13])), draw(st.sampled_from([1, 3, 7]))
    seed, scattered = draw(st.integers(0, 10**6)), draw(st.booleans())
    made = arguments(
        seed, requests, drafts, "stale", draw(st.sampled_from(TABLES)), draw(st.booleans()), scattered,
        padding=draw(st.integers(0, requests - 1)) if scattered else 0,
    )  # fmt: skip
    g = _generator(seed)
    shared = dict(
        state_indices=made["state_indices"],
        min_len=draw(st.sampled_from([0, 0, 1, 2])),
        max_len=draw(st.sampled_from([None, 1, "tensor"])),
        survival_floor=draw(st.sampled_from([0.0, 0.2])),
        bypass=draw(st.sampled_from([None, 0.0, 0.3])),
    )
    if shared["max_len"] == "tensor":
        shared["max_len"] = torch.randint(-1, drafts + 2, (requests,), generator=g)
    if draw(st.booleans()):
        prompt = torch.randint(0, 9, (requests,), generator=g) * (torch.rand(requests, generator=g) < 0.4)
        shared |= dict(num_prefill_tokens=prompt.int(), emits=torch.rand(requests, generator=g) < 0.7)
        shared["max_rows"] = draw(st.integers(requests, requests * (drafts + 2) + 9))
    return made, shared


@settings(max_examples=150, deadline=None)
@given(batches())
def test_lengths_and_budgets_equal_the_reference(batch):
    made, shared = batch
    block, cost, stale = made["block"], made["cost"], made["stale_confidence"]
    rules = dict(anchors=made["anchors"], anchor_positions=made["anchor_positions"], **shared)

    def lengths(**policy):
        return schedule.schedule_prefixes(block, cost, **rules, **policy).draft_lens

    assert torch.equal(plan_lengths(block.confidence, cost, **shared), lengths())
    budget = plan_budget(stale, cost, **shared)
    want = lengths(policy="budget", stale_confidence=stale)
    assert torch.equal(plan_lengths(block.confidence, cost, policy="budget", budget=budget, **shared), want)
    # Given to the op as a number, it admits what the op finds by itself.
    assert torch.equal(lengths(policy="budget", budget=ints(budget)), want)
    assert int(want.sum()) <= budget


@settings(max_examples=10, deadline=None)
@given(batches())
def test_the_device_takes_the_hosts_budget(batch):
    made, shared = batch
    rules = dict(anchors=made["anchors"], anchor_positions=made["anchor_positions"], policy="budget", **shared)
    budget = plan_budget(made["stale_confidence"], made["cost"], **shared)
    with small_pieces():
        own = dk.schedule_prefixes(made["block"], made["cost"], stale_confidence=made["stale_confidence"], **rules)
        told = dk.schedule_prefixes(made["block"], made["cost"], budget=ints(budget), **rules)
    assert torch.equal(own.draft_lens, told.draft_lens)


def test_a_prompt_does_not_eat_the_budget():
    """The bucket is not known yet, so there is no cap: three sure drafts beside a prompt of 100 rows."""
    budget = plan_budget(torch.ones(2, 3), table("flat"), num_prefill_tokens=ints(0, 100))
    assert budget == 3
    assert plan_budget(torch.ones(2, 3), table("flat"), num_prefill_tokens=ints(0, 100), max_rows=102) == 1


def test_a_bucket_chosen_by_the_plan_does_not_change_the_plan():
    """Flat up to 5 rows, then dearer: the bypass is off with the whole batch in view, and stays off in the smaller bucket."""
    cost = dk.CostTable(torch.tensor([0, *[1e-3] * 5, *[5e-3] * 3]))
    stale = torch.tensor([[1.0] * 3, [0.1] * 3])
    budget = plan_budget(stale, cost, bypass=0.1)
    rules = dict(policy="budget", bypass=0.1, **anchored(2))
    block = block_of([[0.9] * 3, [0.2] * 3])
    for rows in (None, 2 + budget):
        layout = dk.schedule_prefixes(block, cost, stale_confidence=stale, max_rows=rows, **rules)
        assert layout.draft_lens.tolist() == [3, 0]


def test_torchs_defaults_change_nothing():
    """Engines set another default dtype and device while they load."""
    g = _generator(4)
    confidence, cost = torch.rand(64, 7, generator=g), dk.CostTable(2e-3 + 1e-5 * torch.arange(300.0))
    want, block = (plan_lengths(confidence, cost), plan_budget(confidence, cost)), block_of(confidence)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        have = plan_lengths(confidence, cost), plan_budget(confidence, cost)
        history = ConfidenceHistory(64, 7, "cpu")
        history.reset([3])
        history.record(block)
        history.send()
        arrived = history.on_host()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(have[0], want[0]) and have[1] == want[1]
    assert arrived.dtype == torch.float32 and arrived.device.type == "cpu"


def test_a_large_batch_on_the_host():
    made = arguments(3, 700, 13, "stale", kind="steps")
    cost = dk.CostTable(2e-3 + 1e-7 * torch.arange(20000.0))
    rules = dict(anchors=made["anchors"], anchor_positions=made["anchor_positions"])
    budget = plan_budget(made["stale_confidence"], cost)
    want = schedule.schedule_prefixes(
        made["block"], cost, policy="budget", stale_confidence=made["stale_confidence"], **rules
    ).draft_lens
    assert 100 < budget < 9000 and int(want.sum()) == budget
    assert torch.equal(plan_lengths(made["block"].confidence, cost, policy="budget", budget=budget), want)


@pytest.mark.parametrize(
    "call, error, name",
    [
        (lambda c: plan_budget(torch.ones(2, 2).double(), c), TypeError, "stale_confidence"),
        (lambda c: plan_budget(torch.ones(2), c), ValueError, "stale_confidence"),
        (lambda c: plan_budget(torch.ones(2, 2, device="meta"), c), ValueError, "stale_confidence"),
        (lambda c: plan_budget(torch.ones(2, 2), None), TypeError, "cost"),
        (lambda c: plan_budget(torch.ones(2, 2), torch.ones(3)), TypeError, "cost"),
        (lambda c: plan_budget(torch.ones(2, 2), c, max_rows=-1), ValueError, "max_rows"),
        (lambda c: plan_budget(torch.ones(2, 2), c, max_len=ints(1)), ValueError, "max_len"),
        (lambda c: plan_budget(torch.ones(2, 2), c, bypass=-1), ValueError, "bypass"),
        (lambda c: plan_budget(torch.ones(2, 2), c, emits=ints(1)), ValueError, "emits"),
        (lambda c: plan_lengths(torch.ones(2, 2), c, policy="best"), ValueError, "policy"),
        (lambda c: plan_lengths(torch.ones(2, 2), c, policy="budget"), ValueError, "budget"),
        (lambda c: plan_lengths(torch.ones(2, 2), c, budget=1), ValueError, "budget"),
        (lambda c: ConfidenceHistory(0, 1, "cpu"), ValueError, "slots"),
        (lambda c: ConfidenceHistory(1, 1, "cpu", lag=0), ValueError, "lag"),
        (lambda c: ConfidenceHistory(2, 2, "cpu").reset([2]), ValueError, "slots"),
        (lambda c: ConfidenceHistory(2, 2, "cpu").record(block_of([[0.5, 0.5]])), ValueError, "block.confidence"),
        (lambda c: ConfidenceHistory(1, 2, "cpu").record(block_of([[0.5, 0.5]]), torch.ones(1)), TypeError, "state_indices"),
    ],
)
def test_bad_arguments_are_named(call, error, name):
    with pytest.raises(error, match=f"^{name.replace('.', chr(92) + '.')}: expected"):
        call(table("flat"))


# --- confidences of older rounds --------------------------------------------------------------------------------------


class Model:
    """What the history has to say, kept as a list of rounds per slot: a dict of slot -> confidences at the end of each step."""

    def __init__(self, slots, drafts, lag):
        self.rounds = [torch.ones(slots, drafts) for _ in range(lag)]
        self.lag = lag

    def record(self, confidence, slots):
        newest = self.rounds[-1].clone()
        for slot in slots:
            newest[slot] = confidence[slot]
        self.rounds.append(newest)

    def reset(self, slots):
        for rounds in self.rounds:
            rounds[slots] = 1.0

    @property
    def stale(self):
        return self.rounds[-self.lag]


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_history_is_so_many_rounds_old_on_both_sides(lag):
    g = _generator(lag)
    history, model = ConfidenceHistory(6, 3, "cpu", lag=lag), Model(6, 3, lag)
    address = history.confidence.data_ptr()
    for step in range(40):
        new = torch.randperm(6, generator=g)[: int(torch.randint(0, 3, (1,), generator=g))].tolist() if step % 3 == 0 else []
        history.reset(new)
        model.reset(new)
        assert torch.equal(history.confidence, model.stale) and torch.equal(history.on_host(), model.stale)
        assert history.confidence.data_ptr() == address
        batch = torch.randperm(6, generator=g)[:4].int()
        batch[torch.rand(4, generator=g) < 0.3] = -1
        batch[3] = 77 if step % 5 == 0 else batch[3]  # names no slot
        confidence = torch.rand(6, 3, generator=g)
        history.record(block_of(confidence), batch)
        model.record(confidence, [slot for slot in batch.tolist() if 0 <= slot < 6])
        history.send()


def test_history_of_a_whole_batch():
    history = ConfidenceHistory(2, 2, "cpu")
    blocks = [block_of(torch.full((2, 2), c)) for c in (0.25, 0.5, 0.75)]
    seen = []
    for block in blocks:
        seen.append(history.confidence.mean().item())
        assert history.on_host().mean().item() == seen[-1]
        history.record(block)
        history.send()
    assert seen == [1.0, 1.0, 0.25]


def test_what_the_host_was_given_is_its_own():
    history = ConfidenceHistory(1, 1, "cpu", lag=1)
    before = history.on_host()
    history.record(block_of([[0.5]]))
    history.send()
    assert before.item() == 1.0 and history.on_host().item() == 0.5


def test_recording_asks_the_device_nothing():
    """No value is read and no shape depends on one: it runs on tensors without values."""
    history = ConfidenceHistory(4, 2, "meta")
    block = dk.DraftBlock(
        torch.zeros(4, 2, dtype=torch.int64, device="meta"), dk.OneHotProposal(), torch.zeros(3, dtype=torch.int32, device="meta"),
        torch.ones(4, 2, device="meta"),
    )  # fmt: skip
    history.record(block, torch.zeros(3, dtype=torch.int32, device="meta"))
    history.record(block)


def test_a_run_of_steps_plans_the_same_on_host_and_device():
    """Ten steps with requests that come and go: the budget picked on the host is what the device admits up to."""
    g, cost = _generator(9), dk.CostTable(2e-3 + 1e-4 * torch.arange(40.0))
    history, budgets = ConfidenceHistory(5, 3, "cpu"), set()
    for step in range(10):
        if step in (4, 7):
            history.reset([step % 5])
        batch = torch.randperm(5, generator=g)[:3].int()
        block = block_of(torch.rand(5, 3, generator=g) ** 0.5, requests=3)
        rules = dict(policy="budget", state_indices=batch, **anchored(5))
        budget = plan_budget(history.on_host(), cost, state_indices=batch)
        device = dk.schedule_prefixes(block, cost, stale_confidence=history.confidence, **rules)
        assert torch.equal(device.draft_lens, dk.schedule_prefixes(block, None, budget=ints(budget), **rules).draft_lens)
        budgets.add(budget)
        history.record(block, batch)
        history.send()
    assert len(budgets) > 2


@pytest.mark.gpu
def test_history_on_a_gpu(device):
    """The copy to pinned memory holds what the device holds, and recording is captured in a graph."""
    history = ConfidenceHistory(8, 7, device)
    static = dk.DraftBlock(
        torch.zeros(8, 7, dtype=torch.int64, device=device), dk.OneHotProposal(), torch.zeros(5, dtype=torch.int32, device=device),
        torch.ones(8, 7, device=device),
    )  # fmt: skip
    batch = torch.arange(5, dtype=torch.int32, device=device)
    history.record(static, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        history.record(static, batch)
    history.reset(range(8))
    model = Model(8, 7, 2)
    for step in range(6):
        assert torch.equal(history.on_host(), model.stale) and torch.equal(history.confidence.cpu(), model.stale)
        confidence = torch.rand(8, 7)
        static.confidence.copy_(confidence)
        graph.replay()
        history.send()
        model.record(confidence, range(5))
        if step == 3:
            history.reset([2])
            model.reset([2])
