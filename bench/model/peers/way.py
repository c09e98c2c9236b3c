"""The way of a program through a peer's kernel: which arm it takes at every branch, and which of its loops stream.

bench/model/hot.py counts what every way meets, since our kernels have no arm per kind of request. Peers' have: the noise of a
sampled request stands behind a branch on its temperature, and a program of a row that needs nothing leaves at once. So a step says
whether its requests sample, of which the way is the longest through the kernel, or are greedy, of which it is the shortest that
loads its tile, and in a kernel that streams nothing the one that loads most. Loops count as one turn when ways are compared; one
inside another is met once. What streams is loaded by the widest loads with which any way comes to the bytes of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from bench.model.flow import Flow, Loop
from bench.model.hot import WIDTHS, Hot
from bench.model.sass import Instruction

_L2 = 17  # bytes of a lane's load, more than any has: nothing streams, and what is loaded was written just before


class Body(NamedTuple):
    """A turn of a loop on the way."""

    turn: list[Instruction]


class Way(NamedTuple):
    """straight: instructions outside of loops, those before the first loop and after it. wide: bytes from which on a lane's load
    streams."""

    straight: list[Instruction]
    loops: list[Body]
    wide: int


class _Part(NamedTuple):
    """Of a way, from a block on: instructions, and the blocks and loops that it passes, as a chain."""

    count: int
    item: object
    rest: object


def choose(flow: Flow, enough: int, longest: bool) -> Way:
    """enough: bytes of its tile that a lane loads; 0 = the kernel streams nothing."""
    outer = [loop for loop in flow.loops if not any(loop.blocks < other.blocks for other in flow.loops)]
    for wide in WIDTHS if enough else (1,):
        ways = _ways(flow, 0, frozenset(range(flow.end)), outer, lambda block: block == flow.end, longest, wide)
        there = [loaded for loaded in ways if loaded >= enough]
        if there:
            break
    else:
        raise ValueError(f"no way through the kernel loads the {enough} bytes of a lane's tile")
    if not enough and not longest:
        there = [max(there)]
    straight, loops = [], []
    for item in _items(_best([ways[loaded] for loaded in there], longest)):
        if isinstance(item, Body):
            loops.append(item)
        else:
            straight += flow.blocks[item]
    return Way(straight, loops, wide if enough else _L2)


def _best(parts: list[_Part], longest: bool) -> _Part:
    return (max if longest else min)(parts, key=lambda part: part.count)


def _items(part: _Part | None):
    while part is not None:
        if part.item is not None:
            yield part.item
        part = part.rest


def _ways(flow: Flow, start: int, blocks: frozenset[int], loops: list[Loop], done: Callable[[int], bool], longest: bool, wide: int):
    """Bytes loaded -> the best way that loads so many, by loads at least `wide`, from `start` until `done`, through `blocks`; each
    of `loops` is passed once."""
    head = {block: loop for loop in loops for block in loop.blocks}
    open_ = set()  # without loops the graph has no circle, unless one is entered at two places

    @functools.cache
    def body(loop: Loop) -> dict[int, Body]:
        inner = [other for other in flow.loops if other.blocks < loop.blocks]
        outer = [other for other in inner if not any(other.blocks < third.blocks for third in inner)]
        ways = _ways(flow, loop.head, loop.blocks, outer, lambda block: block == loop.head, longest, wide)
        return {loaded: Body(_flat(flow, part)) for loaded, part in ways.items()}

    @functools.cache
    def ways_from(block: int, first: bool = False) -> dict[int, _Part]:
        if done(block) and not first:
            return {0: _Part(0, None, None)}
        if block not in blocks or block in open_:
            return {}
        loop = head.get(block)
        after = flow.after[block] if loop is None else sorted({o for b in loop.blocks for o in flow.after[b]} - loop.blocks)
        mine = {_streamed(flow.blocks[block], wide): block} if loop is None else body(loop)
        open_.add(block)
        found: dict[int, list[_Part]] = {}
        for following in after:
            for loaded, rest in ways_from(following).items():
                for here, item in mine.items():
                    count = len(item.turn) if isinstance(item, Body) else len(flow.blocks[item])
                    found.setdefault(here + loaded, []).append(_Part(count + rest.count, item, rest))
        open_.discard(block)
        return {loaded: _best(parts, longest) for loaded, parts in found.items()}

    return ways_from(start, True)


def _flat(flow: Flow, part: _Part) -> list[Instruction]:
    """Instructions of a turn; of a loop inside, one turn."""
    found = []
    for item in _items(part):
        found += item.turn if isinstance(item, Body) else flow.blocks[item]
    return found


def hot_of(way: Way, enough: int, walks: int) -> Hot:
    """The hot part. Loops that load `enough` stream, and a tile passes through all of them, one after another; others turn `walks`
    times, once per draft. enough: as of the way."""
    streaming = [loop for loop in way.loops if not enough or _streamed(loop.turn, way.wide) >= enough]
    straight = way.straight + [i for loop in way.loops if loop not in streaming for i in loop.turn * walks]
    turn = [i for loop in streaming for i in loop.turn]
    how, turn = ("loop", turn) if streaming else ("pass", straight)
    whole = straight + turn if streaming else straight
    return Hot(how=how, turn=turn, whole=whole, of_one=frozenset(), others=0, wide=way.wide)


def _streamed(instructions: list[Instruction], wide: int) -> int:
    """Bytes of a lane's loads that are at least `wide`."""
    return sum(i.loaded for i in instructions if i.loaded >= wide)
