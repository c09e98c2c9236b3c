"""EAGLE-3 drafters: every form that is published read into one set of words, equal to speculators' own numbers, lossless."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_kernels import checkpoint
from dspark_kernels.checkpoint import formats
from reference.drafters import Anchors, Autoregressive, Committed, Eagle3, TreeShape
from reference.loop import REFERENCE_OPS, Request, decode
from reference.model import Rows, Target
from tests import directories as made

pytest.importorskip("safetensors.torch")
GOLDEN = Path(__file__).parents[1] / "data" / "golden_speculators.npz"
DROPPED = object()


@pytest.fixture(scope="module")
def target():
    config, shapes = made.target()
    return Target(config, made.tensors(shapes, seed=1))


def written(directory, build, tensors=None, drop=(), rename=str, **changes):
    config, shapes = build(**{key: value for key, value in changes.items() if value is not DROPPED})
    config = {key: value for key, value in config.items() if changes.get(key) is not DROPPED}
    weights = {rename(name): tensor for name, tensor in made.tensors(shapes, seed=4).items() if name not in drop}
    return made.write(directory, config, weights | (tensors or {}))


class Watched:
    """The reference's ops, which keep the logits that they are given."""

    def __init__(self):
        self.logits = []

    def draft_block(self, logits, *arguments, **options):
        self.logits.append(logits[0, 0])
        return REFERENCE_OPS.draft_block(logits, *arguments, **options)


# --- the library's own numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", made.GOLDEN_EAGLE3)
def test_the_librarys_own_forward(tmp_path, target, name):
    """Logits of five drafts that follow each other, after a context of 20 that came in two commits with a round between them."""
    loaded = checkpoint.load_eagle3(written(tmp_path / "d", made.eagle3_of_speculators, **made.GOLDEN_EAGLE3[name]))
    with np.load(GOLDEN) as arrays:
        want = torch.from_numpy(arrays[f"eagle3: {name}"])
    features, token_ids = made.golden_inputs()
    features = torch.cat([features, features.flip(1)[:, :24]], 1)
    drafter = Eagle3({**loaded.config, "max_drafts": 5}, loaded.tensors, target)
    drafter.start(1)
    for begin, end in ((0, 17), (17, 20)):
        rows = Rows.of([(0, begin, end - begin)], "cpu")
        drafter.commit(Committed(rows, token_ids[begin:end], token_ids[begin + 1 : end + 1], None, features[begin:end]))
        anchors = Anchors.of(token_ids[end : end + 1], torch.tensor([end]), [0])
        ops = Watched()
        block = drafter.propose(anchors, drafts=5, sampling=None, noise="draft", ops=ops)
    torch.testing.assert_close(torch.stack(ops.logits), want, rtol=1e-4, atol=1e-5)
    best = want.argmax(-1)
    assert torch.equal(block.tokens[0], best if loaded.draft_to_target is None else loaded.draft_to_target[best])


# --- read -------------------------------------------------------------------------------------------------------------

NVIDIA = {
    "eagle_aux_hidden_state_layer_ids": [1, 2, 3], "use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True, "use_mtp_layernorm": False,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}
# build, changes -> words that the config is read in.
READ = {
    "SafeAILab": (made.eagle3, {}, dict(target_layer_ids=None, head_norms=False, draft_vocab_size=11, norm_before_residual=False)),
    "called a language model": (made.eagle3, dict(architectures=["LlamaForCausalLM"]), dict(draft_vocab_size=11)),
    "another name": (made.eagle3, dict(architectures=["Eagle3LlamaForCausalLM"]), dict(draft_vocab_size=11)),
    "Llama 3's RoPE": (made.eagle3, dict(rope_scaling={**LLAMA3, "rope_type": "llama3"}), dict(draft_vocab_size=11)),
    "NVIDIA's block": (made.eagle3, dict(eagle_config=NVIDIA), dict(target_layer_ids=[0, 1, 2])),
    "norms in NVIDIA's block": (
        lambda **changes: _with(made.eagle3(**changes), {"input_norm.weight": [72]}),
        dict(eagle_config={**NVIDIA, "norm_before_fc": True, "norm_before_residual": True}),
        dict(norm_before_fc=True, norm_before_residual=True, fc_norm=False),
    ),
    "layers at the top": (made.eagle3, dict(eagle_aux_hidden_state_layer_ids=[1, 2, 3]), dict(target_layer_ids=[0, 1, 2])),
    "layers by their outputs": (made.eagle3, dict(target_layer_ids=[0, 1, 2]), dict(target_layer_ids=[0, 1, 2])),
    "speculators": (made.eagle3_of_speculators, {}, dict(target_layer_ids=[0, 1, 2], head_norms=False, draft_vocab_size=17)),
    "speculators, Qwen3": (made.eagle3_of_speculators, dict(model_type="qwen3"), dict(head_norms=True)),
    "speculators, of an older name": (
        made.eagle3_of_speculators, dict(architectures=["Eagle3Speculator"], norm_before_residual=True), dict(norm_before_residual=True),
    ),
}  # fmt: skip


def _with(built, shapes):
    return built[0], {**built[1], **shapes}


@pytest.mark.parametrize("name", READ)
def test_words(tmp_path, name):
    build, changes, words = READ[name]
    directory = written(tmp_path / "d", build, **changes)
    loaded = checkpoint.load_eagle3(directory)
    assert {key: loaded.config.get(key) for key in words} == words
    assert loaded.draft_to_target.tolist() == [2 * i for i in range(loaded.config["draft_vocab_size"])]
    assert loaded.tensors["layers.0.self_attn.q_proj.weight"].shape == (32, 48)
    config, form = checkpoint.check(directory)
    assert config == loaded.config and form is formats.EAGLE3


def test_names_of_tensors(tmp_path):
    """`midlayer.`, `layers.0.`, and `model.` before either."""
    for i, rename in enumerate(
        (str, lambda name: name.replace("midlayer.", "layers.0."), lambda name: name if name[1:] == "2t" else "model." + name)
    ):
        directory = written(tmp_path / str(i), made.eagle3, rename=rename)
        assert "layers.0.hidden_norm.weight" in checkpoint.load_eagle3(directory).tensors
    twice = {"layers.0.hidden_norm.weight": torch.ones(24)}
    with pytest.raises(ValueError, match=r"expected one layers.0.hidden_norm.weight, got (mid)?layer"):
        checkpoint.load_eagle3(written(tmp_path / "twice", made.eagle3, twice))


def test_all_ids_with_and_without_maps(tmp_path):
    zeros = dict(d2t=torch.zeros(41, dtype=torch.int64), t2d=torch.ones(41, dtype=torch.bool))
    for i, tensors in enumerate(({}, zeros)):
        loaded = checkpoint.load_eagle3(written(tmp_path / str(i), made.eagle3_of_speculators, tensors, draft_vocab=41))
        assert loaded.draft_to_target is None
    turned = dict(d2t=torch.tensor([1, -1, *[0] * 39]))
    with pytest.raises(ValueError, match="d2t to be zeros beside a draft_vocab_size of all 41 ids"):
        checkpoint.load_eagle3(written(tmp_path / "t", made.eagle3_of_speculators, turned, draft_vocab=41))


# --- refused ----------------------------------------------------------------------------------------------------------

OURS, THEIRS = made.eagle3, made.eagle3_of_speculators
REFUSED = {
    "no layers of the target": (OURS, dict(eagle_config={**NVIDIA, "use_aux_hidden_state": False}), ("use_aux_hidden_state True",)),
    "drafts in parallel": (OURS, dict(eagle_config={**NVIDIA, "parallel_draft_step": 2}), ("parallel_draft_step 1", "got 2")),
    "an unknown key in the block": (OURS, dict(eagle_config={**NVIDIA, "lora": 1}), ("known keys alone, got lora too",)),
    "a block in a word": (OURS, dict(eagle_config="yes"), ("eagle_config to be an object, got 'yes'",)),
    "no theta": (OURS, dict(rope_theta=DROPPED), ("rope_theta itself, got neither",)),
    "Gemma's layers": (OURS, dict(architectures=["Gemma4Eagle3Model"]), ("layers of llama or qwen3", "Gemma4Eagle3Model")),
    "DeepSeek's layers": (
        OURS, dict(architectures=["Eagle3DeepseekV2ForCausalLM"], model_type="kimi_k2"), ("layers of llama or qwen3", "'kimi_k2'"),
    ),
    "two lists of layers": (
        OURS, dict(target_layer_ids=[0, 1, 2], eagle_config={**NVIDIA, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}),
        ("one target_layer_ids", "[-1, 0, 1] (eagle_config.eagle_aux_hidden_state_layer_ids, one higher there)"),
    ),
    "layers in another order": (OURS, dict(target_layer_ids=[2, 0, 1]), ("rising target layers", "[2, 0, 1]")),
    "layers in a word": (OURS, dict(eagle_aux_hidden_state_layer_ids="all"), ("to be layer ids, got 'all'",)),
    "both norms": (THEIRS, dict(norm_before_fc=True, fc_norm=True), ("norm_before_fc or fc_norm, got both",)),
    "a norm in quotes": (THEIRS, dict(norm_output="true"), ("norm_output true or false, got 'true'",)),
    "no word on the residual": (THEIRS, dict(norm_before_residual=None), ("norm_before_residual", "speculators takes false and vLLM true")),
    "an unknown key": (THEIRS, dict(adapter=1), ("known keys alone, got adapter too",)),
    "another algorithm": (THEIRS, dict(speculators_config={"algorithm": "peagle"}), ("'eagle3', got 'peagle'",)),
    "biases": (OURS, dict(attention_bias=True), ("no attention_bias, got True",)),
    "biases of another name": (OURS, dict(qkv_bias=True), ("qkv_bias False", "got True")),
    "biases of the MLP": (OURS, dict(mlp_bias=True), ("mlp_bias False", "got True")),
    "a scale of logits": (OURS, dict(logit_scale=0.5), ("logit_scale 1", "got 0.5")),
    "windows of another format": (OURS, dict(layer_types=["sliding_attention"], sliding_window=6), ("full attention in every layer",)),
    "more ids than the target's": (OURS, dict(draft_vocab_size=42), ("draft_vocab_size of at most 41 (vocab_size), got 42",)),
    "no heads": (OURS, dict(num_attention_heads=0), ("integer num_attention_heads >= 1, got 0",)),
    "heads that do not divide": (OURS, dict(num_key_value_heads=3), ("multiple of num_key_value_heads, got 4 and 3",)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path, name):
    build, changes, parts = REFUSED[name]
    directory = written(tmp_path / "d", build, **changes)
    for read in (checkpoint.load_eagle3, checkpoint.check):
        with pytest.raises(ValueError) as refusal:
            read(directory)
        assert str(refusal.value).startswith(str(directory / "config.json"))
        assert all(part in str(refusal.value) for part in parts), refusal.value


def test_tensors_of_other_forms_are_refused(tmp_path):
    for name, shape in (("mask_hidden", (1, 72)), ("parallel_draft_heads.0.linear.weight", (24, 24)), ("fc.bias", (24,))):
        with pytest.raises(ValueError, match=f"expected no tensor {name}"):
            checkpoint.load_eagle3(written(tmp_path / name, OURS, {name: torch.zeros(shape)}))
    directory = written(tmp_path / "bin", OURS)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="the directory has config.json, pytorch_model.bin"):
        checkpoint.load_eagle3(directory)


def test_other_loaders_and_other_directories(tmp_path):
    with pytest.raises(ValueError, match="an EAGLE-3 drafter.*load_eagle3 reads it"):
        checkpoint.load_drafter(written(tmp_path / "d", OURS))
    with pytest.raises(ValueError, match="expected an EAGLE-3 drafter, got .*Qwen3DSparkModel"):
        checkpoint.load_eagle3(made.write(tmp_path / "e", *[made.dspark()[0], made.tensors(made.dspark()[1])]))


# --- decode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*made.GOLDEN_EAGLE3, "SafeAILab", "NVIDIA"])
def test_greedy_text_is_the_targets_own(tmp_path, target, name):
    """A chain, and a tree that grows by `expand_tree`, depth by depth; SafeAILab's form with target layers by default."""
    forms = {"SafeAILab": {}, "NVIDIA": dict(eagle_config=NVIDIA)}
    build, changes = (made.eagle3, forms[name]) if name in forms else (made.eagle3_of_speculators, made.GOLDEN_EAGLE3[name])
    loaded = checkpoint.load_eagle3(written(tmp_path / "d", build, **changes))
    requests = [Request([3, 1, 4, 1, 5], 20), Request([2, 7], 20), Request([18, 28, 18], 20)]
    plain = decode(target, Autoregressive(), requests)
    drafter = Eagle3(loaded.config, loaded.tensors, target)
    drafted = decode(target, drafter, requests, batch_size=2)
    assert [g.output_ids for g in drafted] == [g.output_ids for g in plain]
    assert drafter.feature_layers == ((1, 0, -1) if name == "SafeAILab" else (0, 1, 2)) and drafter.passes > 0
    shape = TreeShape(8, "top_k", branching=(2, 2, 1))
    trees = decode(target, Eagle3(loaded.config, loaded.tensors, target), requests, batch_size=2, tree=shape)
    assert [g.output_ids for g in trees] == [g.output_ids for g in plain]


def test_a_tree_of_one_path_is_the_chain(tmp_path, target):
    """Windows too: nodes see what the row before them saw, however deep they are."""
    for name in ("llama, windows, a norm for each layer", "qwen3, all ids, every norm"):
        loaded = checkpoint.load_eagle3(written(tmp_path / name, made.eagle3_of_speculators, **made.GOLDEN_EAGLE3[name]))
        requests = [Request([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], 12), Request([2, 7], 12)]
        chain = decode(target, Eagle3(loaded.config, loaded.tensors, target), requests)
        path = decode(
            target, Eagle3(loaded.config, loaded.tensors, target), requests, tree=TreeShape(5, "top_k", branching=(1, 1, 1, 1))
        )
        assert [g.acceptance_lengths for g in path] == [g.acceptance_lengths for g in chain]
    drafter = Eagle3(loaded.config, loaded.tensors, target)
    texts = []
    for tree in (None, TreeShape(4, "top_k", branching=(1, 1, 1))):
        drafter.start(1)
        rows = Rows.of([(0, 0, 3)], "cpu")
        features = torch.randn(3, 72, generator=torch.Generator().manual_seed(1))
        drafter.commit(Committed(rows, torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4]), None, features))
        anchors = Anchors.of(torch.tensor([4]), torch.tensor([3]), [0])
        if tree is None:
            texts.append(drafter.propose(anchors, drafts=3, sampling=None, noise="draft", ops=REFERENCE_OPS).tokens[0])
        else:
            texts.append(drafter.propose_tree(anchors, shape=tree, sampling=None, ops=REFERENCE_OPS).tokens[0, 1:4])
    assert torch.equal(*texts)


def test_a_drafter_of_another_target_is_refused(tmp_path, target):
    loaded = checkpoint.load_eagle3(written(tmp_path / "d", THEIRS, eagle_aux_hidden_state_layer_ids=[1, 2, 5]))
    with pytest.raises(ValueError, match=r"expected target_layer_ids from -1 to 2, got \[0, 1, 4\]"):
        Eagle3(loaded.config, loaded.tensors, target)
    loaded = checkpoint.load_eagle3(written(tmp_path / "e", OURS))
    with pytest.raises(ValueError, match=r"d2t: expected shape \[11\]"):
        Eagle3(loaded.config, {name: tensor for name, tensor in loaded.tensors.items() if name != "d2t"}, target)
    with pytest.raises(ValueError, match="expected vocab_size 41, got 43"):
        Eagle3({**loaded.config, "vocab_size": 43}, loaded.tensors, target)
