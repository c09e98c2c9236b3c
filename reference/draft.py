"""draft_block as in the paper: positions left to right, each after the token drafted before it.

    q_k(v) = softmax over v of (U_k(v) + B_k(v)) / T,  x_k ~ q_k (greedy: its arg-max),  x_0 = the anchor

The token is chosen from the sum as it is stored: fp64 here, rounded once to the logits' dtype. Symbols: R requests, S slots, K
positions, V vocabulary. Source: DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dspark_kernels.types import ConfidenceHead, DenseProposal, DraftBlock, MarkovHead, OneHotProposal, SamplingTensors

from .candidates import CandidateRows
from .decisions import Decisions
from .draft_positions import DraftCall, Place, Row, draft_positions
from .logits import read_logits, refuse_repeated, target_ids


class DenseRows:
    """Rows [V] of all ids of a call."""

    filters_by_id = False

    def __init__(self, call: DraftCall):
        self._call, self.width = call, call.base_logits.shape[2]
        self._order = self._ids = None
        if call.draft_to_target is not None:
            # In the order of the target's ids, which decides ties; entries that stand for no token are left out.
            order = torch.argsort(call.draft_to_target, stable=True)
            self._order = order[~call.unused[order]]
            self._ids = call.draft_to_target[self._order]

    def at(self, place: Place, bias: Tensor | float) -> Row:
        total = self._call.base_logits[place.request, place.k].double() + bias
        total = self._call.settled(total, place.slot, place.k, place.path)
        return Row(total, read_logits(total)[1], self._order, self._ids)

    def proposal(self, logits: Tensor, lse: Tensor):
        call = self._call
        if call.sampling is not None:
            return DenseProposal(logits, lse=lse, draft_to_target=call.draft_to_target)
        if call.keep_logits:
            greedy = torch.zeros(logits.shape[0], device=logits.device)
            return DenseProposal(logits, temperature=greedy, draft_to_target=call.draft_to_target)
        return OneHotProposal()


def draft_block(
    base_logits: Tensor,
    anchors: Tensor,
    head: MarkovHead | None = None,
    *,
    anchor_positions: Tensor,
    sampling: SamplingTensors | None = None,
    hidden: Tensor | None = None,
    confidence: ConfidenceHead | None = None,
    candidates: int | None = None,
    bigrams: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    vocab_size: int | None = None,
    first_draft: int = 0,
    head_state: Tensor | None = None,
    noise: str = "draft",
    state_indices: Tensor | None = None,
    keep_logits: bool = False,
    out: DraftBlock | None = None,
    workspace=None,
    stored_logits: Tensor | None = None,
    decisions: Decisions | None = None,
) -> DraftBlock:
    """The op's arguments and result (dspark_kernels.ops.draft), plus:

    stored_logits: [R, K, V], with candidates [R, K, C + B], the sums that a kernel stored, before filters; support and tokens are
    then chosen from these bits. decisions: records margins.
    """
    for name, value in (("out", out), ("workspace", workspace)):
        if value is not None:
            raise ValueError(f"{name}: expected None, the reference allocates its results, got {type(value).__name__}")
    unused = None
    if draft_to_target is not None:
        refuse_repeated(draft_to_target, target_ids(head, sampling))
        unused = (draft_to_target < 0) | (draft_to_target >= target_ids(head, sampling))
    if sampling is not None and sampling.token_bitmask is not None:  # [S, K, words]
        sampling = dataclasses.replace(sampling, token_bitmask=sampling.token_bitmask.flatten(0, 1))
    call = DraftCall(
        base_logits=base_logits[:, :, :vocab_size],
        anchors=anchors,
        anchor_positions=anchor_positions,
        head=head,
        sampling=sampling,
        hidden=hidden,
        confidence=confidence,
        draft_to_target=draft_to_target,
        unused=unused,
        first_draft=first_draft,
        head_state=head_state,
        noise=noise,
        state_indices=state_indices,
        keep_logits=keep_logits,
        stored_logits=stored_logits,
        decisions=Decisions() if decisions is None else decisions,
    )
    return draft_positions(call, DenseRows(call) if candidates is None else CandidateRows(call, candidates, bigrams))
