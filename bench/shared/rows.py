"""Rows of a report in a CSV file: new ones replace those of the same key, the others stay."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path


def cell(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def replace(path: Path, rows: Sequence, key: Sequence[str]) -> None:
    """Put rows, dataclasses of one type, into the file, whole or not at all. Rows of its whose columns `key` equal those of a new
    row go."""
    columns = [field.name for field in dataclasses.fields(rows[0])]
    new = [{name: cell(getattr(row, name)) for name in columns} for row in rows]
    done = {tuple(row[name] for name in key) for row in new}
    kept = [row for row in read(path) if tuple(row.get(name) for name in key) not in done] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + new)
    partial.replace(path)
