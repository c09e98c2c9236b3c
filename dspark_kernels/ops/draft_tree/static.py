"""draft_tree and expand_tree: trees of drafts, each in one launch.

Children of a node: its best tokens, independent draws from its distribution, or the best keys of one race on it; or the paths of
greatest probability. Reference: reference/tree_draft.py. Sources: EAGLE arXiv 2401.15077, SpecInfer arXiv 2305.09781, Sequoia arXiv
2402.12374, DSpark arXiv 2607.05147.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import check_tensor, not_yet
from ...choices import STATIC_METHODS, Method, StaticMethod
from ...kernels.args import Adjustments, Bias
from ...kernels.draft_tree.args import (
    NodeLogits,
    NodeSettings,
    StaticCounters,
    StaticScratch,
    StaticTree,
    TreeState,
    TreeWidths,
)
from ...kernels.sizes import VOCAB_BLOCK
from ...launch import arch
from ...launch.draft import dense as draft_launch
from ...launch.draft_tree import static as tree_launch
from ...library import Out
from ...types import ConfidenceHead, DenseProposal, DraftTree, MarkovHead, SamplingTensors
from ...workspace import Workspace
from ..draft import dense as draft
from ..draft.args import MixedHead, base_record, has_latents, latent_room, stride_of, type_name, weights_of
from ..draft.candidates import hidden_states
from . import inputs as tree_inputs
from .best_first import by_probability
from .inputs import SAMPLED, Nodes, TreeCall, drawn_by, nodes_of

OP = "draft_tree"
EXPAND = "expand_tree"


def draft_tree(
    base_logits: Tensor,
    anchors: Tensor,
    head: MarkovHead | None = None,
    *,
    anchor_positions: Tensor,
    method: Method = "conditioned",
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
        method: how the nodes are chosen; ties go to the lowest node, then to the lowest id.
            "top_k": the branching[d] best tokens after a node of depth d.
            "iid": branching[d] independent draws from the node's distribution.
            "without_replacement": the branching[d] best keys of one Gumbel race on the node's distribution.
            "best_first": the nodes whose paths have the largest product of probabilities, positions independent.
            "conditioned": as "best_first", with the head's bias after each node's own token.
        num_nodes: 1 to 64.
        branching: children per node, by the node's depth, for the first three methods. Children are made depth by depth until the
            tree has num_nodes nodes; the entries of deeper depths are not read.
        node_budgets: int32 [R], nodes of each request (clamped to [1, num_nodes]). Under "iid" and "without_replacement" they must
            not depend on this round's draws.
        sampling: temperature and seed per slot, and logit_bias for the first three methods. Under "iid" and "without_replacement" a
            greedy request gets its best tokens. Probabilities of paths are at the sampling temperature (greedy: 1).
        hidden: [R, K, H], needed by `confidence`, gated and rnn heads.
        confidence: ConfidenceHead, for "best_first" and "conditioned".
        candidates: C: only the C best base logits of a position can become nodes.
        draft_to_target: int64 [V], the target's id of every id of the draft vocabulary; a negative entry stands for no token. For
            "top_k" and "without_replacement".
        state_indices: int32 or int64 [R], request slot of each row, -1 = padding row.
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
    drawn = drawn_by(method)
    kept = base_logits if method in SAMPLED else None
    shape = (anchors.shape[0], base_logits.shape[0], num_nodes, kept, drawn, draft_to_target)
    if out is None:
        out = tree_inputs.allocate(*shape, base_logits.device, survival=method not in STATIC_METHODS)
    else:
        tree_inputs.check_out(out, *shape, base_logits.device)
    if base_logits.shape[0] > 0:
        (_by_shape if method in STATIC_METHODS else by_probability)(call, out, workspace)
    return out


def expand_tree(
    tree: DraftTree,
    node_logits: Tensor,
    *,
    depth: int,
    branching: int,
    anchor_positions: Tensor,
    method: StaticMethod = "top_k",
    sampling: SamplingTensors | None = None,
    node_budgets: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    state_indices: Tensor | None = None,
    out: DraftTree | None = None,
    workspace: Workspace | None = None,
) -> DraftTree:
    """Give `branching` children to each node of one depth, for drafters with a forward pass per depth (MTP, EAGLE).

    Args:
        tree: a tree whose deepest nodes are those of `depth`, with room for M nodes. A slot with num_nodes 0 gets no nodes.
        node_logits: [R, F, V] bf16, fp16 or fp32, last dimension contiguous; row f belongs to the request's f-th node of `depth`.
        depth: depth of the nodes that get children; branching: children of each.
        anchor_positions, method, sampling, node_budgets, draft_to_target, state_indices: as in `draft_tree`. The stored
            distributions of nodes of other depths stay as they are.
        out: where to write. With `out=tree` the tree is extended in place, in one launch and without a copy; any other tree is
            made equal to `tree` first.
        workspace: scratch memory of max_drafts >= M - 1.

    Returns:
        DraftTree. Its flags have the bits of `tree` and those of this call.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    tree_inputs.check_expansion(
        EXPAND, tree, node_logits, depth, branching, anchor_positions, method, sampling, node_budgets, draft_to_target,
        state_indices,
    )  # fmt: skip
    out = _copied(tree, out, node_logits if method in SAMPLED else None, method, draft_to_target)
    if node_logits.shape[0] > 0:
        width = min(node_logits.shape[1], tree.tokens.shape[1])
        wanted = min(branching, max(1, tree.tokens.shape[1] - 1))
        targets = draft._check_sampling(
            sampling, None, draft_to_target, tree.tokens.shape[0], 1, node_logits.shape[2], node_logits.device
        )
        _launch(
            EXPAND, node_logits, None, None, anchors=None, anchor_positions=anchor_positions, sampling=sampling,
            node_budgets=node_budgets, draft_to_target=draft_to_target, state_indices=state_indices, out=out,
            workspace=workspace, method=method, depths=[(width, wanted)], level=depth, targets=targets,
        )  # fmt: skip
    return out


def _copied(tree: DraftTree, out: DraftTree | None, like: Tensor | None, method: Method, ids: Tensor | None) -> DraftTree:
    """A tree with the content of `tree` and room for the distributions of new children: `out`, checked, or a new one."""
    slots, nodes = tree.tokens.shape
    drawn = drawn_by(method)
    shape = (slots, tree.flags.shape[0], nodes, like, drawn, ids, tree.tokens.device)
    if out is None:
        out = tree_inputs.allocate(*shape)
    else:
        tree_inputs.check_out(out, *shape)
    sources = [(getattr(tree, name), getattr(out, name)) for name in (*Nodes._fields, "flags")]
    if like is not None and isinstance(tree.proposal, DenseProposal):
        logits = tree.proposal.logits
        check_tensor("tree.proposal.logits", logits, dtype=like.dtype, shape=(slots, nodes, like.shape[-1]), device=like.device)
        if isinstance(out.proposal, DenseProposal):  # always: checked, or made like this
            sources.append((logits, out.proposal.logits))
    for source, target in sources:
        if source is not target:
            target.copy_(source)
    return out


def _by_shape(call: TreeCall, out: DraftTree, workspace: Workspace | None) -> None:
    """Write the trees of a checked call with R >= 1 and a static method to `out`."""
    if call.confidence is not None:
        raise ValueError(f"confidence: expected None with method {call.method!r}, got a ConfidenceHead")
    if call.candidates is not None:
        not_yet(OP, "candidates", f"with method {call.method!r} they are")
    _launch(
        OP, call.base_logits, call.head, call.hidden, anchors=call.anchors, anchor_positions=call.anchor_positions,
        sampling=call.sampling, node_budgets=call.node_budgets, draft_to_target=call.draft_to_target,
        state_indices=call.state_indices, out=out, workspace=workspace, method=call.method,
        depths=tree_launch.depths_of(call.branching or (), call.base_logits.shape[1], call.num_nodes), level=None,
        targets=tree_inputs.target_ids(call),
    )  # fmt: skip


def _launch(
    op: str,
    base_logits: Tensor,
    head: MarkovHead | None,
    hidden: Tensor | None,
    *,
    anchors: Tensor | None,
    anchor_positions: Tensor,
    sampling: SamplingTensors | None,
    node_budgets: Tensor | None,
    draft_to_target: Tensor | None,
    state_indices: Tensor | None,
    out: DraftTree,
    workspace: Workspace | None,
    method: Method,
    depths: list[tuple[int, int]],
    level: int | None,
    targets: int,
) -> None:
    """depths: (nodes, children of each) of every depth.

    level: the depth whose nodes base_logits have a row each for; None = a row per position.
    """
    if draft_to_target is not None and method == "iid":
        not_yet(op, "draft_to_target", "with method 'iid' it is")
    rows, vocab, device = base_logits.shape[0], base_logits.shape[2], base_logits.device
    nodes, by_sumexp = out.tokens.shape[1], method == "iid"
    needed = workspaces.measured(_counters, rows, nodes)
    words = workspaces.measured(_scratch, rows, nodes, vocab, *_largest(depths), by_sumexp)
    room = latent_room(head, rows, max(1, nodes - 1), workspaces.node_latent_words)
    message = workspaces.room_for(rows, nodes - 1, vocab, room["rank"])
    lent = workspaces.lend_words(workspace, needed, words + room["latents"], device, message)
    sampled = method in SAMPLED
    arguments = Arguments(
        base_logits=base_logits,
        anchors=anchors,
        anchor_positions=anchor_positions,
        head=MixedHead(*weights_of(head)),
        hidden=hidden if has_latents(head) else None,
        temperature=sampling.temperature if sampling is not None and sampled else None,
        seed=sampling.seed if sampling is not None and sampled else None,
        logit_bias=None if sampling is None else sampling.logit_bias,
        node_budgets=node_budgets,
        draft_to_target=draft_to_target,
        state_indices=state_indices,
        tree=nodes_of(out),
        flags=out.flags,
        logits=out.proposal.logits if sampled and isinstance(out.proposal, DenseProposal) else None,
        lent=lent,
        method=method,
        widths=[width for width, _ in depths],
        branching=[wanted for _, wanted in depths],
        level=level,
        targets=targets,
    )
    _draft_tree(arguments)


def _largest(depths: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The largest number of nodes, and of children of all nodes, of any depth."""
    return max(width for width, _ in depths), max(width * wanted for width, wanted in depths)


def _counters(take: workspaces.Take, requests: int, nodes: int) -> tuple[Tensor, Tensor]:
    """The ticket, the counter of finished items, and the flags of rows."""
    return take(2, torch.int32), take(requests * nodes, torch.int32)


def _scratch(
    take: workspaces.Take, requests: int, nodes: int, vocab: int, width: int, children: int, by_sumexp: bool
) -> StaticScratch:
    """width, children: of `_largest`. by_sumexp: children are drawn independently."""
    blocks = -(-vocab // VOCAB_BLOCK)
    return StaticScratch(
        lists_ptr=take(requests * children * blocks, torch.int64),
        best_ptr=take(requests * children, torch.int64),
        found_ptr=take(requests * nodes, torch.int32),
        record_ptr=take(3 * requests, torch.int32),
        block_max_ptr=take(requests * width * blocks, torch.float32) if by_sumexp else None,
        block_sumexp_ptr=take(requests * width * blocks, torch.int64) if by_sumexp else None,
    )


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    nodes = min(drafts + 1, tree_inputs.MAX_NODES)
    # Nodes of a depth and children of one of them are at most M together.
    children = max(1, nodes // 2 * (nodes - nodes // 2))
    scratch = workspaces.measured(_scratch, requests, nodes, vocab, max(1, nodes - 1), children, True)
    return workspaces.measured(_counters, requests, nodes), scratch


class Arguments(NamedTuple):
    """The op as torch.library knows it."""

    base_logits: Tensor
    anchors: Tensor | None
    anchor_positions: Tensor
    head: MixedHead
    hidden: Tensor | None
    temperature: Tensor | None
    seed: Tensor | None
    logit_bias: Tensor | None
    node_budgets: Tensor | None
    draft_to_target: Tensor | None
    state_indices: Tensor | None
    tree: Nodes
    flags: Out[Tensor]
    logits: Out[Tensor | None]
    lent: workspaces.Lent
    method: str
    widths: list[int]
    branching: list[int]
    level: int | None
    targets: int


@library.register("draft_tree", Arguments)
def _draft_tree(a: Arguments) -> None:
    device = a.base_logits.device
    kernels = library.kernels("draft_tree.static", device)
    rows, _, vocab = a.base_logits.shape
    slots, nodes = a.tree.tokens.shape
    gpu = arch.current(device)
    blocks = -(-vocab // VOCAB_BLOCK)
    shape = list(zip(a.widths, a.branching, strict=True))
    most, children = _largest(shape)

    progress, row_status = _counters(workspaces.Carver(a.lent.counters, workspaces.RESERVED).take, rows, nodes)
    take = workspaces.Carver(a.lent.scratch).take
    memory = _scratch(take, rows, nodes, vocab, most, children, a.method == "iid")
    head, dot_type, widening = draft.head_record(a.head)
    rank = 1 if head is None else head.rank
    latents = (rows * len(shape), rows * most, rows * nodes)
    kind, projection, mix_type = draft.projection_record(a.head, a.hidden, None, *latents, dot_type, take)
    bias = None if a.logit_bias is None else Adjustments(Bias(a.logit_bias, a.logit_bias.stride(0)), None, None)
    if widening == "fp8":
        widening = "fp8_by_cast" if gpu.family in draft_launch._NATIVE_FP8 else "fp8_by_bits"
    config = tree_launch.pick(gpu, vocab, rank, a.head.w1 is not None and dot_type == torch.float32)
    kernels.launch_draft_tree(
        tree_launch.items_of(config, shape, rows, blocks, rank, a.head.outputs // rank),
        (
            base_record(a.base_logits),
            TreeState(
                anchors_ptr=a.anchors, stride_anchors=stride_of(a.anchors, 0), positions_ptr=a.anchor_positions,
                stride_positions=a.anchor_positions.stride(0), slots_ptr=a.state_indices, temperature_ptr=a.temperature,
                seed_ptr=a.seed, budgets_ptr=a.node_budgets,
            ),
            head, projection, hidden_states(a.hidden),
            NodeSettings(map_ptr=a.draft_to_target, num_targets=a.targets, adjust=bias),
            StaticTree(**a.tree.pointers(), flags_ptr=a.flags),
            None if a.logits is None else NodeLogits(ptr=a.logits, stride_slot=a.logits.stride(0), stride_node=a.logits.stride(1)),
            memory, StaticCounters(ticket_ptr=progress[:1], finished_ptr=progress[1:], row_status_ptr=row_status),
            kernels.words_of_branching(a.branching), a.level, rows, slots, nodes,
            TreeWidths(vocab, a.widths[0]), len(shape),
        ),
        method=a.method,
        projection=kind,
        widen=widening,
        blocks=max(4, 1 << (blocks - 1).bit_length()),
        keep=max(2, 1 << (max(a.branching) - 1).bit_length()),
        width=max(2, 1 << (nodes - 1).bit_length()),
        block_r=draft_launch.rank_block(gpu, rank, dot_type.itemsize, tree_launch.RANKS),
        dot_type=type_name(dot_type),
        mix_type=type_name(mix_type),
        config=config,
    )  # fmt: skip
