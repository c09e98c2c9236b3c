"""draft_block_partial, draft_block_finish: the draft block where every rank has a shard of the vocabulary.

Dense form, per position: a part per rank (its best word, and what the log-sum-exp needs), one gather, a finish that is the same on
every rank. With `candidates`: the same once for the whole block (ops/draft/candidate_shards.py). Reference: the op on the whole
vocabulary, to the bit where shards start at multiples of 64 ids, with candidates whatever the cut. Source: DSpark, arXiv
2607.05147.

    block = None
    for k in range(K):
        part, block = draft_block_partial(base_logits, anchors, head, position=k, block=block, **common)
        block = draft_block_finish(all_gather(part), block, anchors, head, position=k, **common)

    part, block = draft_block_partial(base_logits, anchors, head, candidates=C, **common)
    block = draft_block_finish(all_gather(part), block, anchors, head, candidates=C, base_logits=base_logits, **common)

| gathered per position, dense | int64 words per rank and request |
| --- | --- |
| greedy, or a proposal without lse | 2: best word (ordered key, inverted id), what the row showed |
| sampled, with lse | 2, and 1.5 per sub-block of 64 ids: sum of exponentials and maximum |

Without lse acceptance sums the proposal itself (`accept_partial`), at 1.5 words per block of 1024 ids.

A rank has its own rows of what is by id of the head's vocabulary: columns of base logits, W2 and its scales, `draft_to_target`. The
rest is whole on every rank: W1, what mixes latents, hidden states, the confidence head, and by target id bias, mask and penalties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import workspace as workspaces
from ...checks import INT_DTYPES, check_choice, check_int, check_optional, check_tensor, check_type, not_yet
from ...choices import NOISES, Noise
from ...types import ConfidenceHead, DenseProposal, DraftBlock, MarkovHead, RnnMarkovHead, SamplingTensors
from ..sampling import flatten, needs_no
from ..shards import Shard, check_shard
from . import candidate_shards, dense as draft
from .args import MixedHead, confidence_weights, has_latents, latent_room, weights_of
from .outputs import allocate, check_out
from .shard_launches import (
    OP,
    FinishArguments,
    PartialArguments,
    draft_block_finish as _draft_block_finish,
    draft_block_partial as _draft_block_partial,
    fields_of,
)


def part_words(requests: int, width: int, with_lse: bool) -> int:
    """Size of a part: int64 words, the same on every rank of `width` columns."""
    return fields_of(requests, Shard(0, width, 1, width), with_lse).words


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
    noise: Noise = "draft",
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
        position: 0 .. K - 1; the drafts before it are read from `block`. None with `candidates`.
        vocab_start, vocab_shards, vocab_size: first id of this rank, number of ranks, ids in all (default W * vocab_shards).
        block: what the call at position 0 returned, or a DraftBlock to write, whose proposal has this rank's columns
            [S, K, W] (with `candidates` all of [S, K, C]). None allocates one, at position 0 only.
        sampling: as in `draft_block`, for the whole vocabulary on every rank. Filters need `candidates`: in the dense form no rank
            has a whole row to find their threshold in.
        confidence: as in `draft_block`; needed where the block is to have confidences.
        candidates: restrict each position to its C best base logits, as in `draft_block`.
        bigrams: refused on shards. The successors are known only after the draft before them, so they would need a gather per
            position.
        draft_to_target: int64 [W], this rank's entries; the dense proposal needs the same.
        head_state: fp32 [S, r], the state of an rnn head. The dense form needs it: it keeps the state between positions, and each
            call advances it. With `candidates` the finish advances it.
        out: int64 part to write.

    Returns:
        (part, block). part: int64 [words], to be gathered over ranks into [vocab_shards, words], in the order of their ids.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument of the wrong type, dtype, shape, device or stride, or of a kind that
            shards do not have (filters in the dense form, bigrams).
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    rows, drafts, shard, targets = _check_call(
        base_logits, anchors, anchor_positions, head, sampling, draft_to_target, state_indices, noise, first_draft, vocab_start,
        vocab_shards, vocab_size,
    )  # fmt: skip
    device, slots = base_logits.device, anchors.shape[0]
    if bigrams is not None:
        not_yet(OP, "bigrams", "successors of a draft, which no rank knows when it makes its part, are")
    if candidates is not None:
        _check_no_position(position)
        return candidate_shards.partial(
            base_logits, slots, head, shard=shard, block=block, sampling=sampling, confidence=confidence, candidates=candidates,
            draft_to_target=draft_to_target, targets=targets, first_draft=first_draft, state_indices=state_indices,
            keep_logits=keep_logits, out=out, workspace=workspace,
        )  # fmt: skip
    position = _check_position(position, drafts)
    _check_filters(sampling)
    hidden_size = draft._check_hidden(hidden, head, None, rows, drafts, device)
    if isinstance(head, RnnMarkovHead) and head_state is None:
        raise ValueError("head_state: expected fp32 [S, r], where an RnnMarkovHead keeps its state between positions, got None")
    draft._check_head(head, head_state, shard.width, hidden_size, first_draft, slots, device)
    common = (base_logits, slots, rows, sampling, confidence)
    if block is None:
        if position:
            raise ValueError(f"block: expected the block of position 0 at position {position}, got None")
        column = 0
        block = allocate(*common, keep_logits=keep_logits, scattered=state_indices is not None, draft_to_target=draft_to_target)
    else:
        column = check_out(block, *common, first_draft, draft_to_target=draft_to_target)
    dense = block.proposal if isinstance(block.proposal, DenseProposal) else None
    fields = fields_of(rows, shard, _lse(block) is not None)
    part = fields.check_part(out, device)
    if rows == 0:
        return part, block
    room = latent_room(head, rows, 1)
    lent = workspaces.lend(OP, workspace, rows, drafts, shard.width, device, **room)
    arguments = PartialArguments(
        base_logits=base_logits,
        anchors=anchors,
        anchor_positions=anchor_positions,
        head=MixedHead(*weights_of(head)),
        hidden=hidden if has_latents(head) else None,
        sampling=flatten(sampling),
        draft_to_target=draft_to_target,
        state_indices=state_indices,
        tokens=block.tokens,
        logits=None if dense is None else dense.logits,
        head_state=head_state,
        part=part,
        lent=lent,
        with_lse=_lse(block) is not None,
        shard=shard,
        targets=targets,
        position=position,
        first_draft=first_draft,
        column=column,
        coupled=noise == "coupled",
    )
    _draft_block_partial(arguments)
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
    noise: Noise = "draft",
    first_draft: int = 0,
    state_indices: Tensor | None = None,
    num_drafts: int | None = None,
    workspace: workspaces.Workspace | None = None,
) -> DraftBlock:
    """Draft `position`, or with `candidates` all drafts, from the parts of all ranks, in one launch. Every rank gets the same bits.

    Args:
        gathered: int64 [vocab_shards, words], the ranks' parts of this position in the order of their ids.
        block: the block of `draft_block_partial`. Its token, lse, confidence and flags of this position are written; with
            `candidates`, all of it.
        anchors, head, sampling, hidden, confidence, first_draft, state_indices: as in `draft_block_partial`.
        vocab_start, vocab_shards, vocab_size: as in `draft_block_partial`.
        candidates, base_logits, anchor_positions, draft_to_target, head_state, noise: with `candidates` only, as in
            `draft_block_partial`. Of base_logits only dtype and sizes are used.
        num_drafts: K of the dense form, where the block has more columns than K; default: the columns of block.tokens.
        workspace: scratch memory, for `candidates`.

    Returns:
        block.
    """
    check_type("block", block, DraftBlock)
    if candidates is not None:
        _check_no_position(position)
        return _finish_candidates(
            gathered, block, check_tensor("base_logits", base_logits), anchors, head,
            anchor_positions=check_tensor("anchor_positions", anchor_positions), vocab_start=vocab_start,
            vocab_shards=vocab_shards, vocab_size=vocab_size, sampling=sampling, hidden=hidden, confidence=confidence,
            candidates=candidates, draft_to_target=draft_to_target, head_state=head_state, noise=noise, first_draft=first_draft,
            state_indices=state_indices, workspace=workspace,
        )  # fmt: skip
    device = anchors.device
    slots, columns = block.tokens.shape
    rows = block.flags.shape[0]
    drafts = columns if num_drafts is None else check_int("num_drafts", num_drafts, low=1, high=columns)
    column = 0 if columns == drafts else first_draft
    position = _check_position(position, drafts)
    check_tensor("block.tokens", block.tokens, device=device)
    check_tensor("anchors", anchors, shape=(slots,))
    check_optional("state_indices", state_indices, dtype=INT_DTYPES, shape=(rows,), device=device, contiguous=True)
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
    fields_of(rows, shard, lse is not None).check_gathered("gathered", gathered, shard, device)
    if rows == 0:
        return block
    arguments = FinishArguments(
        gathered=gathered,
        anchors=anchors,
        w1=None if head is None else head.w1,
        hidden=hidden if confidence is not None else None,
        confidence_head=confidence_weights(confidence),
        temperature=None if sampling is None else sampling.temperature,
        state_indices=state_indices,
        tokens=block.tokens,
        confidence=block.confidence,
        confidence_logits=block.confidence_logits,
        lse=lse,
        flags=block.flags,
        shard=shard,
        position=position,
        first_draft=first_draft,
        column=column,
    )
    _draft_block_finish(arguments)
    return block


def _check_call(
    base_logits: Tensor,
    anchors: Tensor,
    anchor_positions: Tensor,
    head: MarkovHead | None,
    sampling: SamplingTensors | None,
    draft_to_target: Tensor | None,
    state_indices: Tensor | None,
    noise: Noise,
    first_draft: int,
    vocab_start: int,
    vocab_shards: int,
    vocab_size: int | None,
) -> tuple[int, int, Shard, int]:
    """What the calls with base logits check alike: rows R, drafts K, the shard, and the number of target ids."""
    rows, drafts, width = draft._check_inputs(base_logits, anchors, anchor_positions, state_indices)
    device, slots = base_logits.device, anchors.shape[0]
    shard = check_shard(width, vocab_start, vocab_shards, vocab_size)
    check_choice("noise", noise, NOISES)
    check_int("first_draft", first_draft, low=0)
    check_optional("draft_to_target", draft_to_target, dtype=torch.int64, shape=(width,), device=device, contiguous=True)
    targets = draft._check_sampling(sampling, head, draft_to_target, slots, drafts, shard.vocab, device, columns=shard.held)
    return rows, drafts, shard, targets


def _finish_candidates(
    gathered: Tensor,
    block: DraftBlock,
    base_logits: Tensor,
    anchors: Tensor,
    head: MarkovHead | None,
    *,
    anchor_positions: Tensor,
    vocab_start: int,
    vocab_shards: int,
    vocab_size: int | None,
    sampling: SamplingTensors | None,
    hidden: Tensor | None,
    confidence: ConfidenceHead | None,
    candidates: int,
    draft_to_target: Tensor | None,
    head_state: Tensor | None,
    noise: Noise,
    first_draft: int,
    state_indices: Tensor | None,
    workspace: workspaces.Workspace | None,
) -> DraftBlock:
    rows, drafts, shard, targets = _check_call(
        base_logits, anchors, anchor_positions, head, sampling, draft_to_target, state_indices, noise, first_draft, vocab_start,
        vocab_shards, vocab_size,
    )  # fmt: skip
    device, slots = base_logits.device, anchors.shape[0]
    hidden_size = draft._check_hidden(hidden, head, confidence, rows, drafts, device)
    w2_rows = candidate_shards.check_candidates(head, candidates, shard, device)
    draft._check_head(head, head_state, w2_rows, hidden_size, first_draft, slots, device)
    draft._check_confidence(confidence, hidden_size, head, drafts, first_draft, device)
    return candidate_shards.finish(
        gathered, block, base_logits, anchors, head, anchor_positions=anchor_positions, shard=shard,
        sampling=sampling, hidden=hidden, confidence=confidence, candidates=candidates, draft_to_target=draft_to_target,
        targets=targets, first_draft=first_draft, head_state=head_state, noise=noise, state_indices=state_indices,
        workspace=workspace,
    )  # fmt: skip


def _check_no_position(position: int | None) -> None:
    if position is not None:
        raise ValueError(f"position: expected None with `candidates`, whose one gather is for all positions, got {position}")


def _check_position(position: int | None, drafts: int) -> int:
    return check_int("position", position, low=0, high=drafts - 1)


def _check_filters(sampling: SamplingTensors | None) -> None:
    why = (
        "of the dense form: a threshold is searched for over the whole row, which no rank has, so it would take a gather for each "
        "step of the search, or of whole rows; `candidates` filters after one gather"
    )
    needs_no(OP, sampling, ("top_k", "top_p", "min_p"), why)
