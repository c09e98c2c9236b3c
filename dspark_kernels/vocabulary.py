"""Reduced draft vocabularies: the target's id of each of the draft head's ids."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import INT_DTYPES, check_int, check_tensor, repeated_id

_MOST_IDS = 2**31 - 1  # ids are int32 in the kernels


def ids_from_offsets(offsets: Tensor, vocab_size: int | None = None) -> Tensor:
    """`draft_to_target` int64 [Vd] from a table of offsets: target id = draft id + offset, as in EAGLE-3's `d2t`.

    offsets: int64 or int32 [Vd]. vocab_size: V, the target's number of ids; give it, for without it only ids that no vocabulary has
    are refused. Call it once, when a checkpoint is loaded: it waits for the device.

    Raises TypeError or ValueError for another dtype or shape, and ValueError for a target id outside 0 .. V - 1, or one of two draft
    ids: acceptance knows the probability of one of them, while drafts come from both.
    """
    check_tensor("offsets", offsets, dtype=INT_DTYPES, shape=("Vd",))
    most = _MOST_IDS if vocab_size is None else check_int("vocab_size", vocab_size, low=1, high=_MOST_IDS)
    ids = torch.arange(offsets.shape[0], device=offsets.device) + offsets
    found = ids.tolist()
    for draft, target in enumerate(found):
        if not 0 <= target < most:
            raise ValueError(f"offsets: expected target ids from 0 to {most - 1}, got {target} for draft id {draft}")
    repeated_id("offsets", found, most)
    return ids
