"""When a row ends: at the first of its new tokens after which a criterion of transformers holds.

Stop tokens and the longest length are looked for on the device, for all rows and tokens of a round at once; any other criterion is
called as plain generation calls it, once for each length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .lengths import prefixes


class Cut(NamedTuple):
    """Of the new tokens of every row."""

    kept: Tensor  # int64 [B], how many the row keeps
    ended: Tensor  # bool [B], whether it ends there


class Stopping(NamedTuple):
    """stop_tokens: int64 ids or None. max_length: columns of a text, padding included. others: criteria of any kind."""

    stop_tokens: Tensor | None
    max_length: int
    others: list

    @classmethod
    def read(cls, criteria, max_length: int, device) -> Stopping:
        """criteria: a StoppingCriteriaList."""
        from transformers.generation import stopping_criteria as theirs

        tokens = [own.eos_token_id.to(device).flatten() for own in criteria if type(own) is theirs.EosTokenCriteria]
        lengths = [own.max_length for own in criteria if type(own) is theirs.MaxLengthCriteria]
        others = [own for own in criteria if type(own) not in (theirs.EosTokenCriteria, theirs.MaxLengthCriteria)]
        return cls(torch.cat(tokens) if tokens else None, min([max_length, *lengths]), others)

    def cut(self, tokens: Tensor, counts: Tensor, filled: Tensor, texts: Tensor) -> Cut:
        """Where rows end.

        tokens: int64 [B, n], of which row b emitted counts[b]; filled: int64 [B], columns of the texts before them; texts: int64
        [B, columns], the new tokens in place.
        """
        steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        stops = filled[:, None] + steps >= self.max_length
        if self.stop_tokens is not None:
            stops |= torch.isin(tokens, self.stop_tokens)
        if self.others:
            have, new = filled.tolist(), counts.tolist()
            for length, rows, own in prefixes([start + 1 for start in have], new, tokens.device):
                held = torch.stack([torch.as_tensor(other(texts[:, :length], None)).expand(len(have)) for other in self.others])
                stops[rows, own] |= held.to(stops.device).any(0)[rows]
        stops &= steps <= counts[:, None]
        ended = stops.any(1)
        return Cut(torch.where(ended, stops.int().argmax(1) + 1, counts), ended)
