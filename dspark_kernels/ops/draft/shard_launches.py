"""The registered ops behind draft_block_partial and draft_block_finish: what a part of a position holds, and the launches."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...kernels.draft.args import (
    FinishStrides,
    FinishTensors,
    FinishWidths,
    GatheredParts,
    Head,
    ShardInputs,
    ShardPart,
    ShardStrides,
    ShardWidths,
)
from ...kernels.sizes import SUB_BLOCK
from ...launch import arch
from ...launch.draft import dense as draft_launch
from ...library import Out
from ..sampling import Flat, adjust_settings
from ..shards import Field, Fields, Shard
from .args import ConfidenceWeights, MixedHead, stride_of, type_name
from .dense import confidence_record, head_record, projection_record

OP = "draft_block_partial"


def _counters(take: workspaces.Take, requests: int) -> tuple[Tensor, Tensor]:
    """The rank's best packed keys and the flags of rows. Arrivals and barrier are the reserved words."""
    return take(requests, torch.int64), take(requests, torch.int32)


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    return workspaces.measured(_counters, requests), 0


def fields_of(requests: int, shard: Shard, with_lse: bool) -> Fields:
    """What a part of a position holds."""
    fields: dict[str, Field] = dict(words=(torch.int64, (requests,)), status=(torch.int64, (requests,)))
    if with_lse:
        sub_blocks = (requests, shard.blocks(SUB_BLOCK))
        fields |= dict(sub_block_sumexp=(torch.int64, sub_blocks), sub_block_max=(torch.float32, sub_blocks))
    return Fields(**fields)


class PartialArguments(NamedTuple):
    """`draft_block_partial` as torch.library knows it."""

    base_logits: Tensor
    anchors: Tensor
    anchor_positions: Tensor
    head: MixedHead
    hidden: Tensor | None
    sampling: Flat
    draft_to_target: Tensor | None
    state_indices: Tensor | None
    tokens: Tensor
    logits: Out[Tensor | None]
    head_state: Out[Tensor | None]
    part: Out[Tensor]
    lent: workspaces.Lent
    with_lse: bool
    shard: Shard
    targets: int
    position: int
    first_draft: int
    column: int
    coupled: bool


@library.register("draft_block_partial", PartialArguments)
def draft_block_partial(a: PartialArguments) -> None:
    device, sampling = a.base_logits.device, a.sampling
    kernels = library.kernels("draft.shards", device)
    (rows, drafts, _), shard = a.base_logits.shape, a.shard
    gpu = arch.current(device)
    adjust = adjust_settings(sampling) if sampling.adjusts else None
    most = min(draft_launch.MOST_OF_A_SHARD, draft_launch.most_requests(gpu, sampling.adjusts, False))
    one_tile = draft_launch.is_one_tile(rows)
    sub_blocks = shard.blocks(SUB_BLOCK)
    head, dot_type, widening = head_record(a.head)
    rank = 1 if head is None else head.rank
    # As for the whole vocabulary: how many ranks a dot takes is part of what its sums are.
    ranks = draft_launch.ranks_per_dot(gpu, rank, a.head.mix_weight is not None, a.head.w2_scale is not None, sampling.adjusts)
    config = draft_launch.pick(gpu, sub_blocks * SUB_BLOCK, rank, dot_type.itemsize, one_tile, ranks)
    if a.head.mix_weight is not None and gpu.vendor == "amd":
        config = dataclasses.replace(config, num_stages=1)  # with more, an rnn head with settings spills on gfx950
    if widening == "fp8":
        widening, config = draft_launch.decode_fp8(config, one_tile)
    take = workspaces.Carver(a.lent.scratch).take
    kind, projection, mix_type = projection_record(a.head, a.hidden, a.head_state, rows, rows, 2 * rows, dot_type, take)
    best, seen = _counters(workspaces.Carver(a.lent.counters, workspaces.RESERVED).take, rows)
    view = fields_of(rows, shard, a.with_lse).view
    own = ShardPart(
        logits_ptr=a.logits,
        words_ptr=view(a.part, "words"),
        status_ptr=view(a.part, "status"),
        sub_block_max_ptr=view(a.part, "sub_block_max"),
        sub_block_sumexp_ptr=view(a.part, "sub_block_sumexp"),
        best_ptr=best,
        seen_ptr=seen,
        arrivals_ptr=a.lent.counters[1:2].view(torch.int32),
        barrier_ptr=a.lent.counters[:1].view(torch.int32),
    )
    kernels.launch_draft_partial(
        min(-(-sub_blocks * SUB_BLOCK // config.block_v), gpu.multiprocessors * config.programs_per_sm),
        (
            ShardInputs(
                base_ptr=a.base_logits, anchors_ptr=a.anchors, positions_ptr=a.anchor_positions, map_ptr=a.draft_to_target,
                hidden_ptr=a.hidden, temperature_ptr=sampling.temperature, seed_ptr=sampling.seed, slots_ptr=a.state_indices,
                tokens_ptr=a.tokens,
            ),
            head, projection, adjust,
            own,
        ),
        (
            a.position, rows, a.anchors.shape[0], drafts, shard.start, shard.held,
            ShardWidths(
                num_targets=a.targets, width=shard.width, num_sub_blocks=sub_blocks, hidden=0 if a.hidden is None else a.hidden.shape[2]
            ),
            a.first_draft, a.column,
            ShardStrides(
                base_request=a.base_logits.stride(0), base_position=a.base_logits.stride(1), anchors=a.anchors.stride(0),
                positions=a.anchor_positions.stride(0), hidden_request=stride_of(a.hidden, 0),
                hidden_position=stride_of(a.hidden, 1), tokens=a.tokens.stride(0), logits=stride_of(a.logits, 0),
                logits_position=stride_of(a.logits, 1),
            ),
        ),
        projection=kind,
        widening=widening,
        dot_type=type_name(dot_type),
        mix_type=type_name(mix_type),
        coupled=a.coupled,
        one_dot=rank <= config.block_r,
        rows=draft_launch.request_tile(rows, most),
        fast_log2=gpu.vendor == "nvidia",
        config=config,
    )  # fmt: skip


class FinishArguments(NamedTuple):
    """`draft_block_finish` as torch.library knows it."""

    gathered: Tensor
    anchors: Tensor
    w1: Tensor | None
    hidden: Tensor | None
    confidence_head: ConfidenceWeights
    temperature: Tensor | None
    state_indices: Tensor | None
    tokens: Out[Tensor]
    confidence: Out[Tensor | None]
    confidence_logits: Out[Tensor | None]
    lse: Out[Tensor | None]
    flags: Out[Tensor]
    shard: Shard
    position: int
    first_draft: int
    column: int


@library.register("draft_block_finish", FinishArguments)
def draft_block_finish(a: FinishArguments) -> None:
    kernels = library.kernels("draft.shards", a.tokens.device)
    rows = a.flags.shape[0]
    shard = a.shard
    head = None
    if a.w1 is not None:
        vocab, rank = a.w1.shape
        head = Head(w1_ptr=a.w1, w2_ptr=None, scale_ptr=None, stride_w1=a.w1.stride(0), stride_w2=0, vocab=vocab, rank=rank)
    view = fields_of(rows, shard, a.lse is not None).view
    parts = GatheredParts(
        words_ptr=view(a.gathered, "words"),
        status_ptr=view(a.gathered, "status"),
        sub_block_max_ptr=view(a.gathered, "sub_block_max"),
        sub_block_sumexp_ptr=view(a.gathered, "sub_block_sumexp"),
    )
    hidden_size = 0 if a.hidden is None else a.hidden.shape[2]
    kernels.launch_draft_finish(
        rows,
        (
            parts, a.anchors, head, a.hidden, confidence_record(a.confidence_head, a.confidence, a.confidence_logits),
            FinishTensors(
                temperature_ptr=a.temperature, slots_ptr=a.state_indices, tokens_ptr=a.tokens, lse_ptr=a.lse, flags_ptr=a.flags
            ),
            a.position, rows, a.tokens.shape[0],
            FinishWidths(shards=shard.count, num_sub_blocks=shard.blocks(SUB_BLOCK), hidden=hidden_size),
            a.first_draft, a.column, a.gathered.stride(0), 2 * a.gathered.stride(0),
            FinishStrides(
                anchors=a.anchors.stride(0), hidden_request=stride_of(a.hidden, 0), hidden_position=stride_of(a.hidden, 1),
                tokens=a.tokens.stride(0), lse=stride_of(a.lse, 0),
            ),
        ),
        with_markov=a.confidence_head.with_markov(a.hidden),
        shards=1 << (shard.count - 1).bit_length(),
    )  # fmt: skip
