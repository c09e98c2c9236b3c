"""A multi-token-prediction module on the target's last hidden state, chained for K drafts.

    x_i = P [norm(E(t_{i+1})); norm(h_i)];  g_i = layer(x_i);  t_{i+2} ~ softmax(head(norm(g_i)) / T)

h_i is the target's last hidden state at position i (before its final norm), E and head are the target's. For the next
draft g_i takes the place of h_{i+1}, which the target has not computed yet; in a tree that of the node's parent, and a node sees
its own ancestors alone. Source: DeepSeek-V3, arXiv 2412.19437, section 2.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_kernels.types import DraftTree

from ..model import DecoderLayer, KVCache, Rows, Shape, Target, Weights, rms_norm, run_layers
from .protocol import Committed, Drafter, join, max_drafts_of, step


class Unread(NamedTuple):
    """Rows of one slot that the target committed and the module has not read yet."""

    start: int  # position of the first
    next_ids: Tensor  # int64 [n], the tokens that follow them
    hidden: Tensor  # [n, d], the target's last layer


class MTP(Drafter):
    """One MTP module, used K times.

    config: `max_drafts` (default 4), and any layer size that differs from the target's config. tensors: enorm.weight,
    hnorm.weight, norm.weight [d], eh_proj.weight [d, 2d] (input [embedding; hidden]), layer.* (a decoder layer). Raises
    ValueError for a missing tensor or a wrong shape.
    """

    def __init__(self, config: Mapping, tensors: Mapping[str, Tensor], target: Target):
        self.target, self.max_drafts = target, max_drafts_of(config)
        self.shape = Shape.from_config({**target.config, **config, "num_hidden_layers": 1})
        Shape.check_full_attention(config)
        take, d = Weights(tensors, target.device, target.dtype), target.shape.hidden
        self.embedding_norm, self.hidden_norm = take("enorm.weight", d), take("hnorm.weight", d)
        self.projection, self.norm = take("eh_proj.weight", d, 2 * d), take("norm.weight", d)
        self.layer = DecoderLayer(self.shape, take.below("layer."))

    def start(self, slots, new_cache=KVCache):
        super().start(slots)
        self._cache = new_cache(self.shape, slots, self.target.device, self.target.dtype)
        self._unread: list[Unread | None] = [None] * slots

    def propose(self, anchors, *, drafts, sampling, noise, ops):
        state = self._read(anchors)
        steps = [step(ops, self._logits(state), 0, anchors, sampling, noise)]
        while len(steps) < drafts:
            ahead = Rows.of(anchors.segments(len(steps) - 1, 1), self.target.device)
            state = self._run(anchors.drafted(steps[-1]), state, ahead)
            steps.append(step(ops, self._logits(state), len(steps), anchors, sampling, noise))
        self.passes += drafts
        return join(steps)

    def propose_tree(self, anchors, *, shape, sampling, ops):
        states = [state[None] for state in self._read(anchors)]  # by batch row, [nodes so far, d]
        shared = dict(
            anchor_positions=anchors.positions, method=shape.method, sampling=sampling, state_indices=anchors.state_indices
        )
        tree = ops.draft_tree(
            self._logits(torch.stack([state[0] for state in states]))[:, None],
            anchors.token_ids,
            num_nodes=shape.num_nodes,
            branching=shape.branching[:1],
            **shared,
        )
        for depth, branching in enumerate(shape.branching[1:], 1):
            states = self._run_nodes(tree, anchors, states)
            tree = ops.expand_tree(
                tree, self._frontier_logits(tree, anchors, states, depth), depth=depth, branching=branching, **shared
            )
        self.passes += len(shape.branching)
        return tree

    def commit(self, committed: Committed):
        prompts, index = [], []
        for slot, start, begin, end in committed.rows.segments:
            self._cache.crop(slot, start)  # the chain's rows were computed from the module's own states
            if start == 0 and end - begin > 1:
                prompts.append((slot, 0, end - begin - 1))
                index.extend(range(begin, end - 1))
                start, begin = start + end - begin - 1, end - 1
            self._unread[slot] = Unread(start, committed.next_ids[begin:end], committed.pre_norm[begin:end])
        if prompts:
            index = torch.tensor(index, device=self.target.device)
            rows = Rows.of(prompts, self.target.device)
            self._run(committed.next_ids[index], committed.pre_norm[index], rows)

    def release(self, slot):
        self._cache.crop(slot, 0)
        self._unread[slot] = None

    def _read(self, anchors) -> Tensor:
        """Run the rows committed in the last round. The last of each slot reads the anchor and gives draft 1: its state, [R, d]."""
        unread = [self._unread[slot] for slot in anchors.slots]
        segments = [(slot, part.start, len(part.next_ids)) for slot, part in zip(anchors.slots, unread, strict=True)]
        rows = Rows.of(segments, self.target.device)
        states = self._run(torch.cat([part.next_ids for part in unread]), torch.cat([part.hidden for part in unread]), rows)
        return states[rows.last()]

    def _run_nodes(self, tree: DraftTree, anchors, states: list[Tensor]) -> list[Tensor]:
        """States of all nodes so far. Every pass runs them all again, since a node sees its ancestors as rows of its own pass.

        The anchor's row is context: node m of depth d has row m - 1, at the position of the token before its own.
        """
        segments, next_ids, hidden, depths, words = [], [], [], [], []
        counts = tree.num_nodes.tolist()
        for slot, start, known in zip(anchors.slots, anchors.starts, states, strict=True):
            nodes = slice(1, counts[slot])
            segments.append((slot, start, counts[slot] - 1))
            next_ids.append(tree.tokens[slot, nodes])
            hidden.append(known[tree.parents[slot, nodes].long()])
            depths.append(start + tree.depths[slot, nodes].long() - 1)
            words.append(tree.ancestors[slot, nodes] >> 1)
        rows = Rows.of(segments, self.target.device)
        rows = dataclasses.replace(rows, positions=torch.cat(depths), ancestors=torch.cat(words))
        run = self._run(torch.cat(next_ids), torch.cat(hidden), rows)
        return [torch.cat([known[:1], run[s.begin : s.end]]) for known, s in zip(states, rows.segments, strict=True)]

    def _frontier_logits(self, tree: DraftTree, anchors, states: list[Tensor], depth: int) -> Tensor:
        """Logits [R, F, V] after the nodes of one depth; a request that has fewer than F of them fills up with zeros."""
        frontiers = [state[tree.depths[slot, : len(state)] == depth] for slot, state in zip(anchors.slots, states, strict=True)]
        return torch.nn.utils.rnn.pad_sequence([self._logits(frontier) for frontier in frontiers], batch_first=True)

    def _run(self, next_ids: Tensor, hidden: Tensor, rows: Rows) -> Tensor:
        """g [n, d] of rows with the tokens that follow them [n] and the hidden states [n, d]."""
        embedded = rms_norm(F.embedding(next_ids, self.target.embedding), self.embedding_norm, self.shape.eps)
        x = torch.cat([embedded, rms_norm(hidden, self.hidden_norm, self.shape.eps)], -1)
        (out,) = run_layers([self.layer], F.linear(x, self.projection), rows, self._cache, causal=True)
        return out

    def _logits(self, state: Tensor) -> Tensor:
        return self.target.logits(rms_norm(state, self.norm, self.shape.eps))
