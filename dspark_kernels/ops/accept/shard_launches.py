"""The registered ops behind accept_partial and accept_finish: what parts and scratch hold, and the launches.

A part is a rank's contribution to a phase, int64 words in named regions (`fields_of`). Records: kernels/accept/args.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...kernels.accept.args import (
    ArrivingRows,
    Cut,
    DraftShard,
    Drawn,
    DrawScratch,
    Gathered,
    GatheredSums,
    Layout,
    Part,
    Sampling,
    ShardedDraft,
    ShardLists,
    ShardSums,
)
from ...kernels.sizes import VOCAB_BLOCK
from ...launch import arch
from ...launch.accept import shards as accept_launch
from ...library import Out
from .. import sampling as sampling_args
from ..shards import Field, Fields, Shard
from .checks import Emitted, LayoutArrays
from .records import outputs_record, sparse_record, stride, target_record

OP = "accept_partial"


def _draw_scratch(take: workspaces.Take, requests: int, drafts: int, vocab: int) -> DrawScratch:
    return DrawScratch(
        total_ptr=take(requests * _width(drafts), torch.int64),
        added_ptr=take(requests * _blocks(vocab), torch.int64),
        patch_ptr=take(requests * VOCAB_BLOCK, torch.float32),
    )


def _counters(take: workspaces.Take, requests: int, rows: int, drafts: int) -> ArrivingRows:
    return ArrivingRows(
        take(rows, torch.int64), take(rows, torch.int64), take(rows, torch.int32), take(requests * (drafts + 1), torch.int32)
    )


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    scratch = workspaces.measured(_draw_scratch, requests, drafts, vocab)
    return workspaces.measured(_counters, requests, requests * (drafts + 1), drafts), scratch


def _width(drafts: int) -> int:
    return max(2, 1 << drafts.bit_length())


def _blocks(vocab: int) -> int:
    return max(4, _power(-(-vocab // VOCAB_BLOCK)))


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def fields_of(phase: str, requests: int, rows: int, shard: Shard, sums: bool, draft_sums: bool, every_row: bool,
            candidates: int) -> Fields:  # fmt: skip
    """What a part of `phase` holds.

    sums: the rule draws. draft_sums: the proposal is summed here. candidates: of a sparse proposal, else 0.
    """
    blocks = shard.blocks(VOCAB_BLOCK)
    if phase == "normalise":
        fields: dict[str, Field] = dict(row_words=(torch.int64, (rows, 4)), row_logits=(torch.float32, (rows, 2)))
        if sums:
            fields |= dict(sumexp=(torch.int64, (rows, blocks)), top=(torch.float32, (rows, blocks)))
        if draft_sums:
            fields |= dict(draft_sumexp=(torch.int64, (rows, blocks)), draft_top=(torch.float32, (rows, blocks)))
        if candidates:
            fields |= dict(rest=(torch.int64, (rows, blocks)), candidate_logits=(torch.float32, (rows, candidates)))
            fields |= dict(distributions=(torch.float32, (rows, 3)))
            fields |= dict(points=(torch.int32, (rows,)))
    elif phase == "residual":
        fields = dict(residual=(torch.int64, (rows if every_row else requests, blocks)))
    else:
        fields = dict(word=(torch.int64, (requests,)))
        fields |= dict(verdict=(torch.int64, (requests, 2)))
    return Fields(**fields)


class DraftArguments(NamedTuple):
    """How the drafts were drawn, as torch.library knows it."""

    draft_logits: Tensor | None
    draft_ids: Tensor | None
    draft_lse: Tensor | None
    draft_temperature: Tensor | None


def _part(fields: Fields, part: Tensor) -> Part:
    """The regions of a part of the first phase; None for those that it does not have."""

    def view(*names: str) -> Iterator[Tensor | None]:
        return (fields.view(part, name) for name in names)

    words, logits = view("row_words", "row_logits")
    return Part(
        words,
        logits,
        target=ShardSums(*view("top", "sumexp")),
        draft=ShardSums(*view("draft_top", "draft_sumexp")),
        lists=ShardLists(*view("rest", "candidate_logits", "distributions", "points")),
    )


def _draft(draft: DraftArguments) -> ShardedDraft:
    logits, ids, lse = draft.draft_logits, draft.draft_ids, draft.draft_lse
    if logits is None:
        return ShardedDraft(None, None)
    if ids is None:
        slot, row, _ = logits.stride()
        return ShardedDraft(DraftShard(logits, lse, slot, row, stride(lse, 0)), None)
    return ShardedDraft(None, sparse_record(ids, logits))


class _Sizes:
    """The sizes of parts, from the arguments of a registered op."""

    def __init__(self, draft: DraftArguments, requests: int, rows: int, shard: Shard, rule: str) -> None:
        self.kernel_draft = _draft(draft)
        self.blocks = shard.blocks(VOCAB_BLOCK)
        self.draws = rule != "match"
        self.candidates = 0 if draft.draft_ids is None else draft.draft_ids.shape[2]
        self._sums = self.kernel_draft.dense is not None and draft.draft_lse is None
        self._call = requests, rows, shard, rule == "block"

    def fields(self, phase: str) -> Fields:
        requests, rows, shard, every_row = self._call
        return fields_of(phase, requests, rows, shard, self.draws, self._sums, every_row, self.candidates)

    def gathered(self, part: Tensor) -> Gathered:
        return Gathered(_part(self.fields("normalise"), part), part.stride(0), self._call[2].count)


class PartialArguments(NamedTuple):
    """`accept_partial` as torch.library knows it."""

    target_logits: Tensor
    cu_num_logits: Tensor
    logits_indices: Tensor
    token_ids: Tensor
    positions: Tensor
    draft: DraftArguments
    sampling: sampling_args.Flat
    state_indices: Tensor | None
    gathered: list[Tensor]
    part: Out[Tensor]
    lent: workspaces.Lent
    requests: int
    drafts: int
    phase: str
    rule: str
    shard: Shard


@library.register("accept_partial", PartialArguments)
def accept_partial(a: PartialArguments) -> None:
    device, flat = a.target_logits.device, a.sampling
    kernels = library.kernels("accept.shards", device)
    rows, shard = a.target_logits.shape[0], a.shard
    call = _Sizes(a.draft, a.requests, rows, shard, a.rule)
    draft, blocks = call.kernel_draft, call.blocks
    config = accept_launch.pick(arch.current(device), blocks, a.drafts, flat.adjusts)
    num_slots = flat.temperature.shape[0] if flat.temperature is not None else 2**31 - 1
    target = target_record(a.target_logits, flat)
    layout = Layout(None, a.cu_num_logits, a.logits_indices, a.token_ids, a.positions)
    settings = Sampling(a.draft.draft_temperature, flat.temperature, flat.seed, slots_ptr=a.state_indices)
    sizes = (a.requests, num_slots, rows, a.drafts)
    columns = (shard.start, shard.held, shard.start // VOCAB_BLOCK, blocks, shard.vocab)
    if a.phase == "normalise":
        arriving = _counters(workspaces.Carver(a.lent.counters, workspaces.RESERVED).take, a.requests, rows, a.drafts)
        part = _part(call.fields("normalise"), a.part)
        kernels.launch_accept_normalise(
            a.requests * -(-(a.drafts + 1) // config.group) * -(-blocks // config.chunk),
            (target, layout, draft, settings, part, arriving, *sizes, *columns),
            noisy=not call.draws and flat.temperature is not None,
            candidates=_power(max(call.candidates, 1)),
            config=config,
        )
        return
    first = call.gathered(a.gathered[0])
    constants = dict(rule=a.rule, WIDTH=_width(a.drafts), SHARDS=_power(shard.count), config=config)
    view = call.fields(a.phase).view
    if a.phase == "residual":
        kernels.launch_accept_residual(
            a.requests * -(-blocks // config.chunk),
            (target, layout, first, draft.dense, settings, view(a.part, "residual"), *sizes, *columns),
            **constants,
        )
        return
    summed = None
    if len(a.gathered) > 1:
        residual = call.fields("residual").view(a.gathered[1], "residual")
        assert residual is not None  # a region of every such part
        summed = GatheredSums(residual, residual.stride(0))
    scratch = _draw_scratch(workspaces.Carver(a.lent.scratch).take, a.requests, a.drafts, shard.vocab if call.candidates else 0)
    if not call.candidates:
        scratch = scratch._replace(added_ptr=None, patch_ptr=None)
    kernels.launch_accept_draw(
        a.requests,
        (
            target, layout, first, draft, summed, settings, Drawn(view(a.part, "word"), view(a.part, "verdict")), scratch,
            Cut(shard.width, blocks, shard.pieces(VOCAB_BLOCK), shard.vocab), *sizes, shard.start, shard.held,
        ),
        blocks=_blocks(shard.vocab),
        candidates=_power(max(call.candidates, 1)),
        **constants,
    )  # fmt: skip


class FinishArguments(NamedTuple):
    """`accept_finish` as torch.library knows it."""

    gathered: list[Tensor]
    layout: LayoutArrays
    draft: DraftArguments
    temperature: Tensor | None
    state_indices: Tensor | None
    emitted: Emitted
    commit_mask: Out[Tensor]
    flags: Out[Tensor]
    anchors: Out[Tensor | None]
    anchor_positions: Out[Tensor | None]
    scratch: Out[Tensor]
    slots: int
    rows: int
    shard: Shard
    rule: str


@library.register("accept_finish", FinishArguments)
def accept_finish(a: FinishArguments) -> None:
    device = a.emitted.tokens.device
    kernels = library.kernels("accept.shards", device)
    requests, drafts = a.emitted.tokens.shape[0], a.emitted.tokens.shape[1] - 1
    shard = a.shard
    call = _Sizes(a.draft, requests, a.rows, shard, a.rule)
    drawn = Drawn(None, None)
    if call.draws:
        drawn = Drawn(*(call.fields("draw").view(a.gathered[-1], name) for name in ("word", "verdict")))
    kernels.launch_accept_finish(
        requests,
        (
            Layout(*a.layout),
            call.gathered(a.gathered[0]),
            call.kernel_draft.dense,
            drawn,
            Sampling(a.draft.draft_temperature, a.temperature, None, slots_ptr=a.state_indices),
            outputs_record(a),
            requests, a.slots, a.rows, a.commit_mask.shape[0], drafts, call.blocks, shard.vocab,
            a.gathered[-1].stride(0),
        ),
        WIDTH=_width(drafts),
        SHARDS=_power(shard.count),
        config=accept_launch.pick(arch.current(device), call.blocks, drafts),
    )  # fmt: skip
