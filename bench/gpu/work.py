"""What bench.gpu does once its arguments are known: print facts, list steps, or run what is not done."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.facts import facts
from bench.gpu.running import run_all, run_step, why
from bench.gpu.steps import PYTHON, Step, steps
from bench.shared.command import BadArgument


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


def run(arguments) -> int:
    """0: all steps are done; 1: some are not. Raises BadArgument."""
    if arguments.facts:
        return facts()
    if arguments.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            return dry_run(steps(Path(arguments.out or "DIR")), Path(folder))
    import torch

    if not torch.cuda.is_available():
        raise BadArgument("no GPU here (--dry-run lists the steps and runs the quick ones in Triton's interpreter)")
    out = Path(arguments.out).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"--out: {arguments.out}: {error.strerror}") from None
    return run_all(steps(out), out, 60 * arguments.minutes)
