"""Cases of schedule_prefixes and of the layouts for bench.kernels.

    bytes  what a layout reads once and writes once, as bench/shared/cases/case.py has it

Symbols: R requests, K drafts, M nodes of a tree. References: reference/schedule.py, reference/layout.py; all in integers, exactly.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import dspark_kernels as dk
from bench.shared.cases.case import DRAFTS, PAGE, VOCAB, Case, Target
from bench.shared.cases.checks import require
from reference import layout as layouts, schedule


def same_layout(op: str, have: dk.VerifyLayout, want: dk.VerifyLayout) -> None:
    for field in dataclasses.fields(want):
        expected, actual = getattr(want, field.name), getattr(have, field.name)
        if isinstance(expected, Tensor):
            require(actual.dtype == expected.dtype and torch.equal(actual, expected), f"{op}: {field.name} differs")
        else:
            require(actual == expected, f"{op}: {field.name} differs")


def _row_bytes(requests: int, rows: int) -> int:
    """A layout with paged slots: per row id, position, owner, slot and logit row written; per request length, starts, flags
    written, anchor and position read; the first page of each."""
    return rows * (8 + 8 + 4 + 8 + 4) + 4 + requests * (4 + 4 + 8 + 8 + 4) + 2 * 4 * (requests + 1)


def paged(g: torch.Generator, requests: int, longest: int = 4096) -> dict:
    """Positions below `longest`, and a table of pages for them and the rows behind."""
    pages = -(-(longest + 128) // PAGE)
    tables = torch.randint(0, 10**6, (requests, pages), generator=g).int()
    positions = torch.randint(0, longest, (requests,), generator=g)
    return dict(anchor_positions=positions, block_tables=tables, page_size=PAGE)


def _block(g: torch.Generator, requests: int, drafts: int, confidence: bool) -> dk.DraftBlock:
    tokens = torch.randint(0, VOCAB, (requests, drafts), generator=g)
    survives = torch.rand(requests, drafts, generator=g) ** 0.4 if confidence else None
    return dk.DraftBlock(tokens, dk.OneHotProposal(), torch.zeros(requests, dtype=torch.int32), survives)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """policy "causal", "budget" (a given one) or "stale" (the best under older confidences)."""

    requests: int
    policy: str
    drafts: int = DRAFTS

    op = "schedule_prefixes"

    @property
    def rows(self) -> int:
        return self.requests * (self.drafts + 1)

    @property
    def bytes(self) -> int:
        count = _row_bytes(self.requests, self.rows) + self.requests * self.drafts * (8 + 4)
        if self.policy == "stale":
            count += 4 * self.requests * self.drafts
        return count + (4 if self.policy == "budget" else 4 * (self.rows + 1) + 4)  # a budget, or the costs of every size

    @property
    def flops(self) -> int:
        return self.requests * self.drafts * (2 if self.policy == "stale" else 1)  # survivals

    @property
    def instructions(self) -> int:
        return 0

    def small(self) -> Schedule:
        return dataclasses.replace(self, requests=min(self.requests, 13), drafts=min(self.drafts, 5))

    def make(self, seed: int) -> dict:
        g = torch.Generator().manual_seed(seed)
        # Costs rise slowly enough that most drafts pay and steeply enough that the unlikely ones do not.
        steps = 2e-3 + 2e-3 / self.rows * torch.arange(self.rows + 1.0)
        given = dict(
            block=_block(g, self.requests, self.drafts, True),
            cost=None if self.policy == "budget" else dk.CostTable(steps, torch.full((self.requests + 1,), 5e-4)),
            anchors=torch.randint(0, VOCAB, (self.requests,), generator=g),
            policy="causal" if self.policy == "causal" else "budget",
        )
        if self.policy == "budget":
            given["budget"] = torch.tensor([self.requests * self.drafts // 2], dtype=torch.int32)
        elif self.policy == "stale":
            given["stale_confidence"] = torch.rand(self.requests, self.drafts, generator=g) ** 0.4
        return given | paged(g, self.requests)

    def workspace(self, device) -> dk.Workspace:
        return dk.Workspace(self.requests, self.drafts, 1, device)

    def run(self, inputs: dict) -> tuple[dk.VerifyLayout, None]:
        return dk.schedule_prefixes(**inputs), None

    def compare(self, inputs: dict, result: dk.VerifyLayout, _) -> None:
        same_layout(self.op, result, schedule.schedule_prefixes(**inputs))


class _Layout:
    """What the three layouts share. Frozen dataclasses below."""

    flops = instructions = 0

    def workspace(self, device) -> None:
        return None  # they need none

    def run(self, inputs: dict) -> tuple[dk.VerifyLayout, None]:
        return getattr(dk, self.op)(**inputs), None

    def compare(self, inputs: dict, result: dk.VerifyLayout, _) -> None:
        same_layout(self.op, result, getattr(layouts, self.op)(**inputs))


@dataclasses.dataclass(frozen=True)
class Fixed(_Layout):
    """Given lengths."""

    requests: int
    drafts: int = DRAFTS

    op = "fixed_layout"

    @property
    def bytes(self) -> int:
        return _row_bytes(self.requests, self.requests * (self.drafts + 1)) + self.requests * (8 * self.drafts + 4)

    def small(self) -> Fixed:
        return dataclasses.replace(self, requests=min(self.requests, 13))

    def make(self, seed: int) -> dict:
        g = torch.Generator().manual_seed(seed)
        return dict(
            block=_block(g, self.requests, self.drafts, False),
            draft_lens=torch.randint(0, self.drafts + 1, (self.requests,), generator=g).int(),
            anchors=torch.randint(0, VOCAB, (self.requests,), generator=g),
        ) | paged(g, self.requests)


@dataclasses.dataclass(frozen=True)
class Tree(_Layout):
    """Random trees of M nodes."""

    requests: int
    nodes: int = 32

    op = "tree_layout"

    @property
    def bytes(self) -> int:
        """The anchors are among the nodes here; each node has a depth."""
        rows = self.requests * self.nodes
        return _row_bytes(self.requests, rows) + 8 * (rows - self.requests) + 4 * rows + 4 * self.requests

    def small(self) -> Tree:
        return dataclasses.replace(self, requests=min(self.requests, 5), nodes=9)

    def make(self, seed: int) -> dict:
        g = torch.Generator().manual_seed(seed)
        shape = (self.requests, self.nodes)
        parents = torch.full(shape, -1)
        depths = torch.zeros(shape, dtype=torch.long)
        words = torch.ones(shape, dtype=torch.long)
        each = torch.arange(self.requests)
        for node in range(1, self.nodes):
            parents[:, node] = torch.randint(max(0, node - 5), node, (self.requests,), generator=g)
            depths[:, node] = depths[each, parents[:, node]] + 1
            words[:, node] = words[each, parents[:, node]] | 1 << node
        links = torch.full(shape, -1, dtype=torch.int32)  # children are not read by a layout
        tree = dk.DraftTree(
            torch.randint(0, VOCAB, shape, generator=g), parents.int(), depths.int(), links, links.clone(), words,
            torch.randint(1, self.nodes + 1, (self.requests,), generator=g).int(), dk.OneHotProposal(), "one_hot",
            torch.zeros(self.requests, dtype=torch.int32),
        )  # fmt: skip
        return dict(tree=tree) | paged(g, self.requests)


@dataclasses.dataclass(frozen=True)
class DraftRows(_Layout):
    """The drafter's own block, anchor first."""

    requests: int
    drafts: int = DRAFTS

    op = "draft_layout"

    @property
    def bytes(self) -> int:
        return _row_bytes(self.requests, self.requests * self.drafts)

    def small(self) -> DraftRows:
        return dataclasses.replace(self, requests=min(self.requests, 13))

    def make(self, seed: int) -> dict:
        g = torch.Generator().manual_seed(seed)
        anchors = torch.randint(0, VOCAB, (self.requests,), generator=g)
        return dict(anchors=anchors, block_size=self.drafts, mask_token_id=VOCAB - 1) | paged(g, self.requests)


def scheduling() -> list[Case]:
    found = []
    for policy in ("causal", "budget", "stale"):
        for requests, drafts in ((1, DRAFTS), (64, DRAFTS), (256, DRAFTS), (1024, 16)):
            name = f"{policy}_r{requests}" + ("" if drafts == DRAFTS else f"_k{drafts}")
            target = Target(microseconds=10) if (requests, drafts) == (256, DRAFTS) else None
            found.append(Case("schedule_prefixes", name, Schedule(requests, policy, drafts), target))
    return found


def registry() -> list[Case]:
    return [
        Case("fixed_layout", "r64", Fixed(64)),
        Case("fixed_layout", "r256", Fixed(256)),
        Case("tree_layout", "r64", Tree(64)),
        Case("draft_layout", "r64", DraftRows(64)),
        Case("draft_layout", "r256", DraftRows(256)),
    ]
