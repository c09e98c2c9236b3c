"""Launch configuration of the attention of packed rows, and how its keys are shared out over programs."""

from __future__ import annotations

import dataclasses

from .arch import Arch
from .table import find


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """block_m: packed rows (forward row x group head) per tile. block_n: keys per block. programs: number of programs.

    min_blocks: fewest blocks of keys in a part. finer: how many times shorter than an even share of all work a part may be.
    invariant_parts: largest number of parts of a context under batch_invariant. native_fp8: whether the GPU casts e4m3.
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
    pages_ahead: bool  # a block's pages are loaded with the block before
    max_registers: int | None


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """block: items per program."""

    block: int
    num_warps: int


ANY_ROWS = 1 << 30
_NATIVE_FP8 = ("sm_89", "sm_90", "sm_100", "sm_120", "gfx950", "interpreter")


def head_tile(head_dim: int) -> int:
    """Head size as the kernel pads it."""
    return max(16, 1 << (head_dim - 1).bit_length())


def pick(arch: Arch, packed_rows: int | None, head_dim: int, element_size: int, cached_size: int, kv_heads: int) -> AttentionConfig:
    """The configuration for requests of up to `packed_rows` packed rows; None = unknown, and then the largest tile.

    A part has at least 256 keys: the partial result of a shorter part is as large as its keys.
    """
    native = arch.family in _NATIVE_FP8
    if arch.vendor == "interpreter":
        # Every operation costs the same whatever its size: large blocks, and no parts, of which each repeats all operations.
        block_m = 64 if packed_rows is None else min(256, max(16, 1 << max(0, packed_rows - 1).bit_length()))
        return AttentionConfig(block_m, 128, 1, 1, 64, 1, 1, 1 << 20, 4, 16, native, True, None)
    kind = f"{8 * element_size}-bit queries, {8 * cached_size}-bit keys"
    rows = ANY_ROWS if packed_rows is None else packed_rows
    # Nothing but the tile and head size decides, or the plan's tile would not be found again (and a tile always finds itself).
    entry = find(arch, "attention", kind=kind, block_m=rows, head=head_tile(head_dim))
    tuned = dict(entry.config)
    return AttentionConfig(
        block_m=entry.shape["block_m"],
        programs=tuned.pop("resident") * arch.multiprocessors,
        min_blocks=256 // tuned["block_n"],
        finer=4,
        invariant_parts=max(1, 128 // kv_heads),  # one long request fills a GPU of 132 multiprocessors
        native_fp8=native,
        # Three stages are two blocks on their way, if no load of pages stands between; tiles of 64 rows have no registers for it.
        pages_ahead=tuned["num_stages"] > 2 and entry.shape["block_m"] < 64,
        **tuned,
    )


def pick_plan(arch: Arch, requests: int) -> PlanConfig:
    """The configuration of the work table's launch for `requests` requests."""
    if arch.vendor == "interpreter":
        return PlanConfig(4096, 1)
    return PlanConfig(**find(arch, "plan", requests=requests).config)
