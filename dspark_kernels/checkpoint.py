"""Read DSpark drafters and their targets from Hugging Face style directories, and refuse everything else by name.

A directory holds config.json and model.safetensors (or model.safetensors.index.json and its shards). Drafters:
`Qwen3DSparkModel`, as published by DeepSpec under deepseek-ai/dspark_qwen3_{4b,8b,14b}_block7. Targets:
`Qwen3ForCausalLM`. Every tensor's presence, shape and dtype is checked before any is read.

Source of the format: github.com/deepseek-ai/DeepSpec and arXiv 2607.05147.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Mapping

import torch
from torch import Tensor

from .types import ConfidenceHead, GatedMarkovHead, MarkovHead, RnnMarkovHead

DRAFTER_ARCHITECTURE = "Qwen3DSparkModel"
TARGET_ARCHITECTURE = "Qwen3ForCausalLM"
HEAD_TYPES = ("vanilla", "gated", "rnn")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DRAFTERS = "DSpark drafters on Hugging Face: " + ", ".join(
    f"deepseek-ai/dspark_qwen3_{size}_block7" for size in ("4b", "8b", "14b")
)
_TARGETS = "targets on Hugging Face: Qwen/Qwen3-4B, Qwen/Qwen3-8B, Qwen/Qwen3-14B"
_LAYER_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "vocab_size",
)
_DRAFTER_SIZES = ("block_size", "num_target_layers")
_DRAFTER_KEYS = ("mask_token_id", "target_layer_ids", "markov_rank", "enable_confidence_head")


@dataclasses.dataclass(frozen=True, eq=False)
class DrafterCheckpoint:
    """A DSpark drafter: the config as read, tensors by name in their stored dtype, and the heads that draft_block
    takes.

    head: MarkovHead, GatedMarkovHead, RnnMarkovHead, or None at rank 0. confidence: ConfidenceHead or None. Both share
    the memory of `tensors`.
    """

    config: dict
    tensors: dict[str, Tensor]
    head: MarkovHead | None
    confidence: ConfidenceHead | None

    @property
    def block_size(self) -> int:
        return self.config["block_size"]

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return tuple(self.config["target_layer_ids"])


@dataclasses.dataclass(frozen=True, eq=False)
class TargetCheckpoint:
    """A target model: the config as read, and tensors by name in their stored dtype."""

    config: dict
    tensors: dict[str, Tensor]


def load_drafter(path) -> DrafterCheckpoint:
    """Read a DSpark drafter directory onto the CPU.

    Raises:
        FileNotFoundError: no such directory, or a file missing from it.
        ValueError: another kind of checkpoint, a missing or impossible config value, a missing, superfluous or
            misshapen tensor, an incomplete file. Each names what was expected and what was found.
        ImportError: safetensors is not installed.
    """
    directory = _directory(path, _DRAFTERS)
    config = _config(directory, DRAFTER_ARCHITECTURE, _DRAFTERS)
    source = directory / "config.json"
    _check_layer_config(config, source)
    _check_drafter_config(config, source)
    tensors = _read(directory, drafter_shapes(config))
    return DrafterCheckpoint(config, tensors, _head(config, tensors), _confidence(config, tensors))


def load_target(path) -> TargetCheckpoint:
    """Read a `Qwen3ForCausalLM` directory onto the CPU. Raises as `load_drafter` does."""
    directory = _directory(path, _TARGETS)
    config = _config(directory, TARGET_ARCHITECTURE, _TARGETS)
    _check_layer_config(config, directory / "config.json")
    # Some exporters write a tied head out too; it is the embedding again.
    ignored = ("lm_head.weight",) if config.get("tie_word_embeddings", False) else ()
    return TargetCheckpoint(config, _read(directory, target_shapes(config), ignored))


def drafter_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Every tensor that a DSpark drafter of this (checked) config has, with its shape."""
    d, vocab, rank = config["hidden_size"], config["vocab_size"], config["markov_rank"]
    shapes = {
        "embed_tokens.weight": (vocab, d),
        "lm_head.weight": (vocab, d),
        "fc.weight": (d, len(config["target_layer_ids"]) * d),
        "hidden_norm.weight": (d,),
        "norm.weight": (d,),
    }
    for i in range(config["num_hidden_layers"]):
        shapes.update(_layer_shapes(config, f"layers.{i}."))
    if rank:
        shapes["markov_head.markov_w1.weight"] = shapes["markov_head.markov_w2.weight"] = (vocab, rank)
        if config["markov_head_type"] == "gated":
            shapes["markov_head.gate_proj.weight"] = (rank, d + rank)
            shapes["markov_head.gate_proj.bias"] = (rank,)
        elif config["markov_head_type"] == "rnn":
            shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + d)
            shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    if config["enable_confidence_head"]:
        shapes["confidence_head.proj.weight"] = (1, d + (rank if config["confidence_head_with_markov"] else 0))
        shapes["confidence_head.proj.bias"] = (1,)
    return shapes


def target_shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Every tensor that a target of this (checked) config has, with its shape."""
    d, vocab = config["hidden_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        shapes.update(_layer_shapes(config, f"model.layers.{i}."))
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, d)
    return shapes


def _layer_shapes(config: Mapping, prefix: str) -> dict[str, tuple[int, ...]]:
    d, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (queries, d),
        "self_attn.k_proj.weight": (keys, d),
        "self_attn.v_proj.weight": (keys, d),
        "self_attn.o_proj.weight": (d, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate_proj.weight": (ffn, d),
        "mlp.up_proj.weight": (ffn, d),
        "mlp.down_proj.weight": (d, ffn),
    }
    return {prefix + name: shape for name, shape in shapes.items()}


def _directory(path, published: str) -> Path:
    directory = Path(path)
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: no such directory ({published})")
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a directory with config.json and model.safetensors, got a file")
    return directory


def _config(directory: Path, architecture: str, published: str) -> dict:
    config = _json(directory / "config.json")
    found = config.get("architectures")
    if found != [architecture]:
        other = "none" if found is None else json.dumps(found)
        kind = "" if config.get("model_type") is None else f" (model_type {config['model_type']!r})"
        raise ValueError(
            f"{directory / 'config.json'}: expected architectures [\"{architecture}\"], got {other}{kind}; {published}"
        )
    return config


def _json(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; the directory has {_listing(file.parent)}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, got a file that does not parse ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _listing(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "no files"


def _check_layer_config(config: Mapping, source: Path) -> None:
    _require_keys(config, _LAYER_SIZES, source)
    for key in _LAYER_SIZES:
        _check_size(config[key], key, source)
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        raise ValueError(
            f"{source}: expected num_attention_heads to be a multiple of num_key_value_heads, got "
            f"{config['num_attention_heads']} and {config['num_key_value_heads']}"
        )
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        rope = {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta")}
    if not isinstance(rope.get("rope_theta"), (int, float)):
        raise ValueError(f"{source}: expected rope_parameters with a rope_theta, or rope_theta itself, got neither")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{source}: expected rope_type 'default', got {kind!r}")


def _check_drafter_config(config: dict, source: Path) -> None:
    _require_keys(config, _DRAFTER_SIZES + _DRAFTER_KEYS, source)
    for key in _DRAFTER_SIZES:
        _check_size(config[key], key, source)
    _check_size(config["markov_rank"], "markov_rank", source, low=0)
    if config["markov_rank"]:
        _require_keys(config, ("markov_head_type",), source)
        if config["markov_head_type"] not in HEAD_TYPES:
            raise ValueError(f"{source}: expected markov_head_type in {HEAD_TYPES}, got {config['markov_head_type']!r}")
    if config["enable_confidence_head"]:
        _require_keys(config, ("confidence_head_with_markov",), source)
        if config["confidence_head_with_markov"] and not config["markov_rank"]:
            raise ValueError(f"{source}: expected markov_rank >= 1 with confidence_head_with_markov, got 0")
    layers, count = config["target_layer_ids"], config["num_target_layers"]
    if not isinstance(layers, list) or not layers or not all(type(i) is int and -1 <= i < count for i in layers):
        raise ValueError(
            f"{source}: expected target_layer_ids from -1 to {count - 1} (num_target_layers - 1), got {layers}"
        )
    mask = config["mask_token_id"]
    if type(mask) is not int or not 0 <= mask < config["vocab_size"]:
        raise ValueError(f"{source}: expected mask_token_id from 0 to {config['vocab_size'] - 1}, got {mask!r}")
    temperatures = config.get("sts_temperatures")
    if temperatures is not None and not (
        isinstance(temperatures, list)
        and len(temperatures) == config["block_size"]
        and all(isinstance(value, (int, float)) and value > 0 for value in temperatures)
    ):
        raise ValueError(f"{source}: expected {config['block_size']} positive sts_temperatures, got {temperatures}")


def _require_keys(config: Mapping, keys, source: Path) -> None:
    missing = [key for key in keys if key not in config]
    if missing:
        raise ValueError(f"{source}: expected the keys {', '.join(missing)}, got a config without them")


def _check_size(value, key: str, source: Path, low: int = 1) -> None:
    if type(value) is not int or value < low:
        raise ValueError(f"{source}: expected an integer {key} >= {low}, got {value!r}")


def _read(directory: Path, shapes: Mapping[str, tuple[int, ...]], ignored=()) -> dict[str, Tensor]:
    """The tensors of `shapes`, all checked before the first is read."""
    files = {file: _open(file) for file in _weight_files(directory)}
    where = {name: (file, handle) for file, handle in files.items() for name in handle.keys()}
    missing = [name for name in shapes if name not in where]
    if missing:
        wanted = f"{missing[0]} {list(shapes[missing[0]])}{_more(missing)}"
        raise ValueError(f"{directory}: expected the tensor {wanted}, found none")
    surplus = [name for name in where if name not in shapes and name not in ignored]
    if surplus:
        raise ValueError(f"{directory}: expected no tensor {surplus[0]}{_more(surplus)} by config.json, found one")
    for name, shape in shapes.items():
        file, handle = where[name]
        entry = handle.get_slice(name)
        if tuple(entry.get_shape()) != shape:
            raise ValueError(f"{file}: expected {name} of shape {list(shape)}, got {list(entry.get_shape())}")
        if entry.get_dtype() not in _DTYPES:
            raise ValueError(f"{file}: expected {name} in {' or '.join(_DTYPES)}, got {entry.get_dtype()}")
    return {name: where[name][1].get_tensor(name) for name in shapes}


def _more(names) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(
            f"{directory}: expected model.safetensors or model.safetensors.index.json, the directory has "
            f"{_listing(directory)}"
        )
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: expected a weight_map from tensor names to file names, found none")
    shards = sorted(set(names.values()))
    for shard in shards:
        if shard != Path(shard).name:
            raise ValueError(f"{index}: expected file names in weight_map, got {shard!r}")
        if not (directory / shard).is_file():
            raise FileNotFoundError(f"{directory / shard}: named by {index.name}, but there is no such file")
    return [directory / shard for shard in shards]


def _open(file: Path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("reading checkpoints needs safetensors: pip install dspark_kernels[checkpoints]") from None
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except SafetensorError as error:
        with open(file, "rb") as stream:
            pointer = stream.read(24).startswith(b"version https://git-lfs")
        size = f"{file.stat().st_size} bytes that do not parse ({error})"
        found = "a Git LFS pointer (fetch the file itself)" if pointer else size
        raise ValueError(f"{file}: expected a complete safetensors file, got {found}") from None


def _head(config: Mapping, tensors: Mapping[str, Tensor]) -> MarkovHead | None:
    if not config["markov_rank"]:
        return None
    w1, w2 = tensors["markov_head.markov_w1.weight"], tensors["markov_head.markov_w2.weight"]
    kind = config["markov_head_type"]
    if kind == "gated":
        weight, bias = tensors["markov_head.gate_proj.weight"], tensors["markov_head.gate_proj.bias"]
        return GatedMarkovHead(w1, w2, gate_weight=weight, gate_bias=bias)
    if kind == "rnn":
        weight, bias = tensors["markov_head.joint_proj.weight"], tensors["markov_head.joint_proj.bias"]
        return RnnMarkovHead(w1, w2, joint_weight=weight, joint_bias=bias)
    return MarkovHead(w1, w2)


def _confidence(config: Mapping, tensors: Mapping[str, Tensor]) -> ConfidenceHead | None:
    if not config["enable_confidence_head"]:
        return None
    temperatures = config.get("sts_temperatures")
    return ConfidenceHead(
        tensors["confidence_head.proj.weight"][0],
        tensors["confidence_head.proj.bias"],
        None if temperatures is None else torch.tensor(temperatures, dtype=torch.float32),
    )
