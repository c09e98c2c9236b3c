"""One request of the decoding loop: what was asked for, the tokens so far, and what decoding it gave and cost.

    acceptance length of a round = accepted drafts + 1

Symbols: K drafts of a round.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to decode.

    prompt: token ids, at least one. max_new_tokens: >= 1. temperature: 0 = greedy. seed: int64, the request's own
    noise. stop_tokens: the request ends after the first of these that it emits (which stays in the output).
    """

    prompt: SequenceOf[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()


@dataclasses.dataclass
class Generation:
    """What decoding one request gave. Lists "per round" have one entry per round, lists "per token" one per new token.

    The first new token comes from the prefill and belongs to no round. Rounds go on while the anchor's index is below
    len(prompt) + max_new_tokens, so one more may run when the output is complete; its lengths are not clipped, the
    output is.
    """

    output_ids: list[int]  # prompt included
    acceptance_lengths: list[int] = dataclasses.field(default_factory=list)  # per round, accepted drafts + 1
    proposal_lengths: list[int] = dataclasses.field(default_factory=list)  # per round, drafts that were verified
    proposal_depths: list[int] = dataclasses.field(default_factory=list)  # per round, how far ahead the furthest of them is
    drafted_lengths: list[int] = dataclasses.field(default_factory=list)  # per round, drafts that were made
    confidences: list[list[float]] = dataclasses.field(default_factory=list)  # per round, [] without a confidence head
    draft_passes: int = 0  # forward passes of the drafter in all rounds
    target_passes: int = 0  # forward passes of the target in all rounds (= rounds; the prefill is not one)
    draft_seconds: float = 0.0  # proposing, and keeping the drafter's state up to date
    verify_seconds: float = 0.0  # scheduling, the target's pass and acceptance
    round_seconds: list[float] = dataclasses.field(default_factory=list)  # per round, its drafting, verifying and committing
    prefill_seconds: float = 0.0  # the prompt's pass, the first token and the drafter's pass over the prompt
    logprobs: list[float] = dataclasses.field(default_factory=list)  # per token: ln of its probability
    expected_logprobs: list[float] = dataclasses.field(default_factory=list)  # per token: the mean of ln p under its distribution p
    accepted: list[bool] = dataclasses.field(default_factory=list)  # per token: an accepted draft, or the target's own
    flags: int = 0  # dspark_kernels.types.Flag bits met while drafting or accepting

    @property
    def new_tokens(self) -> int:
        return len(self.accepted)


class Clock:
    """Seconds between laps, all work on the device included."""

    def __init__(self, device: torch.device):
        self._device = device
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, self._now()
        return self._last - last


class Seconds(NamedTuple):
    """What the parts of one step of the whole batch took."""

    drafting: float
    verifying: float  # scheduling, the target's pass and acceptance
    committing: float


class Sequence:
    """One request while it is decoded: tokens so far (the last one is the anchor, once the prompt was read)."""

    def __init__(self, index: int, request: Request, slot: int):
        self.index, self.request, self.slot = index, request, slot
        self.ids = [int(token) for token in request.prompt]
        self.read_prompt = False
        self.end = len(self.ids) + request.max_new_tokens  # the output is at most this long
        self.done = False
        self.result = Generation([])

    @property
    def prefill(self) -> int:
        """Rows of the prompt that this step brings."""
        return 0 if self.read_prompt else len(self.ids)

    def new_output(self, length: int) -> int:
        """Output tokens since the sequence was `length` long."""
        return min(len(self.ids), self.end) - min(length, self.end)

    def emit(self, tokens: list[int], logprobs: list[float], expected: list[float]) -> None:
        """Take a step's tokens: accepted drafts and one of the target's own."""
        stops = [i for i, token in enumerate(tokens) if token in self.request.stop_tokens]
        count = stops[0] + 1 if stops else len(tokens)
        self.ids += tokens[:count]
        self.result.logprobs += logprobs[:count]
        self.result.expected_logprobs += expected[:count]
        self.result.accepted += [i < len(tokens) - 1 for i in range(count)]
        self.read_prompt = True
        self.done = bool(stops) or len(self.ids) - 1 >= self.end

    def finish(self) -> Generation:
        new = self.end - len(self.request.prompt)
        self.result.output_ids = self.ids[: self.end]
        self.result.logprobs = self.result.logprobs[:new]
        self.result.expected_logprobs = self.result.expected_logprobs[:new]
        self.result.accepted = self.result.accepted[:new]
        return self.result
