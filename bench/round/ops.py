"""The ops of a round on random inputs: alone, all together, and into memory that is given.

draft_block -> schedule_prefixes -> plan_attention -> tree_attention (L layers) -> accept_chain
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import dspark_kernels as dk
from bench.shared import timing
from bench.shared.cases.accept import Accept
from bench.shared.cases.attention import Attention
from bench.shared.cases.case import PAGE
from bench.shared.cases.checks import require
from bench.shared.cases.draft import Draft
from bench.shared.cases.layout import Schedule
from bench.shared.cases.tensors import mapped, poison, same as equal
from bench.shared.measure import Bench
from bench.shared.parity import CheckedOps
from bench.shared.round_ops import GRAPH, OPS


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a round: Qwen3-4B with its published drafter."""

    requests: int
    context: int = 2048
    layers: int = 36
    drafts: int = 7
    vocab: int = 151936
    rank: int = 256
    hidden: int = 2560
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def rows(self) -> int:
        return self.requests * (self.drafts + 1)

    def small(self) -> Sizes:
        few = dict(requests=min(self.requests, 3), context=min(self.context, 40), layers=min(self.layers, 2), drafts=3)
        return dataclasses.replace(self, **few, vocab=700, rank=16, hidden=24, query_heads=4, kv_heads=2, head_dim=32)

    def bytes(self) -> dict[str, int]:
        """op -> what must move once, all layers together; counted by the cases of bench.kernels, with all drafts verified."""
        model = dict(drafts=self.drafts, vocab=self.vocab)
        heads = dict(query_heads=self.query_heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        layer = Attention(self.requests, self.context, self.drafts + 1, **heads).bytes
        return {
            "draft_block": Draft(self.requests, rank=self.rank, hidden=self.hidden, **model).bytes,
            "schedule_prefixes": Schedule(self.requests, "causal", self.drafts).bytes,
            "plan_attention": 4 * (2 * self.requests + 1),  # starts of rows and lengths; the table is short
            "tree_attention": self.layers * layer,
            "accept_chain": Accept(self.requests, **model).bytes,
        }

    def launches(self, op: str) -> int:
        return self.layers if op == "tree_attention" else 1


@dataclasses.dataclass(frozen=True)
class Given:
    """Inputs. caches: of layers, in turn. next_anchors, next_positions: copies that acceptance moves on."""

    base_logits: Tensor
    anchors: Tensor
    positions: Tensor
    head: dk.MarkovHead
    hidden: Tensor
    confidence: dk.ConfidenceHead
    sampling: dk.SamplingTensors
    cost: dk.CostTable
    caches: list[dk.PagedKV]
    q: Tensor
    k_new: Tensor
    v_new: Tensor
    target_logits: Tensor
    next_anchors: Tensor
    next_positions: Tensor
    slots: Tensor

    def again(self) -> None:
        """Acceptance starts from the same anchors."""
        self.next_anchors.copy_(self.anchors)
        self.next_positions.copy_(self.positions)


def make(sizes: Sizes, device, l2_bytes: int = 0, seed: int = 0) -> Given:
    """Random inputs in bf16, made on the device."""
    g = torch.Generator(device).manual_seed(seed)
    requests, drafts, vocab = sizes.requests, sizes.drafts, sizes.vocab

    def normal(*shape, scale=1.0, dtype=torch.bfloat16):
        return torch.randn(*shape, generator=g, device=device, dtype=torch.float32).mul_(scale).to(dtype)

    pages = -(-(sizes.context + drafts + 1) // PAGE)
    cache = (requests * pages, PAGE, sizes.kv_heads, sizes.head_dim)
    tables = torch.randperm(requests * pages, generator=g, device=device).int().view(requests, pages)
    lengths = torch.full((requests,), sizes.context, device=device)
    cached = 2 * 2 * requests * pages * PAGE * sizes.kv_heads * sizes.head_dim
    count = min(sizes.layers, max(1, -(-timing.FLUSH * l2_bytes // cached)))
    # Costs rise so that most drafts pay and unlikely ones do not.
    seconds = 2e-3 + 2e-3 / sizes.rows * torch.arange(sizes.rows + 1.0, device=device)
    anchors = torch.randint(0, vocab, (requests,), generator=g, device=device)
    return Given(
        base_logits=normal(requests, drafts, vocab, scale=2.0),
        anchors=anchors,
        positions=lengths,
        head=dk.MarkovHead(normal(vocab, sizes.rank), normal(vocab, sizes.rank, scale=sizes.rank**-0.5)),
        hidden=normal(requests, drafts, sizes.hidden),
        confidence=dk.ConfidenceHead(normal(sizes.hidden + sizes.rank, scale=(sizes.hidden + sizes.rank) ** -0.5), normal(1) + 1.5),
        sampling=dk.SamplingTensors(
            torch.ones(requests, device=device), torch.randint(0, 2**62, (requests,), generator=g, device=device)
        ),
        cost=dk.CostTable(seconds, torch.full((requests + 1,), 5e-4, device=device)),
        caches=[dk.PagedKV(normal(*cache), normal(*cache), tables, lengths) for _ in range(count)],
        q=normal(sizes.rows, sizes.query_heads, sizes.head_dim),
        k_new=normal(sizes.rows, sizes.kv_heads, sizes.head_dim),
        v_new=normal(sizes.rows, sizes.kv_heads, sizes.head_dim),
        target_logits=normal(sizes.rows, vocab, scale=2.0),
        next_anchors=anchors.clone(),
        next_positions=lengths.clone(),
        slots=torch.arange(requests, dtype=torch.int32, device=device),
    )


class Round:
    """The ops of a round, each a method without arguments that leaves its result in `results`.

    into: results of another round to write to, None = new ones every time.
    """

    def __init__(self, ops, sizes: Sizes, given: Given, into: dict | None = None, workspace: dk.Workspace | None = None):
        self._ops, self._sizes, self._given, self._into, self._workspace = ops, sizes, given, into, workspace
        self.results: dict = {}

    def __call__(self) -> None:
        for op in OPS:
            getattr(self, op)()

    def _out(self, name: str) -> dict:
        return {} if self._into is None else dict(out=self._into[name], workspace=self._workspace)

    def draft_block(self) -> None:
        g = self._given
        self.results["draft_block"] = self._ops.draft_block(
            g.base_logits, g.anchors, g.head, anchor_positions=g.positions, sampling=g.sampling, hidden=g.hidden,
            confidence=g.confidence, state_indices=g.slots, **self._out("draft_block"),
        )  # fmt: skip

    def schedule_prefixes(self) -> None:
        g = self._given
        self.results["schedule_prefixes"] = self._ops.schedule_prefixes(
            self.results["draft_block"], g.cost, anchors=g.anchors, anchor_positions=g.positions,
            block_tables=g.caches[0].block_tables, page_size=PAGE, state_indices=g.slots, **self._out("schedule_prefixes"),
        )  # fmt: skip

    def plan_attention(self) -> None:
        g = self._given
        self.results["plan_attention"] = self._ops.plan_attention(
            self.results["schedule_prefixes"], g.caches[0], query_heads=self._sizes.query_heads, state_indices=g.slots,
            **self._out("plan_attention"),
        )  # fmt: skip

    def tree_attention(self) -> None:
        g = self._given
        for layer in range(self._sizes.layers):
            self.results["tree_attention"] = self._ops.tree_attention(
                g.q, g.caches[layer % len(g.caches)], self.results["schedule_prefixes"], k_new=g.k_new, v_new=g.v_new,
                plan=self.results["plan_attention"], state_indices=g.slots, **self._out("tree_attention"),
            )  # fmt: skip

    def accept_chain(self) -> None:
        g = self._given
        self.results["accept_chain"] = self._ops.accept_chain(
            g.target_logits, self.results["schedule_prefixes"], self.results["draft_block"].proposal, sampling=g.sampling,
            anchors=g.next_anchors, anchor_positions=g.next_positions, state_indices=g.slots, **self._out("accept_chain"),
        )  # fmt: skip


def workspace_of(sizes: Sizes, device) -> dk.Workspace:
    heads = dict(query_heads=sizes.query_heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim)
    return dk.Workspace(sizes.requests, sizes.drafts, sizes.vocab, device, **heads)


def into_memory(ops, sizes: Sizes, given: Given) -> tuple[Round, dict]:
    """(a round that writes to memory of its own and allocates nothing, what it must write)."""
    given.again()
    first = Round(ops, sizes, given)
    first()
    into = {name: mapped(result, torch.clone) for name, result in first.results.items()}
    poison(into)
    return Round(ops, sizes, given, into, workspace_of(sizes, given.anchors.device)), first.results


def same(round: Round, want: dict, call: Callable, given: Given) -> None:
    """Run once more. Raises AssertionError unless every result is the wanted one's, bit by bit."""
    given.again()
    call()
    for op in OPS:
        require(equal(round.results[op], want[op]), f"{op}: a round into given memory writes something else")


def check(sizes: Sizes, device, ops=None) -> int:
    """Comparisons made: every op of a round with the reference, then a round into given memory with that one, bit by bit."""
    given = make(sizes, device)
    checked = CheckedOps(ops or dk)
    Round(checked, sizes, given)()
    again, want = into_memory(ops or dk, sizes, given)
    same(again, want, again, given)
    return checked.calls


def measure(sizes: Sizes, bench: Bench) -> dict[str, timing.Timing]:
    """Every op alone and all of them in one graph, inputs cold. Raises AssertionError where results differ."""
    given = make(sizes, bench.device, bench.machine.l2_bytes)
    round, want = into_memory(dk, sizes, given)
    flush = timing.Flush(timing.FLUSH * bench.machine.l2_bytes, bench.device)
    with torch.no_grad():
        replay = bench.capture(round)
        poison(round.results)
        same(round, want, replay, given)
        taken = {}
        for op in (*OPS, GRAPH):
            call = replay if op == GRAPH else bench.capture(getattr(round, op))
            taken[op] = timing.measure([call], bench.clock, count=bench.samples, queued=True, before=flush)
    return taken
