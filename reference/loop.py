"""The decoding loop that every system shares: propose -> schedule -> verify -> accept -> commit.

One round of a request turns its anchor (the last emitted token, not yet in the target's cache) into num_accepted + 1
tokens:

1. propose: the drafter makes K drafts and keeps the law that each was drawn from;
2. schedule: a length per request (all K, up to a confidence threshold, or by measured costs), and the packed rows;
3. verify: one pass of the target over the anchors and admitted drafts of all requests, and the prompts of new ones;
4. accept: lossless acceptance, then a correction or bonus token, which is the next anchor (a prompt's last row has no
   drafts to judge: its bonus is the first new token);
5. commit: rejected rows leave the caches, the drafter learns what the target computed for the rows that stay.

With a tree the drafter makes up to M - 1 drafts, of which several may follow one token; all are verified, each at the position of
its depth and seeing its ancestors alone, and of the cached rows those of the accepted path move together.

Requests sit in state slots; everything that outlives a round is indexed by slot, the batch holds whichever slots are
busy. All random numbers are addressed by the request's own seed and positions, never by slot or batch row.

Source of the round: "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation", arXiv
2607.05147.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from dspark_kernels.types import Acceptance, CostTable, DraftBlock, DraftTree, Flag, OneHotProposal, SamplingTensors, VerifyLayout

from .accept import accept_chain
from .draft import draft_block
from .drafters import Anchors, Committed, Drafter, TreeShape
from .layout import fixed_layout, tree_layout
from .model import MAX_NODES, KVCache, Output, Rows, Target
from .paged import PagedCache
from .schedule import schedule_prefixes, threshold_lengths
from .tree import accept_tree
from .tree_draft import draft_tree, expand_tree

RULES = ("token", "block", "coupled")
TREE_RULES = ("walk", "recursive", "traversal")
REFERENCE_OPS = SimpleNamespace(
    draft_block=draft_block,
    fixed_layout=fixed_layout,
    schedule_prefixes=schedule_prefixes,
    accept_chain=accept_chain,
    draft_tree=draft_tree,
    expand_tree=expand_tree,
    tree_layout=tree_layout,
    accept_tree=accept_tree,
)


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to decode.

    prompt: token ids, at least one. max_new_tokens: >= 1. temperature: 0 = greedy. seed: int64, the request's own
    noise. stop_tokens: the request ends after the first of these that it emits (which stays in the output).
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()


@dataclasses.dataclass
class Generation:
    """What decoding one request gave. Lists "per round" have one entry per round, lists "per token" one per new token.

    The first new token comes from the prefill and belongs to no round. Rounds go on while the anchor's index is below
    len(prompt) + max_new_tokens, so one more may run when the output is complete; its lengths are not clipped, the
    output is.
    """

    output_ids: list[int]  # prompt included
    acceptance_lengths: list[int] = dataclasses.field(default_factory=list)  # per round, accepted drafts + 1
    proposal_lengths: list[int] = dataclasses.field(default_factory=list)  # per round, drafts that were verified
    proposal_depths: list[int] = dataclasses.field(default_factory=list)  # per round, how far ahead the furthest of them is
    drafted_lengths: list[int] = dataclasses.field(default_factory=list)  # per round, drafts that were made
    confidences: list[list[float]] = dataclasses.field(default_factory=list)  # per round, [] without a confidence head
    draft_passes: int = 0  # forward passes of the drafter in all rounds
    target_passes: int = 0  # forward passes of the target in all rounds (= rounds; the prefill is not one)
    draft_seconds: float = 0.0  # proposing, and keeping the drafter's state up to date
    verify_seconds: float = 0.0  # scheduling, the target's pass and acceptance
    prefill_seconds: float = 0.0  # the prompt's pass, the first token and the drafter's pass over the prompt
    logprobs: list[float] = dataclasses.field(default_factory=list)  # per token: ln of its chance to be sampled
    expected_logprobs: list[float] = dataclasses.field(default_factory=list)  # per token: the mean of that under its law
    accepted: list[bool] = dataclasses.field(default_factory=list)  # per token: an accepted draft, or the target's own
    flags: int = 0  # dspark_kernels.types.Flag bits met while drafting or accepting

    @property
    def new_tokens(self) -> int:
        return len(self.accepted)


def decode(
    target: Target,
    drafter: Drafter,
    requests: Sequence[Request],
    *,
    rule: str = "token",
    max_drafts: int | None = None,
    confidence_threshold: float = 0.0,
    cost: CostTable | None = None,
    policy: str = "causal",
    tree: TreeShape | None = None,
    ops: SimpleNamespace | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Decode every request; results in the order of `requests`.

    Args:
        target: reference.model.Target.
        drafter: a reference.drafters.Drafter (Autoregressive(target) for plain decoding).
        rule: "token", "block" or "coupled", for chains.
        max_drafts: >= 1, drafts per round are at most this many (None = the drafter's own number).
        confidence_threshold: 0 = verify the whole block; t = up to the first draft whose confidence is below t. Needs a
            drafter with a confidence head.
        cost, policy: schedule with measured costs instead (ops.schedule_prefixes); same need.
        tree: draft and verify trees of this shape, with its own rule, in place of chains (a drafter with propose_tree).
        ops: namespace with draft_block, fixed_layout, accept_chain and schedule_prefixes, for trees draft_tree, expand_tree,
            tree_layout and accept_tree (default: the reference's). With plan_attention and tree_attention, for trees compact_kv
            too, target and drafter attend through them, over paged caches.
        batch_size: requests decoded at once; as one leaves, the next takes its slot.
        progress: called with the number of new output tokens after each step.

    Raises:
        ValueError: a bad argument or request, or scheduling by confidence with a drafter that gives none.
    """
    _check(target, drafter, requests, rule, max_drafts, confidence_threshold, cost, tree, batch_size)
    drafts = drafter.max_drafts if max_drafts is None else min(max_drafts, drafter.max_drafts)
    slots = min(batch_size, len(requests))
    if tree is None:
        greedy = not any(request.temperature > 0 for request in requests)
        batch = _Batch(target, drafter, ops or REFERENCE_OPS, slots, drafts, rule, greedy)
    else:
        batch = _TreeBatch(target, drafter, ops or REFERENCE_OPS, slots, tree)
    waiting = collections.deque(enumerate(requests))
    done: dict[int, Generation] = {}
    with torch.inference_mode():
        while waiting or batch.sequences:
            while waiting and batch.free:
                batch.admit(*waiting.popleft())
            clock = _Clock(target.device)
            proposed = batch.propose()
            drafting = clock.lap()
            layout = batch.schedule(proposed, confidence_threshold, cost, policy)
            rows, output, logits = batch.verify(layout)
            acceptance = batch.accept(logits, layout, proposed)
            verifying = clock.lap()
            before = [len(sequence.ids) for sequence in batch.sequences]
            batch.commit(rows, output, acceptance)
            committing = clock.lap()
            batch.record(proposed, layout, logits, acceptance, drafting, verifying, committing)
            if progress is not None:
                progress(sum(s.new_output(length) for s, length in zip(batch.sequences, before, strict=True)))
            for sequence in batch.leave():
                done[sequence.index] = sequence.finish()
    return [done[index] for index in range(len(requests))]


def _check(target, drafter, requests, rule, max_drafts, confidence_threshold, cost, tree, batch_size):
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(map(repr, RULES))}, got {rule!r}")
    if max_drafts is not None and max_drafts < 1:
        raise ValueError(f"max_drafts: expected >= 1, got {max_drafts}")
    if not 0.0 <= confidence_threshold <= 1.0:
        raise ValueError(f"confidence_threshold: expected a number in [0, 1], got {confidence_threshold}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected >= 1, got {batch_size}")
    if cost is not None and confidence_threshold > 0:
        raise ValueError("confidence_threshold: expected 0 together with cost, which schedules too")
    if (cost is not None or confidence_threshold > 0) and not drafter.has_confidence:
        raise ValueError(f"drafter: expected one with a confidence head to schedule by, got {type(drafter).__name__}")
    if tree is not None:
        if tree.rule not in TREE_RULES:
            raise ValueError(f"tree.rule: expected one of {', '.join(map(repr, TREE_RULES))}, got {tree.rule!r}")
        if type(drafter).propose_tree is Drafter.propose_tree:
            raise ValueError(f"tree: expected a drafter that drafts trees, got {type(drafter).__name__}")
        if cost is not None or confidence_threshold > 0 or max_drafts is not None:
            raise ValueError("tree: expected None together with cost, confidence_threshold or max_drafts, which cut chains")
    for index, request in enumerate(requests):
        if len(request.prompt) < 1 or not all(0 <= token < target.shape.vocab for token in request.prompt):
            raise ValueError(f"requests[{index}].prompt: expected ids from 0 to {target.shape.vocab - 1}, at least one")
        if request.max_new_tokens < 1:
            raise ValueError(f"requests[{index}].max_new_tokens: expected >= 1, got {request.max_new_tokens}")
        if not -(1 << 63) <= request.seed < 1 << 63:
            raise ValueError(f"requests[{index}].seed: expected a 64-bit integer, got {request.seed}")


class _Clock:
    """Seconds between laps, all work on the device included."""

    def __init__(self, device: torch.device):
        self._device = device
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, self._now()
        return self._last - last


class _Sequence:
    """One request while it is decoded: tokens so far (the last one is the anchor, once the prompt was read)."""

    def __init__(self, index: int, request: Request, slot: int):
        self.index, self.request, self.slot = index, request, slot
        self.ids = [int(token) for token in request.prompt]
        self.read_prompt = False
        self.end = len(self.ids) + request.max_new_tokens  # the output is at most this long
        self.done = False
        self.result = Generation([])

    @property
    def prefill(self) -> int:
        """Rows of the prompt that this step brings."""
        return 0 if self.read_prompt else len(self.ids)

    def new_output(self, length: int) -> int:
        """Output tokens since the sequence was `length` long."""
        return min(len(self.ids), self.end) - min(length, self.end)

    def emit(self, tokens: list[int], logprobs: list[float], expected: list[float]) -> None:
        """Take a step's tokens: accepted drafts and one of the target's own."""
        stops = [i for i, token in enumerate(tokens) if token in self.request.stop_tokens]
        kept = stops[0] + 1 if stops else len(tokens)
        self.ids += tokens[:kept]
        self.result.logprobs += logprobs[:kept]
        self.result.expected_logprobs += expected[:kept]
        self.result.accepted += [i < len(tokens) - 1 for i in range(kept)]
        self.read_prompt = True
        self.done = bool(stops) or len(self.ids) - 1 >= self.end

    def finish(self) -> Generation:
        new = self.end - len(self.request.prompt)
        self.result.output_ids = self.ids[: self.end]
        self.result.logprobs = self.result.logprobs[:new]
        self.result.expected_logprobs = self.result.expected_logprobs[:new]
        self.result.accepted = self.result.accepted[:new]
        return self.result


class _Batch:
    """The requests in flight and the state that their slots share with the ops."""

    def __init__(self, target: Target, drafter: Drafter, ops, slots: int, drafts: int, rule: str, greedy: bool):
        self.target, self.drafter, self.ops, self.drafts, self.rule = target, drafter, ops, drafts, rule
        self.free = list(range(slots))
        self.sequences: list[_Sequence] = []  # in batch order
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
        # Of the slot's last two rounds, older first: a budget is made of what is two rounds old.
        self.confidences = [torch.ones(slots, max(1, drafts), device=device) for _ in range(2)]
        # Stands in for a proposal where nothing is drafted: no drafts for any slot.
        self.no_drafts = DraftBlock(
            torch.full((slots, max(1, drafts)), -1, device=device),
            OneHotProposal(),
            torch.zeros(slots, dtype=torch.int32, device=device),
        )

    def admit(self, index: int, request: Request) -> None:
        slot = self.free.pop(0)
        self.sequences.append(_Sequence(index, request, slot))
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
    def decoding(self) -> list[_Sequence]:
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

    def verify(self, layout: VerifyLayout) -> tuple[Rows, Output, Tensor]:
        """The target's pass over all rows; logits [L, V] of the rows that emit."""
        count, emitting = int(layout.num_rows), int(layout.cu_num_logits[-1])
        rows = Rows.pack(layout.positions[:count], layout.batch_indices[:count], self.slots, self.ancestors(layout))
        output = self.target.forward(layout.token_ids[:count], rows, self.cache, self.drafter.feature_layers)
        return rows, output, self.target.logits(output.hidden[layout.logits_indices[:emitting].long()])

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

    def commit(self, rows: Rows, output: Output, acceptance: Acceptance) -> None:
        """Keep the accepted rows in the target's cache and hand them to the drafter."""
        accepted, tokens = acceptance.num_accepted.tolist(), acceptance.tokens.tolist()
        kept, index, own_ids, next_ids = [], [], [], []
        for row, (sequence, segment) in enumerate(zip(self.sequences, rows.segments, strict=True)):
            path = list(range(sequence.prefill)) or self.path(acceptance, row)
            self.cache.crop(segment.slot, segment.start + len(path))
            kept.append((segment.slot, segment.start, len(path)))
            index.extend(segment.begin + own for own in path)
            count, emitted = accepted[row], tokens[row]
            ids = sequence.ids if sequence.prefill else [sequence.ids[-1], *emitted[:count]]
            own_ids += ids
            next_ids += [*ids[1:], emitted[count]]
        device = self.target.device
        index = torch.tensor(index, device=device)
        self.drafter.commit(
            Committed(
                Rows.of(kept, device),
                torch.tensor(own_ids, device=device),
                torch.tensor(next_ids, device=device),
                output.pre_norm[index],
                None if output.features is None else output.features[index],
            )
        )

    def record(self, proposed, layout, logits, acceptance, drafting: float, verifying: float, committing: float) -> None:
        """Append the step to every request's sequence and measurements. A step's seconds are shared out by rows."""
        emitted, tokens = acceptance.num_emitted.tolist(), acceptance.tokens.tolist()
        starts, depths = layout.query_start_loc.tolist(), self._depths(layout)
        lengths, flags = layout.draft_lens.tolist(), (layout.flags | acceptance.flags).tolist()
        scores, expected = self._logprobs(logits, layout, acceptance)
        kept = [sequence.prefill or count for sequence, count in zip(self.sequences, emitted, strict=True)]
        decoding = len(self.decoding)
        for row, sequence in enumerate(self.sequences):
            result, count = sequence.result, emitted[row]
            verify_seconds = verifying * (starts[row + 1] - starts[row]) / starts[-1]
            commit_seconds = committing * kept[row] / sum(kept)
            if sequence.prefill:
                result.prefill_seconds += verify_seconds + commit_seconds
            else:
                result.draft_seconds += drafting / decoding + commit_seconds
                result.verify_seconds += verify_seconds
                result.target_passes += 1
                result.acceptance_lengths.append(count)
                result.proposal_lengths.append(lengths[row])
                result.proposal_depths.append(depths[row])
                result.drafted_lengths.append(self.drafts)
                confidence = getattr(proposed, "confidence", None)
                result.confidences.append([] if confidence is None else confidence[sequence.slot].tolist())
            result.flags |= flags[row]
            sequence.emit(tokens[row][:count], scores[row], expected[row])
            # A row without a finite logit says that the model is broken for this request: what it emitted is no sample.
            sequence.done |= bool(flags[row] & Flag.NONFINITE_ROW)

    def _depths(self, layout: VerifyLayout) -> list[int]:
        """How far ahead of its anchor every request's furthest draft is."""
        return layout.draft_lens.tolist()

    def _logprobs(self, logits: Tensor, layout: VerifyLayout, acceptance: Acceptance) -> tuple[list, list]:
        """By request, of every emitted token: ln of its chance to be sampled (greedy: at temperature 1), and the mean of ln p under
        its law p."""
        counts = acceptance.num_emitted.tolist()
        rows, chosen, temperatures = [], [], []
        for row, (sequence, first) in enumerate(zip(self.sequences, layout.cu_num_logits.tolist(), strict=False)):
            rows += [first + own for own in self.path(acceptance, row)]
            chosen += acceptance.tokens[row, : counts[row]].tolist()
            temperatures += [sequence.request.temperature if sequence.request.temperature > 0 else 1.0] * counts[row]
        scale = torch.tensor(temperatures, dtype=torch.float64, device=logits.device)
        laws = torch.log_softmax(logits[rows].double() / scale[:, None], -1)
        scores = laws.gather(1, torch.tensor(chosen, device=logits.device)[:, None])[:, 0]
        expected = torch.special.entr(laws.exp()).sum(-1).neg()
        return [part.tolist() for part in scores.split(counts)], [part.tolist() for part in expected.split(counts)]

    def leave(self) -> list[_Sequence]:
        """Take the finished requests out of the batch and free their slots."""
        gone = [sequence for sequence in self.sequences if sequence.done]
        self.sequences = [sequence for sequence in self.sequences if not sequence.done]
        for sequence in gone:
            self.cache.crop(sequence.slot, 0)
            self.drafter.release(sequence.slot)
            self.free.append(sequence.slot)
        return gone


class _TreeBatch(_Batch):
    """The same with trees: node m of a request is its row m."""

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
            if sequence.prefill:  # a chain; that of more rows than a word has bits goes without words
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

    def commit(self, rows: Rows, output: Output, acceptance: Acceptance) -> None:
        self.cache.compact(rows, acceptance)
        super().commit(rows, output, acceptance)

    def _depths(self, layout: VerifyLayout) -> list[int]:
        starts = layout.query_start_loc.tolist()
        return [int(layout.positions[begin:end].max() - layout.positions[begin]) for begin, end in itertools.pairwise(starts)]
