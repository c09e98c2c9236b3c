"""Between arrays by batch row, as engines hand them over, and arrays by request slot, as ops with `state_indices` read them.

Temperature, seeds and proposals outlive a step, so engines keep them by slot; anchors, positions and draft tokens they have by
batch row. Acceptance needs no more than it is given: it reads ids and positions from the layout, and returns tokens and next_token
by batch row. Drafting and layouts read anchors and positions by slot, and write drafts by slot: for these the few integers are
copied, [R] in and [R, K] out, by small launches of torch, without a host synchronisation.

Symbols: R requests in the batch, S request slots, K drafts. state_indices: int32 or int64 [R], -1 = a padding row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import INT_DTYPES, check_device, check_int, check_tensor


class AnchorsBySlot:
    """Anchors and their positions by request slot, int64 [S] each, for arrays by batch row. Allocated once, for captured graphs.

    num_slots: S. device: as in `Workspace`.
    """

    def __init__(self, num_slots: int, device=None):
        self._slots, device = check_int("num_slots", num_slots, low=1), check_device("device", device)
        # One entry more: padding rows write there.
        self._anchors, self._positions = (torch.zeros(num_slots + 1, dtype=torch.int64, device=device) for _ in range(2))

    def write(self, anchors: Tensor, anchor_positions: Tensor, state_indices: Tensor) -> tuple[Tensor, Tensor]:
        """Copy anchors and anchor_positions, int32 or int64 [R], to their slots. Returns both by slot, [S]: arguments of an op.

        Entries of other slots keep what they had. An index that names no slot is a padding row.
        """
        rows = check_tensor("state_indices", state_indices, dtype=INT_DTYPES, shape=("R",), device=self._anchors.device).shape[0]
        for name, value in (("anchors", anchors), ("anchor_positions", anchor_positions)):
            check_tensor(name, value, dtype=INT_DTYPES, shape=(rows,), device=self._anchors.device)
        slots = _or_else(state_indices, self._slots, self._slots)
        self._anchors.index_copy_(0, slots, anchors.to(torch.int64))
        self._positions.index_copy_(0, slots, anchor_positions.to(torch.int64))
        return self._anchors[:-1], self._positions[:-1]


def rows_of(by_slot: Tensor, state_indices: Tensor, fill: int = -1, out: Tensor | None = None) -> Tensor:
    """[R, ...]: the rows of an array [S, ...] that belong to the batch, `fill` for padding rows; for example of `DraftBlock.tokens`.

    out: a tensor to copy them to, of any dtype.
    """
    check_tensor("state_indices", state_indices, dtype=INT_DTYPES, shape=("R",), device=by_slot.device)
    live = (state_indices >= 0) & (state_indices < by_slot.shape[0])
    rows = by_slot.index_select(0, _or_else(state_indices, by_slot.shape[0], 0))
    rows = torch.where(live.view(-1, *[1] * (by_slot.dim() - 1)), rows, fill)
    return rows if out is None else out.copy_(rows)


def _or_else(state_indices: Tensor, slots: int, other: int) -> Tensor:
    """int64 [R]: the slots, `other` for padding rows."""
    return torch.where((state_indices >= 0) & (state_indices < slots), state_indices, other).to(torch.int64)
