"""draft_tree by the probability of paths: methods "best_first" and "conditioned".

Oracle: reference/tree_draft.py.
"""

from __future__ import annotations

from ..checks import not_yet
from ..types import DraftTree
from ..workspace import Workspace
from .tree_inputs import TreeCall

OP = "draft_tree"


def by_probability(call: TreeCall, out: DraftTree, workspace: Workspace | None) -> None:
    """Write the trees of a checked call with R >= 1 to `out`, whose slots may hold anything."""
    not_yet(OP, "method", f"{call.method!r} is")
