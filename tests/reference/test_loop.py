"""The decoding loop on tiny random models: five systems, one text; batches, ends, counting, and the emitted distribution."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dspark_kernels.types import CostTable, Flag
from reference.drafters import MTP, Autoregressive, Block, DraftModel, DSpark
from reference.loop import REFERENCE_OPS, Request, decode
from reference.model import KVCache, Rows, Target, run_layers
from tests.reference.toy_models import (
    BLOCK,
    COST,
    DSPARK,
    SIZES,
    SYSTEMS,
    TARGET,
    VOCAB,
    all_logits,
    block_tensors,
    make_dspark,
    make_mtp,
    model_tensors,
    plain_greedy,
    requests_of,
)

# --- the target ---


def test_one_pass_equals_many():
    ids = torch.randint(0, VOCAB, (20,), generator=torch.Generator().manual_seed(0))
    whole = all_logits(TARGET, ids.tolist())
    cache, parts, start = TARGET.new_cache(3), [], 0
    for count in (1, 6, 1, 12):
        rows = Rows.of([(2, start, count)], TARGET.device)
        parts.append(TARGET.logits(TARGET.forward(ids[start : start + count], rows, cache).hidden))
        start += count
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


def test_packed_ragged_rows_equal_each_alone():
    generator = torch.Generator().manual_seed(0)
    lengths, cached = {3: 9, 0: 4, 2: 13}, {3: 5, 0: 0, 2: 12}
    texts = {slot: torch.randint(0, VOCAB, (length,), generator=generator) for slot, length in lengths.items()}
    cache = TARGET.new_cache(4)
    for slot, count in cached.items():
        if count:
            TARGET.forward(texts[slot][:count], Rows.of([(slot, 0, count)], TARGET.device), cache)
    ids = torch.cat([texts[slot][count:] for slot, count in cached.items()])
    positions = torch.cat([torch.arange(cached[slot], len(texts[slot])) for slot in cached])
    batch_indices = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor([4, 4, 1]))
    rows = Rows.pack(positions, batch_indices, list(cached))
    out = TARGET.forward(ids, rows, cache, feature_layers=(-1, 1, 0))
    logits = TARGET.logits(out.hidden)
    begin = 0
    for slot, count in cached.items():
        length = len(texts[slot]) - count
        want = all_logits(TARGET, texts[slot].tolist())[count:]
        torch.testing.assert_close(logits[begin : begin + length], want, rtol=0, atol=1e-5)
        begin += length
    assert torch.equal(out.features[:, :16], F.embedding(ids, TARGET.embedding))
    assert torch.equal(out.features[:, 16:32], out.pre_norm)
    assert not torch.equal(out.features[:, 32:], out.pre_norm)


def test_rejected_rows_leave_no_trace():
    ids = torch.randint(0, VOCAB, (10,), generator=torch.Generator().manual_seed(2))
    whole = all_logits(TARGET, ids.tolist())
    cache = TARGET.new_cache(1)
    TARGET.forward(ids[:6], Rows.of([(0, 0, 6)], TARGET.device), cache)
    TARGET.forward((ids[6:] + 1) % VOCAB, Rows.of([(0, 6, 4)], TARGET.device), cache)  # drafts, all rejected
    cache.crop(0, 6)
    out = TARGET.forward(ids[6:], Rows.of([(0, 6, 4)], TARGET.device), cache)
    torch.testing.assert_close(TARGET.logits(out.hidden), whole[6:], rtol=0, atol=1e-5)


def test_a_slot_without_its_earlier_rows_is_refused():
    cache = TARGET.new_cache(2)
    with pytest.raises(ValueError, match=r"expected at most 0 \(cached\) first, got 3"):
        TARGET.forward(torch.zeros(1, dtype=torch.int64), Rows.of([(1, 3, 1)], TARGET.device), cache)
    with pytest.raises(ValueError, match=r"length: expected 0 to 0 \(cached\), got 1"):
        cache.crop(0, 1)


@pytest.mark.parametrize(
    "positions, batch_indices, message",
    [
        ([4, 6], [0, 0], "expected 5 in row 1, got 6"),
        ([4, 2, 5], [0, 1, 0], "stand together"),
        ([4, 0], [0, -1], "expected 0 to 1 in every row, got -1"),
        ([4, 0], [0, 2], "expected 0 to 1 in every row, got 2"),
    ],
)
def test_rows_in_another_order_are_refused(positions, batch_indices, message):
    with pytest.raises(ValueError, match=message):
        Rows.pack(torch.tensor(positions), torch.tensor(batch_indices, dtype=torch.int32), [1, 0])


def test_rope_parameters_tied_heads_and_refusals():
    tensors = model_tensors(1)
    config = {key: value for key, value in dict(SIZES, num_hidden_layers=2).items() if key != "rope_theta"}
    newer = Target(dict(config, rope_parameters=dict(rope_type="default", rope_theta=100.0)), tensors)
    ids = [3, 1, 4, 1, 5]
    assert torch.equal(all_logits(newer, ids), all_logits(TARGET, ids))
    other = Target(dict(config, rope_theta=1e6), tensors)
    assert not torch.allclose(all_logits(other, ids), all_logits(TARGET, ids), atol=1e-3)
    tied = dict(config, rope_theta=100.0, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="lm_head.weight is not the embedding: it is taken as the head"):
        assert torch.equal(Target(tied, tensors).head, tensors["lm_head.weight"])
    for head in ({}, {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}):
        model = Target(tied, {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"} | head)
        assert model.head is model.embedding
    for broken, message in (
        (config, "'rope_theta'"),
        (dict(config, rope_theta=1.0, hidden_act="gelu"), "got 'gelu'"),
        (dict(config, rope_theta=1.0, rope_scaling=dict(rope_type="dynamic")), "got 'dynamic'"),
        (dict(config, rope_theta=1.0, use_sliding_window=True), "use_sliding_window"),
        (dict(config, rope_theta=1.0, num_attention_heads=3), "multiple of 2"),
        (dict(config, rope_theta=1.0, vocab_size=12), r"expected shape \[12, 16\], got \[11, 16\]"),
        (dict(config, rope_theta=1.0, num_hidden_layers=3), "model.layers.2.input_layernorm.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            Target(broken, tensors)


# --- five systems, one text ---


@pytest.mark.parametrize("name", SYSTEMS)
def test_greedy_text_is_the_plain_one(name):
    make, options = SYSTEMS[name]
    requests = requests_of()
    results = decode(TARGET, make(TARGET), requests, batch_size=3, **options)
    for result, request in zip(results, requests, strict=True):
        assert result.output_ids == plain_greedy(TARGET, request)
    lengths = [a for result in results for a in result.acceptance_lengths]
    assert max(lengths) > 1, "no draft was ever accepted: this test shows nothing"


def test_autoregressive_greedy_text_is_the_plain_one():
    requests = requests_of()
    for result, request in zip(decode(TARGET, Autoregressive(), requests, batch_size=3), requests, strict=True):
        assert result.output_ids == plain_greedy(TARGET, request)
        assert result.acceptance_lengths == [1] * request.max_new_tokens  # one more than the output needs
        assert result.proposal_lengths == [0] * request.max_new_tokens
        assert result.draft_passes == 0 and not any(result.accepted)


@pytest.mark.parametrize("rule", ["block", "coupled"])
@pytest.mark.parametrize("name", ["draft model", "DSpark, threshold"])
def test_greedy_rows_are_greedy_under_every_rule(rule, name):
    make, options = SYSTEMS[name]
    requests = requests_of(4)
    for result, request in zip(decode(TARGET, make(TARGET), requests, rule=rule, **options), requests, strict=True):
        assert result.output_ids == plain_greedy(TARGET, request)


@pytest.mark.parametrize("name", ["draft model", "MTP", "block", "DSpark", "DSpark, rnn"])
def test_a_drafter_proposes_the_same_whatever_was_rejected_before(name):
    """Its caches after many rounds equal those of a fresh start on the same text."""
    drafter = SYSTEMS[name][0](TARGET)
    rounds = []
    ops = recording(rounds)
    request = requests_of()[0]
    decode(TARGET, drafter, [request], ops=ops)
    text = plain_greedy(TARGET, dataclasses.replace(request, max_new_tokens=40))
    blocks = [r for r in rounds if r["first_draft"] == 0]
    assert len(blocks) >= 4
    for seen in blocks[1:]:
        position = int(seen["anchor_positions"][0])
        rounds.clear()
        # One request whose prefill ends where this round's anchor stands.
        decode(TARGET, drafter, [Request(text[:position], 1)], ops=ops)
        assert int(rounds[0]["anchor_positions"][0]) == position
        torch.testing.assert_close(rounds[0]["base_logits"], seen["base_logits"], rtol=0, atol=2e-5)


def recording(rounds, **replaced):
    """The reference's ops, with the arguments of every draft_block appended to `rounds`."""

    def draft_block(base_logits, anchors, head=None, **arguments):
        copied = {key: value.clone() for key, value in arguments.items() if isinstance(value, torch.Tensor)}
        rounds.append(dict(copied, base_logits=base_logits.clone(), first_draft=arguments.get("first_draft", 0)))
        return REFERENCE_OPS.draft_block(base_logits, anchors, head, **arguments)

    return SimpleNamespace(**{**vars(REFERENCE_OPS), "draft_block": draft_block, **replaced})


def test_mtp_reads_the_targets_hidden_states():
    """First draft of a round: the module on the hidden states of the whole text, without a cache."""
    drafter, rounds = make_mtp(TARGET), []
    request = requests_of()[0]
    decode(TARGET, drafter, [request], ops=recording(rounds))
    text = plain_greedy(TARGET, dataclasses.replace(request, max_new_tokens=40))
    seen = [r for r in rounds if r["first_draft"] == 0][3]
    position = int(seen["anchor_positions"][0])
    ids = torch.tensor(text[: position + 1])
    out = TARGET.forward(ids[:-1], Rows.of([(0, 0, position)], TARGET.device), TARGET.new_cache(1))
    embedded = F.rms_norm(TARGET.embedding[ids[1:]], (16,), eps=1e-6)
    x = torch.cat([embedded, F.rms_norm(out.pre_norm, (16,), eps=1e-6)], -1) @ drafter.projection.T
    rows, cache = Rows.of([(0, 0, position)], TARGET.device), KVCache(drafter.shape, 1, "cpu", torch.float32)
    (state,) = run_layers([drafter.layer], x, rows, cache, causal=True)
    want = TARGET.logits(F.rms_norm(state[-1:], (16,), eps=1e-6))
    torch.testing.assert_close(seen["base_logits"][:, 0], want, rtol=0, atol=2e-5)


# --- batches ---


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
@pytest.mark.parametrize("name", ["draft model", "MTP", "block", "DSpark, threshold"])
def test_a_request_does_not_depend_on_its_batch(name, rule):
    make, options = SYSTEMS[name]
    drafter = make(TARGET)
    requests = [
        dataclasses.replace(request, temperature=temperature)
        for request, temperature in zip(requests_of(), (1.0, 0.0, 0.7, 1.3, 0.0, 1.0, 0.4), strict=True)
    ]
    batched = decode(TARGET, drafter, requests, rule=rule, batch_size=3, **options)
    for result, request in zip(batched, requests, strict=True):
        (alone,) = decode(TARGET, drafter, [request], rule=rule, **options)
        assert result.output_ids == alone.output_ids
        assert result.acceptance_lengths == alone.acceptance_lengths
        assert result.proposal_lengths == alone.proposal_lengths
        assert (result.draft_passes, result.target_passes) == (alone.draft_passes, alone.target_passes)
        assert result.accepted == alone.accepted
        assert result.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_slots_are_reused_and_differ_from_batch_rows():
    seen = []

    def accept_chain(logits, layout, proposal, *, state_indices, **arguments):
        seen.append(tuple(state_indices.tolist()))
        return REFERENCE_OPS.accept_chain(logits, layout, proposal, state_indices=state_indices, **arguments)

    decode(TARGET, make_dspark(TARGET), requests_of(), batch_size=3, ops=recording([], accept_chain=accept_chain))
    assert all(set(slots) <= {0, 1, 2} and len(set(slots)) == len(slots) for slots in seen)
    assert any(slots != tuple(range(len(slots))) for slots in seen)
    assert {len(slots) for slots in seen} == {1, 2, 3}  # the batch shrinks as the last requests end


def test_prompts_and_drafts_share_a_pass():
    mixed = []

    def fixed_layout(block, draft_lens, **arguments):
        layout = REFERENCE_OPS.fixed_layout(block, draft_lens, **arguments)
        prompts = arguments["num_prefill_tokens"]
        mixed.append(prompts is not None and bool((prompts > 0).any()) and int(layout.draft_lens.max()) > 0)
        return layout

    decode(TARGET, make_dspark(TARGET), requests_of(), batch_size=2, ops=recording([], fixed_layout=fixed_layout))
    assert any(mixed)


# --- ends ---


@pytest.mark.parametrize("name", ["autoregressive", *SYSTEMS])
def test_stop_tokens(name):
    make, options = SYSTEMS.get(name, (lambda target: Autoregressive(), {}))
    drafter, ended = make(TARGET), 0
    requests = requests_of()
    plain = [plain_greedy(TARGET, request) for request in requests]
    for stop in range(VOCAB):
        stopping = [dataclasses.replace(request, stop_tokens=(stop, 999)) for request in requests]
        for result, request, text in zip(decode(TARGET, drafter, stopping, batch_size=3, **options), requests, plain, strict=True):
            begin = len(request.prompt)
            found = [i for i in range(begin, len(text)) if text[i] == stop]
            assert result.output_ids == (text[: found[0] + 1] if found else text)
            assert result.new_tokens == len(result.logprobs) == len(result.output_ids) - begin
            ended += bool(found) and found[0] + 1 < len(text)
    assert ended > 3


def test_rounds_are_counted_as_the_research_loop_does():
    for name, (make, options) in SYSTEMS.items():
        requests = requests_of(temperature=1.0)
        for result, request in zip(decode(TARGET, make(TARGET), requests, **options), requests, strict=True):
            assert len(result.output_ids) == len(request.prompt) + request.max_new_tokens, name
            # The first token belongs to no round; rounds go on while the anchor is inside the output.
            emitted = 1 + sum(result.acceptance_lengths)
            assert emitted > request.max_new_tokens >= emitted - result.acceptance_lengths[-1], name
            assert result.target_passes == len(result.acceptance_lengths) == len(result.proposal_lengths), name
            assert result.target_passes == len(result.drafted_lengths) == len(result.confidences), name
            for accepted, verified, drafted in zip(
                result.acceptance_lengths, result.proposal_lengths, result.drafted_lengths, strict=True
            ):
                assert 1 <= accepted <= verified + 1 <= drafted + 1, name
            marks = [False] + [i < n - 1 for n in result.acceptance_lengths for i in range(n)]
            assert result.accepted == marks[: request.max_new_tokens], name


@pytest.mark.parametrize("name, passes", [("draft model", 3), ("MTP", 3), ("block", 1), ("DSpark", 1)])
def test_draft_passes_are_those_that_ran(monkeypatch, name, passes):
    drafter, runs = SYSTEMS[name][0](TARGET), []
    module = {"draft model": "model", "MTP": "drafters.mtp"}.get(name, "drafters.block")
    import reference.model

    real, own = reference.model.run_layers, (drafter.model.layers if name == "draft model" else None)

    def counted(layers, *args, **kwargs):
        if own is None or layers is own:
            runs.append(1)
        return real(layers, *args, **kwargs)

    monkeypatch.setattr(f"reference.{module}.run_layers", counted)
    (result,) = decode(TARGET, drafter, [requests_of()[1]])
    assert result.draft_passes == passes * result.target_passes
    prompt_passes = 1 if name in ("draft model", "MTP") else 0
    assert len(runs) == result.draft_passes + prompt_passes


def test_progress_and_seconds():
    steps = []
    results = decode(TARGET, make_dspark(TARGET), requests_of(), batch_size=2, progress=steps.append)
    assert sum(steps) == sum(result.new_tokens for result in results) and min(steps) >= 0
    assert all(result.prefill_seconds > 0 and result.verify_seconds > 0 for result in results)
    assert all(result.draft_seconds > 0 for result in results)
    for result in results:
        assert len(result.round_seconds) == len(result.acceptance_lengths) and min(result.round_seconds) > 0
        assert sum(result.round_seconds) == pytest.approx(result.draft_seconds + result.verify_seconds)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_logprobs_are_those_of_the_sampling_distribution(temperature):
    requests = requests_of(temperature=temperature)
    for result in decode(TARGET, make_dspark(TARGET), requests, batch_size=4, confidence_threshold=0.4):
        ids, begin = result.output_ids, len(result.output_ids) - result.new_tokens
        log_probs = torch.log_softmax(all_logits(TARGET, ids) / (temperature or 1.0), -1)
        want = [float(log_probs[i - 1, ids[i]]) for i in range(begin, len(ids))]
        assert result.logprobs == pytest.approx(want, abs=1e-4)


def test_a_request_without_finite_logits_ends_and_says_so():
    tensors = model_tensors(1)
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], math.nan)
    broken = Target(dict(SIZES, num_hidden_layers=2), tensors)
    for result in decode(broken, Autoregressive(), requests_of(2)):
        assert result.new_tokens == 1 and result.acceptance_lengths == []
        assert result.flags & Flag.NONFINITE_ROW


# --- scheduling ---


def test_threshold_cuts_before_the_first_low_confidence():
    results = decode(TARGET, make_dspark(TARGET), requests_of(temperature=1.0), confidence_threshold=0.5)
    seen = set()
    for result in results:
        for length, confidences in zip(result.proposal_lengths, result.confidences, strict=True):
            low = [i for i, confidence in enumerate(confidences) if confidence < 0.5]
            assert length == (low[0] if low else 4)
            seen.add(length)
    assert len(seen) >= 3


@pytest.mark.parametrize("policy", ["causal", "budget"])
def test_costs_decide_how_much_is_verified(policy):
    def verified(seconds):
        cost = CostTable(seconds=seconds)
        # All prompts in the first pass: beside a long prompt even a steep table makes a draft's row look cheap.
        results = decode(TARGET, make_dspark(TARGET), requests_of(), cost=cost, policy=policy, batch_size=7)
        return [length for result in results for length in result.proposal_lengths]

    flat, steep = verified(torch.full((64,), 1e-3)), verified(1e-4 * torch.arange(64.0).clamp(min=1) ** 2)
    middle = verified(COST.seconds)
    assert set(flat) == {4}
    assert set(steep) == {0}
    assert len(set(middle)) >= 3


def test_budget_comes_from_older_rounds():
    """Each slot's stale confidences are those of two rounds ago, and 1 for a request that has had fewer."""
    seen, new = [], [[1.0] * 4] * 2

    def schedule_prefixes(block, cost, *, stale_confidence, state_indices, num_prefill_tokens, **arguments):
        slots = state_indices.tolist()
        prompts = [0] * len(slots) if num_prefill_tokens is None else num_prefill_tokens.tolist()
        stale, current = stale_confidence.tolist(), block.confidence.tolist()
        seen.append([(slot, prompt, stale[slot], current[slot]) for slot, prompt in zip(slots, prompts, strict=True)])
        return REFERENCE_OPS.schedule_prefixes(
            block, cost, stale_confidence=stale_confidence, state_indices=state_indices, num_prefill_tokens=num_prefill_tokens,
            **arguments,
        )  # fmt: skip

    ops = recording([], schedule_prefixes=schedule_prefixes)
    requests = requests_of(temperature=1.0)
    results = decode(TARGET, make_dspark(TARGET), requests, cost=COST, policy="budget", batch_size=3, ops=ops)
    rounds, decoded = {}, 0
    for slot, prompt, stale, current in itertools.chain(*seen):
        if prompt:
            rounds[slot] = new
            continue
        assert stale == rounds.get(slot, new)[-2]
        rounds[slot] = [*rounds.get(slot, new), current]
        decoded += 1
    assert sum(prompt > 0 for _, prompt, _, _ in itertools.chain(*seen)) == len(requests) - 3  # the first three came before
    assert decoded == sum(result.target_passes for result in results)


# --- bad input ---


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rule="typical"), "rule: expected one of 'token', 'block', 'coupled', got 'typical'"),
        (dict(max_drafts=0), "max_drafts: expected >= 1, got 0"),
        (dict(confidence_threshold=1.5), "confidence_threshold: .* got 1.5"),
        (dict(confidence_threshold=math.nan), "confidence_threshold: .* got nan"),
        (dict(batch_size=0), "batch_size: expected >= 1, got 0"),
        (dict(cost=COST, confidence_threshold=0.5), "confidence_threshold: expected 0 together with cost"),
        (dict(cost=COST, policy="greedy"), "policy: .* got 'greedy'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        decode(TARGET, make_dspark(TARGET), requests_of(1), **options)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompt=[]), r"requests\[0\].prompt: expected ids from 0 to 10, at least one"),
        (dict(prompt=[0, 11]), r"requests\[0\].prompt"),
        (dict(prompt=[-1]), r"requests\[0\].prompt"),
        (dict(max_new_tokens=0), r"requests\[0\].max_new_tokens: expected >= 1, got 0"),
        (dict(seed=1 << 63), r"requests\[0\].seed: expected a 64-bit integer"),
    ],
)
def test_bad_requests(change, message):
    with pytest.raises(ValueError, match=message):
        decode(TARGET, Autoregressive(), requests_of(1, **change))


@pytest.mark.parametrize("name", ["draft model", "MTP", "block"])
@pytest.mark.parametrize("options", [dict(confidence_threshold=0.5), dict(cost=COST)])
def test_scheduling_needs_confidence(name, options):
    with pytest.raises(ValueError, match="drafter: expected one with a confidence head"):
        decode(TARGET, SYSTEMS[name][0](TARGET), requests_of(1), **options)


def test_nothing_to_decode():
    assert decode(TARGET, make_dspark(TARGET), []) == []


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target_layer_ids=[0, 1, 2]), r"target_layer_ids from -1 to 1, got \[0, 1, 2\]"),
        (dict(target_layer_ids=[]), r"got \[\]"),
        (dict(block_size=0), "block_size >= 1"),
        (dict(mask_token_id=VOCAB), "mask_token_id below it"),
        (dict(vocab_size=VOCAB + 1), f"vocab_size {VOCAB}"),
        (dict(target_layer_ids=[0]), r"fc.weight: expected shape \[16, 16\], got \[16, 48\]"),
    ],
)
def test_bad_block_configs(change, message):
    with pytest.raises(ValueError, match=message):
        Block({**BLOCK, **change}, block_tensors(4), TARGET)


def test_bad_drafters():
    tensors = block_tensors(4)
    for key in ("block_size", "mask_token_id", "target_layer_ids"):
        with pytest.raises(ValueError, match=f"expected the key '{key}'"):
            Block({name: value for name, value in BLOCK.items() if name != key}, tensors, TARGET)
    with pytest.raises(ValueError, match=r"lm_head.weight: expected shape \[11, 16\], got \[10, 16\]"):
        Block(BLOCK, {**tensors, "lm_head.weight": torch.zeros(VOCAB - 1, 16)}, TARGET)
    with pytest.raises(ValueError, match=r"lm_head.weight: expected a tensor of shape \[7, 16\]"):
        Block({**BLOCK, "draft_vocab_size": 7}, tensors, TARGET)
    with pytest.raises(ValueError, match=r"d2t: expected shape \[7\]"):
        Block({**BLOCK, "draft_vocab_size": 7}, {**tensors, "lm_head.weight": torch.zeros(7, 16)}, TARGET)
    with pytest.raises(ValueError, match="markov_head.markov_w1.weight"):
        DSpark(DSPARK, tensors, TARGET)
    with pytest.raises(ValueError, match="got 'lstm'"):
        make_dspark(TARGET, kind="lstm")
    with pytest.raises(ValueError, match="expected 4 sts_temperatures, got 1"):
        make_dspark(TARGET, sts_temperatures=[1.0])
    with pytest.raises(ValueError, match=r"eh_proj.weight: expected a tensor of shape \[16, 32\]"):
        MTP({}, {f"{name}.weight": torch.ones(16) for name in ("enorm", "hnorm", "norm")}, TARGET)
    with pytest.raises(ValueError, match="expected vocab_size 11, got 4"):
        DraftModel(dict(SIZES, num_hidden_layers=2, vocab_size=4), model_tensors(1, vocab=4), TARGET)
    for wrong in (0, True, "7"):
        with pytest.raises(ValueError, match="max_drafts >= 1"):
            DraftModel(dict(SIZES, num_hidden_layers=2, max_drafts=wrong), model_tensors(1), TARGET)
