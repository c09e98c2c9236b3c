"""Everything that needs a GPU in one command, most important first, within a time budget.

    python -m bench.gpu --out DIR [--minutes 9]      run; again with the same DIR: only what is not done yet
    python -m bench.gpu --dry-run                    list the steps and run the quick ones in Triton's interpreter

Facts about the machine, the tests marked gpu, kernel times by op, a whole round in one graph, decoding with kernels, memory and
race checks, launches counted by the profiler, launch configurations of the most important shapes (tune.json: a table for
dspark_kernels/launch/tables), plain PyTorch beside the kernels. Every step is a process of its own with a limit, past which it is
killed; what it wrote until then stays. DIR holds at most 8 files: state.json says what is done (and for which source: a step is
run again after a change), summary.md is written after every step.

Exit code: 0 all steps are done, 1 some are not, 2 no GPU or a bad argument.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.shared import command

FILES = ("summary.md", "state.json", "log.txt", "tests.txt", "kernels.csv", "round.csv", "launches.csv", "tune.json")


def parser() -> command.Parser:
    p = command.Parser("bench.gpu", __doc__)
    p.add_argument("--out", metavar="DIR", help="where the results go")
    p.add_argument("--minutes", type=float, default=9.0, help="for all steps together (default: %(default)s)")
    p.add_argument("--dry-run", action="store_true", help="list the steps, run the quick ones in Triton's interpreter")
    p.add_argument("--facts", action="store_true", help="print facts about this machine, and stop")
    return p


def check(arguments) -> None:
    """Raises BadArgument."""
    if not arguments.minutes > 0:
        raise command.BadArgument(f"--minutes: expected more than 0, got {arguments.minutes:g}")
    if arguments.out is None and not (arguments.facts or arguments.dry_run):
        raise command.BadArgument("--out: expected a folder, got none")


def main(argv: Sequence[str] | None = None) -> int:
    """0: all steps are done; 1: some are not; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.gpu.work", argv)


if __name__ == "__main__":
    sys.exit(main())
