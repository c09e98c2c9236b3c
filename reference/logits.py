"""How a row of logits is read before anything is decided: bad values, the scale of its temperature, and the ids that it knows.

    scale = min(1 / T, 1e30), 0 for a greedy row;  NaN is read as -inf;  settings act on a row by the target's ids

Symbols: T temperature, V ids of a row, W1 the embedding of a sequential head. Source: this project's edge values
(docs/edge-values.md).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dspark_kernels.types import Flag, MarkovHead, SamplingTensors

from .sampling import adjust


def inverse_temperature(temperature: float) -> float:
    """1 / T, at most 1e30; 0 for a greedy row (T not above 0)."""
    return min(1.0 / temperature, 1e30) if temperature > 0 else 0.0


def read_logits(row: Tensor) -> tuple[Tensor, int]:
    """fp64 logits with NaN read as -inf, and the flags of what the row contains."""
    row = row.to(torch.float64, copy=True)
    if math.isfinite(float(row.sum())):  # the usual row needs one pass
        return row, 0
    nan = row.isnan()
    flags = int(Flag.NAN) if bool(nan.any()) else 0
    row = torch.where(nan, -math.inf, row)
    if not bool(row.isfinite().any()):
        flags |= int(Flag.NONFINITE_ROW)
    return row, flags


def target_ids(head: MarkovHead | None, sampling: SamplingTensors | None) -> int:
    """How many of the target's ids W1, bias and mask all cover."""
    known = [2**31 - 1] if head is None else [head.w1.shape[0]]
    if sampling is not None and sampling.logit_bias is not None:
        known.append(sampling.logit_bias.shape[1])
    if sampling is not None and sampling.token_bitmask is not None:
        known.append(32 * sampling.token_bitmask.shape[-1])
    return min(known)


def refuse_repeated(ids: Tensor | None, targets: int) -> None:
    """A map of draft ids [Vd] has each of the target's ids at most once: the probabilities of two columns would have to be added."""
    if ids is not None and len(known := ids[(ids >= 0) & (ids < targets)]) != len(known.unique()):
        raise ValueError("draft_to_target: expected each target id once")


def adjusted(
    row: Tensor, sampling: SamplingTensors, slot: int, mask_row: int, path: list[int], ids: Tensor | None, unused: Tensor | None
) -> Tensor:
    """`adjust` for a row whose columns have the target's ids `ids` (None: 0, 1, 2, ...); `unused` columns stand for no token."""
    whole = row
    if ids is not None:
        width = int(ids[~unused].max()) + 1 if bool((~unused).any()) else 1
        whole = torch.zeros(width, dtype=row.dtype, device=row.device)
        whole[ids[~unused]] = row[~unused]
    if sampling.logit_bias is not None:
        # A row may be narrower than the table.
        sampling = dataclasses.replace(sampling, logit_bias=sampling.logit_bias[:, : whole.shape[0]])
    whole = adjust(whole, sampling, slot, mask_row, path)
    return whole if ids is None else row.masked_scatter(~unused, whole[ids[~unused]])
