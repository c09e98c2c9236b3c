"""Draft models: any causal language model of transformers drafts for a target."""

from __future__ import annotations

import pytest
import torch

from reference import huggingface
from reference.drafters import Autoregressive, DraftModel
from reference.loop import Request, decode
from reference.model import Target
from tests import directories as made

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors.torch")
SIZES = dict(
    hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=41,
    max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
}
REQUESTS = [Request([3, 1, 4, 1, 5, 9, 2, 6], 16), Request([2, 7], 16), Request([18, 28, 18], 16)]


@pytest.fixture(scope="module")
def target():
    config, shapes = made.target()
    return Target(config, made.tensors(shapes, seed=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_targets_own(tmp_path, target, family):
    torch.manual_seed(3)
    FAMILIES[family]().save_pretrained(tmp_path / family)
    drafter = DraftModel.of(huggingface.load(tmp_path / family), target, max_drafts=3)
    plain = decode(target, Autoregressive(), REQUESTS)
    drafted = decode(target, drafter, REQUESTS, batch_size=2)
    assert [g.output_ids for g in drafted] == [g.output_ids for g in plain]
    assert drafter.passes > 0 and all(set(g.drafted_lengths) == {3} for g in drafted)


def test_a_model_accepts_all_that_it_drafted_itself(tmp_path):
    """So its cache holds what the target kept, in every round."""
    torch.manual_seed(4)
    FAMILIES["llama"]().save_pretrained(tmp_path / "llama")
    target = huggingface.load(tmp_path / "llama")
    drafted = decode(target, DraftModel.of(huggingface.load(tmp_path / "llama"), target, max_drafts=3), REQUESTS, batch_size=2)
    assert all(length == 4 for g in drafted for length in g.acceptance_lengths[:-1])


def test_another_vocabulary_is_refused(tmp_path, target):
    torch.manual_seed(4)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "vocab_size": 43})).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="expected vocab_size 41, got 43"):
        DraftModel.of(huggingface.load(tmp_path / "llama"), target)
    with pytest.raises(ValueError, match="max_drafts >= 1"):
        DraftModel.of(target, target, max_drafts=0)
