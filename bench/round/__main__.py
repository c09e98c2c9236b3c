"""Time a whole decoding round of this package in one CUDA graph, and say how much of an engine's round that is.

    draft_block -> schedule_prefixes -> plan_attention -> tree_attention (L layers) -> accept_chain

    python -m bench.round                                        R = 1, 8, 64, 256 requests; sizes of Qwen3-4B and its drafter
    python -m bench.round --backbone-ms 0.8 --target-ms 3.1      with an engine's measured times beside the ops
    python -m bench.round --target-bytes 16e9                    or with the bytes of its weights

With a GPU: every op alone in a graph and all of them in one, inputs cold, medians of replays, written to
bench/results/round-<gpu>.csv. Before, a small round equals the reference on the GPU, and what the graph writes at full size
equals, bit by bit, what the calls one by one write. Without a GPU small rounds are compared with the reference in Triton's
interpreter, and no times are taken. The column "predicted" is always there: bytes that must move once over the bandwidth.

A round of the engine = backbone + target without its attention + these ops. Times of the models that are not given are MODELLED
(bench/shared/roofline.py): weights over bandwidth or products over flops, whichever is longer; every draft is verified. `share` is an
op's part of that round. If all ops took no time, the round would be 1 / (1 - share) times as fast: nobody can gain more here.

Inputs are random, so fewer drafts are accepted than in practice, and acceptance draws more corrections. Layers whose caches fit
into the GPU's cache take turns over several.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.round.ops import Sizes, check, measure
from bench.round.report import Engine, lines, predicted, timed, write
from bench.shared import roofline, timing
from bench.shared.arguments import BadArgument, Parser, first_line
from bench.shared.interpreter import prepare_triton
from bench.shared.measure import QUICK_SAMPLES, SAMPLES, Bench
from bench.shared.paths import result_file

REQUESTS = (1, 8, 64, 256)


def parser() -> argparse.ArgumentParser:
    first, rest = __doc__.split("\n", 1)
    p = Parser(prog="python -m bench.round", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", metavar="R[,R]", default=",".join(map(str, REQUESTS)), help="default: %(default)s")
    p.add_argument("--context", type=int, metavar="TOKENS", default=2048, help="of every request (default: %(default)s)")
    p.add_argument("--layers", type=int, default=36, help="of the target (default: %(default)s)")
    p.add_argument("--backbone-ms", type=float, metavar="MS", help="measured time of the drafter's backbone")
    p.add_argument("--target-ms", type=float, metavar="MS", help="measured time of the target's pass without its attention")
    model = roofline.Decoder()
    p.add_argument(
        "--backbone-bytes", type=float, metavar="N", default=2.0 * model.draft_parameters,
        help="of its weights in bf16, where its time is not given (default: %(default)g)",
    )  # fmt: skip
    p.add_argument(
        "--target-bytes", type=float, metavar="N", default=2.0 * model.parameters,
        help="the same of the target (default: %(default)g)",
    )  # fmt: skip
    p.add_argument(
        "--bandwidth", type=float, metavar="GB/S", default=roofline.Machine().bytes_per_second / 1e9,
        help="for predictions without a GPU (default: %(default)g, a copy on an H200); with one it is measured",
    )  # fmt: skip
    p.add_argument("--quick", action="store_true", help=f"{QUICK_SAMPLES} samples instead of {SAMPLES}")
    p.add_argument("--out", metavar="FILE", help="the CSV file (default: bench/results/round-<gpu>.csv)")
    return p


def sizes_of(arguments) -> list[Sizes]:
    """Raises BadArgument."""
    try:
        requests = [int(part) for part in arguments.requests.split(",")]
    except ValueError:
        raise BadArgument(f"--requests: expected whole numbers with commas between them, got {arguments.requests!r}") from None
    if min(requests) < 1 or max(requests) > 1024:
        raise BadArgument(f"--requests: expected numbers from 1 to 1024, got {arguments.requests}")
    for option in ("context", "layers"):
        if getattr(arguments, option) < 1:
            raise BadArgument(f"--{option}: expected at least 1, got {getattr(arguments, option)}")
    for option in ("backbone_ms", "target_ms", "backbone_bytes", "target_bytes", "bandwidth"):
        value = getattr(arguments, option)
        if value is not None and not 0 < value < float("inf"):
            raise BadArgument(f"--{option.replace('_', '-')}: expected a number above 0, got {value:g}")
    return [Sizes(n, arguments.context, arguments.layers) for n in requests]


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


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a round is not right; 2: a bad argument."""
    try:
        arguments = parser().parse_args(argv)
        sizes = sizes_of(arguments)
        interpreted = prepare_triton()
    except BadArgument as error:
        print(f"bench.round: {error}", file=sys.stderr)
        return 2
    engine = Engine(arguments.backbone_ms, arguments.target_ms, arguments.backbone_bytes / 2, arguments.target_bytes / 2)
    if interpreted:
        return on_host(sizes, engine, 1e9 * arguments.bandwidth)
    return on_gpu(sizes, engine, arguments)


if __name__ == "__main__":
    sys.exit(main())
