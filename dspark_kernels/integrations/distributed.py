"""`draft_block` and `accept_chain` over the ranks of a `torch.distributed` process group, each with a shard of the vocabulary.

What ranks exchange, and which calls have the bits of the whole op: docs/shards.md. Every rank of the group makes the same calls in
the same order, as with any collective.

    shards = VocabularyShards(vocab_size, max_requests, max_drafts, width=logits.shape[-1], group=tensor_parallel_group)
    block = shards.draft_block(base_logits, anchors, head, anchor_positions=positions, sampling=sampling)
    acceptance = shards.accept_chain(target_logits, layout, block.proposal, sampling=sampling)

Symbols: N ranks, V ids of the vocabulary, W columns of a rank, R requests, S request slots, K drafts, L rows of logits, r Markov
rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_device, check_int, check_tensor, check_type
from ..choices import ChainRule, Noise
from ..ops.accept import shards as accept_shards
from ..ops.draft import candidate_shards, shards as draft_shards
from ..ops.shards import Shard, check_shard
from ..types import (
    Acceptance,
    ConfidenceHead,
    DenseProposal,
    DraftBlock,
    MarkovHead,
    OneHotProposal,
    RnnMarkovHead,
    SamplingTensors,
    SparseProposal,
    VerifyLayout,
)
from ..workspace import Workspace


class VocabularyShards:
    """The ops on vocabulary shards, with their gathers. Rank i of the group holds ids i * W to (i + 1) * W - 1.

    Making one compares the arguments of all ranks, which waits for them. Memory for parts and gathered parts is allocated by the
    first call of a size and kept, so that with `out=` a later call allocates nothing and no call waits for the device; CUDA graphs
    can capture it after one call like it. An object belongs to one stream, and graphs that may run at once need one each. Where a
    rank fails or is late, the others get the error of torch.distributed, within the timeout of the group.

    Args:
        vocab_size: V. max_requests, max_drafts: the largest R and K.
        width: W, the columns of logits that every rank has; default ceil(V / N). The last ranks' may lie beyond V, and are ignored.
        group: default: that of all processes. device: default: the current CUDA device, or the CPU where there is none.
        markov_rank: r of a gated or rnn head, as in `Workspace`.

    Attributes:
        rank, ranks: number of this process in the group; N. width: W. start, held: first id of this rank; how many of its columns
        are ids of the vocabulary.

    Raises:
        TypeError, ValueError: a number out of its range; ranks whose arguments differ, on every rank; a group without this process.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(
        self,
        vocab_size: int,
        max_requests: int,
        max_drafts: int,
        *,
        width: int | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        markov_rank: int = 0,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("VocabularyShards: torch.distributed is not initialised: call init_process_group first")
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: expected one that this process is in")
        check_int("vocab_size", vocab_size, low=1)
        self.width = check_int("width", -(-vocab_size // self.ranks) if width is None else width, low=1)
        self._device, self._group = check_device("device", device), group
        shard = check_shard(self.width, self.rank * self.width, self.ranks, vocab_size)
        self.start, self.held = shard.start, shard.held
        self._cut: dict[str, Any] = dict(vocab_start=shard.start, vocab_shards=shard.count, vocab_size=shard.vocab)
        self._workspace = Workspace(max_requests, max_drafts, vocab_size, self._device, markov_rank=markov_rank)
        self._gathers = [_Gather(shard, group, self._device) for _ in range(3)]  # acceptance needs those of its phases together
        self._states: dict[tuple[int, int], Tensor] = {}
        self._check_ranks(vocab_size=vocab_size, max_requests=max_requests, max_drafts=max_drafts, width=self.width)

    def _check_ranks(self, **numbers: int) -> None:
        """Raise ValueError where a rank has other numbers than the others."""
        own = torch.tensor(list(numbers.values()), dtype=torch.int64, device=self._device)
        found = torch.empty(self.ranks * len(own), dtype=torch.int64, device=self._device)
        _all_gather(found, own, self._group)
        for name, values in zip(numbers, found.view(self.ranks, -1).T.tolist(), strict=True):
            if len(set(values)) > 1:
                raise ValueError(f"{name}: expected the same number on every rank, got {values}")

    def shard_of(self, whole: Tensor, dim: int = -1) -> Tensor:
        """This rank's W entries of a tensor that has V along `dim`, a copy; entries beyond the vocabulary are 0."""
        check_type("whole", whole, Tensor)
        vocab_size = self._cut["vocab_size"]
        if whole.shape[dim] != vocab_size:
            raise ValueError(f"whole: expected {vocab_size} entries along dimension {dim}, got {whole.shape[dim]}")
        shape = list(whole.shape)
        shape[dim] = self.width
        own = whole.new_zeros(shape)
        own.narrow(dim, 0, self.held).copy_(whole.narrow(dim, min(self.start, vocab_size), self.held))
        return own

    def shard_of_head(self, head: MarkovHead) -> MarkovHead:
        """The head with this rank's rows of W2 and its scale, in place of those of the whole vocabulary; copies."""
        check_type("head", head, MarkovHead)
        scale = None if head.w2_scale is None else self.shard_of(head.w2_scale)
        return dataclasses.replace(head, w2=self.shard_of(head.w2, 0), w2_scale=scale)

    def draft_block(
        self,
        base_logits: Tensor,
        anchors: Tensor,
        head: MarkovHead | None = None,
        *,
        anchor_positions: Tensor,
        sampling: SamplingTensors | None = None,
        hidden: Tensor | None = None,
        confidence: ConfidenceHead | None = None,
        candidates: int | None = None,
        draft_to_target: Tensor | None = None,
        first_draft: int = 0,
        head_state: Tensor | None = None,
        noise: Noise = "draft",
        state_indices: Tensor | None = None,
        keep_logits: bool = False,
        out: DraftBlock | None = None,
    ) -> DraftBlock:
        """`dspark_kernels.draft_block`: a gather for each of the K drafts, or with `candidates` one.

        Args:
            base_logits: [R, K, W], this rank's columns.
            head: with this rank's rows of W2 (`shard_of_head`); with `candidates` W2 may be whole, which saves gathering its rows.
            draft_to_target: int64 [W], this rank's entries.
            head_state: fp32 [S, r], as in `draft_block`.
            out: a DraftBlock to write, whose dense proposal has this rank's columns [S, K, W].
            The rest as in `draft_block`, whole and the same on every rank; what shards refuse: docs/shards.md.

        Returns:
            DraftBlock. Tokens, confidences, flags and lse are the same on every rank, and so is a sparse proposal; a dense one has
            this rank's columns, as `accept_chain` wants them.

        Raises:
            TypeError, ValueError, NotImplementedError, RuntimeError: as `dspark_kernels.draft_block_partial`, and what
            torch.distributed raises.
        """
        rows, drafts, _ = check_tensor("base_logits", base_logits, shape=("R", "K", self.width)).shape
        if drafts == 0:
            raise ValueError(f"base_logits: expected K >= 1, got shape {list(base_logits.shape)}")
        if head is not None:
            check_type("head", head, MarkovHead)
        common: dict[str, Any] = dict(
            sampling=sampling, confidence=confidence, candidates=candidates, first_draft=first_draft, state_indices=state_indices,
            workspace=self._workspace, **self._cut,
        )  # fmt: skip
        own: dict[str, Any] = dict(anchor_positions=anchor_positions, draft_to_target=draft_to_target, noise=noise)
        gather = self._gathers[0]
        if candidates is not None:
            check_int("candidates", candidates, low=1)
            words = candidate_shards.part_words(base_logits, head, candidates=candidates, draft_to_target=draft_to_target)
            part, block = draft_shards.draft_block_partial(
                base_logits, anchors, head, block=out, hidden=hidden, head_state=head_state, keep_logits=keep_logits,
                out=gather.part(words), **common, **own,
            )  # fmt: skip
            return draft_shards.draft_block_finish(
                gather(part), block, anchors, head, base_logits=base_logits, hidden=hidden, head_state=head_state, **common, **own
            )
        if head_state is None and isinstance(head, RnnMarkovHead) and first_draft == 0:
            head_state = self._state(anchors.shape[0], head.rank)
        proposal = None if out is None else out.proposal
        with_lse = sampling is not None if out is None else isinstance(proposal, DenseProposal) and proposal.lse is not None
        words = draft_shards.part_words(rows, self.width, with_lse)
        for position in range(drafts):
            part, out = draft_shards.draft_block_partial(
                base_logits, anchors, head, position=position, block=out, hidden=hidden, head_state=head_state,
                keep_logits=keep_logits, out=gather.part(words), **common, **own,
            )  # fmt: skip
            block = draft_shards.draft_block_finish(
                gather(part), out, anchors, head, position=position, hidden=hidden, num_drafts=drafts, **common
            )
        return block

    def accept_chain(
        self,
        target_logits: Tensor,
        layout: VerifyLayout,
        proposal: OneHotProposal | DenseProposal | SparseProposal | None = None,
        *,
        sampling: SamplingTensors | None = None,
        rule: ChainRule = "token",
        target_scaled: bool = False,
        anchors: Tensor | None = None,
        anchor_positions: Tensor | None = None,
        state_indices: Tensor | None = None,
        out: Acceptance | None = None,
    ) -> Acceptance:
        """`dspark_kernels.accept_chain`: one gather for greedy and coupled rows, else two, or three for a dense proposal.

        Args:
            target_logits: [L, W], this rank's columns.
            proposal: dense: this rank's columns of the logits [S, K, W], lse of whole rows; sparse: the same on every rank.
            target_scaled: as in `accept_chain`; needs [S] fp32 of new memory in every phase.
            The rest as in `accept_chain`, whole and the same on every rank; what shards refuse: docs/shards.md.

        Returns:
            Acceptance, the same on every rank.

        Raises:
            TypeError, ValueError, NotImplementedError, RuntimeError: as `dspark_kernels.accept_partial`, and what
            torch.distributed raises.
        """
        check_tensor("target_logits", target_logits, shape=("L", self.width))
        drawn: dict[str, Any] = dict(sampling=sampling, rule=rule)
        sizes: dict[str, Any] = dict(state_indices=state_indices, **drawn, **self._cut)
        call: dict[str, Any] = dict(target_scaled=target_scaled, workspace=self._workspace, **sizes)
        gathered: tuple[Tensor, ...] = ()
        for phase, gather in zip(accept_shards.accept_phases(proposal, **drawn), self._gathers, strict=False):
            part = gather.part(accept_shards.part_words(target_logits, layout, proposal, phase=phase, **sizes))
            accept_shards.accept_partial(target_logits, layout, proposal, phase=phase, gathered=gathered, out=part, **call)
            gathered += (gather(part),)
        return accept_shards.accept_finish(
            target_logits, layout, proposal, gathered=gathered, anchors=anchors, anchor_positions=anchor_positions, out=out, **call
        )

    def _state(self, slots: int, rank: int) -> Tensor:
        """fp32 [S, r] of zeros for an rnn head that keeps its state between the positions of one call."""
        state = self._states.get((slots, rank))
        if state is None:
            state = self._states[slots, rank] = torch.zeros(slots, rank, device=self._device)
        return state


class _Gather:
    """A part of this rank and those of all ranks, in memory that is kept: captured graphs have its address."""

    def __init__(self, shard: Shard, group: dist.ProcessGroup | None, device: torch.device):
        self._ranks, self._group, self._device = shard.count, group, device
        self._memories = [torch.empty(0, dtype=torch.int64, device=device)]

    def part(self, words: int) -> Tensor:
        """int64 [words] for this rank's part, until the next one is asked for."""
        needed = (1 + self._ranks) * words
        if self._memories[-1].numel() < needed:
            # At least twice as large as before, so that all of them are at most twice as large as the last.
            size = max(needed, 2 * self._memories[-1].numel())
            self._memories.append(torch.empty(size, dtype=torch.int64, device=self._device))
        return self._memories[-1][:words]

    def __call__(self, part: Tensor) -> Tensor:
        """int64 [N, words]: the parts of all ranks."""
        words = part.numel()
        gathered = self._memories[-1][words : (1 + self._ranks) * words]
        _all_gather(gathered, part, self._group)
        return gathered.view(self._ranks, words)


def _all_gather(gathered: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> None:
    """Both flat, as gloo wants them."""
    # The name until torch 2.12 is deprecated in 2.13, with a warning at every call.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, part, group=group)
