"""Time a case, and what does the same in PyTorch or an engine, after the case equals the reference.

A case that differs gives no time. CUDA-graph replays and eager calls are timed, on inputs that have left the cache (cold) and on
the same ones again (warm). What a captured graph writes is compared with the checked result, bit by bit, before it is timed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

import dspark_kernels as dk
from bench.shared import engines, timing
from bench.shared.baselines import BASELINES
from bench.shared.cases.checks import require
from bench.shared.cases.tensors import mapped, nbytes, poison, same
from bench.shared.command import first_line

SAMPLES, QUICK_SAMPLES = 200, 30
CONTENDERS = ("kernel", "pytorch", "torch.compile", "engines")  # engines: those of bench/shared/engines.py that import
STATUS = 300  # characters of a status at most
CALLS = ("graph", "eager")
CACHES = ("cold", "warm")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the report. Times in microseconds, None where there is none; status "ok", or why there is no time."""

    op: str
    case: str
    contender: str
    call: str
    cache: str
    status: str
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    input_sets: int = 0
    bytes: int = 0
    flops: int = 0
    copy_gb_per_s: float | None = None
    floor_us: float | None = None
    issue_us: float | None = None
    share_of_floor: float | None = None
    target_us: float | None = None
    met: str = ""  # "yes", "no", "" without a target
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    sm_clock_mhz: str = ""
    memory_clock_mhz: str = ""
    max_sm_clock_mhz: str = ""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where and how a case is timed. bandwidth: bytes per second of a device copy. capture: a call to its replay."""

    device: torch.device
    clock: object
    machine: timing.Machine
    bandwidth: float
    samples: int
    baselines: tuple[str, ...]
    small: bool
    capture: Callable
    facts: Callable[[], dict]  # columns about the machine, read after the times of a case


def inputs_of(spec, seed: int, device) -> dict:
    inputs = mapped(spec.make(seed), lambda tensor: tensor.to(device))
    # What a step makes once for all layers is an input of the call.
    return spec.prepare(inputs) if hasattr(spec, "prepare") else inputs


def check(spec, device, seed: int = 1, on_host: bool = False):
    """(inputs, checked result). Raises AssertionError where the op differs from the reference.

    on_host: where the reference computes; it makes thousands of small launches on a GPU.
    """
    inputs = inputs_of(spec, seed, device)
    result, evidence = spec.run(inputs)
    compared = (inputs, result, evidence)
    spec.compare(*(mapped(compared, lambda tensor: tensor.cpu()) if on_host else compared))
    return inputs, result


def run(case, bench: Bench) -> list[Row]:
    """Check a case, then time it and its baselines. A case that is not right gives one row without a time."""
    spec = case.spec.small() if bench.small else case.spec
    try:
        inputs, result = check(spec, bench.device, on_host=bench.small)
        return _timed(case, spec, inputs, result, bench)
    except AssertionError as error:
        return [_no_time(case, "kernel", "red: " + first_line(error))]
    except Exception as error:  # a kernel that does not compile or run must not hide the other cases
        return [_no_time(case, "kernel", f"failed: {type(error).__name__}: {first_line(error)}")]


def _no_time(case, contender: str, status: str, call: str = "", cache: str = "") -> Row:
    return Row(case.op, case.name, contender, call, cache, status[:STATUS])


def _timed(case, spec, inputs, result, bench: Bench) -> list[Row]:
    size = nbytes(inputs) + nbytes(result)
    count, between = timing.input_sets(size, bench.machine.l2_bytes)
    flush = timing.Flush(between, bench.device)
    sets = [inputs] + [_another(spec, inputs, 1 + i, bench.device) for i in range(1, count)]
    workspace = spec.workspace(bench.device)
    op = getattr(dk, spec.op)

    def kernel_call(given, out):
        if hasattr(spec, "call"):
            return lambda: spec.call(given)
        return lambda: op(**given, out=out, workspace=workspace)

    # Every set writes memory of its own, so that a result that is still in the cache saves no write.
    outs = [result] + [mapped(result, torch.empty_like) for _ in sets[1:]]
    want = mapped(result, torch.clone)
    calls = [kernel_call(*pair) for pair in zip(sets, outs, strict=True)]
    rows = []
    with torch.no_grad():
        for name in ("kernel", *_names(case.op, inputs, bench.baselines)):
            for how in CALLS:
                timed = None  # the graphs of a baseline hold gigabytes
                try:
                    if name != "kernel":
                        calls = _baseline_calls(case.op, name, sets)
                    timed = [bench.capture(call) for call in calls] if how == "graph" else calls
                    if name == "kernel":
                        _same_again(timed[0], result, want)
                    for cache in CACHES:
                        rows.append(_measured(case, spec, name, how, cache, timed, flush, bench))
                except Exception as error:
                    if name == "kernel":
                        raise  # no time of this case is to be believed
                    rows.append(_no_time(case, name, f"failed: {type(error).__name__}: {first_line(error)}", how))
    facts = bench.facts()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # what graphs held
    return [dataclasses.replace(row, **facts) for row in rows]


def _measured(case, spec, name, how, cache, calls, flush, bench: Bench) -> Row:
    """Cold: all sets in turn, the cache emptied in between; warm: the first set alone."""
    calls, before = (calls, flush) if cache == "cold" else (calls[:1], None)
    measured = timing.measure(calls, bench.clock, count=bench.samples, queued=how == "graph", before=before)
    return _row(case, spec, name, how, cache, measured, len(calls), bench)


def _another(spec, inputs, seed: int, device) -> dict:
    """Further inputs: from another seed where there are few requests, because their time depends on the draws, and where inputs
    hold addresses; otherwise copies of the same in other memory."""
    if spec.requests < 8 or hasattr(spec, "call"):
        return inputs_of(spec, seed, device)
    return mapped(inputs, torch.clone)


def _same_again(call, result, want) -> None:
    """Run once more into poisoned outputs. Raises AssertionError unless every bit is the checked one's."""
    poison(result)
    call()
    require(same(result, want), "a second run writes something else than the checked one")


def _names(op: str, inputs, baselines) -> list[str]:
    """With "engines" replaced by those that are installed; PyTorch only where there is a function for the op."""
    found = []
    for name in baselines:
        found += engines.installed(op, inputs) if name == "engines" else [name] * (op in BASELINES)
    return found


def _baseline_calls(op: str, name: str, sets) -> list[Callable]:
    baseline = engines.checked(op, name, sets[0]) if name in engines.ENGINES.get(op, {}) else BASELINES[op]
    function = baseline.function
    if name == "torch.compile":
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False)
    return [functools.partial(function, *baseline.arguments(given)) for given in sets]


def _row(case, spec, contender, call, cache, measured: timing.Timing, sets: int, bench: Bench) -> Row:
    floor = 1e6 * spec.bytes / bench.bandwidth
    lanes = bench.machine.lanes_per_second
    issue = None if lanes is None else 1e6 * spec.instructions / lanes
    row = Row(
        case.op, case.name, contender, call, cache, "ok", measured.p20, measured.p50, measured.p80, measured.samples, sets,
        spec.bytes, spec.flops, bench.bandwidth / 1e9, floor, issue, floor / measured.p50,
    )  # fmt: skip
    # Targets are for what an engine does: replay a graph after the target's pass has emptied the cache.
    if case.target is not None and (contender, call, cache) == ("kernel", "graph", "cold"):
        limit = case.target.limit(floor, issue)
        row = dataclasses.replace(row, target_us=limit, met="yes" if measured.p50 <= limit else "no")
    return row


def facts_of(device) -> dict:
    """Columns about the machine as it is now."""
    machine = timing.machine(device)
    return dict(
        gpu=machine.gpu, driver=machine.driver, torch=machine.torch, triton=machine.triton, commit=machine.commit,
        sm_clock_mhz=machine.sm_clock, memory_clock_mhz=machine.memory_clock, max_sm_clock_mhz=machine.max_sm_clock,
    )  # fmt: skip
