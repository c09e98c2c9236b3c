"""The DraftBlock that a draft op writes: a new one, or the caller's, checked against the call.

Dense: logits [S, K, V]; sparse, with candidates: ids and logits [S, K, C]; one-hot where a greedy call keeps no logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...checks import check_tensor, check_type
from ...types import ConfidenceHead, DenseProposal, DraftBlock, OneHotProposal, Proposal, SamplingTensors, SparseProposal


def allocate(
    base_logits: Tensor,
    slots: int,
    rows: int,
    sampling: SamplingTensors | None,
    confidence: ConfidenceHead | None,
    *,
    keep_logits: bool,
    scattered: bool,
    candidates: int | None = None,
    draft_to_target: Tensor | None = None,
) -> DraftBlock:
    """candidates: entries per position of a sparse proposal. draft_to_target: of a dense one."""
    device, drafts = base_logits.device, base_logits.shape[1]
    # Slots that are not in the batch must hold something defined; without slots every element is written anyway.
    new: Callable[..., Tensor] = torch.zeros if scattered else torch.empty

    def floats() -> Tensor:
        return new(slots, drafts, dtype=torch.float32, device=device)

    proposal: Proposal = OneHotProposal()
    if sampling is not None or keep_logits:
        width = base_logits.shape[2] if candidates is None else candidates
        logits = new(slots, drafts, width, dtype=base_logits.dtype, device=device)
        lse = None if sampling is None else floats()
        temperature = torch.zeros(slots, dtype=torch.float32, device=device) if sampling is None else None
        if candidates is None:
            proposal = DenseProposal(logits, lse, temperature, draft_to_target)
        else:
            proposal = SparseProposal(new(slots, drafts, width, dtype=torch.int64, device=device), logits, lse, temperature)
    return DraftBlock(
        tokens=torch.full((slots, drafts), -1, dtype=torch.int64, device=device),
        proposal=proposal,
        flags=torch.empty(rows, dtype=torch.int32, device=device),
        confidence=None if confidence is None else floats(),
        confidence_logits=None if confidence is None else floats(),
    )


def check_out(
    out: DraftBlock,
    base_logits: Tensor,
    slots: int,
    rows: int,
    sampling: SamplingTensors | None,
    confidence: ConfidenceHead | None,
    first_draft: int,
    *,
    candidates: int | None = None,
    draft_to_target: Tensor | None = None,
) -> int:
    """Check a caller's DraftBlock; returns the column of its first draft."""
    check_type("out", out, DraftBlock)
    device, drafts = base_logits.device, base_logits.shape[1]
    columns = check_tensor("out.tokens", out.tokens, shape=(slots, "K"), device=device).shape[1]
    column = 0 if columns == drafts else first_draft
    if columns < column + drafts:
        raise ValueError(f"out.tokens: expected {drafts} or at least {first_draft + drafts} columns, got {columns}")
    check_tensor("out.flags", out.flags, shape=(rows,), device=device)
    if confidence is not None:
        for name in ("confidence", "confidence_logits"):
            check_tensor(f"out.{name}", getattr(out, name), shape=(slots, columns), device=device)
    elif out.confidence is not None or out.confidence_logits is not None:
        raise ValueError("out.confidence: expected None because no `confidence` head is given, got a tensor")
    proposal = out.proposal
    kind: type[DenseProposal | SparseProposal] = DenseProposal if candidates is None else SparseProposal
    if not isinstance(proposal, kind):
        given = "`sampling`" if candidates is None else "`sampling` and `candidates`"
        if sampling is not None:
            raise TypeError(f"out.proposal: expected {kind.__name__} with {given}, got {type(proposal).__name__}")
        check_type("out.proposal", proposal, OneHotProposal)
        return column
    if isinstance(proposal, DenseProposal) and proposal.probs:
        raise ValueError("out.proposal.probs: expected False, because drafting stores logits, got True")
    shape = (slots, columns, base_logits.shape[2] if candidates is None else candidates)
    if isinstance(proposal, SparseProposal):
        check_tensor("out.proposal.ids", proposal.ids, shape=shape, device=device)
    check_tensor("out.proposal.logits", proposal.logits, dtype=base_logits.dtype, shape=shape, device=device)
    if isinstance(proposal, DenseProposal) and (proposal.draft_to_target is None) != (draft_to_target is None):
        wanted = "None, as in this call" if draft_to_target is None else "the map of this call"
        raise ValueError(f"out.proposal.draft_to_target: expected {wanted}")
    if sampling is None:
        if proposal.lse is not None:
            raise ValueError("out.proposal.lse: expected None for a greedy block, got a tensor")
        if proposal.temperature is None:
            raise ValueError(
                "out.proposal.temperature: expected zeros [S] for a greedy block (its distribution is one-hot), got None"
            )
    elif proposal.lse is not None:
        check_tensor("out.proposal.lse", proposal.lse, shape=(slots, columns), device=device)
    return column
