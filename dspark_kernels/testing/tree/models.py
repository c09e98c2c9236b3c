"""Rounds of toy decoders that draft trees, and what the tree rules accept of them, exactly.

    E[accepted] = sum over trees of their probability, times sum over d of P(the accepted path is d nodes long or longer)

A tree has one of a few shapes, which may depend on the request and the round but not on what the round draws; where `cut`, a node
has children only if the confidence of its own token says so. Children are independent draws (iid), the best keys of one race
(without_replacement) or the drafter's best tokens (one_hot). Symbols as for chains; M nodes, node 0 the last token. Reference:
reference/tree_enumeration.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...types import Stream
from ..chain import models as chain_models, rules as chain_rules
from ..chain.models import PROMPT, Model
from ..chain.rules import NEG_INF, at
from . import rules

NO_NOISE = rules.Noise(torch.zeros(0), torch.zeros(0))  # where all outcomes are gone through, nothing is drawn
Shape = tuple[int, ...]  # the parent of every node, -1 for the root


def draft(
    draft_logits: Tensor,
    elders: Tensor,
    drawn: str,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    anchor_positions: Tensor,
    parents: Tensor,
    nodes: Tensor,
) -> Tensor:
    """The next child [R] of nodes `parents` [R], which becomes node `nodes` [R], from their logits [R, V] by addressed noise.

    elders: [R, n], what its elder siblings are, -1 = nothing.
    """
    probs = chain_rules.probs_of(chain_rules.readable(draft_logits), temperature)
    keys = probs.log()
    if drawn == "without_replacement":
        # One race at the parent; the elder siblings hold its better keys.
        keys = _without(keys, elders)
    noise = rules.Noise(seeds, anchor_positions).at(nodes if drawn == "iid" else parents)
    return noise.race(Stream.DRAFT, positions, keys)


def _without(keys: Tensor, tokens: Tensor) -> Tensor:
    """Keys [R, V] with -inf at tokens [R, n]."""
    ids = torch.arange(keys.shape[1], device=keys.device)
    return torch.where((tokens[..., None] == ids).any(1), NEG_INF, keys)


@dataclasses.dataclass
class TreePlay(chain_models.Play):
    """How a function's requests decode with trees. kind: how children are made. shapes [n, M]: parents, -1 behind the nodes."""

    shapes: Tensor | None = None

    @classmethod
    def of(cls, call: Callable[..., Tensor], model: Model, shapes: tuple[Shape, ...], **options: Any) -> TreePlay:
        nodes = max(map(len, shapes))
        table = torch.tensor([[*shape, *[-1] * (nodes - len(shape))] for shape in shapes], device=model.target.device)
        given: dict[str, Any] = {"draft": draft, "kind": "iid"} | options
        return cls(call, model, nodes - 1, shapes=table, **given)

    def grow(self, last: Tensor, seeds: Tensor, anchor_positions: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, parents, whether the node is there), [R, M]."""
        assert self.shapes is not None  # see `of`
        parents = self.shapes[(seeds + anchor_positions) % len(self.shapes)]
        tokens = torch.full_like(parents, -1)
        tokens[:, 0] = last
        there = torch.zeros_like(parents, dtype=torch.bool)
        there[:, 0] = True
        depths = rules.depths_of(parents)
        for node in range(1, parents.shape[1]):
            parent = parents[:, node].clamp(min=0)
            context = self.context(at(tokens, parent))
            logits = self.model.draft[context].to(self.dtype)
            elders = torch.where(parents[:, :node] == parents[:, node, None], tokens[:, :node], -1)
            left = chain_rules.readable(logits) if self.kind == "iid" else _without(chain_rules.readable(logits), elders)
            fits = (parents[:, node] >= 0) & at(there, parent) & (left > NEG_INF).any(1)
            if self.cut:
                fits &= (parent == 0) | (self.model.confidence[context] >= 0.5)
            if self.kind == "one_hot":
                token = left.argmax(1)
            else:
                position = anchor_positions + at(depths, parent) + 1
                index = torch.full_like(parent, node)
                token = self.draft(
                    logits, elders, self.kind, temperature, seeds, position, anchor_positions, parent, index
                )  # fmt: skip
            tokens[:, node], there[:, node] = torch.where(fits, token, -1), fits
        return tokens, parents, there

    def context(self, tokens: Tensor) -> Tensor:
        """Rows of the tables; of tokens that the target does not have, any."""
        return torch.where((tokens >= 0) & (tokens < self.model.vocab), tokens, 0)

    def round(self, last: Tensor, seeds: Tensor, anchor_positions: Tensor) -> tuple[Tensor, Tensor]:
        """(emitted tokens [R, M] with -1 behind, how many [R]) after the last tokens [R]."""
        temperature = torch.full(last.shape, self.temperature, device=last.device)
        tokens, parents, there = self.grow(last, seeds, anchor_positions, temperature)
        # Nodes that are not there go to the end, where everything is something else.
        order = (~there).long().argsort(dim=1, stable=True)
        place = there.long().cumsum(1) - 1
        tokens = tokens.gather(1, order)
        parents = place.gather(1, parents.clamp(min=0)).gather(1, order)
        parents[:, 0] = -1
        count = there.sum(1)
        behind = torch.arange(tokens.shape[1], device=last.device) >= count[:, None]
        tokens = torch.where(behind, (tokens[:, :1] + 1) % self.model.vocab, tokens)
        parents = torch.where(behind, 0, parents)
        context = self.context(tokens)
        target, draft = self.model.target[context], self.model.draft[context]
        target = torch.where(behind[..., None], target.roll(1, 2), target)
        out = self.call(
            target.to(self.dtype),
            tokens,
            parents.to(torch.int32),
            None if self.kind == "one_hot" else draft.to(self.dtype),
            self.kind,
            temperature,
            seeds,
            count.to(torch.int32),
            anchor_positions,
        )
        return out, (out >= 0).sum(1)


# ---- what the rules accept


def mean_accepted(rule: str, model: Model, shape: Shape, drawn: str) -> tuple[float, float]:
    """Mean and standard deviation of the accepted nodes of a round after the prompt, exact: a sum over all trees."""
    trees, probability = _all_trees(model, shape, drawn)
    if rule == "traversal" and drawn != "one_hot":
        ends = _traversal_ends(trees)
    else:
        reached = (_walk_reaches if rule == "walk" or drawn == "one_hot" else _recursive_reaches)(trees, shape)
        children = torch.tensor(shape)
        ends = torch.stack([reached[:, v] - reached[:, children == v].sum(1) for v in range(len(shape))], 1)
    mean, square = (float((probability[:, None] * ends * trees.depths**power).sum()) for power in (1, 2))
    return mean, max(square - mean**2, 0.0) ** 0.5


def _all_trees(model: Model, shape: Shape, drawn: str) -> tuple[rules.Trees, Tensor]:
    """Every tree of the shape as a batch, and the probability of each."""
    nodes, device = len(shape), model.target.device
    draft_probs, target_probs = model.draft_probs(), model.target_probs()
    grids = torch.meshgrid(*[torch.arange(model.vocab)] * (nodes - 1), indexing="ij")
    tokens = torch.stack([torch.full_like(grids[0], PROMPT), *grids], -1).view(-1, nodes).to(device)
    parents = torch.tensor(shape, device=device).expand_as(tokens)
    trees = rules.Trees(
        target_probs[tokens], draft_probs[tokens], tokens, parents, rules.depths_of(parents), drawn, NO_NOISE
    )  # fmt: skip
    probability = torch.ones(len(tokens), dtype=torch.float64, device=device)
    for node in range(nodes):
        proposed = draft_probs[tokens[:, node]]
        for child in (c for c in range(1, nodes) if shape[c] == node):
            if drawn == "one_hot":
                probability = probability * (tokens[:, child] == proposed.argmax(1))
            else:
                probability = probability * trees.pick(proposed, tokens[:, child])
            proposed = trees.next_probs(proposed, tokens[:, child])
    possible = probability > 0
    rows = {name: getattr(trees, name)[possible] for name in ("target", "draft", "tokens", "parents", "depths")}
    return dataclasses.replace(trees, **rows), probability[possible]


def _walk_reaches(trees: rules.Trees, shape: Shape) -> Tensor:
    """Probability [trees, M] that a node is on the accepted path."""
    reached = torch.ones(trees.tokens.shape, dtype=torch.float64, device=trees.tokens.device)
    for child in range(1, len(shape)):
        parent, tokens = shape[child], trees.tokens[:, child]
        again = torch.zeros_like(tokens, dtype=torch.bool)
        for elder in (c for c in range(1, child) if shape[c] == parent):
            again |= trees.tokens[:, elder] == tokens
        reached[:, child] = torch.where(again, 0.0, reached[:, parent] * trees.pick(trees.target[:, parent], tokens))
    return reached


def _recursive_reaches(trees: rules.Trees, shape: Shape) -> Tensor:
    reached = torch.ones(trees.tokens.shape, dtype=torch.float64, device=trees.tokens.device)
    for node in range(len(shape)):
        left, probs, proposed = reached[:, node].clone(), trees.target[:, node], trees.draft[:, node]
        for child in (c for c in range(1, len(shape)) if shape[c] == node):
            tokens = trees.tokens[:, child]
            draft_prob = trees.pick(proposed, tokens)
            probability = (trees.pick(probs, tokens) / torch.where(draft_prob > 0, draft_prob, 1.0)).clamp(max=1.0)
            reached[:, child] = left * probability
            left = left * (1 - probability)
            probs = rules.normalised(trees.residual(probs, proposed))
            proposed = trees.next_probs(proposed, tokens)
    return reached


def _traversal_ends(trees: rules.Trees) -> Tensor:
    """Probability [trees, M] that a node ends the accepted path: the order of tests does not depend on the uniforms."""
    state = rules.Traversal(trees)
    ends = torch.zeros_like(state.prefix_prob)
    left = torch.ones_like(ends[:, 0])
    live = torch.ones_like(left, dtype=torch.bool)
    while bool(live.any()):
        tested, above, below = state.step(live)
        sure = (state.node == 0) | (below <= 0)
        probability = torch.where(sure, 1.0, above / torch.where(below > 0, below, 1.0)).clamp(max=1.0)
        ends[state.rows, state.node] += torch.where(tested, left * probability, 0.0)
        left = torch.where(tested, left * (1 - probability), left)
        live = live & ~(tested & (left <= 0))
        state.delete(tested & live)
    return ends


def block_probs(model: Model, num_drafts: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Probabilities of what a round of block verification emits after the prompt, and what that is: accepted drafts and a token."""
    target_probs, draft_probs = model.target_probs(), model.draft_probs()
    grids = torch.meshgrid(*[torch.arange(model.vocab)] * num_drafts, indexing="ij")
    drafts = torch.stack(grids, -1).view(-1, num_drafts)
    contexts = torch.nn.functional.pad(drafts, (1, 0), value=PROMPT)
    lens = torch.full((len(drafts),), num_drafts)
    batch = chain_rules.Batch(target_probs[contexts], draft_probs[contexts[:, :-1]], drafts, lens, NO_NOISE)
    probability = batch.drafted_probs()[1].prod(1)
    prefix_probs, passes = chain_rules.block_terms(batch)
    found: dict[tuple[int, ...], float] = {}
    left = torch.ones_like(probability)
    for length in range(num_drafts, -1, -1):  # the longest prefix that passes its test
        ends = left * passes[:, length - 1] if length else left
        left = left - ends
        accepted = torch.full_like(lens, length)
        weights = batch.target[:, -1] if length == num_drafts else batch.residual(accepted, prefix_probs[:, length])
        for row, probs in enumerate(rules.normalised(weights) * (probability * ends)[:, None]):
            for token, part in enumerate(probs.tolist()):
                outcome = (*drafts[row, :length].tolist(), token)
                found[outcome] = found.get(outcome, 0.0) + part
    return torch.tensor(list(found.values()), dtype=torch.float64), list(found)
