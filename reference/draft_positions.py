"""The loop of `draft_block` over positions, shared by drafting from all ids (draft.py) and from candidates (candidates.py).

    for k = 1 .. K:  stored_k = round(U_k + B_k(x_{k-1}));  support by the filters;  x_k ~ softmax(stored_k / T) (greedy: arg-max)

Symbols: R requests, S slots, K positions, V vocabulary, W columns of a row (V, or candidates and successors), U base logits, B bias
of the head, T temperature, x_0 the anchor. Source: DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dspark_kernels.types import ConfidenceHead, DraftBlock, Flag, MarkovHead, RnnMarkovHead, SamplingTensors

from . import heads
from .decisions import Decisions
from .logits import adjusted, inverse_temperature, read_logits
from .sampling import filtered
from .sources import PhiloxSource


class DraftCall(NamedTuple):
    """The inputs of a call, as `draft_block` documents them."""

    base_logits: Tensor  # [R, K, V]
    anchors: Tensor  # int [S]
    anchor_positions: Tensor  # int [S]
    head: MarkovHead | None
    sampling: SamplingTensors | None  # token_bitmask [S * K, words]
    hidden: Tensor | None  # [R, K, H]
    confidence: ConfidenceHead | None
    draft_to_target: Tensor | None  # int64 [V]
    unused: Tensor | None  # bool [V], entries of draft_to_target that stand for no token
    first_draft: int
    head_state: Tensor | None  # fp32 [S, r]
    noise: str
    state_indices: Tensor | None
    keep_logits: bool
    stored_logits: Tensor | None  # [R, K, W]
    decisions: Decisions

    def settled(self, row: Tensor, slot: int, k: int, path: list[int]) -> Tensor:
        """A row [V] after penalties, bias and mask, -inf where there is no token."""
        if self.sampling is not None:
            mask_row = slot * self.base_logits.shape[1] + k
            row = adjusted(row, self.sampling, slot, mask_row, path, self.draft_to_target, self.unused)
        return row if self.unused is None else row.masked_fill(self.unused, -math.inf)


class Place(NamedTuple):
    """One position of one request, before its draft is chosen."""

    request: int  # batch row
    slot: int
    k: int  # from 0
    token: int  # the one before
    path: list[int]  # drafts of this round before it


class Row(NamedTuple):
    """What may be drafted at a position, by column."""

    total: Tensor  # fp64 [W], U + B after all settings but the filters
    flags: int
    order: Tensor | None  # int64, the columns that stand for a token, in the order of their ids; None: all, column v is id v
    ids: Tensor | None  # int64, the ids of those columns


class Rows(Protocol):
    """Where the rows of positions come from."""

    width: int  # W
    filters_by_id: bool  # whether ties of the filters go by id; otherwise by column

    def at(self, place: Place, bias: Tensor | float) -> Row:
        """bias: B of the position, fp64 [V]."""

    def proposal(self, logits: Tensor, lse: Tensor):
        """The proposal of a call. logits [S, K, W], lse fp32 [S, K]."""


def draft_positions(call: DraftCall, rows: Rows) -> DraftBlock:
    """Draft every request, position by position, each after the token drafted before it."""
    batch, drafts, vocab = call.base_logits.shape
    slots, device = call.anchors.shape[0], call.base_logits.device
    tokens = torch.full((slots, drafts), -1, dtype=torch.int64, device=device)
    logits = torch.zeros(slots, drafts, rows.width, dtype=call.base_logits.dtype, device=device)
    lse = torch.zeros(slots, drafts, device=device)
    raw, calibrated = torch.zeros(slots, drafts, device=device), torch.zeros(slots, drafts, device=device)
    flags = torch.zeros(batch, dtype=torch.int32, device=device)
    w2 = None if call.head is None else heads.output_weights(call.head)[:vocab]
    for r in range(batch):
        slot = r if call.state_indices is None else int(call.state_indices[r])
        if not 0 <= slot < slots:
            continue
        token, anchor_position = int(call.anchors[slot]), int(call.anchor_positions[slot])
        if call.head is not None and not 0 <= token < call.head.w1.shape[0]:
            flags[r] |= int(Flag.BAD_TOKEN_ID)
        scale = inverse_temperature(float(call.sampling.temperature[slot])) if call.sampling is not None else 0.0
        seed = int(call.sampling.seed[slot]) if call.sampling is not None else 0
        source = PhiloxSource(seed, anchor_position, call.decisions, r)
        carried = call.head_state[slot].double() if call.head_state is not None and call.first_draft > 0 else None
        transition = heads.Transition(call.head, w2, carried)
        for k in range(drafts):
            if call.confidence is not None:
                logit = heads.confidence_logit(call.confidence, call.hidden[r, k], heads.embed(call.head, token))
                raw[slot, k] = logit
                if call.confidence.sts_temperatures is not None:
                    logit /= float(call.confidence.sts_temperatures[call.first_draft + k])
                calibrated[slot, k] = torch.sigmoid(torch.tensor(logit, dtype=torch.float64))
            bias = transition.bias(token, None if call.hidden is None else call.hidden[r, k])
            row = rows.at(Place(r, slot, k, token, tokens[slot, :k].tolist()), bias)
            flags[r] |= row.flags
            stored = torch.where(row.total.isnan(), -math.inf, row.total).to(call.base_logits.dtype)
            read = read_logits(stored if call.stored_logits is None else call.stored_logits[r, k])[0]
            if not rows.filters_by_id:
                read = filtered(read, scale, call.sampling, slot, call.decisions, r)
            elif len(row.order):
                read[row.order] = filtered(read[row.order], scale, call.sampling, slot, call.decisions, r)
            logits[slot, k] = torch.where(read > -math.inf, stored, -math.inf)
            lse[slot, k] = torch.logsumexp(read * (scale if scale > 0 else 1.0), 0)
            position = anchor_position + call.first_draft + k + 1
            token = _choose(call, source, r, read if row.order is None else read[row.order], row.ids, scale, position)
            tokens[slot, k] = token
        if isinstance(call.head, RnnMarkovHead) and call.head_state is not None:
            call.head_state[slot] = transition.state.float()
    return DraftBlock(
        tokens=tokens,
        proposal=rows.proposal(logits, lse),
        flags=flags,
        confidence=None if call.confidence is None else calibrated,
        confidence_logits=None if call.confidence is None else raw,
    )


def _choose(
    call: DraftCall, source: PhiloxSource, request: int, row: Tensor, ids: Tensor | None, scale: float, position: int
) -> int:
    """The token drawn from a row in the order of its ids, with the noise of each id; 0 where there is none to draw."""
    if row.numel() == 0:
        return 0
    if scale == 0:
        entry = call.decisions.pick(request, "greedy", row)
    elif call.noise == "coupled":
        entry = source.coupled(position, row * scale, ids)
    else:
        entry = source.draft(position, row * scale, lanes=ids)
    return entry if ids is None else int(ids[entry])
