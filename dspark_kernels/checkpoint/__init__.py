"""Read drafters and their targets from Hugging Face style directories, and refuse everything else by name.

A directory holds config.json and model.safetensors (or model.safetensors.index.json and its shards). What it may hold, by
architecture: dspark_kernels/checkpoint/formats.py. Every tensor's presence, shape and dtype is checked before any is read.

Source of the format: github.com/deepseek-ai/DeepSpec and arXiv 2607.05147.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import ConfidenceHead, GatedMarkovHead, MarkovHead, RnnMarkovHead
from . import formats

_PUBLISHED = f"{formats.PUBLISHED_DRAFTERS}; {formats.PUBLISHED_TARGETS}"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclasses.dataclass(frozen=True, eq=False)
class DrafterCheckpoint:
    """A block drafter: its config in DSpark's words, tensors by name in their stored dtype, and the heads that draft_block takes.

    config: as read; a DFlash drafter's with what DSpark calls `block_size` (drafts per pass), `mask_token_id`, `target_layer_ids`,
    `markov_rank` 0, and `anchor_first` false (the masks alone predict). head: MarkovHead, GatedMarkovHead, RnnMarkovHead, or None
    at rank 0. confidence: ConfidenceHead or None. Both share the memory of `tensors`. A DFlash drafter has neither embedding nor
    head of its own: they are the target's.
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


class StoredTensor(NamedTuple):
    """A tensor as the file's header tells of it."""

    shape: tuple[int, ...]
    dtype: str  # the name that safetensors uses: BF16, F32, I64, ...
    file: Path


def load_drafter(path) -> DrafterCheckpoint:
    """Read a DSpark or DFlash drafter directory onto the CPU.

    Raises:
        FileNotFoundError: no such directory, or a file missing from it.
        ValueError: another kind of checkpoint, a missing or impossible config value, a missing, superfluous or
            misshapen tensor, an incomplete file. Each names what was expected and what was found.
        ImportError: safetensors is not installed.
    """
    directory = _directory(path, formats.PUBLISHED_DRAFTERS)
    config, form = _config(directory, formats.DRAFTERS, formats.PUBLISHED_DRAFTERS)
    config = form.drafter(config)
    tensors = _read(_checked(directory, form.shapes(config)))
    return DrafterCheckpoint(config, tensors, _head(config, tensors), _confidence(config, tensors))


def load_target(path) -> TargetCheckpoint:
    """Read a `Qwen3ForCausalLM` directory onto the CPU. Raises as `load_drafter` does."""
    directory = _directory(path, formats.PUBLISHED_TARGETS)
    config, form = _config(directory, formats.TARGETS, formats.PUBLISHED_TARGETS)
    return TargetCheckpoint(config, _read(_checked(directory, form.shapes(config))))


def check(path) -> tuple[dict, formats.Format]:
    """Check a drafter or target as its loader does, but read no tensor: its config (a drafter's in DSpark's words) and format.

    Raises as `load_drafter` does, and ValueError for what neither loader reads.
    """
    directory = _directory(path, _PUBLISHED)
    config, form = _config(directory, formats.DRAFTERS | formats.TARGETS, _PUBLISHED)
    config = form.drafter(config)
    _checked(directory, form.shapes(config))
    return config, form


def read_config(path) -> dict:
    """config.json of any directory, unchecked. Raises FileNotFoundError and ValueError as `load_drafter` does."""
    return _json(_directory(path, _PUBLISHED) / "config.json")


def stored_tensors(path) -> dict[str, StoredTensor]:
    """Every tensor of a directory by name, from the headers alone. Raises as `load_drafter` does."""
    where = _handles(_directory(path, _PUBLISHED))
    slices = {name: (file, handle.get_slice(name)) for name, (file, handle) in where.items()}
    return {name: StoredTensor(tuple(part.get_shape()), part.get_dtype(), file) for name, (file, part) in slices.items()}


def stop_tokens(path) -> tuple[int, ...]:
    """Ids that end a text, from generation_config.json; none where a directory has no such file or the file names none.

    Raises ValueError for a file that names anything but ids.
    """
    file = Path(path) / "generation_config.json"
    if not file.is_file():
        return ()
    found = _json(file).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"{file}: expected eos_token_id to be an id or a list of ids, got {found!r}")
    return tuple(dict.fromkeys(ids))


def _directory(path, several: str) -> Path:
    directory = Path(path)
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: no such directory ({formats.published(directory, several)})")
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a directory with config.json and model.safetensors, got a file")
    return directory


def _config(directory: Path, known: Mapping[str, formats.Format], several: str) -> tuple[dict, formats.Format]:
    """config.json, checked, and the format that it names."""
    source = directory / "config.json"
    config = _json(source)
    found = config.get("architectures")
    name = found[0] if isinstance(found, list) and len(found) == 1 else None
    # SafeAILab's EAGLE-3 files call themselves language models.
    if not isinstance(name, str) or name not in known or formats.is_eagle3(config):
        wanted = " or ".join(f'["{architecture}"]' for architecture in known)
        raise ValueError(f"{source}: expected architectures {wanted}, got {formats.described(config)}; {several}")
    known[name].check(config, source)
    return config, known[name]


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


def _checked(directory: Path, shapes: formats.Shapes) -> dict:
    """The open file of every tensor of `shapes`, all of them checked."""
    where = _handles(directory)
    missing = [name for name in shapes if name not in where]
    if missing:
        wanted = f"{missing[0]} {list(shapes[missing[0]])}{_more(missing)}"
        raise ValueError(f"{directory}: expected the tensor {wanted}, found none")
    # Some exporters write a tied head out too; it is the embedding again.
    tied = {"lm_head.weight"} if "model.embed_tokens.weight" in shapes else set()
    surplus = sorted(where.keys() - shapes.keys() - tied)
    if surplus:
        raise ValueError(f"{directory}: expected no tensor {surplus[0]}{_more(surplus)} by config.json, found one")
    for name, shape in shapes.items():
        file, handle = where[name]
        entry = handle.get_slice(name)
        if tuple(entry.get_shape()) != shape:
            raise ValueError(f"{file}: expected {name} of shape {list(shape)}, got {list(entry.get_shape())}")
        if entry.get_dtype() not in _DTYPES:
            raise ValueError(f"{file}: expected {name} in {' or '.join(_DTYPES)}, got {entry.get_dtype()}")
    return {name: where[name][1] for name in shapes}


def _read(handles: Mapping) -> dict[str, Tensor]:
    return {name: handle.get_tensor(name) for name, handle in handles.items()}


def _handles(directory: Path) -> dict:
    """(file, open file) of every tensor by name."""
    files = {file: _open(file) for file in _weight_files(directory)}
    return {name: (file, handle) for file, handle in files.items() for name in handle.keys()}


def _more(names) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(
            f"{directory}: expected model.safetensors or model.safetensors.index.json, the directory has {_listing(directory)}"
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
