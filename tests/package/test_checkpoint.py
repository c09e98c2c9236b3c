"""checkpoint.load_drafter and load_target: what they read, and what they refuse by name."""

from __future__ import annotations

import builtins
import json
import math

import pytest
import torch

from dspark_kernels import checkpoint
from dspark_kernels.types import ConfidenceHead, GatedMarkovHead, MarkovHead, RnnMarkovHead

save_file = pytest.importorskip("safetensors.torch").save_file

SIZES = dict(
    hidden_size=12,
    intermediate_size=20,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_hidden_layers=2,
    vocab_size=23,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
DRAFTER = dict(
    SIZES,
    architectures=["Qwen3DSparkModel"],
    block_size=3,
    mask_token_id=22,
    target_layer_ids=[-1, 1],
    num_target_layers=2,
    markov_rank=5,
    markov_head_type="vanilla",
    enable_confidence_head=True,
    confidence_head_with_markov=True,
)
TARGET = dict(SIZES, architectures=["Qwen3ForCausalLM"], tie_word_embeddings=False)
LAYER = {
    "input_layernorm.weight": [12],
    "post_attention_layernorm.weight": [12],
    "self_attn.q_proj.weight": [24, 12],
    "self_attn.k_proj.weight": [12, 12],
    "self_attn.v_proj.weight": [12, 12],
    "self_attn.o_proj.weight": [12, 24],
    "self_attn.q_norm.weight": [6],
    "self_attn.k_norm.weight": [6],
    "mlp.gate_proj.weight": [20, 12],
    "mlp.up_proj.weight": [20, 12],
    "mlp.down_proj.weight": [12, 20],
}
BACKBONE = {
    "embed_tokens.weight": [23, 12],
    "lm_head.weight": [23, 12],
    "fc.weight": [12, 24],
    "hidden_norm.weight": [12],
    "norm.weight": [12],
    **{f"layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()},
}
TABLES = {"markov_head.markov_w1.weight": [23, 5], "markov_head.markov_w2.weight": [23, 5]}
HEADS = {
    "vanilla": TABLES,
    "gated": {**TABLES, "markov_head.gate_proj.weight": [5, 17], "markov_head.gate_proj.bias": [5]},
    "rnn": {**TABLES, "markov_head.joint_proj.weight": [15, 22], "markov_head.joint_proj.bias": [15]},
}
CONFIDENCE = {"confidence_head.proj.weight": [1, 17], "confidence_head.proj.bias": [1]}
TARGET_SHAPES = {
    "model.embed_tokens.weight": [23, 12],
    "model.norm.weight": [12],
    "lm_head.weight": [23, 12],
    **{f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()},
}


def random_tensors(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(directory, config, tensors):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def drafter_directory(tmp_path, kind="vanilla", **changes):
    shapes = {**BACKBONE, **HEADS[kind], **CONFIDENCE}
    config = {**DRAFTER, "markov_head_type": kind, **changes}
    return write(tmp_path / "drafter", config, random_tensors(shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, cls", [("vanilla", MarkovHead), ("gated", GatedMarkovHead), ("rnn", RnnMarkovHead)])
def test_drafter_with_each_head(tmp_path, kind, cls, dtype):
    tensors = random_tensors({**BACKBONE, **HEADS[kind], **CONFIDENCE}, dtype)
    config = {**DRAFTER, "markov_head_type": kind}
    loaded = checkpoint.load_drafter(write(tmp_path / "drafter", config, tensors))
    assert loaded.config == config
    assert loaded.tensors.keys() == tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensors[name]) for name in tensors)
    assert type(loaded.head) is cls
    assert torch.equal(loaded.head.w1, tensors["markov_head.markov_w1.weight"])
    assert torch.equal(loaded.head.w2, tensors["markov_head.markov_w2.weight"])
    if kind == "gated":
        assert torch.equal(loaded.head.gate_weight, tensors["markov_head.gate_proj.weight"])
        assert torch.equal(loaded.head.gate_bias, tensors["markov_head.gate_proj.bias"])
    if kind == "rnn":
        assert torch.equal(loaded.head.joint_weight, tensors["markov_head.joint_proj.weight"])
        assert torch.equal(loaded.head.joint_bias, tensors["markov_head.joint_proj.bias"])
    assert isinstance(loaded.confidence, ConfidenceHead)
    assert torch.equal(loaded.confidence.weight, tensors["confidence_head.proj.weight"][0])
    assert torch.equal(loaded.confidence.bias, tensors["confidence_head.proj.bias"])
    assert loaded.confidence.sts_temperatures is None
    assert (loaded.block_size, loaded.target_layer_ids) == (3, (-1, 1))


def test_drafter_without_heads(tmp_path):
    config = {**DRAFTER, "markov_rank": 0, "enable_confidence_head": False}
    loaded = checkpoint.load_drafter(write(tmp_path / "drafter", config, random_tensors(BACKBONE)))
    assert loaded.head is None and loaded.confidence is None


def test_confidence_without_the_markov_part(tmp_path):
    shapes = {**BACKBONE, **TABLES, **CONFIDENCE, "confidence_head.proj.weight": [1, 12]}
    config = {**DRAFTER, "confidence_head_with_markov": False}
    loaded = checkpoint.load_drafter(write(tmp_path / "d", config, random_tensors(shapes)))
    assert loaded.confidence.weight.shape == (12,)


def test_calibration_temperatures(tmp_path):
    loaded = checkpoint.load_drafter(drafter_directory(tmp_path, sts_temperatures=[1.0, 0.5, 2]))
    assert loaded.confidence.sts_temperatures.tolist() == [1.0, 0.5, 2.0]
    with pytest.raises(ValueError, match="3 positive sts_temperatures"):
        checkpoint.load_drafter(drafter_directory(tmp_path, sts_temperatures=[1.0, 0.5]))


@pytest.mark.parametrize("loader", ["load_drafter", "load_target"])
def test_older_rope_theta(tmp_path, loader):
    config, shapes = {
        "load_drafter": (DRAFTER, {**BACKBONE, **TABLES, **CONFIDENCE}),
        "load_target": (TARGET, TARGET_SHAPES),
    }[loader]
    load, tensors = getattr(checkpoint, loader), random_tensors(shapes)
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    assert load(write(tmp_path / "a", {**older, "rope_theta": 1e6}, tensors)).config["rope_theta"] == 1e6
    with pytest.raises(ValueError, match="rope_theta itself, got neither"):
        load(write(tmp_path / "a", older, tensors))
    with pytest.raises(ValueError, match="the key 'factor' with rope_type 'yarn'"):
        load(write(tmp_path / "a", {**older, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, tensors))
    with pytest.raises(ValueError, match="expected a rope_type of 'default', 'yarn', 'llama3', got 'linear'"):
        load(write(tmp_path / "a", {**older, "rope_theta": 1e6, "rope_scaling": {"type": "linear"}}, tensors))


def test_target_tied_and_untied(tmp_path):
    tensors = random_tensors(TARGET_SHAPES)
    loaded = checkpoint.load_target(write(tmp_path / "untied", TARGET, tensors))
    assert loaded.config == TARGET and loaded.tensors.keys() == tensors.keys()
    tied = {**TARGET, "tie_word_embeddings": True}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for extra in (True, False):  # some exporters write the tied head out too
        if not extra:
            del tensors["lm_head.weight"]
        loaded = checkpoint.load_target(write(tmp_path / f"tied{extra}", tied, tensors))
        assert loaded.tensors.keys() == TARGET_SHAPES.keys() - {"lm_head.weight"}
    with pytest.raises(ValueError, match=r"expected the tensor lm_head.weight \[23, 12\], found none"):
        checkpoint.load_target(write(tmp_path / "untied", TARGET, tensors))


def test_sharded(tmp_path):
    tensors = random_tensors({**BACKBONE, **TABLES, **CONFIDENCE})
    names = sorted(tensors)
    directory = tmp_path / "sharded"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(DRAFTER))
    weight_map = {}
    for i, part in enumerate((names[:9], names[9:]), start=1):
        shard = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / shard)
        weight_map.update(dict.fromkeys(part, shard))
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = checkpoint.load_drafter(directory)
    assert all(torch.equal(loaded.tensors[name], tensors[name]) for name in names)

    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002.safetensors: named by model.safetensors.index.json"):
        checkpoint.load_drafter(directory)
    index.write_text(json.dumps({"weight_map": {name: "../elsewhere.safetensors" for name in names}}))
    with pytest.raises(ValueError, match="expected file names in weight_map"):
        checkpoint.load_drafter(directory)
    index.write_text("{}")
    with pytest.raises(ValueError, match="expected a weight_map"):
        checkpoint.load_drafter(directory)


@pytest.mark.parametrize(
    "config",
    [
        {**SIZES, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 8},
        {**SIZES, "architectures": ["DFlash2DraftModel"], "block_size": 16, "dflash_config": {"target_layer_ids": [1]}},
        {**SIZES, "architectures": ["Qwen3ForCausalLM"]},
        {**DRAFTER, "architectures": ["Gemma3DSparkModel"]},
    ],
    ids=lambda config: config["architectures"][0],
)
def test_other_drafter_formats_are_refused_by_name(tmp_path, config):
    directory = write(tmp_path / "other", config, random_tensors({"fc.weight": [4, 4]}))
    with pytest.raises(ValueError, match=config["architectures"][0]) as refusal:
        checkpoint.load_drafter(directory)
    assert "Qwen3DSparkModel" in str(refusal.value)


def test_config_without_architectures(tmp_path):
    directory = write(tmp_path / "other", {"model_type": "gpt2"}, random_tensors({"fc.weight": [4, 4]}))
    for load in (checkpoint.load_drafter, checkpoint.load_target):
        with pytest.raises(ValueError, match=r"got none \(model_type 'gpt2'\)"):
            load(directory)


def test_a_drafter_is_no_target(tmp_path):
    with pytest.raises(ValueError, match=r'expected architectures \["Qwen3ForCausalLM"\], got \["Qwen3DSparkModel"\]'):
        checkpoint.load_target(drafter_directory(tmp_path))


@pytest.mark.parametrize("kind", HEADS)
def test_every_missing_tensor_is_named(tmp_path, kind):
    tensors = random_tensors({**BACKBONE, **HEADS[kind], **CONFIDENCE})
    config = {**DRAFTER, "markov_head_type": kind}
    for name in tensors:
        if kind != "vanilla" and name in BACKBONE:
            continue
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(ValueError, match=f"expected the tensor {name} .*, found none"):
            checkpoint.load_drafter(write(tmp_path / "d", config, rest))


@pytest.mark.parametrize("kind", HEADS)
def test_every_wrong_shape_is_named(tmp_path, kind):
    tensors = random_tensors({**BACKBONE, **HEADS[kind], **CONFIDENCE})
    config = {**DRAFTER, "markov_head_type": kind}
    for name, tensor in tensors.items():
        if kind != "vanilla" and name in BACKBONE:
            continue
        wrong = {**tensors, name: torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)}
        got = list(wrong[name].shape)
        with pytest.raises(ValueError) as refusal:
            checkpoint.load_drafter(write(tmp_path / "d", config, wrong))
        assert f"expected {name} of shape {list(tensor.shape)}, got {got}" in str(refusal.value)


def test_transposed_tensor_is_refused(tmp_path):
    tensors = random_tensors({**BACKBONE, **TABLES, **CONFIDENCE})
    tensors["fc.weight"] = tensors["fc.weight"].T.contiguous()
    with pytest.raises(ValueError, match=r"fc.weight of shape \[12, 24\], got \[24, 12\]"):
        checkpoint.load_drafter(write(tmp_path / "d", DRAFTER, tensors))


def test_wrong_dtype_is_refused(tmp_path):
    tensors = random_tensors({**BACKBONE, **TABLES, **CONFIDENCE})
    tensors["norm.weight"] = torch.ones(12, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected norm.weight in BF16 or F16 or F32, got I32"):
        checkpoint.load_drafter(write(tmp_path / "d", DRAFTER, tensors))


def test_surplus_tensor_is_refused(tmp_path):
    tensors = random_tensors({**BACKBONE, **TABLES, **CONFIDENCE, "d2t": [8]})
    with pytest.raises(ValueError, match="expected no tensor d2t"):
        checkpoint.load_drafter(write(tmp_path / "d", DRAFTER, tensors))
    # A gated checkpoint whose config says vanilla would lose its gate in silence.
    tensors = random_tensors({**BACKBONE, **HEADS["gated"], **CONFIDENCE})
    with pytest.raises(ValueError, match=r"expected no tensor markov_head.gate_proj.* \(and 1 more\)"):
        checkpoint.load_drafter(write(tmp_path / "d", DRAFTER, tensors))


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, 0.999])
def test_truncated_file(tmp_path, keep):
    directory = drafter_directory(tmp_path)
    file = directory / "model.safetensors"
    content = file.read_bytes()
    length = keep if isinstance(keep, int) else math.floor(keep * len(content))
    file.write_bytes(content[:length])
    with pytest.raises(ValueError, match=f"expected a complete safetensors file, got {length} bytes that do not parse"):
        checkpoint.load_drafter(directory)


def test_git_lfs_pointer(tmp_path):
    directory = drafter_directory(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"
    (directory / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match="got a Git LFS pointer"):
        checkpoint.load_drafter(directory)


def test_missing_directory_names_the_published_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="deepseek-ai/dspark_qwen3_4b_block7.*8b.*14b"):
        checkpoint.load_drafter(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="Qwen/Qwen3-4B"):
        checkpoint.load_target(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FileNotFoundError, match="expected a directory"):
        checkpoint.load_drafter(file)


def test_missing_files_are_named_with_what_is_there(tmp_path):
    directory = drafter_directory(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="expected model.safetensors .* has config.json, pytorch_model.bin"):
        checkpoint.load_drafter(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: no such file; the directory has pytorch_model.bin"):
        checkpoint.load_drafter(directory)


@pytest.mark.parametrize("text, found", [("{", "does not parse"), ("[]", "got list"), ("\xff", "does not parse")])
def test_broken_config(tmp_path, text, found):
    directory = drafter_directory(tmp_path)
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=found):
        checkpoint.load_drafter(directory)


REQUIRED = sorted(DRAFTER.keys() - {"architectures", "rope_parameters"})


@pytest.mark.parametrize("key", REQUIRED)
def test_every_missing_key_is_named(tmp_path, key):
    config = {name: value for name, value in DRAFTER.items() if name != key}
    with pytest.raises(ValueError, match=f"expected the keys {key}"):
        checkpoint.load_drafter(write(tmp_path / "d", config, random_tensors({"fc.weight": [4, 4]})))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden_size=0), "integer hidden_size >= 1, got 0"),
        (dict(block_size=0), "integer block_size >= 1, got 0"),
        (dict(block_size="7"), "integer block_size >= 1, got '7'"),
        (dict(num_hidden_layers=True), "integer num_hidden_layers >= 1, got True"),
        (dict(num_key_value_heads=3), "multiple of num_key_value_heads, got 4 and 3"),
        (dict(markov_rank=-1), "integer markov_rank >= 0, got -1"),
        (dict(markov_head_type="lstm"), "got 'lstm'"),
        (dict(markov_rank=0), "markov_rank >= 1 with confidence_head_with_markov"),
        (dict(target_layer_ids=[0, 2]), r"from -1 to 1 \(num_target_layers - 1\), got \[0, 2\]"),
        (dict(target_layer_ids=[]), r"got \[\]"),
        (dict(mask_token_id=23), "mask_token_id from 0 to 22, got 23"),
    ],
)
def test_impossible_config_values(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.load_drafter(drafter_directory(tmp_path, **change))


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "safetensors":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    directory = drafter_directory(tmp_path)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install dspark_kernels\[checkpoints\]"):
        checkpoint.load_drafter(directory)
