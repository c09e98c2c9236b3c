"""What bench.round does once its arguments are known: predict, check and time rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bench.round.ops import Sizes, check, measure
from bench.round.report import Engine, lines, predicted, timed, write
from bench.shared import timing
from bench.shared.command import first_line
from bench.shared.interpreter import prepare_triton
from bench.shared.measure import QUICK_SAMPLES, SAMPLES, Bench
from bench.shared.paths import result_file


def on_host(sizes: Sequence[Sizes], engine: Engine, bandwidth: float) -> int:
    """Predictions, and small rounds against the reference."""
    print(f"MODELLED, not measured: bytes at {bandwidth / 1e9:g} GB/s, microseconds. {engine.words()}\n")
    for size in sizes:
        print("\n".join(lines(predicted(size, bandwidth, engine))) + "\n", flush=True)
    wrong, small = 0, list(dict.fromkeys(size.small() for size in sizes))
    for number, size in enumerate(small, 1):
        try:
            verdict = f"{check(size, torch.device('cpu'))} calls equal the reference, and given memory changes no bit"
        except AssertionError as error:
            verdict, wrong = "RED: " + first_line(error), wrong + 1
        print(f"[{number}/{len(small)}] small round, R = {size.requests}: {verdict}", flush=True)
    print("small rounds in Triton's interpreter; no times were taken")
    return 1 if wrong else 0


def on_gpu(sizes: Sequence[Sizes], engine: Engine, arguments) -> int:
    device = torch.device("cuda", torch.cuda.current_device())
    clock = timing.DeviceClock()
    machine, bandwidth = timing.machine(device), timing.copy_bandwidth(clock, device)
    bench = Bench(
        device=device, clock=clock, machine=machine, bandwidth=bandwidth,
        samples=QUICK_SAMPLES if arguments.quick else SAMPLES, baselines=(), small=False,
        capture=timing.graph_of, facts=dict,
    )  # fmt: skip
    path = Path(arguments.out) if arguments.out else result_file("round", machine.gpu)
    print(f"{machine.gpu}, driver {machine.driver}, {machine.commit}: a device copy moves {bandwidth / 1e9:.0f} GB/s, microseconds")
    return report(sizes, engine, bench, path)


def report(sizes: Sequence[Sizes], engine: Engine, bench: Bench, path: Path) -> int:
    """Check and time one batch size after another, each printed and written as soon as it is done."""
    wrong, machine = 0, bench.machine
    facts = {name: getattr(machine, name) for name in ("gpu", "driver", "torch", "triton", "commit")}
    print(engine.words())
    for number, size in enumerate(sizes, 1):
        print(f"[{number}/{len(sizes)}]", end=" ", flush=True)
        try:
            check(size.small(), bench.device)
            taken = measure(size, bench)
        except Exception as error:  # out of memory at one size, say, must not hide the others
            kind = "RED" if isinstance(error, AssertionError) else f"FAILED: {type(error).__name__}"
            print(f"R = {size.requests}: {kind}: {first_line(error)}", flush=True)
            wrong += 1
            continue
        copy = dict(copy_gb_per_s=bench.bandwidth / 1e9)
        rows = timed(predicted(size, bench.bandwidth, engine), taken, facts | copy)
        print("\n".join(lines(rows)) + "\n", flush=True)
        write(path, rows)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"written to {path}")
    return 1 if wrong else 0


def run(arguments) -> int:
    """0: done; 1: a round is not right. Raises BadArgument."""
    interpreted = prepare_triton()
    sizes = [Sizes(n, arguments.context, arguments.layers) for n in arguments.requests]
    engine = Engine(arguments.backbone_ms, arguments.target_ms, arguments.backbone_bytes / 2, arguments.target_bytes / 2)
    if interpreted:
        return on_host(sizes, engine, 1e9 * arguments.bandwidth)
    return on_gpu(sizes, engine, arguments)
