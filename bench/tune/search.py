"""With times: search from an entry to what is faster, and keep it with its measurement."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.shared import measure, timing
from bench.shared.cases.case import Case
from bench.tune.binaries import Binary, predicted
from bench.tune.entries import changes, label, ordered, reason, replaced, write
from bench.tune.kernels import KERNELS, case_bytes
from bench.tune.steps import steps
from dspark_kernels.launch import table
from dspark_kernels.launch.arch import Arch
from dspark_kernels.launch.table import Entry

GAIN = 0.03  # of the median: less is not worth a change
ROUNDS = 2  # of steps from the best so far


def search(entry: Entry, space: dict, binary_of: Callable, time_of: Callable, rank: Callable, most: int, deadline: float):
    """(best config, its time, the entry's own time, configurations timed).

    binary_of: configs -> their Binary or None; time_of: config -> microseconds or None (red or failed); rank: (config, binary) ->
    predicted time. Steps from the best so far, `most` of them by rank, until none is GAIN faster, ROUNDS times at most.
    """
    own = time_of(entry.config)
    best, least, timed = entry.config, own, 1
    seen = [entry.config]
    for _ in range(ROUNDS):
        near = [config for config in steps(best, space) if config not in seen]
        pairs = [(c, b) for c, b in zip(near, binary_of(near), strict=True) if b is not None and b.runs]
        start = best
        for config, _ in sorted(pairs, key=lambda pair: rank(*pair))[:most]:
            if time.monotonic() > deadline:
                break
            seen.append(config)
            taken = time_of(config)
            timed += 1
            if taken is not None and (least is None or taken < (1 - GAIN) * least):
                best, least = config, taken
        if best == start:
            break
    return best, least, own, timed


def tune(name: str, arch: Arch, kernels: Sequence[str], path: Path, tools, most: int, deadline: float) -> int:
    """Time the entries of this GPU's table, the most important first. tools: submit, timer(kernel, shape, config), facts()."""
    start = table.FOLDER / f"{name}.json"
    entries = table.read(path if path.exists() else start if start.exists() else table.FOLDER / f"{arch.family}.json")
    source = timing.source_digest(tables=False)  # which is what changes here
    todo, left = ordered(entries, kernels), 0
    for count, (kernel, number, entry) in enumerate(todo, 1):
        head, tuned = f"[{count}/{len(todo)}] {label(kernel, entry.shape)}", KERNELS[kernel]
        done = entry.why.get("time")
        if isinstance(done, dict) and done.get("source") == source:
            print(f"{head}: timed before", flush=True)
            continue
        size = case_bytes(kernel, entry.shape)
        if not size:
            print(f"{head}: no case to time", flush=True)
            continue
        if time.monotonic() > deadline:
            left += 1
            print(f"{head}: no time left", flush=True)
            continue

        def binaries(configs, kernel=kernel, shape=entry.shape):
            futures = [tools.submit(kernel, shape, config, arch.family) for config in configs]
            return [_result(future) for future in futures]

        best, least, own, timed = search(
            entry,
            tuned.space,
            binaries,
            lambda config, kernel=kernel, shape=entry.shape: tools.timer(kernel, shape, config),
            lambda config, b, tuned=tuned, shape=entry.shape, size=size: predicted(size, tuned.flight(shape, config), b, arch),
            most,
            deadline,
        )
        if least is None:
            left += 1
            print(f"{head}: no configuration equals the reference, {timed} tried", flush=True)
            continue
        binary = binaries([best])[0]
        record = {"us": round(least, 2), "us_before": None if own is None else round(own, 2), "timed": timed, "source": source}
        why = {"time": record | tools.facts()} if binary is None else reason(binary, record | tools.facts())
        entries = replaced(entries, kernel, number, Entry(entry.shape, best, why))
        write(path, name, entries)
        print(f"{head}: {least:.2f} us, {_us(own)} before, {timed} timed, {changes(entry.config, best)}", flush=True)
    print(f"written to {path}")
    return 1 if left else 0


def _us(value: float | None) -> str:
    return "no time" if value is None else f"{value:.2f} us"


def _result(future) -> Binary | None:
    try:
        return future.result()
    except Exception:  # what does not compile is no candidate
        return None


@dataclasses.dataclass(frozen=True)
class Tools:
    """Of a real GPU."""

    submit: Callable
    bench: object

    def timer(self, kernel: str, shape: dict, config: dict) -> float | None:
        """Median of cold graph replays, None for what differs from the reference or does not run."""
        spec = KERNELS[kernel].spec(shape)
        with table.trial(kernel, shape, config):
            rows = measure.run(Case(KERNELS[kernel].op, "trial", spec), self.bench)
        times = [row.p50_us for row in rows if (row.status, row.call, row.cache) == ("ok", "graph", "cold")]
        if not times:
            print(f"    {config}: {rows[0].status}", flush=True)
        return times[0] if times else None

    def facts(self) -> dict:
        machine = self.bench.machine
        return {name: getattr(machine, name) for name in ("gpu", "driver", "torch", "triton", "commit")}
