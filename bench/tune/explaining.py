"""Without times: what every entry compiles to, and what is predicted one step away from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.tune.binaries import Binary, predicted
from bench.tune.entries import changes, label, ordered, reason, replaced, write
from bench.tune.kernels import KERNELS, case_bytes
from bench.tune.steps import steps
from dspark_kernels.launch import table
from dspark_kernels.launch.arch import KNOWN
from dspark_kernels.launch.table import Entry


def explain(names: Sequence[str], kernels: Sequence[str], folder: Path, submit: Callable, predict: bool) -> int:
    """What every entry compiles to, into the tables; with `predict` what is one step away, too, on the screen."""
    wrong = 0
    for name in names:
        entries, path = table.read(table.FOLDER / f"{name}.json"), folder / f"{name}.json"
        todo = ordered(entries, kernels)
        pending = [(item, submit(item[0], item[2].shape, item[2].config, name)) for item in todo]
        for count, ((kernel, number, entry), future) in enumerate(pending, 1):
            binary = future.result()
            verdict = "no spill" if binary.runs else f"SPILLS OR TOO LARGE: {binary.spills} bytes, {binary.shared} shared"
            wrong += not binary.runs
            print(
                f"[{count}/{len(pending)}] {name} {label(kernel, entry.shape)}: {binary.registers} registers, {binary.shared} of"
                f" {binary.shared_limit} bytes shared, {binary.resident(KNOWN[name])} resident, {verdict}",
                flush=True,
            )
            timed = entry.why.get("time", "not measured")
            entries = replaced(entries, kernel, number, dataclasses.replace(entry, why=reason(binary, timed)))
            write(path, name, entries)
            if predict:
                print("\n".join(ranking(kernel, entry, binary, name, submit)), flush=True)
    print(f"written to {folder}; no times were taken")
    return 1 if wrong else 0


def ranking(kernel: str, entry: Entry, binary: Binary, name: str, submit: Callable) -> list[str]:
    """Configurations one step away that run, best prediction first, beside the entry's own."""
    tuned, size = KERNELS[kernel], case_bytes(kernel, entry.shape)
    if not size:
        return ["    no case to predict"]
    near = steps(entry.config, tuned.space)
    futures = [submit(kernel, entry.shape, config, name) for config in near]
    found = [(entry.config, binary)] + [(config, future.result()) for config, future in zip(near, futures, strict=True)]
    rated = [(predicted(size, tuned.flight(entry.shape, config), b, KNOWN[name]), b, config) for config, b in found if b.runs]
    lines = [
        f"    predicted {us:9.2f} us {b.registers:4} registers {b.resident(KNOWN[name]):3} resident  {changes(entry.config, c)}"
        for us, b, c in sorted(rated, key=lambda item: item[0])
    ]
    return [*lines, f"    {len(found) - len(rated)} of {len(found)} spill or do not fit"]
