"""Blockwise parallel drafting: one pass over the anchor and masks predicts K positions independently of each other.

    ctx = norm(fc [h_l1; ...; h_lm]);  keys and values of every layer: projections of [ctx of the context; block]
    draft distribution of position k = softmax(head(norm(hidden_k)) / T)

The block's rows see each other in both directions and the whole context (in layers with windows: dspark_kernels/checkpoint/
attention.py); queries come from the block alone. The cache
keeps the injected context, one entry per token before the anchor; the block's own keys and values are dropped after
each pass.

The layers are Qwen3's (reference/model.py) or, where the config says so, those of Gemma 4's full attention (reference/gemma4.py).
Sources: blockwise parallel decoding (arXiv 1811.03115), DFlash (arXiv 2602.06036).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_kernels.checkpoint import attention

from .. import gemma4
from ..model import DecoderLayer, KVCache, Rotation, Rows, Shape, Target, Weights, rms_norm, run_layers
from .protocol import Committed, Drafter


class Block(Drafter):
    """A block backbone without a sequential head.

    config: a transformer config with `block_size` (K), `mask_token_id`, `target_layer_ids` (-1 = the embedding, i =
    output of layer i) and optionally `anchor_first` (default true: the anchor and K - 1 masks, all predict; false: the
    anchor and K masks, the masks predict); `architectures` ["Gemma4DSparkModel"]: layers of Gemma 4, whose embeddings are scaled
    and whose logits are capped before a sequential head adds to them; `draft_vocab_size` Vd below the vocabulary: a head over fewer
    ids. tensors: fc.weight [d, m * d_target], hidden_norm.weight, norm.weight [d], layers.i.*; embed_tokens.weight [V, d] and
    lm_head.weight [Vd, d], the target's where there is none; d2t int64 [Vd], target id - draft id.

    Raises:
        ValueError: a missing key or tensor, a wrong shape, a layer that the target does not have.
    """

    head = None
    confidence = None

    def __init__(self, config: Mapping, tensors: Mapping[str, Tensor], target: Target):
        gemma = config.get("architectures") == ["Gemma4DSparkModel"]
        self.target, self.shape = target, gemma4.shape(config) if gemma else Shape.from_config(config)
        make_layer, self._norm = (gemma4.DecoderLayer, gemma4.rms_norm) if gemma else (DecoderLayer, rms_norm)
        self._scale, self._cap = (self.shape.hidden**0.5, config.get("final_logit_softcapping")) if gemma else (None, None)
        shape, take = self.shape, Weights(tensors, target.device, target.dtype)
        missing = [key for key in ("block_size", "mask_token_id", "target_layer_ids") if key not in config]
        if missing:
            raise ValueError(f"config: expected the key {missing[0]!r}, there is none")
        self.max_drafts, self.mask_token_id = config["block_size"], config["mask_token_id"]
        self.anchor_first = config.get("anchor_first", True)
        self.feature_layers = tuple(config["target_layer_ids"])
        if not self.feature_layers or not all(-1 <= layer < target.shape.layers for layer in self.feature_layers):
            last = target.shape.layers - 1
            raise ValueError(f"config: expected target_layer_ids from -1 to {last}, got {config['target_layer_ids']}")
        if not 0 <= self.mask_token_id < shape.vocab or self.max_drafts < 1 or shape.vocab != target.shape.vocab:
            raise ValueError(
                f"config: expected vocab_size {target.shape.vocab}, mask_token_id below it and block_size >= 1, got "
                f"{shape.vocab}, {self.mask_token_id} and {self.max_drafts}"
            )
        d = shape.hidden
        self.fc = take("fc.weight", d, len(self.feature_layers) * target.shape.hidden)
        self.context_norm, self.norm = take("hidden_norm.weight", d), take("norm.weight", d)
        self.layers = [make_layer(shape, take.below(f"layers.{i}.")) for i in range(shape.layers)]
        self._sights = attention.sights(config)
        self.draft_vocab = config.get("draft_vocab_size") or shape.vocab
        other, fewer = d != target.shape.hidden, self.draft_vocab != shape.vocab
        self.embedding = take("embed_tokens.weight", shape.vocab, d) if other or "embed_tokens.weight" in take else target.embedding
        self.lm_head = take("lm_head.weight", self.draft_vocab, d) if other or fewer or "lm_head.weight" in take else target.head
        self.draft_to_target = None
        if fewer:
            if "d2t" not in tensors or tuple(tensors["d2t"].shape) != (self.draft_vocab,):
                raise ValueError(f"d2t: expected shape {[self.draft_vocab]} (draft_vocab_size), there is none")
            self.draft_to_target = torch.arange(self.draft_vocab, device=target.device) + tensors["d2t"].to(target.device)

    @property
    def has_confidence(self) -> bool:
        return self.confidence is not None

    def start(self, slots, new_cache=KVCache):
        super().start(slots)
        self._cache = new_cache(self.shape, slots, self.target.device, self.target.dtype)

    def propose(self, anchors, *, drafts, sampling, noise, ops):
        hidden = self.block_hidden(anchors)[:, :drafts]
        self.passes += 1
        return ops.draft_block(
            self.base_logits(hidden),
            anchors.token_ids,
            self.head,
            anchor_positions=anchors.positions,
            sampling=sampling,
            hidden=hidden,
            confidence=self.confidence,
            draft_to_target=self.draft_to_target,
            noise=noise,
            state_indices=anchors.state_indices,
        )

    def propose_tree(self, anchors, *, shape, sampling, ops):
        hidden = self.block_hidden(anchors)
        self.passes += 1
        return ops.draft_tree(
            self.base_logits(hidden),
            anchors.token_ids,
            self.head,
            anchor_positions=anchors.positions,
            method=shape.method,
            num_nodes=shape.num_nodes,
            branching=shape.branching,
            sampling=sampling,
            hidden=hidden,
            candidates=shape.candidates,
            draft_to_target=self.draft_to_target,
            state_indices=anchors.state_indices,
        )

    def block_hidden(self, anchors) -> Tensor:
        """Hidden states of the K predicting rows after the final norm, [R, K, d]."""
        length = self.max_drafts if self.anchor_first else self.max_drafts + 1
        rows = Rows.of(anchors.segments(0, length), self.target.device)
        token_ids = torch.full((len(anchors.slots), length), self.mask_token_id, device=self.target.device)
        token_ids[:, 0] = anchors.batch_ids
        x = F.embedding(token_ids.flatten(), self.embedding)
        if self._scale is not None:
            x = x * x.new_tensor(self._scale)
        for final in run_layers(self.layers, x, rows, self._cache, causal=False, sights=self._sights):
            x = final
        for slot, start in zip(anchors.slots, anchors.starts, strict=True):
            self._cache.crop(slot, start)
        return self._norm(x, self.norm, self.shape.eps).view(len(anchors.slots), length, -1)[:, -self.max_drafts :]

    def base_logits(self, hidden: Tensor) -> Tensor:
        """[R, n, d] -> [R, n, Vd]."""
        logits = F.linear(hidden, self.lm_head)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def commit(self, committed: Committed):
        context = self._norm(F.linear(committed.features, self.fc), self.context_norm, self.shape.eps)
        self._cache.claim(committed.rows)
        rotation = Rotation.at(committed.rows.positions, self.shape, context.dtype)
        for index, layer in enumerate(self.layers):
            self._cache.write(index, committed.rows, *layer.keys_values(context, rotation))

    def release(self, slot):
        self._cache.crop(slot, 0)
