"""What a quantised W2 costs in acceptance: tokens per round of the embedded DSpark drafter with W2 in bf16, fp8 e4m3 and int8.

    difference = mean over rounds of accepted(W2 quantised) - accepted(W2 in bf16), the same cuts, seeds and noise for both

Its standard error is that of the mean over texts, since two cuts of one text share most of their context. Reference path on the
CPU, token rule at temperature 1, one round per cut (bench/shared/acceptance.py). The embedded weights are int8 by rows already
(bench/assets/quantise.py) with the same scale, so int8 restores them exactly and its line shows the effect of rounding to bf16.

    python -m bench.quantised --texts 8        writes bench/results/quantised.csv
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.shared import command
from bench.shared.paths import RESULTS


def parser() -> command.Parser:
    p = command.Parser("bench.quantised", __doc__)
    p.add_argument("--texts", type=int, default=8, metavar="N", help="texts of each domain (default %(default)s)")
    p.add_argument("--stride", type=int, default=6, metavar="N", help="tokens between two cuts (default %(default)s)")
    p.add_argument(
        "--out", "--output", type=Path, default=RESULTS / "quantised.csv", metavar="FILE", help="the report (default: %(default)s)"
    )
    return p


def check(options) -> None:
    """Raises BadArgument."""
    command.check_least("--texts", options.texts, 1)
    command.check_least("--stride", options.stride, 1)
    command.check_file("--out", options.out)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.quantised.compare", argv)


if __name__ == "__main__":
    sys.exit(main())
