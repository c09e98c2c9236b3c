"""Drafters of the speculators library: read with every key that changes their meaning, equal to the library's own numbers, lossless.

The directories are those of tests/directories.py, which speculators 0.9.0 loads as they are; its numbers were computed by
tests/checkpoints/run_publishers.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_kernels import checkpoint
from dspark_kernels.checkpoint.attention import Sight, sights
from dspark_kernels.integrations.transformers.backbone import Backbone
from reference.draft import draft_block
from reference.drafters import Anchors, Autoregressive, Block, Committed, DSpark, TreeShape
from reference.loop import REFERENCE_OPS, Request, decode
from reference.model import Rows, Target
from tests import directories as made

pytest.importorskip("safetensors.torch")
GOLDEN = Path(__file__).parents[1] / "data" / "golden_speculators.npz"
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def target():
    config, shapes = made.target()
    return Target(config, made.tensors(shapes, seed=1))


def written(directory, tensors=None, drop=(), seed=4, **changes):
    config, shapes = made.speculators(**changes)
    weights = {name: tensor for name, tensor in made.tensors(shapes, seed=seed).items() if name not in drop}
    return made.write(directory, config, weights | (tensors or {}))


def drafter_of(loaded, target):
    kind = DSpark if loaded.head is not None or loaded.confidence is not None else Block
    return kind(loaded.config, loaded.tensors, target)


# --- the library's own numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", made.GOLDEN)
def test_the_librarys_own_forward(tmp_path, target, name):
    loaded = checkpoint.load_drafter(written(tmp_path / "d", **made.GOLDEN[name]))
    with np.load(GOLDEN) as arrays:
        want = {key.removeprefix(f"{name}: "): torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith(f"{name}: ")}
    features, token_ids = made.golden_inputs()
    anchor, at = token_ids[20:21], torch.tensor([20])
    drafter = drafter_of(loaded, target)
    drafter.start(1)
    drafter.commit(Committed(Rows.of([(0, 0, 20)], "cpu"), None, None, None, features[:20]))
    hidden = drafter.block_hidden(Anchors.of(anchor, at, [0]))
    base = drafter.base_logits(hidden)
    torch.testing.assert_close(hidden[0], want["hidden"], **CLOSE)
    torch.testing.assert_close(base[0], want["base logits"], **CLOSE)
    block = draft_block(
        base, anchor, loaded.head, anchor_positions=at, hidden=hidden, confidence=loaded.confidence,
        draft_to_target=loaded.draft_to_target, keep_logits=True,
    )  # fmt: skip
    torch.testing.assert_close(block.proposal.logits[0], want.get("logits", want["base logits"]), **CLOSE)
    if loaded.confidence is not None:
        torch.testing.assert_close(block.confidence[0], want["confidence"], **CLOSE)
    proposed = drafter.propose(
        Anchors.of(anchor, at, [0]), drafts=loaded.block_size, sampling=None, noise="draft", ops=REFERENCE_OPS
    )
    best = want.get("logits", want["base logits"]).argmax(-1)
    assert torch.equal(proposed.tokens[0], best if loaded.draft_to_target is None else loaded.draft_to_target[best])
    # The backbone that generate uses, with a second row of another length beside it.
    backbone = Backbone(loaded, target.embedding, target.head)
    backbone.start(32)
    positions = torch.stack([torch.arange(20), torch.arange(20) - 4])
    both = torch.stack([features[:20], torch.cat([features[:4], features[:16]])])
    backbone.inject(both, positions.clamp(min=0), positions >= 0)
    hidden = backbone.hidden(anchor.expand(2), torch.tensor([20, 16]), 20 + backbone.block_rows)
    torch.testing.assert_close(hidden[0], want["hidden"], **CLOSE)
    torch.testing.assert_close(backbone.base_logits(hidden)[0], want["base logits"], **CLOSE)
    drafter.commit(Committed(Rows.of([(0, 0, 16)], "cpu"), None, None, None, features[:16]))
    torch.testing.assert_close(hidden[1], drafter.block_hidden(Anchors.of(anchor, torch.tensor([16]), [0]))[0], **CLOSE)


# --- read -------------------------------------------------------------------------------------------------------------

# What is changed -> words that the config is read in.
READ = {
    "as written": ({}, dict(block_size=8, mask_token_id=40, target_layer_ids=[0, 1], markov_rank=5, vocab_size=41, hidden_size=24)),
    "block 16": (dict(block=16), dict(block_size=16)),
    "the anchor does not predict": (dict(first=False), dict(block_size=7, anchor_first=False)),
    "dflash": (dict(kind="dflash"), dict(block_size=7, anchor_first=False, markov_rank=0, enable_confidence_head=False)),
    "dflash whose anchor predicts": (dict(kind="dflash", first=True), dict(block_size=8, anchor_first=True)),
    "the embedding and the last layer": (dict(aux_hidden_state_layer_ids=[0, 3]), dict(target_layer_ids=[-1, 2])),
    "the older name": (dict(architectures=["DSparkSpeculator"]), dict(block_size=8)),
    "the published name": (dict(architectures=["Qwen3DSparkModel"]), dict(block_size=8)),
    "a tied target": (dict(layers=dict(tie_word_embeddings=True)), dict(tie_word_embeddings=False)),
    "another library's layers": (dict(layers=dict(model_type="llama", mlp_bias=False)), dict(block_size=8)),
    "keys of transformers": (dict(pad_token_id=0, use_cache=True), dict(block_size=8)),
    "a quantised target's layers": (dict(layers=dict(quantization_config={"quant_method": "fp8"})), dict(block_size=8)),
}


@pytest.mark.parametrize("name", READ)
def test_words(tmp_path, name):
    changes, words = READ[name]
    directory = written(tmp_path / "d", **changes)
    loaded = checkpoint.load_drafter(directory)
    assert {key: loaded.config.get(key) for key in words} == words
    assert checkpoint.check(directory)[0] == loaded.config
    assert loaded.draft_to_target is None


def test_a_draft_vocabulary(tmp_path):
    loaded = checkpoint.load_drafter(written(tmp_path / "d", draft_vocab=17))
    assert loaded.draft_to_target.tolist() == list(range(0, 34, 2)) and loaded.draft_to_target.dtype == torch.int64
    assert loaded.head.w1.shape == (41, 5) and loaded.head.w2.shape == (17, 5)
    assert torch.equal(loaded.tensors["d2t"], torch.arange(17))
    assert checkpoint.load_drafter(written(tmp_path / "e", draft_vocab=17, drop=("t2d",))).draft_to_target is not None


def test_what_older_versions_wrote_besides(tmp_path):
    """Embedding and head are then the drafter's; what served the loss of its training is left in the files."""
    own = made.tensors({"embed_tokens.weight": [41, 24], "lm_head.weight": [41, 24]}, seed=8)
    training = made.tensors({"verifier_lm_head.weight": [41, 24], "verifier_norm.weight": [24]})
    loaded = checkpoint.load_drafter(written(tmp_path / "d", own | training))
    assert torch.equal(loaded.tensors["lm_head.weight"], own["lm_head.weight"])
    assert torch.equal(loaded.tensors["embed_tokens.weight"], own["embed_tokens.weight"])
    assert not any("verifier" in name for name in loaded.tensors)


def test_own_embedding_and_head_each_count_alone(tmp_path, target):
    for name in ("embed_tokens", "lm_head"):
        own = made.tensors({f"{name}.weight": [41, 24]}, seed=8)
        loaded = checkpoint.load_drafter(written(tmp_path / name, own))
        drafter, backbone = drafter_of(loaded, target), Backbone(loaded, target.embedding, target.head)
        for ours, theirs, own_name in (
            (drafter.embedding, target.embedding, "embed_tokens"),
            (drafter.lm_head, target.head, "lm_head"),
            (backbone._embedding, target.embedding, "embed_tokens"),
            (backbone._lm_head, target.head, "lm_head"),
        ):
            assert torch.equal(ours, own[f"{name}.weight"] if own_name == name else theirs)


def test_windows_by_layer(tmp_path):
    mixed = dict(layer_types=["full_attention", "sliding_attention"], sliding_window=6, use_sliding_window=True)
    for non_causal in (False, True):
        directory = written(tmp_path / f"{non_causal}", layers=mixed, sliding_window_non_causal=non_causal)
        assert sights(checkpoint.load_drafter(directory).config) == [Sight(None, False), Sight(6, not non_causal)]


# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "more drafts than rows": (
        dict(speculators_config=made.speculators(block=9)[0]["speculators_config"]),
        ("speculative_tokens 8 (the drafts of block_size), got 9, more than the block has rows",),
    ),
    "fewer drafts than rows": (
        dict(speculators_config=made.speculators(block=7)[0]["speculators_config"]),
        ("speculative_tokens 8 (the drafts of block_size), got 7",),
    ),
    "no word on the anchor": (dict(sample_from_anchor=None), ("sample_from_anchor true or false", "vLLM false", "got None")),
    "an anchor in quotes": (dict(sample_from_anchor="true"), ("sample_from_anchor true or false", "'true'")),
    "a state that has read the anchor": (dict(first=False, markov_head_type="rnn"), ("'rnn'", "the anchor's row")),
    "no layers of the target": (dict(aux_hidden_state_layer_ids=None), ("the key aux_hidden_state_layer_ids",)),
    "layers in another order": (dict(aux_hidden_state_layer_ids=[2, 1]), ("rising aux_hidden_state_layer_ids", "[2, 1]")),
    "layers in a word": (dict(aux_hidden_state_layer_ids="all"), ("aux_hidden_state_layer_ids to be layer ids, got 'all'",)),
    "a layer before the embedding": (dict(aux_hidden_state_layer_ids=[-1, 2]), ("target_layer_ids from -1", "[-2, 1]")),
    "no mask token": (dict(mask_token_id=None), ("the key mask_token_id",)),
    "a mask token outside": (dict(mask_token_id=41), ("mask_token_id from 0 to 40, got 41",)),
    "no draft vocabulary": (dict(draft_vocab_size=None), ("the key draft_vocab_size",)),
    "a draft vocabulary of more ids": (dict(draft_vocab_size=42), ("a draft_vocab_size from 1 to 41 (vocab_size), got 42",)),
    "a target of another width": (dict(target_hidden_size=32), ("target_hidden_size 24", "got 32")),
    "another algorithm": (
        dict(speculators_config={"algorithm": "dflash"}),
        ("speculators_config.algorithm 'dspark', got 'dflash'",),
    ),
    "an adapter": (dict(draft_adapter_rank=4), ("known keys alone, got draft_adapter_rank too",)),
    "EAGLE's norms": (dict(norm_before_residual=True), ("known keys alone, got norm_before_residual too",)),
    "heads of DSpark in DFlash": (dict(kind="dflash", markov_rank=5), ("known keys alone, got markov_rank too",)),
    "no layers": (dict(transformer_layer_config=None), ("transformer_layer_config to be an object, got None",)),
    "biases": (dict(layers=dict(attention_bias=True)), ("no attention_bias, got True",)),
    "another activation": (dict(layers=dict(hidden_act="gelu")), ("hidden_act 'silu', got 'gelu'",)),
    "RoPE by type of layer": (
        dict(layers=dict(rope_parameters={"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}})),
        ("one transformer_layer_config.rope_parameters for all layers", "full_attention, sliding_attention"),
    ),
    "YaRN without its context": (
        dict(layers=dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})),
        ("the key 'original_max_position_embeddings' with rope_type 'yarn'",),
    ),
    "windows without a size": (
        dict(layers={**made.SLIDING, "sliding_window": None}),
        ("an integer sliding_window >= 1, got None",),
    ),
    "windows that are switched off": (
        dict(layers={**made.SLIDING, "use_sliding_window": False}),
        ("use_sliding_window true", "got False"),
    ),
    "windows without a direction": (
        dict(layers=made.SLIDING, sliding_window_non_causal=None),
        ("sliding_window_non_causal true or false", "got None"),
    ),
    "an unknown type of layer": (
        dict(layers={**made.SLIDING, "layer_types": ["sliding_attention", "chunked_attention"]}),
        ("chunked_attention",),
    ),
    "a window in no layer": (dict(layers=dict(use_sliding_window=True)), ("full attention", "use_sliding_window True")),
    **{
        f"the kind {kind}": (dict(speculators_model_type=kind), (f"of the kind '{kind}', of which dspark and dflash are read",))
        for kind in ("dflash2", "peagle", "eagle", "mtp", "xpress")
    },
    "no kind": (
        dict(speculators_model_type=None, speculators_config=None),
        ("of the kind None, of which dspark and dflash are read",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path, name):
    changes, parts = REFUSED[name]
    directory = written(tmp_path / "d", **changes)
    for read in (checkpoint.load_drafter, checkpoint.check):
        with pytest.raises(ValueError) as refusal:
            read(directory)
        assert str(refusal.value).startswith(str(directory / "config.json"))
        assert all(part in str(refusal.value) for part in parts), refusal.value


def test_a_drafter_is_no_target(tmp_path):
    with pytest.raises(ValueError, match="of the kind 'dspark'"):
        checkpoint.load_target(written(tmp_path / "d"))


@pytest.mark.parametrize(
    "tensors, drop, message",
    [
        (dict(d2t=torch.arange(17) + 25), (), "d2t: offsets: expected target ids from 0 to 40, got 41 for draft id 8"),
        (dict(d2t=torch.arange(17) - 1), (), "d2t: offsets: expected target ids from 0 to 40, got -1 for draft id 0"),
        (
            dict(d2t=torch.tensor([0, -1, *range(2, 17)])),
            (),
            "d2t: offsets: expected each target id once, got 0 for draft ids 0 and 1",
        ),
        (dict(t2d=torch.arange(41) < 17), (), "t2d to be true for the ids that d2t names"),
        (dict(d2t=torch.arange(17).float()), (), "expected d2t in I64 or I32, got F32"),
        (dict(t2d=torch.zeros(41)), (), "expected t2d in BOOL, got F32"),
        (dict(d2t=torch.arange(18)), (), r"expected d2t of shape \[17\], got \[18\]"),
        ({}, ("d2t",), r"expected the tensor d2t \[17\], found none"),
        ({}, ("lm_head.weight",), r"expected the tensor lm_head.weight \[17, 24\], found none"),
        ({"markov_head.markov_w2.weight": torch.zeros(41, 5)}, (), r"markov_w2.weight of shape \[17, 5\], got \[41, 5\]"),
        ({"mask_embedding": torch.zeros(24)}, (), "expected no tensor mask_embedding"),
        ({"fc.weight_scale": torch.zeros(1)}, (), "expected no tensor fc.weight_scale"),
        ({"fc.weight": torch.zeros(24, 48).to(torch.float8_e4m3fn)}, (), "expected fc.weight in BF16 or F16 or F32, got F8_E4M3"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, tensors, drop, message):
    directory = written(tmp_path / "d", tensors, drop, draft_vocab=17)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_drafter(directory)


def test_maps_without_a_draft_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="expected no tensor d2t"):
        checkpoint.load_drafter(written(tmp_path / "d", dict(d2t=torch.zeros(41, dtype=torch.int64))))


# --- decode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", made.GOLDEN)
def test_greedy_text_is_the_targets_own(tmp_path, target, name):
    loaded = checkpoint.load_drafter(written(tmp_path / "d", **made.GOLDEN[name]))
    requests = [Request([3, 1, 4, 1, 5], 24), Request([2, 7], 24), Request([18, 28, 18], 24)]
    plain = decode(target, Autoregressive(), requests)
    drafted = decode(target, drafter_of(loaded, target), requests, batch_size=2)
    assert [g.output_ids for g in drafted] == [g.output_ids for g in plain]
    assert all(set(g.drafted_lengths) == {loaded.block_size} for g in drafted)
    trees = decode(target, drafter_of(loaded, target), requests, tree=TreeShape(8, "top_k", branching=(2, 2, 1)))
    assert [g.output_ids for g in trees] == [g.output_ids for g in plain]
