"""Run steps one after another within a budget; past its limit a step's whole process group is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.state import Result, load_state, replace, save_state
from bench.gpu.steps import Step
from bench.gpu.summary import HEAD, summary
from bench.shared import timing
from bench.shared.paths import ROOT

RESERVE = 5.0  # seconds of the budget for the summary
LEAST = 10.0  # seconds below which no step is started
TAIL = 3000  # characters of a step's output kept in the state


def run_step(step: Step, limit: float, out: Path, source: str) -> Result:
    """Run a step for at most `limit` seconds; past it, end its whole process group."""
    if step.missing:
        return Result("missing", tail=step.missing, source=source)
    with tempfile.TemporaryFile("w+b") as own:
        log = open(out / step.log, "ab") if step.log else own
        try:
            if step.log:
                log.write(f"\n{HEAD}{step.name}: {' '.join(step.command)}\n".encode())
                log.flush()
            begin = log.seek(0, os.SEEK_END)
            start = time.monotonic()
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(step.environment)}
            try:
                process = subprocess.Popen(
                    step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                return Result("failed", limit=limit, tail=f"{step.command[0]}: {error.strerror}", source=source)
            try:
                code = process.wait(limit)
                status = "done" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                _end(process)
                code, status = None, "killed"
            except BaseException:  # an interrupt must not leave the step behind
                _end(process)
                raise
            seconds = time.monotonic() - start
            text = _read_from(out / step.log if step.log else own, begin)
        finally:
            if step.log:
                log.close()
    return Result(status, round(seconds, 1), limit, code, text[-TAIL:], source)


def _end(process) -> None:
    """End the process and all it started, which are a group of their own."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            pass
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _read_from(where, begin: int) -> str:
    if isinstance(where, Path):
        with open(where, "rb") as file:
            file.seek(begin)
            return file.read().decode(errors="replace")
    where.seek(begin)
    return where.read().decode(errors="replace")


def run_all(todo: Sequence[Step], out: Path, budget: float) -> int:
    """Run what is not done within `budget` seconds. 0: all is done."""
    deadline = time.monotonic() + budget
    source = timing.source_digest()
    state = load_state(out)
    for number, step in enumerate(todo, 1):
        head = f"[{number}/{len(todo)}] {step.name}"
        before = state.get(step.name)
        if before is not None and before.status == "done" and before.source == source:
            print(f"{head}: done before", flush=True)
            continue
        left = deadline - time.monotonic() - RESERVE
        if left < min(LEAST, step.limit):
            result = Result("no time", limit=step.limit, source=source)
        else:
            limit = min(step.limit, left)
            print(f"{head}: at most {limit:.0f} of {left:.0f} s left", flush=True)
            result = run_step(step, limit, out, source)
        state[step.name] = result
        save_state(out, state)
        replace(out / "summary.md", summary(todo, state, out))
        print(f"{head}: {result.status} after {result.seconds:.0f} s" + why(result), flush=True)
    text = summary(todo, state, out)
    replace(out / "summary.md", text)
    print("\n" + text)
    return 0 if all(name in state and state[name].status == "done" for name in (step.name for step in todo)) else 1


def why(result: Result) -> str:
    if result.status == "missing":
        return f": {result.tail}"
    lines = result.tail.strip().splitlines()
    return f": {lines[-1][:200]}" if result.status in ("failed", "killed") and lines else ""
