"""accept_tree: lossless acceptance of draft trees from raw target logits, in one launch.

Rules walk, recursive, traversal: reference/tree.py, which is the reference. Sources: SpecInfer arXiv 2305.09781, Sequoia arXiv
2402.12374, traversal verification arXiv 2505.12398.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import check_choice, check_tensor, check_type
from ...choices import LOG_PROBS, TREE_RULES, LogProbs, TreeRule
from ...kernels.accept.args import (
    BlockPartials,
    Extent,
    FilterScratch,
    Layout,
    Limits,
    NodeLinks,
    NodeState,
    RowStats,
    Sampling,
    TreeCounters,
    TreeResidual,
    TreeRowStats,
    TreeScratch,
)
from ...kernels.sizes import FILTER_LIST, MAX_GROUP, NODE_IDS, NODE_VALUES, ROW_IDS, ROW_VALUES, VOCAB_BLOCK
from ...launch import arch
from ...launch.accept import tree as tree_launch
from ...library import Out
from ...types import Acceptance, DenseProposal, DraftTree, OneHotProposal, SamplingTensors, SparseProposal, VerifyLayout
from .. import sampling as sampling_args
from .checks import (
    Emitted,
    LayoutArrays,
    check_anchors,
    check_candidates,
    check_map,
    check_rows,
    emitted,
    layout_arrays,
    needs_logits,
    output,
)
from .records import Paths, draft_record, map_parts, map_record, outputs_record, target_record, tile_of, used

OP = "accept_tree"


def _width(nodes: int) -> int:
    return max(2, 1 << (nodes - 1).bit_length())


def _counters(take: workspaces.Take, requests: int, nodes: int) -> tuple[TreeCounters, Tensor]:
    """Arrival counters, and the two counters of an id map. The ticket is one of the reserved words."""
    groups = take(requests * nodes, torch.int32)  # at most one per node
    counters = TreeCounters(None, groups, *(take(requests, torch.int32) for _ in range(4)))
    return counters, take(2, torch.int32)


def _scratch(take: workspaces.Take, requests: int, rows: int, nodes: int, blocks: int) -> tuple[TreeScratch, Tensor]:
    """Scratch of a call with every option, and the inverse of an id map."""
    tops = [take(rows * blocks, torch.float32) for _ in range(3)]
    sums = [take(rows * blocks, torch.int64) for _ in range(3)]
    places = requests * _width(nodes)
    groups = rows * blocks * (VOCAB_BLOCK // MAX_GROUP)
    scratch = TreeScratch(
        target=BlockPartials(tops[0], sums[0]),
        draft=BlockPartials(tops[1], sums[1]),
        raw=BlockPartials(tops[2], sums[2]),
        residual=TreeResidual(take(requests * blocks, torch.int64), take(requests * blocks, torch.int64)),
        stats=TreeRowStats(
            RowStats(take(ROW_VALUES * rows, torch.float32), take(ROW_IDS * rows, torch.int32)),
            draft_sum_ptr=take(rows, torch.int64),
            token_ptr=take(rows, torch.int32),
        ),
        state=NodeState(
            take(NODE_VALUES * places, torch.float32), take(NODE_IDS * places, torch.int32), take(places, torch.int64),
            take(2 * requests, torch.int32),
        ),
        filters=FilterScratch(take(groups, torch.float32), take(groups, torch.int32), take(rows * 2 * FILTER_LIST, torch.int32)),
        limits=Limits(take(rows, torch.int64), take(rows, torch.int32)),
    )  # fmt: skip
    return scratch, take(blocks * VOCAB_BLOCK, torch.int32)


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    nodes = drafts + 1
    scratch = workspaces.measured(_scratch, requests, requests * nodes, nodes, -(-vocab // VOCAB_BLOCK))
    return workspaces.measured(_counters, requests, nodes), scratch


def accept_tree(
    target_logits: Tensor,
    layout: VerifyLayout,
    tree: DraftTree,
    *,
    sampling: SamplingTensors | None = None,
    rule: TreeRule = "walk",
    target_scaled: bool = False,
    logprobs: LogProbs | None = None,
    anchors: Tensor | None = None,
    anchor_positions: Tensor | None = None,
    state_indices: Tensor | None = None,
    out: Acceptance | None = None,
    workspace: workspaces.Workspace | None = None,
) -> Acceptance:
    """Verify every request's draft tree, and emit the tokens of the accepted path and the next token, in one launch.

    Args:
        target_logits: [L, V] bf16, fp16 or fp32, last dimension contiguous; row j belongs to layout.logits_indices[j].
        layout: of `tree_layout`: node m of a request is its m-th row, with the token of layout.token_ids; nodes without a row
            do not exist.
        tree: its parents; its ancestors where there are penalties; and for "recursive" and "traversal" of sampled trees a dense
            or sparse proposal, whose row m is the distribution of the children of node m, and `drawn`.
        sampling: settings per slot; None = every row greedy. The op applies them to target_logits along each node's own path:
            token_bitmask has a row per row of target_logits, and penalties count the nodes from the anchor's child to the row's
            own node as emitted, never a sibling.
        rule: "walk", "recursive" or "traversal". Use "walk" for deterministic trees: it samples at each node and follows the
            child that matches. Greedy requests and deterministic trees are walked under every rule: all three then have the same
            distribution, and none accepts more.
        target_scaled: as in `accept_chain`.
        logprobs: adds `Acceptance.logprobs` [R, M], ln of the probability of each emitted token: under "raw" by
            softmax(target_logits) at temperature 1, before any setting; under "processed" by the target distribution after all
            settings (greedy: the arg-max has probability 1). A token of probability 0 has -inf; entries from num_emitted on are 0.
        anchors, anchor_positions: int64 or int32 [S], advanced in place to the next round's anchor; both or neither.
        state_indices: int32 or int64 [R], request slot of each request, -1 = padding row.
        out, workspace: with both, nothing is allocated. A workspace of max_drafts >= M - 1.

    Returns:
        Acceptance with tokens, path and kv_source [R, M]: path[r, j] is the j-th node of the accepted path (j = 0: the anchor)
        and kv_source[r, j] its forward row, -1 behind the path. num_rejected counts the drafted nodes that are not on it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    requests = check_rows(target_logits, layout, state_indices)
    check_type("tree", tree, DraftTree)
    rows, vocab = target_logits.shape
    device = target_logits.device
    slots, nodes = tree.tokens.shape
    check_tensor("tree.parents", tree.parents, device=device)
    if nodes < 1:
        raise ValueError("tree.tokens: expected at least 1 node (the anchor), got 0")
    check_choice("rule", rule, TREE_RULES)
    check_choice("logprobs", logprobs, (None, *LOG_PROBS))
    if state_indices is None and slots != requests:
        raise ValueError(f"tree.tokens: expected {requests} rows (one per request, no state_indices), got {slots}")
    sampling_args.check_sampling(sampling, slots=slots, vocab=vocab, mask_shape=(rows,), device=device)
    draft = _check_proposal(tree, slots, nodes, device)
    check_map(draft, vocab, "tree.proposal")
    check_anchors(anchors, anchor_positions, slots, device)
    out = output(out, requests, nodes, layout.token_ids.shape[0], device, logprobs=logprobs is not None, paths=True)
    if requests == 0:
        return out
    assert out.path is not None and out.kv_source is not None  # of a tree, checked or made
    if target_scaled:
        sampling, draft = sampling_args.of_scaled_target(sampling, draft)
    if sampling is None or rule == "walk" or nodes == 1:
        draft = None
    blocks = -(-max(vocab, draft.logits.shape[2] if isinstance(draft, DenseProposal) else 0) // VOCAB_BLOCK)
    lent = workspaces.lend(OP, workspace, max(requests, -(-rows // nodes)), nodes - 1, blocks * VOCAB_BLOCK, device)
    arguments = Arguments(
        target_logits=target_logits,
        layout=layout_arrays(layout),
        parents=tree.parents,
        ancestors=tree.ancestors,
        draft_logits=None if draft is None else draft.logits,
        draft_ids=draft.ids if isinstance(draft, SparseProposal) else None,
        draft_temperature=None if draft is None else draft.temperature,
        draft_to_target=draft.draft_to_target if isinstance(draft, DenseProposal) else None,
        sampling=sampling_args.flatten(sampling),
        state_indices=state_indices,
        emitted=emitted(out),
        path=out.path,
        kv_source=out.kv_source,
        commit_mask=out.commit_mask,
        flags=out.flags,
        log_probs=out.logprobs if logprobs is not None else None,
        anchors=anchors,
        anchor_positions=anchor_positions,
        lent=lent,
        rule=0 if draft is None else TREE_RULES.index(rule),
        without_replacement=tree.drawn == "without_replacement",
        logprobs=logprobs,
    )
    _accept_tree(arguments)
    return out


def _check_proposal(tree: DraftTree, slots: int, nodes: int, device: torch.device) -> DenseProposal | SparseProposal | None:
    """The proposal of a sampled tree; None where the tree is deterministic."""
    proposal = tree.proposal
    if isinstance(proposal, OneHotProposal) or tree.drawn == "one_hot":
        return None
    check_type("tree.proposal", proposal, (DenseProposal, SparseProposal))
    needs_logits(OP, proposal)
    width = "Vd" if isinstance(proposal, DenseProposal) else "C"
    if width == "C":
        check_candidates("tree.proposal.logits", proposal.logits)
    check_tensor("tree.proposal.logits", proposal.logits, shape=(slots, nodes, width), device=device)
    return proposal


class Arguments(NamedTuple):
    """The op as torch.library knows it. rule: place in TREE_RULES."""

    target_logits: Tensor
    layout: LayoutArrays
    parents: Tensor
    ancestors: Tensor
    draft_logits: Tensor | None
    draft_ids: Tensor | None
    draft_temperature: Tensor | None
    draft_to_target: Tensor | None
    sampling: sampling_args.Flat
    state_indices: Tensor | None
    emitted: Emitted
    path: Out[Tensor]
    kv_source: Out[Tensor]
    commit_mask: Out[Tensor]
    flags: Out[Tensor]
    log_probs: Out[Tensor | None]
    anchors: Out[Tensor | None]
    anchor_positions: Out[Tensor | None]
    lent: workspaces.Lent
    rule: int
    without_replacement: bool
    logprobs: str | None


@library.register("accept_tree", Arguments)
def _accept_tree(a: Arguments) -> None:
    device, flat = a.target_logits.device, a.sampling
    kernels = library.kernels("accept.tree", device)
    rows, vocab = a.target_logits.shape
    requests, nodes = a.emitted.tokens.shape
    kind, wide = "none", 0
    if a.rule > 0:
        kind = "sparse" if a.draft_ids is not None else "stored" if a.draft_to_target is None else "mapped"
        assert a.draft_logits is not None  # of a rule
        wide = a.draft_logits.shape[2]
    dense, filtered = kind in ("stored", "mapped"), flat.filters is not None
    blocks = -(-max(vocab, wide if dense else 0) // VOCAB_BLOCK)
    config = tree_launch.pick(arch.current(device), requests, blocks, nodes, a.rule > 0, filtered or flat.adjusts)
    items = -(-nodes // config.group) * -(-blocks // (config.chunk * config.steps))
    if a.rule > 0:
        items += (nodes - 1) * -(-blocks // (config.tile * config.span))

    arrivals, map_progress = _counters(workspaces.Carver(a.lent.counters, workspaces.RESERVED).take, requests, nodes)
    scratch, inverse = _scratch(workspaces.Carver(a.lent.scratch).take, requests, rows, nodes, blocks)
    scratch = used(scratch, raw=a.logprobs == "raw", swept=dense, filtered=filtered)
    draft = draft_record(a.draft_logits, a.draft_ids, None, a.draft_to_target, inverse) if a.rule > 0 else None
    kernels.launch_accept_tree(
        map_parts(draft) + requests * items,
        (
            target_record(a.target_logits, flat), Layout(*a.layout),
            NodeLinks(a.parents, a.ancestors if flat.listed is not None else None), draft,
            Sampling(a.draft_temperature, flat.temperature, flat.seed, flat.filters, slots_ptr=a.state_indices),
            outputs_record(a, a.log_probs, Paths(a.path, a.kv_source)),
            arrivals._replace(ticket_ptr=a.lent.counters[1:2].view(torch.int32)),
            map_record(draft, map_progress), scratch,
            requests, a.parents.shape[0], rows, a.commit_mask.shape[0], Extent(nodes, vocab, blocks), config.steps,
        ),
        rule=a.rule,
        proposal=kind,
        without_replacement=a.without_replacement and a.rule > 0,
        config=config,
        **tile_of(draft, blocks, _width(nodes), flat),
    )  # fmt: skip
