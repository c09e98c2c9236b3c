"""A multi-token-prediction module on the target's last hidden state, chained for K drafts.

    x_i = P [norm(E(t_{i+1})); norm(h_i)];  g_i = layer(x_i);  t_{i+2} ~ softmax(head(norm(g_i)) / T)

h_i is the target's last hidden state at position i (before its final norm), E and head are the target's. For the next
draft g_i takes the place of h_{i+1}, which the target has not computed yet. Source: DeepSeek-V3, arXiv 2412.19437,
section 2.2.
"""

from __future__ import annotations

from typing import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import DecoderLayer, KVCache, Rows, Shape, Target, Weights, rms_norm, run_layers
from . import Committed, Drafter, join, max_drafts_of, step


class MTP(Drafter):
    """One MTP module, used K times.

    config: `max_drafts` (default 4), and any layer size that differs from the target's config. tensors: enorm.weight,
    hnorm.weight, norm.weight [d], eh_proj.weight [d, 2d] (input [embedding; hidden]), layer.* (a decoder layer). Raises
    ValueError for a missing tensor or a wrong shape.
    """

    def __init__(self, config: Mapping, tensors: Mapping[str, Tensor], target: Target):
        self.target, self.max_drafts = target, max_drafts_of(config)
        self.shape = Shape.from_config({**target.config, **config, "num_hidden_layers": 1})
        take, d = Weights(tensors, target.device, target.dtype), target.shape.hidden
        self.embedding_norm, self.hidden_norm = take("enorm.weight", d), take("hnorm.weight", d)
        self.projection, self.norm = take("eh_proj.weight", d, 2 * d), take("norm.weight", d)
        self.layer = DecoderLayer(self.shape, take.below("layer."))

    def start(self, slots, new_cache=KVCache):
        super().start(slots)
        self._cache = new_cache(self.shape, slots, self.target.device, self.target.dtype)
        self._unread: list[tuple[int, Tensor, Tensor] | None] = [None] * slots  # first position, next ids, hidden

    def propose(self, anchors, *, drafts, sampling, noise, ops):
        # The rows kept in the last round run first; the last of each slot sees the anchor and gives draft 1.
        unread = [self._unread[slot] for slot in anchors.slots]
        segments = [(slot, first, len(ids)) for slot, (first, ids, _) in zip(anchors.slots, unread, strict=True)]
        rows = Rows.of(segments, self.target.device)
        state = self._run(torch.cat([ids for _, ids, _ in unread]), torch.cat([h for _, _, h in unread]), rows)
        state = state[rows.last()]
        steps = [step(ops, self._logits(state), 0, anchors, sampling, noise)]
        while len(steps) < drafts:
            ahead = Rows.of(anchors.segments(len(steps) - 1, 1), self.target.device)
            state = self._run(anchors.drafted(steps[-1]), state, ahead)
            steps.append(step(ops, self._logits(state), len(steps), anchors, sampling, noise))
        self.passes += drafts
        return join(steps)

    def commit(self, committed: Committed):
        prompts, kept = [], []
        for slot, start, begin, end in committed.rows.segments:
            self._cache.crop(slot, start)  # rows of the chain stood on guesses of the hidden state
            if start == 0 and end - begin > 1:
                prompts.append((slot, 0, end - begin - 1))
                kept.extend(range(begin, end - 1))
                start, begin = start + end - begin - 1, end - 1
            self._unread[slot] = (start, committed.next_ids[begin:end], committed.pre_norm[begin:end])
        if prompts:
            index = torch.tensor(kept, device=self.target.device)
            rows = Rows.of(prompts, self.target.device)
            self._run(committed.next_ids[index], committed.pre_norm[index], rows)

    def release(self, slot):
        self._cache.crop(slot, 0)
        self._unread[slot] = None

    def _run(self, next_ids: Tensor, hidden: Tensor, rows: Rows) -> Tensor:
        """g [n, d] of rows with the tokens that follow them [n] and the hidden states [n, d]."""
        embedded = rms_norm(F.embedding(next_ids, self.target.embedding), self.embedding_norm, self.shape.eps)
        x = torch.cat([embedded, rms_norm(hidden, self.hidden_norm, self.shape.eps)], -1)
        (out,) = run_layers([self.layer], F.linear(x, self.projection), rows, self._cache, causal=True)
        return out

    def _logits(self, state: Tensor) -> Tensor:
        return self.target.logits(rms_norm(state, self.norm, self.shape.eps))
