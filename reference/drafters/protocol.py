"""The protocol between the decoding loop and a drafter.

A drafter is made from (config, tensors, target). The loop then calls

    start(slots, new_cache)   once: state for that many requests at a time, caches made by new_cache
    propose(...)              every round, for the slots that decode: a DraftBlock, tokens chosen by `ops.draft_block`
    propose_tree(...)         in its place where trees are verified: a DraftTree, nodes chosen by `ops.draft_tree`
    commit(committed)         after every pass of the target, with the rows whose keys and values stay in the target's cache
    release(slot)             when a request leaves its slot

A request begins with a commit of its prompt. After any commit the slot's rows are 0 .. anchor_position - 1, one per
token of the sequence but the anchor.

Symbols: R requests of the batch, S request slots, K drafts, M tree nodes, n rows, d hidden size, V vocabulary, m chosen layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_kernels.types import DenseProposal, DraftBlock, DraftTree, SamplingTensors

from ..model import KVCache, Rows


@dataclasses.dataclass(frozen=True)
class Committed:
    """Rows that the target keeps, packed as in its pass: whole prompts, anchors and accepted drafts."""

    rows: Rows
    token_ids: Tensor  # int64 [n], the rows' own tokens
    next_ids: Tensor  # int64 [n], the tokens that follow them; the last of a request is its new anchor
    pre_norm: Tensor  # [n, d], the target's last layer
    features: Tensor | None  # [n, m * d], the layers in `feature_layers`


@dataclasses.dataclass(frozen=True)
class Anchors:
    """The slots that draft this round, and where they stand."""

    token_ids: Tensor  # int64 [S]
    positions: Tensor  # int64 [S]
    state_indices: Tensor  # int32 [R], slot of each batch row
    slots: list[int]  # the same on the host
    starts: list[int]  # anchor position of each batch row, on the host

    @classmethod
    def of(cls, token_ids: Tensor, positions: Tensor, slots: Sequence[int]) -> Anchors:
        state_indices = torch.tensor(slots, dtype=torch.int32, device=token_ids.device)
        return cls(token_ids, positions, state_indices, list(slots), positions[state_indices.long()].tolist())

    def segments(self, offset: int, count: int) -> list[tuple[int, int, int]]:
        """`count` rows per batch row from anchor position + offset on, as `Rows.of` takes them."""
        return [(slot, start + offset, count) for slot, start in zip(self.slots, self.starts, strict=True)]

    def drafted(self, step: DraftBlock) -> Tensor:
        """Tokens by batch row of a block of one draft, int64 [R]."""
        return step.tokens[self.state_indices.long(), 0]

    @property
    def batch_ids(self) -> Tensor:
        """Anchor tokens by batch row, int64 [R]."""
        return self.token_ids[self.state_indices.long()]


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """What trees are drafted, and by which rule they are accepted.

    num_nodes: 1 to 64, the anchor included. method: of ops.draft_tree. branching: children of a node by its depth, for the methods
    that have a shape; a drafter with a pass per depth needs one. candidates: best base logits per position to choose from. rule: of
    ops.accept_tree.
    """

    num_nodes: int
    method: str = "conditioned"
    branching: tuple[int, ...] | None = None
    candidates: int | None = None
    rule: str = "walk"


class Drafter:
    """Base of all drafters.

    max_drafts: K, drafts per round. feature_layers: target layers whose outputs `commit` wants. has_confidence: whether
    blocks carry confidences. passes: forward passes run for proposals so far (a pass serves the whole batch; passes
    over prompts are not counted, nor is the injection of context, which is a projection).
    """

    max_drafts = 0
    feature_layers: tuple[int, ...] = ()
    has_confidence = False
    passes = 0

    def start(self, slots: int, new_cache=KVCache) -> None:
        """State for `slots` requests at a time; whatever was there is forgotten. new_cache(shape, slots, device, dtype)."""
        self.passes = 0

    def propose(self, anchors: Anchors, *, drafts: int, sampling: SamplingTensors | None, noise: str, ops) -> DraftBlock:
        """Draft for the given slots.

        drafts: 1..max_drafts, how many to make. sampling: [S], None = all greedy. noise: "draft" or "coupled".
        ops.draft_block chooses the tokens. Returns a block [S, drafts].
        """
        raise NotImplementedError

    def propose_tree(self, anchors: Anchors, *, shape: TreeShape, sampling: SamplingTensors | None, ops) -> DraftTree:
        """Draft a tree [S, num_nodes] for the given slots. ops.draft_tree and ops.expand_tree choose the nodes."""
        raise NotImplementedError

    def commit(self, committed: Committed) -> None:
        pass

    def release(self, slot: int) -> None:
        pass


def max_drafts_of(config, default: int = 4) -> int:
    """`max_drafts` of a step-wise drafter's config. Raises ValueError for anything but an integer >= 1."""
    drafts = config.get("max_drafts", default)
    if isinstance(drafts, bool) or not isinstance(drafts, int) or drafts < 1:
        raise ValueError(f"config: expected max_drafts >= 1, got {drafts!r}")
    return drafts


def step(ops, logits: Tensor, index: int, anchors: Anchors, sampling, noise, draft_to_target: Tensor | None = None) -> DraftBlock:
    """Draft `index` + 1 of a step-wise drafter from its logits [R, V]."""
    return ops.draft_block(
        logits[:, None],
        anchors.token_ids,
        anchor_positions=anchors.positions,
        sampling=sampling,
        first_draft=index,
        draft_to_target=draft_to_target,
        noise=noise,
        state_indices=anchors.state_indices,
    )


def join(steps: Sequence[DraftBlock]) -> DraftBlock:
    """Blocks of one draft each as one block; the flags are united."""
    proposal = steps[0].proposal
    if isinstance(proposal, DenseProposal):
        proposal = DenseProposal(
            logits=torch.cat([block.proposal.logits for block in steps], 1),
            lse=None if proposal.lse is None else torch.cat([block.proposal.lse for block in steps], 1),
            temperature=proposal.temperature,
            draft_to_target=proposal.draft_to_target,
        )
    flags = steps[0].flags
    for block in steps[1:]:
        flags = flags | block.flags
    return DraftBlock(torch.cat([block.tokens for block in steps], 1), proposal, flags)
