"""accept_partial, accept_finish: lossless acceptance where every rank has the logits of a shard of the vocabulary.

Acceptance runs in phases: each is one launch per rank, followed by one gather; the finish is one launch, the same on every rank.
Reference: the op on the whole vocabulary; the results are equal to the bit where shards start at multiples of 1024 ids.
Sources: arXiv 2211.17192, 2302.01318, 2408.07978.

    gathered = ()
    for phase in accept_phases(proposal, sampling=sampling, rule=rule):
        part = accept_partial(target_logits, layout, proposal, phase=phase, gathered=gathered, **common)
        gathered += (all_gather(part),)
    acceptance = accept_finish(target_logits, layout, proposal, gathered=gathered, **common)

| rows, rule | gathers | int64 words per rank: (n)ormalise, (r)esidual, (d)raw |
| --- | --- | --- |
| greedy (sampling=None), coupled | 1 | n: 5 per row |
| token, block; one-hot proposal or none | 2 | n: 5 per row and 1.5 per block of each; d: 3 per request |
| token, block; sparse proposal, the same on every rank | 2 | n: 7 and 0.5 per candidate of each row, 2.5 per block; d: the same |
| token, block; dense proposal | 3 | the same (without lse 3 per block); r: 1 per block of one row a request (block: of every row) |

Rows are logit rows, blocks those of 1024 ids that a shard can touch: a row of 151936 ids on 8 ranks has 20, 280 bytes a rank, and
with 64 candidates 712. Bias, bit mask and penalties take no gather: each rank applies them to its ids.

Filters are refused. The threshold of a row is global: it would take the maxima of max-groups (128 ids, 0.5 word each, so 75 words a
row on 8 ranks) in the first part, a phase that searches the elements above their bound (counts and sums per interval of keys from
each rank, two or three gathers to fix 32 bits), and one more phase for the sums over the support, before `draw`. A draft
vocabulary with a map is refused: the columns of its ids lie on other ranks than the ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import workspace as workspaces
from ...checks import check_choice, check_tensor, check_type, not_yet
from ...choices import CHAIN_RULES, PHASES, ChainRule, Phase
from ...types import Acceptance, DenseProposal, OneHotProposal, Proposal, SamplingTensors, SparseProposal, VerifyLayout
from .. import sampling as sampling_args
from ..shards import Fields, Shard, check_shard
from . import chain as accept
from .checks import check_anchors, check_rows, drafts_of, emitted, layout_arrays, needs_logits, output
from .shard_launches import (
    OP,
    DraftArguments,
    FinishArguments,
    PartialArguments,
    accept_finish as _accept_finish,
    accept_partial as _accept_partial,
    fields_of,
)


def accept_phases(
    proposal: OneHotProposal | DenseProposal | SparseProposal | None = None,
    *,
    sampling: SamplingTensors | None = None,
    rule: ChainRule = "token",
) -> tuple[Phase, ...]:
    """The names of the phases of `accept_partial`, in their order; each is one launch and one gather. Launches nothing."""
    check_choice("rule", rule, CHAIN_RULES)
    if sampling is None or rule == "coupled":
        return PHASES[:1]
    return PHASES if isinstance(proposal, DenseProposal) else (PHASES[0], PHASES[2])


def accept_partial(
    target_logits: Tensor,
    layout: VerifyLayout,
    proposal: OneHotProposal | DenseProposal | SparseProposal | None = None,
    *,
    phase: Phase,
    gathered: tuple[Tensor, ...] = (),
    vocab_start: int,
    vocab_shards: int,
    vocab_size: int | None = None,
    sampling: SamplingTensors | None = None,
    rule: ChainRule = "token",
    target_scaled: bool = False,
    state_indices: Tensor | None = None,
    out: Tensor | None = None,
    workspace: workspaces.Workspace | None = None,
) -> Tensor:
    """This rank's part of a phase, in one launch.

    Args:
        target_logits: [L, W] bf16, fp16 or fp32: this rank's columns, the same W on every rank. Columns of ids from vocab_size on
            are ignored.
        layout, sampling, rule, target_scaled, state_indices: as in `accept_chain`, the same on every rank, for all of the vocabulary.
        proposal: as in `accept_chain`; dense: this rank's columns of the logits [S, K, W], lse of whole rows; sparse: the same on
            every rank.
        phase: one of `accept_phases(proposal, sampling=sampling, rule=rule)`.
        gathered: for each phase before this one, the parts of all ranks: int64 [vocab_shards, words].
        vocab_start, vocab_shards, vocab_size: first id of this rank, number of ranks, ids in all (default W * vocab_shards).
        out: int64 part to write. Elements that no rank reads (rows of no request, residuals that are not needed) keep their values.
        workspace: made for the whole vocabulary if the proposal is sparse, else for a shard.

    Returns:
        The part, int64 [words], to be gathered over ranks into [vocab_shards, words], in the order of their ids.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument of the wrong type, dtype, shape, device or stride, or of a kind that
            shards do not have (filters, reduced draft vocabularies).
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    if target_scaled:
        sampling, proposal = sampling_args.of_scaled_target(sampling, proposal)
    call = _check(target_logits, layout, proposal, vocab_start, vocab_shards, vocab_size, sampling, rule, state_indices)
    device = target_logits.device
    check_choice("phase", phase, call.phases)
    call.check_gathered(gathered, call.phases.index(phase))
    part = call.fields(phase).check_part(out, device)
    if call.requests == 0:
        return part
    lent = call.lend(workspace)
    arguments = PartialArguments(
        target_logits=target_logits,
        cu_num_logits=layout.cu_num_logits,
        logits_indices=layout.logits_indices,
        token_ids=layout.token_ids,
        positions=layout.positions,
        draft=call.draft,
        sampling=sampling_args.flatten(sampling),
        state_indices=state_indices,
        gathered=list(gathered),
        part=part,
        lent=lent,
        requests=call.requests,
        drafts=call.drafts,
        phase=phase,
        rule=rule if call.draws else "match",
        shard=call.shard,
    )
    _accept_partial(arguments)
    return part


def accept_finish(
    target_logits: Tensor,
    layout: VerifyLayout,
    proposal: OneHotProposal | DenseProposal | SparseProposal | None = None,
    *,
    gathered: tuple[Tensor, ...],
    vocab_start: int,
    vocab_shards: int,
    vocab_size: int | None = None,
    sampling: SamplingTensors | None = None,
    rule: ChainRule = "token",
    target_scaled: bool = False,
    anchors: Tensor | None = None,
    anchor_positions: Tensor | None = None,
    state_indices: Tensor | None = None,
    out: Acceptance | None = None,
    workspace: workspaces.Workspace | None = None,
) -> Acceptance:
    """What every request emits, from the parts of all ranks, in one launch. Every rank gets the same bits.

    Args:
        gathered: int64 [vocab_shards, words] of every phase, in the order of `accept_phases`.
        anchors, anchor_positions: as in `accept_chain`, advanced in place; both or neither.
        out: an Acceptance to write.
        The rest, and the errors: as in `accept_partial`. The elements of target_logits are not read.

    Returns:
        Acceptance.
    """
    if target_scaled:
        sampling, proposal = sampling_args.of_scaled_target(sampling, proposal)
    call = _check(target_logits, layout, proposal, vocab_start, vocab_shards, vocab_size, sampling, rule, state_indices)
    device, slots = target_logits.device, call.slots
    call.check_gathered(gathered, len(call.phases))
    check_anchors(anchors, anchor_positions, slots, device)
    out = output(out, call.requests, call.drafts + 1, layout.token_ids.shape[0], device)
    if call.requests == 0:
        return out
    by_slot = [t for t in (None if sampling is None else sampling.temperature, anchors, anchor_positions) if t is not None]
    scratch = call.lend(workspace).scratch
    arguments = FinishArguments(
        gathered=list(gathered),
        layout=layout_arrays(layout),
        draft=call.draft,
        temperature=None if sampling is None else sampling.temperature,
        state_indices=state_indices,
        emitted=emitted(out),
        commit_mask=out.commit_mask,
        flags=out.flags,
        anchors=anchors,
        anchor_positions=anchor_positions,
        scratch=scratch,
        slots=by_slot[0].shape[0] if by_slot else 2**31 - 1,  # without any, a slot number is not used to reach memory
        rows=call.rows,
        shard=call.shard,
        rule=rule if call.draws else "match",
    )
    _accept_finish(arguments)
    return out


def part_words(
    target_logits: Tensor,
    layout: VerifyLayout,
    proposal: Proposal | None = None,
    *,
    phase: Phase,
    vocab_start: int,
    vocab_shards: int,
    vocab_size: int | None = None,
    sampling: SamplingTensors | None = None,
    rule: ChainRule = "token",
    state_indices: Tensor | None = None,
) -> int:
    """Size of the part of a phase: int64 words, the same on every rank."""
    call = _check(target_logits, layout, proposal, vocab_start, vocab_shards, vocab_size, sampling, rule, state_indices)
    return call.fields(check_choice("phase", phase, call.phases)).words


class _Call:
    """The sizes of a call."""

    def __init__(
        self,
        requests: int,
        rows: int,
        drafts: int,
        slots: int | None,
        shard: Shard,
        proposal: DenseProposal | SparseProposal | None,
        phases: tuple[Phase, ...],
        rule: ChainRule,
        device: torch.device,
    ) -> None:
        self.requests, self.rows, self.drafts, self.slots = requests, rows, drafts, slots
        self.shard, self.phases, self.draws = shard, phases, len(phases) > 1
        self._proposal, self._rule, self._device = proposal, rule, device
        self._candidates = proposal.ids.shape[2] if isinstance(proposal, SparseProposal) else 0

    def fields(self, phase: str) -> Fields:
        sums = isinstance(self._proposal, DenseProposal) and self._proposal.lse is None
        return fields_of(phase, self.requests, self.rows, self.shard, self.draws, sums, self._rule == "block", self._candidates)

    @property
    def draft(self) -> DraftArguments:
        drawn = self._proposal
        if drawn is None:
            return DraftArguments(None, None, None, None)
        if isinstance(drawn, SparseProposal):
            return DraftArguments(drawn.logits, drawn.ids, None, drawn.temperature)
        return DraftArguments(drawn.logits, None, drawn.lse, drawn.temperature)

    def lend(self, workspace: workspaces.Workspace | None) -> workspaces.Lent:
        requests = max(self.requests, -(-self.rows // (self.drafts + 1)))
        vocab = max(self.shard.width, self.shard.vocab) if self._candidates else self.shard.width
        return workspaces.lend(OP, workspace, requests, self.drafts, vocab, self._device)

    def check_gathered(self, gathered: Sequence[Tensor], count: int) -> None:
        check_type("gathered", gathered, (tuple, list))
        if len(gathered) != count:
            raise ValueError(f"gathered: expected the parts of {count} phases, {self.phases[:count]}, got {len(gathered)}")
        for n, phase in enumerate(self.phases[:count]):
            self.fields(phase).check_gathered(f"gathered[{n}]", gathered[n], self.shard, self._device)


def _check(
    target_logits: Tensor,
    layout: VerifyLayout,
    proposal: Proposal | None,
    vocab_start: int,
    vocab_shards: int,
    vocab_size: int | None,
    sampling: SamplingTensors | None,
    rule: ChainRule,
    state_indices: Tensor | None,
) -> _Call:
    requests = check_rows(target_logits, layout, state_indices, columns="W")
    rows, width = target_logits.shape
    device = target_logits.device
    if width == 0:
        raise ValueError(f"target_logits: expected L >= 1 and W >= 1, got shape {list(target_logits.shape)}")
    shard = check_shard(width, vocab_start, vocab_shards, vocab_size)
    phases = accept_phases(proposal, sampling=sampling, rule=rule)
    slots = requests if state_indices is None else None
    if sampling is not None:
        sampling_args.check_sampling(sampling, slots=slots, vocab=shard.vocab, mask_shape=(rows,), device=device)
        for name in ("top_k", "top_p", "min_p"):
            if getattr(sampling, name) is not None:
                not_yet(OP, f"sampling.{name}", "filters on vocabulary shards are")
        slots = sampling.temperature.shape[0]
    drawn = _check_proposal(proposal, slots, width, device)
    drafts = drafts_of(layout, None if drawn is None else drawn.logits, rows)
    if len(phases) == 1:
        drawn = None  # greedy and coupled rows do not ask how a draft was drawn
    return _Call(requests, rows, drafts, slots, shard, drawn, phases, rule, device)


def _check_proposal(
    proposal: Proposal | None, slots: int | None, width: int, device: torch.device
) -> DenseProposal | SparseProposal | None:
    if proposal is None or isinstance(proposal, OneHotProposal):
        return None
    check_type("proposal", proposal, (DenseProposal, SparseProposal))
    if isinstance(proposal, SparseProposal):
        return accept._check_proposal(proposal, slots, device)
    needs_logits(OP, proposal)
    if proposal.draft_to_target is not None:
        not_yet(OP, "proposal.draft_to_target", "a reduced draft vocabulary on shards is")
    shape = ("S" if slots is None else slots, "K", width)
    check_tensor("proposal.logits", proposal.logits, shape=shape, device=device)
    return proposal
