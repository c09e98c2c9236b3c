"""Text that the target writes itself, for drafters to learn from: prompts continued at temperature 1, many sequences at once.

Keys and values stand in buffers of the final length, so that a step costs one pass over one row of every sequence. In fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build_models as models
from .build_models import Rotation, Sizes, Tensors


class _Writer:
    def __init__(self, tensors: Tensors, sizes: Sizes, batch: int, length: int):
        self.sizes, self.done = sizes, 0
        self.embedding, self.norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
        self.layers = [models.below(tensors, f"model.layers.{index}.") for index in range(sizes.layers)]
        self.rotation = Rotation.at(torch.arange(length), sizes.head_dim)
        shape = (sizes.layers, batch, sizes.kv_heads, length, sizes.head_dim)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[B, n], the next tokens of every sequence -> logits [B, V] after the last."""
        first, last = self.done, self.done + token_ids.shape[1]
        rotation = Rotation(*(table[first:last] for table in self.rotation))
        x = F.embedding(token_ids, self.embedding)
        for index, layer in enumerate(self.layers):
            normed = models.rms_norm(x, layer["input_layernorm.weight"])
            keys, values = models.keys_values(layer, self.sizes, normed, rotation)
            self.keys[index, :, :, first:last], self.values[index, :, :, first:last] = keys, values
            q = models.queries(layer, self.sizes, normed, rotation)
            # Query heads of a group side by side as rows: keys and values are read once for all of them.
            group, rows = self.sizes.heads // self.sizes.kv_heads, last - first
            k, v = self.keys[index, :, :, :last], self.values[index, :, :, :last]
            seen = torch.arange(last) <= torch.arange(first, last)[:, None]
            scores = q.view(q.shape[0], self.sizes.kv_heads, group * rows, -1) @ k.mT / self.sizes.head_dim**0.5
            scores = scores.masked_fill(~seen.repeat(group, 1), float("-inf"))
            attended = (scores.softmax(-1) @ v).view(q.shape).transpose(1, 2).flatten(2)
            x = models.finish_layer(layer, x, attended)
        self.done = last
        return models.logits(models.rms_norm(x[:, -1], self.norm), self.embedding)


@torch.inference_mode()
def continued(tensors: Tensors, sizes: Sizes, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """int64 [B, length]: the prompts [B, n] and what the target writes after them, temperature 1."""
    writer = _Writer(tensors, sizes, prompts.shape[0], length)
    out, logits = prompts, writer(prompts)
    while out.shape[1] < length:
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        out = torch.cat([out, drawn], 1)
        if out.shape[1] < length:
            logits = writer(drawn)
    return out
