"""CUDA graphs on a GPU: capture with out= and workspace=, replay with changed contents, no allocation, no synchronisation."""

import dataclasses

import pytest
import torch

import dspark_kernels as dk
from reference import cases
from reference.cases import accept_tree_case
from reference.schedule import schedule_prefixes
from tests.ops.fields import assert_same, to_device
from tests.ops.schedule_cases import POLICIES, arguments as schedule_arguments

pytestmark = pytest.mark.gpu


def _copy(into, source):
    for field in dataclasses.fields(source):
        value = getattr(source, field.name)
        if isinstance(value, torch.Tensor):
            getattr(into, field.name).copy_(value)
        elif dataclasses.is_dataclass(value):
            _copy(getattr(into, field.name), value)


def _capture(call):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize("sampled", [True, False])
def test_draft_block_in_a_graph(device, sampled):
    make = lambda seed: to_device(cases.draft_case(seed=seed, requests=9, drafts=5, vocab=5000, sampled=sampled), device)  # noqa: E731
    static = make(0)
    workspace = dk.Workspace(9, 5, 5000, device)
    out = dk.draft_block(**static.arguments(), keep_logits=True, workspace=workspace)
    graph = _capture(lambda: dk.draft_block(**static.arguments(), out=out, workspace=workspace))
    for seed in (6, 12):
        fresh = make(seed)
        want = dk.draft_block(**fresh.arguments(), keep_logits=True)
        _copy(static, fresh)
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        assert torch.equal(out.tokens, want.tokens) and torch.equal(out.proposal.logits, want.proposal.logits)
        assert (workspace.counters[2:] == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        dict(kind="gated", w2_dtype=torch.int8),
        dict(kind="rnn", w2_dtype=torch.float8_e4m3fn),
        dict(filters=cases.FILTERS),
        dict(adjust=cases.ADJUSTMENTS, target_vocab=9000),
    ],
    ids=str,
)
def test_heads_and_settings_of_a_draft_block_in_a_graph(device, options):
    """Contents change between replays, the state of an rnn in place; results are those of fresh calls."""
    sizes = dict(requests=9, drafts=5, vocab=5000, dtype=torch.bfloat16, rank=64, scattered=True)
    make = lambda seed: to_device(cases.draft_case(seed=seed, **sizes, **options), device)  # noqa: E731
    static = make(0)
    workspace = dk.Workspace(9, 5, 5000, device, markov_rank=64)
    out = dk.draft_block(**static.arguments(), workspace=workspace)
    graph = _capture(lambda: dk.draft_block(**static.arguments(), out=out, workspace=workspace))
    for seed in (6, 12):
        fresh = make(seed)
        _copy(static, fresh)
        want = dk.draft_block(**fresh.arguments())
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        used = fresh.state_indices.long()
        assert torch.equal(out.tokens[used], want.tokens[used])
        assert torch.equal(out.proposal.logits[used], want.proposal.logits[used])
        assert torch.equal(out.proposal.lse[used], want.proposal.lse[used])
        assert fresh.head_state is None or torch.equal(static.head_state, fresh.head_state)
        assert (workspace.counters[2:] == 0).all()


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_candidates_in_a_graph(device, kind):
    make = lambda seed: to_device(cases.draft_case(seed=seed, requests=9, drafts=5, vocab=5000, kind=kind), device)  # noqa: E731
    static = make(0)
    bigrams = torch.randint(-1, 5000, (5000, 4), device=device)
    options = dict(candidates=40, bigrams=bigrams)
    workspace = dk.Workspace(9, 5, 5000, device, markov_rank=16)
    out = dk.draft_block(**static.arguments(), **options, workspace=workspace)
    graph = _capture(lambda: dk.draft_block(**static.arguments(), **options, out=out, workspace=workspace))
    for seed in (6, 12):
        fresh = make(seed)
        want = dk.draft_block(**fresh.arguments(), **options)
        _copy(static, fresh)
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        assert torch.equal(out.tokens, want.tokens) and torch.equal(out.flags, want.flags)
        assert torch.equal(out.proposal.ids, want.proposal.ids) and torch.equal(out.proposal.logits, want.proposal.logits)
        assert (workspace.counters == 0).all()


@pytest.mark.parametrize("method, kind", [("top_k", "gated"), ("iid", "vanilla"), ("without_replacement", "rnn")])
def test_trees_in_a_graph(device, method, kind):
    """draft_tree, then expand_tree in place."""
    options = dict(requests=9, drafts=4, vocab=5000, kind=kind, confidence=None)
    make = lambda seed: to_device(cases.draft_case(seed=seed, **options), device)  # noqa: E731
    static = make(0)
    workspace = dk.Workspace(9, 19, 5000, device, markov_rank=16)

    def call(case, out=None, workspace=None):
        given = dict(anchor_positions=case.anchor_positions, method=method, sampling=case.sampling, workspace=workspace)
        shape = dict(num_nodes=20, branching=(3, 2), hidden=case.hidden)
        tree = dk.draft_tree(case.base_logits, case.anchors, case.head, **given, **shape, out=out)
        return dk.expand_tree(tree, case.base_logits, **given, depth=2, branching=2, out=tree)

    out = call(static, workspace=workspace)
    graph = _capture(lambda: call(static, out, workspace))
    for seed in (6, 12):
        fresh = make(seed)
        want = call(fresh)
        _copy(static, fresh)
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        for name in ("tokens", "parents", "first_child", "next_sibling", "ancestors", "num_nodes", "flags"):
            assert torch.equal(getattr(out, name), getattr(want, name)), name
        assert (workspace.counters == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        dict(proposal="dense"),
        dict(proposal="one_hot"),
        dict(proposal="sparse", filters=cases.FILTERS, logprobs="raw"),
        dict(proposal="dense", rule="block", mapped=True, draft_vocab=3000),
        dict(proposal="none", rule="coupled", adjust=cases.ADJUSTMENTS, filters=cases.FILTERS),
    ],
)
def test_accept_chain_in_a_graph(device, options):
    make = lambda seed: to_device(cases.accept_case(seed=seed, requests=9, drafts=5, vocab=5000, **options), device)  # noqa: E731
    static = make(0)
    workspace = dk.Workspace(9, 5, 5000, device)
    out = dk.accept_chain(**static.arguments(), workspace=workspace)
    graph = _capture(lambda: dk.accept_chain(**static.arguments(), out=out, workspace=workspace))
    for seed in (1, 2, 3):
        fresh = make(seed)
        want = dk.accept_chain(**fresh.arguments())
        _copy(static, fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out.tokens, want.tokens) and torch.equal(out.commit_mask, want.commit_mask)
        assert (workspace.counters[1:] == 0).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("requests, drafts", [(64, 7), (700, 13)])
def test_schedule_prefixes_in_a_graph(device, policy, requests, drafts):
    def make(seed):
        given = schedule_arguments(seed, requests, drafts, policy, scattered=True, missing=True)
        return {name: to_device(value, device) for name, value in given.items()}

    static = make(0)
    workspace = dk.Workspace(requests, drafts, 5000, device)
    out = dk.schedule_prefixes(**static, workspace=workspace)
    graph = _capture(lambda: dk.schedule_prefixes(**static, out=out, workspace=workspace))
    for seed in (1, 2, 3):
        fresh = make(seed)
        for name, value in fresh.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value)
            elif dataclasses.is_dataclass(value):
                _copy(static[name], value)
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        assert_same(to_device(out, "cpu"), schedule_prefixes(**{k: to_device(v, "cpu") for k, v in fresh.items()}))


@pytest.mark.parametrize("mask", ["chain", "tree"])
@pytest.mark.parametrize("invariant", [False, True])
def test_tree_attention_in_a_graph(device, mask, invariant):
    """Contents, row counts and lengths change between replays; plan and attention are both in the graph."""

    def make(seed):
        g = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, 9, (6,), generator=g).tolist()
        contexts = torch.randint(0, 3000, (6,), generator=g).tolist()
        case = cases.attention_case(
            seed=seed, rows=rows, contexts=contexts, mask=mask, query_heads=8, head_dim=64, page_size=16, dtype=torch.bfloat16,
            scattered=True, padding_rows=48 - sum(rows),
        )  # fmt: skip
        # The same sizes for every seed: tables and pools of the largest.
        kv = case.kv
        pool = torch.zeros(1300, *kv.k_cache.shape[1:], dtype=torch.bfloat16)
        pools = [torch.cat([cache, pool[len(cache) :]]) for cache in (kv.k_cache, kv.v_cache)]
        tables = torch.full((9, 200), 2**31 - 1, dtype=torch.int32)
        tables[:, : kv.block_tables.shape[1]] = kv.block_tables
        return to_device(dataclasses.replace(case, kv=dk.PagedKV(*pools, tables, kv.context_lens)), device)

    static = make(0)
    workspace = dk.Workspace(6, 7, 100, device, query_heads=8, kv_heads=2, head_dim=64, batch_invariant=invariant)
    planning = dict(query_heads=8, batch_invariant=invariant)
    slots = static.state_indices
    plan = dk.plan_attention(static.layout, static.kv, state_indices=slots, **planning)
    out = torch.empty_like(static.q), torch.empty(48, 8, device=device)

    def call():
        dk.plan_attention(static.layout, static.kv, state_indices=slots, out=plan, **planning)
        options = dict(plan=plan, out=out, workspace=workspace, return_lse=True, batch_invariant=invariant)
        dk.tree_attention(**static.arguments(), **options)

    graph = _capture(call)
    for seed in (1, 2, 3, 4):
        fresh = make(seed)
        want = dk.tree_attention(**fresh.arguments(), return_lse=True, batch_invariant=invariant)
        _copy(static, fresh)
        for tensor in out:
            tensor.fill_(float("nan"))
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
        assert (workspace.counters == 0).all()


@pytest.mark.parametrize(
    "rule, drawn, options",
    [
        ("walk", "one_hot", dict(filters=cases.FILTERS, adjust=cases.ADJUSTMENTS)),
        ("recursive", "iid", dict(proposal="sparse", candidates=20)),
        ("traversal", "without_replacement", dict(proposal="mapped", draft_vocab=2000, logprobs="raw")),
    ],
    ids=str,
)
def test_accept_tree_in_a_graph(device, rule, drawn, options):
    """Trees, counts, logits and settings change between replays."""
    make = lambda seed: to_device(_full_rows(accept_tree_case(seed, 7, 9, 5000, drawn, rule, **options)), device)  # noqa: E731
    static = make(0)
    workspace = dk.Workspace(7, 8, 5000, device)
    out = dk.accept_tree(**static.arguments(), workspace=workspace)
    graph = _capture(lambda: dk.accept_tree(**static.arguments(), out=out, workspace=workspace))
    for seed in (1, 2, 3):
        fresh = make(seed)
        want = dk.accept_tree(**fresh.arguments())
        _copy(static, fresh)
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        for field in dataclasses.fields(want):
            if getattr(want, field.name) is not None:
                assert torch.equal(getattr(out, field.name), getattr(want, field.name)), field.name
        assert (workspace.counters == 0).all()


def _full_rows(case):
    """The same with a row of target logits for every node that there may be."""
    requests, nodes = case.tree.tokens.shape
    missing = requests * nodes - len(case.target_logits)
    rows = lambda t: torch.cat([t, torch.zeros(missing, *t.shape[1:], dtype=t.dtype)])  # noqa: E731
    sampling = case.sampling
    if sampling.token_bitmask is not None:
        sampling = dataclasses.replace(sampling, token_bitmask=rows(sampling.token_bitmask))
    return dataclasses.replace(case, target_logits=rows(case.target_logits), sampling=sampling)
