"""The hot part of a kernel: the loop that streams, or where nothing loops, one pass of a program.

The rule. A candidate is a block with loads that are at least as wide as the kernel's widest (narrower ones are tried where these
give none), whose part, a turn of its innermost loop, or without a loop a pass of the program, asks for at least the bytes of a
tile. The hot one is that which runs most often, if every branch on the way to a block is taken half of the time and every loop
around it turns eight times: a loop counts for as much as three conditions that guard it, which a pipelined one has beside its
prologue. Of equals it is the one that loads most, then the first. In a turn and in a pass, blocks count that every way through them
meets; what else the loop holds is counted apart. A block with an atomic or a fence that is skipped by a branch of its own is one
that a single thread takes while its program waits: it counts as time, and not as instructions of every lane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench.model.flow import Flow
from bench.model.sass import CLASSES, Instruction

WIDTHS = (16, 8, 4, 2)  # bytes of a lane's load
_TURNS = 8


class Hot(NamedTuple):
    """turn: instructions of a turn of the loop, or of the pass. whole: of a program that makes one turn, from start to end. of_one:
    addresses of what a single thread does. others: instructions of the loop that not every turn meets, without those of loops
    inside. wide: bytes from which on a lane's load streams."""

    how: str
    turn: list[Instruction]
    whole: list[Instruction]
    of_one: frozenset[int]
    others: int
    wide: int

    @property
    def loops(self) -> bool:
        return self.how == "loop"

    def per_turn(self, count: Callable[[Instruction], float]) -> float:
        """The sum of count(instruction) over what every lane executes in a turn."""
        return sum(count(i) for i in self.turn if i.address not in self.of_one)

    def classes(self) -> dict[str, float]:
        """Instructions of a turn by class."""
        return {kind: self.per_turn(lambda i, kind=kind: i.kind == kind) for kind in CLASSES}

    @property
    def instructions(self) -> float:
        return self.per_turn(lambda i: 1)

    @property
    def barriers(self) -> float:
        return self.per_turn(lambda i: i.name == "BAR")

    @property
    def moved(self) -> float:
        """Bytes that a lane loads and stores."""
        return self.per_turn(lambda i: i.loaded + i.stored)

    @property
    def streamed(self) -> float:
        """Bytes of its wide loads alone."""
        return self.per_turn(lambda i: i.loaded * (i.loaded >= self.wide))


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
                if hot.per_turn(lambda i: i.loaded) * lanes >= tile_bytes:
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
    whole = _in_order(flow, every, block, alone)
    if loop is None:
        return Hot("pass", whole, whole, _addresses(flow, alone), 0, wide)
    turn = flow.of_a_turn(loop)
    inside = _of_one(flow, turn) & loop.blocks
    below = frozenset().union(*(other.blocks for other in flow.loops if other.blocks < loop.blocks))
    others = sum(len(flow.blocks[b]) for b in loop.blocks - turn - inside - below)
    of_one = _addresses(flow, alone | inside)
    return Hot("loop", _in_order(flow, turn, max(loop.latches), inside), whole, of_one, others, wide)


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
    """Instructions of blocks that dominate `through` or post-dominate it, in the order of execution, those of `alone` between
    them."""

    def place(block):
        before = block in flow.dominators[through]
        return (0, len(flow.dominators[block])) if before else (1, -len(flow.post_dominators[block]))

    order = sorted(part, key=place)
    for block in sorted(alone):
        order.insert(order.index(flow.before[block][0]) + 1, block)
    return [i for block in order for i in flow.blocks[block]]
