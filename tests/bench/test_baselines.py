"""bench/shared/baselines.py: what the kernels are compared with, by distribution or value."""

import dataclasses

import pytest
import torch

import dspark_kernels as dk
from bench.shared import baselines
from bench.shared.cases import layout as lc
from bench.shared.cases.accept import Accept
from bench.shared.cases.candidates import Candidates
from bench.shared.cases.draft import Draft
from reference import accept, cases, draft, layout as layouts, schedule
from tests.bench.test_kernels import assert_red

# --- baselines --------------------------------------------------------------------------------------------------------


def chi_square(counts, probs):
    expected = probs * counts.sum()
    inside = expected > 0
    assert (counts[~inside] == 0).all()
    return float(((counts - expected)[inside] ** 2 / expected[inside]).sum())


def call(op, inputs, **options):
    baseline = baselines.BASELINES[op]
    return baseline.function(*baseline.arguments(inputs), **options)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_the_draft_loop_greedy_is_the_reference(kind):
    case = cases.draft_case(seed=6, requests=5, drafts=4, vocab=300, sampled=False, kind=kind)
    tokens, _, _, confidence = call("draft_block", case.arguments())
    want = draft.draft_block(**case.arguments())
    assert torch.equal(tokens, want.tokens)
    assert torch.allclose(confidence, want.confidence, atol=1e-5)


def test_the_draft_loop_keeps_the_logits_it_draws_from():
    case = cases.draft_case(seed=6, requests=5, drafts=4, vocab=300, temperatures=(0.7,))
    tokens, logits, lse, confidence = call("draft_block", case.arguments())
    for r in range(5):
        previous = [int(case.anchors[r]), *tokens[r, :-1].tolist()]
        exact = case.base_logits[r].double() + case.head.w1[previous].double() @ case.head.w2.double().T
        assert torch.allclose(logits[r].double(), exact, atol=1e-4)
        assert torch.allclose(lse[r].double(), (exact / 0.7).logsumexp(-1), atol=1e-4)
    reference = draft.draft_block(**case.arguments(), stored_logits=logits)
    same = tokens == reference.tokens
    assert torch.allclose(confidence[:, 0], reference.confidence[:, 0], atol=1e-5) and not same.all()  # noise of its own


def test_the_draft_loop_filters_as_the_reference():
    case = cases.draft_case(seed=6, requests=5, drafts=1, vocab=300, rank=0, confidence=None, temperatures=(0.7,))
    ks, ps = torch.tensor([1, 5, 300, 50, 20], dtype=torch.int32), torch.tensor([1.0, 0.9, 0.5, 0.1, 1.0])
    case.sampling = dataclasses.replace(case.sampling, top_k=ks, top_p=ps)
    tokens, logits, _, _ = call("draft_block", case.arguments())
    assert torch.equal(logits, draft.draft_block(**case.arguments()).proposal.logits)
    assert (logits.gather(2, tokens[:, :, None]) > -torch.inf).all()


def test_the_loop_on_candidates_keeps_the_logits_it_draws_from():
    case = cases.draft_case(seed=6, requests=5, drafts=4, vocab=300, temperatures=(0.7,))
    inputs = case.arguments() | dict(candidates=20)
    tokens, ids, logits, lse, confidence = call("draft_candidates", inputs)
    for r in range(5):
        assert set(ids[r, 0].tolist()) == set(case.base_logits[r, 0].topk(20).indices.tolist())
        previous = [int(case.anchors[r]), *tokens[r, :-1].tolist()]
        exact = case.base_logits[r].double() + case.head.w1[previous].double() @ case.head.w2.double().T
        exact = exact.gather(1, ids[r])
        assert torch.allclose(logits[r].double(), exact, atol=1e-4)
        assert torch.allclose(lse[r].double(), (exact / 0.7).logsumexp(-1), atol=1e-4)
    reference = draft.draft_block(**inputs)
    same = tokens == reference.tokens
    assert torch.allclose(confidence[:, 0], reference.confidence[:, 0], atol=1e-5) and not same.all()  # noise of its own


def test_costs_of_a_block_on_candidates_by_hand():
    spec = Candidates(2, candidates=5, drafts=3, vocab=11, rank=4, hidden=7)
    base, rows, state = 2 * 6 * 11, 2 * 6 * 4 * 6, 2 * (6 * 7 + 7 + 4 + 1) + 4 * 3
    assert spec.bytes == base + rows + state + 2 * 32 + 6 * (8 + 8 + 4 + 5 * 10)
    assert spec.flops == 6 * (11 + 5 * 13 + 2 * 11)


def test_the_draft_loop_draws_from_its_distribution():
    """Both positions of 50000 requests with the same logits: chi-square with 24 degrees of freedom, seldom above 60."""
    case = cases.draft_case(seed=3, requests=1, drafts=2, vocab=5, rank=4, confidence=None, temperatures=(1.3,))
    inputs, count = case.arguments(), 50000
    inputs["base_logits"] = case.base_logits.expand(count, -1, -1)
    inputs["anchors"] = case.anchors.expand(count)
    inputs["sampling"] = dk.SamplingTensors(torch.full((count,), 1.3), torch.zeros(count).long())
    torch.manual_seed(0)
    tokens = call("draft_block", inputs)[0]
    bias = case.head.w1.double() @ case.head.w2.double().T
    first = ((case.base_logits[0, 0].double() + bias[case.anchors[0]]) / 1.3).softmax(-1)
    second = ((case.base_logits[0, 1].double() + bias) / 1.3).softmax(-1)
    counts = torch.bincount(tokens[:, 0] * 5 + tokens[:, 1], minlength=25).double()
    assert chi_square(counts, (first[:, None] * second).flatten()) < 60


@pytest.mark.parametrize("proposal", ["dense", "one_hot"])
def test_acceptance_emits_the_distribution_of_the_target(proposal):
    """First token and, after an accepted draft, the second; how many pass is the sum of the smaller probabilities."""
    count, vocab, temperature = 50000, 5, 0.8
    g = torch.Generator().manual_seed(1)
    target = torch.randn(3, vocab, generator=g)
    proposed = torch.randn(2, vocab, generator=g)
    p, q = (target.double() / temperature).softmax(-1), (proposed.double() / temperature).softmax(-1)
    if proposal == "dense":
        drafts = torch.multinomial(q, count, replacement=True, generator=g).T.contiguous()
    else:
        drafts = torch.tensor([[2, 4]]).expand(count, 2)
        q = torch.nn.functional.one_hot(drafts[0], vocab).double()
    drawn_from = (None, None)
    if proposal == "dense":
        lse = (proposed / temperature).logsumexp(-1)
        drawn_from = (proposed.expand(count, -1, -1), lse.expand(count, -1))
    torch.manual_seed(0)
    rows = target.expand(count, -1, -1).reshape(3 * count, vocab)
    tokens, accepted = baselines.accept_chain(rows, drafts, *drawn_from, torch.full((count,), temperature))
    assert chi_square(torch.bincount(tokens[:, 0], minlength=vocab).double(), p[0]) < 25
    passed = torch.minimum(p[:2], q).sum(-1)
    assert float((accepted >= 1).double().mean()) == pytest.approx(float(passed[0]), abs=0.01)
    for n in (1, 2):
        behind = tokens[accepted >= n, n]
        assert chi_square(torch.bincount(behind, minlength=vocab).double(), p[n]) < 25
    for n in range(3):
        some = accepted == n
        assert (tokens[some, n + 1 :] == -1).all() and torch.equal(tokens[some, :n], drafts[some, :n])


def test_acceptance_greedy_is_the_reference():
    for seed in range(3):
        sizes = dict(requests=7, drafts=4, vocab=50, lengths=torch.full((7,), 4))
        case = cases.accept_case(seed=seed, proposal="one_hot", sampled=False, closeness=0.95, **sizes)
        tokens, accepted = call("accept_chain", case.arguments())
        want = accept.accept_chain(**case.arguments())
        assert torch.equal(tokens, want.tokens) and torch.equal(accepted.int(), want.num_accepted) and accepted.sum() > 0


def assert_rows(have, want):
    for name, tensor in zip(baselines.LAYOUT_FIELDS, have, strict=True):
        expected = getattr(want, name)
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name


@pytest.mark.parametrize("policy", ["causal", "budget", "stale"])
@pytest.mark.parametrize("requests, drafts", [(1, 7), (13, 5), (64, 7)])
def test_scheduling_by_sort_is_the_reference(policy, requests, drafts):
    for seed in range(3):
        inputs = lc.Schedule(requests, policy, drafts).make(seed)
        coarse = (inputs["block"].confidence * 4).round() / 4  # survivals tie
        if seed == 2:
            inputs["block"] = dataclasses.replace(inputs["block"], confidence=coarse)
        assert_rows(call("schedule_prefixes", inputs), schedule.schedule_prefixes(**inputs))


def test_scheduling_by_sort_admits_no_impossible_draft():
    """Also where larger steps cost less."""
    inputs = lc.Schedule(3, "causal", 4).make(0)
    confidence = inputs["block"].confidence
    confidence[:, 2] = 0.0
    inputs["cost"] = dk.CostTable(inputs["cost"].seconds.flip(0).contiguous(), inputs["cost"].draft_seconds)
    want = schedule.schedule_prefixes(**inputs)
    assert want.draft_lens.tolist() == [2, 2, 2]
    assert_rows(call("schedule_prefixes", inputs), want)


@pytest.mark.parametrize("spec", [lc.Fixed(1), lc.Fixed(13, 4), lc.Tree(5, 9), lc.DraftRows(1), lc.DraftRows(13, 3)], ids=repr)
def test_layouts_by_cumulative_sums_are_the_reference(spec):
    for seed in range(2):
        inputs = spec.make(seed)
        assert_rows(call(spec.op, inputs), getattr(layouts, spec.op)(**inputs))


@pytest.mark.parametrize(
    "spec",
    [Draft(2), Draft(2, sampled=False), Draft(2, rank=0), Draft(2, kind="gated", w2="int8"), Draft(2, kind="rnn"),
     Draft(2, filtered=True), Accept(2), Accept(2, "one_hot"),
     Accept(2, "one_hot", sampled=False), lc.Schedule(5, "causal"), lc.Schedule(5, "budget"), lc.Schedule(5, "stale"),
     lc.Fixed(3), lc.Tree(3), lc.DraftRows(3)],
    ids=repr,
)  # fmt: skip
def test_baselines_wait_for_nothing(spec):
    """One graph for the compiler, without a break: so no value is read on the host, and a CUDA graph can hold it, too."""
    baseline = baselines.BASELINES[spec.op]
    torch._dynamo.reset()
    compiled = torch.compile(baseline.function, fullgraph=True, dynamic=False, backend="aot_eager")
    compiled(*baseline.arguments(spec.small().make(1)))


# --- tree_attention ---------------------------------------------------------------------------------------------------

needs_attention = pytest.mark.skipif(not hasattr(dk, "tree_attention"), reason="the package has no tree_attention yet")


@needs_attention
def test_costs_of_attention_by_hand():
    from bench.shared.cases.attention import Attention

    spec = Attention(2, 40, rows=3, query_heads=4, kv_heads=2, head_dim=8)
    assert spec.bytes == 2 * 2 * 2 * 8 * (80 + 6) + 2 * 2 * 6 * 4 * 8 + 4 * 2 * 3 + 2 * 8 + 4
    assert spec.flops == 2 * 4 * (3 * 40 + 6) * 4 * 8
    assert dataclasses.replace(spec, mask="tree").bytes == spec.bytes + 6 * 8


@needs_attention
def test_a_wrong_attention_turns_the_gate_red(monkeypatch):
    right = dk.tree_attention

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        out[0, 0, 0] += 0.1
        return out

    monkeypatch.setattr(dk, "tree_attention", wrong)
    assert_red("tree_attention r1_c8192_q8")


@needs_attention
@pytest.mark.parametrize("mask", ["chain", "tree"])
def test_gathered_attention_is_the_reference(mask):
    from bench.shared.cases.attention import Attention
    from reference import attention

    inputs = Attention(3, 37, rows=5, mask=mask, query_heads=4, kv_heads=2, head_dim=16).make(1)
    exact = attention.tree_attention(**inputs)
    assert torch.allclose(call("tree_attention", inputs).double(), exact, atol=0.02)
