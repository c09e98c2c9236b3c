"""draft_tree and expand_tree: trees of drafts, each in one launch.

Children of a node: its best tokens, independent draws from its law, or the best keys of one race on it; or the paths of greatest
probability. Oracle: reference/tree_draft.py. Sources: EAGLE arXiv 2401.15077, SpecInfer arXiv 2305.09781, Sequoia arXiv
2402.12374, DSpark arXiv 2607.05147.
"""

from __future__ import annotations

from torch import Tensor

from ..checks import not_yet
from ..types import ConfidenceHead, DraftTree, MarkovHead, SamplingTensors
from ..workspace import Workspace
from . import tree_inputs
from .tree_inputs import SAMPLED, STATIC, TreeCall
from .tree_paths import by_probability

OP = "draft_tree"
EXPAND = "expand_tree"


def draft_tree(
    base_logits: Tensor,
    anchors: Tensor,
    head: MarkovHead | None = None,
    *,
    anchor_positions: Tensor,
    method: str = "conditioned",
    num_nodes: int,
    branching: tuple[int, ...] | None = None,
    node_budgets: Tensor | None = None,
    sampling: SamplingTensors | None = None,
    hidden: Tensor | None = None,
    confidence: ConfidenceHead | None = None,
    candidates: int | None = None,
    draft_to_target: Tensor | None = None,
    state_indices: Tensor | None = None,
    out: DraftTree | None = None,
    workspace: Workspace | None = None,
) -> DraftTree:
    """Grow a tree of at most num_nodes nodes, the anchor included, for every request, in one launch.

    Args:
        base_logits: [R, K, V] bf16, fp16 or fp32, last dimension contiguous: the backbone's logits, row k - 1 for depth k.
        anchors: int64 or int32 [S] (R without `state_indices`), the last emitted token of each request: node 0.
        head: MarkovHead, GatedMarkovHead, RnnMarkovHead or None: a node's children follow its own token.
        anchor_positions: int64 or int32 [S]; a node of depth k is decided for position + k.
        method: "top_k": the branching[d] best tokens after a node of depth d; "iid": as many independent draws from its law;
            "without_replacement": the best keys of one Gumbel race on it; "best_first": the nodes of greatest product of
            probabilities, positions independent; "conditioned": the same under the head. Ties: the lowest node, then the lowest id.
        num_nodes: 1 to 64.
        branching: children of a node by its depth, for the first three methods; depth by depth, cut at num_nodes. A depth that
            begins with a full tree is not looked at.
        node_budgets: int32 [R], nodes of each request (clamped to [1, num_nodes]). For the sampled methods they must not depend on
            this round's draws.
        sampling: temperature and seed per slot. A greedy request of a sampled method gets its best tokens. Paths are compared at
            the sampling temperature (greedy: 1).
        hidden: [R, K, H], needed by `confidence`, gated and rnn heads.
        confidence: ConfidenceHead, for "best_first" and "conditioned".
        candidates: children come from the C best base logits of their position alone.
        draft_to_target: int64 [V], the target's id of every id of the draft vocabulary; a negative entry stands for no token.
        state_indices: int32 [R], state slot of each row, -1 = padding row.
        out: a DraftTree to write. Rows of its proposal that belong to nodes without children keep what they held.
        workspace: scratch memory of max_drafts >= num_nodes - 1 (and markov_rank for a gated or rnn head); with `out` and
            `workspace` nothing is allocated.

    Returns:
        DraftTree. Its proposal is dense for "iid" and "without_replacement" (row m: what the children of node m were drawn from,
        in base_logits' dtype), else one-hot.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    call = TreeCall(
        base_logits, anchors, head, anchor_positions, method, num_nodes, branching, node_budgets, sampling, hidden, confidence,
        candidates, draft_to_target, state_indices,
    )  # fmt: skip
    tree_inputs.check_call(OP, call)
    drawn = method if method in SAMPLED else "one_hot"
    shape = (anchors.shape[0], base_logits.shape[0], num_nodes, base_logits if method in SAMPLED else None, drawn)
    if out is None:
        out = tree_inputs.allocate(*shape, base_logits.device, survival=method not in STATIC)
    else:
        tree_inputs.check_out(out, *shape, base_logits.device)
    if base_logits.shape[0] > 0:
        (_by_shape if method in STATIC else by_probability)(call, out, workspace)
    return out


def expand_tree(
    tree: DraftTree,
    node_logits: Tensor,
    *,
    depth: int,
    branching: int,
    anchor_positions: Tensor,
    method: str = "top_k",
    sampling: SamplingTensors | None = None,
    node_budgets: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    state_indices: Tensor | None = None,
    out: DraftTree | None = None,
    workspace: Workspace | None = None,
) -> DraftTree:
    """Give `branching` children to each node of one depth, for drafters with a forward pass per depth (MTP, EAGLE).

    Args:
        tree: a tree that ends with its nodes of `depth`; it has room for M nodes. Without nodes (num_nodes 0) it stays so.
        node_logits: [R, F, V] bf16, fp16 or fp32, last dimension contiguous; row f belongs to the request's f-th node of `depth`.
        depth, branching: of the nodes that get children, and how many each.
        anchor_positions, method, sampling, node_budgets, draft_to_target, state_indices: as in `draft_tree`. The laws of nodes of
            other depths stay as they are.
        out: where to write. `tree` itself is extended in place, in one launch and without a copy; any other is made equal to
            `tree` first.
        workspace: scratch memory of max_drafts >= M - 1.

    Returns:
        DraftTree, its flags those of `tree` and of this call.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    tree_inputs.check_expansion(
        EXPAND, tree, node_logits, depth, branching, anchor_positions, method, sampling, node_budgets, draft_to_target,
        state_indices,
    )  # fmt: skip
    not_yet(EXPAND, "method", f"{method!r} is")


def _by_shape(call: TreeCall, out: DraftTree, workspace: Workspace | None) -> None:
    """Write the trees of a checked call with R >= 1 and a static method to `out`."""
    not_yet(OP, "method", f"{call.method!r} is")
