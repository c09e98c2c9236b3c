"""The adapter of vLLM on arrays as vLLM 0.32 and 0.33 lay them out, in fake modules with their signatures; no vLLM is needed.

Layouts: int32 ids, int64 mappings and positions, logits with padded strides, request slots in any order, -1 for padding rows and
for drafts to reject.
"""

import inspect
import logging
import sys
import types
from types import SimpleNamespace

import pytest
import torch

import reference.accept
import reference.draft
from dspark_kernels import DenseProposal, MarkovHead, OneHotProposal, SamplingTensors, VerifyLayout
from dspark_kernels.integrations import guard, vllm as adapter

V, K, SLOTS = 37, 3, 6


def padded(*shape):
    """Logits [..., V] on a dyadic grid, in rows of 48."""
    return (torch.randn(*shape, 48).mul(16).round() / 16)[..., :V]


def batch(generator_seed=0):
    """Four requests in slots 4, 1, 5, 0 with 3, 0, 2, 1 drafts."""
    torch.manual_seed(generator_seed)
    slots = torch.tensor([4, 1, 5, 0])
    lens = torch.tensor([3, 0, 2, 1])
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), (lens + 1).cumsum(0).int()])
    rows = int(starts[-1])
    logits, drafts = padded(rows), padded(SLOTS, K)
    ids = torch.randint(0, V, (rows,), dtype=torch.int32)
    first = starts[:-1].repeat_interleave(lens + 1)
    local = torch.arange(rows, dtype=torch.int32) - first
    positions = torch.tensor([11, 90, 7, 40]).repeat_interleave(lens + 1) + local
    temperature = torch.tensor([0.0, 0.9, 1.0, 1.0, 0.7, 0.0])
    seeds = torch.arange(SLOTS, dtype=torch.int64) * 77777777777 - 5
    return SimpleNamespace(
        target_logits=logits, draft_logits=drafts, draft_sampled=ids, cu_num_logits=starts, pos=positions, idx_mapping=slots,
        expanded_idx_mapping=slots.repeat_interleave(lens + 1), expanded_local_pos=local, temperature=temperature, seed=seeds,
        num_speculative_steps=K,
    )  # fmt: skip


def expected(given, drafts, rule="token"):
    """The reference's tokens and numbers, with the same noise: settings by slot, target rows as they are."""
    proposal = OneHotProposal() if drafts is None else DenseProposal(drafts.contiguous(), temperature=given.temperature)
    layout = VerifyLayout.of_rows(given.cu_num_logits, given.draft_sampled.long(), given.pos, K)
    wanted = reference.accept.accept_chain(
        given.target_logits.contiguous(), layout, proposal, sampling=SamplingTensors(given.temperature, given.seed),
        target_scaled=True, rule=rule, state_indices=given.idx_mapping.int(),
    )  # fmt: skip
    return wanted.tokens, wanted.num_emitted


@pytest.mark.parametrize("dense, block", [(True, False), (True, True), (False, False)])
def test_acceptance_equals_the_reference(dense, block):
    lengths = set()
    for seed in range(6):
        given = batch(seed)
        drafts = given.draft_logits if dense else None
        if not dense:  # drafts that are likely
            given.draft_sampled[1:] = given.target_logits.argmax(-1)[:-1].int()
            given.draft_sampled[3] = -1
        tokens, number = adapter.rejection_sample(
            **{**vars(given), "draft_logits": drafts}, use_block_verification=block, fly_window_size=0
        )
        wanted, wanted_number = expected(given, drafts, "block" if block else "token")
        assert tokens.dtype == torch.int64 and tokens.shape == (4, K + 1) and number.dtype == torch.int32
        assert torch.equal(tokens, wanted) and torch.equal(number, wanted_number)
        lengths |= set(number.tolist())
    assert len(lengths) > 1


def test_greedy_acceptance_is_exact():
    given = batch()
    given.temperature = torch.zeros(SLOTS)
    best = given.target_logits.argmax(-1)
    given.draft_sampled[1:3] = best[:2].int()  # request 0: the first two drafts are right, the third is not
    given.draft_sampled[3] = (best[2] + 1) % V
    given.draft_sampled[5:8] = torch.tensor([0, int(best[5]), -1], dtype=torch.int32)  # request 2: the second is no draft
    given.draft_sampled[9] = best[8].int()  # request 3: right
    tokens, number = adapter.rejection_sample(**vars(given))
    assert number.tolist() == [3, 1, 2, 2]
    assert tokens.tolist() == [
        [*best[:3].tolist(), -1], [int(best[4]), -1, -1, -1], [*best[5:7].tolist(), -1, -1], [*best[8:10].tolist(), -1, -1]
    ]  # fmt: skip


def test_a_vocabulary_padded_on_either_side():
    given = batch()
    wide = torch.cat([given.target_logits, torch.full((len(given.target_logits), 3), 99.0)], 1)  # never filled by vLLM
    plain = adapter.rejection_sample(**vars(given))
    for changes in (dict(target_logits=wide), dict(draft_logits=torch.nn.functional.pad(given.draft_logits, (0, 5)))):
        again = adapter.rejection_sample(**{**vars(given), **changes})
        assert torch.equal(again[0], plain[0])


@pytest.mark.parametrize("changes", [dict(fly_window_size=2), dict(contexts=torch.zeros(1)), dict(watermark_key=7)])
def test_refused(changes):
    with pytest.raises(guard.Refused):
        adapter.rejection_sample(**vars(batch()), **changes)


# --- drafting ---------------------------------------------------------------------------------------------------------


def speculator(probabilistic=True, confidence=True, reduced=False, **changes):
    """A model and a speculator with what the adapter reads of them; three rows, the last of which is padding."""
    torch.manual_seed(3)
    hidden, rank, width = 8, 4, V - 5 if reduced else V
    offsets = torch.arange(width) // 8 if reduced else None  # target = draft + offset
    linear = torch.nn.Linear(hidden + rank, 1)
    lm_head = torch.randn(hidden, 48)
    head = SimpleNamespace(
        markov_w1=SimpleNamespace(weight=torch.randn(V, rank)), markov_w2=SimpleNamespace(weight=torch.randn(64, rank))
    )
    model = SimpleNamespace(
        model=SimpleNamespace(markov_head=head, confidence_head=SimpleNamespace(proj=linear)),
        logits_processor=SimpleNamespace(scale=1.0, soft_cap=None, org_vocab_size=width),
        draft_id_to_target_id=offsets,
        target_vocab_size=V,
        compute_draft_logits=lambda rows: (rows @ lm_head)[:, :width],
    )
    slots = torch.tensor([4, 1, -1])
    config = SimpleNamespace(block_size=K, mask_token_id=99)
    ids = torch.tensor([5, 99, 99, 7, 99, 99, 1, 99, 99], dtype=torch.int32)

    class Speculator(SimpleNamespace):
        __hash__ = object.__hash__

    made = Speculator(
        model=model, num_speculative_steps=K, num_query_per_req=K, sample_from_anchor=True, parallel_drafting_token_id=99,
        sample_indices=torch.arange(9), sample_idx_mapping=slots.repeat_interleave(K), _anchor_idx=torch.arange(3) * K,
        sample_pos=torch.cat([torch.arange(12, 15), torch.arange(41, 44), torch.zeros(3, dtype=torch.int64)]),
        input_buffers=SimpleNamespace(input_ids=ids), vocab_size=V,
        temperature=torch.tensor([1.0, 0.8, 1.0, 1.0, 0.0, 1.0]), seeds=torch.arange(SLOTS, dtype=torch.int64) * 991,
        draft_logits=torch.full((SLOTS, K, V), 7.0) if probabilistic else None,
        draft_tokens=torch.full((SLOTS, K), -9), draft_token_confidence_probs=torch.full((SLOTS, K), -9.0),
        use_confidence_head=confidence, _draft_topk=None, draft_watermarker=None, acceptance_estimator=None,
        vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1)),
        draft_model_config=SimpleNamespace(hf_config=config),
    )  # fmt: skip
    for name, value in changes.items():
        setattr(made, name, value)
    return model, made, torch.randn(9, hidden)


@pytest.mark.parametrize("probabilistic, reduced", [(True, False), (False, False), (True, True), (False, True)])
def test_drafts_equal_the_reference(probabilistic, reduced):
    model, made, hidden = speculator(probabilistic, reduced=reduced)
    assert adapter.sample_sequential(model, made, 3, hidden) is True
    width = model.logits_processor.org_vocab_size
    ids = None if model.draft_id_to_target_id is None else torch.arange(width) + model.draft_id_to_target_id
    head = MarkovHead(model.model.markov_head.markov_w1.weight, model.model.markov_head.markov_w2.weight[:width])
    sampling = SamplingTensors(made.temperature[[4, 1]], made.seeds[[4, 1]]) if probabilistic else None
    wanted = reference.draft.draft_block(
        model.compute_draft_logits(hidden)[:6].view(2, K, -1), torch.tensor([5, 7]), head, anchor_positions=torch.tensor([11, 40]),
        sampling=sampling, hidden=hidden[:6].view(2, K, -1), draft_to_target=ids,
    )  # fmt: skip
    assert torch.equal(made.draft_tokens[:2], wanted.tokens)
    assert (made.draft_tokens[3:] == -9).all()
    proj, w1 = model.model.confidence_head.proj, head.w1
    previous = torch.cat([torch.tensor([[5], [7]]), wanted.tokens[:, :-1]], 1)
    scores = proj(torch.cat([hidden[:6].view(2, K, -1), w1[previous]], -1)).sigmoid()[..., 0]
    torch.testing.assert_close(made.draft_token_confidence_probs[:2], scores.detach())
    if probabilistic:
        columns = torch.arange(V) if ids is None else ids
        stored = made.draft_logits[[4, 1]]
        torch.testing.assert_close(stored[..., columns], wanted.proposal.logits)
        others = torch.ones(V, dtype=torch.bool).index_fill_(0, columns, False)
        assert (stored[..., others] == -torch.inf).all()
        if ids is None:
            assert (made.draft_logits[[0, 2, 3, 5]] == 7.0).all()  # slots of no row of the batch, padding rows among them


@pytest.mark.parametrize(
    "changes",
    [
        dict(_draft_topk=8),
        dict(draft_watermarker=object()),
        dict(acceptance_estimator=object()),
        dict(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=2))),
    ],
)
def test_drafts_refused_before_anything_is_written(changes):
    model, made, hidden = speculator(**changes)
    with pytest.raises(guard.Refused):
        adapter.sample_sequential(model, made, 3, hidden)
    assert (made.draft_tokens == -9).all() and (made.draft_logits == 7.0).all()


def test_a_reduced_vocabulary_without_a_map_is_refused():
    model, made, hidden = speculator()
    model.logits_processor.org_vocab_size = V - 2
    with pytest.raises(guard.Refused, match="without a map"):
        adapter.sample_sequential(model, made, 3, hidden)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(block_size=5))), "blocks of 5"),
        (dict(sample_from_anchor=False), "3 queries per request"),
        (dict(parallel_drafting_token_id=98), "mask token is 99"),
        (dict(_anchor_idx=torch.arange(3) * 4), "anchors are not"),
        (dict(sample_pos=torch.zeros(9, dtype=torch.int64)), "have positions"),
        (dict(input_buffers=SimpleNamespace(input_ids=torch.arange(9, dtype=torch.int32))), "not the mask token"),
    ],
)
def test_what_makes_acceptance_collapse_is_said_loudly(changes, said, caplog, monkeypatch):
    monkeypatch.setattr(adapter, "_report", guard.Reporter("test_vllm"))
    model, made, hidden = speculator(**changes)
    with caplog.at_level(logging.ERROR):
        adapter.sample_sequential(model, made, 3, hidden)
    assert any("few drafts will be accepted" in text and said in text for text in caplog.messages)
    model, made, hidden = speculator()
    caplog.clear()
    adapter.sample_sequential(model, made, 3, hidden)
    assert not caplog.messages


# --- scheduling -------------------------------------------------------------------------------------------------------


def test_the_budget_is_admitted_exactly():
    confidence = torch.tensor([[0.9, 0.9, 0.9], [0.5, 0.99, 0.99], [1.0, 1.0, 1.0], [0.0, 0.5, 0.5]])
    for budget, wanted in ((1, [0, 0, 1]), (4, [2, 0, 2]), (6, [3, 1, 2]), (3, [1, 0, 2])):
        capacities = torch.tensor([3, 3, 2], dtype=torch.int32)
        adapter.assign_draft_token_budget(confidence, torch.tensor([0, 1, 2]), capacities, budget, K)
        assert capacities.tolist() == wanted
    # Drafts that cannot be accepted fill a budget that nothing else does.
    capacities = torch.tensor([2, 3], dtype=torch.int32)
    adapter.assign_draft_token_budget(confidence, torch.tensor([2, 3]), capacities, 4, K)
    assert capacities.tolist() == [2, 2]


def test_the_planned_budget():
    manager = SimpleNamespace(
        req_states=SimpleNamespace(
            req_id_to_index=dict(a=4, b=1, c=2),
            num_computed_tokens_np=torch.tensor([0, 20, 0, 0, 30]).numpy(),
            prefill_len=SimpleNamespace(np=torch.tensor([0, 9, 50, 0, 9]).numpy()),
        ),
        _stale_confidences=[SimpleNamespace(np=torch.tensor([[0.9, 0.9, 0.2]]).expand(5, K).numpy())],
        _stale_idx=0,
        _max_total_logits=100,
        num_bonus_tokens=1,
        cost_tables=(torch.zeros(9, dtype=torch.float64).numpy(), torch.full((65,), 3.0, dtype=torch.float64).numpy()),
    )
    # Free drafts: all six of a and b are worth it; c is in its prompt, and 8 rows of it come along.
    assert adapter._planned(manager, [3, 3, 0], [1, 1, 8], ["a", "b", "c"]) == 6
    manager.cost_tables = (manager.cost_tables[0], torch.arange(65, dtype=torch.float64).clamp(min=1e-3).numpy())
    dear = adapter._planned(manager, [3, 3, 0], [1, 1, 8], ["a", "b", "c"])
    assert dear == 4  # drafts of survival 0.16 cost more than they bring


# --- registration -----------------------------------------------------------------------------------------------------


def function(names, calls):
    """A function with these parameters that notes its calls."""

    def own(*arguments, **named):
        calls.append(own)
        return "own"

    own.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    return own


@pytest.fixture
def fake(monkeypatch):
    """Modules with the places and signatures of a version of vLLM."""

    def install(version, spoil=None):
        calls = []
        found = adapter.VERSIONS.get(version, adapter.VERSIONS["0.33.0"])
        root = types.ModuleType("vllm")
        root.__version__ = version
        monkeypatch.setitem(sys.modules, "vllm", root)
        for signatures in found.signatures.values():
            for place, names in signatures.items():
                module, _, path = place.partition(":")
                owner = sys.modules.get(module) if module in made else None
                if owner is None:
                    owner = made[module] = types.ModuleType(module)
                    monkeypatch.setitem(sys.modules, module, owner)
                *classes, name = path.split(".")
                for each in classes:
                    if not hasattr(owner, each):
                        setattr(owner, each, type(each, (), {"__init__": lambda self, *a: None}))
                    owner = getattr(owner, each)
                setattr(owner, name, function(names[1:] if place == spoil else names, calls))
        module = made[adapter._ADAPTIVE]
        module._assign_draft_token_budget_compiled = module._assign_draft_token_budget
        return made, calls

    made = {}
    monkeypatch.delenv(adapter.VARIABLE, raising=False)
    monkeypatch.setattr(adapter, "_parts", {name: guard.Part(name, guard.Reporter("test_vllm")) for name in adapter.PARTS})
    adapter.rejection_sampler_class.cache_clear()
    yield install
    adapter.rejection_sampler_class.cache_clear()


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0+cpu"])
def test_registration(fake, version, monkeypatch):
    made, calls = fake(version.split("+")[0])
    sys.modules["vllm"].__version__ = version
    assert len(adapter._register()) == 2
    adapter._register()  # vLLM may load plug-ins more than once
    model = made[adapter._MODEL].Qwen3DSparkForCausalLM
    speculator_class = made[adapter._SPECULATOR].DSparkSpeculator
    assert hasattr(model, "sample_sequential") == version.startswith("0.33")
    assert hasattr(speculator_class._sample_sequential, "_dspark_kernels_own") == version.startswith("0.32")
    assert not hasattr(made[adapter._ADAPTIVE]._assign_draft_token_budget_compiled, "_dspark_kernels_own")
    if version.startswith("0.32"):  # a drafter of another class keeps the engine's loop
        assert speculator_class._sample_sequential(SimpleNamespace(model=object()), 1, None) == "own" and len(calls) == 1
    else:
        assert model().sample_sequential(SimpleNamespace(num_speculative_steps=K), 1, None) is False  # what fails is the engine's

    state = made[adapter._MODEL_STATE].ModelState
    state.custom_sampler._dspark_kernels_own.__globals__  # noqa: B018  it has an own
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(rejection_sample_method="standard"), watermark_config=None,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )  # fmt: skip
    assert state.custom_sampler(SimpleNamespace(vllm_config=config, device="cpu"), "sampler") == "own"  # the model's own goes first


def test_the_sampler_falls_back_to_the_engines(fake, monkeypatch):
    made, calls = fake("0.33.0")
    state = made[adapter._MODEL_STATE].ModelState
    state.custom_sampler = lambda self, sampler: None
    monkeypatch.setattr(adapter.guard, "unlike", lambda signatures: None)
    adapter._register()
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(rejection_sample_method="standard"), watermark_config=None,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )  # fmt: skip
    sampler, made_sampler = state.custom_sampler(SimpleNamespace(vllm_config=config, device="cpu"), "sampler")
    assert sampler == "sampler" and isinstance(made_sampler, made[adapter._SAMPLER].RejectionSampler)
    for name, value in (("tensor_parallel_size", 2), ("rejection_sample_method", "fly")):
        part = config.parallel_config if name.startswith("tensor") else config.speculative_config
        kept = getattr(part, name)
        setattr(part, name, value)
        assert state.custom_sampler(SimpleNamespace(vllm_config=config, device="cpu"), "sampler") is None
        setattr(part, name, kept)

    given = batch()
    states = SimpleNamespace(temperature=SimpleNamespace(gpu=given.temperature), seeds=SimpleNamespace(gpu=given.seed))
    made_sampler.sampler = SimpleNamespace(apply_sampling_params=lambda logits, *rest: logits, sampling_states=states)
    made_sampler.watermark_key = made_sampler.synthetic_conditional_rates = None
    made_sampler.num_speculative_steps, made_sampler.use_block_verification, made_sampler.fly_window_size = K, False, 0
    arguments = (
        given.target_logits, given.draft_logits, given.draft_sampled, given.pos, given.cu_num_logits, given.idx_mapping, None,
        given.expanded_idx_mapping, given.expanded_local_pos, None, given.draft_sampled,
    )  # fmt: skip
    rows, tokens, number = made_sampler._verify(*arguments)
    wanted, wanted_number = expected(given, given.draft_logits)
    assert rows is given.target_logits and torch.equal(tokens, wanted) and torch.equal(number, wanted_number)
    made_sampler.watermark_key = 3
    assert made_sampler._verify(*arguments) == "own"  # refused: this call alone
    made_sampler.watermark_key = None
    assert made_sampler._verify(*arguments) != "own"
    monkeypatch.setattr(adapter, "accept_chain", None)  # a fault: from now on
    assert made_sampler._verify(*arguments) == "own" and made_sampler.part.failed


def test_nothing_is_replaced_elsewhere(fake, monkeypatch):
    fake("0.31.0")
    assert adapter._register() == ["nothing is replaced: vLLM 0.31.0 is not one of 0.32.0, 0.33.0"]
    monkeypatch.setenv(adapter.VARIABLE, "off")
    assert "off" in adapter._register()[0]
    place = f"{adapter._SAMPLER}:rejection_sample"
    made, _ = fake("0.33.0", spoil=place)
    monkeypatch.setenv(adapter.VARIABLE, "accept,schedule")
    first, second = adapter._register()
    assert place in first and "not replaced" in first
    assert not hasattr(made[adapter._MODEL_STATE].ModelState.custom_sampler, "_dspark_kernels_own")
    assert "plan_budget" in second and hasattr(
        made[adapter._ADAPTIVE].AdaptiveVerificationManager.get_num_tokens, "_dspark_kernels_own"
    )
    monkeypatch.setenv(adapter.VARIABLE, "acceptance")
    adapter.register()  # says so, and does not raise
