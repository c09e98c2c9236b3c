"""Drafters that read their own last state for the next draft: one pass per draft, or per depth of a tree.

    g_i = step(t_{i+1}, h_i);  t_{i+2} ~ softmax(logits(g_i) / T)

h_i comes from the target at the rows that it committed. For the next draft g_i takes the place of h_{i+1}, which the target has not
computed yet; in a tree that of the node's parent, and a node sees its own ancestors alone. Row i stands at position i, the token that
it reads at i + 1.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.types import DraftTree

from ..model import KVCache, Rows
from .protocol import Committed, Drafter, join, step


class Unread(NamedTuple):
    """Rows of one slot that the target committed and the drafter has not read yet."""

    start: int  # position of the first
    next_ids: Tensor  # int64 [n], the tokens that follow them
    hidden: Tensor  # [n, d], h


class Chained(Drafter):
    """Base: a subclass has `target`, `shape`, and the three functions at the end.

    draft_to_target: int64 [Vd], of a draft vocabulary.
    """

    draft_to_target: Tensor | None = None

    def start(self, slots, new_cache=KVCache):
        super().start(slots)
        self._cache = new_cache(self.shape, slots, self.target.device, self.target.dtype)
        self._unread: list[Unread | None] = [None] * slots

    def propose(self, anchors, *, drafts, sampling, noise, ops):
        state = self._read(anchors)
        steps = [step(ops, self._logits(state), 0, anchors, sampling, noise, self.draft_to_target)]
        while len(steps) < drafts:
            ahead = Rows.of(anchors.segments(len(steps) - 1, 1), self.target.device)
            state = self._run(anchors.drafted(steps[-1]), state, ahead, drafted=len(steps) - 1)
            steps.append(step(ops, self._logits(state), len(steps), anchors, sampling, noise, self.draft_to_target))
        self.passes += drafts
        return join(steps)

    def propose_tree(self, anchors, *, shape, sampling, ops):
        states = [state[None] for state in self._read(anchors)]  # by batch row, [nodes so far, d]
        shared = dict(
            anchor_positions=anchors.positions,
            method=shape.method,
            sampling=sampling,
            draft_to_target=self.draft_to_target,
            state_indices=anchors.state_indices,
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
        prompts, index, hidden = [], [], self._hidden(committed)
        for slot, start, begin, end in committed.rows.segments:
            self._cache.crop(slot, start)  # the chain's rows were computed from the drafter's own states
            if start == 0 and end - begin > 1:
                prompts.append((slot, 0, end - begin - 1))
                index.extend(range(begin, end - 1))
                start, begin = start + end - begin - 1, end - 1
            self._unread[slot] = Unread(start, committed.next_ids[begin:end], hidden[begin:end])
        if prompts:
            index = torch.tensor(index, device=self.target.device)
            rows = Rows.of(prompts, self.target.device)
            self._run(committed.next_ids[index], hidden[index], rows)

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
        run = self._run(torch.cat(next_ids), torch.cat(hidden), rows, drafted=0)
        return [torch.cat([known[:1], run[s.begin : s.end]]) for known, s in zip(states, rows.segments, strict=True)]

    def _frontier_logits(self, tree: DraftTree, anchors, states: list[Tensor], depth: int) -> Tensor:
        """Logits [R, F, V] after the nodes of one depth; a request that has fewer than F of them fills up with zeros."""
        frontiers = [state[tree.depths[slot, : len(state)] == depth] for slot, state in zip(anchors.slots, states, strict=True)]
        return torch.nn.utils.rnn.pad_sequence([self._logits(frontier) for frontier in frontiers], batch_first=True)

    def _hidden(self, committed: Committed) -> Tensor:
        """h [n, d] of committed rows."""
        raise NotImplementedError

    def _run(self, next_ids: Tensor, hidden: Tensor, rows: Rows, drafted: int | None = None) -> Tensor:
        """g [n, d] of rows with the tokens that follow them [n] and the states [n, d].

        drafted: how many rows of the drafter's own stand between the committed ones and these; None where these are committed.
        """
        raise NotImplementedError

    def _logits(self, state: Tensor) -> Tensor:
        """[n, d] -> [n, Vd]."""
        raise NotImplementedError
