"""What a committed report is refused for: rows that are not those of the code, and hot parts that grew.

Rows are those of a CSV file. Times are not compared: they are guesses, and move with the constants of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

KEY = ("op", "case", "arch")
GROWTH = 1.05  # a change may make a hot part this much longer, no more
GUARDED = ("per_element", "barriers_per_8kb")


class Digests(NamedTuple):
    """Of a launch, as in bench/results/compile.csv. ir: makes the IR, which takes a second."""

    source: str
    launch: str
    ir: Callable[[], str]


def stale(code: Mapping[tuple[str, str, str], Digests], committed: Sequence[Mapping]) -> list[str]:
    """Where committed rows are not those of the code. An IR is made only where another digest differs."""
    have = {tuple(row[name] for name in KEY): row for row in committed}
    found = []
    for key, digests in code.items():
        row = have.pop(key, None)
        if row is None:
            found.append(f"{' '.join(key)}: not in the report")
        elif (row["source"], row["launch"]) != (digests.source, digests.launch) and row["ir"] != digests.ir():
            found.append(f"{' '.join(key)}: compiles to another IR than when it was modelled")
    return found + [f"{' '.join(key)}: in the report, but no such kernel" for key in have]


def grown(old: Sequence[Mapping], new: Sequence[Mapping]) -> list[str]:
    """Where a hot part has more instructions per element or more barriers than its old row allows. Rows of one IR are equal, and
    rows without an old one are new."""
    before = {tuple(row[name] for name in KEY): row for row in old}
    found = []
    for row in new:
        key = tuple(row[name] for name in KEY)
        was = before.get(key)
        if was is None or was["ir"] == row["ir"]:
            continue
        for name in GUARDED:
            if float(row[name]) > GROWTH * float(was[name]):
                found.append(f"{' '.join(key)}: {name} {float(was[name]):.4g} -> {float(row[name]):.4g}")
    return found
