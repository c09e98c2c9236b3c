"""Search the launch configurations of a GPU and write its table, with the measurement that justifies each entry.

    python -m bench.tune                    without a GPU: what every entry of every table compiles to
    python -m bench.tune --predict          the same, and configurations one step away, ranked by prediction
    python -m bench.tune                    on a GPU: time entries and what is one step away from them, keep what is faster

A step changes one parameter. Parameters that decide the order in which a request's numbers are summed are never changed, since bits
may not depend on the batch. Configurations that spill registers or exceed shared memory are excluded. The others are ranked by

    time = bytes / bandwidth * max(1, bandwidth * LATENCY / (multiprocessors * resident * bytes on the way per program))

with the bytes of bench.kernels' case and resident programs from registers, shared memory and warps of the binary. A prediction
changes no table. An entry is replaced only by a configuration that was timed, on a case that equals the reference, and was faster
by GAIN. Times are medians of CUDA-graph replays on cold inputs. The most important entries are timed first and each is written at
once, so that the command, started again, continues where it stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.shared import measure, timing
from bench.shared.arguments import BadArgument, Parser
from bench.tune.binaries import compiled
from bench.tune.explaining import explain
from bench.tune.kernels import KERNELS
from bench.tune.search import Tools, tune
from dspark_kernels.launch import arch as archs, table
from dspark_kernels.launch.arch import KNOWN


def parser() -> argparse.ArgumentParser:
    first, rest = __doc__.split("\n", 1)
    p = Parser(prog="python -m bench.tune", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arch", action="append", choices=KNOWN, help="without timing: tables to explain (repeatable; default: all)")
    p.add_argument("--kernel", action="append", choices=KERNELS, help="only these entries (repeatable; default: all)")
    p.add_argument("--predict", action="store_true", help="without timing: rank what is one step away (minutes per entry)")
    p.add_argument("--compile-only", action="store_true", help="take no times, also where there is a GPU")
    p.add_argument("--most", type=int, default=6, help="configurations timed per entry and round (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=3600.0, help="start no new configuration after (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time (default: %(default)s)")
    p.add_argument("--out", metavar="PATH", help="the table to write on a GPU, else the folder of tables (default: the package's)")
    return p


def pool(jobs: int):
    return concurrent.futures.ProcessPoolExecutor(max(1, jobs), mp_context=multiprocessing.get_context("spawn"))


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: an entry spills, or some are left; 2: a bad argument."""
    try:
        arguments = parser().parse_args(argv)
        for option, value in (("--most", arguments.most), ("--jobs", arguments.jobs), ("--seconds", arguments.seconds)):
            if not value > 0:
                raise BadArgument(f"{option}: expected more than 0, got {value:g}")
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
    except BadArgument as error:
        print(f"bench.tune: {error}", file=sys.stderr)
        return 2


def on_gpu(arguments, chosen: Sequence[str], submit: Callable) -> int:
    import torch

    deadline = time.monotonic() + arguments.seconds
    device = torch.device("cuda", torch.cuda.current_device())
    arch = archs.current(device)
    path = Path(arguments.out) if arguments.out else table.FOLDER / f"{arch.name}.json"
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise BadArgument(f"--out: expected a file in a folder that exists, got {path}")
    clock, machine = timing.DeviceClock(), timing.machine(device)
    bench = measure.Bench(
        device=device, clock=clock, machine=machine, bandwidth=timing.copy_bandwidth(clock, device),
        samples=measure.QUICK_SAMPLES, baselines=(), small=False, capture=timing.graph_of, facts=dict,
    )  # fmt: skip
    print(f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}, Triton {machine.triton}: table {arch.name}")
    return tune(arch.name, arch, chosen, path, Tools(submit, bench), arguments.most, deadline)


if __name__ == "__main__":
    sys.exit(main())
