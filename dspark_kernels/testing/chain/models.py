"""Toy targets and drafters, and decoding rounds over them: many requests at once, one seed each.

A model is a table of logits by last token, so that the exact distribution of the tokens after a prompt is a product of its rows:

    P(x_1 .. x_T) = prod_t p(x_t | x_{t-1}),  x_0 the prompt

and the distribution of a window is a sum over the others. `Play` lets an acceptance function decode from there: draft K tokens
with the seeds' own noise, choose how many are verified, accept, go on from what was emitted; what the last round left open is
completed by the target with noise of the suite. Symbols: R requests, K drafts, V vocabulary, T tokens, p target distribution.
Logits lie on a grid of 1/8, exact in bf16. Reference: reference/enumeration.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...types import Stream
from . import rules

PROMPT = 0  # the token that everything starts after
GRID = 8


@dataclasses.dataclass(frozen=True)
class Model:
    """target [V, V], draft [V, Vd] logits by last token; confidence [V]: that the next draft survives."""

    target: Tensor
    draft: Tensor
    confidence: Tensor

    @property
    def vocab(self) -> int:
        return self.target.shape[1]

    def target_probs(self, temperature: float = 1.0) -> Tensor:
        """fp64 [V, V], the target's distribution by last token."""
        return rules.probs_of(self.target.double(), torch.full((self.vocab,), temperature, device=self.target.device))

    def draft_probs(self, temperature: float = 1.0) -> Tensor:
        """fp64 [V, V], cut or padded to the target's ids."""
        probs = rules.probs_of(self.draft.double(), torch.full((self.vocab,), temperature, device=self.draft.device))
        return torch.nn.functional.pad(probs, (0, max(0, self.vocab - probs.shape[1])))[:, : self.vocab]


def random_model(seed: int, vocab: int, sharpness: float = 2.0, draft_vocab: int | None = None, impossible: bool = False) -> Model:
    """impossible: a third of the tokens never follow, in either distribution."""
    generator = torch.Generator().manual_seed(seed)
    tables: list[Tensor] = []
    for width in (vocab, draft_vocab or vocab):
        logits = (torch.randn(vocab, width, generator=generator) * sharpness * GRID).round() / GRID
        if impossible:
            hidden = torch.rand(vocab, width, generator=generator) < 1 / 3
            hidden[torch.arange(vocab), torch.randint(0, width, (vocab,), generator=generator)] = False
            logits[hidden] = rules.NEG_INF
        tables.append(logits)
    target, draft = tables
    return Model(target, draft, torch.rand(vocab, generator=generator))


def sequence_probs(probs: Tensor, tokens: int) -> Tensor:
    """[V] * tokens: probability of every sequence after the prompt."""
    out = probs[PROMPT]
    for _ in range(tokens - 1):
        out = out[..., None] * probs
    return out


def window_probs(probs: Tensor, first: int, tokens: int) -> Tensor:
    """[V] * tokens: the distribution of tokens first .. first + tokens - 1 (the first one is 0)."""
    before = torch.zeros_like(probs[0])
    before[PROMPT] = 1.0
    for _ in range(first):
        before = before @ probs
    out = before @ probs
    for _ in range(tokens - 1):
        out = out[..., None] * probs
    return out


def count_windows(history: Tensor, first: int, tokens: int, vocab: int) -> Tensor:
    """[V ^ tokens] counts of what history [R, T] shows there."""
    index = torch.zeros_like(history[:, 0])
    for column in range(first, first + tokens):
        index = index * vocab + history[:, column]
    return torch.bincount(index, minlength=vocab**tokens)


# ---- drafting and scheduling, where the user brings none


def draft_with(
    stream: Stream, draft_logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, anchor_positions: Tensor
) -> Tensor:
    """Tokens [R] from logits [R, V] by the addressed noise of one draft position."""
    probs = rules.probs_of(rules.readable(draft_logits), temperature)
    return rules.Noise(seeds, anchor_positions).race(stream, positions, probs.log())


draft = functools.partial(draft_with, Stream.DRAFT)
draft_coupled = functools.partial(draft_with, Stream.COUPLED)


def schedule(confidence: Tensor) -> Tensor:
    """[R] lengths from confidence [R, K]: drafts whose probability to survive with all before them is at least 1/2."""
    return rules.prefix(confidence.cumprod(1) >= 0.5)


@dataclasses.dataclass
class Play:
    """How a function's requests decode.

    call: the function, its output checked. kind: "dense", "one_hot" (the drafter's arg-max) or "missing" (every second draft
    is -1). cut: whether the schedule is asked; else all drafts are verified.
    """

    call: Callable[..., Tensor]
    model: Model
    num_drafts: int
    draft: Callable[..., Tensor] = draft
    schedule: Callable[[Tensor], Tensor] = schedule
    temperature: float = 1.0
    kind: str = "dense"
    cut: bool = False
    dtype: torch.dtype = torch.float32

    def round(self, last: Tensor, seeds: Tensor, anchor_positions: Tensor) -> tuple[Tensor, Tensor]:
        """(emitted tokens [R, K+1] with -1 behind, how many [R]) after the last tokens [R]."""
        count, model = self.num_drafts, self.model
        temperature = torch.full(last.shape, self.temperature, device=last.device)
        context, made, draft_rows, target_rows, confidence = last, [], [], [], []
        for k in range(count):
            target_rows.append(model.target[context])
            draft_rows.append(model.draft[context].to(self.dtype))
            confidence.append(model.confidence[context])
            if self.kind == "one_hot":
                token = draft_rows[-1].argmax(1)
            else:
                token = self.draft(draft_rows[-1], temperature, seeds, anchor_positions + k + 1, anchor_positions)
            if self.kind == "missing":
                token = torch.where((seeds + k) % 2 == 0, -1, token)
            made.append(token)
            context = torch.where((token >= 0) & (token < model.vocab), token, 0)
        target_rows.append(model.target[context])
        drafts, target = torch.stack(made, 1), torch.stack(target_rows, 1)
        lens = torch.full_like(last, count)
        if self.cut:
            lens = self.schedule(torch.stack(confidence, 1)).to(torch.int64)
            # Rows that nobody computed hold something else.
            behind = torch.arange(count + 1, device=last.device) > lens[:, None]
            target = torch.where(behind[..., None], target.roll(1, 2), target)
        out = self.call(
            target.to(self.dtype),
            drafts,
            None if self.kind == "one_hot" else torch.stack(draft_rows, 1),
            temperature,
            seeds,
            lens.to(torch.int32),
            anchor_positions,
        )
        return out, (out >= 0).sum(1)

    def decode(self, seeds: Tensor, tokens: int, rounds: int | None, anchor_position: int, salt: int = 0) -> tuple[Tensor, Tensor]:
        """(history [R, tokens], drafts accepted in the first round [R]): `rounds` rounds (None: as many as it takes)."""
        device, requests = seeds.device, len(seeds)
        history = torch.full((requests, tokens + self.num_drafts + 1), -1, device=device)
        length = torch.zeros(requests, dtype=torch.int64, device=device)
        last = torch.full((requests,), PROMPT, device=device)
        accepted: Tensor | None = None
        done = 0
        while (rounds is None or done < rounds) and bool((length < tokens).any()):
            live = (length < tokens).nonzero()[:, 0]
            new, count = self.round(last[live], seeds[live], anchor_position + length[live])
            columns = torch.arange(self.num_drafts + 1, device=device)
            where = length[live, None] + columns
            inside = columns < count[:, None]
            history[live] = history[live].scatter(1, where, torch.where(inside, new, history[live].gather(1, where)))
            length[live] += count
            last[live] = rules.at(new, count - 1)
            accepted = count - 1 if accepted is None else accepted
            done += 1
        probs = self.model.target_probs(self.temperature)
        generator = torch.Generator().manual_seed(0x5EED + salt)
        for column in range(tokens):
            uniform = torch.rand(requests, generator=generator, dtype=torch.float64).to(device)
            before = history[:, column - 1] if column else torch.full_like(last, PROMPT)
            open_ = column >= length
            drawn = (probs[before].cumsum(1) <= uniform[:, None] * (1 - 1e-15)).sum(1).clamp(max=self.model.vocab - 1)
            history[:, column] = torch.where(open_, drawn, history[:, column])
        assert accepted is not None  # one round at least
        return history[:, :tokens], accepted


# ---- what the rules accept


def mean_accepted(rule: str, model: Model, num_drafts: int, temperature: float = 1.0) -> tuple[float, float]:
    """Mean and standard deviation of the accepted drafts of a round after the prompt.

    Exact for "token" and "coupled"; for "block", which accepts at least as many, the mean of "token".
    """
    target, draft_probs = model.target_probs(temperature), model.draft_probs(temperature)
    step = torch.minimum(target, draft_probs)  # [last, x]: drafted and accepted
    if rule == "coupled":
        # Both races on the same clocks have the same winner v: 1 / sum_i max(p_i / p_v, q_i / q_v).
        with_v = torch.maximum(target[:, None, :] / target[:, :, None], draft_probs[:, None, :] / draft_probs[:, :, None])
        step = torch.where((target > 0) & (draft_probs > 0), 1 / with_v.nan_to_num(nan=float("inf")).sum(2), 0.0)
    reached = torch.zeros_like(target[0])
    reached[PROMPT] = 1.0
    survive = []
    for _ in range(num_drafts):
        reached = reached @ step
        survive.append(float(reached.sum()))
    mean = sum(survive)
    square = sum((2 * i + 1) * s for i, s in enumerate(survive))
    return mean, max(square - mean**2, 0.0) ** 0.5
