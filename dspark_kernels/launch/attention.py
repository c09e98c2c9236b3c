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


def head_tile(head_dim: int) -> int:
    """Head size as the kernel pads it."""
    return max(16, 1 << (head_dim - 1).bit_length())


def pick(arch: Arch, packed_rows: int | None, head_dim: int, element_size: int, kv_heads: int) -> AttentionConfig:
    """The configuration for requests of up to `packed_rows` packed rows; None = whatever comes, always the same tile.

    Not measured on a GPU yet. Parts of at least 256 keys: below that a part's partial result is no smaller than its keys.
    """
    head = head_tile(head_dim)
    largest = 64 if element_size <= 2 else 16
    wanted = largest if packed_rows is None else 1 << max(0, packed_rows - 1).bit_length()
    block_m = min(largest, max(16, wanted))
    native = arch.name in _NATIVE_FP8
    if arch.vendor == "interpreter":
        # Every operation costs the same whatever its size: large blocks, and no parts, of which each repeats all operations.
        block_m = 64 if packed_rows is None else min(256, max(16, wanted))
        return AttentionConfig(block_m, 128, 1, 1, 1, 1 << 20, 4, 16, native, None)
    invariant_parts = max(1, 128 // kv_heads)  # one long request fills a GPU of 132 multiprocessors
    block_n = 64 if head <= 128 else 32
    if element_size > 2:
        block_n = 32 if head <= 128 else 16
    warps = 4
    stage = 2 * block_n * head * element_size
    queries = block_m * head * element_size
    stages = max(1, min(3, (arch.shared_memory - queries) // stage))
    resident = max(1, min(2, arch.shared_memory // (stages * stage + queries)))
    return AttentionConfig(
        block_m, block_n, warps, stages, resident * arch.multiprocessors, 256 // block_n, 4, invariant_parts, native, None
    )


def pick_plan(arch: Arch, requests: int) -> PlanConfig:
    """The configuration of the work table's launch for `requests` requests. Not measured on a GPU yet."""
    if arch.vendor == "interpreter":
        return PlanConfig(4096, 1)
    return PlanConfig(128 if requests <= 512 else 256, 4 if requests <= 512 else 8)
