"""What every hot kernel costs, from what it compiles to, without a GPU: a model, not a measurement.

Each op of a step is compiled at V = 151936, K = 7, rank 256, bf16 for a GPU that need not be there. From the SASS come the
instructions and barriers of the hot loop per logit, registers and shared memory, so how many programs are resident; from these,
from the bytes that must move and from the steps that follow (bench/model/ops.py) a time with a range. Where a CUDA GPU is, its
time stands beside it.

    python -m bench.model                            all of it; bench/results/model/h200.csv
    python -m bench.model --op accept_chain          one op (repeatable); --case dense_r64 one case
    python -m bench.model --check                    are the committed rows those of the code, and none worse than the baseline?
    python -m bench.model --baseline                 as without, and the rows become the baseline
    python -m bench.model --compare OLD.csv NEW.csv  which hot parts grew by more than 5 %?
    python -m bench.model --blocks --op accept_chain --case dense_r64
                                                     loops of the SASS and what loads: for who updates bench/model/ops.py
    python -m bench.model --machine                  the rows' instructions per element beside those that compiled kernels execute
                                                     on the machine of tests/machine; bench/results/model/machine.csv
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.shared import command
from bench.shared.source import literal


def parser() -> command.Parser:
    p = command.Parser("bench.model", __doc__)
    p.add_argument("--op", action="append", metavar="NAME", help="only this op (repeatable)")
    p.add_argument("--case", action="append", metavar="NAME", help="only cases of this name (repeatable)")
    p.add_argument(
        "--arch", choices=literal("bench.model.constants", "MACHINES"), default="sm_90", help="architecture (default: %(default)s)"
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the CSV file (default: <gpu>.csv in bench/results/model, with --machine machine.csv)",
    )
    p.add_argument(
        "--check", action="store_true", help="compare the committed rows with the code and the baseline; compile nothing"
    )
    p.add_argument("--baseline", action="store_true", help="the new rows become those that --check compares with")
    p.add_argument("--compare", type=Path, nargs=2, metavar=("OLD.csv", "NEW.csv"), help="compare two reports; compile nothing")
    p.add_argument("--machine", action="store_true", help="compare instructions with those that compiled kernels execute on a CPU")
    p.add_argument("--blocks", action="store_true", help="print what the SASS consists of, and stop")
    return p


def check(arguments) -> None:
    """Raises BadArgument. Names of ops and cases are known to those who build them (work.py)."""
    for path in arguments.compare or ():
        if not path.is_file():
            raise command.BadArgument(f"--compare: expected a report, got {path}, which is no file")
    command.check_file("--out", arguments.out)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: rows are stale, or a hot part has grown; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.model.work", argv)


if __name__ == "__main__":
    sys.exit(main())
