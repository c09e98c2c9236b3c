"""Launches of a round, counted on a GPU by the profiler and without one by the calls that reach Triton (bench/launches)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dspark_kernels as dk
from bench.shared import timing
from bench.shared.baselines import BASELINES
from bench.shared.cases.accept import Accept
from bench.shared.cases.attention import Attention
from bench.shared.cases.draft import Draft
from bench.shared.cases.layout import Schedule
from bench.shared.interpreter import prepare_triton
from bench.shared.launch_table import EAGER, OURS, Row, table, write
from bench.shared.measure import inputs_of
from dspark_kernels import library

NOTHING = (  # allocations, views whose schema does not say so, and a number in a `where`, which some versions keep on the host
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "scalar_tensor",
)  # fmt: skip


class Operators(TorchDispatchMode):
    """Names of torch operators that a GPU would have to launch something for."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != library.NAMESPACE and launches_something(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def launches_something(func) -> bool:
    """Not for an allocation, and not for a view: what it returns is an argument's memory, unwritten."""
    if func._schema.name.split("::")[-1] in NOTHING:
        return False
    returned = [value.alias_info for value in func._schema.returns]
    return not (returned and all(alias is not None and not alias.is_write for alias in returned))


@contextlib.contextmanager
def triton_launches():
    """A list that names every Triton kernel launched within it, interpreted or compiled."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    seen: list[str] = []
    before = {kind: kind.run for kind in (InterpretedFunction, JITFunction)}

    def counted(run):
        def count(self, *args, **kwargs):
            seen.append(getattr(self, "__name__", None) or self.fn.__name__)
            return run(self, *args, **kwargs)

        return count

    for kind, run in before.items():
        kind.run = counted(run)
    try:
        yield seen
    finally:
        for kind, run in before.items():
            kind.run = run


def on_host(call: Callable) -> tuple[int, int, int]:
    """(launches, of Triton, operators of torch) of a call."""
    with triton_launches() as seen, Operators() as operators:
        call()
    return len(seen) + len(operators.names), len(seen), len(operators.names)


def on_device(call: Callable) -> tuple[int, str, str]:
    """(events on the device, "", "") of a call that was made before."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == device for event in profile.events()), "", ""


@dataclasses.dataclass(frozen=True)
class Step:
    op: str
    per: str
    spec: object


def steps(sampled: bool, small: bool) -> list[Step]:
    """The ops of a round at few requests; small: also few ids and keys."""
    sizes = dict(vocab=1500) if small else {}
    model = dict(rank=16, hidden=24) if small else {}
    heads = dict(query_heads=4, kv_heads=2, head_dim=32) if small else {}
    return [
        Step("draft_block", "round", Draft(4, sampled, **sizes, **model)),
        Step("schedule_prefixes", "round", Schedule(4, "causal")),
        Step("accept_chain", "round", Accept(4, "dense" if sampled else "one_hot", sampled, **sizes)),
        Step("plan_attention", "round", Attention(3, 70, **heads)),
        Step("tree_attention", "layer", Attention(3, 70, **heads)),
    ]


def calls_of(step: Step, device) -> dict[str, Callable]:
    """contender -> a call of the step with outputs and scratch memory given, as a captured graph needs it."""
    inputs = inputs_of(step.spec, 1, device)
    if step.op == "plan_attention":
        given = dict(query_heads=step.spec.query_heads)
        return {OURS: lambda: dk.plan_attention(inputs["layout"], inputs["kv"], **given, out=inputs["plan"])}
    op, workspace = getattr(dk, step.op), step.spec.workspace(device)
    result = op(**inputs)
    baseline = BASELINES[step.op]
    arguments = baseline.arguments(inputs)
    return {OURS: lambda: op(**inputs, out=result, workspace=workspace), EAGER: lambda: baseline.function(*arguments)}


def count(device, small: bool) -> list[Row]:
    gpu = device.type == "cuda"
    counter = on_device if gpu else on_host
    method = "CUDA profiler: events on the device" if gpu else "calls of Triton kernels, torch operators that are no views"
    facts = dict(
        gpu=torch.cuda.get_device_name(device) if gpu else "none", torch=torch.__version__, triton=timing.triton_version(),
        commit=timing.commit(),
    )  # fmt: skip
    rows = []
    for sampled in (True, False):
        for step in steps(sampled, small):
            setting = "sampled" if sampled else "greedy"
            for contender, call in calls_of(step, device).items():
                with torch.no_grad():
                    numbers = counter(call)
                drafts = getattr(step.spec, "drafts", None) or step.spec.rows - 1
                rows.append(Row(setting, step.op, step.per, contender, *numbers, method, drafts, **facts))
                print(f"{setting} {step.op} {contender}: {numbers[0]}", flush=True)
    return rows


def run(arguments) -> int:
    """0: done. Raises BadArgument."""
    path, interpreted = Path(arguments.out), prepare_triton()
    device = torch.device("cpu") if interpreted else torch.device("cuda", torch.cuda.current_device())
    rows = count(device, interpreted)
    write(path, rows)
    print(f"\n{table(rows)}\n\nwritten to {path}")
    return 0
