"""Flow of control: basic blocks, which of them every way passes through, loops.

A block dominates another if every way from the start to the other passes through it; it post-dominates another if every way from
the other to the end does. A loop is the target of a branch that it dominates, and all blocks from which that branch is reached
without passing the target again.
"""

from __future__ import annotations

import dataclasses
import functools

from bench.model.sass import Instruction

_ENDS = ("BRA", "CALL", "EXIT", "RET", "BSYNC")


@dataclasses.dataclass(frozen=True)
class Loop:
    """head: the block that every turn begins with. latches: blocks that go back to it. blocks: all of a turn."""

    head: int
    latches: frozenset[int]
    blocks: frozenset[int]


class Flow:
    """Blocks of a function that can be reached, numbered by address; the last number, without instructions, is its end."""

    def __init__(self, instructions: list[Instruction]):
        starts = {instructions[0].address}
        for this, after in zip(instructions, [*instructions[1:], None], strict=True):
            if this.target is not None:
                starts.add(this.target)
            if this.name in _ENDS and after is not None:
                starts.add(after.address)
        blocks: list[list[Instruction]] = []
        for instruction in instructions:
            if instruction.address in starts:
                blocks.append([])
            blocks[-1].append(instruction)
        number = {block[0].address: i for i, block in enumerate(blocks)}
        end = len(blocks)
        out = [_successors(i, block[-1], number, end, instructions) for i, block in enumerate(blocks)]
        seen, todo = {0, end}, [0]
        while todo:
            fresh = set(out[todo.pop()]) - seen
            seen |= fresh
            todo += sorted(fresh - {end})
        kept = sorted(seen)
        again = {old: new for new, old in enumerate(kept)}
        self.blocks = [*(blocks[old] for old in kept[:-1]), []]
        self.end = len(kept) - 1
        self.after = [[again[old] for old in out[i]] for i in kept[:-1]] + [[]]
        self.before: list[list[int]] = [[] for _ in kept]
        for block, following in enumerate(self.after):
            for other in following:
                self.before[other].append(block)

    @functools.cached_property
    def dominators(self) -> list[frozenset[int]]:
        return _dominators(0, self.after, self.before)

    @functools.cached_property
    def post_dominators(self) -> list[frozenset[int]]:
        return _dominators(self.end, self.before, self.after)

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Loops with the same first block are one."""
        latches: dict[int, set[int]] = {}
        for block, following in enumerate(self.after):
            for head in following:
                if head in self.dominators[block]:
                    latches.setdefault(head, set()).add(block)
        found = []
        for head, tails in sorted(latches.items()):
            inside, todo = {head}, list(tails)
            while todo:
                block = todo.pop()
                if block not in inside:
                    inside.add(block)
                    todo += self.before[block]
            found.append(Loop(head, frozenset(tails), frozenset(inside)))
        return found

    def innermost(self, block: int) -> Loop | None:
        """The smallest loop that the block is in."""
        return min((loop for loop in self.loops if block in loop.blocks), key=lambda loop: len(loop.blocks), default=None)

    def of_a_turn(self, loop: Loop) -> frozenset[int]:
        """Blocks that every turn of a loop passes through."""
        return frozenset.intersection(*(self.dominators[latch] for latch in loop.latches)) & loop.blocks

    def of_a_pass(self, block: int) -> frozenset[int]:
        """Blocks that every way through `block` passes, from the start to the end."""
        return self.dominators[block] | self.post_dominators[block]

    def conditions(self, block: int) -> int:
        """How many branches decide, on the shortest chain of decisions, whether the block is reached: dominators with several ways
        on that the block does not post-dominate."""
        return sum(len(self.after[d]) > 1 and block not in self.post_dominators[d] for d in self.dominators[block] - {block})


def _successors(block, last: Instruction, number: dict[int, int], end: int, instructions) -> list[int]:
    on = block + 1 if block + 1 < end else end
    if last.name in ("EXIT", "RET"):
        return [end] if not last.predicate else [on, end]
    if last.name == "BSYNC":
        # The point of reconvergence stands in the BSSY before it that names the same barrier.
        opened = [i.target for i in instructions if i.name == "BSSY" and i.address < last.address and _barrier(i) == _barrier(last)]
        return [number[opened[-1]]] if opened else [on]
    if last.name in ("BRA", "CALL") and last.target in number:
        conditional = last.predicate or ".DIV" in last.opcode or "P" in last.operands.split("0x")[0]
        return sorted({number[last.target], on}) if conditional else [number[last.target]]
    return [on]


def _barrier(instruction: Instruction) -> str:
    return instruction.operands.split(",")[0].strip()


def _dominators(root: int, after: list[list[int]], before: list[list[int]]) -> list[frozenset[int]]:
    """What cannot be reached from the root has itself alone."""
    order, seen, stack = [], {root}, [(root, iter(after[root]))]
    while stack:
        block, following = stack[-1]
        for other in following:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(after[other])))
                break
        else:
            order.append(block)
            stack.pop()
    found: dict[int, frozenset[int]] = {root: frozenset({root})}
    changed = True
    while changed:
        changed = False
        for block in reversed(order):
            if block == root:
                continue
            known = [found[other] for other in before[block] if other in found]
            new = frozenset.intersection(*known) | {block}
            if found.get(block) != new:
                found[block], changed = new, True
    return [found.get(block, frozenset({block})) for block in range(len(after))]
