"""draft_block_partial, draft_block_finish: the draft block where every rank has a shard of the vocabulary.

Dense form, per position: a part per rank (its best word, and what the log-sum-exp needs), one gather, a finish that is the same on
every rank. With `candidates`: the same once for the whole block (ops/draft/candidate_shards.py). Oracle: the op on the whole vocabulary,
to the bit where shards start at multiples of 64 ids, with candidates whatever the cut. Source: DSpark, arXiv 2607.05147.

    block = None
    for k in range(K):
        part, block = draft_block_partial(base_logits, anchors, head, position=k, block=block, **common)
        block = draft_block_finish(all_gather(part), block, anchors, head, position=k, **common)

    part, block = draft_block_partial(base_logits, anchors, head, candidates=C, **common)
    block = draft_block_finish(all_gather(part), block, anchors, head, candidates=C, base_logits=base_logits, **common)

| gathered per position, dense | int64 words per rank and request |
| --- | --- |
| greedy, or a proposal without lse | 2: best word (ordered key, inverted id), what the row showed |
| sampled, with lse | 2, and 1.5 per unit of 64 ids: mass and maximum |

Without lse acceptance sums the proposal itself (`accept_partial`), at 1.5 words per leaf of 1024 ids.

A rank has its own rows of what is by id of the head's vocabulary: columns of base logits, W2 and its scales, `draft_to_target`. The
rest is whole on every rank: W1, what mixes latents, hidden states, the confidence head, and by target id bias, mask and penalties.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import check_choice, check_int, check_optional, check_tensor, check_type, not_yet
from ...kernels.draft.args import (
    FinishStrides,
    FinishTensors,
    FinishWidths,
    GatheredParts,
    Head,
    ShardCounters,
    ShardInputs,
    ShardPart,
    ShardStrides,
    ShardTensors,
)
from ...launch import arch
from ...launch.draft import dense as draft_launch
from ...types import ConfidenceHead, DenseProposal, DraftBlock, MarkovHead, RnnMarkovHead, SamplingTensors
from ..sampling import SCHEMA, Flat, adjust_settings, flatten, needs_no
from ..shards import Fields, Shard, check_shard
from . import candidate_shards, dense as draft
from .outputs import allocate, check_out

PARTIAL, FINISH = "draft_block_partial", "draft_block_finish"


@workspaces.declare(PARTIAL)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    return workspaces.words_of(requests, torch.int64) + workspaces.words_of(requests, torch.int32), 0


def _fields(requests: int, shard: Shard, with_lse: bool) -> Fields:
    fields = dict(words=(torch.int64, (requests,)), status=(torch.int64, (requests,)))
    if with_lse:
        units = (requests, shard.blocks(draft.UNIT))
        fields |= dict(unit_mass=(torch.int64, units), unit_max=(torch.float32, units))
    return Fields(**fields)


def part_words(requests: int, width: int, with_lse: bool) -> int:
    """Size of a part: int64 words, the same on every rank of `width` columns."""
    return _fields(requests, Shard(0, width, 1, width), with_lse).words


def _lse(block: DraftBlock) -> Tensor | None:
    return block.proposal.lse if isinstance(block.proposal, DenseProposal) else None


def draft_block_partial(
    base_logits: Tensor,
    anchors: Tensor,
    head: MarkovHead | None = None,
    *,
    anchor_positions: Tensor,
    position: int | None = None,
    vocab_start: int,
    vocab_shards: int,
    vocab_size: int | None = None,
    block: DraftBlock | None = None,
    sampling: SamplingTensors | None = None,
    hidden: Tensor | None = None,
    confidence: ConfidenceHead | None = None,
    candidates: int | None = None,
    bigrams: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    first_draft: int = 0,
    head_state: Tensor | None = None,
    noise: str = "draft",
    state_indices: Tensor | None = None,
    keep_logits: bool = False,
    out: Tensor | None = None,
    workspace: workspaces.Workspace | None = None,
) -> tuple[Tensor, DraftBlock]:
    """This rank's part of draft `position`, or with `candidates` of all drafts, in one launch.

    Args:
        base_logits: [R, K, W] bf16, fp16 or fp32: this rank's columns, the same W on every rank. Columns of ids from
            vocab_size on are ignored.
        anchors, anchor_positions, hidden, first_draft, noise, state_indices, keep_logits: as in `draft_block`.
        head: a head of `draft_block` with the whole w1 [V1, r] and this rank's rows w2 [W, r] (and w2_scale [W]). With `candidates`
            w2 may also be whole [vocab_size, r], on every rank: then no rows of it are gathered.
        position: 0 .. K - 1, whose drafts before it are read from `block`; None with `candidates`.
        vocab_start, vocab_shards, vocab_size: first id of this rank, number of ranks, ids in all (default W * vocab_shards).
        block: what the call at position 0 returned, or a DraftBlock to write, whose proposal has this rank's columns
            [S, K, W] (with `candidates` all of [S, K, C]); None at position 0 allocates.
        sampling: as in `draft_block`, whole on every rank. Filters with `candidates` only: in the dense form their threshold would
            be searched for over rows that no rank has.
        confidence: given where the block is to have confidences.
        candidates: restrict each position to its C best base logits, as in `draft_block`.
        bigrams: not on shards: the successors of a draft are known only when it is, a gather per position.
        draft_to_target: int64 [W], this rank's entries. The dense proposal has them, too.
        head_state: fp32 [S, r], the state of an rnn head. In the dense form it is needed, because the state is kept there between
            positions, and each call moves it on; with `candidates` the finish does.
        out: int64 part to write.

    Returns:
        (part, block): part is to be gathered over ranks into [vocab_shards, words], in the order of their ids.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument of the wrong type, dtype, shape, device or stride, or of a kind that
        shards do not have (filters in the dense form, bigrams).
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    rows, drafts, width = draft._check_inputs(base_logits, anchors, anchor_positions, state_indices)
    device, slots = base_logits.device, anchors.shape[0]
    shard = check_shard(width, vocab_start, vocab_shards, vocab_size)
    check_choice("noise", noise, ("draft", "coupled"))
    check_int("first_draft", first_draft, low=0)
    check_optional("draft_to_target", draft_to_target, dtype=torch.int64, shape=(width,), device=device, contiguous=True)
    targets = draft._check_sampling(sampling, head, draft_to_target, slots, drafts, shard.vocab, device)
    if bigrams is not None:
        not_yet(PARTIAL, "bigrams", "successors of a draft, which no rank knows when it makes its part, are")
    if candidates is not None:
        _check_no_position(position)
        return candidate_shards.partial(
            base_logits, slots, head, shard=shard, block=block, sampling=sampling, confidence=confidence, candidates=candidates,
            draft_to_target=draft_to_target, targets=targets, first_draft=first_draft, state_indices=state_indices,
            keep_logits=keep_logits, out=out, workspace=workspace,
        )  # fmt: skip
    _check_position(position, drafts)
    _check_filters(sampling)
    hidden_size = draft._check_hidden(hidden, head, None, rows, drafts, device)
    if isinstance(head, RnnMarkovHead) and head_state is None:
        raise ValueError("head_state: expected fp32 [S, r], where an RnnMarkovHead keeps its state between positions, got None")
    draft._check_head(head, head_state, width, hidden_size, first_draft, slots, device)
    common = (base_logits, slots, rows, sampling, confidence)
    if block is None:
        if position:
            raise ValueError(f"block: expected the block of position 0 at position {position}, got None")
        column = 0
        block = allocate(*common, keep_logits=keep_logits, scattered=state_indices is not None, draft_to_target=draft_to_target)
    else:
        column = check_out(block, *common, first_draft, draft_to_target=draft_to_target)
    dense = block.proposal if isinstance(block.proposal, DenseProposal) else None
    fields = _fields(rows, shard, _lse(block) is not None)
    part = fields.check_part(out, device)
    if rows == 0:
        return part, block
    weight, bias = draft._mixing(head)
    counters, scratch = _lend(workspace, rows, drafts, width, head, weight, device)
    _draft_block_partial(
        base_logits,
        anchors,
        anchor_positions,
        None if head is None else head.w1,
        None if head is None else head.w2,
        None if head is None else head.w2_scale,
        weight,
        bias,
        None if weight is None else hidden,
        *flatten(sampling),
        draft_to_target,
        state_indices,
        block.tokens,
        None if dense is None else dense.logits,
        head_state,
        part,
        counters,
        scratch,
        _lse(block) is not None,
        shard.start,
        shard.count,
        shard.vocab,
        targets,
        position,
        first_draft,
        column,
        noise == "coupled",
    )
    return part, block


def draft_block_finish(
    gathered: Tensor,
    block: DraftBlock,
    anchors: Tensor,
    head: MarkovHead | None = None,
    *,
    position: int | None = None,
    vocab_start: int,
    vocab_shards: int,
    vocab_size: int | None = None,
    sampling: SamplingTensors | None = None,
    hidden: Tensor | None = None,
    confidence: ConfidenceHead | None = None,
    candidates: int | None = None,
    base_logits: Tensor | None = None,
    anchor_positions: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    head_state: Tensor | None = None,
    noise: str = "draft",
    first_draft: int = 0,
    state_indices: Tensor | None = None,
    num_drafts: int | None = None,
    workspace: workspaces.Workspace | None = None,
) -> DraftBlock:
    """Draft `position`, or with `candidates` all drafts, from the parts of all ranks, in one launch, the same bits on every rank.

    Args:
        gathered: int64 [vocab_shards, words], the ranks' parts of this position in the order of their ids.
        block: the block of `draft_block_partial`; its token, lse, confidence and flags of this position are written, with
            `candidates` all of it.
        anchors, head, sampling, hidden, confidence, first_draft, state_indices: as in `draft_block_partial`.
        vocab_start, vocab_shards, vocab_size: as in `draft_block_partial`.
        candidates, and with it base_logits (for its type and sizes), anchor_positions, draft_to_target, head_state, noise: as in
            `draft_block_partial`.
        num_drafts: K of the dense form, where the block has more columns than that (default: the columns of block.tokens).
        workspace: scratch memory, for `candidates`.

    Returns:
        block.
    """
    check_type("block", block, DraftBlock)
    if candidates is not None:
        _check_no_position(position)
        return _finish_candidates(
            gathered, block, base_logits, anchors, head, anchor_positions=anchor_positions, vocab_start=vocab_start,
            vocab_shards=vocab_shards, vocab_size=vocab_size, sampling=sampling, hidden=hidden, confidence=confidence,
            candidates=candidates, draft_to_target=draft_to_target, head_state=head_state, noise=noise, first_draft=first_draft,
            state_indices=state_indices, workspace=workspace,
        )  # fmt: skip
    device = anchors.device
    slots, columns = block.tokens.shape
    rows = block.flags.shape[0]
    drafts = columns if num_drafts is None else check_int("num_drafts", num_drafts, low=1, high=columns)
    column = 0 if columns == drafts else first_draft
    _check_position(position, drafts)
    check_tensor("block.tokens", block.tokens, device=device)
    check_tensor("anchors", anchors, shape=(slots,))
    check_optional("state_indices", state_indices, dtype=torch.int32, shape=(rows,), device=device, contiguous=True)
    if sampling is not None:
        check_type("sampling", sampling, SamplingTensors)
        check_tensor("sampling.temperature", sampling.temperature, shape=(slots,), device=device)
    if head is not None:
        check_type("head", head, MarkovHead)
    hidden_size = draft._check_hidden(hidden, None, confidence, rows, drafts, device)
    draft._check_confidence(confidence, hidden_size, head, drafts, first_draft, device)
    lse = _lse(block)
    if lse is not None and sampling is None:
        raise ValueError("sampling: expected the temperatures that block.proposal.lse is to be scaled by, got None")
    check_int("vocab_shards", vocab_shards, low=1)
    if isinstance(block.proposal, DenseProposal):
        shard = check_shard(block.proposal.logits.shape[2], vocab_start, vocab_shards, vocab_size)
    else:
        shard = Shard(vocab_start, 1, vocab_shards, 1)  # what comes after words depends on the width, and nothing comes
    _fields(rows, shard, lse is not None).check_gathered("gathered", gathered, shard, device)
    if rows == 0:
        return block
    _draft_block_finish(
        gathered,
        anchors,
        None if head is None else head.w1,
        hidden if confidence is not None else None,
        None if confidence is None else confidence.weight,
        None if confidence is None else confidence.bias,
        None if confidence is None else confidence.sts_temperatures,
        None if sampling is None else sampling.temperature,
        state_indices,
        block.tokens,
        block.confidence,
        block.confidence_logits,
        lse,
        block.flags,
        shard.width,
        shard.count,
        position,
        first_draft,
        column,
    )
    return block


def _finish_candidates(
    gathered, block, base_logits, anchors, head, *, anchor_positions, vocab_start, vocab_shards, vocab_size, sampling, hidden,
    confidence, candidates, draft_to_target, head_state, noise, first_draft, state_indices, workspace,
):  # fmt: skip
    rows, drafts, width = draft._check_inputs(base_logits, anchors, anchor_positions, state_indices)
    device, slots = base_logits.device, anchors.shape[0]
    shard = check_shard(width, vocab_start, vocab_shards, vocab_size)
    check_choice("noise", noise, ("draft", "coupled"))
    check_int("first_draft", first_draft, low=0)
    check_optional("draft_to_target", draft_to_target, dtype=torch.int64, shape=(width,), device=device, contiguous=True)
    targets = draft._check_sampling(sampling, head, draft_to_target, slots, drafts, shard.vocab, device)
    hidden_size = draft._check_hidden(hidden, head, confidence, rows, drafts, device)
    w2_rows = candidate_shards.check_candidates(head, candidates, shard, device)
    draft._check_head(head, head_state, w2_rows, hidden_size, first_draft, slots, device)
    draft._check_confidence(confidence, hidden_size, head, drafts, first_draft, device)
    return candidate_shards.finish(
        gathered, block, base_logits, anchors, head, draft._mixing(head), anchor_positions=anchor_positions, shard=shard,
        sampling=sampling, hidden=hidden, confidence=confidence, candidates=candidates, draft_to_target=draft_to_target,
        targets=targets, first_draft=first_draft, head_state=head_state, noise=noise, state_indices=state_indices,
        workspace=workspace,
    )  # fmt: skip


def _check_no_position(position):
    if position is not None:
        raise ValueError(f"position: expected None with `candidates`, whose one gather is for all positions, got {position}")


def _check_position(position, drafts):
    check_int("position", position, low=0, high=drafts - 1)


def _check_filters(sampling):
    why = (
        "of the dense form: a threshold is searched for over the whole row, which no rank has, so it would take a gather for each "
        "step of the search, or of whole rows; `candidates` filters after one gather"
    )
    needs_no(PARTIAL, sampling, ("top_k", "top_p", "min_p"), why)


def _lend(workspace, rows, drafts, width, head, weight, device):
    if weight is None:
        return workspaces.lend(PARTIAL, workspace, rows, drafts, width, device)
    counters, _ = _needs(rows, drafts, width)
    scratch = workspaces.latent_words(rows, 1, head.rank, weight.shape[0] // head.rank)
    message = f"expected room for {rows} requests x {drafts} drafts over {width} ids and markov_rank={head.rank}"
    return workspaces.lend_words(workspace, counters, scratch, device, message)


def _stride(tensor, dim):
    return 0 if tensor is None else tensor.stride(dim)


@library.register(
    "draft_block_partial(Tensor base_logits, Tensor anchors, Tensor anchor_positions, Tensor? w1, Tensor? w2, "
    f"Tensor? w2_scale, Tensor? mix_weight, Tensor? mix_bias, Tensor? hidden, {SCHEMA}, Tensor? draft_to_target, "
    "Tensor? state_indices, Tensor tokens, Tensor(a!)? logits, Tensor(b!)? head_state, Tensor(c!) part, Tensor(d!) counters, "
    "Tensor(e!) scratch, bool with_lse, int vocab_start, int vocab_shards, int vocab_size, int targets, int position, "
    "int first_draft, int column, bool coupled) -> ()"
)
def _draft_block_partial(
    base_logits, anchors, anchor_positions, w1, w2, w2_scale, mix_weight, mix_bias, hidden, temperature, seed, top_k, top_p, min_p,
    logit_bias, token_bitmask, listed, counts, repetition, presence, frequency, joint, draft_to_target, state_indices, tokens,
    logits, head_state, part, counters, scratch, with_lse, vocab_start, vocab_shards, vocab_size, targets, position, first_draft,
    column, coupled,
):  # fmt: skip
    device = base_logits.device
    kernels = library.kernels("draft.shards", device)
    rows, drafts, width = base_logits.shape
    shard = Shard(vocab_start, width, vocab_shards, vocab_size)
    gpu = arch.current(device)
    sampling = Flat(
        temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed, counts, repetition, presence, frequency, joint
    )
    adjust = adjust_settings(sampling) if sampling.adjusts else None
    request_tile = draft_launch.request_tile(rows, sampling.adjusts)
    one_tile = rows <= request_tile
    units = shard.blocks(draft.UNIT)
    head, dot_type, widening = draft.head_record(w1, w2, w2_scale)
    rank = 1 if head is None else head.rank
    # As for the whole vocabulary: how many ranks a dot takes is part of what its sums are.
    ranks = draft_launch.ranks_per_dot(mix_weight is not None, w2_scale is not None, sampling.adjusts)
    config = draft_launch.pick(gpu, units * draft.UNIT, rank, dot_type.itemsize, one_tile, ranks)
    if mix_weight is not None and gpu.vendor == "amd":
        config = dataclasses.replace(config, num_stages=1)  # with more, an rnn head with settings spills on gfx950
    if widening == "fp8":
        widening = "fp8_by_cast" if config.native_fp8 else "fp8_by_bits"
    carver = workspaces.Carver(scratch)
    kind, mixer, mix_type = draft.mixer_record(
        w1, mix_weight, mix_bias, hidden, head_state, rows, rows, 2 * rows, dot_type, carver
    )  # fmt: skip
    clean = workspaces.Carver(counters, workspaces.RESERVED)
    counted = ShardCounters(
        best_ptr=clean.take(rows, torch.int64),
        seen_ptr=clean.take(rows, torch.int32),
        arrivals_ptr=counters[1:2].view(torch.int32),
        barrier_ptr=counters[:1].view(torch.int32),
    )
    view = _fields(rows, shard, with_lse).view
    own = ShardPart(
        words_ptr=view(part, "words"),
        status_ptr=view(part, "status"),
        unit_max_ptr=view(part, "unit_max"),
        unit_sumexp_ptr=view(part, "unit_mass"),
    )
    kernels.launch_draft_partial(
        min(-(-units * draft.UNIT // config.block_v), gpu.multiprocessors * config.programs_per_sm),
        (
            ShardInputs(base_ptr=base_logits, anchors_ptr=anchors, positions_ptr=anchor_positions, map_ptr=draft_to_target),
            head, mixer, adjust,
            ShardTensors(
                hidden_ptr=hidden, temperature_ptr=temperature, seed_ptr=seed, slots_ptr=state_indices, tokens_ptr=tokens,
                logits_ptr=logits,
            ),
            own, counted,
        ),
        (
            position, rows, anchors.shape[0], drafts, targets, shard.start, shard.held, width, shard.start // draft.UNIT, units,
            0 if hidden is None else hidden.shape[2], first_draft, column,
            ShardStrides(
                base_request=base_logits.stride(0), base_position=base_logits.stride(1), anchors=anchors.stride(0),
                positions=anchor_positions.stride(0), hidden_request=_stride(hidden, 0), hidden_position=_stride(hidden, 1),
                tokens=tokens.stride(0), logits=_stride(logits, 0), logits_position=_stride(logits, 1),
            ),
        ),
        mixer=kind,
        widening=widening,
        dot_type=draft._name(dot_type),
        mix_type=draft._name(mix_type),
        coupled=coupled,
        one_tile=one_tile,
        rows=request_tile,
        config=config,
    )  # fmt: skip


@library.register(
    "draft_block_finish(Tensor gathered, Tensor anchors, Tensor? w1, Tensor? hidden, Tensor? weight, Tensor? bias, "
    "Tensor? sts_temperatures, Tensor? temperature, Tensor? state_indices, Tensor(a!) tokens, Tensor(b!)? confidence, "
    "Tensor(c!)? confidence_logits, Tensor(d!)? lse, Tensor(e!) flags, int width, int vocab_shards, int position, "
    "int first_draft, int column) -> ()"
)
def _draft_block_finish(
    gathered, anchors, w1, hidden, weight, bias, sts_temperatures, temperature, state_indices, tokens, confidence,
    confidence_logits, lse, flags, width, vocab_shards, position, first_draft, column,
):  # fmt: skip
    kernels = library.kernels("draft.shards", tokens.device)
    rows = flags.shape[0]
    shard = Shard(0, width, vocab_shards, width * vocab_shards)
    hidden_size = 0 if hidden is None else hidden.shape[2]
    head = None
    if w1 is not None:
        head = Head(
            w1_ptr=w1, w2_ptr=None, scale_ptr=None, stride_w1=w1.stride(0), stride_w2=0, vocab=w1.shape[0], rank=w1.shape[1]
        )  # fmt: skip
    view = _fields(rows, shard, lse is not None).view
    parts = GatheredParts(
        words_ptr=view(gathered, "words"),
        status_ptr=view(gathered, "status"),
        unit_max_ptr=view(gathered, "unit_max"),
        unit_sumexp_ptr=view(gathered, "unit_mass"),
    )
    kernels.launch_draft_finish(
        rows,
        (
            parts, anchors, head, hidden,
            draft.confidence_record(weight, bias, sts_temperatures, confidence, confidence_logits),
            FinishTensors(
                temperature_ptr=temperature, slots_ptr=state_indices, tokens_ptr=tokens, lse_ptr=lse, flags_ptr=flags
            ),
            position, rows, tokens.shape[0],
            FinishWidths(shards=vocab_shards, num_units=shard.blocks(draft.UNIT), hidden=hidden_size),
            first_draft, column, gathered.stride(0), 2 * gathered.stride(0),
            FinishStrides(
                anchors=anchors.stride(0), hidden_request=_stride(hidden, 0), hidden_position=_stride(hidden, 1),
                tokens=tokens.stride(0), lse=_stride(lse, 0),
            ),
        ),
        with_markov=weight is not None and weight.shape[0] > hidden_size,
        shards=1 << (vocab_shards - 1).bit_length(),
    )  # fmt: skip
