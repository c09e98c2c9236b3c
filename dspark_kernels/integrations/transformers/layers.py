"""One layer of a drafter's backbone: Qwen3's, or that of Gemma 4's full attention.

    Qwen3    x <- x + O attention(rope(norm(Q n)), rope(norm(K n)), V n),    n = norm(x)
             x <- x + down(silu(gate n) * up n),                             n = norm(x)
    Gemma 4  x <- x + norm(O attention(rope(norm(Q n)), rope(norm(k)), unit(v))),  k = K n, v = V n or k
             x <- s (x + norm(down(gelu(gate n) * up n)))

norm: RMSNorm with a weight, of queries and keys per head; unit: without one. Queries times keys are scaled by 1 / sqrt(D) in Qwen3
and not at all in Gemma 4. Gemma's weights multiply before the rounding to the model's dtype, Qwen3's after it.

Sources: Qwen3ForCausalLM and Gemma4TextModel of Hugging Face transformers, Qwen3DSparkModel and Gemma4DSparkModel of
github.com/deepseek-ai/DeepSpec.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoint import rope, scaling


class Shape(NamedTuple):
    """The sizes of a backbone's layers."""

    head_dim: int
    eps: float
    theta: float
    rotated: float  # the share of a head's pairs that RoPE turns
    scale: float  # of queries times keys
    scaled: scaling.Scaling | None = None  # RoPE of another kind than `default`

    @classmethod
    def of(cls, config: Mapping, gemma: bool) -> Shape:
        """config: as `checkpoint.load_drafter` returns it, in which everything is checked."""
        turn = (rope.gemma4 if gemma else rope.qwen3)(config, "config")
        head_dim = config["global_head_dim" if gemma else "head_dim"]
        return cls(
            head_dim, config.get("rms_norm_eps", 1e-6), turn.theta, turn.rotated, 1.0 if gemma else head_dim**-0.5, turn.scaled
        )


class Rotation(NamedTuple):
    """RoPE at some positions: cos and sin [B, 1, n, D]. The first half of a head pairs with the second."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, shape: Shape, dtype: torch.dtype) -> Rotation:
        if shape.scaled is None:
            pairs = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32)
            frequencies, factor = shape.theta ** -(pairs / shape.head_dim), 1.0
            frequencies[int(shape.rotated * shape.head_dim // 2) :].zero_()
        else:
            frequencies = shape.scaled.frequencies(shape.theta, shape.head_dim, positions.device)
            factor = shape.scaled.attention
        angles = positions[:, None, :, None].float() * torch.cat([frequencies, frequencies])
        return cls((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin


def qwen3_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: rounded to x's dtype, then weighted."""
    return weight * _unit(x, eps).to(x.dtype)


def gemma4_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dimension: weighted in fp32, then rounded."""
    wide = _unit(x, eps)
    return (wide if weight is None else wide * weight.float()).to(x.dtype)


def _unit(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class Qwen3Layer:
    """weights: a layer's tensors by the names of the checkpoint."""

    norm = staticmethod(qwen3_norm)

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor]):
        self.shape, self.weights = shape, weights

    def _heads(self, x: Tensor) -> Tensor:
        """[B, n, heads * D] -> [B, n, heads, D]."""
        return x.unflatten(-1, (-1, self.shape.head_dim))

    def _normed(self, x: Tensor, name: str) -> Tensor:
        return self.norm(x, self.weights[f"{name}.weight"], self.shape.eps)

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, n, D] of x [B, n, d], which is normalised already."""
        keys = self._normed(self._heads(F.linear(x, self.weights["self_attn.k_proj.weight"])), "self_attn.k_norm")
        values = self._heads(F.linear(x, self.weights["self_attn.v_proj.weight"]))
        return rotation(keys.transpose(1, 2)), values.transpose(1, 2)

    def _attention(self, x: Tensor, rotation: Rotation, write, mask: Tensor) -> Tensor:
        queries = self._normed(self._heads(F.linear(x, self.weights["self_attn.q_proj.weight"])), "self_attn.q_norm")
        keys, values = write(*self.keys_values(x, rotation))
        out = F.scaled_dot_product_attention(
            rotation(queries.transpose(1, 2)), keys, values, attn_mask=mask, scale=self.shape.scale, enable_gqa=True
        )
        return F.linear(out.transpose(1, 2).flatten(2), self.weights["self_attn.o_proj.weight"])

    def _mlp(self, x: Tensor, activate) -> Tensor:
        gated = activate(F.linear(x, self.weights["mlp.gate_proj.weight"])) * F.linear(x, self.weights["mlp.up_proj.weight"])
        return F.linear(gated, self.weights["mlp.down_proj.weight"])

    def __call__(self, x: Tensor, rotation: Rotation, write, mask: Tensor) -> Tensor:
        """x [B, n, d] -> [B, n, d].

        write(keys, values) puts those of the rows into the cache and returns all that mask (bool [B, 1, n, width], true = seen)
        speaks of.
        """
        x = x + self._attention(self._normed(x, "input_layernorm"), rotation, write, mask)
        return x + self._mlp(self._normed(x, "post_attention_layernorm"), F.silu)


class Gemma4Layer(Qwen3Layer):
    """As Qwen3Layer, with Gemma 4's norms, scales and activation."""

    norm = staticmethod(gemma4_norm)

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, n, D] of x [B, n, d], which is normalised already."""
        keys = self._heads(F.linear(x, self.weights["self_attn.k_proj.weight"]))
        own = self.weights.get("self_attn.v_proj.weight")  # without one the values are the keys
        values = gemma4_norm(keys if own is None else self._heads(F.linear(x, own)), None, self.shape.eps)
        return rotation(self._normed(keys, "self_attn.k_norm").transpose(1, 2)), values.transpose(1, 2)

    def __call__(self, x: Tensor, rotation: Rotation, write, mask: Tensor) -> Tensor:
        mixed = self._attention(self._normed(x, "input_layernorm"), rotation, write, mask)
        x = x + self._normed(mixed, "post_attention_layernorm")
        out = self._mlp(self._normed(x, "pre_feedforward_layernorm"), lambda gate: F.gelu(gate, approximate="tanh"))
        return (x + self._normed(out, "post_feedforward_layernorm")) * self.weights["layer_scalar"]
