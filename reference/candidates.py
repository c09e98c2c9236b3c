"""draft_block on candidates, in the words of the paper: each position restricted to its C best base logits.

    S_k = the C ids with the largest U_k (ties: lowest ids), and the ids listed for x_{k-1};  q_k(v) = softmax over v in S_k of
    (U_k(v) + B_k(v)) / T,  x_k ~ q_k (greedy: its arg-max),  x_0 = the anchor

U_k is what penalties (for listed tokens), bias and mask leave of the base logits. They act on the sum, too, the penalties then
with the path; filters judge the sum as it is stored, among the candidates. The token is chosen from that sum: fp64 here, rounded
once to the logits' dtype, with the noise of its own id, so that an id that wins among all wins among the candidates. Symbols: R
requests, S slots, K positions, V vocabulary, C candidates, B listed successors. Source: DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dspark_kernels.types import DraftBlock, Flag, OneHotProposal, RnnMarkovHead, SparseProposal, Stream

from . import heads, philox
from .decisions import Decisions
from .logits import adjusted, inverse_temperature, read_logits, target_ids
from .sampling import filtered


def best_ids(row: Tensor, candidates: int) -> list[int]:
    """The ids of the largest of `row` [V], NaN lowest as -inf, ties to the lowest ids; in ascending order."""
    row = torch.where(row.isnan(), -math.inf, row) + 0.0
    return sorted(torch.sort(row, descending=True, stable=True).indices[:candidates].tolist())


def members(row: Tensor, candidates: int, successors: Tensor | None) -> list[int]:
    """Draft ids of a position, -1 where an entry is unused: the best, then the listed ones that are not there yet."""
    ids = best_ids(row, candidates)
    ids += [-1] * (candidates - len(ids))
    for listed in [] if successors is None else successors.tolist():
        ids.append(listed if 0 <= listed < row.shape[0] and listed not in ids else -1)
    return ids


def draft_candidates(
    base_logits, anchors, head, *, anchor_positions, sampling, hidden, confidence, candidates, bigrams, draft_to_target,
    first_draft, head_state, noise, state_indices, keep_logits, path_before, stored_logits, decisions,
) -> DraftBlock:  # fmt: skip
    """reference.draft.draft_block with `candidates`; stored_logits: [R, K, C + B]."""
    decisions = Decisions() if decisions is None else decisions
    batch, drafts, vocab = base_logits.shape
    slots, device = anchors.shape[0], base_logits.device
    width = candidates + (0 if bigrams is None else bigrams.shape[1])
    unused = None
    if draft_to_target is not None:
        unused = (draft_to_target < 0) | (draft_to_target >= target_ids(head, sampling))
    if sampling is not None and sampling.token_bitmask is not None:  # [S, K, words]
        sampling = dataclasses.replace(sampling, token_bitmask=sampling.token_bitmask.flatten(0, 1))
    tokens = torch.full((slots, drafts), -1, dtype=torch.int64, device=device)
    ids = torch.zeros(slots, drafts, width, dtype=torch.int64, device=device)
    logits = torch.zeros(slots, drafts, width, dtype=base_logits.dtype, device=device)
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
        scale = inverse_temperature(float(sampling.temperature[slot])) if sampling is not None else 0.0
        carried = head_state[slot].double() if head_state is not None and first_draft > 0 else None
        transition = heads.Transition(head, w2, carried)
        for k in range(drafts):
            position_hidden = None if hidden is None else hidden[r, k]
            row = base_logits[r, k].float()
            path = tokens[slot, :k].tolist() if path_before is None else path_before[slot] + tokens[slot, :k].tolist()
            total = row.double() + transition.bias(token, position_hidden)
            if sampling is not None:
                # In fp32, whose order decides who is a candidate.
                row = adjusted(row, sampling, slot, slot * drafts + k, [], draft_to_target, unused)
                total = adjusted(total, sampling, slot, slot * drafts + k, path, draft_to_target, unused)
            if unused is not None:
                row, total = row.masked_fill(unused, -math.inf), total.masked_fill(unused, -math.inf)
            known = bigrams is not None and 0 <= token < bigrams.shape[0]
            chosen = members(row, candidates, bigrams[token] if known else None)
            chosen = torch.tensor(chosen + [-1] * (width - len(chosen)), device=device)
            used = chosen >= 0
            chosen = chosen.clamp(min=0)
            if unused is not None:
                used &= ~unused[chosen]
            total = torch.where(used, total[chosen], -math.inf)
            flags[r] |= read_logits(total)[1]
            if bool(row.isnan().any()):
                flags[r] |= int(Flag.NAN)
            if confidence is not None:
                logit = heads.confidence_logit(confidence, position_hidden, heads.embed(head, token))
                raw[slot, k] = logit
                if confidence.sts_temperatures is not None:
                    logit /= float(confidence.sts_temperatures[first_draft + k])
                calibrated[slot, k] = torch.sigmoid(torch.tensor(logit, dtype=torch.float64))
            targets = chosen if draft_to_target is None else draft_to_target[chosen]
            ids[slot, k] = torch.where(used, targets, 0)
            stored = torch.where(total.isnan(), -math.inf, total).to(base_logits.dtype)
            law = (stored if stored_logits is None else stored_logits[r, k]).double()
            # In the order of target ids, so that a tie goes to the lowest.
            by_id = torch.argsort(ids[slot, k], stable=True)
            by_id = by_id[used[by_id]]
            if len(by_id):
                law[by_id] = filtered(law[by_id], scale, sampling, slot, decisions, r)
            logits[slot, k] = torch.where(law > -math.inf, stored, -math.inf)
            lse[slot, k] = torch.logsumexp(law * (scale if scale > 0 else 1.0), 0)
            keys, kind = law[by_id], "greedy"
            if scale > 0:
                position = anchor_position + first_draft + k + 1
                stream, origin = (Stream.COUPLED, 0) if noise == "coupled" else (Stream.DRAFT, anchor_position)
                seed = int(sampling.seed[slot])
                keys, kind = keys * scale + philox.gumbel(seed, ids[slot, k][by_id], position, origin, stream), "draft"
            token = int(ids[slot, k][by_id[decisions.pick(r, kind, keys)]]) if len(by_id) else 0
            tokens[slot, k] = token
        if isinstance(head, RnnMarkovHead) and head_state is not None:
            head_state[slot] = transition.state.float()
    if sampling is not None:
        proposal = SparseProposal(ids, logits, lse=lse)
    elif keep_logits:
        proposal = SparseProposal(ids, logits, temperature=torch.zeros(slots, device=device))
    else:
        proposal = OneHotProposal()
    return DraftBlock(
        tokens=tokens,
        proposal=proposal,
        flags=flags,
        confidence=None if confidence is None else calibrated,
        confidence_logits=None if confidence is None else raw,
    )
