"""Smaller output weights of a sequential head: W2 in fp8 e4m3 or int8 with one scale per row, made once on the host.

    scale_v = max_j |W2[v, j]| / largest,  stored[v, j] = round(W2[v, j] / scale_v),  W2 ~ scale * stored

largest = 127 (int8) or 448 (e4m3). A block reads W2 once per draft position, so bytes are time; what drafts lose in acceptance is
measured by bench/shared/acceptance.py.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .checks import LOGIT_DTYPES, check_tensor, check_type
from .types import MarkovHead

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantise_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weight [V, r] as `dtype`, scale fp32 [V]) so that scale[:, None] * stored is close to `weight`; a row of zeros gets scale 1.

    dtype: torch.int8 or torch.float8_e4m3fn. Raises ValueError for weights that are not finite.
    """
    check_tensor("weight", weight, dtype=LOGIT_DTYPES, shape=("V", "r"))
    if dtype not in LARGEST:
        raise ValueError(f"dtype: expected torch.int8 or torch.float8_e4m3fn, got {dtype}")
    values = weight.detach().float()
    if not bool(values.isfinite().all()):
        raise ValueError("weight: expected finite numbers, got inf or NaN")
    scale = values.abs().amax(1) / LARGEST[dtype]
    # A scale below the normal range would lose the bits that its quotient needs.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    quotient = (values / scale[:, None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    stored = quotient.round().to(dtype) if dtype == torch.int8 else quotient.to(dtype)
    return stored, scale


def quantise_head(head: MarkovHead, dtype: torch.dtype) -> MarkovHead:
    """The same head (of any kind) with W2 [Vd, r] in `dtype` and its `w2_scale` fp32 [Vd].

    dtype: torch.int8 or torch.float8_e4m3fn. Raises TypeError or ValueError for another argument, weights that are not finite, and
    a W2 that is quantised already.
    """
    check_type("head", head, MarkovHead)
    if head.w2_scale is not None:
        raise ValueError(f"head.w2: expected weights that are not quantised, got {head.w2.dtype} with scales")
    stored, scale = quantise_rows(head.w2, dtype)
    return dataclasses.replace(head, w2=stored, w2_scale=scale)
