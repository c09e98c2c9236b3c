"""The compile report: its rows, what they may not show, where they are stale, how two reports differ."""

from __future__ import annotations

import csv
import operator
from pathlib import Path

import torch

from bench.compile.cases import CASES
from bench.shared.offline.report import COLUMNS, DIGESTS, KEY, row_of
from dspark_kernels.launch import arch as archs


def rows_of(arch: str, op: str, compiled: bool, cases: list[str] | None = None, ir: bool = False) -> list[dict]:
    """The report's rows of one op on one architecture, without the measured columns if nothing is compiled."""
    return [row_of(arch, op, case, call, compiled, ir) for case, call in CASES[op].items() if cases is None or case in cases]


def problems(row: dict) -> list[str]:
    """What a row may not show: registers kept in memory, or more shared memory than there is.

    AMD's scalar registers (kernels with many arguments run out of them) spill into lanes of vector registers, not into
    memory, as long as the stack is empty; they are reported and have no limit.
    """
    where = " ".join(row[name] for name in KEY)
    found = []
    for name in ("spill_stores", "spill_loads", "stack"):
        if int(row[name]):
            found.append(f"{where}: {name} is {row[name]}, must be 0")
    if int(row["shared"]) > int(row["shared_limit"]):
        found.append(f"{where}: {row['shared']} bytes of shared memory, {row['shared_limit']} are there")
    return found


def stale(expected: list[dict], committed: list[dict]) -> list[str]:
    """Where the committed rows are not those of the code."""
    have = {tuple(row[name] for name in KEY): row for row in committed}
    want = {tuple(row[name] for name in KEY): row for row in expected}
    found = [f"{' '.join(key)}: not in the report" for key in want if key not in have]
    found += [f"{' '.join(key)}: in the report, but no such launch" for key in have if key not in want]
    for key in want.keys() & have.keys():
        changed = [name for name in DIGESTS if want[key][name] != have[key][name]]
        if changed:
            found.append(f"{' '.join(key)}: {' and '.join(changed)} changed since it was compiled")
    return sorted(found)


def kept(rows: list[dict], committed: list[dict]) -> tuple[list[dict], list[dict]]:
    """Of rows with an IR and nothing measured: those whose IR is the committed one, with what was measured then; and the others."""
    have = {tuple(row[name] for name in KEY): row for row in committed}
    same, other = [], []
    for row in rows:
        old = have.get(tuple(row[name] for name in KEY), {})
        if old.get("ir") == row["ir"]:
            same.append(old | row)
        else:
            other.append(row)
    return same, other


COMPARED = ("registers", "spill_stores", "spill_loads", "scalar_spills", "stack", "shared", "binary_bytes")


def compare(new: list[dict], old: list[dict]) -> list[str]:
    """Rows of two reports that differ, and last a line of counts. A kernel may have another name."""
    key_of = operator.itemgetter("op", "case", "arch")
    have = {key_of(row): row for row in old}
    found, equal = [], 0
    for row in new:
        before = have.pop(key_of(row), None)
        if before is None:
            found.append(f"{' '.join(key_of(row))}: not in the old report")
        elif row.get("ir") and before.get("ir") == row["ir"]:
            equal += 1
        else:
            changes = [f"{name} {before[name]} -> {row[name]}" for name in COMPARED if before[name] != row[name]]
            found.append(f"{' '.join(key_of(row))}: another IR; {', '.join(changes) or 'the same registers, spills and sizes'}")
    found += [f"{' '.join(key)}: in the old report alone" for key in have]
    return [*found, f"{len(new)} rows: {equal} with the same IR, {len(found)} others"]


def write(path: Path, rows: list[dict]) -> None:
    order = [(op, case) for op in CASES for case in CASES[op]]
    rank = {name: i for i, name in enumerate(archs.KNOWN)}
    rows = sorted(rows, key=lambda row: (order.index((row["op"], row["case"])), rank[row["arch"]]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def compiled_rows(arch: str, op: str, cached: bool, cases: list[str] | None, committed: list[dict]) -> list[dict]:
    """Rows of one op on one architecture; those of `committed` that have the same IR are taken from there."""
    import triton

    torch.set_num_threads(1)
    triton.knobs.compilation.always_compile = not cached
    if not committed:
        return rows_of(arch, op, True, cases)
    same, other = kept(rows_of(arch, op, False, cases, ir=True), committed)
    return same + (rows_of(arch, op, True, [row["case"] for row in other]) if other else [])
