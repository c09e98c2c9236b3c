"""The drafter's backbone: one pass over the anchor and mask tokens gives the hidden states and base logits of K drafts.

    context of a token = norm(fc [h_l1; ...; h_lm]);  keys and values of every layer: projections of [context of the tokens; block]

The block's rows see each other in both directions and the context of every token before the anchor; in layers with a window
(drafters of the speculators library) the last tokens of that context, and maybe no row after their own. The context of all rows of a
round is injected, whether acceptance kept them or not: those that it refused stand at the next anchor or beyond, where nothing is
seen but what the next block writes there.

Sources: DSpark, arXiv 2607.05147; DFlash, arXiv 2602.06036; github.com/deepseek-ai/DeepSpec.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoint import DrafterCheckpoint, attention
from .cache import PositionCache
from .layers import Gemma4Layer, Qwen3Layer, Rotation, Shape


class Backbone:
    """A block drafter without its heads.

    checkpoint: of `load_drafter`. embedding, lm_head: the target's [V, d], for a drafter that lacks either (DFlash, speculators).
    """

    def __init__(self, checkpoint: DrafterCheckpoint, embedding: Tensor, lm_head: Tensor):
        config, device, dtype = checkpoint.config, lm_head.device, lm_head.dtype
        gemma = config["architectures"] == ["Gemma4DSparkModel"]
        tensors = {
            name: tensor.to(device, dtype) for name, tensor in checkpoint.tensors.items() if tensor.is_floating_point()
        }  # the maps of a draft vocabulary are ids
        layer = Gemma4Layer if gemma else Qwen3Layer
        self.shape, self._norm = Shape.of(config, gemma), layer.norm
        self._layers = [
            layer(self.shape, {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)})
            for start in (f"layers.{index}." for index in range(config["num_hidden_layers"]))
        ]
        self._fc, self._context_norm, self._final_norm = (tensors[f"{name}.weight"] for name in ("fc", "hidden_norm", "norm"))
        self._embedding = tensors.get("embed_tokens.weight", embedding)
        self._lm_head = tensors.get("lm_head.weight", lm_head)
        self._scale = torch.tensor(config["hidden_size"] ** 0.5, device=device, dtype=dtype) if gemma else None
        self._cap = config.get("final_logit_softcapping") if gemma else None
        self._sights = attention.sights(config)
        self.drafts, self._mask_token = config["block_size"], config["mask_token_id"]
        self.block_rows = self.drafts if config.get("anchor_first", True) else self.drafts + 1

    def start(self, length: int) -> None:
        """Forget everything, for texts of at most `length` tokens."""
        self.cache = PositionCache(length + self.block_rows)

    def inject(self, features: Tensor, positions: Tensor, real: Tensor | None = None) -> None:
        """Give the context of rows: features [B, n, m * d], positions int64 [B, n], real bool [B, n], false for padding."""
        context = self._norm(F.linear(features.to(self._fc.dtype), self._fc), self._context_norm, self.shape.eps)
        rotation = Rotation.at(positions, self.shape, context.dtype)
        self.cache.place(self.cache.columns(positions, real), 0)
        for index, layer in enumerate(self._layers):
            self.cache.update(*layer.keys_values(context, rotation), index)

    def hidden(self, anchors: Tensor, anchor_positions: Tensor, width: int) -> Tensor:
        """[B, K, d] after the final norm; anchors, anchor_positions: int64 [B]; width: columns up to the end of every block."""
        steps = torch.arange(self.block_rows, device=anchors.device)
        token_ids = torch.where(steps > 0, self._mask_token, anchors[:, None])
        positions = anchor_positions[:, None] + steps
        x = F.embedding(token_ids, self._embedding)
        if self._scale is not None:
            x = x * self._scale
        rotation = Rotation.at(positions, self.shape, x.dtype)
        masks = {sight: self._mask(sight, anchor_positions, width) for sight in set(self._sights)}
        self.cache.place(self.cache.columns(positions), width)
        for index, (layer, sight) in enumerate(zip(self._layers, self._sights, strict=True)):
            x = layer(x, rotation, lambda keys, values, index=index: self.cache.update(keys, values, index), masks[sight])
        return self._norm(x, self._final_norm, self.shape.eps)[:, -self.drafts :]

    def _mask(self, sight: attention.Sight, anchor_positions: Tensor, width: int) -> Tensor:
        """bool [B, 1, block rows, width], true = seen. anchor_positions: int64 [B]."""
        columns = torch.arange(width, device=anchor_positions.device)
        start = anchor_positions[:, None, None]
        end = start + self.block_rows
        if sight.causal:
            end = start + torch.arange(1, self.block_rows + 1, device=columns.device)[:, None]
        seen = columns < end
        if sight.window is not None:
            seen = seen & (columns >= start - sight.window)
        return seen[:, None].expand(-1, -1, self.block_rows, -1)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """[B, n, d] -> [B, n, V or ids of the draft head], before the sequential head."""
        logits = F.linear(hidden, self._lm_head)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap
