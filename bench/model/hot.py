"""The hot part of a kernel: the loop that streams, or where nothing loops, one pass of a program.

The rule. A candidate is a block with loads that are at least as wide as the kernel's widest (narrower ones are tried where these give
none), whose part, a turn of its innermost loop, or without a loop a pass of the program, asks for at least the bytes of a tile. The hot
one is that which runs most often, if every branch on the way to a block is taken half of the time and every loop around it turns three
times: a loop counts for more than the condition that guards it, and for less than two. Of equals it is the one that loads most, then the
first. In a turn and in a pass, blocks count that every way through them meets; what else the loop holds is counted apart. A block with
an atomic or a fence that is skipped by a branch of its own is one that a single thread takes while its program waits: it counts as time,
and not as instructions of every lane.
"""

from __future__ import annotations

import collections
from typing import NamedTuple

from bench.model.flow import Flow
from bench.model.sass import CLASSES, Instruction

WIDTHS = (16, 8, 4, 2)  # bytes of a lane's load
_TURNS = 3


class Hot(NamedTuple):
    """turn: instructions of a turn of the loop, or of the pass. whole: those of the program that makes one turn, from start to end.
    of_one: addresses of what a single thread does. others: instructions of the loop that not every turn meets. wide: bytes from which
    on a lane's load streams."""

    how: str
    turn: list[Instruction]
    whole: list[Instruction]
    of_one: frozenset[int]
    others: int
    wide: int

    @property
    def loops(self) -> bool:
        return self.how == "loop"

    @property
    def counted(self) -> list[Instruction]:
        """Instructions of a turn that every lane executes."""
        return [i for i in self.turn if i.address not in self.of_one]

    def classes(self) -> dict[str, int]:
        """How many of each class."""
        found = collections.Counter(i.kind for i in self.counted)
        return {kind: found[kind] for kind in CLASSES}

    @property
    def barriers(self) -> int:
        return sum(i.name == "BAR" for i in self.counted)

    @property
    def moved(self) -> int:
        """Bytes that a lane loads and stores in a turn."""
        return sum(i.loaded + i.stored for i in self.counted)

    @property
    def streamed(self) -> int:
        """Bytes of its wide loads alone."""
        return sum(i.loaded for i in self.counted if i.loaded >= self.wide)


def find(flow: Flow, lanes: int, tile_bytes: int) -> Hot:
    """lanes: threads of a program. tile_bytes: what a turn asks for at least, all lanes together.

    Where no block asks for so much, the pass of every program that meets no condition: a kernel that streams nothing.
    """
    for wide in WIDTHS:
        candidates = []
        for block in range(flow.end):
            here = sum(i.loaded for i in flow.blocks[block] if i.loaded >= wide)
            if here:
                hot = _part(flow, block, wide)
                if hot.streamed * lanes >= tile_bytes:
                    candidates.append((_executions(flow, block), here, -block, hot))
        if candidates:
            return max(candidates, key=lambda found: found[:3])[3]
    return _part(flow, 0, WIDTHS[0])


def _executions(flow: Flow, block: int) -> float:
    depth = sum(block in loop.blocks for loop in flow.loops)
    return _TURNS**depth / 2 ** flow.conditions(block)


def _part(flow: Flow, block: int, wide: int) -> Hot:
    every = flow.of_a_pass(block)
    alone = _of_one(flow, every)
    loop = flow.innermost(block)
    if loop is None:
        whole = _in_order(flow, every, block, alone)
        return Hot("pass", whole, whole, _addresses(flow, alone), 0, wide)
    turn = flow.of_a_turn(loop)
    inside = _of_one(flow, turn) & loop.blocks
    others = sum(len(flow.blocks[b]) for b in loop.blocks - turn - inside)
    whole = _in_order(flow, every, block, alone)
    return Hot("loop", _in_order(flow, turn, max(loop.latches), inside), whole, _addresses(flow, alone | inside), others, wide)


def _of_one(flow: Flow, part: frozenset[int]) -> frozenset[int]:
    """Blocks outside of a part that lead from it back into it, with an atomic or a fence."""
    return frozenset(
        block
        for block in range(flow.end)
        if block not in part
        and {*flow.before[block], *flow.after[block]} <= part
        and any(i.kind == "atomic" for i in flow.blocks[block])
    )


def _addresses(flow: Flow, blocks) -> frozenset[int]:
    return frozenset(i.address for block in blocks for i in flow.blocks[block])


def _in_order(flow: Flow, part, through: int, alone) -> list[Instruction]:
    """Instructions of blocks that dominate `through` or post-dominate it, in the order of execution, those of `alone` between them."""

    def place(block):
        before = block in flow.dominators[through]
        return (0, len(flow.dominators[block])) if before else (1, -len(flow.post_dominators[block]))

    order = sorted(part, key=place)
    for block in sorted(alone):
        order.insert(order.index(flow.before[block][0]) + 1, block)
    return [i for block in order for i in flow.blocks[block]]
