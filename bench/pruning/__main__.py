"""What exact pruning of W2 would save: the share of its tiles that no draft of a greedy block can come from.

    tile can be skipped for a request  <=>  max base(tile) + |latent| * max |W2 row|(tile)  <  the best logit of the row

By the inequality of Cauchy and Schwarz no logit of such a tile is the best. The best logit is taken as known before the first tile,
so every share is an upper limit of what a kernel reaches. A tile is read if any request of the batch needs it. Tiles are of 64 ids,
as kernels/draft/dense.py sweeps them.

Logits: the embedded DSpark drafter on held-out text (a vocabulary of about a thousand), and of a vocabulary of 151936 synthetic
ones: base logits normal, the drafted id `peak` above the mean, W1 and W2 normal so that a bias has standard deviation `bias`.

    python -m bench.pruning        writes bench/results/pruning.csv
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.shared import command
from bench.shared.paths import RESULTS


def parser() -> command.Parser:
    p = command.Parser("bench.pruning", __doc__)
    p.add_argument("--texts", type=int, default=8, metavar="N", help="texts of each domain (default %(default)s)")
    p.add_argument("--stride", type=int, default=6, metavar="N", help="tokens between two cuts (default %(default)s)")
    p.add_argument("--out", type=Path, default=RESULTS / "pruning.csv", metavar="FILE", help="the report (default: %(default)s)")
    return p


def check(options) -> None:
    """Raises BadArgument."""
    command.check_least("--texts", options.texts, 1)
    command.check_least("--stride", options.stride, 1)
    command.check_file("--out", options.out)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.pruning.shares", argv)


if __name__ == "__main__":
    sys.exit(main())
