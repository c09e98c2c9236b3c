"""What each kernel compiles to on each architecture, without a GPU: registers, spills, memory, matrix instructions.

The launches are the ops' own: every case calls a public op on CPU tensors under another architecture's launch
configuration, and the launch is compiled instead of run. Each row is keyed by two digests: `source`, of the code of the
kernel and all device functions it can call, and `launch`, of everything else that decides the binary (types and
alignment of arguments, constants, options). `--check` computes both again, without compiling, and compares. A third digest,
`ir`, is of the Triton IR without names: rows whose IR is the same are of the same binary, however the source was rearranged.

    python -m bench.compile                    compile everything and write bench/results/compile.csv
    python -m bench.compile --arch sm_90       the same for one architecture; other rows stay
    python -m bench.compile --changed          compile only what has another IR than its row
    python -m bench.compile --check            are the committed rows those of the code as it is?
    python -m bench.compile --compare OLD.csv  which rows of two reports have another IR, other registers or spills?
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.shared import command
from bench.shared.paths import RESULTS
from bench.shared.source import architectures, literal

OPS = literal("bench.compile.cases", "CASES")
REPORT = RESULTS / "compile.csv"


def parser() -> command.Parser:
    p = command.Parser("bench.compile", __doc__)
    p.add_argument("--arch", action="append", choices=architectures(), help="architecture (repeatable; default: all)")
    p.add_argument("--op", action="append", choices=OPS, metavar="OP", help="op (repeatable; default: all)")
    p.add_argument("--case", action="append", metavar="CASE", help="case (repeatable; default: all)")
    p.add_argument("--check", action="store_true", help="compare the report with the code; compile nothing")
    p.add_argument("--changed", action="store_true", help="compile only launches whose IR is not that of their row")
    p.add_argument("--compare", type=Path, metavar="OLD.csv", help="compare the report with another one; compile nothing")
    p.add_argument("--out", "--output", type=Path, default=REPORT, metavar="FILE", help="the report (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time (default %(default)s)")
    p.add_argument("--cached", action="store_true", help="take binaries from Triton's cache where it has them")
    return p


def check(options) -> None:
    """Raises BadArgument."""
    command.check_least("--jobs", options.jobs, 1)
    command.check_file("--out", options.out)
    if options.compare is not None and not options.compare.is_file():
        raise command.BadArgument(f"--compare: expected a report, got {options.compare}, which is no file")


def main(argv: Sequence[str] | None = None) -> int:
    """0: as it has to be; 1: a launch is not; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.compile.work", argv)


if __name__ == "__main__":
    sys.exit(main())
