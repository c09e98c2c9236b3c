"""Rows of bench/results/compile.csv: what a call's launch compiles to on one architecture."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from bench.shared.offline.binary import inspect_binary
from bench.shared.offline.capture import capture
from bench.shared.paths import RESULTS
from dspark_kernels.launch import arch as archs
from tests.machine import carries, reductions

REPORT = RESULTS / "compile.csv"
KEY = ("op", "case", "kernel", "arch")
DIGESTS = ("source", "launch")
COLUMNS = (
    *KEY, "registers", "spill_stores", "spill_loads", "scalar_spills", "stack", "shared", "shared_limit",
    "matrix_instructions", "binary_bytes", "num_warps", "num_stages", "compile_seconds", *DIGESTS, "ir", "triton",
)  # fmt: skip


def row_of(arch: str, op: str, case: str, call: Callable[[], object], compiled: bool, ir: bool = False) -> dict:
    """The report's row of a call on one architecture, without the measured columns if nothing is compiled."""
    if compiled:
        carries.refuse()
    with capture(arch, compiled, ir or compiled) as launches:
        call()
    # A form of several launches runs one binary again and again.
    if len({(launch.kernel, launch.launch) for launch in launches}) != 1:
        raise RuntimeError(f"{op} {case}: expected one binary, got {[launch.kernel for launch in launches]}")
    launch = launches[0]
    row = dict(op=op, case=case, kernel=launch.kernel, arch=arch, source=launch.source, launch=launch.launch, ir=launch.ir)
    if compiled:
        import triton

        if found := reductions.wrong(launch.compiled.asm["ttgir"]):
            raise RuntimeError(f"{op} {case}: Triton compiles these reductions wrongly: {'; '.join(found)}")
        metadata = launch.compiled.metadata
        row.update(inspect_binary(launch.compiled))
        row.update(
            shared=metadata.shared,
            shared_limit=archs.KNOWN[arch].shared_memory,
            num_warps=metadata.num_warps,
            num_stages=metadata.num_stages,
            compile_seconds=f"{launch.seconds:.2f}",
            triton=triton.__version__,
        )
    return {name: str(value) for name, value in row.items()}


def read(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
