"""DSpark drafters as NVIDIA Model-Optimizer exports them: the same drafter as in DeepSpec's form, with other names.

That its own draft module computes what is computed here, is what tests/checkpoints/run_publishers.py compares.
"""

from __future__ import annotations

import pytest
import torch

from dspark_kernels import checkpoint
from reference.drafters import Anchors, Autoregressive, Committed, DSpark
from reference.loop import REFERENCE_OPS, Request, decode
from reference.model import Rows, Target
from tests import directories as made

pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def target():
    config, shapes = made.target()
    return Target(config, made.tensors(shapes, seed=1))


def written(directory, tensors=None, top=None, rename=str, **changes):
    config, shapes = made.modelopt(**changes)
    weights = {rename(name): tensor for name, tensor in made.tensors(shapes, seed=4).items()}
    return made.write(directory, {**config, **(top or {})}, weights | (tensors or {}))


@pytest.mark.parametrize("kind", made.KINDS)
@pytest.mark.parametrize("confidence", [True, False])
def test_words_and_names(tmp_path, kind, confidence):
    loaded = checkpoint.load_drafter(written(tmp_path / "d", kind=kind, confidence=confidence))
    words = dict(block_size=8, anchor_first=True, mask_token_id=40, target_layer_ids=[0, 1], markov_rank=5, markov_head_type=kind)
    words |= dict(enable_confidence_head=confidence, confidence_head_with_markov=True)
    assert {key: loaded.config[key] for key in words} == words
    assert loaded.head.w1.shape == (41, 5) and (loaded.confidence is not None) == confidence
    assert not any(name.startswith(("markov_w1", "gate_proj", "joint_proj", "confidence_proj")) for name in loaded.tensors)


def test_it_drafts_as_deepspecs_form_does(tmp_path, target):
    """The same weights under DeepSpec's names, with the target's embedding and head written out."""
    loaded = checkpoint.load_drafter(written(tmp_path / "d", kind="gated"))
    config, shapes = made.dspark(kind="gated", block_size=8, target_layer_ids=[0, 1])
    tensors = dict(loaded.tensors) | {"embed_tokens.weight": target.embedding, "lm_head.weight": target.head}
    assert tensors.keys() == shapes.keys()
    other = checkpoint.load_drafter(made.write(tmp_path / "e", config, {name: t.contiguous() for name, t in tensors.items()}))
    blocks = []
    for each in (loaded, other):
        drafter = DSpark(each.config, each.tensors, target)
        drafter.start(1)
        features = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
        drafter.commit(Committed(Rows.of([(0, 0, 5)], "cpu"), None, None, None, features))
        anchors = Anchors.of(torch.tensor([7]), torch.tensor([5]), [0])
        blocks.append(drafter.propose(anchors, drafts=8, sampling=None, noise="draft", ops=REFERENCE_OPS))
    assert torch.equal(blocks[0].tokens, blocks[1].tokens) and torch.equal(blocks[0].confidence, blocks[1].confidence)


def test_nested_names_are_read_too(tmp_path):
    heads = ("markov_w1.", "markov_w2.")
    directory = written(tmp_path / "d", rename=lambda name: f"markov_head.{name}" if name.startswith(heads) else name)
    assert checkpoint.load_drafter(directory).head is not None
    twice = written(tmp_path / "e", {"markov_head.markov_w1.weight": torch.zeros(41, 5)})
    with pytest.raises(ValueError, match="expected one markov_head.markov_w1.weight"):
        checkpoint.load_drafter(twice)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(shift_label=None), "a dflash_config with the key shift_label"),
        (dict(markov_rank=None), "a dflash_config with the key markov_rank"),
        (dict(projector_type="domino"), "a head of the kind 'domino', of which 'dspark' is read"),
        (dict(projector_type="lilicorr"), "a head of the kind 'lilicorr'"),
        (dict(causal=True), "dflash_config.causal False .*got True"),
        (dict(use_swa=True, swa_window_size=64), "full attention in every layer, got dflash_config.use_swa True"),
        (dict(attention_sink_bias=True), "no dflash_config.attention_sink_bias, got True"),
        (dict(gru_hidden_dim=8), "known keys alone, got gru_hidden_dim too"),
    ],
)
def test_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.load_drafter(written(tmp_path / "d", **changes))
    with pytest.raises(ValueError, match="expected no tensor layers.0.self_attn.attention_sink_bias"):
        checkpoint.load_drafter(written(tmp_path / "s", {"layers.0.self_attn.attention_sink_bias": torch.zeros(4)}))


def test_greedy_text_is_the_targets_own(tmp_path, target):
    loaded = checkpoint.load_drafter(written(tmp_path / "d", kind="rnn"))
    requests = [Request([3, 1, 4, 1, 5], 24), Request([2, 7], 24)]
    plain = decode(target, Autoregressive(), requests)
    drafted = decode(target, DSpark(loaded.config, loaded.tensors, target), requests)
    assert [g.output_ids for g in drafted] == [g.output_ids for g in plain]
