"""Entries of a launch table: their order, their words on the screen, and the file they are written to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from bench.tune.binaries import Binary
from bench.tune.kernels import KERNELS
from dspark_kernels.launch.table import Entry, Table


def write(path: Path, name: str, entries: Table) -> None:
    """A line per entry, so that a difference shows which one changed."""
    parts = []
    for kernel, found in entries.items():
        lines = ",\n".join("   " + json.dumps(dataclasses.asdict(entry)) for entry in found)
        parts.append(f'  "{kernel}": [\n{lines}\n  ]')
    partial = path.with_name(path.name + ".partial")
    partial.write_text(f'{{\n "gpu": "{name}",\n "entries": {{\n' + ",\n".join(parts) + "\n }\n}\n", encoding="utf-8")
    partial.replace(path)


def replaced(entries: Table, kernel: str, number: int, entry: Entry) -> Table:
    return {
        name: tuple(entry if (name, i) == (kernel, number) else old for i, old in enumerate(found))
        for name, found in entries.items()
    }


def reason(binary: Binary, time: dict | str) -> dict:
    """The measurements that justify an entry."""
    numbers = dataclasses.asdict(binary)
    case = numbers.pop("case")
    return {"compiled": numbers | ({"report": case} if case else {}), "time": time}


def ordered(entries: Table, kernels: Sequence[str]) -> list[tuple[str, int, Entry]]:
    """Entries of these kernels, the most important first."""
    found = [(kernel, number, entry) for kernel in kernels for number, entry in enumerate(entries.get(kernel, ()))]
    return sorted(found, key=lambda item: -KERNELS[item[0]].importance(item[2].shape))


def label(kernel: str, shape: dict) -> str:
    return f"{kernel} " + ", ".join(f"{name} {value}" for name, value in shape.items())


def changes(old: dict, new: dict) -> str:
    return ", ".join(f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]) or "as it is"
