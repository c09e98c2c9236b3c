"""How long a warp takes for a row of instructions: they issue in order, and each waits for its operands.

A load keeps nobody waiting until its value is used, so what is asked for early enough costs nothing. The warps of a program share
four schedulers and go side by side; what other programs do on the same multiprocessor is not here (bench/model/estimate.py bounds
it by the issue slots). Wide loads come from DRAM, others from the L2 cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.model import constants
from bench.model.sass import Instruction

_REGISTER = re.compile(r"\b(U?[RP])(\d+)\b")
_TURNS = 4  # from then on a loop's turns take the same time
_LATENCY = {
    "fp": constants.ARITHMETIC, "integer": constants.ARITHMETIC, "special": constants.SPECIAL, "shared": constants.SHARED,
    "exchange": constants.EXCHANGE, "tensor": constants.TENSOR,
}  # fmt: skip
_SILENT = ("global", "shared", "barrier", "atomic", "control")  # of these, only what is named below has a result
_WITH_RESULT = ("LDG", "LD", "LDL", "LDS", "LDSM", "ATOM", "ATOMG", "ATOMS")


def microseconds(instructions: Sequence[Instruction], level: int, warps: int, clock: float, wide: int) -> float:
    """Until the last one has issued. wide: bytes per lane from which on a load is one of DRAM. clock: GHz."""
    return _Warp(level, warps, clock, wide).run(instructions)


def of_a_turn(instructions: Sequence[Instruction], level: int, warps: int, clock: float, wide: int) -> float:
    """Of a loop that goes on: what it asks for in one turn may be used in a later one."""
    warp = _Warp(level, warps, clock, wide)
    ends = [warp.run(instructions) for _ in range(2 * _TURNS)]
    return (ends[-1] - ends[_TURNS - 1]) / _TURNS


class _Warp:
    def __init__(self, level: int, warps: int, clock: float, wide: int):
        self.cycle = 1e-3 / clock
        self.slot = max(1.0, warps / 4) * self.cycle
        self.level, self.wide = level, wide
        self.now = 0.0
        self.ready: dict[str, float] = {}
        self.copies = self.products = 0.0  # when the last one asked for is there
        self.groups: list[float] = []

    def run(self, instructions: Sequence[Instruction]) -> float:
        for instruction in instructions:
            self.step(instruction)
        return self.now

    def step(self, i: Instruction) -> None:
        results, sources = registers(i)
        self.now = max([self.now + self.slot, *(self.ready.get(name, 0.0) for name in sources)])
        if i.name == "BAR":
            self.now += constants.BARRIER[self.level]
        elif i.name == "MEMBAR" and "CTA" not in i.opcode:
            self.now += constants.FENCE[self.level]
        elif i.name == "LDGSTS":
            self.copies = max(self.copies, self.now + constants.DRAM[self.level])
        elif i.name == "LDGDEPBAR":
            self.groups.append(self.copies)
        elif i.name == "DEPBAR":
            open_groups = int(i.operands.rsplit(",", 1)[-1], 16)
            done = self.groups[: len(self.groups) - open_groups]
            self.now = max([self.now, *done[-1:]])
        elif i.opcode.startswith("WARPGROUP.DEPBAR"):
            self.now = max(self.now, self.products)
        elif i.name == "HGMMA":
            self.products = max(self.products, self.now + self.latency(i))
            return  # its registers may be read only after the wait
        for name in results:
            self.ready[name] = self.now + self.latency(i)

    def latency(self, i: Instruction) -> float:
        if i.loaded:
            return (constants.DRAM if i.loaded >= self.wide else constants.L2)[self.level]
        if i.kind == "atomic":
            return constants.ATOMIC[self.level]
        return _LATENCY.get(i.kind, constants.ARITHMETIC)[self.level] * self.cycle


def registers(i: Instruction) -> tuple[list[str], list[str]]:
    """(registers written, registers read); of a wide result all its registers."""
    operands = [part.strip() for part in i.operands.split(",")]
    count = 0
    if i.kind not in _SILENT or i.name in _WITH_RESULT:
        # A predicate in front of the result is a result too, and so are those right behind it: carries.
        first = 1 + (operands[0].lstrip("!").startswith(("P", "UP")) and len(operands) > 1)
        behind = (n for n, part in enumerate(operands[first:]) if not re.fullmatch(r"U?P(\d|T)", part))
        count = first + next(behind, 0)
    written = []
    for part in operands[:count]:
        for bank, number in _REGISTER.findall(part):
            written += [f"{bank}{int(number) + n}" for n in range(_width(i) if bank in ("R", "UR") else 1)]
    read = ["".join(found) for part in [i.predicate, *operands[count:]] for found in _REGISTER.findall(part)]
    return written, read


def _width(i: Instruction) -> int:
    """Registers of a result."""
    if i.loaded:
        return -(-i.loaded // 4)
    if i.name in ("HMMA", "IMMA", "LDSM"):
        return 4
    wide = {"128": 4, "64": 2, "WIDE": 2}
    return next((wide[part] for part in i.opcode.split(".") if part in wide), 1)
