"""The distributions that acceptance compares: the target's and the drafter's, in fp64 over the target's ids.

    p = softmax(logits / T);   q = softmax(stored draft logits / T'), or stored probabilities, spread over the target's ids by the proposal's map or list

Symbols: V vocabulary of the target, T and T' temperatures of target and drafter (T' = T unless the proposal has its own); scale =
1 / T, 0 for a greedy row. Source: the proposals of `dspark_kernels.types`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dspark_kernels.types import DenseProposal, OneHotProposal, SparseProposal

from .logits import inverse_temperature, read_logits


class Lazy:
    """make(i) by index, computed when a rule first asks for it."""

    def __init__(self, make: Callable[[int], Tensor | None]):
        self._make, self._made = make, {}

    def __getitem__(self, i: int) -> Tensor | None:
        if i not in self._made:
            self._made[i] = self._make(i)
        return self._made[i]


def distribution_of(logits: Tensor, scale: float) -> Tensor:
    """softmax(logits * scale), fp64 [V]; the first +inf takes everything, and a row of -inf gives zeros."""
    row_max = float(logits.max())
    if row_max == math.inf:
        return point_mass(int(torch.argmax((logits == math.inf).int())), logits)
    if row_max == -math.inf:
        return torch.zeros_like(logits)
    return torch.softmax((logits - row_max) * scale, 0)


def point_mass(token: int, like: Tensor) -> Tensor:
    """Probability 1 for one token, in the shape of `like`."""
    probs = torch.zeros_like(like)
    probs[token] = 1.0
    return probs


def log_prob(row: Tensor, token: int, scale: float) -> float:
    """ln of the token's probability, -inf where it is 0. scale 0 is greedy: the first maximum has probability 1."""
    row_max = float(row.max())
    if scale == 0:
        return 0.0 if row[token] > -math.inf and token == int(torch.argmax((row == row.max()).int())) else -math.inf
    if row_max == math.inf:
        return 0.0 if row[token] == math.inf else -math.inf
    if row_max == -math.inf:
        return -math.inf
    return float(torch.log_softmax((row - row.max()) * scale, 0)[token])


def draft_scale(proposal, slot: int, scale: float) -> float:
    """1 / T' of a slot: the proposal's own temperature, or the target's (`scale`) where it has none."""
    if proposal is None or isinstance(proposal, OneHotProposal) or proposal.temperature is None:
        return scale
    return inverse_temperature(float(proposal.temperature[slot]))


def draft_distribution(proposal, slot: int, i: int, draft: int, *, scale: float, vocab: int, device) -> Tensor | None:
    """The distribution that draft i was drawn from, fp64 [V]; None where nothing was drawn (draft -1).

    A greedy or one-hot draft has probability 1.
    """
    if draft == -1:
        return None
    probs = torch.zeros(vocab, dtype=torch.float64, device=device)
    scale = draft_scale(proposal, slot, scale)
    if proposal is None or isinstance(proposal, OneHotProposal) or scale == 0:
        if 0 <= draft < vocab:
            probs[draft] = 1.0
        return probs
    if isinstance(proposal, DenseProposal) and proposal.probs:
        row = proposal.logits[slot, i] if proposal.starts is None else proposal.logits[int(proposal.starts[slot]) + i]
        by_column = row.double().nan_to_num(0.0).clamp(0.0, 1.0)
    else:
        by_column = distribution_of(read_logits(proposal.logits[slot, i])[0], scale)
    ids = column_ids(proposal, slot, i)
    if ids is None:
        width = min(vocab, by_column.shape[0])
        probs[:width] = by_column[:width]
        return probs
    inside = (ids >= 0) & (ids < vocab)
    return probs.index_add_(0, ids[inside], by_column[inside])


def column_ids(proposal, slot: int, i: int) -> Tensor | None:
    """The target's ids of the columns of a draft row, int64; None: column v is id v."""
    if isinstance(proposal, SparseProposal):
        return proposal.ids[slot, i].long()
    return proposal.draft_to_target if isinstance(proposal, DenseProposal) else None
