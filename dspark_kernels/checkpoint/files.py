"""The files of a checkpoint directory: its JSON, and which file every tensor is read from.

A directory with model.safetensors.index.json is sharded: its weight_map alone decides which file a tensor is read from, and other
files that hold the tensor too, model.safetensors among them, are not read. Any other directory holds model.safetensors. Only
headers are read here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from .places import same

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    """Where a tensor is read from: a file, and the same file opened by safetensors."""

    file: Path
    handle: object


class Stored(NamedTuple):
    """The tensors of a directory by name; unlisted: what the shards hold besides, in no entry of the index."""

    entries: dict[str, Entry]
    unlisted: dict[str, Path]


def stored(directory: Path) -> Stored:
    """Every tensor of a directory.

    Raises:
        FileNotFoundError: no weights, or a file that the index names is missing.
        ValueError: an index without a weight_map, one that names a file without the tensor, an incomplete file.
        ImportError: safetensors is not installed.
    """
    single, index = directory / SINGLE, directory / INDEX
    if index.is_file():
        return _sharded(index)
    if not single.is_file():
        raise FileNotFoundError(f"{directory}: expected {SINGLE} or {INDEX}, the directory has {_listing(directory)}")
    handle = _open(single)
    return Stored({name: Entry(single, handle) for name in handle.keys()}, {})


def check_whole_files(directory: Path) -> None:
    """For readers that take whole files, whatever the index says of a tensor: transformers takes model.safetensors, or else every
    shard, and of several that hold a tensor the last.

    Raises ValueError where that may be another tensor than the index names, and FileNotFoundError and ImportError as `stored` does.
    """
    single, index = directory / SINGLE, directory / INDEX
    if not index.is_file():
        return
    entries = stored(directory).entries
    handles = {entry.file: entry.handle for entry in entries.values()}
    if single.is_file() and single not in handles:
        raise ValueError(f"{index}: expected to name {SINGLE}, which readers of whole files take, got {', '.join(_names(handles))}")
    for file, handle in handles.items():
        for name in handle.keys():
            named = entries.get(name)
            if named and named.file != file and not same_values(named.handle.get_tensor(name), handle.get_tensor(name)):
                raise ValueError(
                    f"{file}: expected no {name} but that of {named.file.name}, which {INDEX} names, got other values, and readers"
                    " of whole files may take either"
                )


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in whatever dtypes they are stored."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(wide), b.to(wide))


def _names(files) -> list[str]:
    return sorted(file.name for file in files)


def read_json(file: Path) -> dict:
    """A JSON object. Raises FileNotFoundError; ValueError for anything else, and where a key is repeated with another value."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; the directory has {_listing(file.parent)}")

    def once(pairs):
        content = {}
        for key, value in pairs:  # Python, like most readers, would keep the last
            if key in content and not same(content[key], value):
                raise ValueError(f"{file}: expected one value of {key}, got {content[key]!r} and {value!r}")
            content[key] = value
        return content

    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, got a file that does not parse ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _sharded(index: Path) -> Stored:
    directory, names = index.parent, read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: expected a weight_map from tensor names to file names, found none")
    handles, held = {}, {}
    for shard in sorted(set(names.values())):
        file = directory / shard
        if shard != Path(shard).name:
            raise ValueError(f"{index}: expected file names in weight_map, got {shard!r}")
        if not file.is_file():
            beside = f" ({SINGLE} beside it is not read: the index decides)" if (directory / SINGLE).is_file() else ""
            raise FileNotFoundError(f"{file}: named by {index.name}, but there is no such file{beside}")
        handles[shard] = _open(file)
        held[shard] = set(handles[shard].keys())
    for name, shard in names.items():
        if name not in held[shard]:
            others = [other for other in held if name in held[other]]
            found = f"found it in {', '.join(others)}" if others else "found none"
            raise ValueError(f"{directory / shard}: expected the tensor {name}, which {index.name} reads from there, {found}")
    unlisted = {name: directory / shard for shard in held for name in held[shard] - names.keys()}
    return Stored({name: Entry(directory / shard, handles[shard]) for name, shard in names.items()}, unlisted)


def _listing(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "no files"


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
