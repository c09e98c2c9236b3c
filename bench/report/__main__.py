"""Collect all results into one HTML page that needs no network: pictures and tables inside, readable on a phone.

    python -m bench.report                       bench/results -> bench/results/report.html
    python -m bench.report --results DIR         results from another folder; --out FILE the page elsewhere

What is modelled, counted without a GPU or measured is said at every section. A result that is not there is named, with the command
that makes it. The page shows what the files say, and files may be older than the code: `bench.compile --check` and
`bench.model --check` compare theirs with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.shared import command
from bench.shared.paths import RESULTS


def parser() -> command.Parser:
    p = command.Parser("bench.report", __doc__)
    p.add_argument("--results", metavar="DIR", default=str(RESULTS), help="folder of the results (default: bench/results)")
    p.add_argument("--out", metavar="FILE", help="the page (default: report.html in the folder of the results)")
    return p


def check(arguments) -> None:
    """Raises BadArgument."""
    if not Path(arguments.results).is_dir():
        raise command.BadArgument(f"--results: expected a folder that exists, got {arguments.results}")
    arguments.out = arguments.out or str(Path(arguments.results) / "report.html")
    command.check_file("--out", arguments.out)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: a bad argument, or a file that cannot be read; 130: stopped."""
    return command.run(parser, check, "bench.report.sections", argv)


if __name__ == "__main__":
    sys.exit(main())
