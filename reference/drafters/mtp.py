"""A multi-token-prediction module on the target's last hidden state, chained for K drafts.

    x_i = P [norm(E(t_{i+1})); norm(h_i)];  g_i = layer(x_i);  t_{i+2} ~ softmax(head(norm(g_i)) / T)

h_i is the target's last hidden state at position i (before its final norm), E and head are the target's. What takes the place of h
for later drafts: chained.py. Source: DeepSeek-V3, arXiv 2412.19437, section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import DecoderLayer, Rows, Shape, Target, Weights, rms_norm, run_layers
from .chained import Chained
from .protocol import Committed, max_drafts_of


class MTP(Chained):
    """One MTP module, used K times.

    config: `max_drafts` (default 4), and any layer size that differs from the target's config. tensors: enorm.weight,
    hnorm.weight, norm.weight [d], eh_proj.weight [d, 2d] (input [embedding; hidden]), layer.* (a decoder layer). Raises
    ValueError for a missing tensor or a wrong shape.
    """

    def __init__(self, config: Mapping, tensors: Mapping[str, Tensor], target: Target):
        self.target, self.max_drafts = target, max_drafts_of(config)
        self.shape = Shape.from_config({**target.config, **config, "num_hidden_layers": 1})
        Shape.check_full_attention(config)
        take, d = Weights(tensors, target.device, target.dtype), target.shape.hidden
        self.embedding_norm, self.hidden_norm = take("enorm.weight", d), take("hnorm.weight", d)
        self.projection, self.norm = take("eh_proj.weight", d, 2 * d), take("norm.weight", d)
        self.layer = DecoderLayer(self.shape, take.below("layer."))

    def _hidden(self, committed: Committed) -> Tensor:
        return committed.pre_norm

    def _run(self, next_ids: Tensor, hidden: Tensor, rows: Rows, drafted: int | None = None) -> Tensor:
        embedded = rms_norm(F.embedding(next_ids, self.target.embedding), self.embedding_norm, self.shape.eps)
        x = torch.cat([embedded, rms_norm(hidden, self.hidden_norm, self.shape.eps)], -1)
        (out,) = run_layers([self.layer], F.linear(x, self.projection), rows, self._cache, causal=True)
        return out

    def _logits(self, state: Tensor) -> Tensor:
        return self.target.logits(rms_norm(state, self.norm, self.shape.eps))
