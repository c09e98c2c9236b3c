"""Time every op beside its floor, plain PyTorch and installed engines, each only after it equals the reference.

Every case is first run once and compared with the reference; a case that differs gives no time, and the exit code is 1. Then
CUDA-graph replays and eager calls are timed, on inputs that have left the cache (cold) and on the same ones again (warm). What a
captured graph writes is compared with the checked result, bit by bit, before it is timed.

Without a GPU, or with TRITON_INTERPRET=1, small versions of the cases run in Triton's interpreter, and no times are taken.

    python -m bench.kernels                          all cases, and plain PyTorch beside them; functions of flashinfer, vllm and
                                                     sgl_kernel too, where they import (bench/shared/engines.py)
    python -m bench.kernels --op accept_chain        one op (repeatable); --case dense_r64 one case
    python -m bench.kernels --check                  compare with the reference, take no times
    python -m bench.kernels --counters               without a GPU: instructions and bytes per logit of the compiled kernels,
                                                     counted while they run on a CPU (bench/shared/counters.py); 1, 8 and 64 requests
    python -m bench.kernels --host                   without a GPU: CPU time of a call before its launch (bench/kernels/host.py)

Rows of other cases stay in the output file. Times are microseconds; share = floor / median, the floor being the bytes that must
move once over the bandwidth of a device copy measured in the same run. Targets were set for one NVIDIA H200.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.shared import command
from bench.shared.source import literal

SAMPLES, QUICK_SAMPLES = (literal("bench.shared.measure", name) for name in ("SAMPLES", "QUICK_SAMPLES"))


def parser() -> command.Parser:
    p = command.Parser("bench.kernels", __doc__)
    p.add_argument("--op", action="append", metavar="NAME", help="only this op (repeatable)")
    p.add_argument("--case", action="append", metavar="NAME", help="only cases of this name (repeatable)")
    p.add_argument("--out", metavar="FILE", help="the CSV file (default: bench/results/kernels-<gpu>.csv)")
    p.add_argument("--quick", action="store_true", help=f"{QUICK_SAMPLES} samples instead of {SAMPLES}, no torch.compile")
    p.add_argument("--no-baselines", action="store_true", help="time the ops alone, without PyTorch and installed engines")
    p.add_argument("--check", action="store_true", help="compare with the reference and take no times")
    p.add_argument("--small", action="store_true", help="small versions of the cases (always without a GPU)")
    p.add_argument("--counters", action="store_true", help="count instructions and bytes of the compiled kernels, without a GPU")
    p.add_argument("--host", action="store_true", help="time what calls cost the CPU before their launches, without a GPU")
    p.add_argument("--requests", type=int, action="append", metavar="R", help="with --counters: this many requests (repeatable)")
    p.add_argument("--list", action="store_true", help="print the cases with their bytes and operations, and stop")
    return p


def check(arguments) -> None:
    """Raises BadArgument. Names of ops and cases are known to those who build them (work.py)."""
    command.check_file("--out", arguments.out)
    for count in arguments.requests or ():
        command.check_least("--requests", count, 1)
    if arguments.counters and arguments.host:
        raise command.BadArgument("--host: expected without --counters, got both")
    if arguments.requests and not arguments.counters:
        raise command.BadArgument("--requests: expected together with --counters")


def main(argv: Sequence[str] | None = None) -> int:
    """0: all cases are right; 1: one is not; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.kernels.work", argv)


if __name__ == "__main__":
    sys.exit(main())
