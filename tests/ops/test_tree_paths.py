"""draft_tree's "best_first" and "conditioned" against reference/tree_draft.py: trees draw by draw, survival, flags; budgets."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.launch.draft import candidates as candidates_launch
from dspark_kernels.launch.draft_tree import best_first as launch
from dspark_kernels.scheduling import node_budgets
from reference import cases, tree_draft as reference
from reference.equality import assert_equal_or_tied
from tests.ops.draft_checks import rows_of
from tests.ops.far import far_apart
from tests.ops.fields import SENTINEL

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIELDS = ("tokens", "parents", "depths", "first_child", "next_sibling", "ancestors", "num_nodes")
INF = float("inf")


def arguments_of(case, **options):
    shared = ("base_logits", "anchors", "head", "anchor_positions", "sampling", "hidden", "confidence", "state_indices")
    return {name: getattr(case, name) for name in shared} | options


def check(case, exempt=True, tree=None, **options):
    """Trees against the reference, every output; returns them."""
    arguments = arguments_of(case, **options)
    tree = dk.draft_tree(**arguments) if tree is None else tree
    rows = rows_of(case)

    def outcomes(tree):
        return {r: (*(getattr(tree, name)[slot].tolist() for name in FIELDS), int(tree.flags[r])) for r, slot in rows}

    def run(decisions):
        return outcomes(reference.draft_tree(**arguments, decisions=decisions))

    assert_equal_or_tied(run, outcomes(tree), exempt=exempt)
    want = reference.draft_tree(**arguments)
    same = [slot for r, slot in rows if outcomes(tree)[r] == outcomes(want)[r]]
    have, want = tree.survival[same].double(), want.survival[same].double()
    assert torch.equal(have > 0, want > 0)
    logs = want.clamp(min=1e-30).log()
    assert ((have.clamp(min=1e-30).log() - logs).abs() <= 2.0**-17 * logs.abs().clamp(min=1)).all()
    padding = set(range(case.base_logits.shape[0])) - {r for r, _ in rows}
    assert all(int(tree.flags[r]) == 0 for r in padding)
    return tree


@st.composite
def calls(draw, heads=("vanilla", "gated", "rnn"), most_nodes=40, most_drafts=4):
    confidence = draw(st.sampled_from([None, "plain", "markov"]))
    requests = draw(st.sampled_from([1, 2, 3]))
    scattered = draw(st.booleans())
    case = cases.draft_case(
        seed=draw(st.integers(0, 10**6)),
        kind=draw(st.sampled_from(heads)),
        rank=draw(st.sampled_from([1, 7, 33])),
        w2_dtype=draw(st.sampled_from([None, torch.int8, torch.float8_e4m3fn])),
        dtype=draw(st.sampled_from(DTYPES)),
        weight_dtype=draw(st.sampled_from(DTYPES)),
        requests=requests,
        drafts=draw(st.integers(1, most_drafts)),
        vocab=draw(st.sampled_from([1, 33, 300, 1031])),
        hidden_size=draw(st.sampled_from([1, 24])),
        sampled=draw(st.booleans()),
        confidence=confidence,
        scattered=scattered,
        padding=draw(st.integers(0, requests - 1)) if scattered else 0,
        extra_columns=draw(st.sampled_from([0, 5])),
    )
    nodes = draw(st.sampled_from([count for count in (1, 2, 5, 13, 17, 40, 64) if count <= most_nodes]))
    budgets = None
    if draw(st.booleans()):
        budgets = torch.tensor([draw(st.sampled_from([-3, 0, 1, 2, nodes - 1, nodes, 63])) for _ in range(requests)])
    return case, dict(num_nodes=nodes, node_budgets=None if budgets is None else budgets.to(torch.int32))


@settings(max_examples=6, deadline=None)
@given(calls(), st.sampled_from(["best_first", "conditioned"]), st.sampled_from([1, 3, 16, 77, 256]))
def test_candidates_equal_reference(call, method, candidates):
    case, options = call
    check(case, method=method, candidates=candidates, **options)


@settings(max_examples=4, deadline=None)
@given(calls(most_nodes=13, most_drafts=3))
def test_whole_rows_equal_reference(call):
    case, options = call
    check(case, method="conditioned", **options)


@settings(max_examples=3, deadline=None)
@given(calls(heads=("vanilla",)))
def test_best_first_equals_reference(call):
    case, options = call
    check(case, method="best_first", **options)


@pytest.mark.parametrize("candidates", [None, 20])
def test_every_node_has_a_state_of_its_own(candidates, monkeypatch):
    """And is still the parent of its children when those of lower ids have moved it: a piece of 16 candidates, then 4."""
    pick = launch.pick
    monkeypatch.setattr(launch, "pick", lambda *args: dataclasses.replace(pick(*args), piece=16))
    case = cases.draft_case(seed=24, requests=1, drafts=4, vocab=20, rank=6, kind="rnn", confidence=None, temperatures=(0.7,))
    case.head.joint_weight[:] *= 4
    case.head.w2[:] *= 2
    tree = check(case, method="conditioned", num_nodes=13, candidates=candidates)
    deep = [int(parent) for parent, depth in zip(tree.parents[0], tree.depths[0], strict=True) if depth == 4]
    assert len(set(deep)) == 3, "no two states at a depth"


def test_without_a_head_conditioned_is_best_first():
    case = cases.draft_case(seed=3, requests=2, rank=0, confidence=None)
    trees = [check(case, method=method, num_nodes=20) for method in ("conditioned", "best_first")]
    assert all(torch.equal(getattr(trees[0], name), getattr(trees[1], name)) for name in (*FIELDS, "survival"))


@pytest.mark.parametrize("candidates", [None, 40])
def test_ties_go_to_the_lowest_node_then_id(candidates):
    """Uniform distributions over powers of two: every path of a length ties, and all sums are exact. Some ids are out."""
    case = cases.draft_case(seed=1, requests=2, drafts=3, vocab=64 if candidates is None else 32, rank=4, confidence=None, grid=1.0)
    case.base_logits[:] = 0.0
    case.base_logits[1, :, 9:] = -INF  # of the 9 that are left one more goes
    case.base_logits[1, :, 5] = -INF
    case.head.w2[:] = 0.0
    case.sampling.temperature[:] = 1.0
    tree = check(case, exempt=False, method="conditioned", num_nodes=13, candidates=candidates)
    assert tree.tokens[0, 1:].tolist() == list(range(12)) and (tree.parents[0, 1:] == 0).all()
    assert tree.tokens[1, 1:].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 0, 1, 2, 3]
    assert tree.parents[1, 1:].tolist() == [0] * 8 + [1] * 4


@pytest.mark.parametrize("candidates", [None, 8])
def test_certain_tokens_tie_with_their_parents(candidates):
    """A distribution on one id: the child is as probable as its parent, and comes behind all that the parent ties with."""
    case = cases.draft_case(seed=2, requests=1, drafts=4, vocab=8, rank=2, confidence=None, grid=1.0)
    case.base_logits[:] = -INF
    case.base_logits[0, 0, 2:6] = 1.0  # four ids
    case.base_logits[0, 1, 7] = case.base_logits[0, 2, 0] = 3.0  # one
    case.base_logits[0, 3, :2] = -1.0  # two
    case.head.w2[:] = 0.0
    tree = check(case, exempt=False, method="conditioned", num_nodes=16, candidates=candidates)
    assert tree.parents[0].tolist() == [-1, *[0] * 4, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10]
    assert tree.survival[0].tolist() == [1.0, *[0.25] * 12, *[0.125] * 3]


@pytest.mark.parametrize("candidates", [None, 8])
def test_a_tie_goes_to_the_child_of_the_earlier_node(candidates):
    """A full tree gives up nodes for others that are deeper and as probable: their parent came first."""
    case = cases.draft_case(seed=2, requests=1, drafts=4, vocab=8, rank=8, confidence=None, grid=1.0, temperatures=(1.0,))
    followers = {0: (1, 2), 1: (3,), 2: (5, 7), 3: (4,), 4: (5, 6), 5: (0,), 7: (0,)}
    case.anchors[0] = 0
    case.base_logits[:] = 0.0
    case.head.w1[:] = torch.eye(8)
    case.head.w2[:] = -64.0
    for token, after in followers.items():
        case.head.w2[list(after), token] = 0.0
    tree = check(case, exempt=False, method="conditioned", num_nodes=9, candidates=candidates)
    assert tree.parents[0].tolist() == [-1, 0, 0, 1, 3, 2, 2, 4, 4] and tree.tokens[0].tolist() == [0, 1, 2, 3, 4, 5, 7, 5, 6]


@pytest.mark.parametrize(
    "options", [dict(vocab=70, candidates=64), dict(vocab=2300, drafts=1), dict(vocab=70, method="best_first")],
    ids=["candidates", "whole", "best"],
)  # fmt: skip
def test_64_nodes(options):
    """The last node's ancestors set the sign bit. A node may have 63 children, from as many groups of ids."""
    options = dict(drafts=2, method="conditioned", num_nodes=64) | options
    sizes = {name: options.pop(name) for name in ("vocab", "drafts")}
    case = cases.draft_case(seed=5, requests=1, **sizes, rank=3, confidence=None, temperatures=(1.7,))
    tree = check(case, **options)
    assert int(tree.num_nodes[0]) == 64 and int(tree.ancestors[0, 63]) < 0


def test_bad_values():
    """NaN and rows without a number, seen only where a node gets children; infinities; an anchor that no table has."""
    case = cases.draft_case(seed=6, requests=5, drafts=2, vocab=90, rank=4, confidence=None, temperatures=(0.3, 1.0))
    case.base_logits[0, 1, 3] = torch.nan
    case.base_logits[1, 1] = -INF
    case.base_logits[2, 0, 7] = case.base_logits[2, 0, 50] = INF
    case.base_logits[3] = torch.nan
    case.anchors[4] = -9
    for options in (dict(candidates=12), dict(), dict(method="best_first")):
        options = dict(method="conditioned", num_nodes=6) | options
        tree = check(case, **options)
        assert tree.num_nodes.tolist()[3] == 1 and tree.tokens[2, 1:].tolist().count(50) == 0
        assert int(tree.flags[1]) == dk.Flag.NONFINITE_ROW and int(tree.flags[3]) == dk.Flag.NONFINITE_ROW | dk.Flag.NAN
        assert int(tree.tokens[4, 0]) == -9
    budgets = torch.tensor([1, 0, -3, 1, 1], dtype=torch.int32)
    assert check(case, method="conditioned", num_nodes=6, candidates=12, node_budgets=budgets).flags.tolist() == [0, 0, 0, 0, 4]


def test_nan_in_w2_belongs_to_the_nodes_it_reaches():
    case = cases.draft_case(seed=7, requests=2, drafts=2, vocab=40, rank=3, confidence=None)
    case.head.w2[11, 1] = torch.nan
    for candidates in (None, 40):
        tree = check(case, method="conditioned", num_nodes=7, candidates=candidates)
        assert (tree.flags == dk.Flag.NAN).all() and not (tree.tokens[:, 1:] == 11).any()


# --- survival ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [None, 20])
def test_survival_is_the_product_along_the_path(candidates):
    """From distributions and confidences, without the search; a child's own token plays no part in its confidence."""
    case = cases.draft_case(seed=12, requests=1, drafts=3, vocab=30, rank=4, confidence="markov", temperatures=(1.0,))
    tree = check(case, method="conditioned", num_nodes=12, candidates=candidates)
    head, confidence = case.head, case.confidence
    for node in range(1, int(tree.num_nodes[0])):
        parent = int(tree.parents[0, node])
        depth, before = int(tree.depths[0, parent]), int(tree.tokens[0, parent])
        base = case.base_logits[0, depth].double()
        logits = base + head.w2.double() @ head.w1[before].double()
        if candidates is not None:
            logits[base.argsort(descending=True)[candidates:]] = -INF
        features = torch.cat([case.hidden[0, depth], head.w1[before]]).double()
        raw = confidence.weight.double() @ features + (0.0 if confidence.bias is None else confidence.bias.double()[0])
        raw = raw if confidence.sts_temperatures is None else raw / confidence.sts_temperatures[depth]
        want = float(tree.survival[0, parent]) * float(torch.sigmoid(raw)) * float(logits.softmax(0)[tree.tokens[0, node]])
        assert math.isclose(float(tree.survival[0, node]), want, rel_tol=1e-5)


def test_confidence_moves_nodes():
    """The same distributions with and without: other nodes are worth a row."""
    case = cases.draft_case(seed=4, requests=1, drafts=4, vocab=50, rank=4, confidence="plain", temperatures=(1.0,))
    case.confidence.weight[:] = 0.0
    case.confidence.weight[0] = 3.0
    case.confidence = dataclasses.replace(case.confidence, bias=None)
    case.hidden[0, :, 0] = torch.tensor([2.0, -2.0, 2.0, 2.0])
    scored = check(case, method="conditioned", num_nodes=16, candidates=30)
    plain = check(dataclasses.replace(case, confidence=None), method="conditioned", num_nodes=16, candidates=30)
    assert scored.depths[0].sum() < plain.depths[0].sum(), "depth 2 hardly survives, so less of the tree should be there"


def test_nan_confidence_ends_a_path():
    case = cases.draft_case(seed=8, requests=1, drafts=3, vocab=20, rank=2, confidence="markov")
    case.hidden[0, 1] = torch.nan
    for candidates in (None, 10):
        tree = check(case, method="conditioned", num_nodes=30, candidates=candidates)
        assert int(tree.depths.max()) == 1


# --- what a caller owns -----------------------------------------------------------------------------------------------


def poisoned(slots, rows, nodes):
    def filled(*shape, dtype=torch.int32):
        return torch.full(shape, SENTINEL, dtype=dtype)

    links = [filled(slots, nodes) for _ in range(4)]
    return dk.DraftTree(
        filled(slots, nodes, dtype=torch.int64), *links, filled(slots, nodes, dtype=torch.int64), filled(slots),
        dk.OneHotProposal(), "one_hot", filled(rows), filled(slots, nodes, dtype=torch.float32),
    )  # fmt: skip


@pytest.mark.parametrize("options", [dict(candidates=9), dict(), dict(method="best_first")], ids=["candidates", "whole", "best"])
def test_writes_every_element_of_its_slots(options):
    case = cases.draft_case(seed=9, requests=3, drafts=2, vocab=60, rank=5, kind="gated", scattered=True, padding=1)
    options = dict(method="conditioned", num_nodes=7, node_budgets=torch.tensor([7, 2, 5], dtype=torch.int32)) | options
    slots = case.anchors.shape[0]
    workspace = dk.Workspace(3, 6, 60, "cpu", markov_rank=5)
    workspace.scratch.fill_(-1)
    out = poisoned(slots, 3, 7)
    tree = dk.draft_tree(**arguments_of(case, **options), out=out, workspace=workspace)
    assert tree is out and not workspace.counters.any(), "counters are not clean after the launch"
    check(case, tree=tree, **options)
    live = [slot for _, slot in rows_of(case)]
    unused = [slot for slot in range(slots) if slot not in live]
    for name in (*FIELDS, "survival"):
        assert (getattr(out, name)[unused] == SENTINEL).all(), name
        assert not (getattr(out, name)[live] == SENTINEL).any(), name
    again = dk.draft_tree(**arguments_of(case, **options), out=poisoned(slots, 3, 7), workspace=workspace)
    assert all(torch.equal(getattr(again, name), getattr(out, name)) for name in (*FIELDS, "survival", "flags"))


@pytest.mark.parametrize("options", [dict(candidates=20), dict(), dict(method="best_first")], ids=["candidates", "whole", "best"])
def test_the_same_bits_alone_and_in_a_batch(options):
    case = cases.draft_case(seed=10, requests=3, drafts=2, vocab=700, rank=9, kind="rnn", dtype=torch.bfloat16)
    options = dict(method="conditioned", num_nodes=6) | options
    both = dk.draft_tree(**arguments_of(case, **options))
    alone = dataclasses.replace(
        case, base_logits=case.base_logits[2:], anchors=case.anchors[2:], anchor_positions=case.anchor_positions[2:],
        hidden=case.hidden[2:], sampling=dk.SamplingTensors(case.sampling.temperature[2:], case.sampling.seed[2:]),
    )  # fmt: skip
    single = dk.draft_tree(**arguments_of(alone, **options))
    for name in (*FIELDS, "survival"):
        assert torch.equal(getattr(single, name)[0], getattr(both, name)[2]), name


@pytest.mark.parametrize("options", [dict(candidates=60), dict(), dict(method="best_first")], ids=["candidates", "whole", "best"])
def test_the_same_bits_however_the_work_is_cut(options, monkeypatch):
    case = cases.draft_case(seed=15, requests=1, drafts=2, vocab=2300, rank=6, confidence=None, dtype=torch.bfloat16)
    options = dict(method="conditioned", num_nodes=7) | options
    want = dk.draft_tree(**arguments_of(case, **options))
    pick, pick_dense = launch.pick, launch.pick_dense
    monkeypatch.setattr(candidates_launch, "parts", lambda arch, rows, chunks: chunks)
    monkeypatch.setattr(launch, "pick", lambda *args: dataclasses.replace(pick(*args), block=1024, piece=16))
    monkeypatch.setattr(launch, "dense_parts", lambda arch, requests, sub_blocks: sub_blocks)
    monkeypatch.setattr(launch, "pick_dense", lambda *args: dataclasses.replace(pick_dense(*args), piece=64))
    have = dk.draft_tree(**arguments_of(case, **options))
    assert all(torch.equal(getattr(have, name), getattr(want, name)) for name in (*FIELDS, "survival", "flags"))


@pytest.mark.parametrize("options", [dict(candidates=9), dict(), dict(method="best_first")], ids=["candidates", "whole", "best"])
def test_logits_far_apart(options):
    case = cases.draft_case(seed=11, requests=1, drafts=3, vocab=40, rank=3, confidence=None, dtype=torch.bfloat16)
    case.base_logits = far_apart(case.base_logits)
    check(case, **(dict(method="conditioned", num_nodes=6) | options))


def test_refusals():
    case = cases.draft_case(seed=0, requests=1, drafts=2, vocab=20, rank=2, confidence=None)
    with pytest.raises(NotImplementedError, match="draft_to_target"):
        dk.draft_tree(**arguments_of(case, method="conditioned", num_nodes=4, draft_to_target=torch.arange(20)))
    with pytest.raises(ValueError, match=r"candidates: expected in \[1, 256\]"):
        dk.draft_tree(**arguments_of(case, method="conditioned", num_nodes=4, candidates=300))
    with pytest.raises(ValueError, match="workspace: expected room"):
        dk.draft_tree(**arguments_of(case, method="conditioned", num_nodes=64), workspace=dk.Workspace(1, 1, 20, "cpu"))


# --- budgets of nodes -------------------------------------------------------------------------------------------------


def budgets_by_hand(survival, budget, live, most):
    """One node after another; a node's survival is no more than those before it."""
    counts = [1 if here else 0 for here in live]
    reached = [[min(row[: m + 1]) for m in range(len(row))] for row in survival.tolist()]
    while sum(counts) < budget:
        open_nodes = [(-reached[r][n], r) for r, n in enumerate(counts) if live[r] and n < most and reached[r][n] > 0]
        if not open_nodes:
            break
        counts[min(open_nodes)[1]] += 1
    return counts


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_node_budgets(data):
    draw = data.draw
    requests, nodes = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 2, 6]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    survival = torch.randint(0, 5, (requests + 2, nodes), generator=g) / 4
    kind = torch.rand(requests + 2, 1, generator=g)  # new, sorted as they come, or in any order
    survival = torch.where(kind < 0.3, 1.0, torch.where(kind < 0.6, survival.cummin(1).values, survival))
    slots = torch.randperm(requests + 2, generator=g)[:requests]
    slots[torch.rand(requests, generator=g) < 0.2] = -1
    budget, most = draw(st.integers(0, requests * nodes + 2)), draw(st.sampled_from([None, 1, 3]))
    live = (slots >= 0).tolist()
    want = budgets_by_hand(survival[slots.clamp(min=0)], budget, live, min(nodes, most or nodes))
    for number in (budget, torch.tensor([budget], dtype=torch.int32)):
        assert node_budgets(survival, number, max_nodes=most, state_indices=slots).tolist() == want


def test_budgets_do_not_see_what_they_cut():
    """Survivals of one round set the budgets of the next, which cut its trees to their first nodes and leave their survival."""
    case = cases.draft_case(seed=13, requests=3, drafts=3, vocab=40, rank=4, confidence="markov", temperatures=(1.0,))
    first = dk.draft_tree(**arguments_of(case, method="conditioned", num_nodes=8, candidates=20))
    budgets = node_budgets(first.survival, 12)
    assert budgets.sum() == 12 and budgets.min() >= 1 and len(set(budgets.tolist())) > 1
    later = cases.draft_case(seed=14, requests=3, drafts=3, vocab=40, rank=4, confidence="markov", temperatures=(1.0,))
    whole = check(later, method="conditioned", num_nodes=8, candidates=20)
    cut = check(later, method="conditioned", num_nodes=8, candidates=20, node_budgets=budgets)
    assert torch.equal(cut.num_nodes, budgets) and torch.equal(cut.survival, whole.survival)
    for r, count in enumerate(budgets.tolist()):
        assert torch.equal(cut.tokens[r, :count], whole.tokens[r, :count])
    # What this round's own survivals would give depends on the tokens that they cut.
    assert not torch.equal(node_budgets(whole.survival, 12), budgets)
    new = first.survival.clone()
    new[1] = 1.0
    assert node_budgets(new, 10).tolist()[1] == 8, "a new request counts as certain"
