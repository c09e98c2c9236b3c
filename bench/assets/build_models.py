"""The embedded models' forward passes over whole batches, for training: pure functions of tensors named as in the checkpoints.

    language model   x <- decoder layers (causal);  logits = norm(x) E^T
    MTP              g_i = layer(P [norm(E(t_{i+1})); norm(h_i)]);  logits of t_{i+2} = norm(g_i) E^T
    block, DSpark    rows (anchor, mask, mask, ...) of every anchor attend to each other and to the context before the anchor,
                     ctx = norm(fc [h_l1; ...; h_lm]);  logits_k = norm(row k) E^T + bias(token k - 1)

Symbols: B sequences of T tokens, A anchors in each, K drafts, d hidden size, E the target's embedding (shared, not trained). The
reference is `reference.model` with `reference.drafters`, which serve what is trained here; a test compares them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokenizer import MASK

EPS, ROPE_THETA = 1e-6, 10000.0
HEADS = ("vanilla", "gated", "rnn")
Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a decoder: (d, intermediate size, layers, query heads, key-value heads, head size) and the vocabulary."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 1024

    def config(self) -> dict:
        """Keys of a Hugging Face config."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": EPS,
            "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
            "hidden_act": "silu",
        }


class Rotation(NamedTuple):
    """cos and sin, [T, D], or [B, 1, N, D] for positions [B, N]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_dim: int) -> Rotation:
        frequencies = ROPE_THETA ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = positions[..., None].float() * frequencies
        angles = torch.cat([angles, angles], -1)
        if positions.dim() > 1:
            angles = angles[:, None]
        return cls(angles.cos(), angles.sin())

    def __call__(self, x: Tensor) -> Tensor:  # [B, heads, N, D]
        first, second = x.chunk(2, -1)
        return x * self.cos.to(x.dtype) + torch.cat([-second, first], -1) * self.sin.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), EPS)


def below(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _heads(x: Tensor, count: int) -> Tensor:  # [B, N, heads * D] -> [B, heads, N, D]
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def queries(layer: Tensors, sizes: Sizes, x: Tensor, rotation: Rotation) -> Tensor:
    return rotation(rms_norm(_heads(F.linear(x, layer["self_attn.q_proj.weight"]), sizes.heads), layer["self_attn.q_norm.weight"]))


def keys_values(layer: Tensors, sizes: Sizes, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """[B, Hkv, N, D] of x [B, N, d], which is taken as it is."""
    keys = rms_norm(_heads(F.linear(x, layer["self_attn.k_proj.weight"]), sizes.kv_heads), layer["self_attn.k_norm.weight"])
    return rotation(keys), _heads(F.linear(x, layer["self_attn.v_proj.weight"]), sizes.kv_heads)


def attend(sizes: Sizes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """[B, N, heads * D]; query heads share key-value heads in groups."""
    group = sizes.heads // sizes.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k.to(q.dtype), v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def finish_layer(layer: Tensors, x: Tensor, attended: Tensor) -> Tensor:
    x = x + F.linear(attended, layer["self_attn.o_proj.weight"])
    normed = rms_norm(x, layer["post_attention_layernorm.weight"])
    gate = F.silu(F.linear(normed, layer["mlp.gate_proj.weight"]))
    return x + F.linear(gate * F.linear(normed, layer["mlp.up_proj.weight"]), layer["mlp.down_proj.weight"])


def decoder_layer(layer: Tensors, sizes: Sizes, x: Tensor, rotation: Rotation) -> Tensor:
    """Causal, over the whole sequence."""
    normed = rms_norm(x, layer["input_layernorm.weight"])
    k, v = keys_values(layer, sizes, normed, rotation)
    return finish_layer(layer, x, attend(sizes, queries(layer, sizes, normed, rotation), k, v, None, True))


class Passed(NamedTuple):
    """What a pass of a language model gives."""

    hidden: Tensor  # [B, T, d] after the final norm
    pre_norm: Tensor  # [B, T, d]
    features: Tensor | None  # [B, T, m * d]


def language_model(tensors: Tensors, sizes: Sizes, token_ids: Tensor, feature_layers: tuple[int, ...] = ()) -> Passed:
    x = F.embedding(token_ids, tensors["model.embed_tokens.weight"])
    rotation = Rotation.at(torch.arange(token_ids.shape[1]), sizes.head_dim)
    outputs = {-1: x}
    for index in range(sizes.layers):
        x = outputs[index] = decoder_layer(below(tensors, f"model.layers.{index}."), sizes, x, rotation)
    features = torch.cat([outputs[i] for i in feature_layers], -1) if feature_layers else None
    return Passed(rms_norm(x, tensors["model.norm.weight"]), x, features)


def logits(hidden: Tensor, embedding: Tensor) -> Tensor:
    """fp32, or fp64 of fp64."""
    found = F.linear(hidden, embedding.to(hidden.dtype))
    return found if found.dtype == torch.float64 else found.float()


def mtp_hidden(tensors: Tensors, sizes: Sizes, embedding: Tensor, next_ids: Tensor, pre_norm: Tensor) -> Tensor:
    """norm(g) [B, n, d] of rows with hidden states [B, n, d] and the tokens after them [B, n]."""
    embedded = rms_norm(F.embedding(next_ids, embedding), tensors["enorm.weight"])
    hidden = rms_norm(pre_norm, tensors["hnorm.weight"]).to(embedded.dtype)
    x = F.linear(torch.cat([embedded, hidden], -1), tensors["eh_proj.weight"])
    rotation = Rotation.at(torch.arange(next_ids.shape[1]), sizes.head_dim)
    return rms_norm(decoder_layer(below(tensors, "layer."), sizes, x, rotation), tensors["norm.weight"])


class Blocks(NamedTuple):
    """The drafted rows of a batch: A blocks of K rows in every sequence, side by side."""

    anchors: Tensor  # int64 [B, A]: where the anchors stand, from 1
    drafts: int

    @property
    def positions(self) -> Tensor:
        """[B, A * K], of the rows; row k predicts the token at its position + 1."""
        return (self.anchors[:, :, None] + torch.arange(self.drafts)).flatten(1)

    def token_ids(self, sequences: Tensor) -> Tensor:
        """Anchor and masks, [B, A * K]."""
        ids = torch.full((*self.anchors.shape, self.drafts), MASK)
        ids[:, :, 0] = sequences.gather(1, self.anchors)
        return ids.flatten(1)

    def mask(self, length: int) -> Tensor:
        """bool [B, 1, A * K, T + A * K]: the context before the own anchor, and the own block."""
        batch, count = self.anchors.shape
        block = torch.arange(count).repeat_interleave(self.drafts)
        context = torch.arange(length) < self.anchors.repeat_interleave(self.drafts, 1)[:, :, None]
        own = (block[:, None] == block).expand(batch, -1, -1)
        return torch.cat([context, own], -1)[:, None]


def block_hidden(tensors: Tensors, sizes: Sizes, embedding: Tensor, sequences: Tensor, features: Tensor, blocks: Blocks) -> Tensor:
    """Hidden states of the predicting rows after the final norm, [B, A * K, d]."""
    context = rms_norm(F.linear(features, tensors["fc.weight"]), tensors["hidden_norm.weight"])
    length = sequences.shape[1]
    of_context = Rotation.at(torch.arange(length), sizes.head_dim)
    of_rows, mask = Rotation.at(blocks.positions, sizes.head_dim), blocks.mask(length)
    x = F.embedding(blocks.token_ids(sequences), embedding)
    for index in range(sizes.layers):
        layer = below(tensors, f"layers.{index}.")
        normed = rms_norm(x, layer["input_layernorm.weight"])
        known = keys_values(layer, sizes, context, of_context)
        own = keys_values(layer, sizes, normed, of_rows)
        k, v = (torch.cat([a.to(b.dtype), b], 2) for a, b in zip(known, own, strict=True))
        x = finish_layer(layer, x, attend(sizes, queries(layer, sizes, normed, of_rows), k, v, mask, False))
    return rms_norm(x, tensors["norm.weight"])


def transition(tensors: Tensors, kind: str, hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """(bias [B, A, K, V], W1 of the previous tokens [B, A, K, r]). hidden [B, A, K, d], previous int64 [B, A, K]."""
    latent = known = F.embedding(previous, tensors["markov_head.markov_w1.weight"])
    if kind == "gated":
        joined = torch.cat([hidden, known.to(hidden.dtype)], -1)
        gate = F.linear(joined, tensors["markov_head.gate_proj.weight"], tensors["markov_head.gate_proj.bias"])
        latent = torch.sigmoid(gate) * known
    elif kind == "rnn":
        state, steps = torch.zeros_like(known[:, :, 0]), []
        for k in range(known.shape[2]):
            joined = torch.cat([state, known[:, :, k], hidden[:, :, k].to(known.dtype)], -1)
            joint = F.linear(joined, tensors["markov_head.joint_proj.weight"], tensors["markov_head.joint_proj.bias"])
            gate, candidate, output = joint.to(known.dtype).chunk(3, -1)
            gate = torch.sigmoid(gate)
            state = gate * state + (1 - gate) * torch.tanh(candidate)
            steps.append(torch.tanh(output))
        latent = torch.stack(steps, 2)
    return F.linear(latent, tensors["markov_head.markov_w2.weight"]), known


def confidence(tensors: Tensors, hidden: Tensor, known: Tensor) -> Tensor:
    """Raw logits [B, A, K]."""
    joined = torch.cat([hidden, known.to(hidden.dtype)], -1)
    return F.linear(joined, tensors["confidence_head.proj.weight"], tensors["confidence_head.proj.bias"])[..., 0]


# --- first values -----------------------------------------------------------------------------------------------------


def _matrix(rows: int, columns: int, generator, std: float = 0.02) -> Tensor:
    return torch.randn(rows, columns, generator=generator) * std


def new_layer(sizes: Sizes, depth: int, generator) -> dict[str, Tensor]:
    d, q, kv = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    last = 0.02 / math.sqrt(2 * depth)
    return {
        "input_layernorm.weight": torch.ones(d),
        "post_attention_layernorm.weight": torch.ones(d),
        "self_attn.q_proj.weight": _matrix(q, d, generator),
        "self_attn.k_proj.weight": _matrix(kv, d, generator),
        "self_attn.v_proj.weight": _matrix(kv, d, generator),
        "self_attn.o_proj.weight": _matrix(d, q, generator, last),
        "self_attn.q_norm.weight": torch.ones(sizes.head_dim),
        "self_attn.k_norm.weight": torch.ones(sizes.head_dim),
        "mlp.gate_proj.weight": _matrix(sizes.intermediate, d, generator),
        "mlp.up_proj.weight": _matrix(sizes.intermediate, d, generator),
        "mlp.down_proj.weight": _matrix(d, sizes.intermediate, generator, last),
    }


def new_language_model(sizes: Sizes, generator) -> dict[str, Tensor]:
    tensors = {
        "model.embed_tokens.weight": _matrix(sizes.vocab, sizes.hidden, generator),
        "model.norm.weight": torch.ones(sizes.hidden),
    }
    for index in range(sizes.layers):
        layer = new_layer(sizes, sizes.layers, generator)
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def new_mtp(target: Tensors, sizes: Sizes) -> dict[str, Tensor]:
    """Starts as the target's last layer on the mean of embedding and hidden state."""
    layer = below(target, f"model.layers.{sizes.layers - 1}.")
    half = 0.5 * torch.eye(sizes.hidden)
    tensors = {
        "enorm.weight": torch.ones(sizes.hidden),
        "hnorm.weight": torch.ones(sizes.hidden),
        "eh_proj.weight": torch.cat([half, half], 1),
        "norm.weight": target["model.norm.weight"].clone(),
    }
    return tensors | {f"layer.{name}": tensor.clone() for name, tensor in layer.items()}


def new_block(target: Tensors, sizes: Sizes, layers: int, features: int) -> dict[str, Tensor]:
    """Starts as the target's last layers, which read the last of the chosen layers as context."""
    d = sizes.hidden
    last = below(target, f"model.layers.{sizes.layers - 1}.")
    tensors = {
        "fc.weight": torch.cat([torch.zeros(d, (features - 1) * d), torch.eye(d)], 1),
        "hidden_norm.weight": last["input_layernorm.weight"].clone(),
        "norm.weight": target["model.norm.weight"].clone(),
    }
    for index in range(layers):
        layer = below(target, f"model.layers.{sizes.layers - layers + index}.")
        tensors |= {f"layers.{index}.{name}": tensor.clone() for name, tensor in layer.items()}
    return tensors


def new_vanilla(sizes: Sizes, rank: int, generator) -> dict[str, Tensor]:
    """Sequential and confidence head."""
    return {
        "markov_head.markov_w1.weight": _matrix(sizes.vocab, rank, generator, 0.1),
        "markov_head.markov_w2.weight": _matrix(sizes.vocab, rank, generator),
        "confidence_head.proj.weight": _matrix(1, sizes.hidden + rank, generator),
        "confidence_head.proj.bias": torch.zeros(1),
    }


def new_head(kind: str, vanilla: Tensors, sizes: Sizes, generator) -> dict[str, Tensor]:
    """A head that starts where the vanilla one ended: an open gate; an rnn whose output is the token's latent."""
    tensors = {name: vanilla[name].clone() for name in vanilla if name.startswith(("markov_head.markov", "confidence_head"))}
    rank, d = tensors["markov_head.markov_w1.weight"].shape[1], sizes.hidden
    if kind == "gated":
        tensors["markov_head.gate_proj.weight"] = _matrix(rank, d + rank, generator)
        tensors["markov_head.gate_proj.bias"] = torch.full((rank,), 3.0)
    elif kind == "rnn":
        joint = _matrix(3 * rank, 2 * rank + d, generator)
        joint[2 * rank :] = torch.eye(rank, 2 * rank + d).roll(rank, 1)
        tensors["markov_head.joint_proj.weight"], tensors["markov_head.joint_proj.bias"] = joint, torch.zeros(3 * rank)
    return tensors
