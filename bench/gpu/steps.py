"""The steps of a GPU run, most important first: a process each, with a limit."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

PYTHON = sys.executable


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
