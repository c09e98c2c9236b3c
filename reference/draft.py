"""draft_block in the words of the paper: positions left to right, each after the token drafted before it.

    q_k(v) = softmax over v of (U_k(v) + B_k(v)) / T,  x_k ~ q_k (greedy: its arg-max),  x_0 = the anchor

The token is chosen from the sum as it is stored: fp64 here, rounded once to the logits' dtype. Symbols: R requests, S slots, K
positions, V vocabulary. Source: DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dspark_kernels.types import ConfidenceHead, DenseProposal, DraftBlock, Flag, MarkovHead, OneHotProposal, SamplingTensors

from . import heads
from .candidates import draft_candidates
from .decisions import Decisions
from .sources import PhiloxSource


def inverse_temperature(temperature: float) -> float:
    """1 / T, at most 1e30; 0 for a greedy row (T not above 0)."""
    return min(1.0 / temperature, 1e30) if temperature > 0 else 0.0


def read_logits(row: Tensor) -> tuple[Tensor, int]:
    """fp64 logits with NaN read as -inf, and the flags the row shows."""
    row = row.double()
    nan = row.isnan()
    flags = int(Flag.NAN) if bool(nan.any()) else 0
    row = torch.where(nan, -math.inf, row)
    if not bool(row.isfinite().any()):
        flags |= int(Flag.NONFINITE_ROW)
    return row, flags


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
    first_draft: int = 0,
    noise: str = "draft",
    state_indices: Tensor | None = None,
    keep_logits: bool = False,
    out: DraftBlock | None = None,
    workspace=None,
    stored_logits: Tensor | None = None,
    decisions: Decisions | None = None,
) -> DraftBlock:
    """The op's arguments and result (dspark_kernels.ops.draft), plus:

    stored_logits: [R, K, V] a kernel's stored sums; tokens are then chosen from these bits. decisions: records margins.
    """
    for name, value in (("out", out), ("workspace", workspace)):
        if value is not None:
            raise ValueError(f"{name}: expected None, the reference allocates its results, got {type(value).__name__}")
    if candidates is not None:
        return draft_candidates(
            base_logits, anchors, head, anchor_positions=anchor_positions, sampling=sampling, hidden=hidden,
            confidence=confidence, candidates=candidates, bigrams=bigrams, draft_to_target=draft_to_target,
            first_draft=first_draft, noise=noise, state_indices=state_indices, keep_logits=keep_logits,
            stored_logits=stored_logits, decisions=decisions,
        )  # fmt: skip
    if draft_to_target is not None:
        raise NotImplementedError("draft_block: draft_to_target: not in the reference yet")
    decisions = Decisions() if decisions is None else decisions
    batch, drafts, vocab = base_logits.shape
    slots, device = anchors.shape[0], base_logits.device
    tokens = torch.full((slots, drafts), -1, dtype=torch.int64, device=device)
    logits = torch.zeros(slots, drafts, vocab, dtype=base_logits.dtype, device=device)
    lse = torch.zeros(slots, drafts, device=device)
    raw, calibrated = torch.zeros(slots, drafts, device=device), torch.zeros(slots, drafts, device=device)
    flags = torch.zeros(batch, dtype=torch.int32, device=device)
    w2 = heads.output_weights(head)
    for r in range(batch):
        slot = r if state_indices is None else int(state_indices[r])
        if not 0 <= slot < slots:
            continue
        token, anchor_position = int(anchors[slot]), int(anchor_positions[slot])
        if head is not None and not 0 <= token < head.w1.shape[0]:
            flags[r] |= int(Flag.BAD_TOKEN_ID)
        temperature = float(sampling.temperature[slot]) if sampling is not None else 0.0
        source = PhiloxSource(int(sampling.seed[slot]) if sampling is not None else 0, anchor_position, decisions, r)
        transition = heads.Transition(head, w2)
        for k in range(drafts):
            position_hidden = None if hidden is None else hidden[r, k]
            total = base_logits[r, k].double() + transition.bias(token, position_hidden)
            _, row_flags = read_logits(total)
            flags[r] |= row_flags
            if confidence is not None:
                logit = heads.confidence_logit(confidence, position_hidden, heads.embed(head, token))
                raw[slot, k] = logit
                if confidence.sts_temperatures is not None:
                    logit /= float(confidence.sts_temperatures[first_draft + k])
                calibrated[slot, k] = torch.sigmoid(torch.tensor(logit, dtype=torch.float64))
            logits[slot, k] = torch.where(total.isnan(), -math.inf, total).to(base_logits.dtype)
            stored = logits[slot, k] if stored_logits is None else stored_logits[r, k]
            row, _ = read_logits(stored)
            scale = inverse_temperature(temperature)
            lse[slot, k] = torch.logsumexp(row * (scale if scale > 0 else 1.0), 0)
            position = anchor_position + first_draft + k + 1
            if scale > 0 and noise == "coupled":
                token = source.coupled(position, row * scale)
            elif scale > 0:
                token = source.draft(position, row * scale)
            else:
                token = decisions.pick(r, "greedy", row)
            tokens[slot, k] = token
    if sampling is not None:
        proposal = DenseProposal(logits, lse=lse)
    elif keep_logits:
        proposal = DenseProposal(logits, temperature=torch.zeros(slots, device=device))
    else:
        proposal = OneHotProposal()
    return DraftBlock(
        tokens=tokens,
        proposal=proposal,
        flags=flags,
        confidence=None if confidence is None else calibrated,
        confidence_logits=None if confidence is None else raw,
    )
