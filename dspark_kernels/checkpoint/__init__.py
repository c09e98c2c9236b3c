"""Read drafters and their targets from Hugging Face style directories, and refuse everything else by name.

A directory holds config.json and model.safetensors (or model.safetensors.index.json and its shards: files.py). What it may hold, by
architecture: formats.py. Every tensor's presence, shape and dtype is checked before any is read.

Sources of the formats: github.com/deepseek-ai/DeepSpec, arXiv 2607.05147, and those that formats.py names.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import ConfidenceHead, GatedMarkovHead, MarkovHead, RnnMarkovHead
from ..vocabulary import ids_from_offsets
from . import files, formats

_EAGLE3 = formats.PUBLISHED_EAGLE3
_PUBLISHED = f"{formats.PUBLISHED_DRAFTERS}; {formats.PUBLISHED_TARGETS}"
_DTYPES = ("BF16", "F16", "F32")
_MAPS = {"d2t": ("I64", "I32"), "t2d": ("BOOL",)}  # between the draft vocabulary and the target's
_HEAD, _EMBEDDINGS = "lm_head.weight", ("model.embed_tokens.weight", "embed_tokens.weight")


@dataclasses.dataclass(frozen=True, eq=False)
class DrafterCheckpoint:
    """A block drafter: its config in DSpark's words, tensors by name in their stored dtype, and the heads that draft_block takes.

    config: as read, with what only nested places say (block.py) at the top level: `block_size` (drafts per pass), `mask_token_id`,
    `target_layer_ids`, `anchor_first` false where the masks alone predict, as those of a DFlash drafter, whose `markov_rank` is 0.
    head: MarkovHead, GatedMarkovHead, RnnMarkovHead, or None at rank 0. confidence: ConfidenceHead or None. Both share the memory
    of `tensors`. A DFlash drafter has neither embedding nor head of its own: they are the target's; one of the speculators library may
    have either. draft_to_target: int64 [Vd], the target's id of each id of a draft head over fewer ids (`draft_vocab_size`), else None.
    """

    config: dict
    tensors: dict[str, Tensor]
    head: MarkovHead | None
    confidence: ConfidenceHead | None
    draft_to_target: Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.config["block_size"]

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return tuple(self.config["target_layer_ids"])


@dataclasses.dataclass(frozen=True, eq=False)
class Eagle3Checkpoint:
    """An EAGLE-3 drafter: its config in the words of eagle3.py, and tensors by name (`layers.i.*`) in their stored dtype.

    draft_to_target: as of a DrafterCheckpoint. The embedding is the target's where `tensors` has none.
    """

    config: dict
    tensors: dict[str, Tensor]
    draft_to_target: Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class TargetCheckpoint:
    """A target model: its config, and tensors by name in their stored dtype.

    config: as read, with what only a `text_config` says at the top level; `tie_word_embeddings` is false where it says true but the
    files hold a head of other values, which is then in `tensors`, with a warning.
    """

    config: dict
    tensors: dict[str, Tensor]


class StoredTensor(NamedTuple):
    """A tensor as the file's header tells of it."""

    shape: tuple[int, ...]
    dtype: str  # the name that safetensors uses: BF16, F32, I64, ...
    file: Path


class Stored(NamedTuple):
    """A tensor's name in its file, the file, and the same file opened."""

    name: str
    file: Path
    handle: object


def load_drafter(path) -> DrafterCheckpoint:
    """Read a DSpark or DFlash drafter directory onto the CPU: of DeepSpec, of z-lab or of the speculators library.

    Raises:
        FileNotFoundError: no such directory, or a file missing from it.
        ValueError: another kind of checkpoint, a missing or impossible config value, a missing, superfluous or
            misshapen tensor, an incomplete file. Each names what was expected and what was found.
        ImportError: safetensors is not installed.
    """
    directory = _directory(path, formats.PUBLISHED_DRAFTERS)
    config, form = _config(directory, formats.DRAFTERS, formats.PUBLISHED_DRAFTERS)
    config, tensors = _untied(directory, config, _read(_checked(directory, config, form)), form)
    return DrafterCheckpoint(
        config, tensors, _head(config, tensors), _confidence(config, tensors), _ids(directory, config, tensors)
    )


def load_eagle3(path) -> Eagle3Checkpoint:
    """Read an EAGLE-3 drafter directory onto the CPU: of SafeAILab's form, of NVIDIA's, DeepSpec's or the speculators library's.

    Files of pickles (pytorch_model.bin) are not opened. Raises as `load_drafter` does.
    """
    directory = _directory(path, _EAGLE3)
    config, form = _eagle3_config(directory)
    tensors = _read(_checked(directory, config, form))
    return Eagle3Checkpoint(config, tensors, _ids(directory, config, tensors))


def load_target(path) -> TargetCheckpoint:
    """Read a `Qwen3ForCausalLM` directory onto the CPU. Raises as `load_drafter` does; warns of a tied head of other values."""
    directory = _directory(path, formats.PUBLISHED_TARGETS)
    config, form = _config(directory, formats.TARGETS, formats.PUBLISHED_TARGETS)
    return TargetCheckpoint(*_untied(directory, config, _read(_checked(directory, config, form)), form))


def check(path) -> tuple[dict, formats.Format]:
    """Check a drafter, EAGLE-3's too, or target as its loader does, but read no tensor: its config, in the loader's words, and format.

    Raises as `load_drafter` does, and ValueError for what no loader reads.
    """
    directory = _directory(path, _PUBLISHED)
    if formats.is_eagle3(files.read_json(directory / "config.json")):
        config, form = _eagle3_config(directory)
    else:
        config, form = _config(directory, formats.DRAFTERS | formats.TARGETS, _PUBLISHED)
    _checked(directory, config, form)
    return config, form


def read_config(path) -> dict:
    """config.json of any directory, unchecked. Raises FileNotFoundError and ValueError as `load_drafter` does."""
    return files.read_json(_directory(path, _PUBLISHED) / "config.json")


def stored_tensors(path) -> dict[str, StoredTensor]:
    """Every tensor of a directory by name, from the headers alone. Raises as `load_drafter` does."""
    where = files.stored(_directory(path, _PUBLISHED)).entries
    slices = {name: (file, handle.get_slice(name)) for name, (file, handle) in where.items()}
    return {name: StoredTensor(tuple(part.get_shape()), part.get_dtype(), file) for name, (file, part) in slices.items()}


def stop_tokens(path) -> tuple[int, ...]:
    """Ids that end a text, from generation_config.json; none where a directory has no such file or the file names none.

    Raises ValueError for a file that names anything but ids.
    """
    file = Path(path) / "generation_config.json"
    if not file.is_file():
        return ()
    found = files.read_json(file).get("eos_token_id")
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
    """config.json as its format reads it, and that format."""
    source = directory / "config.json"
    config = files.read_json(source)
    form = formats.of(config, known)
    if form is None:
        wanted = " or ".join(f'["{architecture}"]' for architecture in known)
        raise ValueError(f"{source}: expected architectures {wanted}, got {formats.described(config)}; {several}")
    return form.read(config, source), form


def _eagle3_config(directory: Path) -> tuple[dict, formats.Format]:
    source = directory / "config.json"
    config = files.read_json(source)
    if not formats.is_eagle3(config):
        raise ValueError(f"{source}: expected an EAGLE-3 drafter, got {formats.described(config)}; {_EAGLE3}")
    return formats.EAGLE3.read(config, source), formats.EAGLE3


def _checked(directory: Path, config: Mapping, form: formats.Format) -> dict[str, Stored]:
    """The open file of every tensor that the format reads, and of a head that a tied checkpoint holds besides, all of them checked."""
    shapes = form.shapes(config)
    found, unlisted = files.stored(directory)
    where = {form.renamed(name): Stored(name, *entry) for name, entry in found.items()}
    if len(where) < len(found):
        twice = next(name for name in found if where[form.renamed(name)].name != name)
        raise ValueError(f"{directory}: expected one {form.renamed(twice)}, got {twice} and {where[form.renamed(twice)].name}")
    missing = [name for name in shapes if name not in where]
    if missing:
        wanted = f"{missing[0]} {list(shapes[missing[0]])}{_more(missing)}"
        besides = f"; {unlisted[missing[0]].name} holds it, but {files.INDEX} does not name it" if missing[0] in unlisted else ""
        raise ValueError(f"{directory}: expected the tensor {wanted}, found none{besides}")
    embedding = next((name for name in _EMBEDDINGS if name in shapes), None)
    if embedding is not None and _HEAD in where:  # some exporters write a tied head out too
        shapes = {**shapes, _HEAD: shapes[embedding]}
    shapes = {**shapes, **{name: shape for name, shape in form.optional(config).items() if name in where}}
    surplus = sorted((where.keys() | unlisted.keys()) - shapes.keys())
    if surplus:
        file = unlisted[surplus[0]] if surplus[0] in unlisted else where[surplus[0]].file
        raise ValueError(f"{file}: expected no tensor {surplus[0]}{_more(surplus)} by config.json, found one")
    for name, shape in shapes.items():
        stored_name, file, handle = where[name]
        entry = handle.get_slice(stored_name)
        if tuple(entry.get_shape()) != shape:
            raise ValueError(f"{file}: expected {name} of shape {list(shape)}, got {list(entry.get_shape())}")
        dtypes = _MAPS.get(name, _DTYPES)
        if entry.get_dtype() not in dtypes:
            raise ValueError(f"{file}: expected {name} in {' or '.join(dtypes)}, got {entry.get_dtype()}")
    return {name: where[name] for name in shapes if name not in form.unread}


def _read(where: Mapping[str, Stored]) -> dict[str, Tensor]:
    return {name: handle.get_tensor(stored_name) for name, (stored_name, _, handle) in where.items()}


def _untied(directory: Path, config: dict, tensors: dict[str, Tensor], form: formats.Format):
    """A checkpoint that calls itself tied: its head is left out where it is the embedding again, and kept, with a warning, where
    it has other values."""
    embedding = next((name for name in _EMBEDDINGS if name in tensors), None)
    if not config.get("tie_word_embeddings") or embedding is None or _HEAD not in tensors:
        return config, tensors
    if files.same_values(tensors[_HEAD], tensors[embedding]):
        needed = form.shapes(config)
        return config, {name: tensor for name, tensor in tensors.items() if name in needed}
    warnings.warn(
        f"{directory / 'config.json'}: tie_word_embeddings is true, but {_HEAD} of the files is not {embedding}: "
        "it is taken as the head",
        stacklevel=3,
    )
    return {**config, "tie_word_embeddings": False}, tensors


def _more(names) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _ids(directory: Path, config: Mapping, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """`draft_to_target` from d2t; both maps say the same ids, each of the target's and each once. None where all ids can be drafted."""
    if "d2t" not in tensors:
        return None
    vocab = config["vocab_size"]
    try:
        ids = ids_from_offsets(tensors["d2t"], vocab)
    except ValueError as error:
        raise ValueError(f"{directory}: d2t: {error}") from None
    named = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
    if "t2d" in tensors and not torch.equal(named, tensors["t2d"]):
        raise ValueError(f"{directory}: expected t2d to be true for the ids that d2t names, got others")
    if len(ids) == vocab and not torch.equal(ids, torch.arange(vocab)):
        raise ValueError(f"{directory}: expected d2t to be zeros beside a draft_vocab_size of all {vocab} ids, got others")
    return None if len(ids) == vocab else ids


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
