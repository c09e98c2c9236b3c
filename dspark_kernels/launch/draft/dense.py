"""Launch configuration of the dense draft block."""

from __future__ import annotations

import dataclasses

from ..arch import Arch
from ..table import find


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """block_v: ids per tile (a multiple of 64); block_r: ranks per dot; programs_per_sm: resident programs; max_registers: per
    thread, None = the compiler's choice; one_launch: all phases in one cooperative launch, else a launch for each.

    Of gated and rnn heads: block_j: latents per program, block_n: precomputed products per program, block_s: inputs per dot of
    these and of the state.
    """

    block_v: int
    block_r: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    max_registers: int | None
    one_launch: bool
    block_j: int
    block_n: int
    block_s: int
    native_fp8: bool


# A grid barrier costs about 7 us on MI300X (published), more than a launch of a captured graph: there every phase is a launch.
_STEPPED = ("gfx942", "gfx950")
_NATIVE_FP8 = ("sm_89", "sm_90", "sm_100", "sm_120", "gfx950", "interpreter")


MOST_OF_A_SHARD = 16  # requests a turn: what a shard looks at besides takes the registers of more


def most_requests(arch: Arch, settings: bool, narrow: bool) -> int:
    """How many requests a turn may take. settings: penalties, bias, mask or filters. narrow: a product with W2 that needs registers
    of its own, over ranks in a loop or from fp8 by bits.

    More than 16 leave AMD's matrix instructions of 16 x 16 for others, whose sums are others. 64 need shared memory for as many
    latents beside the tiles of W2. The rest is what compiles without spills (bench/compile).
    """
    if settings:
        return 8
    if arch.vendor == "amd":
        return 16
    return 64 if arch.shared_memory >= 160 * 1024 and not narrow else 32


def request_tile(requests: int, most: int) -> int:
    """Requests a turn: what a program computes at once from one tile of W2. 4 would do for 3 and 4, but there the compiler runs out
    of registers."""
    return next(tile for tile in (1, 2, 8, 16, 32, 64) if tile >= min(requests, most))


def is_one_tile(requests: int) -> bool:
    """Whether a batch is one tile of requests, small enough for programs of few warps, two on a multiprocessor; a tile of 16 or
    more needs the registers of more."""
    return requests <= 8


def ranks_per_dot(arch: Arch, rank: int, mixed: bool, widened: bool, adjusted: bool, filtered: bool = False) -> int:
    """Of W2 in 16 bits: all of them where 256 are enough, so that a tile of W2 is one asynchronous copy. Beyond, and on AMD, fewer
    where registers are needed for the latents of a gated or rnn head, to widen a quantised W2, or for penalties, bias and mask,
    whose loops keep W2 from being copied ahead at any rank; on sm_100 for filters (bench/compile: no spills)."""
    amd = arch.vendor == "amd"
    if adjusted or (mixed and (rank > 256 or amd)) or (widened and amd):
        return 64
    return 128 if rank > 256 or (filtered and arch.family == "sm_100") else 256


def rank_block(arch: Arch, rank: int, element_size: int, ranks: int) -> int:
    """Ranks per dot: what the bits of a projection depend on, so acceptance takes the same to rebuild them."""
    padded_rank = max(16, 1 << max(0, rank - 1).bit_length())
    return padded_rank if arch.vendor == "interpreter" else min(padded_rank, ranks if element_size <= 2 else 32)


def pick(arch: Arch, vocab: int, rank: int, element_size: int, one_tile: bool, ranks: int = 256) -> DraftConfig:
    """The configuration for W2 of [vocab, rank] whose products take `element_size` bytes an operand.

    one_tile: from `is_one_tile`. ranks: from `ranks_per_dot`.
    """
    block_r = rank_block(arch, rank, element_size, ranks)
    native = arch.family in _NATIVE_FP8
    if arch.vendor == "interpreter":
        # One program walks everything: large tiles, because every operation costs the same whatever its size.
        # No block may have more than 2^20 elements.
        block_v = min(4096, 2**20 // block_r, max(64, 1 << (vocab - 1).bit_length()))
        few = min(512, block_r)
        return DraftConfig(block_v, block_r, 1, 1, 1, None, True, few, 4 * few, few, native)
    tuned = find(arch, "draft", operands=f"{8 * element_size} bit", one_tile=one_tile).config
    return DraftConfig(
        # In no table: the bits of a projection depend on these two, and must not depend on the batch.
        block_r=block_r,
        block_s=32,
        one_launch=arch.cooperative and arch.family not in _STEPPED,
        native_fp8=native,
        **tuned,
    )


def beside_filters(arch: Arch, config: DraftConfig) -> DraftConfig:
    """`config` for a block with filters, whose search leaves no registers for a pipeline on sm_100."""
    return dataclasses.replace(config, num_stages=1) if arch.family == "sm_100" else config


def decode_fp8(config: DraftConfig, one_tile: bool) -> tuple[str, DraftConfig]:
    """(how W2 in fp8 is widened, the configuration for it): decoding by bits takes the registers of a third stage (sm_80)."""
    if config.native_fp8:
        return "fp8_by_cast", config
    return "fp8_by_bits", config if one_tile else dataclasses.replace(config, num_stages=min(config.num_stages, 2))
