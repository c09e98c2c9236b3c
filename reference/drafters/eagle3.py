"""EAGLE-3: one layer, or a few, over the tokens' embeddings beside what several layers of the target say, chained for K drafts.

    h_i = fc [f_l1; f_l2; f_l3],  of layers' outputs f at position i;  x_i = [norm(E(t_{i+1})); norm(h_i)]
    g_i = r_i + O attention(Q x, K x, V x);  g_i <- g_i + mlp(norm(g_i));  t_{i+2} ~ softmax(head(norm(g_i)) / T)

r_i is h_i, or norm(h_i) where the config says so (`norm_before_residual`); further layers are usual ones. Before fc: nothing, one norm
over all f side by side (`norm_before_fc`) or one for each (`fc_norm`). For the next draft g_i takes the place of h_{i+1}, after the
final norm where the config says so (`norm_output`). The head may speak of fewer ids, whose target ids d2t gives. The layers are
Qwen3's, or Llama's, which do not norm queries and keys.

Source: EAGLE-3, arXiv 2503.01840; what configs say: dspark_kernels/checkpoint/eagle3.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_kernels.checkpoint.attention import Sight, sights

from ..model import DecoderLayer, Rows, Shape, Target, Weights, rms_norm, run_layers
from .chained import Chained
from .protocol import Committed, max_drafts_of


class FirstLayer(DecoderLayer):
    """The layer whose rows are [embedding; h]."""

    def __init__(self, shape: Shape, take: Weights, *, head_norms: bool, norm_before_residual: bool):
        super().__init__(shape, take, head_norms=head_norms, inputs=2)
        self.hidden_norm = take("hidden_norm.weight", shape.hidden)
        self._residual_is_normed = norm_before_residual

    def __call__(self, x, rotation, attend):
        embedded, hidden = x.chunk(2, -1)
        normed = rms_norm(hidden, self.hidden_norm, self.shape.eps)
        residual = normed if self._residual_is_normed else hidden
        both = torch.cat([rms_norm(embedded, self.input_norm, self.shape.eps), normed], -1)
        return self.mixed(residual, both, rotation, attend)


class Eagle3(Chained):
    """config: as `dspark_kernels.checkpoint.load_eagle3` returns it, and `max_drafts` (default 4). tensors: likewise.

    Raises ValueError for a missing tensor, a wrong shape, another vocabulary, and layers that the target does not have.
    """

    def __init__(self, config: Mapping, tensors: Mapping[str, Tensor], target: Target):
        self.target, self.max_drafts, self.shape = target, max_drafts_of(config), Shape.from_config(config)
        shape, take, wide = self.shape, Weights(tensors, target.device, target.dtype), target.shape.hidden
        d, layers = shape.hidden, target.shape.layers
        chosen = config.get("target_layer_ids")
        self.feature_layers = (1, layers // 2 - 1, layers - 4) if chosen is None else tuple(chosen)
        if not all(-1 <= layer < layers for layer in self.feature_layers):
            raise ValueError(f"config: expected target_layer_ids from -1 to {layers - 1}, got {list(self.feature_layers)}")
        if shape.vocab != target.shape.vocab:
            raise ValueError(f"config: expected vocab_size {target.shape.vocab}, got {shape.vocab}")
        count = len(self.feature_layers)
        self.fc, self.norm = take("fc.weight", d, count * wide), take("norm.weight", d)
        self._input_norm = take("input_norm.weight", count * wide) if config.get("norm_before_fc") else None
        self._fc_norms = [take(f"fc_norm.{i}.weight", wide) for i in range(count)] if config.get("fc_norm") else None
        norms, norm_before_residual = config["head_norms"], config.get("norm_before_residual", False)
        first = FirstLayer(shape, take.below("layers.0."), head_norms=norms, norm_before_residual=norm_before_residual)
        others = [DecoderLayer(shape, take.below(f"layers.{i}."), head_norms=norms) for i in range(1, shape.layers)]
        self.layers, self._windows = [first, *others], [sight.window for sight in sights(config)]
        self._norm_output = config.get("norm_output", False)
        draft_vocab = config.get("draft_vocab_size") or shape.vocab
        self.lm_head = take("lm_head.weight", draft_vocab, d)
        shared = "embed_tokens.weight" not in take and d == wide
        self.embedding = target.embedding if shared else take("embed_tokens.weight", shape.vocab, d)
        if draft_vocab != shape.vocab:
            if "d2t" not in tensors or tuple(tensors["d2t"].shape) != (draft_vocab,):
                raise ValueError(f"d2t: expected shape {[draft_vocab]} (draft_vocab_size), there is none")
            self.draft_to_target = torch.arange(draft_vocab, device=target.device) + tensors["d2t"].to(target.device)

    def _hidden(self, committed: Committed) -> Tensor:
        features = committed.features
        if self._input_norm is not None:
            features = rms_norm(features, self._input_norm, self.shape.eps)
        if self._fc_norms is not None:
            parts = zip(self._fc_norms, features.chunk(len(self._fc_norms), -1), strict=True)
            features = torch.cat([rms_norm(part, norm, self.shape.eps) for norm, part in parts], -1)
        return F.linear(features, self.fc)

    def _run(self, next_ids: Tensor, hidden: Tensor, rows: Rows, drafted: int | None = None) -> Tensor:
        x = torch.cat([F.embedding(next_ids, self.embedding), hidden], -1)
        seen = [self._sight(window, drafted) for window in self._windows]
        for out in run_layers(self.layers, x, rows, self._cache, causal=True, sights=seen):
            x = out
        return rms_norm(x, self.norm, self.shape.eps) if self._norm_output else x

    def _sight(self, window: int | None, drafted: int | None) -> Sight:
        """Committed rows see the last `window` rows, themselves included; drafts what the last of these saw, and their ancestors."""
        if window is None or drafted is not None:
            return Sight(None if window is None else window + drafted, True)
        return Sight(window, True, each=True)

    def _logits(self, state: Tensor) -> Tensor:
        return F.linear(state if self._norm_output else rms_norm(state, self.norm, self.shape.eps), self.lm_head)
