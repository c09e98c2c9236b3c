"""Keys and values by position: column p of row b is token p of request b, in every layer.

Rows of a batch so have lengths of their own without holes, and left padding is in no column. A draft that acceptance refuses needs
no removal: it stands beyond the next anchor, where masks hide it until a later round writes its column again. All shapes are fixed
when the cache is made, so that rounds over the whole width can be captured or compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PositionCache:
    """What models of transformers need of a cache, and the drafter's layers too.

    length: columns that can be seen. One more takes what nobody sees: padding, and positions past the end.
    """

    is_compileable = False

    def __init__(self, length: int):
        self.length = length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._columns: Tensor | None = None
        self._width = length

    def columns(self, positions: Tensor, real: Tensor | None = None) -> Tensor:
        """The column of each row, int64 like `positions`; real: bool, false for padding."""
        columns = positions.clamp(max=self.length)
        return columns if real is None else columns.masked_fill(~real, self.length)

    def place(self, columns: Tensor, width: int) -> None:
        """Of the next pass: columns int64 [B, n] of its rows; width: columns that it reads."""
        self._columns, self._width = columns, width

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, Hkv, n, D], and return those of the pass's width."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = tuple(new.new_zeros(*new.shape[:2], self.length + 1, new.shape[3]) for new in (keys, values))
        for old, new in zip(self._layers[layer_idx], (keys, values), strict=True):
            old.scatter_(2, self._columns[:, None, :, None].expand_as(new), new)
        old_keys, old_values = self._layers[layer_idx]
        return old_keys[:, :, : self._width], old_values[:, :, : self._width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions and masks, which models derive from it, are given to every pass."""
        return 0


def causal_mask(positions: Tensor, width: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """What rows at `positions` [B, n] may see of `width` columns, to be added to scores [B, 1, n, width]: 0, or the least number.

    window: columns that a row sees, itself included; None = all before it.
    """
    columns, own = torch.arange(width, device=positions.device), positions[:, None, :, None]
    hidden = columns > own
    if window is not None:
        hidden |= columns <= own - window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, torch.finfo(dtype).min)
