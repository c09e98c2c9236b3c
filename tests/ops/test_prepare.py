"""Prepared calls: the bits of the plain call for every op, nothing launched before, nothing allocated later, refusals by name."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dspark_kernels as dk
from dspark_kernels import library
from reference import cases
from reference.cases import accept_tree_case
from tests.blocks import anchored, block_of, ints
from tests.ops.compact_cases import bytes_of, case_of
from tests.ops.fields import assert_same, poisoned
from tests.ops.schedule_cases import arguments as schedule_arguments


def copied(value, change=lambda tensor: tensor):
    """The same with tensors of their own, changed."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(change(value))
    if isinstance(value, dk.KVLayers):
        return value
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{f.name: copied(getattr(value, f.name), change) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {name: copied(part, change) for name, part in value.items()}
    return tuple(copied(part, change) for part in value) if isinstance(value, (tuple, list)) else value


def reversed_rows(tensor):
    """Other values of the same range: of logits, weights, caches, confidences."""
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return tensor
    return tensor.view(torch.uint8).flip(0).view(tensor.dtype) if tensor.element_size() == 1 else tensor.flip(0)


def same_bits(have, want):
    have, want = tensors_of(have), tensors_of(want)
    assert [tensor.dtype for tensor in have] == [tensor.dtype for tensor in want]
    assert all(torch.equal(bytes_of(a), bytes_of(b)) for a, b in zip(have, want, strict=True))


def has_tensors(value):
    if dataclasses.is_dataclass(value):
        return any(has_tensors(getattr(value, field.name)) for field in dataclasses.fields(value))
    return isinstance(value, torch.Tensor) or (isinstance(value, (tuple, list)) and any(map(has_tensors, value)))


def changing(arguments):
    """Those with tensors."""
    return {name: value for name, value in arguments.items() if has_tensors(value)}


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_of(part)] if isinstance(value, (tuple, list)) else []


def _accept(**options):
    def arguments(seed):
        case = cases.accept_case(seed=seed, requests=2, drafts=2, vocab=130, **options)
        slots = len(case.sampling.temperature) if case.sampling is not None else 2
        return case.arguments() | dict(anchors=torch.arange(slots) + seed, anchor_positions=torch.arange(slots).int() + 7)

    return dk.accept_chain, arguments


def _accept_tree(*rule, **options):
    return dk.accept_tree, lambda seed: accept_tree_case(seed, 2, 4, 40, *rule, **options).arguments()


def _draft(vocab_size=None, candidates=None, listed=0, **case):
    def arguments(seed):
        given = cases.draft_case(seed=seed, requests=2, drafts=2, vocab=130, **case).arguments()
        if listed:
            given["bigrams"] = torch.randint(-1, 130, (130, listed), generator=torch.Generator().manual_seed(seed))
        return given | dict(vocab_size=vocab_size, candidates=candidates)

    return dk.draft_block, arguments


def _schedule(requests=3, policy="causal"):
    return dk.schedule_prefixes, lambda seed: schedule_arguments(3 * seed, requests, 5, policy, scattered=True)


def _fixed(seed):
    block = block_of([[0.9, 0.5, 0.4]] * 2, torch.arange(6).reshape(2, 3) + seed)
    return dict(block=block, draft_lens=torch.tensor([seed, 2]), **anchored(2))


def _draft_layout(seed):
    pages = dict(block_tables=ints(seed, 5).reshape(2, 1), page_size=8)
    return dict(**anchored(2), block_size=3, mask_token_id=9, **pages)


TREE = ("base_logits", "anchors", "anchor_positions", "head", "hidden", "sampling", "state_indices")


def _grow(method, **options):
    def arguments(seed):
        case = cases.draft_case(seed=seed, requests=2, drafts=2, vocab=130, confidence=None, **options)
        shape = dict(branching=(2, 1)) if method in ("top_k", "iid", "without_replacement") else {}
        return {name: getattr(case, name) for name in TREE} | dict(method=method, num_nodes=5, **shape)

    return dk.draft_tree, arguments


def _tree_layout(seed):
    return dict(tree=dk.draft_tree(**_grow("top_k")[1](seed)), anchor_positions=torch.tensor([3, 4]) + seed)


def _attention_plan(seed):
    case = cases.attention_case(seed=seed)
    return dict(layout=case.layout, kv=case.kv, query_heads=6)


def _attention(planned=True, **options):
    def arguments(seed):
        case = cases.attention_case(seed=seed, **options)
        plan = dk.plan_attention(case.layout, case.kv, query_heads=6, window=case.window) if planned else None
        return case.arguments() | dict(plan=plan, return_lse=True)

    return dk.tree_attention, arguments


OPS = {
    "accept dense": _accept(),
    "accept greedy": _accept(sampled=False, proposal="none"),
    "accept sparse": _accept(proposal="sparse", rule="block", logprobs="raw", scattered=True),
    "accept mapped": _accept(mapped=True, draft_vocab=90, rule="block"),
    "accept settings": _accept(adjust=cases.ADJUSTMENTS, filters=cases.FILTERS, logprobs="processed"),
    "accept tree": _accept_tree("without_replacement", "traversal"),
    "accept tree walk": _accept_tree("one_hot", "walk", adjust=cases.ADJUSTMENTS, scattered=True),
    "draft": _draft(),
    "draft greedy": _draft(sampled=False, rank=0, confidence=None),
    "draft padded": _draft(vocab_size=120, confidence=None),
    "draft gated fp8": _draft(kind="gated", w2_dtype=torch.float8_e4m3fn, scattered=True),
    "draft rnn settings": _draft(kind="rnn", adjust=cases.ADJUSTMENTS, filters=cases.FILTERS),
    "candidates": _draft(candidates=5),
    "candidates rnn": _draft(candidates=5, listed=2, kind="rnn"),
    "schedule": _schedule(),
    "schedule budget": _schedule(policy="budget"),
    "schedule stale": _schedule(policy="stale"),
    "fixed layout": (dk.fixed_layout, _fixed),
    "draft layout": (dk.draft_layout, _draft_layout),
    "tree layout": (dk.tree_layout, _tree_layout),
    "top_k": _grow("top_k"),
    "iid rnn": _grow("iid", kind="rnn"),
    "best first": _grow("best_first", scattered=True),
    "conditioned": _grow("conditioned", kind="gated"),
    "plan": (dk.plan_attention, _attention_plan),
    "attention": _attention(mask="tree", sinks=True),
    "attention cached": _attention(cached=True, window=5, softcap=2.0),
    "attention without a plan": _attention(planned=False),
}


# What they write does not depend on floats.
SAME = ("fixed layout", "draft layout", "tree layout", "plan")


@pytest.fixture
def launches(monkeypatch):
    """The names of the launchers that prepared calls run."""
    found = []

    class Counted(library._Recorded):
        def __init__(self, module, record):
            def counted(launcher, args, options):
                record(lambda *args, **options: (found.append(launcher.__name__), launcher(*args, **options)), args, options)

            super().__init__(module, counted)

    monkeypatch.setattr(library, "_Recorded", Counted)
    return found


@pytest.mark.parametrize("name", OPS)
def test_a_prepared_call_has_the_bits_of_the_plain_one(name):
    """With other tensors each time; what is written in place as well; the outputs stay the same tensors."""
    op, arguments = OPS[name]
    example = arguments(1)
    prepared = dk.prepare(op, **copied(example))
    differ = []
    for change in (lambda tensor: tensor, reversed_rows):
        plain = copied(example, change)
        given = changing(copied(plain))
        want = op(**plain)
        have = prepared(**given)
        assert have is prepared.out
        same_bits([have, given], [want, changing(plain)])
        differ.append([tensor.clone() for tensor in tensors_of(want)])
    assert name in SAME or not all(torch.equal(a, b) for a, b in zip(*differ, strict=True))


def test_a_prepared_call_keeps_what_it_is_not_given():
    op, arguments = _accept(logprobs="raw")
    example = arguments(1) | dict(anchors=None, anchor_positions=None)
    prepared = dk.prepare(op, **example)
    logits = arguments(2)["target_logits"]
    assert_same(prepared(target_logits=logits), op(**example | dict(target_logits=logits)))
    assert_same(prepared(), op(**example))


def test_an_out_and_a_workspace_of_the_caller_are_used():
    op, arguments = _accept()
    workspace = dk.Workspace(2, 2, 130, "cpu")
    out, other = op(**arguments(1)), op(**arguments(1))
    prepared = dk.prepare(op, **arguments(1), out=out, workspace=workspace)
    workspace.scratch.fill_(-1)
    assert prepared() is out and (workspace.scratch != -1).any() and (workspace.counters[1:] == 0).all()
    want = op(**arguments(2))
    given = changing(arguments(2))
    assert prepared(**given, out=other) is other
    assert_same(other, want)


def test_preparing_launches_and_writes_nothing(launches):
    op, arguments = _accept()
    example = arguments(1)
    before, out = copied(example), poisoned(op(**arguments(1)))
    prepared = dk.prepare(op, **example, out=out)
    assert launches == [] and (out.tokens == -77777).all()
    same_bits(example, before)
    prepared()
    prepared()
    assert launches == ["launch_accept_chain"] * 2


def test_a_call_allocates_nothing(monkeypatch):
    op, arguments = _accept()
    prepared = dk.prepare(op, **arguments(1))
    given = changing(arguments(2))
    for launch in ("empty", "zeros", "full"):
        monkeypatch.setattr(torch, launch, lambda *args, **options: pytest.fail("allocates"))
    monkeypatch.setattr(prepared, "_launches", {(): lambda tensors: None})
    prepared(**given)


def test_expanding_a_tree_in_place():
    """One record as two arguments: so it is in every call."""
    case = cases.draft_case(requests=2, drafts=2, vocab=130, rank=0, confidence=None)
    shared = dict(anchor_positions=case.anchor_positions, method="without_replacement", sampling=case.sampling)

    def grown():
        return dk.draft_tree(case.base_logits, case.anchors, **shared, num_nodes=5, branching=(2,))

    tree, plain = grown(), grown()
    given = shared | dict(node_logits=case.base_logits, depth=1, branching=1)
    dk.expand_tree(tree=plain, out=plain, **given)
    prepared = dk.prepare(dk.expand_tree, tree=tree, out=tree, **given)
    other = grown()
    assert prepared(tree=other, out=other) is other
    assert_same(other, plain)
    for call in (prepared, lambda **trees: dk.prepare(dk.expand_tree, **trees, **given)):
        with pytest.raises(NotImplementedError, match="prepare: expand_tree: this call computes aten.copy_"):
            call(tree=other, out=grown())


def test_compacting_moves_the_caches_of_the_example():
    case, plain = case_of(4, 2, 9, 4, ("plain", "apart")), case_of(4, 2, 9, 4, ("plain", "apart"))
    layers = dk.KVLayers.of([case.caches])
    prepared = dk.prepare(dk.compact_kv, layers=layers, acceptance=case.acceptance, layout=case.layout)
    dk.compact_kv(dk.KVLayers.of([plain.caches]), plain.acceptance, plain.layout)
    prepared(acceptance=copied(case.acceptance), layout=copied(case.layout))
    assert all(torch.equal(bytes_of(a), bytes_of(b)) for a, b in zip(case.caches, plain.caches, strict=True))
    with pytest.raises(ValueError, match=r"^layers\.caches\[0\]: expected|^layers\.pointers\[0\]: expected"):
        prepared(layers=dk.KVLayers.of([plain.caches]))
    with pytest.raises(NotImplementedError, match="compact_kv: extra: expected none"):
        dk.prepare(dk.compact_kv, layers=layers, acceptance=case.acceptance, layout=case.layout, extra=case.caches)


def test_acceptance_on_shards():
    """Every phase and the finish, prepared; as the plain ones and as accept_chain."""
    of_shards = ("target_logits", "layout", "proposal", "sampling", "rule")

    def run(partial, finish, seed):
        given = {name: value for name, value in _accept()[1](seed).items() if name in of_shards}
        gathered = ()
        for phase in dk.accept_phases(given["proposal"], sampling=given["sampling"], rule=given["rule"]):
            gathered += (partial(phase, **given, gathered=gathered)[None],)
        return finish(**given, gathered=gathered)

    where, made = dict(vocab_start=0, vocab_shards=1), {}

    def partial(phase, **given):
        return dk.accept_partial(phase=phase, **given, **where)

    def prepared_partial(phase, **given):
        made.setdefault(phase, dk.prepare(dk.accept_partial, phase=phase, **given, **where))
        return made[phase](**changing(given))

    def prepared_finish(**given):
        made.setdefault("finish", dk.prepare(dk.accept_finish, **given, **where))
        return made["finish"](**changing(given))

    for seed in (1, 2, 1):
        have = run(prepared_partial, prepared_finish, seed)
        same_bits(have, run(partial, lambda **given: dk.accept_finish(**given, **where), seed))
        same_bits(have.tokens, dk.accept_chain(**_accept()[1](seed)).tokens)
    assert len(made) == 4


# --- what it refuses --------------------------------------------------------------------------------------------------


def wide(tensor):
    """The same values with other strides, the last dimension contiguous."""
    return torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]


def refusals(given):
    proposal, sampling, layout = given["proposal"], given["sampling"], given["layout"]
    logits = given["target_logits"]
    replace = dataclasses.replace
    drafts = proposal.logits
    shown = r"expected bfloat16 \[6, 130\] with strides \[130, 1\] on cpu, as in the example, got "
    return {
        "shape": (dict(target_logits=logits[:-1]), ValueError, rf"target_logits: {shown}bfloat16 \[5, 130\]"),
        "dtype": (dict(target_logits=logits.half()), ValueError, rf"target_logits: {shown}float16"),
        "stride": (dict(target_logits=wide(logits)), ValueError, rf"target_logits: {shown}.* strides \[260, 1\]"),
        "device": (dict(target_logits=logits.to("meta")), ValueError, rf"target_logits: {shown}.* on meta"),
        "no tensor": (dict(target_logits=None), TypeError, "target_logits: expected Tensor, as in the example, got NoneType"),
        "vocabulary": (dict(proposal=replace(proposal, logits=drafts[..., :7].contiguous())), ValueError, "proposal.logits: expected"),
        "drafts": (dict(proposal=dk.DenseProposal(drafts[:, :1].contiguous())), ValueError, "proposal.logits: expected bfloat16"),
        "lse": (dict(proposal=replace(proposal, lse=torch.zeros(2, 2))), TypeError, "proposal.lse: expected NoneType, .* got Tensor"),
        "one hot": (dict(proposal=dk.OneHotProposal()), TypeError, "proposal: expected DenseProposal, .* got OneHotProposal"),
        "filter": (dict(sampling=replace(sampling, top_p=torch.ones(2))), TypeError, "sampling.top_p: expected NoneType, .* got Tensor"),
        "word": (dict(sampling=replace(sampling, filter_order="joint")), ValueError, "sampling.filter_order: expected 'top_k_first'"),
        "number": (dict(layout=replace(layout, max_drafts=None)), TypeError, "layout.max_drafts: expected int, .* got NoneType"),
        "rule": (dict(rule="block"), ValueError, "rule: expected nothing, because it has no tensors in the example, got str"),
        "new": (dict(state_indices=ints(0, 1)), ValueError, "state_indices: expected nothing, .* got Tensor"),
        "unknown": (dict(logits=logits), TypeError, "logits: expected an argument of accept_chain"),
        "subclass": (
            dict(target_logits=logits.as_subclass(type("Wrapped", (torch.Tensor,), {}))),
            TypeError,
            "target_logits: expected a plain torch.Tensor, got Wrapped on cpu",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("what", refusals(_accept()[1](1)))
def test_another_kind_is_refused_by_name(what):
    op, arguments = _accept()
    prepared = dk.prepare(op, **arguments(1))
    prepared._launches = {(): lambda tensors: pytest.fail("launched")}
    given, error, message = refusals(arguments(2))[what]
    with pytest.raises(error, match=f"^{message}"):
        prepared(**given)


def test_confidences_of_this_round_stay_refused():
    """schedule_prefixes knows them by identity."""
    op, arguments = _schedule(policy="stale")
    example = arguments(1)
    prepared = dk.prepare(op, **example)
    block = copied(example["block"])
    same = dict(block=block, stale_confidence=block.confidence)
    for call in (prepared, lambda **given: dk.prepare(op, **example | given), lambda **given: op(**example | given)):
        with pytest.raises(ValueError, match="stale_confidence: expected confidences of older rounds, got this round's"):
            call(**same)


def test_one_tensor_in_several_places():
    """Of the example, of a call, of both: each argument is taken from its own place."""
    op, arguments = _draft()
    example = arguments(1)

    def places(first, second):
        """5, 5 is one tensor."""
        made = {number: torch.full((2,), number) for number in (first, second)}
        return dict(anchors=made[first], anchor_positions=made[second])

    for numbers in ((5, 5), (5, 9)):
        prepared = dk.prepare(op, **copied(example) | places(*numbers))
        for call in ((5, 9), (5, 5), (9, 5), (7, 7)):
            same_bits(prepared(**places(*call)), op(**example | places(*call)))


def test_what_the_outputs_hold_stays():
    ids = dict(draft_to_target=torch.randperm(130))
    op, arguments = _draft(confidence=None)
    prepared = dk.prepare(op, **arguments(1) | ids)
    assert prepared(**ids).proposal.draft_to_target is ids["draft_to_target"]
    with pytest.raises(ValueError, match="^draft_to_target: expected the tensor of the example, because the outputs hold it"):
        prepared(draft_to_target=torch.randperm(130))


def test_an_example_is_checked_as_the_call():
    op, arguments = _accept()
    for wrong in (dict(rule="best"), dict(target_logits=torch.zeros(3, dtype=torch.int32)), dict(anchors=torch.zeros(9).long())):
        errors = []
        for call in (op, lambda **given: dk.prepare(op, **given)):
            with pytest.raises((TypeError, ValueError)) as caught:
                call(**arguments(1) | wrong)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]
    with pytest.raises(TypeError, match="target_logit"):
        dk.prepare(op, target_logit=torch.zeros(3))


def test_every_op_but_one_can_be_prepared():
    ops = {op for op in vars(dk).values() if getattr(op, "__module__", "").startswith("dspark_kernels.ops.")}
    refused = []
    for op in ops - {dk.accept_phases}:
        with pytest.raises((NotImplementedError, TypeError)) as caught:
            dk.prepare(op)
        refused += [op] if caught.type is NotImplementedError else []
    assert refused == [dk.draft_block_partial]


def test_validation_on_the_host_is_not_repeated():
    op, arguments = _attention(planned=False)
    with pytest.raises(NotImplementedError, match="prepare: tree_attention: this call computes"):
        dk.prepare(op, **arguments(1), validate=True)


def test_an_empty_batch_is_no_example():
    layout = dict(block=block_of(torch.zeros(0, 3)), draft_lens=torch.zeros(0, dtype=torch.int32), **anchored(0))
    with pytest.raises(NotImplementedError, match="prepare: fixed_layout: this call computes"):
        dk.prepare(dk.fixed_layout, **layout)


# --- who sees it ------------------------------------------------------------------------------------------------------


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_op():
    op, arguments = _accept()
    prepared = dk.prepare(op, **arguments(1))
    given = changing(arguments(2))
    want = op(**copied(given))
    with _Names() as names:
        assert_same(prepared(**given), want)
    assert "dspark_kernels::accept_chain" in names.found


def test_a_compiler_sees_the_op():
    op, arguments = _accept()
    example = arguments(1) | dict(anchors=None, anchor_positions=None)
    prepared = dk.prepare(op, **example)
    step = torch.compile(lambda logits: prepared(target_logits=2 * logits).tokens + 1, fullgraph=True, backend="aot_eager")
    logits = arguments(2)["target_logits"]
    assert torch.equal(step(logits), op(**example | dict(target_logits=2 * logits)).tokens + 1)


@pytest.mark.gpu
def test_a_prepared_call_in_a_graph(device):
    from tests.ops.fields import to_device

    op, arguments = _accept()
    make = lambda seed: {name: to_device(value, device) for name, value in arguments(seed).items()}  # noqa: E731
    static, fresh = make(1), make(2)
    prepared = dk.prepare(op, **static)
    prepared()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared()
    want = op(**{name: copied(value).to(device) if isinstance(value, torch.Tensor) else value for name, value in fresh.items()})
    for have, new in zip(tensors_of(list(static.values())), tensors_of(list(fresh.values())), strict=True):
        have.copy_(new)
    before = torch.cuda.memory_allocated()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(prepared.out.tokens, want.tokens)
