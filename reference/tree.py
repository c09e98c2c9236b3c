"""Lossless acceptance of draft trees, in the words of their papers, over a source of coins and draws.

    walk       y ~ p_v; go to the first child whose token is y, else emit y. For trees made without chance, or any other.
    recursive  (SpecInfer, arXiv 2305.09781; without replacement Sequoia, arXiv 2402.12374): child j is accepted while
               u q_j(x) < p(x); else p <- norm [p - q_j]+ and the next child is tried; after the last child y ~ p.
    traversal  (arXiv 2505.12398): depth first, leaf to root, a node keeps (P_v, M_v), at first (P_root = 1, p_v);
               P_child = min(1, P_v M_v(x) / q_j(x)). A leaf is accepted while u < P, then y ~ M. A rejected child is deleted:
               Z = sum [P_v M_v - q_j]+, M_v <- [P_v M_v - q_j]+ / Z, P_v <- Z / (Z + 1 - P_v) (0/0 = 1).
    greedy     the walk with y = argmax p_v.

Symbols: p_v target law after node v (after temperature), q_j the law that child j was drawn from given its elder siblings (without
replacement: their tokens removed, renormalised), x a child's token, u coins in (0, 1), which compare strictly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.types import Acceptance, DenseProposal, DraftTree, Flag, OneHotProposal, SamplingTensors, VerifyLayout

from .accept import _draft_law as draft_law, law_of
from .decisions import Decisions
from .draft import inverse_temperature, read_logits
from .sources import PhiloxSource, Source


class Nodes(NamedTuple):
    """A tree: token of every node (node 0 = the anchor) and its children, elder siblings first."""

    tokens: Sequence[int]
    children: Sequence[Sequence[int]]


def nodes_of(tokens: Sequence[int], parents: Sequence[int]) -> Nodes:
    """parents[v] < v; the root's is -1."""
    children: list[list[int]] = [[] for _ in tokens]
    for node, parent in enumerate(parents[: len(tokens)]):
        if 0 <= parent < node:
            children[parent].append(node)
    return Nodes(tokens, children)


class TreeVerdict(NamedTuple):
    """The nodes of `path` (from the root, 0) stay, then `token`. bad_draft: a child of the last one could not be accepted."""

    path: tuple[int, ...]
    token: int
    empty_residual: bool = False
    bad_draft: bool = False


def _impossible(law: Tensor, draft_prob: Tensor, token: int) -> bool:
    return not 0 <= token < law.shape[0] or float(draft_prob[token]) <= 0


def _any_impossible(node: int, target_probs, draft_probs, tree: Nodes) -> bool:
    return any(_impossible(target_probs[node], draft_probs[child], tree.tokens[child]) for child in tree.children[node])


def walk_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Sample the target along the tree; which law the tree came from plays no part."""
    path = [0]
    while True:
        node = path[-1]
        token = source.draw(anchor_position + len(path), target_probs[node], node=node)
        following = next((child for child in tree.children[node] if tree.tokens[child] == token), None)
        if following is None:
            return TreeVerdict(tuple(path), token, bad_draft=_outside(node, target_probs[node].shape[0], tree))
        path.append(following)


def _outside(node: int, vocab: int, tree: Nodes) -> bool:
    """Whether a child's token is none of the vocabulary: no draw can lead there."""
    return any(not 0 <= tree.tokens[child] < vocab for child in tree.children[node])


def recursive_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Try the children of a node one after another against what the rejected ones leave of the target's law."""
    path = [0]
    while True:
        node, law = path[-1], target_probs[path[-1]]
        for child in tree.children[node]:
            token, proposed = tree.tokens[child], draft_probs[child]
            if not _impossible(law, proposed, token) and source.coin(
                anchor_position + len(path), float(proposed[token]), float(law[token]), node=child
            ):
                path.append(child)
                break
            residual = (law - proposed).clamp(min=0)
            mass = float(residual.sum())
            law = residual / mass if mass > 0 else residual
        else:
            empty = float(law.sum()) <= 0
            token = source.draw(anchor_position + len(path), target_probs[node] if empty else law, node=node)
            return TreeVerdict(tuple(path), token, empty, _any_impossible(node, target_probs, draft_probs, tree))


def traversal_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Test leaves, deepest first; a node becomes a leaf when all its children were rejected."""
    return _visit(0, 1.0, (0,), target_probs, draft_probs, tree, source, anchor_position)


def _visit(node, kept, path, target_probs, draft_probs, tree, source, anchor_position) -> TreeVerdict | None:
    """The verdict where the subtree of `node`, entered with P = kept, has an accepted node; None where it is rejected."""
    law = target_probs[node]
    numerator, denominator = kept, 1.0
    for child in tree.children[node]:
        token, proposed = tree.tokens[child], draft_probs[child]
        chance = 0.0
        if not _impossible(law, proposed, token):
            chance = min(1.0, kept * float(law[token]) / float(proposed[token]))
        verdict = _visit(child, chance, (*path, child), target_probs, draft_probs, tree, source, anchor_position)
        if verdict is not None:
            return verdict
        residual = (kept * law - proposed).clamp(min=0)
        numerator = float(residual.sum())
        denominator = numerator + 1.0 - kept
        law = residual / numerator if numerator > 0 else residual
        kept = numerator / denominator if denominator > 0 else 1.0
    depth = len(path) - 1
    sure = node == 0 or denominator <= 0  # nothing is left to go back to
    if not sure and not source.coin(anchor_position + depth, denominator, numerator, node=node):
        return None
    empty = float(law.sum()) <= 0
    token = source.draw(anchor_position + depth + 1, target_probs[node] if empty else law, node=node)
    return TreeVerdict(path, token, empty, _any_impossible(node, target_probs, draft_probs, tree))


def greedy_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Follow the target's most probable tokens."""
    path = [0]
    while True:
        law = target_probs[path[-1]]
        token = int(torch.argmax((law == law.max()).int()))
        following = next((child for child in tree.children[path[-1]] if tree.tokens[child] == token), None)
        if following is None:
            return TreeVerdict(tuple(path), token, bad_draft=_outside(path[-1], law.shape[0], tree))
        path.append(following)


RULES = {"walk": walk_rule, "recursive": recursive_rule, "traversal": traversal_rule, "greedy": greedy_rule}


def sibling_laws(law: Tensor, tokens: Sequence[int], drawn: str) -> list[Tensor]:
    """The law each of a node's children was drawn from, given its elder siblings; law [V]: that of the first."""
    found = []
    for token in tokens:
        if drawn == "one_hot":
            law = torch.zeros_like(law)
            if 0 <= token < law.shape[0]:
                law[token] = 1.0
        found.append(law)
        if drawn == "without_replacement" and 0 <= token < law.shape[0]:
            law = law.clone()
            law[token] = 0.0
            rest = float(law.sum())
            law = law / rest if rest > 0 else law
    return found
