"""Where a CUDA GPU of the modelled architecture is: what the ops really take there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.shared import timing
from bench.shared.cases.case import Case
from bench.shared.measure import QUICK_SAMPLES, Bench, facts_of, run


def microseconds(cases: Sequence[Case], arch: str) -> dict[tuple[str, str], float | str]:
    """(op, case) -> median of replayed graphs on cold inputs, or why there is no time; {} without such a GPU."""
    if not torch.cuda.is_available() or torch.version.hip:
        return {}
    device = torch.device("cuda", torch.cuda.current_device())
    if "sm_{}{}".format(*torch.cuda.get_device_capability(device)) != arch:
        return {}
    clock = timing.DeviceClock()
    bench = Bench(
        device=device,
        clock=clock,
        machine=timing.machine(device),
        bandwidth=timing.copy_bandwidth(clock, device),
        samples=QUICK_SAMPLES,
        baselines=(),
        small=False,
        capture=timing.graph_of,
        facts=lambda: facts_of(device),
    )
    return {(case.op, case.name): median(case, bench) for case in cases}


def median(case: Case, bench: Bench) -> float | str:
    """Microseconds, or why there is no time."""
    done = run(case, bench)
    return next((row.p50_us for row in done if (row.call, row.cache) == ("graph", "cold")), done[0].status)
