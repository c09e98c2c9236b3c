"""Registration: schemas from records, opcheck, torch.compile(fullgraph=True), constants that kernels repeat, types that check themselves."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import dspark_kernels as dk
from dspark_kernels import choices, library, scheduling
from dspark_kernels.ops import compact
from dspark_kernels.ops.accept import chain as accept, tree
from dspark_kernels.ops.attention import plan as attention_plan, tree as attention
from dspark_kernels.ops.draft import candidates, dense as draft
from dspark_kernels.ops.draft_tree import best_first as tree_paths, static as tree_draft
from dspark_kernels.ops.layout import fixed as layout, schedule
from reference import cases
from tests.blocks import anchored, block_of, ints, tree_of


class _Inner(NamedTuple):
    weight: Tensor | None
    scores: library.Out[Tensor | None]


class _Arguments(NamedTuple):
    logits: Tensor
    inner: _Inner
    caches: library.Out[list[Tensor]]
    parts: list[Tensor]
    widths: list[int]
    tokens: library.Out[Tensor]
    rule: str
    name: str | None
    count: int
    level: int | None
    scale: float
    softcap: float | None
    joint: bool


def test_an_op_has_the_fields_of_its_record():
    """Those of a record inside stand in its place; letters name what is written."""
    assert library.schema_of(_Arguments) == (
        "Tensor logits, Tensor? weight, Tensor(a!)? scores, Tensor(b!)[] caches, Tensor[] parts, int[] widths, Tensor(c!) tokens, "
        "str rule, str? name, int count, int? level, float scale, float? softcap, bool joint"
    )
    parsed = torch._C.parse_schema(f"op({library.schema_of(_Arguments)}) -> ()")
    assert [a.name for a in parsed.arguments if a.alias_info and a.alias_info.is_write] == ["scores", "caches", "tokens"]
    values = (1, _Inner(2, 3), [4, 5], [], [6], 7, "r", None, 8, None, 0.5, None, True)
    flat = library.flattener(_Arguments)(_Arguments(*values))
    assert flat == (1, 2, 3, [4, 5], [], [6], 7, "r", None, 8, None, 0.5, None, True)
    assert library._rebuilder(_Arguments)(iter(flat)) == values


def _calls(monkeypatch, module, name, run):
    """An op as torch knows it, and the values with which `run` reaches it."""
    seen, registered = [], getattr(module, name)
    keep = lambda arguments: (seen.append(registered.values(arguments)), registered(arguments))[1]  # noqa: E731
    monkeypatch.setattr(module, name, keep)
    run()
    return registered.op, seen


def _draft(**case):
    return lambda: dk.draft_block(**cases.draft_case(requests=2, drafts=2, vocab=130, **case).arguments(), keep_logits=True)


def _candidates(successors=0, **case):
    made = cases.draft_case(requests=2, drafts=2, vocab=130, **case)
    options = dict(candidates=5, bigrams=torch.zeros(130, successors, dtype=torch.int32) if successors else None)
    return lambda: dk.draft_block(**made.arguments(), **options, keep_logits=True)


def _accept(**case):
    return lambda: dk.accept_chain(**cases.accept_case(requests=2, drafts=2, vocab=130, **case).arguments())


def _layout():
    dk.fixed_layout(block_of([[0.9, 0.5]] * 2), torch.tensor([1, 2]), **anchored(2))


def _tree_layout():
    dk.tree_layout(tree_of([[(5, -1), (6, 0)], [(7, -1)]]), anchor_positions=torch.tensor([3, 4]))


def _draft_layout():
    dk.draft_layout(**anchored(2), block_size=3, mask_token_id=9, block_tables=ints(0, 1).reshape(2, 1), page_size=8)


def _schedule(requests=2, **options):
    block = block_of([[0.9, 0.5, 0.4]] * requests)
    return lambda: dk.schedule_prefixes(block, dk.CostTable(torch.ones(9)), **anchored(requests), **options)


def _attention(**case):
    """The attention with a plan that was there before, so that it is one launch."""
    made = cases.attention_case(**case)
    plan = dk.plan_attention(made.layout, made.kv, query_heads=6, window=made.window)
    return lambda: dk.tree_attention(**made.arguments(), plan=plan, return_lse=True)


def _plan():
    made = cases.attention_case()
    dk.plan_attention(made.layout, made.kv, query_heads=6)


def _accept_tree(*rule, **options):
    from reference.cases import accept_tree_case

    return lambda: dk.accept_tree(**accept_tree_case(1, 2, 4, 40, *rule, **options).arguments())


def _draft_tree(method, **case):
    made = cases.draft_case(requests=2, drafts=2, vocab=130, confidence=None, **case)
    given = dict(anchors=made.anchors, head=made.head, anchor_positions=made.anchor_positions, hidden=made.hidden)
    shape = dict(method=method, num_nodes=5, branching=(2, 1), sampling=made.sampling)
    return lambda: dk.draft_tree(made.base_logits, **given, **shape)


def _expand_tree(method):
    from reference.tree_draft import draft_tree

    made = cases.draft_case(requests=2, drafts=2, vocab=130, rank=0, confidence=None)
    given = dict(anchor_positions=made.anchor_positions, method=method, sampling=made.sampling)
    tree = draft_tree(made.base_logits, made.anchors, **given, num_nodes=5, branching=(2,))
    return lambda: dk.expand_tree(tree, made.base_logits, depth=1, branching=1, **given, out=tree)


def _draft_paths(nodes=5, **options):
    made = cases.draft_case(seed=2, requests=2, drafts=2, vocab=130, **options.pop("case", {}))
    arguments = {name: value for name, value in made.arguments().items() if name in TREE}
    return lambda: dk.draft_tree(**arguments, num_nodes=nodes, **options)


TREE = ("base_logits", "anchors", "anchor_positions", "head", "hidden", "confidence", "sampling", "state_indices")


def _compact():
    from tests.ops.compact_cases import case_of

    case = case_of(4, 2, 9, 4, ("plain", "apart"), extra=2)
    dk.compact_kv(dk.KVLayers.of([case.caches]), case.acceptance, case.layout, extra=case.extra)


# Every op, by the module and name that it has there, and calls of it that differ in what they are made of.
CALLS = [
    (draft, "_draft_block", _draft()),
    (draft, "_draft_block", _draft(sampled=False, rank=0, confidence=None)),
    (draft, "_draft_block", _draft(kind="gated", w2_dtype=torch.int8, target_vocab=300)),
    (draft, "_draft_block", _draft(kind="rnn", adjust=cases.ADJUSTMENTS, filters=cases.FILTERS, padded=True)),
    (candidates, "_draft_candidates", _candidates()),
    (candidates, "_draft_candidates", _candidates(2, sampled=False, kind="rnn")),
    (accept, "_accept_chain", _accept()),
    (accept, "_accept_chain", _accept(sampled=False, proposal="none")),
    (accept, "_accept_chain", _accept(rule="block", proposal="sparse", logprobs="raw", adjust=cases.ADJUSTMENTS)),
    (accept, "_accept_chain", _accept(rule="coupled", filters=cases.FILTERS, logprobs="processed", forced=True)),
    (layout, "_fixed_layout", _layout),
    (layout, "_fixed_layout", _tree_layout),
    (layout, "_draft_layout", _draft_layout),
    (tree, "_accept_tree", _accept_tree("one_hot", "walk")),
    (tree, "_accept_tree", _accept_tree("without_replacement", "traversal", proposal="mapped", filters=cases.FILTERS)),
    (tree, "_accept_tree", _accept_tree("iid", "recursive", proposal="sparse", adjust=cases.ADJUSTMENTS, logprobs="raw")),
    (tree_draft, "_draft_tree", _draft_tree("top_k")),
    (tree_draft, "_draft_tree", _draft_tree("iid", kind="rnn")),
    (tree_draft, "_draft_tree", _expand_tree("without_replacement")),
    (tree_paths, "_draft_paths", _draft_paths(candidates=9, case=dict(kind="rnn"))),
    (tree_paths, "_draft_paths", _draft_paths(method="best_first", case=dict(sampled=False, confidence=None))),
    (tree_paths, "_draft_paths_dense", _draft_paths(node_budgets=ints(3, 1), case=dict(kind="gated", w2_dtype=torch.int8))),
    (compact, "_compact_kv", _compact),
    (schedule, "_schedule_prefixes", _schedule()),
    (schedule, "_schedule_prefixes", _schedule(policy="budget", budget=ints(2), max_len=ints(1, 3))),
    (schedule, "_schedule_prefixes", _schedule(600, policy="budget", stale_confidence=torch.ones(600, 3))),
    (attention_plan, "_plan_attention", _plan),
    (attention, "_tree_attention", _attention()),
    (attention, "_tree_attention", _attention(mask="tree", cached=True, window=5, softcap=2.0, sinks=True)),
]
# What torch asks of an op. The last two look at the op alone, so one call of each is enough for them.
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("module, name, run", CALLS)
def test_opcheck(monkeypatch, module, name, run):
    registered, calls = _calls(monkeypatch, module, name, run)
    assert len(calls) == 1, "one launch per call"
    first = next(call for _, other, call in CALLS if other == name)
    torch.library.opcheck(registered, calls[0], test_utils=CHECKS if run is first else CHECKS[:2])


COST = dk.CostTable(0.1 + 0.01 * torch.arange(20))  # made once, not in every step


def _round(base_logits, target_logits, anchors, positions, hidden, temperature, seed, w1, w2, weight):
    sampling = dk.SamplingTensors(temperature, seed)
    block = dk.draft_block(
        base_logits, anchors, dk.MarkovHead(w1, w2), anchor_positions=positions, sampling=sampling, hidden=hidden,
        confidence=dk.ConfidenceHead(weight),
    )  # fmt: skip
    layout = dk.schedule_prefixes(block, COST, anchors=anchors, anchor_positions=positions)
    acceptance = dk.accept_chain(target_logits, layout, block.proposal, sampling=sampling)
    return block.tokens, layout.token_ids, acceptance.tokens, acceptance.commit_mask


def test_candidates_compile_into_one_graph():
    case = cases.draft_case(seed=6, requests=2, drafts=2, vocab=130)

    def step(base_logits, hidden, temperature, seed):
        sampling = dk.SamplingTensors(temperature, seed)
        arguments = case.arguments() | dict(base_logits=base_logits, hidden=hidden, sampling=sampling)
        block = dk.draft_block(**arguments, candidates=9)
        return block.tokens, block.proposal.ids, block.proposal.logits, block.confidence

    arguments = case.base_logits, case.hidden, case.sampling.temperature, case.sampling.seed
    have = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(have, step(*arguments), strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend):
    case = cases.draft_case(seed=6, requests=3, drafts=4, vocab=300)
    arguments = (
        case.base_logits, torch.randn(15, 300), case.anchors, case.anchor_positions, case.hidden, case.sampling.temperature,
        case.sampling.seed, case.head.w1, case.head.w2, case.confidence.weight,
    )  # fmt: skip
    want = _round(*arguments)
    have = torch.compile(_round, fullgraph=True, backend=backend)(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def _filtered(base_logits, anchors, positions, hidden, temperature, seed, top_p, bias, ids, state, *weights):
    sampling = dk.SamplingTensors(temperature, seed, top_p=top_p, logit_bias=bias)
    head = dk.RnnMarkovHead(*weights[:2], joint_weight=weights[2], joint_bias=weights[3])
    block = dk.draft_block(
        base_logits, anchors, head, anchor_positions=positions, sampling=sampling, hidden=hidden, draft_to_target=ids,
        head_state=state,
    )  # fmt: skip
    return block.tokens, block.proposal.logits, block.proposal.lse, state


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_heads_and_filters_compile_into_one_graph(backend):
    options = dict(kind="rnn", target_vocab=200, filters={"top_p"}, adjust={"bias"})
    case = cases.draft_case(seed=7, requests=2, drafts=2, vocab=130, **options)
    head, sampling = case.head, case.sampling

    def arguments():
        return (
            case.base_logits, case.anchors, case.anchor_positions, case.hidden, sampling.temperature, sampling.seed, sampling.top_p,
            sampling.logit_bias, case.draft_to_target, case.head_state.clone(), head.w1, head.w2, head.joint_weight,
            head.joint_bias,
        )  # fmt: skip

    have = torch.compile(_filtered, fullgraph=True, backend=backend)(*arguments())
    assert all(torch.equal(a, b) for a, b in zip(have, _filtered(*arguments()), strict=True))


def _layer(q, k_cache, v_cache, tables, lens, k_new, v_new, sinks, like):
    """Two layers that share a plan."""
    kv = dk.PagedKV(k_cache, v_cache, tables, lens)
    plan = dk.plan_attention(like, kv, query_heads=q.shape[1])
    out = dk.tree_attention(q, kv, like, k_new=k_new, v_new=v_new, plan=plan)
    return dk.tree_attention(out, kv, like, k_new=k_new, v_new=v_new, sinks=sinks, plan=plan, return_lse=True)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_attention_compiles_into_one_graph(backend):
    case = cases.attention_case(seed=7, sinks=True, padding_rows=1)
    kv = case.kv
    arguments = (case.q, kv.k_cache, kv.v_cache, kv.block_tables, kv.context_lens, case.k_new, case.v_new, case.sinks)
    have = torch.compile(_layer, fullgraph=True, backend=backend)(*arguments, case.layout)
    assert all(torch.equal(a, b) for a, b in zip(have, _layer(*arguments, case.layout), strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_acceptance_of_trees_compiles_into_one_graph(backend):
    from reference.cases import accept_tree_case

    case = accept_tree_case(2, 2, 5, 60, "without_replacement", "traversal", adjust=("presence",), filters=("top_p",))

    def step(target_logits, tree, layout, sampling, anchors, positions):
        accepted = dk.accept_tree(
            target_logits, layout, tree, sampling=sampling, rule=case.rule, anchors=anchors, anchor_positions=positions
        )
        return accepted.tokens, accepted.path, accepted.kv_source, accepted.commit_mask, anchors, positions

    def arguments():
        return case.target_logits, case.tree, case.layout, case.sampling, *torch.zeros(2, 2, dtype=torch.int64)

    have = torch.compile(step, fullgraph=True, backend=backend)(*arguments())
    assert all(torch.equal(a, b) for a, b in zip(have, step(*arguments()), strict=True))


def _grown(base_logits, node_logits, target_logits, anchors, positions, temperature, seed, w1, w2):
    """A round with a tree: two depths by the head, one by a forward pass of its own."""
    sampling = dk.SamplingTensors(temperature, seed)
    given = dict(anchor_positions=positions, method="without_replacement", sampling=sampling)
    tree = dk.draft_tree(base_logits, anchors, dk.MarkovHead(w1, w2), **given, num_nodes=7, branching=(2, 1))
    tree = dk.expand_tree(tree, node_logits, **given, depth=2, branching=1)
    layout = dk.tree_layout(tree, anchor_positions=positions)
    acceptance = dk.accept_tree(target_logits, layout, tree, sampling=sampling, rule="recursive")
    return tree.tokens, tree.ancestors, tree.proposal.logits, acceptance.tokens


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_trees_compile_into_one_graph(backend):
    case = cases.draft_case(seed=8, requests=2, drafts=2, vocab=130, confidence=None)
    g = torch.Generator().manual_seed(0)
    arguments = (
        case.base_logits, torch.randn(2, 2, 130, generator=g), torch.randn(14, 130, generator=g), case.anchors,
        case.anchor_positions, case.sampling.temperature, case.sampling.seed, case.head.w1, case.head.w2,
    )  # fmt: skip
    want = _grown(*arguments)
    assert int((want[0] >= 0).sum(1).min()) == 7
    have = torch.compile(_grown, fullgraph=True, backend=backend)(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_compaction_compiles_into_one_graph():
    """Caches written in place through their addresses, among other writes to them."""
    from tests.ops.compact_cases import bytes_of, case_of

    def step(layers, acceptance, layout):
        layers.caches[0].mul_(2)
        dk.compact_kv(layers, acceptance, layout)
        layers.caches[1].mul_(2)
        return layers.caches[0] + 1

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        case = case_of(4, 2, 9, 4)
        finite = [plane.nan_to_num_(0.0).clamp_(-9, 9) for plane in case.caches]
        results.append([call(dk.KVLayers.of([finite]), case.acceptance, case.layout), *finite])
    assert all(torch.equal(bytes_of(a), bytes_of(b)) for a, b in zip(*results, strict=True))


def test_constants_of_kernels_are_the_public_ones():
    from dspark_kernels.kernels import sizes
    from dspark_kernels.kernels.accept import tree_rules
    from dspark_kernels.kernels.attention import plan as attention_kernels
    from dspark_kernels.kernels.draft import filters as draft_filters
    from dspark_kernels.kernels.layout import schedule as schedule_kernels
    from dspark_kernels.kernels.primitives import constants, philox

    assert all(getattr(constants, flag.name).value == flag for flag in dk.Flag)
    assert all(getattr(philox, stream.name).value == stream for stream in dk.Stream)
    shared = [name for name in vars(sizes) if name.isupper()]
    assert shared and all(getattr(constants, name).value == getattr(sizes, name) for name in shared)
    assert attention_kernels.TREE_SLOTS.value == attention.MAX_NODES
    assert sizes.MAX_GROUP == 2 * sizes.SUB_BLOCK and sizes.FILTER_LIST == draft_filters.TILE.value * sizes.MAX_GROUP
    assert [tree_rules.WALK.value, tree_rules.RECURSIVE.value, tree_rules.TRAVERSAL.value] == [0, 1, 2]
    assert choices.TREE_RULES == ("walk", "recursive", "traversal")
    assert schedule_kernels.SURVIVAL_ONE.value == schedule.SURVIVAL_ONE == scheduling.UNIT
    assert schedule_kernels.FORCED.value == scheduling.FORCED and schedule_kernels.COST_LIMIT.value == scheduling.COST_LIMIT


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: dk.MarkovHead(torch.zeros(5, 0), torch.zeros(5, 0)), ValueError, "MarkovHead.w1: expected rank >= 1"),
        (lambda: dk.MarkovHead(torch.zeros(5, 2), torch.zeros(5, 3)), ValueError, "MarkovHead.w2: expected shape"),
        (lambda: dk.MarkovHead(torch.zeros(5, 2), torch.zeros(5, 2).char()), ValueError, "MarkovHead.w2_scale: expected"),
        (
            lambda: dk.SamplingTensors(torch.zeros(2), torch.zeros(2)),
            TypeError,
            "SamplingTensors.seed: expected dtype int32 or int64",
        ),
        (lambda: dk.SamplingTensors(torch.zeros(2), torch.zeros(3).long()), ValueError, "SamplingTensors.seed: expected shape"),
        (lambda: dk.DenseProposal(torch.zeros(2, 3)), ValueError, "DenseProposal.logits: expected shape"),
        (lambda: dk.DenseProposal(torch.zeros(2, 3, 4), lse=torch.zeros(2)), ValueError, "DenseProposal.lse: expected shape"),
        (lambda: dk.CostTable(torch.tensor([0.0, -1.0])), ValueError, "CostTable.seconds: expected finite, positive"),
        (lambda: dk.CostTable(None), TypeError, "CostTable.seconds: expected a torch.Tensor"),
        (lambda: dk.ConfidenceHead(torch.zeros(2, 2)), ValueError, "ConfidenceHead.weight: expected shape"),
        (lambda: dk.Workspace(0, 1, 1, "cpu"), ValueError, "max_requests: expected >= 1, got 0"),
        (lambda: dk.Workspace(1, 1, 1, "cpu", kv_heads=2, head_dim=8), TypeError, "query_heads: expected an int, got NoneType"),
        (lambda: dk.Workspace(1.5, 1, 1, "cpu"), TypeError, "max_requests: expected an int"),
    ],
)
def test_types_check_themselves(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(message)
