"""accept_tree against reference/tree.py: paths and tokens draw by draw, counts, rows, commit mask, flags, anchors in place."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.launch.accept import tree as launch
from reference import accept, cases, layout as layouts
from reference.cases import accept_tree_case
from tests.blocks import tree_of
from tests.ops.accept_checks import DTYPES, check
from tests.ops.fields import assert_same, poisoned

RULES = ("walk", "recursive", "traversal")
SAMPLED = ("iid", "without_replacement")


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_equals_reference(data):
    draw = data.draw
    scattered = draw(st.booleans())
    requests, nodes = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 6]))
    vocab = draw(st.sampled_from([2, 33, 1024, 2100]))
    case = accept_tree_case(
        seed=draw(st.integers(0, 10**6)),
        requests=requests,
        nodes=nodes,
        vocab=vocab,
        drawn=draw(st.sampled_from(["one_hot", *SAMPLED, *SAMPLED])),
        rule=draw(st.sampled_from(RULES)),
        dtype=draw(st.sampled_from(DTYPES)),
        sampled=draw(st.sampled_from([True, True, True, False])),
        scattered=scattered,
        padding=draw(st.integers(0, requests - 1)) if scattered else 0,
        closeness=draw(st.sampled_from([0.3, 0.8])),
        draft_temperature=draw(st.booleans()),
        draft_vocab=draw(st.sampled_from([None, vocab + 5, max(1, vocab - 3)])),
        reach=draw(st.sampled_from([None, 1, 2])),
        max_rows=draw(st.sampled_from([None, requests * nodes + 3, requests + 2])),
        proposal=draw(st.sampled_from(["dense", "mapped", "sparse"])),
        candidates=draw(st.sampled_from([1, 3, 16, 37])),
        logprobs=draw(st.sampled_from([None, "raw", "processed"])),
    )
    acceptance = check(case)
    out = poisoned(acceptance)
    workspace = dk.Workspace(8, 63, 3000, "cpu")
    workspace.scratch.fill_(-1)
    assert dk.accept_tree(**case.arguments(), out=out, workspace=workspace) is out
    assert_same(out, acceptance)
    assert (workspace.counters == 0).all(), "counters were not left clean"


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_sampling_settings_act_inside(data):
    """Penalties and masks along each node's own path, filters in one launch with the rest."""
    draw = data.draw
    some = lambda names: draw(st.lists(st.sampled_from(names), unique=True, min_size=1))  # noqa: E731
    scattered = draw(st.booleans())
    check(accept_tree_case(
        seed=draw(st.integers(0, 10**6)),
        requests=draw(st.sampled_from([1, 2])),
        nodes=draw(st.sampled_from([4, 7])),
        vocab=draw(st.sampled_from([5, 40, 1100])),
        drawn=draw(st.sampled_from(["one_hot", *SAMPLED])),
        rule=draw(st.sampled_from(RULES)),
        dtype=draw(st.sampled_from(DTYPES)),
        scattered=scattered,
        padding=int(scattered),
        closeness=0.9,
        sharpness=1.0,
        reach=draw(st.sampled_from([1, 2, None])),
        proposal=draw(st.sampled_from(["dense", "mapped", "sparse"])),
        adjust=some(cases.ADJUSTMENTS),
        filters=draw(st.lists(st.sampled_from(cases.FILTERS), unique=True)),
        filter_order=draw(st.sampled_from(["top_k_first", "joint"])),
        logprobs=draw(st.sampled_from([None, "raw", "processed"])),
    ))  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_penalties_count_the_path_and_no_sibling(temperature):
    """Children 5 and 6 of the anchor 9, and a child 6 of the 5: what is on a row's own way is out, all else is not."""
    tree = tree_of([[(9, -1), (1, 0)], [(9, -1), (5, 0), (6, 0), (6, 1)]])
    layout = layouts.tree_layout(tree, anchor_positions=torch.tensor([11, 30]))
    logits = torch.zeros(6, 12)
    logits[2, 5] = 4.0
    logits[3, 5], logits[3, 6] = 3.0, 2.0
    logits[5, 5], logits[5, 6], logits[5, 9] = 4.0, 4.0, 2.0
    unused = torch.full((2, 1), -1)
    penalties = dk.Penalties(unused, unused.int(), presence=torch.tensor([10.0, 10.0]))
    sampling = dk.SamplingTensors(torch.full((2,), temperature), torch.tensor([3, 4]), penalties=penalties)
    have = dk.accept_tree(logits, layout, tree, sampling=sampling)
    assert have.path[1].tolist() == [0, 1, 3, -1] and have.tokens[1].tolist() == [5, 6, 9, -1]


@pytest.mark.parametrize("rule, drawn", [("recursive", "iid"), ("traversal", "without_replacement")])
def test_many_decisions(rule, drawn):
    """Hundreds of acceptance tests and sweeps of small rows: factors that are off by one part in a hundred come out differently."""
    case = accept_tree_case(1, 12, 8, 12, drawn, rule, closeness=0.7, sharpness=1.5, temperatures=(1.0, 0.6), reach=3)
    acceptance = check(case)
    assert acceptance.num_accepted.sum() > 8 and acceptance.num_rejected.sum() > 12


def test_full_trees():
    """Up to 64 nodes."""
    check(accept_tree_case(1, 1, 64, 30, "iid", "recursive", temperatures=(1.0,), reach=3))
    check(accept_tree_case(5, 3, 64, 8, "one_hot", "walk", temperatures=(1.0, 0.0), reach=4))


@pytest.mark.parametrize(
    "rule, proposal", [("recursive", "dense"), ("traversal", "dense"), ("traversal", "sparse"), ("recursive", "mapped")]
)
def test_a_child_that_takes_nearly_all_of_its_distribution(rule, proposal):
    """What is left for its siblings, 1 - q, is lost in fp32: it has to be summed anew for its younger siblings."""
    case = accept_tree_case(
        7, 16, 4, 12, "without_replacement", rule, closeness=0.5, sharpness=1.0, temperatures=(1.0,), proposal=proposal,
        candidates=12, draft_vocab=24 if proposal == "mapped" else None,
    )  # fmt: skip
    tree, stored = case.tree, case.tree.proposal
    for slot, count in enumerate(tree.num_nodes.tolist()):
        for parent in tree.parents[slot, 1:count].unique().tolist():
            token = tree.tokens[slot, int(tree.first_child[slot, parent])]
            columns = stored.ids[slot, parent] == token if proposal == "sparse" else token
            if proposal == "mapped":
                columns = stored.draft_to_target == token
            stored.logits[slot, parent, columns] = 12.0
    check(case)


@pytest.mark.parametrize("rule, drawn", [("walk", "one_hot"), ("traversal", "without_replacement")])
@pytest.mark.parametrize("pairs, span", [(2, 4), (4, 1)])
def test_any_tile_gives_the_same_bits(monkeypatch, pairs, span, rule, drawn):
    case = accept_tree_case(31, 2, 6, 3000, drawn, rule, sharpness=1.0, reach=2)
    want = check(case)
    tile = launch.TreeConfig(group=2 if pairs == 4 else 1, chunk=pairs, tile=4 // pairs, span=span, num_warps=1, max_registers=None)
    monkeypatch.setattr(launch, "pick", lambda *a: tile)
    have = dk.accept_tree(**case.arguments())
    assert_same(have, want)


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_of_one_node_is_plain_sampling(rule):
    """The same token that accept_chain draws without drafts."""
    case = accept_tree_case(3, 5, 4, 1500, "iid", rule, temperatures=(1.0, 0.0, 0.5))
    case.tree.num_nodes.fill_(1)
    given = accept_tree_case(3, 5, 4, 1500, "iid", rule, temperatures=(1.0, 0.0, 0.5), counts=[1] * 5)
    have = check(given)
    want = accept.accept_chain(given.target_logits, given.layout, sampling=given.sampling)
    assert have.next_token.tolist() == want.next_token.tolist() and (have.path[:, 1:] == -1).all()


def test_anchors_advance_in_place():
    case = accept_tree_case(3, 4, 6, 40, "iid", "recursive", scattered=True, padding=1)
    slots = case.tree.tokens.shape[0]
    for dtype in (torch.int32, torch.int64):
        anchors = torch.full((slots,), -5, dtype=dtype)
        positions = torch.full((2 * slots,), -5, dtype=dtype)[::2]
        acceptance = dk.accept_tree(**case.arguments(), anchors=anchors, anchor_positions=positions)
        live = [(r, int(s)) for r, s in enumerate(case.state_indices) if s >= 0]
        for r, slot in live:
            first = case.layout.positions[case.layout.logits_indices[case.layout.cu_num_logits[r]]]
            assert anchors[slot] == acceptance.next_token[r]
            assert positions[slot] == first + acceptance.num_accepted[r] + 1
        unused = sorted(set(range(slots)) - {slot for _, slot in live})
        assert (anchors[unused] == -5).all() and (positions[unused] == -5).all()


def test_prefill_rows_and_requests_that_do_not_emit():
    case = accept_tree_case(8, 3, 5, 30, "iid", "recursive", temperatures=(1.0,))
    case.layout = layouts.tree_layout(
        case.tree,
        anchor_positions=torch.tensor([10, 0, 40]),
        num_prefill_tokens=torch.tensor([0, 5, 3], dtype=torch.int32),
        emits=torch.tensor([True, True, False]),
        max_rows=16,
    )
    case.target_logits = torch.randn(16, 30, generator=torch.Generator().manual_seed(0))
    acceptance = check(case)
    assert int(acceptance.num_emitted[1]) == 1 and int(acceptance.num_emitted[2]) == 0
    starts = case.layout.query_start_loc.tolist()
    assert acceptance.commit_mask[starts[1] : starts[3]].all() and acceptance.kv_source[1].tolist() == [starts[1] + 4] + [-1] * 4


# --- values that only the device sees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, drawn", [("walk", "one_hot"), ("traversal", "without_replacement")])
@pytest.mark.parametrize("value", ["nan", "all_minus_inf", "only_inf", "two_inf", "mask", "draft_inf", "draft_empty"])
def test_values_that_are_not_finite(rule, drawn, value):
    seen = 0
    for seed in range(2):
        case = accept_tree_case(seed, 3, 4, 40, drawn, rule, temperatures=(1.0, 0.0), reach=2)
        for row in range(seed, len(case.target_logits), 2):
            logits = case.target_logits[row]
            if value == "nan":
                logits[::3] = torch.nan
            elif value == "all_minus_inf":
                logits[:] = -torch.inf
            elif value == "only_inf":
                logits[:] = -torch.inf
                logits[[17, 9]] = torch.inf
            elif value == "two_inf":
                logits[[17, 9]] = torch.inf
            elif value == "mask":
                logits[5:] = -torch.inf
        if drawn != "one_hot" and value.startswith("draft"):
            logits = case.tree.proposal.logits
            logits[:, seed % 2] = -torch.inf
            if value == "draft_inf":
                logits[:, seed % 2, [3, 8]] = torch.inf
        seen |= int(check(case).flags.max())
    if value == "nan":
        assert seen & dk.Flag.NAN
    if value in ("all_minus_inf", "only_inf"):
        assert seen & dk.Flag.NONFINITE_ROW


@pytest.mark.parametrize("rule, drawn", [("walk", "one_hot"), ("recursive", "iid"), ("traversal", "without_replacement")])
@pytest.mark.parametrize("token", [40, 2**40])
def test_bad_token_ids(rule, drawn, token):
    seen = 0
    for seed in range(2):
        case = accept_tree_case(seed, 3, 4, 40, drawn, rule, temperatures=(1.0, 0.0), reach=2)
        for r in range(3):
            first = int(case.layout.query_start_loc[r])
            case.layout.token_ids[first + 1 : int(case.layout.query_start_loc[r + 1]) : 2] = token
        seen |= int(check(case).flags.max())
    assert seen & dk.Flag.BAD_TOKEN_ID


@pytest.mark.parametrize("parents", [[5] * 6, [-9] * 6, [0, 1, 2, 3, 4, 5], [-1, 0, 99, 1, -3, 2]])
def test_parents_that_make_no_tree(parents):
    """Nothing hangs or faults, and what comes out is a token."""
    case = accept_tree_case(2, 2, 6, 40, "iid", "traversal", temperatures=(1.0,), counts=None)
    case.tree.parents.copy_(torch.tensor(parents, dtype=torch.int32))
    acceptance = dk.accept_tree(**case.arguments())
    assert ((acceptance.tokens[:, 0] >= 0) & (acceptance.tokens[:, 0] < 40)).all()


def test_no_requests():
    tree, none = accept_tree_case().tree, torch.zeros(0).int()
    empty = layouts.tree_layout(tree, anchor_positions=torch.zeros(3).long(), state_indices=none, max_rows=4)
    result = dk.accept_tree(torch.zeros(4, 9), empty, tree, state_indices=none)
    assert result.tokens.shape == (0, 7) and not result.commit_mask.any()


@pytest.mark.parametrize(
    "change, error, name",
    [
        (dict(target_logits=torch.zeros(3)), ValueError, "target_logits"),
        (dict(target_logits=torch.zeros(3, 4).int()), TypeError, "target_logits"),
        (dict(layout=None), TypeError, "layout"),
        (dict(tree=3), TypeError, "tree"),
        (dict(rule="token"), ValueError, "rule"),
        (dict(sampling=3), TypeError, "sampling"),
        (dict(state_indices=torch.zeros(2).int()), ValueError, "state_indices"),
        (dict(anchors=torch.zeros(3)), TypeError, "anchors"),
        (dict(out=3), TypeError, "out"),
        (dict(workspace=3), TypeError, "workspace"),
        (dict(workspace=dk.Workspace(1, 1, 1, "cpu")), ValueError, "workspace"),
    ],
)
def test_bad_arguments_are_named(change, error, name):
    with pytest.raises(error, match=f"^{name}: expected"):
        dk.accept_tree(**accept_tree_case().arguments() | change)
