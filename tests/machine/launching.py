"""Launches on the machine: what each did, replays of each in other modes, and what the reports say."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import gc

from . import core, named
from .settings import MODES, settings, using


@dataclasses.dataclass
class Launch:
    """One launch and what it did. `run` holds its counters."""

    kernel: core.Kernel
    grid: tuple[int, int, int]
    mode: str
    shared: int
    cooperative: bool
    run: core.Run

    @property
    def counters(self) -> dict[str, int]:
        return self.run.counters


launches: collections.deque[Launch] = collections.deque(maxlen=2000)
totals: collections.defaultdict[str, collections.Counter] = collections.defaultdict(collections.Counter)  # by mode
reports: collections.Counter = collections.Counter()  # (kind, text) -> how often, over all launches
replay_modes: list[str] = []  # every launch again in each of these, from the same memory
REPLAY_LIMIT = 3_000_000  # warp instructions of the first run above which there are no replays
REPLAY_BYTES = 1 << 28

# Kinds of reports that do not fail a launch. Races between the warps of one program fail unless they are named (named.py).
HARMLESS = ("benign", "intra_warp", "uninitialised")


@contextlib.contextmanager
def replaying(*modes: str):
    """Run every launch again in these modes for a while."""
    before = list(replay_modes)
    replay_modes[:] = modes
    try:
        yield
    finally:
        replay_modes[:] = before


def launch(kernel, grid, arguments, tensors, *, shared, cooperative) -> None:
    """Run a launch; then again, from the memory as it was, in every mode of `replay_modes`, and compare what it left bit by bit.

    Raises:
        core.MachineError: the launch went wrong (bounds, alignment, deadlock, trap), it races, or a replay left other bits.
    """
    if kernel.name in _indirect and replay_modes:
        tensors = [*tensors, *_living()]  # held until the end: what is freed in between may be written by others
    storages = _storages(tensors)
    if not replay_modes or sum(high - low for low, high in storages) > REPLAY_BYTES:
        _run(kernel, grid, arguments, storages, "plain", shared=shared, cooperative=cooperative)
        return
    before = [ctypes.string_at(low, high - low) for low, high in storages]
    first = _run(kernel, grid, arguments, storages, "plain", shared=shared, cooperative=cooperative)
    if first.run.counters["warp_instructions"] > REPLAY_LIMIT:
        totals["plain"]["not_replayed"] += 1
        return
    if first.found:
        totals["plain"]["not_replayed"] += 1  # it reached memory through pointers kept in tensors, which nobody copied before
        return
    after = [ctypes.string_at(low, high - low) for low, high in storages]
    for mode in replay_modes:
        for (low, high), content in zip(storages, before, strict=True):
            ctypes.memmove(low, content, high - low)
        with using(**MODES[mode]):
            _run(kernel, grid, arguments, storages, mode, shared=shared, cooperative=cooperative)
        for (low, high), content in zip(storages, after, strict=True):
            now = ctypes.string_at(low, high - low)
            if now != content:
                raise core.MachineError(_difference(kernel, mode, low, content, now, tensors))


@dataclasses.dataclass
class _Ran:
    run: core.Run
    found: bool  # whether it reached storages that no argument has


_indirect: set[str] = set()  # kernels that reach tensors through addresses kept in tensors


def _run(kernel, grid, arguments, storages, mode, *, shared, cooperative) -> _Ran:
    found = []

    def find_storage(address):
        span = next((span for span in _storages(_living()) if span[0] <= address < span[1]), None)
        if span is not None:
            found.append(span)
            _indirect.add(kernel.name)
        return span

    run = core.run(kernel, grid, arguments, storages, settings, shared=shared, cooperative=cooperative, find_storage=find_storage)
    seed = settings.seed
    settings.seed += 1
    launches.append(Launch(kernel, tuple(grid), mode, shared, cooperative, run))
    totals[mode].update(launches=1, seconds=run.seconds, **run.counters)
    reports.update((report.kind, report.text) for report in run.reports)
    wrong = [report for report in run.reports if report.kind not in HARMLESS and not named.is_named(report)]
    if run.code or wrong:
        words = "\n".join(f"{report.kind}: {report.text}" for report in wrong)
        raise core.MachineError(f"{kernel.name}, grid {tuple(grid)}, mode {mode}, seed {seed}: {run.error}\n{words}")
    return _Ran(run, bool(found))


def _storages(tensors) -> list[tuple[int, int]]:
    spans = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
    return _merged([(low, low + size) for low, size in spans if low and size])


def _merged(spans) -> list[tuple[int, int]]:
    """Ascending, those that overlap (views made from one pointer) joined."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if merged and low < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _living() -> list:
    """All CPU tensors with memory of their own that are alive in this process."""
    import torch

    found = []
    for value in gc.get_objects():
        # The type, not isinstance: proxies run code of their own when they are asked. A fake tensor has no memory.
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "cpu" and value.layout == torch.strided:
            found.append(value)
    return found


def _difference(kernel, mode, low, expected, got, tensors) -> str:
    places = [i for i in range(len(expected)) if expected[i] != got[i]]
    owners = [(t.dtype, tuple(t.shape)) for t in tensors if t.untyped_storage().data_ptr() == low]
    owner = f"{owners[0][0]} {owners[0][1]}" if owners else "a storage"
    return f"{kernel.name}: {len(places)} of {len(expected)} bytes of {owner} differ in mode {mode}, the first at {places[0]}"


def summary() -> str:
    """A few lines for people: how much ran, and what was seen."""
    if not totals:
        return "machine: no launch"
    kinds = collections.Counter()
    for (kind, _), count in reports.items():
        kinds[kind] += count
    seen = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) or "nothing"
    launched = ", ".join(f"{mode} {counts['launches']}" for mode, counts in totals.items())
    instructions, seconds = (sum(counts[name] for counts in totals.values()) for name in ("thread_instructions", "seconds"))
    return (
        f"machine: launches by mode: {launched}; {instructions:,} thread instructions in {seconds:.0f} s; "
        f"{totals['plain']['not_replayed']} launches not replayed; reported: {seen}"
    )


def record() -> dict:
    """The same for a program to read: counters by mode, reports with their numbers."""
    seen = [dict(kind=kind, text=text, count=count) for (kind, text), count in reports.most_common()]
    return dict(modes={mode: dict(counts) for mode, counts in totals.items()}, reports=seen)
