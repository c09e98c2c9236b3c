"""The steps of a round for a batch of chains, and the state that its slots share with the ops.

    row i of a request: its anchor (i = 0) or its draft i

Symbols: R requests of the batch, S request slots, K drafts, N rows of the target's pass, L logit rows, V vocabulary. Source:
DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.types import Acceptance, CostTable, DraftBlock, Flag, OneHotProposal, SamplingTensors, VerifyLayout

from ..drafters import Anchors, Committed, Drafter
from ..model import KVCache, Output, Rows, Target
from ..paged import PagedCache
from ..schedule import threshold_lengths
from .sequence import Request, Seconds, Sequence


class Verified(NamedTuple):
    """The target's pass over all rows of a step."""

    rows: Rows
    output: Output
    logits: Tensor  # [L, V], of the rows that emit


class TokenScores(NamedTuple):
    """By request, one number for every token that it emitted."""

    logprobs: list[list[float]]  # ln of the token's probability, greedy: at temperature 1
    expected: list[list[float]]  # the mean of ln p under the token's distribution p


class Batch:
    """The requests in flight and the state that their slots share with the ops."""

    def __init__(self, target: Target, drafter: Drafter, ops, slots: int, drafts: int, rule: str, greedy: bool):
        self.target, self.drafter, self.ops, self.drafts, self.rule = target, drafter, ops, drafts, rule
        self.free = list(range(slots))
        self.sequences: list[Sequence] = []  # in batch order
        device = target.device
        new_cache = KVCache
        if hasattr(ops, "tree_attention"):
            new_cache = functools.partial(PagedCache, ops=ops)
        self.cache = target.new_cache(slots, new_cache)
        drafter.start(slots, new_cache)
        self.anchors = torch.zeros(slots, dtype=torch.int64, device=device)
        self.anchor_positions = torch.zeros(slots, dtype=torch.int64, device=device)
        self.temperature = torch.zeros(slots, device=device)
        self.seed = torch.zeros(slots, dtype=torch.int64, device=device)
        self.sampling = None if greedy else SamplingTensors(self.temperature, self.seed)
        # Of the slot's last two rounds, the older first. A budget is computed from the older one.
        self.confidences = [torch.ones(slots, max(1, drafts), device=device) for _ in range(2)]
        # The proposal of a step in which nothing is drafted.
        self.no_drafts = DraftBlock(
            torch.full((slots, max(1, drafts)), -1, device=device),
            OneHotProposal(),
            torch.zeros(slots, dtype=torch.int32, device=device),
        )

    def admit(self, index: int, request: Request) -> None:
        slot = self.free.pop(0)
        self.sequences.append(Sequence(index, request, slot))
        self.anchors[slot], self.anchor_positions[slot] = int(request.prompt[0]), 0
        self.temperature[slot], self.seed[slot] = request.temperature, request.seed
        for confidence in self.confidences:
            confidence[slot] = 1.0

    @property
    def slots(self) -> list[int]:
        return [sequence.slot for sequence in self.sequences]

    @property
    def state_indices(self) -> Tensor:
        return torch.tensor(self.slots, dtype=torch.int32, device=self.target.device)

    @property
    def decoding(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.read_prompt]

    def propose(self) -> DraftBlock | None:
        """Drafts of the requests that have an anchor; None where there are none."""
        slots = [sequence.slot for sequence in self.decoding]
        if not slots or self.drafts == 0:
            return None
        passes = self.drafter.passes
        noise = "coupled" if self.rule == "coupled" else "draft"
        anchors = Anchors.of(self.anchors, self.anchor_positions, slots)
        block = self.drafter.propose(anchors, drafts=self.drafts, sampling=self.sampling, noise=noise, ops=self.ops)
        for sequence, flags in zip(self.decoding, block.flags.tolist(), strict=True):
            sequence.result.draft_passes += self.drafter.passes - passes
            sequence.result.flags |= flags
        return block

    def schedule(self, block: DraftBlock | None, threshold: float, cost: CostTable | None, policy: str) -> VerifyLayout:
        """Draft lengths, and the rows of anchors, admitted drafts and prompts."""
        drafting, shared = block is not None, dict(self._step(), anchors=self.anchors)
        if drafting and cost is not None:
            older, newer = self.confidences
            stale = older if policy == "budget" else None
            layout = self.ops.schedule_prefixes(block, cost, policy=policy, stale_confidence=stale, **shared)
            slots = [sequence.slot for sequence in self.decoding]
            older[slots], newer[slots] = newer[slots], block.confidence[slots]
        else:
            lengths = torch.full_like(shared["state_indices"], self.drafts if drafting else 0)
            if drafting and threshold > 0:
                lengths = threshold_lengths(block.confidence[self.slots], threshold)
            layout = self.ops.fixed_layout(block if drafting else self.no_drafts, lengths, **shared)
        return self._with_prompts(layout)

    def _step(self) -> dict:
        """What every layout of this step takes."""
        prompts = [sequence.prefill for sequence in self.sequences]
        counts = torch.tensor(prompts, dtype=torch.int32, device=self.target.device)
        return dict(
            anchor_positions=self.anchor_positions,
            max_rows=sum(prompt or 1 + self.drafts for prompt in prompts),
            num_prefill_tokens=counts if any(prompts) else None,
            state_indices=self.state_indices,
        )

    def _with_prompts(self, layout: VerifyLayout) -> VerifyLayout:
        """Fill in the ids of prompts, which a layout leaves to the engine."""
        for sequence, begin in zip(self.sequences, layout.query_start_loc.tolist(), strict=False):
            if sequence.prefill:
                ids = torch.tensor(sequence.ids, device=self.target.device)
                layout.token_ids[begin : begin + len(ids)] = ids
        return layout

    def ancestors(self, layout: VerifyLayout) -> Tensor | None:
        """Which rows of its request every row sees, int64 [N]; None = those before it."""
        return None

    def verify(self, layout: VerifyLayout) -> Verified:
        """The target's pass over all rows."""
        count, emitting = int(layout.num_rows), int(layout.cu_num_logits[-1])
        rows = Rows.pack(layout.positions[:count], layout.batch_indices[:count], self.slots, self.ancestors(layout))
        output = self.target.forward(layout.token_ids[:count], rows, self.cache, self.drafter.feature_layers)
        return Verified(rows, output, self.target.logits(output.hidden[layout.logits_indices[:emitting].long()]))

    def accept(self, logits: Tensor, layout: VerifyLayout, block: DraftBlock | None) -> Acceptance:
        """Which drafts stay and what follows; moves every slot's anchor on."""
        return self.ops.accept_chain(
            logits,
            layout,
            None if block is None else block.proposal,
            sampling=self.sampling,
            rule=self.rule,
            anchors=self.anchors,
            anchor_positions=self.anchor_positions,
            state_indices=self.state_indices,
        )

    def path(self, acceptance: Acceptance, row: int) -> list[int]:
        """The rows of a request that stay, counted from its anchor's: all of a chain up to the last accepted."""
        return list(range(int(acceptance.num_emitted[row])))

    def commit(self, verified: Verified, acceptance: Acceptance) -> None:
        """Keep the accepted rows in the target's cache and hand them to the drafter."""
        output = verified.output
        accepted, tokens = acceptance.num_accepted.tolist(), acceptance.tokens.tolist()
        segments, index, own_ids, next_ids = [], [], [], []
        for row, (sequence, segment) in enumerate(zip(self.sequences, verified.rows.segments, strict=True)):
            path = list(range(sequence.prefill)) or self.path(acceptance, row)
            self.cache.crop(segment.slot, segment.start + len(path))
            segments.append((segment.slot, segment.start, len(path)))
            index.extend(segment.begin + own for own in path)
            count, emitted = accepted[row], tokens[row]
            ids = sequence.ids if sequence.prefill else [sequence.ids[-1], *emitted[:count]]
            own_ids += ids
            next_ids += [*ids[1:], emitted[count]]
        device = self.target.device
        index = torch.tensor(index, device=device)
        self.drafter.commit(
            Committed(
                Rows.of(segments, device),
                torch.tensor(own_ids, device=device),
                torch.tensor(next_ids, device=device),
                output.pre_norm[index],
                None if output.features is None else output.features[index],
            )
        )

    def record(self, proposed, layout, logits, acceptance, seconds: Seconds) -> None:
        """Append the step to every request's sequence and measurements. A step's seconds are shared out by rows."""
        emitted, tokens = acceptance.num_emitted.tolist(), acceptance.tokens.tolist()
        starts, depths = layout.query_start_loc.tolist(), self._depths(layout)
        lengths, flags = layout.draft_lens.tolist(), (layout.flags | acceptance.flags).tolist()
        scores = self._token_scores(logits, layout, acceptance)
        rows_left = [sequence.prefill or count for sequence, count in zip(self.sequences, emitted, strict=True)]
        decoding = len(self.decoding)
        for row, sequence in enumerate(self.sequences):
            result, count = sequence.result, emitted[row]
            verify_seconds = seconds.verifying * (starts[row + 1] - starts[row]) / starts[-1]
            commit_seconds = seconds.committing * rows_left[row] / sum(rows_left)
            if sequence.prefill:
                result.prefill_seconds += verify_seconds + commit_seconds
            else:
                draft_seconds = seconds.drafting / decoding + commit_seconds
                result.draft_seconds += draft_seconds
                result.verify_seconds += verify_seconds
                result.round_seconds.append(draft_seconds + verify_seconds)
                result.target_passes += 1
                result.acceptance_lengths.append(count)
                result.proposal_lengths.append(lengths[row])
                result.proposal_depths.append(depths[row])
                result.drafted_lengths.append(self.drafts)
                confidence = getattr(proposed, "confidence", None)
                result.confidences.append([] if confidence is None else confidence[sequence.slot].tolist())
            result.flags |= flags[row]
            sequence.emit(tokens[row][:count], scores.logprobs[row], scores.expected[row])
            # A row without a finite logit means that the model failed on this request: what it emitted is not a sample.
            sequence.done |= bool(flags[row] & Flag.NONFINITE_ROW)

    def _depths(self, layout: VerifyLayout) -> list[int]:
        """How far ahead of its anchor every request's furthest draft is."""
        return layout.draft_lens.tolist()

    def _token_scores(self, logits: Tensor, layout: VerifyLayout, acceptance: Acceptance) -> TokenScores:
        counts = acceptance.num_emitted.tolist()
        rows, chosen, temperatures = [], [], []
        for row, (sequence, first) in enumerate(zip(self.sequences, layout.cu_num_logits.tolist(), strict=False)):
            rows += [first + own for own in self.path(acceptance, row)]
            chosen += acceptance.tokens[row, : counts[row]].tolist()
            temperatures += [sequence.request.temperature if sequence.request.temperature > 0 else 1.0] * counts[row]
        scale = torch.tensor(temperatures, dtype=torch.float64, device=logits.device)
        log_probs = torch.log_softmax(logits[rows].double() / scale[:, None], -1)
        of_tokens = log_probs.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0]
        expected = torch.special.entr(log_probs.exp()).sum(-1).neg()
        return TokenScores([part.tolist() for part in of_tokens.split(counts)], [part.tolist() for part in expected.split(counts)])

    def leave(self) -> list[Sequence]:
        """Take the finished requests out of the batch and free their slots."""
        gone = [sequence for sequence in self.sequences if sequence.done]
        self.sequences = [sequence for sequence in self.sequences if not sequence.done]
        for sequence in gone:
            self.cache.crop(sequence.slot, 0)
            self.drafter.release(sequence.slot)
            self.free.append(sequence.slot)
        return gone
