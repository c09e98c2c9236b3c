"""The rounds of one call of generate, for all rows of the batch at once.

    block of the drafter -> draft_block -> one pass of the target over [B, 1 + K] rows -> accept_chain -> context of these rows

Row i of a request is its anchor (i = 0) or its draft i. Every row of the batch verifies K drafts, so that the shapes of a round never
change; a row that has ended is a padding row of the ops. The host waits for the device once per round, to learn which rows ended.

Nothing in `draft`, `verify` and `accept` depends on values on the host but the widths, which a static cache fixes, and their tensors of
state stay in place: with one, on a GPU, a round is two CUDA graphs, between which logits processors run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import dspark_kernels as dk

from . import captured, lengths, settings as sampling_settings
from .backbone import Backbone
from .captured import Captured
from .settings import Settings
from .statistics import Statistics
from .stopping import Stopping
from .target import Target


class Models(NamedTuple):
    """What drafts and verifies. drafts: K, at most the backbone's. rule: of `accept_chain`. draft_to_target: int64 [Vd], of a drafter
    with fewer ids than the target's."""

    target: Target
    backbone: Backbone
    head: dk.MarkovHead | None
    drafts: int
    rule: str
    draft_to_target: Tensor | None = None


class Prompt(NamedTuple):
    """input_ids: int64 [B, P], padded on the left. real: bool [B, P], false for padding. chunk: columns of a pass over it."""

    input_ids: Tensor
    real: Tensor
    chunk: int


class Verified(NamedTuple):
    """The target's pass over the anchors and drafts of a round."""

    logits: Tensor  # [B, 1 + K, V]
    features: Tensor  # [B, 1 + K, m * d]
    positions: Tensor  # int64 [B, 1 + K]


class Guess(NamedTuple):
    """A round before it is decided."""

    block: dk.DraftBlock
    verified: Verified


class Rounds:
    """The state of one call. static: every pass reads the whole width of its cache."""

    def __init__(self, models: Models, prompt: Prompt, settings: Settings, stopping: Stopping, static: bool):
        self._models, self._prompt, self._settings, self._stopping, self._static = models, prompt, settings, stopping, static
        rows, columns = prompt.input_ids.shape
        device, drafts = prompt.input_ids.device, models.drafts
        self._steps = torch.arange(drafts + 1, device=device)
        # A text and what a round may add to it, where it ends or beyond.
        self.texts = torch.zeros(rows, text_columns(stopping.max_length, drafts), dtype=torch.int64, device=device)
        self.texts[:, :columns] = prompt.input_ids
        self._filled = torch.full((rows,), columns, device=device)
        self._anchors = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = prompt.real.sum(1)  # of the anchors: the first new token follows the prompt
        self._slots = torch.arange(rows, dtype=torch.int32, device=device)
        self._layout = rectangle(rows, drafts, device)
        self._accepted = torch.zeros(drafts, dtype=torch.int64, device=device)
        self._flags = torch.zeros(rows, dtype=torch.int32, device=device)
        self._draft = self._accept = None
        self._guess: Guess | None = None  # of this round
        self._logits: Tensor | None = None  # of the target, after processors where there are any
        # The same on the host.
        self.filled, self.alive = [columns] * rows, [True] * rows
        self._padding = [columns - length for length in self._positions.tolist()]
        self._rounds = self._row_rounds = 0

    def run(self, emitted) -> None:
        """Generate until every row has ended; emitted() is called after the prompt and after every round."""
        target, backbone = self._models.target, self._models.backbone
        length = self._stopping.max_length
        target.start(length + self._models.drafts, length - 1)
        backbone.start(length)
        with target.watched():
            self._read_prompt()
            emitted()
            graphs = self._static and captured.possible(self.texts.device)
            guess = Captured(self._draft_and_verify, graphs)
            settle = Captured(self._accept_and_inject, graphs, reads=guess)
            while any(self.alive):
                self._guess = guess()
                self._read_logits(self._guess.verified.logits)
                acceptance = settle()
                self._count(self._guess.block, acceptance)
                self._emit(acceptance.tokens, acceptance.num_emitted.long())
                emitted()

    def _draft_and_verify(self) -> Guess:
        block = self.draft()
        return Guess(block, self.verify(block))

    def _accept_and_inject(self) -> dk.Acceptance:
        block, verified = self._guess
        acceptance = self.accept(self._logits, block)
        self._models.backbone.inject(verified.features, verified.positions)
        return acceptance

    def _read_logits(self, logits: Tensor) -> None:
        """The logits of this round, which stay where those of the round before were if `logits` do."""
        processed = self._processed(logits)
        if processed is logits or self._logits is None or not self._static:
            self._logits = processed
        else:
            self._logits.copy_(processed)

    def draft(self) -> dk.DraftBlock:
        """K drafts of every row."""
        models, width = self._models, self._last_anchor + self._models.backbone.block_rows
        hidden = models.backbone.hidden(self._anchors, self._positions, self._width(models.backbone.cache, width))
        hidden = hidden[:, : models.drafts]
        changing = dict(base_logits=models.backbone.base_logits(hidden), hidden=hidden)
        if self._draft is None:
            self._draft = dk.prepare(
                dk.draft_block,
                anchors=self._anchors,
                head=models.head,
                anchor_positions=self._positions,
                sampling=self._settings.sampling,
                draft_to_target=models.draft_to_target,
                noise="coupled" if models.rule == "coupled" else "draft",
                state_indices=self._slots,
                **changing,
            )
        return self._draft(**changing)

    def verify(self, block: dk.DraftBlock) -> Verified:
        """The target's pass."""
        token_ids = self._layout.token_ids.view(len(self.alive), -1)
        positions = self._layout.positions.view_as(token_ids)
        token_ids[:, 0] = self._anchors
        token_ids[:, 1:] = block.tokens
        token_ids.clamp_(min=0)  # a row that has ended has no drafts
        torch.add(self._positions[:, None], self._steps, out=positions)
        self._write(token_ids[:, 1:])
        target = self._models.target
        width = self._width(target.cache, self._last_anchor + self._models.drafts + 1)
        output = target.forward(token_ids, positions, width, self._models.drafts + 1)
        return Verified(output.logits, output.features, positions)

    def accept(self, logits: Tensor, block: dk.DraftBlock) -> dk.Acceptance:
        """Advances anchors and their positions. logits: [B, 1 + K, V]."""
        changing = dict(target_logits=logits.flatten(0, 1))
        if self._accept is None:
            self._accept = dk.prepare(
                dk.accept_chain,
                layout=self._layout,
                proposal=block.proposal,  # the draft's tensors are the same in every round
                sampling=self._settings.sampling,
                rule=self._models.rule,
                anchors=self._anchors,
                anchor_positions=self._positions,
                state_indices=self._slots,
                **changing,
            )
        return self._accept(**changing)

    def statistics(self) -> Statistics:
        """Of the rounds so far."""
        flags = 0
        for bits in self._flags.tolist():
            flags |= bits
        columns = self._prompt.input_ids.shape[1]
        new_tokens = sum(self.filled) - columns * len(self.filled)
        return Statistics(self._rounds, self._row_rounds, tuple(self._accepted.tolist()), new_tokens, flags)

    def _read_prompt(self) -> None:
        """The prompt's passes and the first new token."""
        models, (input_ids, real, chunk) = self._models, self._prompt
        positions = (real.cumsum(1) - 1).clamp(min=0)
        for begin in range(0, input_ids.shape[1], chunk):
            part = slice(begin, begin + chunk)
            at, own = positions[:, part], real[:, part]
            width = min(begin + at.shape[1], self._last_anchor + 1)
            output = models.target.forward(input_ids[:, part], at, width, 1, own)
            models.backbone.inject(output.features, at, own)
        sampling_settings.penalise(self._settings, self.texts, self._filled)
        logits = self._processed(output.logits)
        layout = rectangle(len(self.alive), 0, input_ids.device)
        layout.token_ids.copy_(input_ids[:, -1])
        layout.positions.copy_(positions[:, -1])
        first = dk.accept_chain(logits.flatten(0, 1), layout, sampling=self._settings.sampling, rule=models.rule)
        self._anchors.copy_(first.next_token)
        self._flags |= first.flags
        self._emit(first.tokens, first.num_emitted.long())

    def _processed(self, logits: Tensor) -> Tensor:
        """Logits [B, n, V] after the processors that are no settings."""
        before = self._settings.before
        return lengths.process(before, logits, self.texts, self.filled, self.alive) if before else logits

    @property
    def _last_anchor(self) -> int:
        """The largest position of an anchor of the rows that go on."""
        pairs = zip(self.filled, self._padding, self.alive, strict=True)
        return max(filled - padding - 1 for filled, padding, alive in pairs if alive)

    def _width(self, cache, needed: int) -> int:
        return cache.length if self._static else min(cache.length, needed)

    def _write(self, tokens: Tensor) -> None:
        """Put tokens [B, n] behind the texts, where they count once `_filled` says so."""
        columns = self._filled[:, None] + self._steps[: tokens.shape[1]]
        self.texts.scatter_(1, columns, tokens.clamp(min=0))

    def _count(self, block: dk.DraftBlock, acceptance: dk.Acceptance) -> None:
        self._accepted += (acceptance.num_accepted[:, None] > self._steps[:-1]).sum(0)
        self._flags |= block.flags | acceptance.flags
        self._rounds += 1
        self._row_rounds += sum(self.alive)

    def _emit(self, tokens: Tensor, counts: Tensor) -> None:
        """Append new tokens up to where a row ends."""
        self._write(tokens)
        cut = self._stopping.cut(tokens, counts, self._filled, self.texts)
        self._filled += cut.kept
        self._slots.masked_fill_(cut.ended, -1)
        sampling_settings.penalise(self._settings, self.texts, self._filled)
        self.filled, slots = torch.stack([self._filled, self._slots.long()]).tolist()
        self.alive = [slot >= 0 for slot in slots]


def text_columns(max_length: int, drafts: int) -> int:
    """Columns for the longest text and for the tokens of a round behind it."""
    return max_length + drafts + 1


def rectangle(rows: int, drafts: int, device) -> dk.VerifyLayout:
    """The layout of rows that all have 1 + `drafts` rows of a pass and of logits; ids and positions 0."""
    total = rows * (drafts + 1)
    starts = torch.arange(0, total + 1, drafts + 1, device=device)
    token_ids, positions = (torch.zeros(total, dtype=torch.int64, device=device) for _ in range(2))
    return dk.VerifyLayout.of_rows(starts, token_ids, positions, drafts)
