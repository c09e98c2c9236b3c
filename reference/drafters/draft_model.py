"""Speculative decoding with a small separate language model: K drafts in K passes, each reading the draft before.

    x_k ~ softmax(LM(x_<k) / T),  k = 1..K

Symbols: K drafts, T temperature, x_0 the anchor. Sources: Leviathan et al. (arXiv 2211.17192), Chen et al. (arXiv 2302.01318).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..huggingface import HuggingFaceTarget
from ..model import KVCache, Rows, Target
from .protocol import Committed, Drafter, join, max_drafts_of, step


class DraftModel(Drafter):
    """A small language model over the target's vocabulary; `of` takes any causal language model of transformers.

    config: a `Qwen3ForCausalLM` config, and `max_drafts` (default 4). tensors: as for reference.model.Target. Raises
    ValueError for what Target refuses and for another vocabulary size.
    """

    def __init__(self, config: Mapping, tensors: Mapping[str, Tensor], target: Target):
        self._take(Target(config, tensors, target.device, target.dtype), max_drafts_of(config), target)

    @classmethod
    def of(cls, model: Target | HuggingFaceTarget, target, max_drafts: int = 4) -> DraftModel:
        """model: on the target's device. Raises ValueError for another vocabulary size."""
        drafter = cls.__new__(cls)
        drafter._take(model, max_drafts_of({"max_drafts": max_drafts}), target)
        return drafter

    def _take(self, model, max_drafts: int, target) -> None:
        self.model, self.max_drafts = model, max_drafts
        if model.shape.vocab != target.shape.vocab:
            raise ValueError(f"config: expected vocab_size {target.shape.vocab}, got {model.shape.vocab}")

    def start(self, slots, new_cache=KVCache):
        super().start(slots)
        self._cache = self.model.new_cache(slots, new_cache)
        self._missing: list[list[int]] = [[] for _ in range(slots)]  # tokens before the anchor that it has not read

    def propose(self, anchors, *, drafts, sampling, noise, ops):
        token_ids, segments = [], []
        for slot, start, anchor in zip(anchors.slots, anchors.starts, anchors.batch_ids.tolist(), strict=True):
            unread = self._missing[slot] + [anchor]
            segments.append((slot, start + 1 - len(unread), len(unread)))
            token_ids += unread
            self._missing[slot] = []
        logits = self._run(token_ids, segments)
        steps = [step(ops, logits, 0, anchors, sampling, noise)]
        while len(steps) < drafts:
            logits = self._run(anchors.drafted(steps[-1]), anchors.segments(len(steps), 1))
            steps.append(step(ops, logits, len(steps), anchors, sampling, noise))
        self.passes += drafts
        return join(steps)

    def commit(self, committed: Committed):
        prompt_ids, prompts = [], []
        for slot, start, begin, end in committed.rows.segments:
            # The drafts that it has read and the target accepted stay; at most the last accepted one is still unread.
            read = min(self._cache.lengths[slot], start + end - begin)
            self._cache.crop(slot, read)
            unread = committed.token_ids[begin + read - start : end].tolist()
            if start == 0:
                prompt_ids += unread
                prompts.append((slot, 0, len(unread)))
            else:
                self._missing[slot] = unread
        if prompts:
            self._run(prompt_ids, prompts)

    def release(self, slot):
        self._cache.crop(slot, 0)
        self._missing[slot] = []

    def _run(self, token_ids: Tensor | list[int], segments) -> Tensor:
        """One pass; logits [segments, V] after the last row of each."""
        rows = Rows.of(segments, self.model.device)
        token_ids = torch.as_tensor(token_ids, device=self.model.device)
        return self.model.logits(self.model.forward(token_ids, rows, self._cache).hidden[rows.last()])
