"""Acceptance of draft trees in plain torch for many requests at once: what the suite is held against, and known-bad rules change.

    walk:      y ~ p_v; go to the first child whose token is y, else emit y
    recursive: try the children in order: accept c while u_c q_c(x) < p(x), else p <- norm [p - q_c]+; after the last one y ~ p
    traversal: P_root = 1, M_v = p_v; at a child P_c = min(1, P_v M_v(x) / q_c(x)), its subtree first; a node without a child
               left is accepted while u_v < h_v (h_v = P_v at first; the root is always), then y ~ M_v; else it is deleted and at
               its parent Z = sum [P M - q_c]+, M <- [P M - q_c]+ / Z, P <- h <- Z / (Z + 1 - P), 0/0 = 1
    greedy:    the walk with y = argmax p_v

Under each rule, rows of temperature 0 are greedy and deterministic trees are walked. `walk`, `recursive`, `traversal` and
`greedy` are tree acceptance functions as the suite takes them (see `suite.check`). Symbols: R requests, M nodes, V vocabulary, p
target distribution, q_c what child c was drawn from given its elder siblings, x its token, u acceptance uniforms. Everything is
fp64, every random word addressed by the request's seed, position, anchor position and node. Reference: reference/tree.py. Sources:
SpecInfer arXiv 2305.09781, Sequoia arXiv 2402.12374, traversal verification arXiv 2505.12398.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...types import Stream
from ..chain import rules as chain_rules
from ..chain.rules import at, probs_of, readable


class Noise(chain_rules.Noise):
    """The noise of a batch at tree nodes, [R, n] or broadcastable: word 3 of the counter is stream | node << 8."""

    def __init__(self, seeds: Tensor, anchor_positions: Tensor, nodes: Tensor | None = None) -> None:
        super().__init__(seeds, anchor_positions)
        self.nodes = torch.zeros_like(seeds)[:, None] if nodes is None else nodes

    def at(self, nodes: Tensor) -> Noise:
        """At one node of each request."""
        return type(self)(self.seeds, self.anchor_positions, nodes[:, None])

    def blocks(self, stream: Stream, positions: Tensor, groups: Tensor) -> list[Tensor]:
        return chain_rules.philox(
            self.seeds[:, None], [groups, positions, self.anchor_positions[:, None], int(stream) | self.nodes << 8]
        )

    def node_uniforms(self, depths: Tensor) -> Tensor:
        """[R, M], the acceptance uniform of every node."""
        nodes = torch.arange(depths.shape[1], device=depths.device)[None]
        here = type(self)(self.seeds, self.anchor_positions, nodes)
        return self.uniform(here.blocks(Stream.ACCEPT, self.anchor_positions[:, None] + depths, torch.zeros_like(depths))[0])


def depths_of(parents: Tensor) -> Tensor:
    """Depth of every node [R, M] from its parent, parents before children; 0 without a parent."""
    depths = torch.zeros_like(parents)
    for node in range(1, parents.shape[1]):
        parent = parents[:, node]
        depths[:, node] = torch.where(parent >= 0, at(depths, parent.clamp(min=0)) + 1, 0)
    return depths


@dataclasses.dataclass
class Trees:
    """What a rule sees, by node: probabilities target [R, M, V] and draft [R, M, Vd] (row m: of m's first child), the rest [R, M].

    parents: -1 for the root, and for nodes that cannot be reached.
    """

    target: Tensor
    draft: Tensor
    tokens: Tensor
    parents: Tensor
    depths: Tensor
    drawn: str
    noise: Noise

    @functools.cached_property
    def uniforms(self) -> Tensor:
        return self.noise.node_uniforms(self.depths)

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[1]

    def pick(self, probs: Tensor, tokens: Tensor) -> Tensor:
        """probs [R, n] at tokens [R]; 0 where they are none of its ids."""
        inside = (tokens >= 0) & (tokens < probs.shape[1])
        return torch.where(inside, probs.gather(1, torch.where(inside, tokens, 0)[:, None])[:, 0], 0.0)

    def next_probs(self, proposed: Tensor, tokens: Tensor) -> Tensor:
        """The distribution [R, Vd] of the next sibling, after one with these tokens [R]."""
        if self.drawn == "iid":
            return proposed
        ids = torch.arange(proposed.shape[1], device=tokens.device)
        rest = torch.where(ids == tokens[:, None], 0.0, proposed)
        total = rest.sum(1, keepdim=True)
        return torch.where(total > 0, rest / torch.where(total > 0, total, 1.0), rest)

    def residual(self, target_probs: Tensor, proposed: Tensor) -> Tensor:
        """[target_probs - proposed]+ over the target's ids."""
        width = target_probs.shape[1]
        told = torch.nn.functional.pad(proposed, (0, max(0, width - proposed.shape[1])))[:, :width]
        return (target_probs - told).clamp(min=0)

    def draw(self, node: Tensor, weights: Tensor) -> Tensor:
        """A token [R] after a node [R], in proportion to weights [R, V]; from the target distribution where nothing is left."""
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, at(self.target, node))
        position = self.noise.anchor_positions + at(self.depths, node) + 1
        return self.noise.at(node).draw(position, weights)


def normalised(weights: Tensor) -> Tensor:
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), weights)


def follow(trees: Trees, says: Tensor) -> tuple[Tensor, Tensor]:
    """Go down from the root while a child's token is what its parent says [R, M]: (last node [R], what it says)."""
    node = torch.zeros_like(says[:, 0])
    for child in range(1, trees.num_nodes):
        goes = (trees.parents[:, child] == node) & (trees.tokens[:, child] == at(says, node))
        node = torch.where(goes, child, node)
    return node, at(says, node)


def walk_rule(trees: Trees) -> tuple[Tensor, Tensor]:
    """(last node of the accepted path [R], token [R])."""
    here = torch.zeros_like(trees.tokens[:, 0])
    says = [trees.draw(here + node, trees.target[:, node]) for node in range(trees.num_nodes)]
    return follow(trees, torch.stack(says, 1))


class Recursive:
    """Where child after child is tried: per request its node, what is left of the target distribution there, the next child's q."""

    def __init__(self, trees: Trees) -> None:
        self.trees, self.node = trees, torch.zeros_like(trees.tokens[:, 0])
        self.target_probs, self.proposed = trees.target[:, 0], trees.draft[:, 0]

    def against(self) -> Tensor:
        """The distribution [R, V] that the next child is verified against."""
        return self.target_probs

    def rest(self) -> Tensor:
        """What a rejected child leaves of the target distribution, [R, V]."""
        return normalised(self.trees.residual(self.target_probs, self.proposed))

    def attempt(self, child: int, tried: Tensor) -> None:
        """Verify one child in the requests where it is `tried` [R]: go to it, or take out what it was drawn from."""
        trees, tokens = self.trees, self.trees.tokens[:, child]
        target, draft = trees.pick(self.against(), tokens), trees.pick(self.proposed, tokens)
        passes = tried & (draft > 0) & (trees.uniforms[:, child] * draft < target)
        fails = (tried & ~passes)[:, None]
        rest = torch.where(fails, self.rest(), self.target_probs)
        proposed = torch.where(fails, trees.next_probs(self.proposed, tokens), self.proposed)
        self.target_probs = torch.where(passes[:, None], trees.target[:, child], rest)
        self.proposed = torch.where(passes[:, None], trees.draft[:, child], proposed)
        self.node = torch.where(passes, child, self.node)

    def run(self) -> tuple[Tensor, Tensor]:
        for child in range(1, self.trees.num_nodes):
            self.attempt(child, self.trees.parents[:, child] == self.node)
        return self.node, self.trees.draw(self.node, self.target_probs)


def recursive_rule(trees: Trees) -> tuple[Tensor, Tensor]:
    return Recursive(trees).run()


class Traversal:
    """Where depth-first verification stands: per node P, h as a fraction, M, the next child's q; per request the node it is at."""

    def __init__(self, trees: Trees) -> None:
        self.trees = trees
        self.target_probs, self.proposed = trees.target.clone(), trees.draft.clone()
        self.prefix_prob = torch.ones_like(trees.tokens, dtype=torch.float64)
        self.above, self.below = torch.ones_like(self.prefix_prob), torch.ones_like(self.prefix_prob)
        self.open = trees.parents >= 0
        self.node = torch.zeros_like(trees.tokens[:, 0])
        self.rows = torch.arange(len(self.node), device=self.node.device)

    def at(self, rows: Tensor, node: Tensor) -> Tensor:
        return rows[self.rows, node]

    def set(self, rows: Tensor, node: Tensor, where: Tensor, values: Tensor) -> None:
        old = rows[self.rows, node]
        rows[self.rows, node] = torch.where(where if old.dim() == 1 else where[:, None], values, old)

    def step(self, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Go to the first child that is left: (whether there is none, and the node is tested, [R]; numerator, denominator of h)."""
        children = self.open & (self.trees.parents == self.node[:, None])
        down = live & children.any(1)
        child = torch.where(down, children.long().argmax(1), 0)
        self.enter(child, down)
        tested = live & ~down
        self.node = torch.where(down, child, self.node)
        return tested, self.at(self.above, self.node), self.at(self.below, self.node)

    def enter(self, child: Tensor, where: Tensor) -> None:
        tokens = self.at(self.trees.tokens, child)
        target = self.at(self.prefix_prob, self.node) * self.trees.pick(self.at(self.target_probs, self.node), tokens)
        draft = self.trees.pick(self.at(self.proposed, self.node), tokens)
        prefix_prob = torch.where(draft > 0, target / torch.where(draft > 0, draft, 1.0), 0.0).clamp(max=1.0)
        self.set(self.prefix_prob, child, where, prefix_prob)
        self.set(self.above, child, where, prefix_prob)

    def delete(self, where: Tensor) -> None:
        """The node is rejected where asked: its parent's residual takes its place."""
        node = self.node
        parent = torch.where(where, self.at(self.trees.parents, node), 0)
        self.set(self.open, node, where, torch.zeros_like(where))
        prefix_prob, proposed = self.at(self.prefix_prob, parent), self.at(self.proposed, parent)
        rest = self.trees.residual(prefix_prob[:, None] * self.at(self.target_probs, parent), proposed)
        total = rest.sum(1)
        whole = self.normaliser(total, prefix_prob, node)
        self.set(self.target_probs, parent, where, normalised(rest))
        self.set(self.proposed, parent, where, self.trees.next_probs(proposed, self.at(self.trees.tokens, node)))
        self.set(self.above, parent, where, total)
        self.set(self.below, parent, where, whole)
        self.set(
            self.prefix_prob, parent, where, torch.where(whole > 0, total / torch.where(whole > 0, whole, 1.0), 1.0).clamp(max=1.0)
        )
        self.node = torch.where(where, self.back(parent), node)

    def normaliser(self, total: Tensor, prefix_prob: Tensor, node: Tensor) -> Tensor:
        return total + 1.0 - prefix_prob

    def back(self, parent: Tensor) -> Tensor:
        return parent

    def run(self) -> tuple[Tensor, Tensor]:
        live = torch.ones_like(self.node, dtype=torch.bool)
        while bool(live.any()):
            tested, above, below = self.step(live)
            passes = tested & ((self.node == 0) | (below <= 0) | (self.at(self.trees.uniforms, self.node) * below < above))
            self.delete(tested & ~passes)
            live = live & ~passes
        return self.node, self.trees.draw(self.node, self.at(self.target_probs, self.node))


def traversal_rule(trees: Trees) -> tuple[Tensor, Tensor]:
    return Traversal(trees).run()


def accept(
    rule: Callable[[Trees], tuple[Tensor, Tensor]] | None,
    node_logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None,
    drawn: str,
    temperature: Tensor,
    seeds: Tensor,
    num_nodes: Tensor,
    anchor_positions: Tensor,
    noise: type[Noise] = Noise,
    trees: type[Trees] = Trees,
) -> Tensor:
    """Tokens [R, M] of rule(trees) for sampled rows of sampled trees, of the walk for the other sampled rows, else greedy."""
    rows, index = readable(node_logits), torch.arange(tokens.shape[1], device=tokens.device)
    # Nothing behind a row without a finite logit is looked at; its lowest id is emitted.
    dead = ~rows.isfinite().any(-1)
    inside = (index < num_nodes[:, None]) & (parents >= 0) & (parents < index)
    inside &= ~dead.gather(1, torch.where(inside, parents.long(), 0))
    parents = torch.where(inside, parents.long(), -1)
    scale = torch.where(temperature > 0, temperature, 1.0)
    says = rows.argmax(-1)
    target = torch.where(dead[..., None], torch.nn.functional.one_hot(says, rows.shape[2]).double(), probs_of(rows, scale))
    draft = target if draft_logits is None else probs_of(readable(draft_logits), scale)
    batch = trees(target, draft, tokens, parents, depths_of(parents), drawn, noise(seeds, anchor_positions))
    last, token = follow(batch, says)
    if rule is not None:
        by_rule = (walk_rule if draft_logits is None or drawn == "one_hot" else rule)(batch)
        last, token = (torch.where(temperature > 0, a, b) for a, b in zip(by_rule, (last, token), strict=True))
    return emitted(batch, last, token)


def emitted(trees: Trees, last: Tensor, token: Tensor) -> Tensor:
    """The tokens of the path to `last` [R], the token, then -1: [R, M]."""
    out = torch.full_like(trees.tokens, -1)
    node = last
    rows = torch.arange(len(last), device=last.device)
    out[rows, at(trees.depths, last)] = token
    for _ in range(trees.num_nodes - 1):
        depth = at(trees.depths, node)
        out[rows, (depth - 1).clamp(min=0)] = torch.where(depth > 0, at(trees.tokens, node), at(out, (depth - 1).clamp(min=0)))
        node = torch.where(depth > 0, at(trees.parents, node), node)
    return out


def _named(rule: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    function.rule = rule  # type: ignore[attr-defined]  # a function takes attributes, which its type cannot say
    return function


walk = _named("walk", functools.partial(accept, walk_rule))
recursive = _named("recursive", functools.partial(accept, recursive_rule))
traversal = _named("traversal", functools.partial(accept, traversal_rule))
greedy = _named("greedy_tree", functools.partial(accept, None))
