"""The model's instructions per element beside those that the compiled kernels execute on the machine of tests/machine.

    modelled  of the hot loop, from SASS (bench/model/report.py)
    counted   (instructions of a launch - those of one of half the vocabulary or context) / (elements of both), from PTX

The difference of two launches leaves out what does not grow with the vocabulary. The two are not the same code: ptxas makes two
instructions of a 64-bit addition and one of several moves or logic operations. Where they are further apart than WITHIN, REASONS
says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.shared import counters, rows
from bench.shared.paths import RESULTS

if TYPE_CHECKING:  # at run time it would turn off the interpreter of a process that only reads the report
    from bench.model.ops import Kernel

FILE = RESULTS / "model" / "machine.csv"
WITHIN = 0.15
_RESIDUALS = "the residual sums of the second phase, whose rows depend on the drafts that are accepted, are counted, too"
_ADDRESSES = "64-bit addresses of rows of W2 are one instruction of PTX and two of SASS"
_SELECTION = "the search among the maxima of sub-blocks grows with the vocabulary, too"
REASONS: dict[tuple[str, str], str] = {
    ("accept_chain", "dense_r1"): _RESIDUALS,
    ("accept_chain", "dense_r64"): _RESIDUALS,
    ("draft_block", "greedy_r1"): _ADDRESSES,
    ("draft_block", "greedy_r8"): _ADDRESSES,
    ("draft_candidates", "c64_r1"): _SELECTION,
    ("draft_candidates", "c64_r8"): _SELECTION,
    ("draft_candidates", "c64_r64"): _SELECTION,
    ("draft_tree", "c64_r1"): _SELECTION,
}
_SIZES = ("vocab", "context")  # what the number of elements is a multiple of


@dataclasses.dataclass(frozen=True)
class Row:
    """whole: of the launch at full size, what does not grow included."""

    op: str
    case: str
    arch: str
    element: str
    modelled: float
    counted: float
    ratio: float
    whole: float
    triton: str

    @property
    def reason(self) -> str | None:
        """Why they are further apart than WITHIN; "" where they are not, None where none is named."""
        return "" if abs(self.ratio - 1) <= WITHIN else REASONS.get((self.op, self.case))


def compared(kernels: Sequence[Kernel], committed: Sequence[dict], arch: str) -> Iterator[Row]:
    """A row for each kernel that streams a vocabulary or a context. committed: rows of the model's report."""
    machine = counters.start_machine(arch)
    modelled = {(row["op"], row["case"]): float(row["per_element"]) for row in committed if row["arch"] == arch}
    for kernel in kernels:
        case, spec = kernel.case, kernel.case.spec
        size = next((name for name in _SIZES if hasattr(spec, name)), None)
        if size is None or (case.op, case.name) not in modelled:
            continue
        half = dataclasses.replace(case, spec=dataclasses.replace(spec, **{size: getattr(spec, size) // 2}))
        few, all_of_it = (counters.count(machine, each, spec.requests) for each in (half, case))
        per_element = (all_of_it.thread_instructions - few.thread_instructions) / (kernel.elements / 2)
        static = modelled[case.op, case.name]
        yield Row(
            case.op, case.name, arch, kernel.element, static, per_element, per_element / static,
            all_of_it.thread_instructions / kernel.elements, all_of_it.triton,
        )  # fmt: skip


def write(path: Path, done: Sequence[Row]) -> None:
    rows.replace(path, done, ("op", "case", "arch"))
