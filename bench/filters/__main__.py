"""How much of a row its filters read again: the share of its groups that reach the bound, and the passes over these.

    python -m bench.filters [--vocab 151936] [--temperature 1.0]

The command repeats the integers of kernels/primitives/filters.py on the host. A pass lists the elements that reach the bound; where
they are too many for the list, each further pass tests four keys inside the remaining interval, until they fit; the last pass sums
the support. A test compares the kernel with these passes. Rows: logits N(0, spread^2); spread 1 is flat, 4 is peaked, as a trained
model's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.shared import command


def parser() -> command.Parser:
    p = command.Parser("bench.filters", __doc__)
    p.add_argument("--vocab", type=int, default=151936, help="ids of a row (default %(default)s)")
    p.add_argument("--temperature", type=float, default=1.0, help="of the row (default %(default)s)")
    return p


def check(options) -> None:
    """Raises BadArgument."""
    command.check_least("--vocab", options.vocab, 1)
    command.check_above_zero("--temperature", options.temperature)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.filters.passes", argv)


if __name__ == "__main__":
    sys.exit(main())
