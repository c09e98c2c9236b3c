"""Drafters of the speculators library in `model.generate`: windows, blocks that are causal, and draft vocabularies."""

from __future__ import annotations

import pytest
import torch

from tests import directories as made

transformers = pytest.importorskip("transformers", reason="needs transformers, which is not installed")
pytest.importorskip("safetensors.torch", reason="needs safetensors, which is not installed")

from dspark_kernels.integrations.transformers import DSpark  # noqa: E402
from tests.integrations.test_transformers import PROMPTS, batch, check_same, reference, target_of  # noqa: E402, F401

RANK = 24


def drafter_of(model, directory, **changes):
    """A directory whose sequential head is the target's table of next tokens, over the ids of the drafter."""
    own_head = "lm_head.weight"
    config, shapes = made.speculators(markov_rank=RANK, **changes)
    draft_vocab = config["draft_vocab_size"]
    shapes |= {"markov_head.markov_w1.weight": [41, RANK], "markov_head.markov_w2.weight": [draft_vocab, RANK]}
    shapes |= {"confidence_head.proj.weight": [1, 24 + RANK], own_head: [draft_vocab, 24]}
    weights = made.tensors(shapes, seed=2)
    ids = torch.arange(draft_vocab) + weights.get("d2t", torch.zeros(draft_vocab, dtype=torch.int64))
    with torch.no_grad():
        table = model(input_ids=torch.arange(41)[:, None]).logits[:, -1]
    left, sizes, right = torch.linalg.svd(table, full_matrices=False)
    weights["markov_head.markov_w1.weight"] = (left * sizes)[:, :RANK].contiguous()
    weights["markov_head.markov_w2.weight"] = right[:RANK].T[ids].contiguous()
    weights[own_head] *= 0.3
    return made.write(directory, config, weights)


CASES = {
    "windows, 17 ids": dict(draft_vocab=17, layers=made.SLIDING),
    "windows both ways, all ids, yarn": dict(layers={**made.SLIDING, "rope_parameters": made.YARN}, sliding_window_non_causal=True),
    "the anchor does not predict, 17 ids": dict(draft_vocab=17, first=False),
}


@pytest.mark.parametrize("name", CASES)
def test_greedy_batches(tmp_path, name, reference):  # noqa: F811
    """Rows of unequal lengths, longer than the windows; a static cache too."""
    model = target_of("qwen3")
    dspark = DSpark.from_pretrained(drafter_of(model, tmp_path / "d", **CASES[name]), model)
    texts = check_same(model, dspark, batch(), max_new_tokens=14)
    seen = dspark.statistics
    assert 0 < sum(seen.accepted) < seen.row_rounds * len(seen.accepted), "nothing accepted, or nothing refused"
    assert seen.tokens_per_round > 1 and seen.flags == 0
    static = model.generate(**batch(), do_sample=False, max_new_tokens=14, custom_generate=dspark, cache_implementation="static")
    assert torch.equal(static, texts)
    sampled = [
        model.generate(**batch(), do_sample=True, max_new_tokens=8, custom_generate=dspark, seeds=seed) for seed in (1, 1, 2)
    ]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    assert dspark.statistics.flags == 0 and sum(dspark.statistics.accepted) > 0


OTHERS = {
    **{f"nvidia, {kind}": lambda kind=kind: made.modelopt(kind) for kind in made.KINDS},
    "dflash, windows, 17 ids": lambda: made.speculators("dflash", draft_vocab=17, block=9, layers=made.SLIDING),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_forms(tmp_path, name, reference):  # noqa: F811
    config, shapes = OTHERS[name]()
    model = target_of("llama")
    directory = made.write(tmp_path / "d", {**config, "num_target_layers": 2} if "nvidia" in name else config, made.tensors(shapes))
    dspark = DSpark.from_pretrained(directory, model)
    check_same(model, dspark, batch(), max_new_tokens=8)
    assert dspark.statistics.flags == 0 and len(dspark.statistics.accepted) == 8


def test_a_head_in_eight_bits_is_refused(tmp_path):
    """Targets in fp8 keep their head in 16 bits; the drafter computes in the head's dtype."""
    config, shapes = made.speculators()
    directory, model = made.write(tmp_path / "d", config, made.tensors(shapes)), target_of("llama")
    head = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(head.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="an output head in floats of at least 16 bits.*LlamaForCausalLM with one in torch.float8"):
        DSpark.from_pretrained(directory, model)


def test_the_ops_themselves(tmp_path):
    """Kernels in place of the reference's ops, for one short row."""
    model = target_of("qwen3")
    dspark = DSpark.from_pretrained(drafter_of(model, tmp_path / "d", draft_vocab=17, block=4), model)
    check_same(model, dspark, batch(PROMPTS[1:2]), max_new_tokens=5)
    assert sum(dspark.statistics.accepted) > 0
    model.generate(**batch(PROMPTS[1:2]), do_sample=True, max_new_tokens=4, custom_generate=dspark, seeds=1)
    assert dspark.statistics.flags == 0


def test_more_drafts_than_the_block_has_are_refused(tmp_path):
    model = target_of("qwen3")
    directory = drafter_of(model, tmp_path / "d", draft_vocab=17)
    with pytest.raises(ValueError, match="drafts: expected 1 to 8, .*no row that predicts a later one, got 9"):
        DSpark.from_pretrained(directory, model, drafts=9)


def test_a_head_of_the_target_needs_its_width(tmp_path):
    """Embedding and head are the target's, each where the files lack it."""
    config, shapes = made.speculators()
    loaded = made.write(tmp_path / "d", config, made.tensors(shapes))
    model = target_of("gpt2")  # of width 24 and 41 ids, too
    assert DSpark.from_pretrained(loaded, model)._backbone._lm_head is not None
    config, shapes = made.speculators(layers=dict(vocab_size=43), draft_vocab_size=43)
    shapes |= {name: [43, 5] for name in made.TABLES}
    with pytest.raises(ValueError, match="expected vocab_size 41, as GPT2LMHeadModel has it, got 43"):
        DSpark.from_pretrained(made.write(tmp_path / "e", config, made.tensors(shapes)), model)
