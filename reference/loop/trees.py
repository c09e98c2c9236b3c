"""The steps of a round for a batch of draft trees: node m of a request is its row m.

    row m stands at anchor_position + depth of node m and sees its ancestors

Symbols: S request slots, M nodes, N rows of the target's pass. Source: tree verification of SpecInfer, arXiv 2305.09781.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dspark_kernels.types import Acceptance, DraftTree, OneHotProposal, VerifyLayout

from ..drafters import Anchors, Drafter, TreeShape
from ..model import MAX_NODES, Target
from .chains import Batch, Verified


class TreeBatch(Batch):
    """The requests in flight, each with a draft tree of one shape."""

    def __init__(self, target: Target, drafter: Drafter, ops, slots: int, shape: TreeShape):
        super().__init__(target, drafter, ops, slots, shape.num_nodes - 1, shape.rule, greedy=False)
        self.shape = shape
        links = {
            name: torch.full((slots, shape.num_nodes), -1, dtype=torch.int32, device=target.device)
            for name in ("parents", "depths", "first_child", "next_sibling")
        }
        self.tree = self.no_tree = DraftTree(
            torch.full((slots, shape.num_nodes), -1, device=target.device),
            **links,
            ancestors=torch.zeros(slots, shape.num_nodes, dtype=torch.int64, device=target.device),
            num_nodes=torch.zeros(slots, dtype=torch.int32, device=target.device),
            proposal=OneHotProposal(),
            drawn="one_hot",
            flags=torch.zeros(slots, dtype=torch.int32, device=target.device),
        )

    def propose(self) -> DraftTree | None:
        slots = [sequence.slot for sequence in self.decoding]
        self.tree = self.no_tree
        if not slots:
            return None
        passes = self.drafter.passes
        anchors = Anchors.of(self.anchors, self.anchor_positions, slots)
        self.tree = self.drafter.propose_tree(anchors, shape=self.shape, sampling=self.sampling, ops=self.ops)
        for sequence, flags in zip(self.decoding, self.tree.flags.tolist(), strict=True):
            sequence.result.draft_passes += self.drafter.passes - passes
            sequence.result.flags |= flags
        return self.tree

    def schedule(self, tree: DraftTree | None, *_) -> VerifyLayout:
        """The rows of all nodes, and of prompts."""
        layout = self.ops.tree_layout(self.tree, **self._step())
        return self._with_prompts(layout)

    def ancestors(self, layout: VerifyLayout) -> Tensor:
        words, starts = [], layout.query_start_loc.tolist()
        for sequence, begin, end in zip(self.sequences, starts, starts[1:], strict=False):
            if sequence.prefill:  # a chain; one of more rows than a word has bits is read without its words
                rows = torch.arange(end - begin, device=self.target.device)
                words.append(torch.where(rows < MAX_NODES, (2 << rows) - 1, 0))
            else:
                words.append(self.tree.ancestors[sequence.slot, : end - begin])
        return torch.cat(words)

    def accept(self, logits: Tensor, layout: VerifyLayout, tree: DraftTree | None) -> Acceptance:
        return self.ops.accept_tree(
            logits,
            layout,
            self.tree,
            sampling=self.sampling,
            rule=self.rule,
            anchors=self.anchors,
            anchor_positions=self.anchor_positions,
            state_indices=self.state_indices,
        )

    def path(self, acceptance: Acceptance, row: int) -> list[int]:
        return acceptance.path[row, : int(acceptance.num_emitted[row])].tolist()

    def commit(self, verified: Verified, acceptance: Acceptance) -> None:
        self.cache.compact(verified.rows, acceptance)
        super().commit(verified, acceptance)

    def _depths(self, layout: VerifyLayout) -> list[int]:
        starts = layout.query_start_loc.tolist()
        return [int(layout.positions[begin:end].max() - layout.positions[begin]) for begin, end in itertools.pairwise(starts)]
