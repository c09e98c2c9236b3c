"""What a launch does, counted: dynamic instructions and bytes per logit of the compiled kernels, without a GPU.

The machine of tests/machine executes the PTX of the sm_80 configuration at full vocabulary and counts. Counts are of PTX, not of the
instructions that ptxas makes of it; bytes are those of 32-byte sectors that warps ask for, before any cache.

    elements      what the op reads most of: target or base logits, keys of a context, rows of a layout, bytes moved
    moved         bytes of all sectors asked for, read and written
    touched       bytes of the distinct sectors among them
    must_move     bytes that must move once, counted by hand (the case's own `bytes`)
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.shared import rows
from bench.shared.paths import RESULTS

RESULT = RESULTS / "counters.csv"
REQUESTS = (1, 8, 64)
SECTOR = 32  # bytes

# Of cases that differ in nothing but the number of requests, and of ops with many: one for each loop that a GPU spends its time in.
CHOSEN = {
    "draft_block": ("sampled_r1", "greedy_r1"),
    "accept_chain": ("dense_r1", "one_hot_r1", "sparse_r1", "dense_block_r64", "coupled_r64", "greedy_r1"),
    "schedule_prefixes": ("causal_r1", "budget_r1"),
    "draft_candidates": ("c64_r1",),
    "tree_attention": ("r1_c8192_q8",),
    "draft_tree": ("c64_r1",),
    "accept_tree": ("walk_m32_r1", "traversal_m8_r64"),
    "compact_kv": ("r1",),
    "fixed_layout": ("r64",),
    "tree_layout": ("r64",),
    "draft_layout": ("r64",),
}


@dataclasses.dataclass(frozen=True)
class Counted:
    """A line of the report: one call of an op, all of its launches together."""

    op: str
    case: str
    requests: int
    element: str
    elements: int
    launches: int
    programs: int
    thread_instructions: int
    instructions_per_element: float
    block_barriers: int
    atomics: int
    must_move: int
    moved: int
    touched: int
    moved_per_element: float
    moved_over_must_move: float
    triton: str


COLUMNS = tuple(field.name for field in dataclasses.fields(Counted))


def elements_of(spec) -> tuple[str, int]:
    """(what, how many): what the op reads most of."""
    if spec.op == "tree_attention":
        return "key", spec.requests * spec.context
    if spec.op == "compact_kv":
        return "byte", spec.bytes
    if not hasattr(spec, "vocab"):
        rows = [getattr(spec, name) for name in ("rows", "nodes", "drafts") if hasattr(spec, name)]
        return "row", rows[0] if hasattr(spec, "rows") else spec.requests * rows[0]
    rows = spec.rows if spec.op.startswith("accept") else spec.requests * spec.drafts
    return "logit", rows * spec.vocab


def start_machine(arch: str = "sm_80"):
    """The machine, installed in this process for `arch`. Raises RuntimeError where there is no compiler for it."""
    from tests import machine

    if (reason := machine.available()) is not None:
        raise RuntimeError(reason)
    machine.install(arch)
    torch.set_num_threads(1)
    return machine


def count(machine, case, requests: int) -> Counted:
    """Run a case's op once, at full size, for this many requests."""
    import triton

    import dspark_kernels as dk

    spec = dataclasses.replace(case.spec, requests=requests)
    inputs = spec.make(1)
    inputs = spec.prepare(inputs) if hasattr(spec, "prepare") else inputs
    machine.launches.clear()
    if hasattr(spec, "call"):
        spec.call(inputs)
    else:
        getattr(dk, spec.op)(**inputs)
    done = list(machine.launches)
    total = {name: sum(launch.counters[name] for launch in done) for name in done[0].counters}
    element, elements = elements_of(spec)
    moved = SECTOR * sum(total[f"{kind}_sectors"] for kind in ("load", "store", "atomic"))
    touched = SECTOR * (total["distinct_read_sectors"] + total["distinct_written_sectors"])
    name = case.name.rsplit("_r", 1)[0] if not case.name.startswith("r") else case.name
    return Counted(
        case.op, name, requests, element, elements, len(done), sum(x * y * z for x, y, z in (launch.grid for launch in done)),
        total["thread_instructions"], total["thread_instructions"] / elements, total["block_barriers"], total["atomic_threads"],
        spec.bytes, moved, touched, moved / elements, moved / spec.bytes, triton.__version__,
    )  # fmt: skip


def main(cases: Sequence, path: Path, requests: Sequence[int] = REQUESTS) -> int:
    """Count every case at every number of requests; each line is printed and written as soon as it is there."""
    try:
        machine = start_machine()
    except RuntimeError as error:
        print(f"bench.kernels: --counters: {error}", file=sys.stderr)
        return 2
    print(f"{'':34}{'per element':>12}{'moved':>10}{'/ must':>8}{'barriers':>10}   counted on PTX of sm_80, not measured")
    for case in cases:
        for number in requests:
            start = time.perf_counter()
            row = count(machine, case, number)
            write(path, row)
            label = f"{row.op} {row.case} R={number}"
            print(
                f"{label:34}{row.instructions_per_element:9.1f} i/{row.element[0]}{row.moved_per_element:8.2f} B"
                f"{row.moved_over_must_move:8.2f}{row.block_barriers:10d}   {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    print(f"written to {path}")
    return 0


def chosen(cases: Sequence) -> list:
    return [case for case in cases if case.name in CHOSEN.get(case.op, ())]


def write(path: Path, row: Counted) -> None:
    """Put a line into the file; it replaces the one of the same op, case and number of requests."""
    rows.replace(path, [row], ("op", "case", "requests"))
