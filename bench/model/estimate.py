"""The modelled time of a launch: of its hot part the largest of three bounds, then what follows it.

    time  = launch + max(dram, issue, lives) + after
    dram  = bytes that must move / bandwidth
    issue = instructions of all turns / (issue slots x share of them that is reached), or the slowest pipe's time
    lives = life of a program x max(1, programs / programs that the GPU holds)
    life  = start + what a program does around its turns + turns x a turn
    turn  = of the hot loop; pessimistic: with all that not every turn meets

Nothing here was measured.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.model import constants, pace
from bench.model.constants import ATOMIC, BARRIER, DRAM, FENCE, L2, LEVELS, PACE, SPIN, START, Machine
from bench.model.hot import Hot


class Steps(NamedTuple):
    """A chain of steps each of which waits for the one before: loads of what the L2 cache has, of what DRAM has, atomics, fences,
    waits for another program, barriers of the block, starts of a program; instructions: of one warp, serial."""

    l2: float = 0
    dram: float = 0
    atomics: float = 0
    fences: float = 0
    spins: float = 0
    barriers: float = 0
    starts: float = 0
    instructions: float = 0

    def times(self, number: float) -> Steps:
        return Steps(*(number * count for count in self))

    def microseconds(self, level: int, clock: float) -> float:
        """clock: GHz."""
        unit = (L2, DRAM, ATOMIC, FENCE, SPIN, BARRIER, START)
        waits = sum(count * each[level] for count, each in zip(self, unit, strict=False))
        return waits + self.instructions * PACE[level] * 1e-3 / clock


class Phase(NamedTuple):
    """Work after the hot part: `programs` of them go through the steps, as many at a time as the GPU holds."""

    steps: Steps
    programs: float = 1


class Load(NamedTuple):
    """What a launch has to do. turns: of the hot part, per program that streams. resident: programs per multiprocessor."""

    must_move: float
    programs: float
    turns: float
    warps: int
    resident: int
    after: tuple[Phase, ...]


class Time(NamedTuple):
    """Microseconds. turn: of the hot loop, 0 where nothing loops."""

    turn: float
    life: float
    dram: float
    issue: float
    lives: float
    after: float
    total: float

    @property
    def bound(self) -> str:
        """What the time is mostly made of."""
        parts = {"DRAM": self.dram, "issue": self.issue, "life x waves": self.lives}
        longest = max(parts, key=parts.get)
        return longest if parts[longest] >= self.after else "what follows"


def estimate(hot: Hot, load: Load, machine: Machine) -> list[Time]:
    """Optimistic, central, pessimistic."""
    return [_at(level, hot, load, machine) for level in range(len(LEVELS))]


def _at(level: int, hot: Hot, load: Load, machine: Machine) -> Time:
    seat = machine.multiprocessors * load.resident
    whole = pace.microseconds(hot.whole, level, load.warps, machine.clock, hot.wide)
    turn = turn_of(hot, level, load.warps, machine.clock) if hot.loops else 0.0
    life = START[level] + (max(0.0, whole - turn) + load.turns * turn if hot.loops else load.turns * whole)
    dram = 1e6 * load.must_move / machine.bandwidth
    issue = issued(hot, load, machine) / constants.ISSUED[level]
    lives = life * max(1.0, load.programs / seat)
    after = sum(p.steps.microseconds(level, machine.clock) * max(1.0, p.programs / seat) for p in load.after)
    total = constants.LAUNCH[level] + max(dram, issue, lives) + after
    return Time(turn, life, dram, issue, lives, after, total)


def turn_of(hot: Hot, level: int, warps: int, clock: float) -> float:
    """Microseconds."""
    turn = pace.of_a_turn(hot.turn, level, warps, clock, hot.wide)
    if LEVELS[level] == "pessimistic":
        turn *= 1 + hot.others / len(hot.turn)
    return turn


def issued(hot: Hot, load: Load, machine: Machine) -> float:
    """Microseconds of the hot part's instructions if no slot stayed empty."""
    classes = hot.classes()
    cycles = max(sum(classes.values()), *(classes[kind] * each for kind, each in constants.PIPES.items()))
    return load.programs * load.turns * load.warps * cycles / (4 * machine.multiprocessors * machine.clock * 1e3)
