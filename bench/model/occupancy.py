"""How many programs of a kernel a multiprocessor holds at once."""

from __future__ import annotations

from bench.model.constants import Machine

_REGISTERS = 256  # a warp's registers are given in multiples of this


def resident(machine: Machine, registers: int, warps: int, shared: int) -> int:
    """registers: per thread. shared: bytes of a program."""
    per_warp = -(-registers * 32 // _REGISTERS) * _REGISTERS
    by_registers = machine.registers // per_warp // warps
    by_shared = machine.shared // (shared + machine.reserved)
    return min(by_registers, by_shared, machine.warps // warps, machine.programs)
