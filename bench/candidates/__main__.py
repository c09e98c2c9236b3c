"""What restricting drafts to C candidates costs in acceptance, on the embedded models: reference ops, token rule, all K verified.

    difference = mean over rounds of (accepted with C candidates - accepted without), error = its standard error over texts

Rounds are those of bench/shared/acceptance.py (one per cut of a real text), every STRIDE-th cut, the same cuts and seeds for every C,
so that the difference is between pairs. The embedded vocabulary is small (about 1000 ids), so that 256 candidates are a quarter of it.
Successors: the B ids that the sequential head itself ranks first after a token, arg-top of W1[x] W2^T, joined to the candidates.

    python -m bench.candidates [--stride 16] [--out FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.shared import command
from bench.shared.paths import RESULTS


def parser() -> command.Parser:
    p = command.Parser("bench.candidates", __doc__)
    p.add_argument("--stride", type=int, default=16, help="tokens between two cuts (default %(default)s)")
    p.add_argument(
        "--out",
        "--output",
        type=Path,
        default=RESULTS / "candidates.csv",
        metavar="FILE",
        help="CSV to write (default: %(default)s)",
    )
    return p


def check(options) -> None:
    """Raises BadArgument."""
    command.check_least("--stride", options.stride, 1)
    command.check_file("--out", options.out)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.candidates.measure", argv)


if __name__ == "__main__":
    sys.exit(main())
