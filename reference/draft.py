"""draft_block in the words of the paper: positions left to right, each after the token drafted before it.

    q_k(v) = softmax over v of (U_k(v) + B_k(v)) / T,  x_k ~ q_k (greedy: its arg-max),  x_0 = the anchor

The token is chosen from the sum as it is stored: fp64 here, rounded once to the logits' dtype. Symbols: R requests, S slots, K
positions, V vocabulary. Source: DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dspark_kernels.types import (
    ConfidenceHead,
    DenseProposal,
    DraftBlock,
    Flag,
    MarkovHead,
    OneHotProposal,
    RnnMarkovHead,
    SamplingTensors,
)

from . import heads
from .candidates import draft_candidates
from .decisions import Decisions
from .logits import adjusted, inverse_temperature, read_logits, target_ids
from .sampling import filtered
from .sources import PhiloxSource


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
    path_before: list[list[int]] | None = None,
    stored_logits: Tensor | None = None,
    decisions: Decisions | None = None,
) -> DraftBlock:
    """The op's arguments and result (dspark_kernels.ops.draft), plus:

    path_before: drafts of this round per slot that earlier calls made, for penalties. stored_logits: [R, K, V] a kernel's stored
    sums, before filters; support and tokens are then chosen from these bits. decisions: records margins.
    """
    for name, value in (("out", out), ("workspace", workspace)):
        if value is not None:
            raise ValueError(f"{name}: expected None, the reference allocates its results, got {type(value).__name__}")
    if candidates is not None:
        return draft_candidates(
            base_logits[:, :, :vocab_size], anchors, head, anchor_positions=anchor_positions, sampling=sampling, hidden=hidden,
            confidence=confidence, candidates=candidates, bigrams=bigrams, draft_to_target=draft_to_target,
            first_draft=first_draft, head_state=head_state, noise=noise, state_indices=state_indices, keep_logits=keep_logits,
            path_before=path_before, stored_logits=stored_logits, decisions=decisions,
        )  # fmt: skip
    decisions = Decisions() if decisions is None else decisions
    base_logits = base_logits[:, :, :vocab_size]
    batch, drafts, vocab = base_logits.shape
    unused = order = lanes = None
    if draft_to_target is not None:
        targets = target_ids(head, sampling)
        unused = (draft_to_target < 0) | (draft_to_target >= targets)
        # In the order of the target's ids, which decides ties; entries that stand for no token are left out.
        order = torch.argsort(draft_to_target, stable=True)
        order = order[~unused[order]]
        lanes = draft_to_target[order]
    if sampling is not None and sampling.token_bitmask is not None:  # [S, K, words]
        sampling = dataclasses.replace(sampling, token_bitmask=sampling.token_bitmask.flatten(0, 1))
    slots, device = anchors.shape[0], base_logits.device
    tokens = torch.full((slots, drafts), -1, dtype=torch.int64, device=device)
    logits = torch.zeros(slots, drafts, vocab, dtype=base_logits.dtype, device=device)
    lse = torch.zeros(slots, drafts, device=device)
    raw, calibrated = torch.zeros(slots, drafts, device=device), torch.zeros(slots, drafts, device=device)
    flags = torch.zeros(batch, dtype=torch.int32, device=device)
    w2 = None if head is None else heads.output_weights(head)[:vocab]
    for r in range(batch):
        slot = r if state_indices is None else int(state_indices[r])
        if not 0 <= slot < slots:
            continue
        token, anchor_position = int(anchors[slot]), int(anchor_positions[slot])
        if head is not None and not 0 <= token < head.w1.shape[0]:
            flags[r] |= int(Flag.BAD_TOKEN_ID)
        temperature = float(sampling.temperature[slot]) if sampling is not None else 0.0
        source = PhiloxSource(int(sampling.seed[slot]) if sampling is not None else 0, anchor_position, decisions, r)
        carried = head_state[slot].double() if head_state is not None and first_draft > 0 else None
        transition = heads.Transition(head, w2, carried)
        for k in range(drafts):
            position_hidden = None if hidden is None else hidden[r, k]
            total = base_logits[r, k].double() + transition.bias(token, position_hidden)
            path = tokens[slot, :k].tolist() if path_before is None else path_before[slot] + tokens[slot, :k].tolist()
            if sampling is not None:
                total = adjusted(total, sampling, slot, slot * drafts + k, path, draft_to_target, unused)
            if unused is not None:
                total = total.masked_fill(unused, -math.inf)
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
            row = filtered(row, scale, sampling, slot, decisions, r)
            logits[slot, k] = torch.where(row > -math.inf, logits[slot, k], -math.inf)
            lse[slot, k] = torch.logsumexp(row * (scale if scale > 0 else 1.0), 0)
            position = anchor_position + first_draft + k + 1
            if order is not None:
                row = row[order]
            if row.numel() == 0:
                token = 0
            elif scale > 0 and noise == "coupled":
                token = source.coupled(position, row * scale, lanes)
            elif scale > 0:
                token = source.draft(position, row * scale, lanes=lanes)
            else:
                token = decisions.pick(r, "greedy", row)
            token = token if lanes is None else int(lanes[token]) if len(lanes) else 0
            tokens[slot, k] = token
        if isinstance(head, RnnMarkovHead) and head_state is not None:
            head_state[slot] = transition.state.float()
    if sampling is not None:
        proposal = DenseProposal(logits, lse=lse, draft_to_target=draft_to_target)
    elif keep_logits:
        proposal = DenseProposal(logits, temperature=torch.zeros(slots, device=device), draft_to_target=draft_to_target)
    else:
        proposal = OneHotProposal()
    return DraftBlock(
        tokens=tokens,
        proposal=proposal,
        flags=flags,
        confidence=None if confidence is None else calibrated,
        confidence_logits=None if confidence is None else raw,
    )
