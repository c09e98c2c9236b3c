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
import csv
import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.shared import timing

ROOT = timing.ROOT
FILES = ("summary.md", "state.json", "log.txt", "tests.txt", "kernels.csv", "round.csv", "launches.csv", "tune.json")
RESERVE = 5.0  # seconds of the budget for the summary
LEAST = 10.0  # seconds below which no step is started
HEAD = "##### "  # before a step in its log
TAIL = 3000  # characters of a step's output kept in the state
PYTHON = sys.executable


class BadArgument(Exception):
    """Message of one line that names the argument."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One process. limit: seconds. log: file of FILES its output is appended to, None = only its end is kept, in the state.

    missing: why it cannot run here, or "". dry: what --dry-run runs in its place, None = nothing.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    log: str | None = None
    environment: tuple[tuple[str, str], ...] = (("TRITON_INTERPRET", "0"),)
    missing: str = ""
    dry: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """status: done, failed (exit code not 0), killed (past its limit), no time, missing."""

    status: str
    seconds: float = 0.0
    limit: float = 0.0
    exit: int | None = None
    tail: str = ""
    source: str = ""


# --- the steps --------------------------------------------------------------------------------------------------------


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def test_command() -> tuple[str, ...]:
    """pytest over the tests marked gpu; where it is missing, every case of bench.kernels against the reference at full size."""
    if not (has("pytest") and has("hypothesis")):  # conftest.py needs both
        return (PYTHON, "-m", "bench.kernels", "--check")
    # Test modules that cannot be imported here (a missing package) are reported, and the others run.
    options = ["-m", "gpu", "-v", "--tb=short", "-rfE", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    if has("xdist"):
        # Processes of their own: one illegal access ends one of them, not the run. They also share the CPU's work.
        options += ["-n", "4"]
    return (PYTHON, "-m", "pytest", "tests", *options)


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def _kernels(name: str, limit: float, ops: Sequence[str], out: Path) -> Step:
    chosen = tuple(f"--op={op}" for op in ops)
    command = (PYTHON, "-m", "bench.kernels", *chosen)
    times = (*command, "--no-baselines", "--out", str(out / "kernels.csv"))
    return Step(f"kernels: {name}", limit, times, dry=(*command, "--check"))


def steps(out: Path) -> list[Step]:
    """What there is to do, most important first."""
    tool = sanitizer()
    missing = "" if tool else "compute-sanitizer is not here"

    def checked(kind: str, limit: float, *environment) -> Step:
        command = (tool or "compute-sanitizer", "--tool", kind, "--error-exitcode", "9", "--print-limit", "20")
        command += (PYTHON, "-m", "bench.kernels", "--check", "--small")
        return Step(kind, limit, command, "log.txt", Step.environment + environment, missing)

    facts_command = (PYTHON, "-m", "bench.gpu", "--facts")
    found = [
        Step("environment", 60, facts_command, "log.txt", dry=facts_command),
        Step("tests", 200, test_command(), "tests.txt"),
        _kernels("draft_block", 120, ["draft_block", "draft_candidates"], out),
        _kernels("accept_chain", 100, ["accept_chain"], out),
        _kernels("schedule_prefixes", 60, ["schedule_prefixes"], out),
    ]
    import dspark_kernels

    if hasattr(dspark_kernels, "tree_attention"):
        found.append(_kernels("tree_attention", 120, ["tree_attention"], out))
    found.append(_kernels("trees", 120, ["draft_tree", "accept_tree", "compact_kv"], out))
    found.append(_kernels("layouts", 40, ["fixed_layout", "tree_layout", "draft_layout"], out))
    few = ("--num-prompts", "4", "--max-new-tokens", "48", "--systems", "autoregressive,dspark")
    decode = (PYTHON, "-m", "bench.decode", "--kernels", "--device", "cuda", *few)
    whole = (PYTHON, "-m", "bench.round")
    counted = (PYTHON, "-m", "bench.launches", "--out")
    tuning = (PYTHON, "-m", "bench.tune")
    found += [
        Step("round", 90, (*whole, "--quick", "--out", str(out / "round.csv")), "log.txt", dry=(*whole, "--requests", "1")),
        Step("decode", 90, decode, "log.txt"),
        # Allocations of their own: the caching allocator would hide a read just outside a tensor.
        checked("memcheck", 90, ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")),
        checked("racecheck", 90),
        Step("launches", 40, (*counted, str(out / "launches.csv")), dry=(*counted, os.devnull)),
        # Stops by itself; started again it goes on with the entries that are left.
        Step(
            "tune", 120, (*tuning, "--seconds", "90", "--most", "3", "--out", str(out / "tune.json")), "log.txt",
            dry=(*tuning, "--help"),
        ),
    ]  # fmt: skip
    cases = ("sampled_r1", "sampled_r64", "dense_r1", "dense_r64", "causal_r256")
    beside = (PYTHON, "-m", "bench.kernels", *(f"--case={case}" for case in cases), "--out", str(out / "kernels.csv"))
    found.append(Step("baselines", 240, beside))
    return found


# --- running them -----------------------------------------------------------------------------------------------------


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


def load_state(out: Path) -> dict[str, Result]:
    try:
        state = json.loads((out / "state.json").read_text(encoding="utf-8"))
        return {name: Result(**result) for name, result in state.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save_state(out: Path, state: dict[str, Result]) -> None:
    text = json.dumps({name: dataclasses.asdict(result) for name, result in state.items()}, indent=1)
    _replace(out / "state.json", text + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


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
        _replace(out / "summary.md", summary(todo, state, out))
        print(f"{head}: {result.status} after {result.seconds:.0f} s" + _why(result), flush=True)
    text = summary(todo, state, out)
    _replace(out / "summary.md", text)
    print("\n" + text)
    return 0 if all(name in state and state[name].status == "done" for name in (step.name for step in todo)) else 1


def _why(result: Result) -> str:
    if result.status == "missing":
        return f": {result.tail}"
    lines = result.tail.strip().splitlines()
    return f": {lines[-1][:200]}" if result.status in ("failed", "killed") and lines else ""


# --- summary ----------------------------------------------------------------------------------------------------------


def summary(todo: Sequence[Step], state: dict[str, Result], out: Path) -> str:
    """Markdown: the steps, then the numbers beside their targets."""
    text = ["# GPU run", ""]
    facts = _facts_line(out)
    if facts:
        text += [facts, ""]
    text += ["| step | status | seconds | limit | last line |", "| --- | --- | --- | --- | --- |"]
    for step in todo:
        result = state.get(step.name, Result("not yet"))
        last = result.tail.strip().splitlines()[-1:] or [""]
        cells = (step.name, result.status, f"{result.seconds:.0f}", f"{result.limit or step.limit:.0f}", _cell(last[0][:120]))
        text.append(f"| {' | '.join(cells)} |")
    counts = test_counts(out / "tests.txt")
    if counts:
        text += ["", "Tests marked gpu: " + ", ".join(f"{number} {name}" for name, number in counts.items()) + "."]
    text += _times(out / "kernels.csv") + _beside(out / "kernels.csv")
    text += _round(out / "round.csv") + _launches(out / "launches.csv")
    log = sections(out / "log.txt")
    text += _found(log.get("tune", ""), r"^\[\d+/\d+\] .*(?: before|no time left|reference).*", "Launch configurations")
    text += _found(log.get("decode", ""), r"^  (?:ok |NOT)  .*|^dspark.*|^autoregressive.*", "Decoding")
    checks = "\n".join(f"{HEAD}{name}\n{log[name]}" for name in ("memcheck", "racecheck") if name in log)
    text += _found(checks, rf"^{HEAD}.*|^=+ (?:ERROR SUMMARY|RACECHECK SUMMARY|Error:).*", "compute-sanitizer")
    return "\n".join(text) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/")


def sections(path: Path) -> dict[str, str]:
    """Step -> what its last run wrote to this log."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    parts = re.split(rf"^{HEAD}([^:\n]+): .*\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _facts_line(out: Path) -> str:
    lines = sections(out / "log.txt").get("environment", "").splitlines()
    wanted = ("gpu", "driver", "torch", "triton", "commit")
    found = dict(line.split(": ", 1) for line in lines if ": " in line)
    return ", ".join(f"{name} {found[name]}" for name in wanted if found.get(name))


def test_counts(path: Path) -> dict[str, int]:
    """Tests by outcome, from pytest's last line, or, where it was killed, from its lines so far."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").rsplit(f"\n{HEAD}", 1)[-1]  # of the last run
    except OSError:
        return {}
    kinds = ("passed", "failed", "skipped", "errors?", "deselected")
    ends = [line for line in text.splitlines() if re.search(r"\d+ (?:passed|failed|skipped|errors?|deselected).* in [\d.]+s", line)]
    if ends:
        return {kind.rstrip("s?"): int(m[1]) for kind in kinds if (m := re.search(rf"(\d+) {kind}", ends[-1]))}
    seen = {name.lower(): len(re.findall(rf"\b{name}\b", text)) for name in ("PASSED", "FAILED", "SKIPPED", "ERROR")}
    return {name: number for name, number in seen.items() if number}


def _rows(path: Path) -> list[dict]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def _times(path: Path) -> list[str]:
    """Replays on cold inputs: what an engine sees, and what targets are for."""
    rows = [row for row in _rows(path) if row["contender"] == "kernel"]
    wanted = [row for row in rows if row["status"] != "ok" or (row["call"], row["cache"]) == ("graph", "cold")]
    if not wanted:
        return []
    text = ["", f"Kernel times, us, graph replays on cold inputs; a copy moves {wanted[0]['copy_gb_per_s'] or '?'} GB/s.", ""]
    text += ["| op | case | p20 | median | p80 | floor | share | target | met |", "| --- " * 9 + "|"]
    for row in wanted:
        names = ("op", "case", "p20_us", "p50_us", "p80_us", "floor_us", "share_of_floor", "target_us", "met")
        if row["status"] == "ok":
            text.append(f"| {' | '.join(row[name] for name in names)} |")
        else:
            text.append(f"| {row['op']} | {row['case']} | {_cell(row['status'])} |" + " |" * 6)
    judged = [row["met"] for row in wanted if row["met"]]
    return [*text, "", f"Targets met: {judged.count('yes')} of {len(judged)}."]


def _beside(path: Path) -> list[str]:
    """Medians of all contenders, graphs on cold inputs, of the cases that have others than the kernel."""
    rows = [row for row in _rows(path) if row["call"] == "graph" and row["cache"] in ("cold", "")]
    both = {(row["op"], row["case"]) for row in rows if row["contender"] != "kernel"}
    rows = [row for row in rows if (row["op"], row["case"]) in both]
    if not rows:
        return []
    text = ["", "Beside PyTorch and the engines that import, median us, graph replays on cold inputs.", ""]
    text.append("| op | case | contender | median |")
    text.append("| --- | --- | --- | --- |")
    for row in rows:
        text.append(f"| {row['op']} | {row['case']} | {row['contender']} | {row['p50_us'] or _cell(row['status'])} |")
    return text


def _round(path: Path) -> list[str]:
    """The ops of a round, alone and all in one graph."""
    rows = _rows(path)
    if not rows:
        return []
    head = f"{rows[0]['context']} tokens of context, {rows[0]['layers']} layers; shares with the models' times as in round.csv"
    text = ["", f"A whole round, us: {head}.", "", "| requests | op | median | predicted | share of a round |"]
    text.append("| --- | --- | --- | --- | --- |")
    for row in rows:
        share = f"{float(row['share_of_round']):.1%}"
        text.append(f"| {row['requests']} | {row['op']} | {row['p50_us']} | {row['predicted_us']} | {share} |")
    return text


def _launches(path: Path) -> list[str]:
    from bench import launches

    try:
        return ["", *launches.table(launches.read(path)).splitlines()]
    except (OSError, ValueError, TypeError, IndexError):
        return []


def _found(output: str, pattern: str, title: str) -> list[str]:
    """Telling lines of a step's output."""
    lines = output.splitlines()
    telling = [line for line in lines if re.match(pattern, line)]
    return ["", f"{title}:", "", "```", *telling[-40:], "```"] if telling else []


# --- facts ------------------------------------------------------------------------------------------------------------


def facts() -> int:
    """Print what a result depends on, one "name: value" a line."""
    import torch

    print(f"commit: {timing.commit()}\nsource: {timing.source_digest()}\npython: {platform.python_version()}")
    print(f"torch: {torch.__version__}\ntriton: {timing.triton_version() or 'not here'}\nplatform: {platform.platform()}")
    print(f"cpus: {os.cpu_count()}")
    for name in ("numpy", "pytest", "hypothesis", "xdist", "tqdm", "safetensors", "matplotlib", "flashinfer", "vllm", "sglang"):
        print(f"{name}: {'here' if has(name) else 'not here'}")
    print(f"compute-sanitizer: {sanitizer() or 'not here'}")
    if not torch.cuda.is_available():
        print("gpu: none")
        return 0
    machine = timing.machine(torch.device("cuda", torch.cuda.current_device()))
    for field in dataclasses.fields(machine):
        if field.name not in ("torch", "triton", "commit"):
            print(f"{field.name}: {getattr(machine, field.name)}")
    properties = torch.cuda.get_device_properties(0)
    print(f"memory: {properties.total_memory / 2**30:.1f} GiB\ncapability: {properties.major}.{properties.minor}")
    try:
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout)
    except (OSError, subprocess.TimeoutExpired):
        print("nvidia-smi: not here")
    return 0


# --- command ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadArgument(message)


def parser() -> argparse.ArgumentParser:
    first, rest = __doc__.split("\n", 1)
    p = _Parser(prog="python -m bench.gpu", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        print(f"{step.name}: {result.status} after {result.seconds:.0f} s" + _why(result), flush=True)
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
