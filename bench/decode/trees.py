"""The draft trees of bench.decode: what shape each drafter's have, and the chain that verifies as many rows.

    walk       nodes chosen deterministically: "conditioned" for a sequential head, "best_first" for independent positions, and for
               a drafter with a pass per depth `comb`, its best tokens
    sampled    nodes drawn without replacement, in the shape of `comb`; rule "traversal"; the same as greedy

    comb of width w: the w best (or drawn) first tokens and a chain after each, of (M - 1) / w drafts

A tree of M nodes verifies as many rows as a chain of M - 1 drafts; a block drafter's chain ends with its K drafts. Combs and their
widths: bench/shared/comb.py. Source of the methods: reference/tree_draft.py.
"""

from __future__ import annotations

import copy

from bench.shared.comb import comb
from reference.drafters import Block, Drafter, DSpark, TreeShape
from reference.drafters.chained import Chained

SUFFIX = "-tree"  # of a system that decodes with trees
NODES = {"mtp-tree": (16,), "eagle3-tree": (16,), "block-tree": (16,), "dspark-tree": (16, 32)}
SAMPLED_NODES = {"mtp": 16, "dspark": 16}  # at most, where --tree-nodes does not say: the reference draws slowly
MAX_NODES = 64


def shapes(drafter: Drafter, num_nodes: int) -> list[TreeShape]:
    """The trees of a drafter: deterministic ones and sampled ones."""
    by_pass = isinstance(drafter, Chained)
    branching = comb(num_nodes, MAX_NODES if by_pass else drafter.max_drafts)
    if by_pass or (isinstance(drafter, Block) and drafter.draft_to_target is not None):  # of a draft vocabulary no other is drafted
        walk = TreeShape(num_nodes, "top_k", branching)
    else:
        walk = TreeShape(num_nodes, "conditioned" if isinstance(drafter, DSpark) and drafter.head is not None else "best_first")
    return [walk, TreeShape(num_nodes, "without_replacement", branching, rule="traversal")]


def sampled(shape: TreeShape | None) -> bool:
    return shape is not None and shape.rule != "walk"


def chain(drafter: Drafter, num_nodes: int) -> tuple[Drafter, int] | None:
    """The drafter and how many drafts verify the rows of such a tree, at most all it can make; None where that is how it is."""
    if isinstance(drafter, Chained) and num_nodes - 1 > drafter.max_drafts:
        drafter = copy.copy(drafter)  # chained as often as one likes
        drafter.max_drafts = num_nodes - 1
        return drafter, num_nodes - 1
    return (drafter, num_nodes - 1) if num_nodes - 1 < drafter.max_drafts else None
