"""draft_tree of a static shape and expand_tree against reference/tree_draft.py: trees draw by draw, budgets, bad values."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.launch.draft_tree import static as launch
from dspark_kernels.testing.statistics import compare
from reference import cases, tree_draft as reference
from reference.equality import assert_equal_or_tied
from tests.ops.draft_checks import logits_of, rows_of
from tests.ops.errors import excess_error
from tests.ops.fields import SENTINEL

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SAMPLED = ("iid", "without_replacement")
METHODS = ("top_k", *SAMPLED)
FIELDS = ("tokens", "parents", "depths", "first_child", "next_sibling", "ancestors", "num_nodes")


def arguments(case, method, branching, num_nodes, budgets=None):
    return dict(
        base_logits=case.base_logits,
        anchors=case.anchors,
        head=case.head,
        anchor_positions=case.anchor_positions,
        method=method,
        num_nodes=num_nodes,
        branching=branching,
        node_budgets=budgets,
        sampling=case.sampling,
        hidden=case.hidden,
        draft_to_target=case.draft_to_target,
        state_indices=case.state_indices,
    )


def outcome(tree, r, slot):
    """Everything a request can see of its tree, comparable."""
    return (*(getattr(tree, name)[slot].tolist() for name in FIELDS), int(tree.flags[r]))


def paths(tree, slot):
    """The tokens from the anchor to each node."""
    found = {}
    for node in range(int(tree.num_nodes[slot])):
        parent = int(tree.parents[slot, node])
        found[node] = [*(found[parent] if parent >= 0 else []), int(tree.tokens[slot, node])]
    return found


def check(case, method, branching, num_nodes, budgets=None, exempt=True):
    given = arguments(case, method, branching, num_nodes, budgets)
    tree = dk.draft_tree(**given)
    rows = rows_of(case)
    stored = tree.proposal.logits if method in SAMPLED else None

    def run(decisions):
        want = reference.draft_tree(**given, stored_logits=stored, decisions=decisions)
        return {r: outcome(want, r, slot) for r, slot in rows}

    assert_equal_or_tied(run, {r: outcome(tree, r, slot) for r, slot in rows}, exempt=exempt)
    live = {slot for _, slot in rows}
    assert all(int(tree.num_nodes[slot]) == 0 for slot in range(len(tree.num_nodes)) if slot not in live)
    assert all(int(tree.flags[r]) == 0 for r in range(len(tree.flags)) if r not in {r for r, _ in rows})
    if stored is not None:
        drafts = case.base_logits.shape[1]
        for r, slot in rows:
            for node, path in paths(tree, slot).items():
                if int(tree.first_child[slot, node]) >= 0:
                    depth = len(path) - 1
                    exact, eager, _ = logits_of(case, r, slot, (path + path * drafts)[:drafts])
                    found = stored[slot, node]
                    excess_error(found, eager[depth].to(found.dtype), exact[depth], f"logits of node {node} of request {r}")
    return tree


def poisoned(tree):
    fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    for name, value in fields.items():
        if isinstance(value, torch.Tensor):
            fields[name] = torch.full_like(value, SENTINEL)
    if isinstance(tree.proposal, dk.DenseProposal):
        fields["proposal"] = dk.DenseProposal(torch.full_like(tree.proposal.logits, torch.nan))
    return dk.DraftTree(**fields)


def assert_same(out, tree, rows):
    """`out`, poisoned before the call, holds what `tree` does, and nothing else was written."""
    slots = [slot for _, slot in rows]
    others = sorted(set(range(len(tree.tokens))) - set(slots))
    for name in FIELDS:
        assert torch.equal(getattr(out, name)[slots], getattr(tree, name)[slots]), name
        assert (getattr(out, name)[others] == SENTINEL).all(), name
    assert torch.equal(out.flags, tree.flags)
    if isinstance(tree.proposal, dk.DenseProposal):
        inner = tree.first_child >= 0
        assert torch.equal(out.proposal.logits[inner], tree.proposal.logits[inner])
        assert out.proposal.logits[others].isnan().all()


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_equals_reference(data):
    draw = data.draw
    scattered = draw(st.booleans())
    requests, drafts = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 2, 4]))
    num_nodes = draw(st.sampled_from([1, 2, 7, 12]))
    case = cases.draft_case(
        seed=draw(st.integers(0, 10**6)),
        requests=requests,
        drafts=drafts,
        vocab=draw(st.sampled_from([2, 33, 1024, 2100])),
        rank=draw(st.sampled_from([0, 7, 16])),
        dtype=draw(st.sampled_from(DTYPES)),
        w2_dtype=draw(st.sampled_from([None, None, torch.int8, torch.float8_e4m3fn])),
        confidence=None,
        scattered=scattered,
        padding=draw(st.integers(0, requests - 1)) if scattered else 0,
        extra_columns=draw(st.sampled_from([0, 3])),
        position_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )
    method = draw(st.sampled_from(METHODS))
    branching = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 9]), min_size=1, max_size=4)))
    budgets = draw(st.sampled_from([None, torch.tensor(([-3, 2, 64, 5, 1] * 5)[:requests], dtype=torch.int32)]))
    tree = check(case, method, branching, num_nodes, budgets)
    out, workspace = poisoned(tree), dk.Workspace(8, 11, 3000, "cpu")
    workspace.scratch.fill_(-1)
    assert dk.draft_tree(**arguments(case, method, branching, num_nodes, budgets), out=out, workspace=workspace) is out
    assert_same(out, tree, rows_of(case))
    assert (workspace.counters == 0).all(), "counters were not left clean"


@pytest.mark.parametrize("kind", ["gated", "rnn"])
@pytest.mark.parametrize("method, dtype", [("top_k", torch.float32), *((method, torch.bfloat16) for method in SAMPLED)])
def test_heads_whose_latents_follow_the_path(method, dtype, kind):
    """A node's state goes on from its parent's. (Best tokens in fp32: latents rounded to bf16 move keys that are not kept.)"""
    case = cases.draft_case(
        seed=9, requests=3, drafts=3, vocab=300, rank=24, dtype=dtype, confidence=None, kind=kind, scattered=True, padding=1
    )
    case.base_logits *= 1 if method == "top_k" else 30  # so large that rounding decides
    tree = check(case, method, (3, 2, 2), 12)
    out, workspace = poisoned(tree), dk.Workspace(3, 11, 300, "cpu", markov_rank=24)
    workspace.scratch.fill_(-1)
    dk.draft_tree(**arguments(case, method, (3, 2, 2), 12), out=out, workspace=workspace)
    assert_same(out, tree, rows_of(case))
    assert (workspace.counters == 0).all()


@pytest.mark.parametrize("method, target_vocab", [("top_k", 1500), ("without_replacement", 1500), ("iid", None)])
def test_bias_and_reduced_vocabularies(method, target_vocab):
    """Tokens, W1, bias, noise and ties are by the target's ids; one id in nine stands for no token."""
    options = dict(scattered=True, padding=1, grid=0.25 if method == "top_k" else None, confidence=None, adjust=("bias",))
    case = cases.draft_case(seed=12, requests=3, drafts=3, vocab=600, rank=6, target_vocab=target_vocab, **options)
    if target_vocab is not None:
        case.base_logits[..., case.draft_to_target < 0] = 50.0
    tree = check(case, method, (3, 2, 2), 12)
    assert target_vocab is None or tree.tokens.max() >= 600
    for step, tree in expansion(dataclasses.replace(case, head=None), method, (2, 2), 7):
        assert all(outcome(tree, r, slot) == outcome(reference.expand_tree(**step), r, slot) for r, slot in rows_of(case))


@pytest.mark.parametrize("method", METHODS)
def test_a_full_tree_of_64_nodes(method):
    """Wide and deep, cut in the middle of a depth; 63 children of one node."""
    case = cases.draft_case(seed=2, requests=1, drafts=4, vocab=2500, rank=4, confidence=None, temperatures=(0.8,))
    assert int(check(case, method, (3, 3, 4, 5), 64).num_nodes[0]) == 64
    assert check(case, method, (80,), 64).depths.tolist() == [[0] + [1] * 63]


def test_long_branchings_and_many_programs(monkeypatch):
    """More depths than a word has numbers; small tiles, pairs and lists give the same bits."""
    case = cases.draft_case(seed=4, requests=2, drafts=7, vocab=1100, rank=4, confidence=None, temperatures=(0.8, 0.0))
    branching = (1, 1, 1, 1, 1, 3, 2)
    want = [check(case, method, branching, 15) for method in METHODS]
    assert want[0].depths[0].max() == 7
    pick = launch.pick
    monkeypatch.setattr(launch, "pick", lambda *a: dataclasses.replace(pick(*a), block_v=512, pairs=8, rows=2))
    for method, tree in zip(METHODS, want, strict=True):
        have = dk.draft_tree(**arguments(case, method, branching, 15))
        assert all(torch.equal(getattr(have, name), getattr(tree, name)) for name in FIELDS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", [0, 4])
def test_ties_go_to_the_lowest_node_and_id(method, head):
    """Logits on a dyadic grid: no near tie excuses a difference for greedy rows and best tokens."""
    case = cases.draft_case(seed=7, requests=3, drafts=3, vocab=1300, rank=head, confidence=None, grid=0.5, temperatures=(0.0,))
    tree = check(case, method, (3, 2, 2), 14, exempt=False)
    assert int(tree.num_nodes.min()) == 14


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_children(method):
    """Tokens at -inf never become children; what a row lacks is left to the next ones, whose slots move up."""
    case = cases.draft_case(seed=1, requests=4, drafts=3, vocab=40, rank=4, confidence=None, temperatures=(1.0, 0.0))
    case.base_logits[0, 0, 2:] = -torch.inf
    case.base_logits[1, 1, :] = -torch.inf
    case.base_logits[2, 0, :] = torch.nan
    case.base_logits[3, 2, 5:] = -torch.inf
    case.base_logits[3, 1, [3, 7]] = torch.inf
    if method != "top_k":
        # A row without a token in the middle of a depth: children of the others keep their order and their noise.
        case.head.w1[1] = torch.nan
        case.base_logits[0, 0, :2] = torch.tensor([0.0, 0.5])
    tree = check(case, method, (3, 3, 7), 30)
    assert int(tree.flags[2]) == dk.Flag.NAN | dk.Flag.NONFINITE_ROW and int(tree.num_nodes[2]) == 1
    assert int(tree.flags[1]) & dk.Flag.NONFINITE_ROW and int(tree.num_nodes[1]) == 4


def test_bad_anchors():
    case = cases.draft_case(seed=1, requests=3, drafts=2, vocab=40, rank=4, confidence=None)
    case.anchors[:] = torch.tensor([40, -1, 3])
    tree = check(case, "without_replacement", (2, 2), 7)
    assert [int(flags) & dk.Flag.BAD_TOKEN_ID > 0 for flags in tree.flags] == [True, True, False]
    case.head = None
    assert not check(case, "top_k", (2, 2), 7).flags.any()


# --- what children are drawn from -----------------------------------------------------------------------------------

LEVEL = 1e-5


def distribution_case(requests, temperature=0.5):
    """Requests of one distribution over two vocabulary blocks, each with its own seed: (arguments, tokens in support, probs)."""
    logits = torch.full((1, 2, 1030), -torch.inf)
    support = torch.tensor([3, 500, 1024, 1029])
    logits[:, :, support] = torch.tensor([0.5, 0.1, 0.3, -0.2])
    given = dict(
        base_logits=logits.expand(requests, 2, 1030),
        anchors=torch.zeros(requests, dtype=torch.int64),
        anchor_positions=torch.full((requests,), 9),
        sampling=dk.SamplingTensors(torch.full((requests,), temperature), torch.arange(requests) * 7919 + 13),
    )
    return given, support, torch.softmax(logits[0, 0, support].double() / temperature, 0)


def assert_distribution(what, observed, probs, sees):
    findings = compare(what, observed, probs, LEVEL)
    assert all(finding.p_value > LEVEL for finding in findings), findings
    assert any(finding.sees is not None and finding.sees < sees for finding in findings), findings


def test_children_have_the_distribution_of_their_node():
    """The kernel's own draws, one distribution for 63 children of a few requests."""
    given, support, probs = distribution_case(5)
    tokens = dk.draft_tree(**given, method="iid", num_nodes=64, branching=(63,)).tokens[:, 1:]
    assert_distribution("iid", (tokens[..., None] == support).sum((0, 1)), probs, 0.25)


@pytest.mark.parametrize("method", SAMPLED)
def test_families_have_the_distribution_of_their_method(method):
    """Siblings and cousins of the reference, which the kernel equals draw by draw: independent, or without replacement."""
    given, support, probs = distribution_case(250)
    tokens = reference.draft_tree(**given, method=method, num_nodes=5, branching=(2, 1)).tokens
    index = torch.searchsorted(support, tokens[:, 1:].contiguous())
    without = (torch.outer(probs, probs) / (1 - probs)[:, None]).fill_diagonal_(0.0)
    siblings = without if method == "without_replacement" else torch.outer(probs, probs)
    for a, b, want in ((0, 1, siblings), (0, 2, None), (1, 3, None), (2, 3, None)):
        if want is None:
            want = torch.outer(siblings.sum(0) if a == 1 else probs, probs)
        observed = torch.bincount(index[:, a] * 4 + index[:, b], minlength=16)
        assert_distribution(f"nodes {a + 1} and {b + 1}", observed, want.flatten(), 0.3)


# --- expand_tree ------------------------------------------------------------------------------------------------------


def expansion(case, method, branching, num_nodes, budgets=None):
    """A tree grown depth by depth from logits that do not see the path; (arguments of every step, results)."""
    given = arguments(case, method, branching[:1], num_nodes, budgets)
    tree = dk.draft_tree(**given)
    steps = []
    for depth in range(1, len(branching)):
        width = max(1, int((tree.depths == depth).sum(1).max()))
        call = dict(
            tree=tree,
            node_logits=case.base_logits[:, depth : depth + 1].expand(-1, width, -1),
            depth=depth,
            branching=branching[depth],
            anchor_positions=case.anchor_positions,
            method=method,
            sampling=case.sampling,
            node_budgets=budgets,
            draft_to_target=case.draft_to_target,
            state_indices=case.state_indices,
        )
        tree = dk.expand_tree(**call)
        steps.append((call, tree))
    return steps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scattered", [False, True])
def test_expansion_depth_by_depth_gives_the_static_tree(method, scattered):
    case = cases.draft_case(
        seed=5, requests=3, drafts=3, vocab=1300, rank=0, dtype=torch.bfloat16, confidence=None, scattered=scattered,
        padding=int(scattered),
    )  # fmt: skip
    budgets = torch.tensor([20, 3, 7], dtype=torch.int32)
    rows, branching = rows_of(case), (2, 3, 1)
    want = check(case, method, branching, 10, budgets)
    for call, tree in expansion(case, method, branching, 10, budgets):
        stepwise = reference.expand_tree(**call)
        assert all(outcome(tree, r, slot) == outcome(stepwise, r, slot) for r, slot in rows)
        # In place, and into another tree.
        out, workspace = poisoned(tree), dk.Workspace(3, 9, 1300, "cpu")
        assert dk.expand_tree(**call, out=out, workspace=workspace) is out and (workspace.counters == 0).all()
        own = call["tree"]
        assert dk.expand_tree(**call, out=own, workspace=workspace) is own and (workspace.counters == 0).all()
        for other in (out, own):
            assert all(torch.equal(getattr(other, name), getattr(tree, name)) for name in (*FIELDS, "flags"))
            if method in SAMPLED:
                assert torch.equal(other.proposal.logits, tree.proposal.logits)
    assert all(outcome(tree, r, slot) == outcome(want, r, slot) for r, slot in rows)
    if method in SAMPLED:
        inner = want.first_child >= 0
        assert torch.equal(tree.proposal.logits[inner], want.proposal.logits[inner])


def test_rows_of_nodes_differ_and_bad_ones_are_flagged():
    """Each node has logits of its own; a tree with no node of the depth, or none at all, stays as it is."""
    case = cases.draft_case(seed=5, requests=3, drafts=1, vocab=50, rank=0, confidence=None)
    tree = dk.draft_tree(**arguments(case, "without_replacement", (3,), 9))
    tree.num_nodes[2] = 0
    logits = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    logits[0, 1] = -torch.inf
    logits[1, 2, 7] = torch.nan
    call = dict(
        tree=tree, node_logits=logits, branching=2, anchor_positions=case.anchor_positions, method="without_replacement",
        sampling=case.sampling,
    )  # fmt: skip
    have, want = (op(**call, depth=1) for op in (dk.expand_tree, reference.expand_tree))
    assert all(outcome(have, r, r) == outcome(want, r, r) for r in range(2))
    assert have.flags.tolist() == [dk.Flag.NONFINITE_ROW, dk.Flag.NAN, 0] and int(have.num_nodes[2]) == 0
    # No node of the depth; no room, so that the rows are not looked at.
    for same in (dk.expand_tree(**call, depth=2), dk.expand_tree(**call, depth=1, node_budgets=torch.full((3,), 4).int())):
        assert all(torch.equal(getattr(same, name), getattr(tree, name)) for name in (*FIELDS, "flags"))


# --- arguments --------------------------------------------------------------------------------------------------------


def test_no_requests():
    case = cases.draft_case(requests=3, drafts=2, vocab=9, rank=0, confidence=None)
    given = arguments(case, "top_k", (2,), 4)
    given |= dict(base_logits=given["base_logits"][:0], state_indices=torch.zeros(0, dtype=torch.int32))
    tree = dk.draft_tree(**given)
    assert tree.num_nodes.tolist() == [0] * 3 and tree.flags.shape == (0,) and (tree.tokens == -1).all()
    same = dk.expand_tree(
        tree, torch.zeros(0, 2, 9), depth=1, branching=1, anchor_positions=case.anchor_positions, state_indices=torch.zeros(0).int()
    )
    assert torch.equal(same.tokens, tree.tokens)


@pytest.mark.parametrize(
    "change, error, name",
    [
        (dict(base_logits=torch.zeros(3)), ValueError, "base_logits"),
        (dict(anchors=torch.zeros(3)), TypeError, "anchors"),
        (dict(method="beam"), ValueError, "method"),
        (dict(num_nodes=65), ValueError, "num_nodes"),
        (dict(num_nodes=0), ValueError, "num_nodes"),
        (dict(branching=None), ValueError, "branching"),
        (dict(branching=()), ValueError, "branching"),
        (dict(branching=(2, 0)), ValueError, "branching.1."),
        (dict(branching=(2, 1.5)), TypeError, "branching.1."),
        (dict(method="best_first"), ValueError, "branching"),
        (dict(method="iid", sampling=None), ValueError, "sampling"),
        (dict(node_budgets=torch.zeros(3)), TypeError, "node_budgets"),
        (dict(node_budgets=torch.zeros(2, dtype=torch.int32)), ValueError, "node_budgets"),
        (dict(state_indices=torch.zeros(2, dtype=torch.int32)), ValueError, "state_indices"),
        (dict(head=3), TypeError, "head"),
        (dict(candidates=0), ValueError, "candidates"),
        (dict(draft_to_target=torch.zeros(3, dtype=torch.int64)), ValueError, "draft_to_target"),
        (dict(hidden=torch.zeros(3, 2, 5), confidence=dk.ConfidenceHead(torch.zeros(5))), ValueError, "confidence"),
        (dict(out=3), TypeError, "out"),
        (dict(workspace=3), TypeError, "workspace"),
        (dict(workspace=dk.Workspace(1, 1, 1, "cpu")), ValueError, "workspace"),
    ],
)
def test_bad_arguments_are_named(change, error, name):
    case = cases.draft_case(requests=3, drafts=2, vocab=1100, rank=4, confidence=None)
    given = arguments(case, "top_k", (9, 9), 60)
    with pytest.raises(error, match=f"^{name}: .*expected"):
        dk.draft_tree(**given | change)


def test_outputs_that_do_not_fit_are_named():
    case = cases.draft_case(requests=3, drafts=2, vocab=50, rank=4, confidence=None)
    tree = dk.draft_tree(**arguments(case, "iid", (2, 1), 6))
    for other, name in [(("iid", (2,), 7), "out.tokens"), (("without_replacement", (2,), 6), "out.drawn")]:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            dk.draft_tree(**arguments(case, *other), out=tree)
    call = dict(tree=tree, node_logits=torch.zeros(3, 2, 50), depth=1, branching=2, anchor_positions=case.anchor_positions)
    for change, name in [
        (dict(node_logits=torch.zeros(3, 0, 50)), "node_logits"),
        (dict(anchor_positions=torch.zeros(2).long()), "anchor_positions"),
        (dict(depth=-1), "depth"),
        (dict(method="conditioned"), "method"),
        (dict(method="iid", sampling=case.sampling, node_logits=torch.zeros(3, 2, 51)), "tree.proposal.logits"),
        (dict(out=tree), "out.drawn"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            dk.expand_tree(**call | change)
