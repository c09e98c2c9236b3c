"""How many programs of a kernel a multiprocessor holds at once."""

from __future__ import annotations

from dspark_kernels.launch.arch import Arch

# Warps and programs at most: CUDA programming guide, technical specifications per compute capability.
_LIMITS = {"sm_80": (64, 32), "sm_86": (48, 16), "sm_89": (48, 24), "sm_90": (64, 32), "sm_100": (64, 32), "sm_120": (48, 24)}
_REGISTERS = 65536  # of an NVIDIA multiprocessor; a thread gets them by eights
_RESERVED = 1024  # bytes of shared memory that each program takes beside its own


def resident(arch: Arch, registers: int, warps: int, shared: int) -> int:
    """registers: per thread. shared: bytes of a program. warps: of 32 lanes, on AMD of 64."""
    if arch.vendor == "amd":
        by_registers = 4 * min(8, 512 // max(1, registers)) // warps  # four units of 512 registers a lane
        return min(by_registers, arch.shared_memory // shared if shared else by_registers, 16)
    most_warps, most_programs = _LIMITS[arch.family]
    by_registers = _REGISTERS // (32 * warps * -(-max(1, registers) // 8) * 8)
    by_shared = (arch.shared_memory + _RESERVED) // (shared + _RESERVED)
    return min(by_registers, by_shared, most_warps // warps, most_programs)
