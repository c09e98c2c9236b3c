"""A request gets the same bits whatever else is in the batch, in whatever row, for any tile, and on replay."""

import dataclasses

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels.launch import arch, attention as attention_launch
from dspark_kernels.launch.draft import dense as draft_launch
from dspark_kernels.launch.layout import schedule as schedule_launch
from reference import cases, layout as layouts
from reference.cases import accept_tree_case
from tests.ops.attention_checks import take_requests
from tests.ops.fields import assert_same
from tests.ops.schedule_cases import arguments as schedule_arguments


def _take_draft(case, rows):
    """The requests `rows` of a draft case without request slots, as a batch of their own."""
    rows = torch.tensor(rows)
    pick = lambda t: None if t is None else t[rows]  # noqa: E731
    sampling = case.sampling
    if sampling is not None:
        fields = {f.name: getattr(sampling, f.name) for f in dataclasses.fields(sampling)}
        sampling = dk.SamplingTensors(**{k: pick(v) if isinstance(v, torch.Tensor) else v for k, v in fields.items()})
    return dataclasses.replace(
        case,
        base_logits=case.base_logits[rows],
        anchors=case.anchors[rows],
        anchor_positions=case.anchor_positions[rows],
        hidden=pick(case.hidden),
        sampling=sampling,
        head_state=pick(case.head_state),
    )


def _draft_bits(block, row):
    parts = [block.tokens, block.confidence_logits, block.confidence, block.proposal.logits, block.proposal.lse]
    return [None if p is None else p[row] for p in parts]


def _same(have, want):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(have, want, strict=True))


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("requests", [21, 40])
def test_draft_block_in_any_batch(requests, sampled):
    case = cases.draft_case(seed=50, requests=requests, drafts=3, vocab=1300, rank=24, dtype=torch.bfloat16, sampled=sampled)
    whole = dk.draft_block(**case.arguments(), keep_logits=True)
    for rows in ([4], [20, 4, 11], list(range(20, -1, -1)), list(range(3, 16))):
        part = dk.draft_block(**_take_draft(case, rows).arguments(), keep_logits=True)
        for row, request in enumerate(rows):
            assert _same(_draft_bits(part, row), _draft_bits(whole, request)), (rows, request)


def test_draft_block_for_any_tile(monkeypatch):
    case = cases.draft_case(seed=51, requests=3, drafts=3, vocab=1300, rank=24, dtype=torch.float32, grid=0.25)
    want = dk.draft_block(**case.arguments())
    pick = draft_launch.pick
    for block_v in (64, 128, 512):
        monkeypatch.setattr(draft_launch, "pick", lambda *a: dataclasses.replace(pick(*a), block_v=block_v))  # noqa: B023
        have = dk.draft_block(**case.arguments())
        # Exact sums on a dyadic grid: the host's matrix product may otherwise round by the tile it is given.
        assert _same(_draft_bits(have, slice(None))[::3], _draft_bits(want, slice(None))[::3])
        assert torch.equal(have.proposal.lse, want.proposal.lse)


def test_draft_block_with_many_programs(monkeypatch):
    """The grid barrier: four programs at once share the vocabulary and agree with one."""
    from dspark_kernels.testing import interpreter

    if not interpreter.interpreting():
        pytest.skip("programs run together on a GPU anyway")
    case = cases.draft_case(seed=52, requests=5, drafts=4, vocab=1300, rank=8, dtype=torch.bfloat16)
    workspace = dk.Workspace(5, 4, 1300, "cpu")
    want = dk.draft_block(**case.arguments(), workspace=workspace)
    pick = draft_launch.pick
    monkeypatch.setattr(draft_launch, "pick", lambda *a: dataclasses.replace(pick(*a), block_v=64))
    single = dk.draft_block(**case.arguments(), workspace=workspace)
    monkeypatch.setattr(arch, "INTERPRETER", dataclasses.replace(arch.INTERPRETER, multiprocessors=4))
    with interpreter.threads(4):
        for _ in range(3):
            have = dk.draft_block(**case.arguments(), workspace=workspace)
            assert _same(_draft_bits(have, slice(None)), _draft_bits(single, slice(None)))
            assert torch.equal(have.tokens, want.tokens) and torch.equal(have.flags, want.flags)
            assert (workspace.counters[2:] == 0).all(), "counters were not left clean"


# What makes a draft block another row of phases: latents of a head, filters, both.
PHASES = [
    dict(),
    dict(kind="gated", w2_dtype=torch.int8),
    dict(filters=("top_k", "top_p")),
    dict(kind="rnn", filters=("top_p", "min_p"), adjust=("bias", "mask"), target_vocab=1500),
]


@pytest.mark.parametrize("options", PHASES[1:], ids=str)
def test_draft_block_with_heads_and_filters_in_any_batch(options):
    case = cases.draft_case(seed=53, requests=10, drafts=2, vocab=200, rank=24, dtype=torch.bfloat16, **options)
    state = None if case.head_state is None else case.head_state.clone()
    whole = dk.draft_block(**case.arguments() | dict(head_state=state))
    for rows in ([4], [9, 4], list(range(9, -1, -1))):
        part = _take_draft(case, rows)
        block = dk.draft_block(**part.arguments())
        for row, request in enumerate(rows):
            assert _same(_draft_bits(block, row), _draft_bits(whole, request)), (rows, request)
            assert state is None or torch.equal(part.head_state[row], state[request])


@pytest.mark.parametrize("options", PHASES, ids=str)
def test_forms_of_a_draft_block_agree(monkeypatch, options):
    """One launch by one program, one launch by programs that meet at barriers, a launch for each phase: the same bits."""
    from dspark_kernels.kernels.draft import dense as kernels
    from dspark_kernels.testing import interpreter

    if not interpreter.interpreting():
        pytest.skip("programs run together on a GPU anyway")
    case = cases.draft_case(seed=54, requests=3, drafts=2, vocab=200, rank=20, dtype=torch.bfloat16, **options)
    workspace = dk.Workspace(3, 2, 200, "cpu", markov_rank=20)
    pick, config = draft_launch.pick, dict(block_v=64, block_j=16, block_n=32)
    monkeypatch.setattr(draft_launch, "pick", lambda *a: dataclasses.replace(pick(*a), **config))
    grids, kernel = [], kernels.draft_dense_kernel
    monkeypatch.setattr(kernels, "draft_dense_kernel", type("", (), {"__getitem__": lambda _, g: grids.append(g) or kernel[g]})())

    def run():
        workspace.scratch.fill_(-1)
        state = None if case.head_state is None else case.head_state.clone()
        block = dk.draft_block(**case.arguments() | dict(head_state=state), workspace=workspace)
        assert (workspace.counters[2:] == 0).all(), "counters were not left clean"
        return [*_draft_bits(block, slice(None)), block.flags, state]

    want = run()
    monkeypatch.setattr(arch, "INTERPRETER", dataclasses.replace(arch.INTERPRETER, multiprocessors=4))
    with interpreter.threads(4):
        assert _same(run(), want)
    assert grids == [(1,), (4,)]
    config["one_launch"] = False
    assert _same(run(), want)
    mixed, filtered = "kind" in options, "filters" in options
    assert grids[2:] == [(4,)] * (mixed + 2 * (1 + mixed + filtered) + 1)


@pytest.mark.parametrize("policy", ["causal", "stale"])
def test_schedule_prefixes_with_many_programs(monkeypatch, policy):
    """Programs that run at once store the same words in the same places, and none reads what another has not written."""
    from dspark_kernels.testing import interpreter

    if not interpreter.interpreting():
        pytest.skip("programs run together on a GPU anyway")
    given = schedule_arguments(8, 13, 7, policy, kind="steps", coarse=True)
    workspace = dk.Workspace(16, 8, 1000, "cpu")
    want = dk.schedule_prefixes(**given, workspace=workspace)
    pick = schedule_launch.pick
    monkeypatch.setattr(schedule_launch, "pick", lambda *a: dataclasses.replace(pick(*a), sort=32, block=32))
    with interpreter.threads(8):
        for _ in range(3):
            workspace.scratch.fill_(-1)
            assert_same(dk.schedule_prefixes(**given, workspace=workspace), want)


@pytest.mark.parametrize(
    "proposal, rule", [("dense", "token"), ("one_hot", "token"), ("sparse", "token"), ("dense", "block"), ("one_hot", "coupled")]
)
def test_accept_chain_in_any_batch(proposal, rule):
    case = cases.accept_case(seed=60, requests=9, drafts=4, vocab=2100, proposal=proposal, closeness=0.9, rule=rule)
    whole = dk.accept_chain(**case.arguments())
    lens = case.layout.draft_lens
    for rows in ([3], [8, 3, 0], list(range(8, -1, -1))):
        index = torch.tensor(rows)
        tokens = torch.full((len(rows), 4), -1, dtype=torch.int64)
        logits, anchors, positions = [], [], []
        for row, r in enumerate(rows):
            first = int(case.layout.query_start_loc[r])
            tokens[row, : lens[r]] = case.layout.token_ids[first + 1 : first + 1 + int(lens[r])]
            anchors.append(int(case.layout.token_ids[first]))
            positions.append(int(case.layout.positions[first]))
            logits.append(case.target_logits[first : first + 1 + int(lens[r])])
        block = dk.DraftBlock(tokens, dk.OneHotProposal(), torch.zeros(len(rows), dtype=torch.int32))
        layout = layouts.fixed_layout(block, lens[index], anchors=torch.tensor(anchors), anchor_positions=torch.tensor(positions))
        given = dk.OneHotProposal()
        if proposal == "dense":
            given = dk.DenseProposal(case.proposal.logits[index])
        elif proposal == "sparse":
            given = dk.SparseProposal(case.proposal.ids[index], case.proposal.logits[index])
        sampling = dk.SamplingTensors(case.sampling.temperature[index], case.sampling.seed[index])
        part = dk.accept_chain(torch.cat(logits), layout, given, sampling=sampling, rule=rule)
        assert torch.equal(part.tokens, whole.tokens[index]) and torch.equal(part.flags, whole.flags[index])


TREE = ("tokens", "parents", "depths", "first_child", "next_sibling", "ancestors", "num_nodes", "flags")


def _tree(case, method, branching=(3, 2), num_nodes=9, workspace=None):
    given = dict(head=case.head, anchor_positions=case.anchor_positions, sampling=case.sampling, hidden=case.hidden)
    shape = dict(method=method, num_nodes=num_nodes, branching=branching)
    tree = dk.draft_tree(case.base_logits, case.anchors, **given, **shape, workspace=workspace)
    parts = [getattr(tree, name) for name in TREE]
    return parts + [tree.proposal.logits] if method != "top_k" else parts


@pytest.mark.parametrize("method, kind", [("top_k", "gated"), ("iid", "vanilla"), ("without_replacement", "rnn")])
def test_draft_tree_in_any_batch(method, kind):
    case = cases.draft_case(seed=55, requests=9, drafts=2, vocab=1100, rank=24, dtype=torch.bfloat16, kind=kind, confidence=None)
    whole = _tree(case, method)
    for rows in ([4], [8, 4], list(range(8, -1, -1))):
        part = _tree(_take_draft(case, rows), method)
        for row, request in enumerate(rows):
            assert _same([bits[row] for bits in part], [bits[request] for bits in whole]), (rows, request)


@pytest.mark.parametrize("method, kind", [("top_k", "vanilla"), ("iid", "gated")])
def test_draft_tree_with_all_programs_at_once(method, kind):
    """The phases: programs that wait for the ones before them."""
    from dspark_kernels.testing import interpreter

    if not interpreter.interpreting():
        pytest.skip("programs run together on a GPU anyway")
    case = cases.draft_case(seed=56, requests=2, drafts=2, vocab=1500, rank=8, kind=kind, confidence=None)
    workspace = dk.Workspace(2, 8, 1500, "cpu", markov_rank=8)
    want = _tree(case, method, (2, 1), 5)
    with interpreter.threads(32):
        for _ in range(2):
            workspace.scratch.fill_(-1)
            assert _same(_tree(case, method, (2, 1), 5, workspace), want)
            assert (workspace.counters == 0).all(), "counters were not left clean"


@pytest.mark.parametrize(
    "rule, drawn, options",
    [
        ("walk", "one_hot", dict(filters=cases.FILTERS)),
        ("traversal", "without_replacement", dict(proposal="mapped", adjust=cases.ADJUSTMENTS)),
    ],
)
def test_accept_tree_in_any_batch(rule, drawn, options):
    case = accept_tree_case(60, 4, 4, 1300, drawn, rule, dtype=torch.bfloat16, logprobs="raw", reach=2, **options)
    whole = dk.accept_tree(**case.arguments())
    starts = case.layout.cu_num_logits.tolist()
    first = torch.tensor([int(case.layout.query_start_loc[r]) for r in range(4)])
    for requests in ([3], [2, 0, 3]):
        rows = torch.tensor(requests)
        at = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in requests])

        def pick(value, name=""):
            if dataclasses.is_dataclass(value):
                fields = {f.name: pick(getattr(value, f.name), f.name) for f in dataclasses.fields(value)}
                return dataclasses.replace(value, **fields)
            if not isinstance(value, torch.Tensor) or name == "draft_to_target":
                return value
            return value[at if name == "token_bitmask" else rows]  # noqa: B023

        tree = pick(case.tree)
        positions = case.layout.positions[first[rows]]
        part = dataclasses.replace(
            case, tree=tree, target_logits=case.target_logits[at], sampling=pick(case.sampling),
            layout=layouts.tree_layout(tree, anchor_positions=positions),
        )  # fmt: skip
        have = dk.accept_tree(**part.arguments())
        for name in ("tokens", "path", "num_accepted", "num_rejected", "next_token", "flags", "logprobs"):
            assert torch.equal(getattr(have, name), getattr(whole, name)[rows]), (name, requests)


@pytest.mark.parametrize("mask, window", [("chain", None), ("tree", None), ("full", 50)])
def test_tree_attention_in_any_batch(monkeypatch, mask, window):
    """Alone, with others, in another order, among more padding: the same bits; parts by even shares do not give them."""
    pick = attention_launch.pick
    small = dict(block_n=16, own_block=16, programs=12, min_blocks=1, invariant_parts=4)
    monkeypatch.setattr(attention_launch, "pick", lambda *a: dataclasses.replace(pick(*a), **small))
    case = cases.attention_case(
        seed=70, rows=(3, 1, 9, 0, 20), contexts=(150, 33, 70, 5, 48), mask=mask, window=window, dtype=torch.bfloat16
    )
    for invariant in (True, False):
        whole = dk.tree_attention(**case.arguments(), return_lse=True, batch_invariant=invariant)
        same = True
        for requests, padding in (([0], 0), ([4, 0], 3), ([2, 1, 0, 3, 4], 0)):
            part, index = take_requests(case, requests, padding)
            have = dk.tree_attention(**part.arguments(), return_lse=True, batch_invariant=invariant)
            same &= all(torch.equal(a[: len(index)], b[index]) for a, b in zip(have, whole, strict=True))
        assert same or not invariant
        if mask == "chain" and not invariant:
            assert not same, "the batches were to be cut into other parts"


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(proposal="sparse", rule="block", logprobs="raw"),
        dict(rule="block", mapped=True, draft_vocab=1100),
        dict(rule="coupled", filters=("top_k",), vocab=900),
    ],
)
def test_replay_with_one_workspace_is_identical_and_leaves_it_clean(options):
    case = cases.accept_case(**dict(seed=61, requests=7, drafts=4, vocab=2100, closeness=0.5) | options)
    draft = cases.draft_case(seed=62, requests=7, drafts=4, vocab=2100)
    workspace = dk.Workspace(16, 7, 5000, "cpu")
    first = dk.accept_chain(**case.arguments(), workspace=workspace)
    block = dk.draft_block(**draft.arguments(), workspace=workspace)
    workspace.scratch.fill_(-1)  # what outlives a launch may hold anything
    again = dk.accept_chain(**case.arguments(), workspace=workspace)
    assert torch.equal(again.tokens, first.tokens) and torch.equal(again.commit_mask, first.commit_mask)
    redrawn = dk.draft_block(**draft.arguments(), workspace=workspace)
    assert _same(_draft_bits(redrawn, slice(None)), _draft_bits(block, slice(None)))
    assert (workspace.counters == 0).all()


def test_reset_cleans_an_aborted_workspace():
    draft = cases.draft_case(seed=63, requests=3, drafts=2, vocab=300)
    workspace = dk.Workspace(3, 2, 300, "cpu")
    want = dk.draft_block(**draft.arguments(), workspace=workspace)
    workspace.counters.fill_(2**62)
    workspace.reset()
    assert torch.equal(dk.draft_block(**draft.arguments(), workspace=workspace).tokens, want.tokens)
