"""A Qwen3-style decoder that runs packed ragged rows over per-slot caches of keys and values.

    x <- x + O attention(rope(norm(Q n)), rope(norm(K n)), V n),   n = norm(x)
    x <- x + down(silu(gate n) * up n),                            n = norm(x)

Norms are RMSNorm; those of queries and keys work per head. Query heads share key-value heads in groups (GQA). Row i of
a pass is token token_ids[i] at positions[i] of batch row batch_indices[i]; the rows of one batch row stand together at
consecutive positions, so a single pass serves prompts, one-token steps and drafts to verify, of requests of different
lengths. The rows of a draft tree take consecutive places of the cache, stand at the positions of their depths and see
their ancestors alone.

Symbols: N rows, S slots, d hidden size, Hq/Hkv query and key-value heads, D head size, V vocabulary, m chosen layers.
Source: Hugging Face `Qwen3ForCausalLM` (names of config keys and tensors).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_kernels.checkpoint import rope, scaling
from dspark_kernels.checkpoint.attention import Sight
from dspark_kernels.types import Acceptance

MAX_NODES = 64  # of a tree: bits of an ancestor word


class Weights:
    """Tensors by name: each is checked for its shape when taken, and moved to one device and dtype.

    Raises ValueError where a tensor is missing or has another shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device, dtype, prefix: str = ""):
        self._tensors, self._device, self._dtype, self._prefix = tensors, device, dtype, prefix

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def __call__(self, name: str, *shape: int) -> Tensor:
        name = self._prefix + name
        if name not in self._tensors:
            raise ValueError(f"{name}: expected a tensor of shape {list(shape)}, there is none")
        tensor = self._tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        return tensor.to(self._device, self._dtype).contiguous()

    def below(self, prefix: str) -> Weights:
        return Weights(self._tensors, self._device, self._dtype, self._prefix + prefix)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a decoder's layers, read from a Hugging Face config."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int
    vocab: int
    eps: float
    rope_theta: float
    scaled: scaling.Scaling | None = None  # RoPE of another kind than `default`
    rotated: float = 1.0  # the share of a head's pairs that RoPE turns
    attention_scale: float | None = None  # of queries times keys; None: 1 / sqrt(head_dim)

    @classmethod
    def from_config(cls, config: Mapping) -> Shape:
        """Raises ValueError for a missing key and for what this model does not compute."""
        try:
            turn = rope.qwen3(config, "config")
            shape = cls(
                hidden=config["hidden_size"],
                heads=config["num_attention_heads"],
                kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
                head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                intermediate=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                vocab=config["vocab_size"],
                eps=config.get("rms_norm_eps", 1e-6),
                rope_theta=turn.theta,
                scaled=turn.scaled,
            )
        except KeyError as missing:
            raise ValueError(f"config: expected the key {missing}, there is none") from None
        if shape.heads % shape.kv_heads:
            raise ValueError(f"config: expected {shape.heads} attention heads to be a multiple of {shape.kv_heads}")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config: expected hidden_act 'silu', got {config['hidden_act']!r}")
        if config.get("attention_bias"):
            raise ValueError("config: expected no attention_bias")
        return shape

    @staticmethod
    def check_full_attention(config: Mapping) -> None:
        """Raises ValueError for windows, which only the block of a drafter has here."""
        if config.get("use_sliding_window"):
            raise ValueError("config: expected no use_sliding_window")
        if any(kind != "full_attention" for kind in config.get("layer_types") or []):
            raise ValueError(f"config: expected full attention in every layer, got layer_types {config['layer_types']}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; the mean square is taken in at least fp32."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Rotation(NamedTuple):
    """RoPE of N rows: cos and sin [N, 1, D], the first half of a head pairs with the second."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, shape: Shape, dtype) -> Rotation:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if shape.scaled is None:
            exponents = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=wide) / shape.head_dim
            angles, factor = positions.to(wide)[:, None] / shape.rope_theta**exponents, 1.0
            angles[:, int(shape.rotated * shape.head_dim // 2) :] = 0
        else:
            frequencies = shape.scaled.frequencies(shape.rope_theta, shape.head_dim, positions.device)
            angles, factor = positions.to(wide)[:, None] * frequencies.to(wide), shape.scaled.attention
        angles = torch.cat([angles, angles], -1)[:, None]
        return cls((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))

    def __call__(self, x: Tensor) -> Tensor:  # [N, heads, D]
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin


class Segment(NamedTuple):
    """Rows begin..end-1 of a pass: consecutive places of one slot's cache, from `start` on."""

    slot: int
    start: int
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which slot and position every row of a pass belongs to."""

    positions: Tensor  # int64 [N]
    slots: Tensor  # int64 [N]
    segments: list[Segment]
    ancestors: Tensor | None = None  # int64 [N], trees: bit s = sees row s of its segment; longer segments are chains

    @classmethod
    def pack(cls, positions: Tensor, batch_indices: Tensor, state_indices: Sequence[int], ancestors: Tensor | None = None) -> Rows:
        """positions, batch_indices: [N]; state_indices: the slot of each batch row. Raises ValueError for other
        orders."""
        at, of = positions.tolist(), batch_indices.tolist()
        segments = []
        for row, (position, batch_row) in enumerate(zip(at, of, strict=True)):
            if not 0 <= batch_row < len(state_indices):
                raise ValueError(f"batch_indices: expected 0 to {len(state_indices) - 1} in every row, got {batch_row}")
            if row and batch_row == of[row - 1]:
                if ancestors is None and position != at[row - 1] + 1:
                    raise ValueError(f"positions: expected {at[row - 1] + 1} in row {row}, got {position}")
                segments[-1] = segments[-1]._replace(end=row + 1)
            else:
                segments.append(Segment(state_indices[batch_row], position, row, row + 1))
        if len({segment.slot for segment in segments}) < len(segments):
            raise ValueError("batch_indices: expected the rows of a request to stand together")
        slots = torch.empty(len(at), dtype=torch.int64)
        for segment in segments:
            slots[segment.begin : segment.end] = segment.slot
        return cls(positions.long(), slots.to(positions.device), segments, ancestors)

    @classmethod
    def of(cls, segments: Sequence[tuple[int, int, int]], device) -> Rows:
        """From (slot, first position, number of rows) per batch row."""
        packed, positions, slots, begin = [], [], [], 0
        for slot, start, count in segments:
            packed.append(Segment(slot, start, begin, begin + count))
            positions.extend(range(start, start + count))
            slots.extend([slot] * count)
            begin += count
        return cls(torch.tensor(positions, device=device), torch.tensor(slots, device=device), packed)

    @property
    def places(self) -> Tensor:
        """Where in its slot's cache every row goes, int64 [N]: siblings share a position but not a place."""
        if self.ancestors is None:
            return self.positions
        places = [place for part in self.segments for place in range(part.start, part.start + part.end - part.begin)]
        return torch.tensor(places, device=self.positions.device)

    def last(self) -> Tensor:
        """The last row of each segment, int64 [segments]."""
        return torch.tensor([segment.end - 1 for segment in self.segments], device=self.positions.device)


class KVCache:
    """Keys and values of S slots, written by place; `lengths[slot]` entries are valid.

    A pass writes its rows and attends to everything before them in their slot; `compact` brings the accepted rows of a
    tree together, `crop` gives up the rows of rejected drafts, which later rows overwrite.
    """

    def __init__(self, shape: Shape, slots: int, device, dtype):
        self.lengths = [0] * slots
        self._scale = shape.attention_scale
        empty = torch.empty(shape.layers, slots, shape.kv_heads, 0, shape.head_dim, device=device, dtype=dtype)
        self._keys, self._values = empty, empty.clone()  # [layers, S, Hkv, capacity, D]

    def crop(self, slot: int, length: int) -> None:
        """Keep the first `length` positions of a slot. Raises ValueError where fewer are cached."""
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"length: expected 0 to {self.lengths[slot]} (cached), got {length}")
        self.lengths[slot] = length

    def compact(self, rows: Rows, acceptance: Acceptance) -> None:
        """Move the accepted path of every tree of a pass to the places from its anchor's on."""
        for segment, accepted, path in zip(rows.segments, acceptance.num_accepted.tolist(), acceptance.path.tolist(), strict=True):
            sources = [segment.start + node for node in path[1 : accepted + 1]]
            destinations = slice(segment.start + 1, segment.start + 1 + accepted)
            for planes in (self._keys, self._values):
                planes[:, segment.slot, :, destinations] = planes[:, segment.slot][:, :, sources]

    def claim(self, rows: Rows) -> None:
        """Make room for the rows of a pass. Raises ValueError where a slot would be left with a gap."""
        for slot, start, begin, end in rows.segments:
            if start > self.lengths[slot]:
                raise ValueError(f"positions: expected at most {self.lengths[slot]} (cached) first, got {start}")
            self.lengths[slot] = start + end - begin
        needed, capacity = max(self.lengths), self._keys.shape[3]
        if needed > capacity:
            room = (0, 0, 0, max(needed, 2 * capacity) - capacity)
            self._keys, self._values = F.pad(self._keys, room), F.pad(self._values, room)

    def write(self, layer: int, rows: Rows, keys: Tensor, values: Tensor) -> None:
        """keys, values: [N, Hkv, D], of rows that were claimed."""
        places = rows.places
        self._keys[layer][rows.slots, :, places] = keys
        self._values[layer][rows.slots, :, places] = values

    def attend(
        self, layer: int, rows: Rows, queries: Tensor, *, causal: bool, window: int | None = None, each: bool = False
    ) -> Tensor:
        """Attention of the rows over their slots, [N, Hq, D] -> [N, Hq * D].

        causal: a row sees the places up to its own, in a tree its ancestors and what was cached before; otherwise all rows
        of its request (the drafter's block). window: of what was cached before, the last places alone, for all rows the same;
        each: the last places up to a row's own instead.
        """
        out = torch.empty_like(queries)
        for slot, start, begin, end in rows.segments:
            count, length = end - begin, start + end - begin
            tree, mask = rows.ancestors is not None and count <= MAX_NODES, None
            if causal and count > 1 and (start > 0 or tree):
                mask = torch.ones(count, length, dtype=torch.bool, device=queries.device).tril(start)
            if window is not None and mask is None:
                mask = torch.ones(count, length, dtype=torch.bool, device=queries.device)
                mask = mask.tril(start) if causal else mask
            if window is not None and each:
                mask &= ~torch.ones_like(mask).tril(start - window)
            elif window is not None:
                mask[:, : max(0, start - window)] = False
            if tree and mask is not None:
                mask[:, start:] = (rows.ancestors[begin:end, None] >> torch.arange(count, device=queries.device)) & 1
            out[begin:end] = F.scaled_dot_product_attention(
                queries[begin:end].transpose(0, 1)[None],
                self._keys[layer, slot, :, :length][None],
                self._values[layer, slot, :, :length][None],
                attn_mask=mask,
                is_causal=causal and count > 1 and mask is None,
                scale=self._scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
        return out.flatten(1)


class DecoderLayer:
    """One decoder layer from the tensors `self_attn.*`, `mlp.*` and the two norms.

    head_norms: false for Llama's layers, which do not norm queries and keys. inputs: of attention, how many times d wide.
    """

    def __init__(self, shape: Shape, take: Weights, *, head_norms: bool = True, inputs: int = 1):
        self.shape = shape
        d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.input_norm = take("input_layernorm.weight", d)
        self.post_norm = take("post_attention_layernorm.weight", d)
        self.q_proj = take("self_attn.q_proj.weight", q, inputs * d)
        self.k_proj = take("self_attn.k_proj.weight", kv, inputs * d)
        self.v_proj = take("self_attn.v_proj.weight", kv, inputs * d)
        self.o_proj = take("self_attn.o_proj.weight", d, q)
        self.q_norm = take("self_attn.q_norm.weight", shape.head_dim) if head_norms else None
        self.k_norm = take("self_attn.k_norm.weight", shape.head_dim) if head_norms else None
        self.gate_proj = take("mlp.gate_proj.weight", shape.intermediate, d)
        self.up_proj = take("mlp.up_proj.weight", shape.intermediate, d)
        self.down_proj = take("mlp.down_proj.weight", d, shape.intermediate)

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Keys and values [N, Hkv, D] of x [N, d], which is taken as it is (injected context is not normalised
        here)."""
        heads = (-1, self.shape.kv_heads, self.shape.head_dim)
        keys = self._head_norm(F.linear(x, self.k_proj).view(heads), self.k_norm)
        return rotation(keys), F.linear(x, self.v_proj).view(heads)

    def _head_norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else rms_norm(x, weight, self.shape.eps)

    def __call__(self, x: Tensor, rotation: Rotation, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """x [N, d] -> [N, d]; attend(queries [N, Hq, D], keys, values [N, Hkv, D]) -> [N, Hq * D]."""
        return self.mixed(x, rms_norm(x, self.input_norm, self.shape.eps), rotation, attend)

    def mixed(self, x: Tensor, normed: Tensor, rotation: Rotation, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The layer over what its attention reads, `normed`, and the residual x [N, d]."""
        queries = F.linear(normed, self.q_proj).view(-1, self.shape.heads, self.shape.head_dim)
        queries = rotation(self._head_norm(queries, self.q_norm))
        x = x + F.linear(attend(queries, *self.keys_values(normed, rotation)), self.o_proj)
        normed = rms_norm(x, self.post_norm, self.shape.eps)
        return x + F.linear(F.silu(F.linear(normed, self.gate_proj)) * F.linear(normed, self.up_proj), self.down_proj)


def run_layers(layers, x: Tensor, rows: Rows, cache: KVCache, *, causal: bool, sights: Sequence[Sight] | None = None):
    """Run x [N, d] through all layers; yields the output of each. The rows stay in the cache until it is cropped.

    sights: what the rows of a drafter's block see, by layer, in place of `causal`.
    """
    cache.claim(rows)
    rotation = Rotation.at(rows.positions, layers[0].shape, x.dtype)
    for index, layer in enumerate(layers):
        sight = Sight(None, causal) if sights is None else sights[index]
        window = {} if sight.window is None else {"window": sight.window, "each": sight.each}  # for caches that know windows

        def attend(queries, keys, values, index=index, causal=sight.causal, window=window):
            cache.write(index, rows, keys, values)
            return cache.attend(index, rows, queries, causal=causal, **window)

        x = layer(x, rotation, attend)
        yield x


class Output(NamedTuple):
    """What a pass of the target gives for its N rows."""

    hidden: Tensor  # [N, d], after the final norm: what the head reads
    pre_norm: Tensor  # [N, d], output of the last layer
    features: Tensor | None  # [N, m * d], the chosen layers' outputs side by side


class Target:
    """A Qwen3-style language model from a config and tensors with Hugging Face names.

    Args:
        config: `Qwen3ForCausalLM` config; RoPE as dspark_kernels/checkpoint/rope.py reads it.
        tensors: model.embed_tokens.weight [V, d], model.layers.i.*, model.norm.weight [d], lm_head.weight [V, d] (not
            with tie_word_embeddings, nor where the config does not say: then the embedding is the head). An lm_head.weight other
            than the embedding is the head with tie_word_embeddings too, with a warning.
        device, dtype: where and in what it computes.

    Raises:
        ValueError: a missing key or tensor, a wrong shape, a variant that this model does not compute.
    """

    def __init__(self, config: Mapping, tensors: Mapping[str, Tensor], device="cpu", dtype=torch.float32):
        self.config, self.device, self.dtype = dict(config), torch.device(device), dtype
        self.shape = shape = Shape.from_config(config)
        Shape.check_full_attention(config)
        take = Weights(tensors, self.device, dtype)
        self.embedding = take("model.embed_tokens.weight", shape.vocab, shape.hidden)
        self.layers = [DecoderLayer(shape, take.below(f"model.layers.{i}.")) for i in range(shape.layers)]
        self.norm = take("model.norm.weight", shape.hidden)
        self.head = self._head(take)

    def _head(self, take: Weights) -> Tensor:
        tied = self.config.get("tie_word_embeddings")
        if "lm_head.weight" not in take and tied is not False:
            return self.embedding
        head = take("lm_head.weight", self.shape.vocab, self.shape.hidden)
        if not tied:
            return head
        if torch.equal(head, self.embedding):
            return self.embedding
        warnings.warn(
            "config: tie_word_embeddings is true, but lm_head.weight is not the embedding: it is taken as the head", stacklevel=3
        )
        return head

    def new_cache(self, slots: int, new_cache=KVCache) -> KVCache:
        return new_cache(self.shape, slots, self.device, self.dtype)

    def forward(self, token_ids: Tensor, rows: Rows, cache: KVCache, feature_layers: Sequence[int] = ()) -> Output:
        """One pass. token_ids: int64 [N]. feature_layers: -1 = the embedding, i = output of layer i."""
        x = F.embedding(token_ids, self.embedding)
        outputs = {-1: x}
        for index, hidden in enumerate(run_layers(self.layers, x, rows, cache, causal=True)):
            outputs[index] = x = hidden
        features = torch.cat([outputs[i] for i in feature_layers], -1) if feature_layers else None
        return Output(rms_norm(x, self.norm, self.shape.eps), x, features)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] (after the final norm) -> [n, V]."""
        return F.linear(hidden, self.head)
