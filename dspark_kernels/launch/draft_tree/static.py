"""Launch configuration of draft trees of a static shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ...kernels.sizes import DOT_ROWS, VOCAB_BLOCK
from ..arch import Arch


@dataclasses.dataclass(frozen=True)
class TreeDraftConfig:
    """block_v: ids at a time. pairs: rows whose blocks a program sums, and children that it draws, at once. rows: lists that are
    merged at once. max_registers: per thread, None = the compiler's choice. For gated and rnn heads, block_j: latents per program;
    block_n: precomputed products per program; block_s: inputs per dot of these.
    """

    block_v: int
    pairs: int
    rows: int
    block_j: int
    block_n: int
    block_s: int
    num_warps: int
    num_stages: int
    max_registers: int | None


def depths_of(branching: Sequence[int], drafts: int, nodes: int) -> list[tuple[int, int]]:
    """(largest number of nodes, children of each) for every depth whose nodes get children; at least one depth."""
    depths, width, total = [], 1, 1
    for wanted in branching[:drafts]:
        if total == nodes:
            break
        wanted = min(wanted, nodes - total)
        depths.append((width, wanted))
        width = min(width * wanted, nodes - total)
        total += width
    return depths or [(1, 1)]


def items_of(config: TreeDraftConfig, depths: Sequence[tuple[int, int]], requests: int, blocks: int, rank: int, parts: int) -> int:
    """Programs of a launch: those of the precomputed products of a head with `parts` of r outputs (0: there are none); then for
    every depth those of the latents of its rows, one per row and block, and one per request for its children.
    """
    precomputed = -(-parts * rank // config.block_n) * -(-requests * len(depths) // DOT_ROWS)
    per_group = blocks + (-(-rank // config.block_j) if parts else 0)
    return precomputed + sum(-(-requests * width // DOT_ROWS) * per_group + requests for width, _ in depths)


# Of W2 per dot, in 16 bits: more would take the registers of a second program on a multiprocessor (bench/compile).
RANKS = 64


def pick(arch: Arch, vocab: int, rank: int, wide: bool) -> TreeDraftConfig:
    """wide: a head whose products are of fp32. Not measured on a GPU yet.

    With 4 warps of 255 registers two programs share a multiprocessor, so that all items of a row of Qwen3's vocabulary run at once
    on an H100 or H200. With its own choice the compiler spills on some GPUs to make room for a third program, except where products
    are wide.
    """
    if arch.vendor == "interpreter":
        few = min(512, max(16, 1 << (rank - 1).bit_length()))
        return TreeDraftConfig(min(VOCAB_BLOCK, max(64, 1 << (vocab - 1).bit_length())), 16, 16, few, 4 * few, few, 1, 1, None)
    registers = 255 if arch.vendor == "nvidia" and not wide else None
    return TreeDraftConfig(64, 2, rows=4, block_j=16, block_n=64, block_s=32, num_warps=4, num_stages=2, max_registers=registers)
