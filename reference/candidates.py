"""draft_block on candidates, as in the paper: each position restricted to its C best base logits.

    S_k = the C ids with the largest U_k (ties: lowest ids), and the successors of x_{k-1};  q_k(v) = softmax over v in S_k of
    (U_k(v) + B_k(v)) / T,  x_k ~ q_k (greedy: its arg-max),  x_0 = the anchor

U_k are the base logits after penalties, bias and mask. These settings act on the sum U_k + B_k as well, where the penalties also
count the path; the filters read the sum as it is stored, among the candidates. The token is chosen from the stored sum (fp64 here,
rounded once to the logits' dtype) with the noise of its own id, so that an id that wins among all ids also wins among the
candidates.

Symbols: R requests, S slots, K positions, V vocabulary, C candidates, B successors of a token, W = C + B columns. Source: DSpark,
arXiv 2607.05147.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dspark_kernels.types import Flag, OneHotProposal, SparseProposal

from .draft_positions import DraftCall, Place, Row
from .logits import read_logits


def best_ids(row: Tensor, candidates: int) -> list[int]:
    """The ids of the largest of `row` [V], NaN lowest as -inf, ties to the lowest ids; in ascending order."""
    row = torch.where(row.isnan(), -math.inf, row) + 0.0
    return sorted(torch.sort(row, descending=True, stable=True).indices[:candidates].tolist())


def members(row: Tensor, candidates: int, successors: Tensor | None) -> list[int]:
    """Draft ids of a position, -1 where an entry is unused: the best, then the successors that are not among them."""
    ids = best_ids(row, candidates)
    ids += [-1] * (candidates - len(ids))
    for successor in [] if successors is None else successors.tolist():
        ids.append(successor if 0 <= successor < row.shape[0] and successor not in ids else -1)
    return ids


class CandidateRows:
    """Rows [W] of a call's candidates; `ids` collects their target ids, int64 [S, K, W]."""

    filters_by_id = True

    def __init__(self, call: DraftCall, candidates: int, bigrams: Tensor | None):
        self._call, self._candidates, self._bigrams = call, candidates, bigrams
        self.width = candidates + (0 if bigrams is None else bigrams.shape[1])
        shape = (call.anchors.shape[0], call.base_logits.shape[1], self.width)
        self.ids = torch.zeros(shape, dtype=torch.int64, device=call.base_logits.device)

    def at(self, place: Place, bias: Tensor | float) -> Row:
        call, slot, k = self._call, place.slot, place.k
        base = call.base_logits[place.request, k].float()
        # In fp32: the order of these values decides which ids are candidates.
        ranking = call.settled(base, slot, k, [])
        total = call.settled(base.double() + bias, slot, k, place.path)
        known = self._bigrams is not None and 0 <= place.token < self._bigrams.shape[0]
        chosen = members(ranking, self._candidates, self._bigrams[place.token] if known else None)
        chosen = torch.tensor(chosen + [-1] * (self.width - len(chosen)), device=base.device)
        used = chosen >= 0
        chosen = chosen.clamp(min=0)
        if call.unused is not None:
            used &= ~call.unused[chosen]
        total = torch.where(used, total[chosen], -math.inf)
        flags = read_logits(total)[1] | (int(Flag.NAN) if bool(ranking.isnan().any()) else 0)
        targets = chosen if call.draft_to_target is None else call.draft_to_target[chosen]
        self.ids[slot, k] = torch.where(used, targets, 0)
        # In the order of target ids, so that a tie goes to the lowest.
        order = torch.argsort(self.ids[slot, k], stable=True)
        order = order[used[order]]
        return Row(total, flags, order, self.ids[slot, k][order])

    def proposal(self, logits: Tensor, lse: Tensor):
        if self._call.sampling is not None:
            return SparseProposal(self.ids, logits, lse=lse)
        if self._call.keep_logits:
            return SparseProposal(self.ids, logits, temperature=torch.zeros(logits.shape[0], device=logits.device))
        return OneHotProposal()
