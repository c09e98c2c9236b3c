"""Tuned launch parameters: per GPU a table of shapes with the configuration that was best there, and why.

    entry found = the one of the same kind with the least sum over sizes of |doublings(size) - doublings(size asked for)|

doublings(n) = powers of two up to n, rounded up. Strings and booleans of a shape are its kind and must be equal; of two entries
as near, the first. The tables (tables/<GPU>.json) are written by bench/tune and read once, when this module is imported:
a lookup may be traced by torch.compile, which opens no files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .arch import Arch

FOLDER = Path(__file__).parent / "tables"


Shape = dict[str, Any]  # ints that have distances, and words and booleans that are its kind
Parameters = dict[str, Any]  # whole numbers, None where the compiler chooses


@dataclasses.dataclass(frozen=True)
class Entry:
    """shape: what the configuration was chosen for. config: launch parameters by name. why: the measurement behind the choice."""

    shape: Shape
    config: Parameters
    why: dict[str, Any]


Table = dict[str, tuple[Entry, ...]]  # kernel -> entries


def read(path: Path) -> Table:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {kernel: tuple(Entry(**entry) for entry in entries) for kernel, entries in content["entries"].items()}


_TABLES: dict[str, Table] = {path.stem: read(path) for path in sorted(FOLDER.glob("*.json"))}
_found: dict[tuple[int | str | bool, ...], Entry] = {}
_trials: dict[str, Entry] = {}  # kernel -> what it runs with, whatever the table says
_said: set[str] = set()


def find(arch: Arch, kernel: str, **shape: int | str | bool) -> Entry:
    """The entry nearest to `shape`. A GPU without a table uses that of its family, and says so once."""
    if kernel in _trials:
        return _trials[kernel]
    name = name_for(arch)
    if name != arch.name and not torch.compiler.is_compiling():  # a warning cannot be traced; the op itself looks here too
        _say_unknown(arch)
    key = (name, kernel, *shape.values())
    if key not in _found:
        _found[key] = nearest(_TABLES[name].get(kernel, ()), shape, f"{name}.json: {kernel}")
    return _found[key]


def name_for(arch: Arch) -> str:
    """The table that kernels on this GPU run with: its own, or that of its family."""
    return arch.name if arch.name in _TABLES else arch.family


def _say_unknown(arch: Arch) -> None:
    if arch.name in _said:
        return
    _said.add(arch.name)
    warnings.warn(
        f"dspark_kernels: no launch table for {arch.name}: kernels run with that of {arch.family} "
        "(python -m bench.tune in a checkout finds what is best)",
        stacklevel=3,
    )


def nearest(entries: tuple[Entry, ...], shape: Shape, where: str) -> Entry:
    best, least = None, 0
    for entry in entries:
        distance = _distance(entry.shape, shape)
        if distance is not None and (best is None or distance < least):
            best, least = entry, distance
    if best is None:
        raise LookupError(f"{where}: no entry of the kind of {shape}")
    return best


def _distance(have: Shape, want: Shape) -> int | None:
    """Doublings between two shapes; None where they are of different kinds."""
    total = 0
    for name, value in want.items():
        other = have[name]
        if isinstance(value, (str, bool)):
            if value != other:
                return None
        else:
            total += abs(_doublings(value) - _doublings(other))
    return total


def _doublings(size: int) -> int:
    return max(0, size - 1).bit_length()


@contextlib.contextmanager
def trial(kernel: str, shape: Shape, config: Parameters) -> Iterator[None]:
    """Context in which `kernel` runs with `config`, chosen for `shape`, on every GPU: to compile and to time it."""
    _trials[kernel] = Entry(shape, config, {})
    try:
        yield
    finally:
        del _trials[kernel]
