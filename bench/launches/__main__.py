"""Count the launches of a decoding round: the ops of this package, and the same steps in plain PyTorch.

    python -m bench.launches                 count, print the table, write bench/results/launches.csv
    python -m bench.launches --out FILE      write it somewhere else

With a GPU: kernels that the CUDA profiler sees on the device (memory copies and fills among them), of one call after a first one
has compiled everything. Without one: Triton kernels by the calls that reach Triton, and torch operators by a dispatch mode. Views
and allocations launch nothing and are left out; every other operator counts once, though a sort, a cumulative sum or an index
launches several kernels on a GPU: what is said of plain PyTorch is a lower bound. Torch operators inside an op of the package are
not seen that way; on a GPU they would be.

Counts do not depend on sizes but on K, the drafts of a block, over which plain PyTorch loops. PyTorch's steps: bench/shared/baselines.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.shared import command
from bench.shared.paths import RESULTS


def parser() -> command.Parser:
    p = command.Parser("bench.launches", __doc__)
    p.add_argument(
        "--out", metavar="FILE", default=str(RESULTS / "launches.csv"), help="the CSV file (default: bench/results/launches.csv)"
    )
    return p


def check(arguments) -> None:
    """Raises BadArgument."""
    command.check_file("--out", arguments.out)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.launches.count", argv)


if __name__ == "__main__":
    sys.exit(main())
