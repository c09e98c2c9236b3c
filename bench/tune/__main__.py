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

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.shared import command
from bench.shared.source import architectures, literal


def parser() -> command.Parser:
    p = command.Parser("bench.tune", __doc__)
    p.add_argument(
        "--arch", action="append", choices=architectures(), help="without timing: tables to explain (repeatable; default: all)"
    )
    p.add_argument(
        "--kernel",
        action="append",
        choices=literal("bench.tune.kernels", "KERNELS"),
        help="only these entries (repeatable; default: all)",
    )
    p.add_argument("--predict", action="store_true", help="without timing: rank what is one step away (minutes per entry)")
    p.add_argument("--compile-only", action="store_true", help="take no times, also where there is a GPU")
    p.add_argument("--most", type=int, default=6, help="configurations timed per entry and round (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=3600.0, help="start no new configuration after (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time (default: %(default)s)")
    p.add_argument("--out", metavar="PATH", help="the table to write on a GPU, else the folder of tables (default: the package's)")
    return p


def check(arguments) -> None:
    """Raises BadArgument."""
    for option, value in (("--most", arguments.most), ("--jobs", arguments.jobs), ("--seconds", arguments.seconds)):
        if not value > 0:
            raise command.BadArgument(f"{option}: expected more than 0, got {value:g}")
    if arguments.compile_only and arguments.out and not Path(arguments.out).is_dir():
        raise command.BadArgument(f"--out: expected a folder that exists, got {arguments.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: an entry spills, or some are left; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.tune.work", argv)


if __name__ == "__main__":
    sys.exit(main())
