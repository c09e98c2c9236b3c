"""A decoder layer of Gemma 4's full attention, as DSpark drafters for Gemma 4 use it.

    x <- x + norm(O attention(rope(norm(Q n)), rope(norm(k)), unit(v))),  n = norm(x), k = K n, v = V n, or v = k
    x <- s (x + norm(down(gelu(gate n) * up n))),                         n = norm(x)

Against Qwen3 (reference/model.py): four norms a layer, two of them on what is added; values are normalised too (`unit`: RMSNorm
without a weight) and, with attention_k_eq_v, are the keys before their norm and RoPE; queries times keys are not scaled; RoPE turns
only the leading pairs of a head (proportional RoPE: frequencies by the whole head size); GELU by tanh; s is stored per layer.
A norm's weight multiplies in fp32, before the rounding.

Source: Gemma4DSparkModel of github.com/deepseek-ai/DeepSpec, on Hugging Face transformers' Gemma 4 (names of keys and tensors).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_kernels.checkpoint import rope

from .model import Rotation, Shape, Weights


def shape(config: Mapping) -> Shape:
    """The sizes of full attention. Raises ValueError for a missing key and for what these layers do not compute."""
    shared = bool(config.get("attention_k_eq_v"))
    try:
        turn = rope.gemma4(config, "config")
        sizes = Shape(
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_global_key_value_heads" if shared else "num_key_value_heads"],
            head_dim=config["global_head_dim"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            vocab=config["vocab_size"],
            eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=turn.theta,
            rotated=turn.rotated,
            attention_scale=1.0,
        )
    except KeyError as missing:
        raise ValueError(f"config: expected the key {missing}, there is none") from None
    for key in ("attention_bias", "enable_moe_block", "hidden_size_per_layer_input", "use_double_wide_mlp"):
        if config.get(key):
            raise ValueError(f"config: expected no {key}, got {config[key]!r}")
    return sizes


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in at least fp32 to the end."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * weight.to(wide.dtype)).to(x.dtype)


class DecoderLayer:
    """One layer from the tensors `self_attn.*`, `mlp.*`, the four norms and `layer_scalar`; the interface of model.DecoderLayer."""

    def __init__(self, shape: Shape, take: Weights):
        self.shape = shape
        d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.input_norm = take("input_layernorm.weight", d)
        self.after_attention = take("post_attention_layernorm.weight", d)
        self.before_mlp = take("pre_feedforward_layernorm.weight", d)
        self.after_mlp = take("post_feedforward_layernorm.weight", d)
        self.q_proj = take("self_attn.q_proj.weight", q, d)
        self.k_proj = take("self_attn.k_proj.weight", kv, d)
        self.v_proj = take("self_attn.v_proj.weight", kv, d) if "self_attn.v_proj.weight" in take else self.k_proj
        self.o_proj = take("self_attn.o_proj.weight", d, q)
        self.q_norm = take("self_attn.q_norm.weight", shape.head_dim)
        self.k_norm = take("self_attn.k_norm.weight", shape.head_dim)
        self.gate_proj = take("mlp.gate_proj.weight", shape.intermediate, d)
        self.up_proj = take("mlp.up_proj.weight", shape.intermediate, d)
        self.down_proj = take("mlp.down_proj.weight", d, shape.intermediate)
        self.scalar = take("layer_scalar", 1)

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Keys and values [N, Hkv, D] of x [N, d], which is taken as it is."""
        heads, eps = (-1, self.shape.kv_heads, self.shape.head_dim), self.shape.eps
        keys = rotation(rms_norm(F.linear(x, self.k_proj).view(heads), self.k_norm, eps))
        return keys, rms_norm(F.linear(x, self.v_proj).view(heads), None, eps)

    def __call__(self, x: Tensor, rotation: Rotation, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """x [N, d] -> [N, d]; attend(queries [N, Hq, D], keys, values [N, Hkv, D]) -> [N, Hq * D]."""
        eps = self.shape.eps
        normed = rms_norm(x, self.input_norm, eps)
        queries = F.linear(normed, self.q_proj).view(-1, self.shape.heads, self.shape.head_dim)
        queries = rotation(rms_norm(queries, self.q_norm, eps))
        mixed = F.linear(attend(queries, *self.keys_values(normed, rotation)), self.o_proj)
        x = x + rms_norm(mixed, self.after_attention, eps)
        normed = rms_norm(x, self.before_mlp, eps)
        gated = F.gelu(F.linear(normed, self.gate_proj), approximate="tanh") * F.linear(normed, self.up_proj)
        return (x + rms_norm(F.linear(gated, self.down_proj), self.after_mlp, eps)) * self.scalar
