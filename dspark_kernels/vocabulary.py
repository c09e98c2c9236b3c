"""Reduced draft vocabularies: the target's id of each of the draft head's ids."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import INT_DTYPES, check_tensor


def ids_from_offsets(offsets: Tensor) -> Tensor:
    """`draft_to_target` int64 [Vd] from a table of offsets: target id = draft id + offset, as in EAGLE-3's `d2t`.

    offsets: int64 or int32 [Vd]. Call it once, when a checkpoint is loaded: it waits for the device. Raises TypeError or ValueError
    for another dtype or shape, and ValueError where a target id would be negative.
    """
    check_tensor("offsets", offsets, dtype=INT_DTYPES, shape=("V",))
    ids = torch.arange(offsets.shape[0], device=offsets.device) + offsets
    if bool((ids < 0).any()):
        raise ValueError("offsets: expected ids of at least 0, got a negative one")
    return ids
