"""What a call costs the host: CPU time of eager and of prepared calls before their kernels are launched, without a GPU.

The calls have arguments of full size, `out` and `workspace`, as those of an engine that captures no graph. Launch configurations are those of sm_90. Times are the least of many short runs on one core.

    plain         the op: checks, choice of a launch, its arguments; Triton's launch is replaced by nothing
    prepared      the same call by `dk.prepare`, every tensor of it another than in the example
    repeated      the same with no argument named, so that none is compared
    triton        Triton's own part for the launch, which is compiled for sm_90: its keys of types and values, up to the C function that
                  would call the driver, which is replaced by nothing
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import dspark_kernels as dk
from bench.shared import rows
from bench.shared.command import BadArgument
from bench.shared.offline.calls import (
    accept_call,
    accept_tree_call,
    attention_call,
    candidates_call,
    draft_call,
    draft_layout_call,
    draft_paths_call,
    draft_tree_call,
    layout_call,
    schedule_call,
)
from bench.shared.offline.calls.inputs import RANK, VOCAB
from bench.shared.offline.capture import stub_driver
from bench.shared.paths import RESULTS
from dspark_kernels.launch import arch as archs

RESULT = RESULTS / "host.csv"
ARCH = "sm_90"
RUNS, CALLS = 1000, 10  # runs of so many calls each

# op -> case -> the call, with arguments that are never touched.
CASES: dict[str, dict[str, Callable[[], object]]] = {
    "draft_block": {
        "sampled_r64": lambda: draft_call(64),
        "greedy_r64": lambda: draft_call(64, sampled=False, confidence=False),
        "rnn_filtered_r64": lambda: draft_call(64, kind="rnn", filtered=True, slots=80),
        "candidates64_r64": lambda: candidates_call(64),
    },
    "schedule_prefixes": {"causal_r64": lambda: schedule_call(64)},
    "fixed_layout": {"r64": lambda: layout_call(64)},
    "draft_layout": {"r64": lambda: draft_layout_call(64)},
    "plan_attention": {"r64": lambda: attention_call(64, head_dim=None)},
    "tree_attention": {"chain_r64": lambda: attention_call(64), "tree_r64": lambda: attention_call(64, drafts=63, mask="tree")},
    "accept_chain": {
        "dense_r64": lambda: accept_call(64),
        "greedy_r64": lambda: accept_call(64, proposal="one_hot", sampled=False),
        "block_filters_r64": lambda: accept_call(64, rule="block", filters=True, slots=80),
    },
    "accept_tree": {"walk_r64": lambda: accept_tree_call(64)},
    "draft_tree": {
        "top_k_r8": lambda: draft_tree_call(8, "top_k", (4, 2, 2)),
        "candidates64_r8": lambda: draft_paths_call(8, candidates=64),
    },
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """A line of the report, in microseconds."""

    op: str
    case: str
    plain_us: float
    prepared_us: float
    repeated_us: float
    triton_us: float
    cpu: str
    python: str
    torch: str
    triton: str


def main(cases: Sequence[tuple[str, str]], path: Path) -> int:
    """Time every case; each line is printed and written as soon as it is there."""
    torch.set_num_threads(1)
    print(f"{'':36}{'plain':>8}{'prepared':>10}{'repeated':>10}{'triton':>9}   us of one core, {cpu()}; launches are left out")
    for op, case in cases:
        cost = measure(op, case)
        rows.replace(path, [cost], ("op", "case"))
        times = f"{cost.plain_us:8.1f}{cost.prepared_us:10.1f}{cost.repeated_us:10.1f}{cost.triton_us:9.1f}"
        print(f"{op + ' ' + case:36}{times}", flush=True)
    print(f"written to {path}")
    return 0


def choose(ops: Sequence[str] | None, names: Sequence[str] | None) -> list[tuple[str, str]]:
    """(op, case) asked for. Raises BadArgument for a name that is not known."""
    for option, given, known in (("--op", ops, list(CASES)), ("--case", names, [name for made in CASES.values() for name in made])):
        for name in given or ():
            if name not in known:
                raise BadArgument(f"{option}: expected one of {', '.join(dict.fromkeys(known))}, got {name!r}")
    chosen = [(op, name) for op, made in CASES.items() for name in made if (not ops or op in ops) and (not names or name in names)]
    if not chosen:
        raise BadArgument(f"--case: expected one of {', '.join(name for op in ops for name in CASES[op])}, got {', '.join(names)}")
    return chosen


def measure(op: str, case: str, runs: int = RUNS) -> Cost:
    import triton
    from triton.runtime.jit import JITFunction

    function = getattr(dk, op)
    arguments = arguments_of(op, CASES[op][case])
    with archs.override(ARCH):
        if arguments.get("workspace") is None:
            arguments["workspace"] = workspace()
        with mock.patch.object(JITFunction, "run", lambda self, *args, **options: None):
            arguments["out"] = function(**arguments)
            prepared = dk.prepare(function, **arguments)
            others = {name: renewed(value) for name, value in arguments.items()}
            others = {name: value for name, value in others.items() if value is not arguments[name]}
            plain = least(lambda: function(**arguments), runs)
            all_new, repeated = least(lambda: prepared(**others), runs), least(prepared, runs)
        with compiling():
            with_triton = least(prepared, runs)
    return Cost(
        op, case, plain, all_new, repeated, with_triton - repeated, cpu(), platform.python_version(),
        torch.__version__, triton.__version__,
    )  # fmt: skip


@functools.cache
def workspace() -> dk.Workspace:
    """Scratch for every call that brings none."""
    heads = dict(query_heads=32, kv_heads=8, head_dim=128, max_rows=64 * 64)
    return dk.Workspace(64, 31, VOCAB, "cpu", markov_rank=RANK, **heads)


def arguments_of(op: str, call: Callable[[], object]) -> dict:
    """The arguments, by name, with which `call` calls an op; the call is not made."""
    function = getattr(dk, op)
    with mock.patch.object(dk, op) as stand_in:
        call()
    bound = inspect.signature(function).bind(*stand_in.call_args.args, **stand_in.call_args.kwargs)
    return dict(bound.arguments)


def renewed(value):
    """The same with other tensors on the same memory; itself where it has none."""
    if isinstance(value, Tensor):
        return value.detach()
    if not dataclasses.is_dataclass(value):
        return value
    before = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    after = {name: renewed(part) for name, part in before.items()}
    return value if all(after[name] is part for name, part in before.items()) else dataclasses.replace(value, **after)


def least(call: Callable[[], object], runs: int) -> float:
    """Microseconds of a call in the fastest run."""
    call()
    best = float("inf")
    gc.disable()
    try:
        for _ in range(runs):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best = min(best, time.perf_counter() - start)
    finally:
        gc.enable()
    return 1e6 * best / CALLS


@contextlib.contextmanager
def compiling():
    """Within it kernels are compiled for ARCH, and their launches end where Triton would enter C."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    active = driver._active
    driver.set_active(stub_driver(GPUTarget("cuda", int(ARCH.removeprefix("sm_")), 32)))
    try:
        loaded, run = lambda self: None, property(lambda self: lambda *args: None)
        with mock.patch.multiple(CompiledKernel, _init_handles=loaded, run=run):
            yield
    finally:
        driver._active = active


def cpu() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or sys.platform
