"""What bench.tune does once its arguments are known: explain tables, or time configurations and write a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.shared import measure, timing
from bench.shared.command import BadArgument, check_file
from bench.shared.workers import pool
from bench.tune.binaries import compiled
from bench.tune.explaining import explain
from bench.tune.kernels import KERNELS
from bench.tune.search import Tools, tune
from dspark_kernels.launch import arch as archs, table
from dspark_kernels.launch.arch import KNOWN


def run(arguments) -> int:
    """0: done; 1: an entry spills, or some are left. Raises BadArgument."""
    chosen = arguments.kernel or list(KERNELS)
    with pool(arguments.jobs) as workers:

        def submit(*given):
            return workers.submit(compiled, *given)

        if arguments.compile_only or not torch.cuda.is_available():
            folder = Path(arguments.out) if arguments.out else table.FOLDER
            if not folder.is_dir():
                raise BadArgument(f"--out: expected a folder that exists, got {arguments.out}")
            return explain(arguments.arch or list(KNOWN), chosen, folder, submit, arguments.predict)
        if arguments.arch or arguments.predict:
            raise BadArgument("--arch, --predict: expected with --compile-only where there is a GPU, which is what is tuned")
        return on_gpu(arguments, chosen, submit)


def on_gpu(arguments, chosen: Sequence[str], submit: Callable) -> int:
    deadline = time.monotonic() + arguments.seconds
    device = torch.device("cuda", torch.cuda.current_device())
    arch = archs.current(device)
    path = Path(arguments.out) if arguments.out else table.FOLDER / f"{arch.name}.json"
    check_file("--out", path)
    clock, machine = timing.DeviceClock(), timing.machine(device)
    bench = measure.Bench(
        device=device, clock=clock, machine=machine, bandwidth=timing.copy_bandwidth(clock, device),
        samples=measure.QUICK_SAMPLES, baselines=(), small=False, capture=timing.graph_of, facts=dict,
    )  # fmt: skip
    print(f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}, Triton {machine.triton}: table {arch.name}")
    return tune(arch.name, arch, chosen, path, Tools(submit, bench), arguments.most, deadline)
