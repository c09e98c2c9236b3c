"""Toy decoders that draft trees, for the exact enumeration of reference/enumeration.py.

    P(tokens) = sum, over the paths of choices that emit them, of the product of the choices' probabilities

A tree has a fixed shape; the children of a node are its drafter's most probable tokens (one_hot), independent draws (iid) or
draws without replacement, which are the best keys of one race. Symbols: V vocabulary; M nodes; a context is the tuple of tokens
so far, the anchor last. Source: as in tree.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .enumeration import Context, explore
from .tree import Nodes, TreeVerdict, nodes_of, sibling_distributions


class Tree(NamedTuple):
    """Drafted nodes and what verifies them: a target distribution per node, a draft distribution per node but the root (None)."""

    nodes: Nodes
    target_probs: list
    draft_probs: list


@dataclasses.dataclass(frozen=True)
class TreeDecoder:
    """Toy target and drafter, context -> fp64 [V] distribution of the next token, and how a round uses them.

    parents: of every node, -1 for the root. drawn: how the children of each node are chosen. rule: one of `tree.RULES`.
    """

    target: Callable[[Context], Tensor]
    draft: Callable[[Context], Tensor]
    rule: Callable[..., TreeVerdict]
    parents: tuple[int, ...]
    drawn: tuple[str, ...]
    length: None = None  # what `enumeration.emitted_distribution` reads of a decoder: every node is verified

    def propose(self, source, context: Context) -> Tree:
        children = nodes_of(self.parents, self.parents).children
        tokens, contexts = [context[-1]] + [-1] * (len(self.parents) - 1), {0: context}
        draft_probs: list = [None] * len(self.parents)
        for node, mine in enumerate(children):
            probs = self.draft(contexts[node])
            drawn = self.drawn[node]
            for number, child in enumerate(mine):
                position = len(contexts[node])
                if drawn == "one_hot":
                    tokens[child] = int(probs.argsort(descending=True, stable=True)[number])
                elif drawn == "iid":
                    tokens[child] = source.draft(position, probs.log(), node=child)
                else:
                    left = sibling_distributions(probs, [tokens[c] for c in mine[:number]] + [-1], drawn)[-1]
                    tokens[child] = source.draft(position, left.log(), node=node)
                contexts[child] = (*contexts[node], tokens[child])
            for child, given_elders in zip(mine, sibling_distributions(probs, [tokens[c] for c in mine], drawn), strict=True):
                draft_probs[child] = given_elders
        target_probs = [self.target(contexts[node]) for node in range(len(self.parents))]
        return Tree(Nodes(tokens, children), target_probs, draft_probs)

    def verify(self, source, context: Context) -> tuple[Tree, TreeVerdict]:
        tree = self.propose(source, context)
        return tree, self.rule(tree.target_probs, tree.draft_probs, tree.nodes, source, len(context) - 1)

    def play(self, source, context: Context, stale: tuple | None = None) -> tuple[Context, None]:
        """One round: (emitted tokens, no confidences)."""
        tree, verdict = self.verify(source, context)
        return (*(tree.nodes.tokens[node] for node in verdict.path[1:]), verdict.token), None

    def distribution(self, context: Context) -> Tensor:
        return self.target(context)

    def mean_accepted(self, prompt: Context, source: Callable) -> float:
        """Exact expectation of the accepted drafts of one round. source(anchor_position, known, path, memo)."""

        def make(path, memo):
            return source(len(prompt) - 1, None, path, memo)

        rounds = explore(lambda at: len(self.verify(at, prompt)[1].path) - 1, make)
        return float(sum(prob * accepted for prob, accepted in rounds))
