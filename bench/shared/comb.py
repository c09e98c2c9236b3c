"""The shape of a comb: the w best (or drawn) first tokens and a chain after each.

A comb of M nodes and width w has chains of (M - 1) / w drafts. Widths were chosen on held-out texts that no table uses: w = 3 for
M = 16, of 2, 3 and 4, and of bushier trees.
"""

from __future__ import annotations

import math


def comb(num_nodes: int, max_depth: int) -> tuple[int, ...]:
    """Branching by depth of a comb of at most num_nodes nodes, as wide as half its depth, and wider where that is bounded."""
    drafts = num_nodes - 1
    width = max(round(math.sqrt(drafts / 2)), drafts // max_depth, 1)
    return (width, *[1] * (min(drafts // width, max_depth) - 1))
