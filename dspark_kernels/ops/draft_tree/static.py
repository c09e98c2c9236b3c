"""draft_tree and expand_tree: trees of drafts, each in one launch.

Children of a node: its best tokens, independent draws from its law, or the best keys of one race on it; or the paths of greatest
probability. Oracle: reference/tree_draft.py. Sources: EAGLE arXiv 2401.15077, SpecInfer arXiv 2305.09781, Sequoia arXiv
2402.12374, DSpark arXiv 2607.05147.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import check_tensor, check_type, not_yet
from ...kernels.args import Adjustments, Bias
from ...kernels.draft.args import BaseLogits
from ...kernels.draft_tree.args import NodeLogits, NodeSettings, StaticCounters, StaticScratch, StaticTree, TreeState
from ...launch import arch
from ...launch.draft import dense as draft_launch
from ...launch.draft_tree import static as tree_launch
from ...types import ConfidenceHead, DenseProposal, DraftTree, MarkovHead, SamplingTensors
from ...workspace import Workspace
from ..draft import dense as draft
from ..draft.candidates import hidden_states
from . import inputs as tree_inputs
from .best_first import by_probability
from .inputs import SAMPLED, STATIC, TreeCall

OP = "draft_tree"
EXPAND = "expand_tree"
FIELDS = ("tokens", "parents", "depths", "first_child", "next_sibling", "ancestors", "num_nodes", "flags")


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
        sampling: temperature and seed per slot, and logit_bias for the first three methods. A greedy request of a sampled method
            gets its best tokens. Paths are compared at the sampling temperature (greedy: 1).
        hidden: [R, K, H], needed by `confidence`, gated and rnn heads.
        confidence: ConfidenceHead, for "best_first" and "conditioned".
        candidates: children come from the C best base logits of their position alone.
        draft_to_target: int64 [V], the target's id of every id of the draft vocabulary; a negative entry stands for no token. For
            "top_k" and "without_replacement".
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
    laws = base_logits if method in SAMPLED else None
    shape = (anchors.shape[0], base_logits.shape[0], num_nodes, laws, drawn, draft_to_target)
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
    out = _copied(tree, out, node_logits if method in SAMPLED else None, method, draft_to_target)
    if node_logits.shape[0] > 0:
        width = min(node_logits.shape[1], tree.tokens.shape[1])
        wanted = min(branching, max(1, tree.tokens.shape[1] - 1))
        tensors = (node_logits, None, anchor_positions, None, None, None, None, None, None)
        known = draft._check_sampling(
            sampling, None, draft_to_target, tree.tokens.shape[0], 1, node_logits.shape[2], node_logits.device
        )
        settings = sampling, node_budgets, draft_to_target, state_indices
        _launch(EXPAND, tensors, known, *settings, out, workspace, method, [(width, wanted)], depth)
    return out


def _copied(tree: DraftTree, out: DraftTree | None, laws: Tensor | None, method: str, ids: Tensor | None) -> DraftTree:
    """A tree with the content of `tree` and room for the laws of new children: `out`, checked, or a new one."""
    slots, nodes = tree.tokens.shape
    drawn = method if laws is not None else "one_hot"
    shape = (slots, tree.flags.shape[0], nodes, laws, drawn, ids, tree.tokens.device)
    if out is None:
        out = tree_inputs.allocate(*shape)
    else:
        tree_inputs.check_out(out, *shape)
    sources = [(getattr(tree, name), getattr(out, name)) for name in FIELDS]
    if laws is not None and isinstance(tree.proposal, DenseProposal):
        law = tree.proposal.logits
        check_tensor("tree.proposal.logits", law, dtype=laws.dtype, shape=(slots, nodes, laws.shape[-1]), device=laws.device)
        sources.append((law, out.proposal.logits))
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
    weight, bias = draft._mixing(call.head)
    head = call.head
    weights = (None, None, None) if head is None else (head.w1, head.w2, head.w2_scale)
    hidden = None if weight is None else call.hidden
    tensors = (call.base_logits, call.anchors, call.anchor_positions, *weights, weight, bias, hidden)
    depths = tree_launch.depths_of(call.branching, call.base_logits.shape[1], call.num_nodes)
    settings = call.sampling, call.node_budgets, call.draft_to_target, call.state_indices
    _launch(OP, tensors, tree_inputs.target_ids(call), *settings, out, workspace, call.method, depths, None)


def _launch(
    op, tensors, targets, sampling, node_budgets, draft_to_target, state_indices, out, workspace, method, depths, level
) -> None:
    """tensors: logits, anchors, their positions, of a head W1, W2 and scale, weight and bias that mix, and hidden states."""
    if draft_to_target is not None and method == "iid":
        not_yet(op, "draft_to_target", "with method 'iid' it is")
    base_logits = tensors[0]
    rows, vocab, device = base_logits.shape[0], base_logits.shape[2], base_logits.device
    slots, nodes = out.tokens.shape
    most, children = _largest(depths)
    needed, scratch = _words(rows, nodes, vocab, most, children, method == "iid")
    message = f"expected room for {rows} requests x {nodes - 1} drafts over {vocab} ids"
    if tensors[6] is not None:
        rank = tensors[3].shape[1]
        scratch += workspaces.node_latent_words(rows, max(1, nodes - 1), rank, tensors[6].shape[0] // rank)
        message += f" and markov_rank={rank}"
    if workspace is not None:
        check_type("workspace", workspace, Workspace)
        message += f", got one made for {workspace.max_requests} x {workspace.max_drafts} over {workspace.vocab_size}"
    counters, scratch = workspaces.lend_words(workspace, needed, scratch, device, message)
    sampled = method in SAMPLED
    _draft_tree(
        *tensors, sampling.temperature if sampled else None, sampling.seed if sampled else None,
        None if sampling is None else sampling.logit_bias, node_budgets, draft_to_target, state_indices,
        *(getattr(out, name) for name in FIELDS), out.proposal.logits if sampled else None, counters, scratch, method,
        [width for width, _ in depths], [wanted for _, wanted in depths], level, targets,
    )  # fmt: skip


def _largest(depths) -> tuple[int, int]:
    """Most nodes, and most children of all nodes, that a depth has."""
    return max(width for width, _ in depths), max(width * wanted for width, wanted in depths)


def _words(rows: int, nodes: int, vocab: int, width: int, children: int, by_mass: bool) -> tuple[int, int]:
    """int64 words of counters and scratch."""
    leaves, words = -(-vocab // tree_launch.LEAF), workspaces.words_of
    counters = words(2, torch.int32) + words(rows * nodes, torch.int32)
    scratch = words(rows * children * leaves, torch.int64) + words(rows * children, torch.int64)
    scratch += words(rows * nodes, torch.int32) + words(3 * rows, torch.int32)
    if by_mass:
        scratch += words(rows * width * leaves, torch.float32) + words(rows * width * leaves, torch.int64)
    return counters, scratch


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    nodes = min(drafts + 1, tree_inputs.MAX_NODES)
    # Nodes of a depth and children of one of them are at most M together.
    children = max(1, nodes // 2 * (nodes - nodes // 2))
    return _words(requests, nodes, vocab, max(1, nodes - 1), children, True)


@library.register(
    "draft_tree(Tensor base_logits, Tensor? anchors, Tensor anchor_positions, Tensor? w1, Tensor? w2, Tensor? w2_scale, "
    "Tensor? mix_weight, Tensor? mix_bias, Tensor? hidden, Tensor? temperature, Tensor? seed, Tensor? logit_bias, "
    "Tensor? node_budgets, Tensor? draft_to_target, Tensor? state_indices, Tensor(a!) tokens, Tensor(b!) parents, "
    "Tensor(c!) depths, Tensor(d!) first_child, Tensor(e!) next_sibling, Tensor(f!) ancestors, Tensor(g!) num_nodes, "
    "Tensor(h!) flags, Tensor(i!)? law, Tensor(j!) counters, Tensor(k!) scratch, str method, int[] widths, int[] branching, "
    "int? level, int targets) -> ()"
)
def _draft_tree(
    base_logits, anchors, anchor_positions, w1, w2, w2_scale, mix_weight, mix_bias, hidden, temperature, seed, logit_bias,
    node_budgets, draft_to_target, state_indices, tokens, parents, depths, first_child, next_sibling, ancestors, num_nodes, flags,
    law, counters, scratch, method, widths, branching, level, targets,
):  # fmt: skip
    device = base_logits.device
    kernels = library.kernels("draft_tree.static", device)
    rows, _, vocab = base_logits.shape
    slots, nodes = tokens.shape
    gpu = arch.current(device)
    leaves = -(-vocab // tree_launch.LEAF)
    shape = list(zip(widths, branching, strict=True))
    most, children = _largest(shape)

    clean = workspaces.Carver(counters, workspaces.RESERVED)
    progress, row_status = clean.take(2, torch.int32), clean.take(rows * nodes, torch.int32)
    carver = workspaces.Carver(scratch)
    take = carver.take
    by_mass = method == "iid"
    memory = StaticScratch(
        lists_ptr=take(rows * children * leaves, torch.int64),
        best_ptr=take(rows * children, torch.int64),
        found_ptr=take(rows * nodes, torch.int32),
        record_ptr=take(3 * rows, torch.int32),
        block_max_ptr=take(rows * most * leaves, torch.float32) if by_mass else None,
        block_sumexp_ptr=take(rows * most * leaves, torch.int64) if by_mass else None,
    )
    head, dot_type, widening = draft.head_record(w1, w2, w2_scale)
    rank = 1 if head is None else head.rank
    kind, mixer, mix_type = draft.mixer_record(
        w1, mix_weight, mix_bias, hidden, None, rows * len(shape), rows * most, rows * nodes, dot_type, carver
    )  # fmt: skip
    parts = 0 if mixer is None else mix_weight.shape[0] // rank
    bias = None if logit_bias is None else Adjustments(Bias(logit_bias, logit_bias.stride(0)), None, None)
    if widening == "fp8":
        widening = "fp8_by_cast" if gpu.family in draft_launch._NATIVE_FP8 else "fp8_by_bits"
    config = tree_launch.pick(gpu, vocab, rank, w1 is not None and dot_type == torch.float32)
    kernels.launch_draft_tree(
        tree_launch.items_of(config, shape, rows, leaves, rank, parts),
        (
            BaseLogits(ptr=base_logits, stride_request=base_logits.stride(0), stride_position=base_logits.stride(1)),
            TreeState(
                anchors_ptr=anchors, stride_anchors=0 if anchors is None else anchors.stride(0), positions_ptr=anchor_positions,
                stride_positions=anchor_positions.stride(0), slots_ptr=state_indices, temperature_ptr=temperature, seed_ptr=seed,
                budgets_ptr=node_budgets,
            ),
            head, mixer, hidden_states(hidden if mixer is not None else None),
            NodeSettings(map_ptr=draft_to_target, num_targets=targets, adjust=bias),
            StaticTree(
                tokens_ptr=tokens, parents_ptr=parents, depths_ptr=depths, first_child_ptr=first_child,
                next_sibling_ptr=next_sibling, ancestors_ptr=ancestors, num_nodes_ptr=num_nodes, flags_ptr=flags,
            ),
            None if law is None else NodeLogits(ptr=law, stride_slot=law.stride(0), stride_node=law.stride(1)),
            memory, StaticCounters(ticket_ptr=progress[:1], finished_ptr=progress[1:], row_status_ptr=row_status),
            kernels.words_of_branching(branching), level, rows, slots, nodes, vocab, widths[0], len(shape),
        ),
        method=method,
        mixer=kind,
        widen=widening,
        leaves=max(4, 1 << (leaves - 1).bit_length()),
        keep=max(2, 1 << (max(branching) - 1).bit_length()),
        width=max(2, 1 << (nodes - 1).bit_length()),
        block_r=draft_launch.rank_block(gpu, rank, dot_type.itemsize, tree_launch.RANKS),
        dot_type=draft._name(dot_type),
        mix_type=draft._name(mix_type),
        config=config,
    )  # fmt: skip
