"""Launch configuration of the draft block on candidates."""

from __future__ import annotations

import dataclasses

from ..arch import Arch

MAX_CANDIDATES = 256
MAX_SUCCESSORS = 128  # successors per token in a bigram table
MAX_WIDTH = 512  # entries of a position, padded
MOST_SUB_BLOCKS = 8192  # sub-blocks of a row, all of which one program holds at once


@dataclasses.dataclass(frozen=True)
class CandidatesConfig:
    """block: ids of a chunk. group: ids of a sub-block. sub_blocks: of a row, and chosen: those that are read again, both padded.
    width: entries of a position, padded. block_r: ranks of W2 at a time. block_o: outputs of a latent at a time. block_j: inputs
    that one dot sums. drafts: positions, padded. max_registers: per thread, None = the compiler's choice.
    """

    block: int
    group: int
    sub_blocks: int
    chosen: int
    width: int
    block_r: int
    block_o: int
    block_j: int
    drafts: int
    num_warps: int
    num_stages: int
    max_registers: int | None


def padded(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def sub_block_ids(vocab: int, candidates: int) -> int:
    """Ids of a sub-block: a balance between sub-blocks to search (fewer if large) and logits to read again (candidates x this)."""
    group = 128 if candidates <= 32 else 64 if candidates <= 128 else 32
    while -(-vocab // group) > MOST_SUB_BLOCKS:
        group *= 2
    return group


def parts(arch: Arch, rows: int, chunks: int) -> int:
    """Programs per row of logits: a few programs for every multiprocessor, each with at least one chunk."""
    return max(1, min(chunks, arch.multiprocessors * 8 // rows))


def pick(
    arch: Arch, drafts: int, vocab: int, candidates: int, successors: int, rank: int, weights: str, outputs: int, settings: bool
) -> CandidatesConfig:
    """The configuration for the C best of `vocab` ids and `successors` more. Not measured on a GPU yet.

    weights: dtype of W2. outputs: rows of the weights of a gated or rnn head, else 0. settings: whether there are penalties, bias,
    mask, filters or an id map. Nothing here may depend on the batch, because these blocks decide the order of sums over ranks of
    W2.
    """
    width = max(16, padded(candidates + successors))
    padded_rank, padded_drafts = max(16, padded(rank)), padded(drafts)
    if arch.vendor == "interpreter":
        group = 16 if vocab <= 16 * MOST_SUB_BLOCKS else sub_block_ids(vocab, candidates)
        sub_blocks = max(64, padded(-(-vocab // group)))
        chosen = padded(min(candidates, sub_blocks))
        block = min(65536, max(group, padded(vocab)))
        return CandidatesConfig(block, group, sub_blocks, chosen, width, padded_rank, padded_rank, 4096, padded_drafts, 1, 1, None)
    group = sub_block_ids(vocab, candidates)
    sub_blocks = max(64, padded(-(-vocab // group)))
    chosen = padded(min(candidates, sub_blocks))
    # 8 warps of 32 lanes, 4 of 64: the same work per lane. With at most 128 registers two programs share a multiprocessor, so that
    # one reads logits while the other selects or walks; what needs more gets it (bench/compile).
    warps = 8 if arch.vendor == "nvidia" else 4
    block = 4096 if settings and (arch.vendor == "amd" or arch.family in ("sm_100", "sm_120")) else 8192
    plain, hopper = weights == "bfloat16", arch.family == "sm_90"
    narrow = (
        plain
        or (weights == "int8" and arch.family != "sm_120")
        or (weights == "float8_e4m3fn" and arch.family in ("sm_90", "sm_100"))
    )
    capped = arch.vendor == "nvidia" and not outputs and not settings and width <= 128 and narrow
    few = settings or width < 32 or (outputs and arch.family in ("sm_100", "sm_120")) or (capped and plain and hopper)
    most = 64 if few else 32 if capped else 128
    block_r = min(padded_rank, most, max(16, (8192 if plain else 2048) // width))
    if capped and plain and padded_rank * width <= 16384:
        block_r = padded_rank  # one dot, whose rows of W2 the compiler copies a position ahead
    block_o, block_j = (64, 128) if plain else (32, 32)
    registers = 128 if capped else 255 if arch.vendor == "nvidia" else None  # left to itself the compiler spills at 128
    return CandidatesConfig(block, group, sub_blocks, chosen, width, block_r, block_o, block_j, padded_drafts, warps, 2, registers)


def list_config(arch: Arch, config: CandidatesConfig, adjusted: bool, mapped: bool) -> CandidatesConfig:
    """For a rank's lists on vocabulary shards: smaller chunks where penalties and an id map both take registers, and a few registers
    more, with which rows of W2 are copied without a spill on sm_80."""
    if arch.vendor == "interpreter":
        return config
    registers = None if config.max_registers is None else max(168, config.max_registers)
    block = 2048 if arch.family == "sm_100" else 4096
    return dataclasses.replace(config, block=block if adjusted and mapped else config.block, max_registers=registers)


def merge_config(arch: Arch, config: CandidatesConfig) -> CandidatesConfig:
    """For the walk on shards: every register. With its own choice of 128 the compiler spills on sm_120. One stage on AMD, where filters
    and copies under way take more registers than there are."""
    if arch.vendor == "amd":
        return dataclasses.replace(config, num_stages=1)
    return dataclasses.replace(config, max_registers=255 if arch.vendor == "nvidia" else None)
