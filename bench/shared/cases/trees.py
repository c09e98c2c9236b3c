"""Cases of draft trees for bench.kernels: draft_tree, accept_tree, compact_kv.

    bytes  what must move once: of drafting the base logits and the candidates' rows of W2, of acceptance the logits of all nodes
           and the distributions that children were drawn from, of compaction every moved slot, read and written

Trees of acceptance are combs (bench/shared/comb.py), filled up with first tokens; those of 8 nodes have the rows of accept_chain's
cases.

Symbols: R requests, M nodes, K drafts, C candidates. References: reference/tree_draft.py, reference/tree.py, reference/compact.py.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import dspark_kernels as dk
from bench.shared.baselines import BASELINES, Baseline
from bench.shared.cases.case import BF16, DRAFTS, HIDDEN, PAGE, RANK, SUM_EXP, VOCAB, Case
from bench.shared.cases.checks import by_request, require
from bench.shared.comb import comb
from reference import cases, compact, tree as trees, tree_draft
from reference.equality import assert_equal_or_tied

LINKS = ("tokens", "parents", "depths", "first_child", "next_sibling", "ancestors", "num_nodes", "flags")


def comb_parents(nodes: int) -> list[int]:
    """Parents of a comb's nodes, depth by depth, then of what is left of `nodes`: the anchor."""
    parents, ends = [-1], [0]
    for branching in comb(nodes, DRAFTS):
        above, ends = ends, []
        for parent in above:
            for _ in range(branching):
                ends.append(len(parents))
                parents.append(parent)
    return parents + [0] * (nodes - len(parents))


@dataclasses.dataclass(frozen=True)
class DraftTrees:
    """Conditioned trees on the C best base logits of each position; vanilla head."""

    requests: int
    nodes: int = 32
    candidates: int = 64
    drafts: int = DRAFTS
    vocab: int = VOCAB
    rank: int = RANK

    op = "draft_tree"
    instructions = 0  # nothing is drawn, and exponentials are those of candidates

    @property
    def bytes(self) -> int:
        """Rows of W2 once: the nodes of a depth share their candidates. A node that can have children has a row of W1."""
        positions, nodes = self.requests * self.drafts, self.requests * self.nodes
        count = BF16 * positions * self.vocab + BF16 * positions * self.candidates * self.rank + BF16 * nodes * self.rank
        count += self.requests * (8 + 8 + 4 + 8)  # anchor, position, temperature, seed
        return count + nodes * (8 + 4 * 4 + 8 + 4) + self.requests * (4 + 4)  # links and survival; num_nodes, flags

    @property
    def flops(self) -> int:
        """A comparison per base logit; bias and sum-exp of every node's candidates."""
        return self.requests * (self.drafts * self.vocab + self.nodes * self.candidates * (2 * self.rank + 1 + 4))

    def small(self) -> DraftTrees:
        return dataclasses.replace(self, requests=min(self.requests, 2), nodes=6, candidates=8, drafts=3, vocab=300, rank=16)

    def make(self, seed: int) -> dict:
        case = cases.draft_case(
            seed=seed,
            requests=self.requests,
            drafts=self.drafts,
            vocab=self.vocab,
            rank=self.rank,
            hidden_size=min(HIDDEN, self.rank),  # a vanilla head does not read it
            dtype=torch.bfloat16,
            temperatures=(1.0,),
            confidence=None,
        ).arguments()
        names = ("base_logits", "anchors", "head", "anchor_positions", "sampling")
        return {name: case[name] for name in names} | dict(num_nodes=self.nodes, candidates=self.candidates)

    def workspace(self, device) -> dk.Workspace:
        return dk.Workspace(self.requests, max(self.nodes - 1, self.drafts), self.vocab, device)

    def run(self, inputs: dict) -> tuple[dk.DraftTree, None]:
        return dk.draft_tree(**inputs), None

    def compare(self, inputs: dict, tree: dk.DraftTree, _) -> None:
        def outcome(tree):
            return by_request(*(getattr(tree, name) for name in LINKS))

        assert_equal_or_tied(lambda decisions: outcome(tree_draft.draft_tree(**inputs, decisions=decisions)), outcome(tree))


@dataclasses.dataclass(frozen=True)
class AcceptTrees:
    """Combs of M nodes. drawn "one_hot" with rule "walk", or "without_replacement" with "traversal"."""

    requests: int
    nodes: int = 32
    drawn: str = "one_hot"
    rule: str = "walk"
    sampled: bool = True
    vocab: int = VOCAB

    op = "accept_tree"

    @property
    def parents(self) -> list[int]:
        return comb_parents(self.nodes)

    @property
    def rows(self) -> int:
        return self.requests * self.nodes

    @property
    def bytes(self) -> int:
        """The target's logits once; of sampled trees the distributions of all nodes that have children."""
        count = BF16 * self.rows * self.vocab
        count += self.rows * (8 + 4 + 4 + 8 + 4 + 4 + 1)  # ids, logit rows, parents; tokens, path, sources, commit mask
        # Starts of rows and of logits, anchor's position; four counts and rows, next token, flags, anchor and position.
        count += 2 * 4 * (self.requests + 1) + self.requests * (8 + 4 * 4 + 8 + 4 + 8 + 8)
        if self.sampled:
            count += self.requests * (4 + 8)
            if self.drawn != "one_hot":
                count += BF16 * self.vocab * self.requests * (len(set(self.parents)) - 1)
        return count

    @property
    def flops(self) -> int:
        return (4 if self.sampled else 1) * self.rows * self.vocab

    @property
    def instructions(self) -> int:
        return SUM_EXP * self.rows * self.vocab if self.sampled else 0

    def small(self) -> AcceptTrees:
        return dataclasses.replace(self, requests=min(self.requests, 3), nodes=6, vocab=1100)

    def make(self, seed: int) -> dict:
        case = cases.accept_tree_case(
            seed=seed,
            requests=self.requests,
            nodes=self.nodes,
            parents=self.parents,
            vocab=self.vocab,
            drawn=self.drawn,
            rule=self.rule,
            dtype=torch.bfloat16,
            sampled=self.sampled,
            closeness=0.9,
            sharpness=2.0,
            temperatures=(1.0,),
        )
        slots = self.requests
        return case.arguments() | dict(anchors=torch.zeros(slots).long(), anchor_positions=torch.zeros(slots).long())

    def workspace(self, device) -> dk.Workspace:
        return dk.Workspace(self.requests, self.nodes - 1, self.vocab, device)

    def run(self, inputs: dict) -> tuple[dk.Acceptance, None]:
        return dk.accept_tree(**inputs), None

    def compare(self, inputs: dict, result: dk.Acceptance, _) -> None:
        """Everything a request can see; its anchor, moved on in place, too."""
        anchors, positions = inputs["anchors"], inputs["anchor_positions"]
        fixed = {name: value for name, value in inputs.items() if name not in ("anchors", "anchor_positions")}

        def outcome(result, anchors, positions):
            columns = (result.tokens, result.num_accepted, result.num_emitted, result.num_rejected, result.next_token)
            commit = result.commit_mask.view(self.requests, -1)
            return by_request(*columns, result.last_row, result.path, result.kv_source, result.flags, commit, anchors, positions)

        def reference(decisions):
            own = torch.zeros_like(anchors), torch.zeros_like(positions)
            want = trees.accept_tree(**fixed, anchors=own[0], anchor_positions=own[1], decisions=decisions)
            return outcome(want, *own)

        assert_equal_or_tied(reference, outcome(result, anchors, positions))


@dataclasses.dataclass(frozen=True)
class Compact:
    """`accepted` nodes of each request move; none of them lies where another goes, so that a repeated call finds them again."""

    requests: int
    nodes: int = 32
    accepted: int = 4
    layers: int = 36
    kv_heads: int = 8
    head_dim: int = 128

    op = "compact_kv"
    flops = instructions = 0

    @property
    def bytes(self) -> int:
        moved = self.requests * self.accepted
        slots = 2 * moved * self.layers * 2 * self.kv_heads * self.head_dim * BF16  # keys and values, read and written
        # A cache's address and strides; how many of each request; the path's rows, and the slots from where and to where.
        return slots + 6 * 8 * 2 * self.layers + 4 * self.requests + 4 * (self.requests + moved) + 2 * 8 * moved

    def small(self) -> Compact:
        return dataclasses.replace(self, requests=min(self.requests, 3), nodes=12, layers=2, kv_heads=2, head_dim=16)

    def make(self, seed: int) -> dict:
        """Requests own whole pages in any order; the anchor lies anywhere in the first of them."""
        g = torch.Generator().manual_seed(seed)
        pages = -(-(PAGE - 1 + self.nodes) // PAGE)
        tables = torch.randperm(self.requests * pages, generator=g).view(self.requests, pages)
        begins = torch.randint(0, PAGE, (self.requests,), generator=g)
        at = begins[:, None] + torch.arange(self.nodes)
        slots = tables.gather(1, at // PAGE) * PAGE + at % PAGE
        behind = torch.rand(self.requests, self.nodes - 1 - self.accepted, generator=g).argsort(1)[:, : self.accepted]
        path = torch.full((self.requests, self.nodes), -1)
        path[:, 0] = 0
        path[:, 1 : 1 + self.accepted] = behind.sort(1).values + 1 + self.accepted
        first = torch.arange(self.requests)[:, None] * self.nodes
        caches = torch.randn(
            2 * self.layers, self.requests * pages, PAGE, self.kv_heads, self.head_dim, generator=g, dtype=torch.bfloat16
        )
        return dict(
            caches=list(caches),
            slot_mapping=slots.flatten(),
            path=path.int(),
            kv_source=torch.where(path < 0, -1, path + first).int(),
            num_accepted=torch.full((self.requests,), self.accepted, dtype=torch.int32),
        )

    def prepare(self, inputs: dict) -> dict:
        """The op's arguments; addresses of the caches where they are now."""
        accepted, slots = inputs["num_accepted"], inputs["slot_mapping"]
        device, rows = slots.device, slots.shape[0]
        starts = torch.arange(0, rows + 1, self.nodes, dtype=torch.int32, device=device)
        order = torch.arange(rows, dtype=torch.int32, device=device)
        ids = torch.zeros(rows, dtype=torch.int64, device=device)
        layout = dk.VerifyLayout(
            torch.full_like(accepted, self.nodes - 1), starts, starts, ids, ids, order // self.nodes, order, starts[-1:].clone(),
            torch.zeros_like(accepted), slots, self.nodes - 1,
        )  # fmt: skip
        path = inputs["path"]
        acceptance = dk.Acceptance(
            torch.zeros_like(path, dtype=torch.int64), accepted, accepted + 1, self.nodes - 1 - accepted,
            torch.zeros_like(accepted, dtype=torch.int64), torch.zeros_like(accepted), ids == 0, torch.zeros_like(accepted),
            path=path, kv_source=inputs["kv_source"],
        )  # fmt: skip
        caches = inputs["caches"]
        layers = dk.KVLayers.of([tuple(caches[i : i + 2]) for i in range(0, len(caches), 2)])
        return dict(layers=layers, acceptance=acceptance, layout=layout)

    def workspace(self, device) -> None:
        return None  # it needs none

    def call(self, inputs: dict) -> None:
        dk.compact_kv(**inputs)

    def run(self, inputs: dict) -> tuple[list[Tensor], list[Tensor]]:
        """Nothing but what the caches held before: the op writes where it reads."""
        before = [cache.clone() for cache in inputs["layers"].caches]
        self.call(inputs)
        return [], before

    def compare(self, inputs: dict, _, before: list[Tensor]) -> None:
        compact.compact_kv(before, inputs["acceptance"], inputs["layout"])
        for index, (have, want) in enumerate(zip(inputs["layers"].caches, before, strict=True)):
            require(torch.equal(have.view(torch.int16), want.view(torch.int16)), f"compact_kv: cache {index} differs")


def moved(caches, sources, targets):
    """Slots of every cache by index. Which ones is given: plain PyTorch would have to ask the device how many."""
    for cache in caches:
        flat = cache.flatten(0, 1)
        flat[targets] = flat[sources]


def _moves(inputs: dict) -> tuple:
    kept, slots = inputs["acceptance"].kv_source, inputs["layout"].slot_mapping
    targets = kept[:, :1] + torch.arange(kept.shape[1], device=kept.device)
    used = kept[:, 1:] >= 0
    return inputs["layers"].caches, slots[kept[:, 1:][used].long()], slots[targets[:, 1:][used].long()]


BASELINES["compact_kv"] = Baseline(moved, _moves)


def registry() -> list[Case]:
    drawn = dict(drawn="without_replacement", rule="traversal")
    return [
        Case("draft_tree", "c64_r1", DraftTrees(1)),
        Case("draft_tree", "c64_r8", DraftTrees(8)),
        Case("draft_tree", "c64_r64", DraftTrees(64)),
        Case("accept_tree", "walk_m8_r64", AcceptTrees(64, 8)),
        Case("accept_tree", "walk_m32_r1", AcceptTrees(1)),
        Case("accept_tree", "walk_m32_r8", AcceptTrees(8)),
        Case("accept_tree", "greedy_m32_r1", AcceptTrees(1, sampled=False)),
        Case("accept_tree", "traversal_m8_r64", AcceptTrees(64, 8, **drawn)),
        Case("accept_tree", "traversal_m32_r1", AcceptTrees(1, **drawn)),
        Case("compact_kv", "r1", Compact(1)),
        Case("compact_kv", "r64", Compact(64)),
    ]
