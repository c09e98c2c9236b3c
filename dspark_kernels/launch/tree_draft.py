"""Launch configuration of draft trees of a static shape."""

from __future__ import annotations

import dataclasses

from .arch import Arch

LEAF = 1024  # ids per item, as in kernels/primitives/mass.py
ROWS_PER_ITEM = 16  # (request, node) pairs per item, as in kernels/heads.py


@dataclasses.dataclass(frozen=True)
class TreeDraftConfig:
    """block_v: ids at a time; pairs: rows whose leaves a program weighs, and children it draws, at once; rows: lists merged at
    once; max_registers: per thread, None = the compiler's choice."""

    block_v: int
    pairs: int
    rows: int
    num_warps: int
    num_stages: int
    max_registers: int | None


def depths_of(branching, drafts: int, nodes: int) -> list[tuple[int, int]]:
    """(nodes, children of each) of every depth whose nodes get children, at most; one depth at least."""
    depths, width, total = [], 1, 1
    for wanted in branching[:drafts]:
        if total == nodes:
            break
        wanted = min(wanted, nodes - total)
        depths.append((width, wanted))
        width = min(width * wanted, nodes - total)
        total += width
    return depths or [(1, 1)]


def items_of(depths, requests: int, leaves: int) -> int:
    """Programs of a launch: rows by leaves of every depth, and a request's children."""
    return sum(-(-requests * width // ROWS_PER_ITEM) * leaves + requests for width, _ in depths)


# Of W2 per dot, in 16 bits: more would take the registers of a second program on a multiprocessor (bench/compile.py).
RANKS = 64


def pick(arch: Arch, vocab: int) -> TreeDraftConfig:
    """Not measured on a GPU yet. With 4 warps two programs share a multiprocessor, so that all items of a row of Qwen3's length run
    at once on an H100 or H200."""
    if arch.vendor == "interpreter":
        return TreeDraftConfig(min(LEAF, max(64, 1 << (vocab - 1).bit_length())), 16, 16, 1, 1, None)
    return TreeDraftConfig(block_v=64, pairs=2, rows=4, num_warps=4, num_stages=2, max_registers=None)
