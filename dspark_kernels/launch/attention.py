"""Launch configuration of the attention of packed rows, and how its keys are shared out over programs."""

from __future__ import annotations

import dataclasses

from .arch import Arch


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """block_m: packed rows (forward row x group head) per tile; block_n: keys per block. programs: how many share the work.

    min_blocks: blocks of keys that a part has at least. finer: a part may be that many times shorter than an even share of
    all work. invariant_parts: parts of a context at most, where only its own length may decide. native_fp8: the GPU casts e4m3.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    own_block: int  # own rows per block
    own_stages: int  # in the loop over own rows, which rarely has two blocks: loads are asynchronous from 2 on
    programs: int
    min_blocks: int
    finer: int
    invariant_parts: int
    native_fp8: bool
    max_registers: int | None


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """block: items per program."""

    block: int
    num_warps: int


_NATIVE_FP8 = ("sm_89", "sm_90", "sm_100", "sm_120", "gfx950", "interpreter")
# Where the compiler leaves fewer registers than these tiles need: smaller blocks, so that nothing spills (bench/compile.py).
_FEW_REGISTERS = ("sm_100", "sm_120", "gfx942", "gfx950")


def head_tile(head_dim: int) -> int:
    """Head size as the kernel pads it."""
    return max(16, 1 << (head_dim - 1).bit_length())


def pick(
    arch: Arch, packed_rows: int | None, head_dim: int, element_size: int, cached_size: int, kv_heads: int
) -> AttentionConfig:
    """The configuration for requests of up to `packed_rows` packed rows; None = whatever comes, always the same tile.

    Not measured on a GPU yet. Parts of at least 256 keys: below that a part's partial result is no smaller than its keys.
    """
    head = head_tile(head_dim)
    largest = 16 if element_size > 2 else 32 if arch.family == "gfx942" else 64
    wanted = largest if packed_rows is None else 1 << max(0, packed_rows - 1).bit_length()
    block_m = min(largest, max(16, wanted))
    native = arch.family in _NATIVE_FP8
    if arch.vendor == "interpreter":
        # Every operation costs the same whatever its size: large blocks, and no parts, of which each repeats all operations.
        block_m = 64 if packed_rows is None else min(256, max(16, wanted))
        return AttentionConfig(block_m, 128, 1, 1, 64, 1, 1, 1 << 20, 4, 16, native, None)
    invariant_parts = max(1, 128 // kv_heads)  # one long request fills a GPU of 132 multiprocessors
    block_n = 32 if head > 128 or (head <= 64 and arch.family == "sm_120") else 64
    if element_size > 2:
        block_n = 16
    # Every thread of 8 warps may have all registers there are, where only one program is resident.
    warps = 8 if block_m == 64 or element_size > 2 or cached_size == 1 or head > 128 else 4
    most_stages = 1 if arch.vendor == "amd" else 2 if arch.family == "sm_120" else 3
    stage = 2 * block_n * head * element_size
    queries = block_m * head * element_size
    stages = max(1, min(most_stages, (arch.shared_memory - queries) // stage))
    resident = 2 if warps == 4 and 2 * (stages * stage + queries) <= arch.shared_memory else 1
    return AttentionConfig(
        block_m=block_m,
        block_n=block_n,
        num_warps=warps,
        num_stages=stages,
        own_block=min(16 if arch.family in _FEW_REGISTERS else 32, block_n),
        own_stages=1 if arch.family == "sm_100" and element_size <= 2 else min(2, stages),
        programs=resident * arch.multiprocessors,
        min_blocks=256 // block_n,
        finer=4,
        invariant_parts=invariant_parts,
        native_fp8=native,
        max_registers=255 if arch.vendor == "nvidia" else None,
    )


def pick_plan(arch: Arch, requests: int) -> PlanConfig:
    """The configuration of the work table's launch for `requests` requests. Not measured on a GPU yet."""
    if arch.vendor == "interpreter":
        return PlanConfig(4096, 1)
    return PlanConfig(128 if requests <= 512 else 512, 4 if requests <= 512 else 16)
