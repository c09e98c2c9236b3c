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

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.facts import facts
from bench.gpu.running import run_all, run_step, why
from bench.gpu.steps import PYTHON, Step, steps
from bench.shared.arguments import BadArgument, Parser

FILES = ("summary.md", "state.json", "log.txt", "tests.txt", "kernels.csv", "round.csv", "launches.csv", "tune.json")


def parser() -> argparse.ArgumentParser:
    first, rest = __doc__.split("\n", 1)
    p = Parser(prog="python -m bench.gpu", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", metavar="DIR", help="where the results go")
    p.add_argument("--minutes", type=float, default=9.0, help="for all steps together (default: %(default)s)")
    p.add_argument("--dry-run", action="store_true", help="list the steps, run the quick ones in Triton's interpreter")
    p.add_argument("--facts", action="store_true", help="print facts about this machine, and stop")
    return p


def dry_run(todo: Sequence[Step], out: Path) -> int:
    """List the steps with their limits, then run what each has for a machine without a GPU."""
    print("step                         limit  command")
    for step in todo:
        command = " ".join("python" if part == PYTHON else part for part in step.command)
        note = f"   ({step.missing})" if step.missing else ""
        print(f"{step.name.ljust(28)} {step.limit:4.0f} s  {command}{note}")
    print(flush=True)
    wrong = 0
    for step in todo:
        if step.dry is None:
            continue
        # Without a GPU to see, kernels run in the interpreter, also where there is one.
        hidden = (("CUDA_VISIBLE_DEVICES", ""), ("HIP_VISIBLE_DEVICES", ""), ("TRITON_INTERPRET", "1"))
        quick = dataclasses.replace(step, command=step.dry, log=None, environment=hidden, missing="")
        result = run_step(quick, step.limit, out, "")
        print(f"{step.name}: {result.status} after {result.seconds:.0f} s" + why(result), flush=True)
        wrong += result.status != "done"
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parser().parse_args(argv)
        if not arguments.minutes > 0:
            raise BadArgument(f"--minutes: expected more than 0, got {arguments.minutes:g}")
        if arguments.facts:
            return facts()
        if arguments.dry_run:
            with tempfile.TemporaryDirectory() as folder:
                return dry_run(steps(Path(arguments.out or "DIR")), Path(folder))
        import torch

        if not torch.cuda.is_available():
            raise BadArgument("no GPU here (--dry-run lists the steps and runs the quick ones in Triton's interpreter)")
        if arguments.out is None:
            raise BadArgument("--out: expected a directory, got none")
        out = Path(arguments.out).resolve()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadArgument(f"--out: {arguments.out}: {error.strerror}") from None
        return run_all(steps(out), out, 60 * arguments.minutes)
    except BadArgument as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
