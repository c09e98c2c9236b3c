"""What a request's sampling settings do to a row of logits, in this order:

    penalties   of a penalised token (one with a count, or on the path): x / repetition (x > 0) or x * repetition; x - frequency n;
                x - presence if n > 0
    bias, mask  x + logit_bias; -inf where the bit mask has a 0
    top_k       the k largest logits, ties to the lowest ids
    top_p       the fewest most probable tokens that sum to p of what top_k left ("joint": of the whole distribution)
    min_p       tokens of at least min_p times the largest probability

n = stored count + occurrences on the path (the drafts of this round before the row). Filters read logits / temperature. Sources:
top-k Fan et al. arXiv 1805.04833; top-p Holtzman et al. arXiv 1904.09751; min-p Nguyen et al. arXiv 2407.01082; repetition
penalty Keskar et al. arXiv 1909.05858.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_kernels.types import Penalties, SamplingTensors

from .decisions import Decisions


def adjust(row: Tensor, sampling: SamplingTensors | None, slot: int, mask_row: int = 0, path: Sequence[int] = ()) -> Tensor:
    """Logits [V] after penalties, bias and mask, in the row's own precision (fp32 gives the kernels' bits)."""
    if sampling is None:
        return row
    if sampling.penalties is not None:
        row = _penalise(row, sampling.penalties, slot, path)
    if sampling.logit_bias is not None:
        row = row + sampling.logit_bias[slot].to(row.dtype)
    if sampling.token_bitmask is not None:
        ids = torch.arange(row.shape[0], device=row.device)
        bits = sampling.token_bitmask[mask_row][ids // 32] >> (ids % 32) & 1
        row = torch.where(bits == 1, row, -math.inf)
    return row


def _penalise(row: Tensor, penalties: Penalties, slot: int, path: Sequence[int]) -> Tensor:
    counts: dict[int, int] = {}
    for token, count in zip(penalties.token_ids[slot].tolist(), penalties.counts[slot].tolist(), strict=True):
        counts[token] = count
    for token in path:
        counts[token] = counts.get(token, 0) + 1
    number = lambda tensor, neutral: neutral if tensor is None else tensor[slot].to(row.dtype)  # noqa: E731
    repetition, presence = number(penalties.repetition, 1.0), number(penalties.presence, 0.0)
    frequency = number(penalties.frequency, 0.0)
    row = row.clone()
    for token, n in counts.items():
        if not 0 <= token < row.shape[0]:
            continue
        x = row[token]
        x = x / repetition if x > 0 else x * repetition
        x = x - frequency * n
        row[token] = x - presence if n > 0 else x
    return row


def filtered(row: Tensor, scale: float, sampling: SamplingTensors | None, slot: int, decisions: Decisions, request: int) -> Tensor:
    """fp64 logits [V] with -inf outside the support that top_k, top_p and min_p leave; scale = 1 / temperature.

    A greedy row (scale 0), a row without a finite logit and one with a +inf are left as they are.
    """
    if sampling is None or scale == 0 or not math.isfinite(float(row.max())):
        return row
    top_k = 0 if sampling.top_k is None else int(sampling.top_k[slot])
    top_p = 1.0 if sampling.top_p is None else float(sampling.top_p[slot])
    min_p = 0.0 if sampling.min_p is None else float(sampling.min_p[slot])
    if not (0 < top_k < row.shape[0] or top_p < 1 or min_p > 0):
        return row
    logits, order = torch.sort(row + 0.0, descending=True, stable=True)  # equal logits stay in order of their ids
    possible = int((logits > -math.inf).sum())
    in_support = possible
    if 0 < top_k < row.shape[0]:
        in_support = min(in_support, top_k)
    if top_p < 1:
        probs = torch.softmax(logits * scale, 0)[: possible if sampling.filter_order == "joint" else in_support]
        in_support = min(in_support, decisions.prefix(request, "top_p", probs.cumsum(0), top_p * float(probs.sum())))
    if min_p > 0:
        in_support = min(in_support, _at_least(logits * scale, math.log(min(min_p, 1.0)), decisions, request))
    row = torch.full_like(row, -math.inf)
    row[order[:in_support]] = logits[:in_support]
    return row


def _at_least(logits: Tensor, least: float, decisions: Decisions, request: int) -> int:
    """How many of the sorted logits are within `least` of the first, with the margin of the nearest recorded."""
    gaps = logits - logits[0] - least
    in_support = int((gaps >= 0).sum())
    inside, outside = gaps[in_support - 1], gaps[in_support] if in_support < gaps.shape[0] else torch.tensor(-math.inf)
    if in_support > 1 and float(inside) < -float(outside):
        other = int((gaps > inside).sum())  # equal logits go together
        margin = float(inside)
    else:
        other = int((gaps >= outside).sum()) if math.isfinite(float(outside)) else in_support
        margin = -float(outside)
    return other if decisions.flipped(request, "min_p", margin, max(1.0, abs(least))) else in_support


def of_scaled_target(sampling: SamplingTensors | None, proposal) -> tuple[SamplingTensors | None, object]:
    """For target rows that were divided by T already: the target's temperature is 1 (greedy rows 0), the proposal's stays T."""
    if sampling is None:
        return None, proposal
    if sampling.logit_bias is not None or sampling.penalties is not None:
        raise ValueError("sampling: expected neither bias nor penalties with target_scaled: they act before temperature")
    if getattr(proposal, "temperature", 0) is None:
        proposal = dataclasses.replace(proposal, temperature=sampling.temperature)
    return dataclasses.replace(sampling, temperature=(sampling.temperature > 0).float()), proposal
