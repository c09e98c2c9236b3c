"""What two systems had decoded at a time, from their recorded rounds: the film that --live shows.

    time of round i = (d_0 + ... + d_i) * scale     d: a round's seconds ("measured"), or 1 ("passes")

One scale for both systems keeps their relative pace; it is chosen so that the slower one takes as long as was asked for. The first
token comes from the prompt's pass, belongs to no round, and is there from the beginning.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.decode.models import Models
from bench.decode.runs import Run
from bench.decode.systems import System
from bench.shared.command import BadArgument
from reference.loop import Generation

PACES = ("measured", "passes")
PLAIN = "autoregressive"


class Token(NamedTuple):
    text: str
    accepted: bool  # a draft that was accepted, or the target's own token


class Round(NamedTuple):
    seconds: float
    tokens: tuple[Token, ...]  # in the output; the last round may have emitted more than was asked for
    length: int  # that it emitted, as in Generation.acceptance_lengths


class Shown(NamedTuple):
    """What a column has at a time."""

    tokens: tuple[Token, ...]
    rounds: int
    tokens_per_round: float  # as in the table: whole rounds, without the first token; nan before the first round
    seconds: float  # of the rounds, as measured


@dataclasses.dataclass(frozen=True)
class Track:
    """One request, decoded by one system."""

    label: str
    first: tuple[Token, ...]  # from the prompt's pass
    rounds: tuple[Round, ...]

    @classmethod
    def of(cls, label: str, generation: Generation, prompt_length: int, text: Callable[[Sequence[int]], str]) -> Track:
        """text: what token ids say."""
        new = generation.output_ids[prompt_length:]
        tokens = [Token(text([token]), accepted) for token, accepted in zip(new, generation.accepted, strict=True)]
        rounds, end = [], 1
        for seconds, length in zip(generation.round_seconds, generation.acceptance_lengths, strict=True):
            rounds.append(Round(seconds, tuple(tokens[end : end + length]), length))
            end += length
        return cls(label, tuple(tokens[:1]), tuple(rounds))

    def after(self, count: int) -> Shown:
        """After so many rounds."""
        rounds = self.rounds[:count]
        tokens = self.first + tuple(itertools.chain.from_iterable(r.tokens for r in rounds))
        mean = sum(r.length for r in rounds) / len(rounds) if rounds else float("nan")
        return Shown(tokens, len(rounds), mean, sum(r.seconds for r in rounds))


class Film:
    """Two tracks of one prompt on one clock.

    title: what is shown. prompt: its text. seconds: until the slower track ends.
    """

    def __init__(self, title: str, prompt: str, tracks: Sequence[Track], pace: str, seconds: float):
        self.title, self.prompt, self.tracks, self.pace = title, prompt, tuple(tracks), pace
        ends = [list(itertools.accumulate(r.seconds if pace == "measured" else 1.0 for r in track.rounds)) for track in self.tracks]
        longest = max((end[-1] for end in ends if end), default=0.0)
        self.scale = seconds / longest if longest > 0 else 1.0  # shown seconds per second, or per round
        self._ends = [[end * self.scale for end in of_track] for of_track in ends]

    @property
    def times(self) -> list[float]:
        """When something changes, the beginning included."""
        return sorted({0.0}.union(*self._ends))

    def at(self, now: float) -> list[Shown]:
        """What every track has."""
        return [track.after(sum(end <= now for end in ends)) for track, ends in zip(self.tracks, self._ends, strict=True)]

    @property
    def speed(self) -> str:
        """How the shown pace relates to the real one, in words."""
        if self.pace == "passes":
            return "equal rounds, as if the target's pass took all the time"
        factor = self.scale if self.scale >= 1 else 1 / self.scale
        return f"rounds as long as measured, {factor:.3g} times {'slower' if self.scale >= 1 else 'faster'}"


class Pair(NamedTuple):
    """The systems of the two columns."""

    plain: System
    other: System


def pair(systems: Sequence[System]) -> Pair:
    """Plain decoding and the first other system; where there are kernels, the first that runs them. Raises BadArgument."""
    plain = [system for system in systems if system.name == PLAIN]
    others = sorted((system for system in systems if system.name != PLAIN), key=lambda system: system.ops is None)
    if not plain or not others:
        have = ", ".join(system.label for system in systems)
        raise BadArgument(f"--live: expected {PLAIN} and another system, got {have}")
    return Pair(plain[0], others[0])


def films(arguments, models: Models, systems: Pair, runs: Sequence[Run], prompts: Sequence[Sequence[int]]) -> list[Film]:
    """One for every temperature and prompt at which both systems decoded."""
    found = []
    for temperature in arguments.temperature:
        two = [run for system in systems for run in runs if run.system is system and run.temperature == temperature]
        if len(two) < 2:  # a sampled tree has no greedy run
            continue
        for index, prompt in enumerate(prompts):
            tracks = [Track.of(run.system.label, run.generations[index], len(prompt), models.decode) for run in two]
            title = f"prompt {index}, T = {temperature:g}"
            found.append(Film(title, models.decode(prompt), tracks, arguments.pace, arguments.seconds))
    return found
