"""Launch configuration of draft trees by the probability of paths."""

from __future__ import annotations

import dataclasses

from ...kernels.sizes import TREE_MAX_GROUP, TREE_SUB_BLOCK, VOCAB_BLOCK
from ..arch import Arch

MAX_CANDIDATES = 256
MOST_SUB_BLOCKS = 8192  # sub-blocks of a row, all of which one program holds at once
MOST_GROUPS = 16384  # groups of a row, all of which one program holds at once


def padded(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class PathsConfig:
    """block: ids of a chunk. group: ids of a sub-block. sub_blocks: of a row, and chosen: those that are read again, both padded.
    width: candidates, padded, which are tested `piece` at a time. nodes: of a tree, padded. block_r: ranks of W2 at a time.
    block_o: outputs of a latent at a time. block_j: inputs that one dot sums. max_registers: per thread, None = the compiler's
    choice.
    """

    block: int
    group: int
    sub_blocks: int
    chosen: int
    width: int
    piece: int
    nodes: int
    block_r: int
    block_o: int
    block_j: int
    num_warps: int
    num_stages: int
    max_registers: int | None


def pick(arch: Arch, vocab: int, candidates: int, num_nodes: int, rank: int, weights: str, outputs: int, group: int) -> PathsConfig:
    """The configuration for the C best of `vocab` ids. Not measured on a GPU yet.

    weights: dtype of W2. outputs: rows of the weights of a gated or rnn head, else 0. group: ids of a sub-block. Nothing here may
    depend on the batch, because these blocks decide the order of sums over ranks of W2.
    """
    width, nodes = max(16, padded(candidates)), max(16, padded(num_nodes))
    rank = max(16, padded(rank))
    if arch.vendor == "interpreter":
        group = 16 if vocab <= 16 * MOST_SUB_BLOCKS else group
        sub_blocks = max(64, padded(-(-vocab // group)))
        block = min(65536, max(VOCAB_BLOCK, padded(vocab)))
        return PathsConfig(
            block, group, sub_blocks, padded(min(candidates, sub_blocks)), width, 256, nodes, rank, rank, 4096, 1, 1, None
        )
    sub_blocks = max(64, padded(-(-vocab // group)))
    warps = 8 if arch.vendor == "nvidia" else 4
    # Larger ones spill on sm_90 (bench/compile), with an rnn on sm_120.
    small = outputs > 0 or width > 128
    block, children = (4096, 1024) if small else (8192, 2048)
    piece = max(16, min(64, children // nodes))
    block_j = 64 if weights == "bfloat16" and outputs <= rank else 32
    return PathsConfig(
        block,
        group,
        sub_blocks,
        padded(min(candidates, sub_blocks)),
        width,
        piece,
        nodes,
        min(rank, 32),
        16 if arch.family == "sm_120" else 32,
        block_j,
        warps,
        1,
        # Left alone, the compiler spills a few to fit 128 on sm_90; told so, it spills a few of the small ones on sm_120.
        255 if arch.vendor == "nvidia" and not small else None,
    )


@dataclasses.dataclass(frozen=True)
class DensePathsConfig:
    """sub_blocks, groups: of a row; nodes: of a tree; children: of a node; all padded. piece: ids whose logits are computed again
    at a time. The rest as in PathsConfig.
    """

    sub_blocks: int
    groups: int
    nodes: int
    children: int
    piece: int
    block_r: int
    block_o: int
    block_j: int
    num_warps: int
    num_stages: int
    max_registers: int | None


def dense_parts(arch: Arch, requests: int, sub_blocks: int) -> int:
    """Programs per sweep of a request: two for every multiprocessor, each with at least one sub-block."""
    return max(1, min(sub_blocks, -(-arch.multiprocessors * 2 // requests)))


def pick_dense(arch: Arch, vocab: int, num_nodes: int, rank: int, weights: str, mixes: bool) -> DensePathsConfig:
    """The configuration for distributions over the whole vocabulary. Not measured on a GPU yet. Independent of the batch, as
    `pick`.

    mixes: the head is gated or rnn, whose latents spill with larger blocks on sm_100 and sm_120 (bench/compile).
    """
    sub_blocks, groups = max(16, padded(-(-vocab // TREE_SUB_BLOCK))), max(64, padded(-(-vocab // TREE_MAX_GROUP)))
    nodes, children, rank = max(16, padded(num_nodes)), max(16, padded(num_nodes - 1)), max(16, padded(rank))
    if arch.vendor == "interpreter":
        return DensePathsConfig(sub_blocks, groups, nodes, children, 2048, rank, rank, rank, 1, 1, None)
    plain = weights == "bfloat16" and not mixes
    block_r, block_o, block_j = (min(rank, 64), 32, 64) if plain else (min(rank, 32), 32, 32)
    warps = 8 if arch.vendor == "nvidia" else 4
    return DensePathsConfig(sub_blocks, groups, nodes, children, 128, block_r, block_o, block_j, warps, 2, None)
