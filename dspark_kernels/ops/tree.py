"""accept_tree: lossless acceptance of draft trees from raw target logits, in one launch.

Rules walk, recursive, traversal: reference/tree.py, which is the oracle. Sources: SpecInfer arXiv 2305.09781, Sequoia arXiv
2402.12374, traversal verification arXiv 2505.12398.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import library, workspace as workspaces
from ..checks import INT_DTYPES, LOGIT_DTYPES, check_choice, check_optional, check_tensor, check_type, not_yet
from ..launch import arch, tree as tree_launch
from ..types import Acceptance, DenseProposal, DraftTree, OneHotProposal, SamplingTensors, VerifyLayout

OP = "accept_tree"
LEAF = 1024  # ids per leaf, as in kernels/primitives/mass.py
RULES = ("walk", "recursive", "traversal")  # in the order of the kernel's constants


def _width(nodes: int) -> int:
    return max(2, 1 << (nodes - 1).bit_length())


def _counter_words(requests: int, nodes: int) -> int:
    # Arrivals of node groups (at most one per node); of requests, of a sweep, of all sweeps; sweeps published.
    return workspaces.words_of(requests * nodes, torch.int32) + 4 * workspaces.words_of(requests, torch.int32)


def _scratch_words(requests: int, rows: int, nodes: int, leaves: int) -> int:
    words = workspaces.words_of
    partials = 2 * words(rows * leaves, torch.float32) + 2 * words(rows * leaves, torch.int64)
    per_row = words(3 * rows, torch.float32) + words(4 * rows, torch.int32) + words(rows, torch.int64)
    places = requests * _width(nodes)
    per_node = words(6 * places, torch.float32) + words(2 * places, torch.int32) + words(places, torch.int64)
    return partials + 2 * words(requests * leaves, torch.int64) + per_row + per_node + words(2 * requests, torch.int32)


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    nodes = drafts + 1
    return _counter_words(requests, nodes), _scratch_words(requests, requests * nodes, nodes, -(-vocab // LEAF))


def accept_tree(
    target_logits: Tensor,
    layout: VerifyLayout,
    tree: DraftTree,
    *,
    sampling: SamplingTensors | None = None,
    rule: str = "walk",
    anchors: Tensor | None = None,
    anchor_positions: Tensor | None = None,
    state_indices: Tensor | None = None,
    out: Acceptance | None = None,
    workspace: workspaces.Workspace | None = None,
) -> Acceptance:
    """Find every request's accepted path through its tree and emit what follows, in one launch.

    Args:
        target_logits: [L, V] bf16, fp16 or fp32, last dimension contiguous; row j belongs to layout.logits_indices[j].
        layout: of `tree_layout`: node m of a request is its m-th row, with the token of layout.token_ids; nodes without a row
            do not exist.
        tree: parents, and for "recursive" and "traversal" of sampled trees the law of every node's children: a dense proposal
            [S, M, Vd], row m for node m, and how they were drawn.
        sampling: temperature and seed per slot; None = every row greedy.
        rule: "walk", "recursive" or "traversal". Greedy requests and trees made without chance are walked under each: there the
            three emit the same law, and none keeps more.
        anchors, anchor_positions: int64 or int32 [S], advanced in place to the next round's anchor if given.
        state_indices: int32 [R], state slot of each request, -1 = padding row.
        out, workspace: with both, nothing is allocated. A workspace of max_drafts >= M - 1.

    Returns:
        Acceptance with tokens, path and kv_source [R, M]: path[r, j] is the j-th node of the accepted path (0 = the anchor),
        kv_source[r, j] its forward row; -1 behind. num_rejected counts the other drafted nodes.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    check_tensor("target_logits", target_logits, dtype=LOGIT_DTYPES, shape=("L", "V"), last_contiguous=True)
    check_type("layout", layout, VerifyLayout)
    check_type("tree", tree, DraftTree)
    rows, vocab = target_logits.shape
    device = target_logits.device
    requests, forward_rows = layout.draft_lens.shape[0], layout.token_ids.shape[0]
    slots, nodes = tree.tokens.shape
    check_tensor("layout.draft_lens", layout.draft_lens, device=device)
    check_tensor("tree.parents", tree.parents, device=device)
    if nodes < 1:
        raise ValueError("tree.tokens: expected at least 1 node (the anchor), got 0")
    if layout.logits_indices.shape[0] < rows:
        raise ValueError(
            f"layout.logits_indices: expected an entry for each of the {rows} rows of target_logits, got "
            f"{layout.logits_indices.shape[0]}"
        )
    if requests and (vocab == 0 or rows == 0):
        raise ValueError(f"target_logits: expected L >= 1 and V >= 1, got shape {list(target_logits.shape)}")
    check_choice("rule", rule, RULES)
    check_optional("state_indices", state_indices, dtype=torch.int32, shape=(requests,), device=device, contiguous=True)
    if state_indices is None and slots != requests:
        raise ValueError(f"tree.tokens: expected {requests} rows (one per request, no state_indices), got {slots}")
    _check_sampling(sampling, slots, device)
    dense = _check_proposal(tree, slots, nodes, device)
    for name, tensor in (("anchors", anchors), ("anchor_positions", anchor_positions)):
        check_optional(name, tensor, dtype=INT_DTYPES, shape=(slots,), device=device)
    out = _output(out, requests, nodes, forward_rows, device)
    if requests == 0:
        return out
    if sampling is None or rule == "walk" or nodes == 1:
        dense = None
    leaves = -(-max(vocab, 0 if dense is None else dense.logits.shape[2]) // LEAF)
    counters, scratch = workspaces.lend(OP, workspace, max(requests, -(-rows // nodes)), nodes - 1, leaves * LEAF, device)
    _accept_tree(
        target_logits, layout.query_start_loc, layout.cu_num_logits, layout.logits_indices, layout.token_ids, layout.positions,
        tree.parents, None if dense is None else dense.logits, None if dense is None else dense.temperature,
        None if sampling is None else sampling.temperature, None if sampling is None else sampling.seed, state_indices,
        out.tokens, out.num_accepted, out.num_emitted, out.num_rejected, out.next_token, out.last_row, out.path, out.kv_source,
        out.commit_mask, out.flags, anchors, anchor_positions, counters, scratch,
        0 if dense is None else RULES.index(rule), tree.drawn == "without_replacement",
    )  # fmt: skip
    return out


def _check_sampling(sampling, slots, device):
    if sampling is None:
        return
    check_type("sampling", sampling, SamplingTensors)
    check_tensor("sampling.temperature", sampling.temperature, shape=(slots,), device=device)
    for name in ("top_k", "top_p", "min_p", "logit_bias", "token_bitmask", "penalties"):
        if getattr(sampling, name) is not None:
            not_yet(OP, f"sampling.{name}", "filters and penalties along a tree are")


def _check_proposal(tree, slots, nodes, device) -> DenseProposal | None:
    """The laws of a tree that was drawn by chance; None where the nodes stand for themselves."""
    proposal = tree.proposal
    if isinstance(proposal, OneHotProposal) or tree.drawn == "one_hot":
        return None
    if not isinstance(proposal, DenseProposal):
        not_yet(OP, "tree.proposal", "a sparse proposal is")
    if proposal.draft_to_target is not None:
        not_yet(OP, "tree.proposal.draft_to_target", "a reduced draft vocabulary is")
    check_tensor("tree.proposal.logits", proposal.logits, shape=(slots, nodes, "Vd"), device=device)
    return proposal


def _output(out, requests, nodes, forward_rows, device) -> Acceptance:
    """The caller's result, checked, or a new one."""
    if out is not None:
        check_type("out", out, Acceptance)
        check_tensor("out.tokens", out.tokens, shape=(requests, nodes), device=device)
        check_tensor("out.commit_mask", out.commit_mask, shape=(forward_rows,), device=device)
        for name in ("path", "kv_source"):
            check_tensor(f"out.{name}", getattr(out, name), dtype=torch.int32, shape=(requests, nodes), device=device)
        return out

    def ints(*shape):
        return torch.empty(*shape, dtype=torch.int32, device=device)

    return Acceptance(
        tokens=torch.empty(requests, nodes, dtype=torch.int64, device=device),
        num_accepted=ints(requests),
        num_emitted=ints(requests),
        num_rejected=ints(requests),
        next_token=torch.empty(requests, dtype=torch.int64, device=device),
        last_row=ints(requests),
        # Without requests nothing is launched, and no row is committed.
        commit_mask=(torch.empty if requests else torch.zeros)(forward_rows, dtype=torch.bool, device=device),
        flags=ints(requests),
        path=ints(requests, nodes),
        kv_source=ints(requests, nodes),
    )


@library.register(
    "accept_tree(Tensor target_logits, Tensor query_start_loc, Tensor cu_num_logits, Tensor logits_indices, Tensor token_ids, "
    "Tensor positions, Tensor parents, Tensor? draft_logits, Tensor? draft_temperature, Tensor? temperature, Tensor? seed, "
    "Tensor? state_indices, Tensor(a!) tokens, Tensor(b!) num_accepted, Tensor(c!) num_emitted, Tensor(d!) num_rejected, "
    "Tensor(e!) next_token, Tensor(f!) last_row, Tensor(g!) path, Tensor(h!) kv_source, Tensor(i!) commit_mask, "
    "Tensor(j!) flags, Tensor(k!)? anchors, Tensor(l!)? anchor_positions, Tensor(m!) counters, Tensor(n!) scratch, int rule, "
    "bool without_replacement) -> ()"
)
def _accept_tree(
    target_logits, query_start_loc, cu_num_logits, logits_indices, token_ids, positions, parents, draft_logits,
    draft_temperature, temperature, seed, state_indices, tokens, num_accepted, num_emitted, num_rejected, next_token, last_row,
    path, kv_source, commit_mask, flags, anchors, anchor_positions, counters, scratch, rule, without_replacement,
):  # fmt: skip
    device = target_logits.device
    kernels = library.kernels("tree", device)
    rows, vocab = target_logits.shape
    requests, nodes = tokens.shape
    draft_vocab = 0 if draft_logits is None else draft_logits.shape[2]
    leaves = -(-max(vocab, draft_vocab) // LEAF)
    config = tree_launch.pick(arch.current(device), leaves, nodes, rule > 0)
    items = -(-nodes // config.group) * -(-leaves // config.chunk)
    if rule > 0:
        items += (nodes - 1) * -(-leaves // (config.group * config.chunk * config.span))
    clean = workspaces.Carver(counters, workspaces.RESERVED)
    ticket = counters[1:2].view(torch.int32)
    group_count = clean.take(requests * nodes, torch.int32)
    per_request = [clean.take(requests, torch.int32) for _ in range(4)]
    take = workspaces.Carver(scratch).take
    width = _width(nodes)
    partials = [take(rows * leaves, dtype) for dtype in (torch.float32, torch.int64, torch.float32, torch.int64)]
    residuals = [take(requests * leaves, torch.int64) for _ in range(2)]
    per_row = take(3 * rows, torch.float32), take(4 * rows, torch.int32), take(rows, torch.int64)
    places = requests * width
    per_node = take(6 * places, torch.float32), take(2 * places, torch.int32), take(places, torch.int64)
    record = take(2 * requests, torch.int32)

    def stride(tensor, dim):
        return 0 if tensor is None else tensor.stride(dim)

    kernels.launch_accept_tree(
        requests * items,
        (
            target_logits, query_start_loc, cu_num_logits, logits_indices, token_ids, positions, parents, draft_logits,
            draft_temperature, temperature, seed, state_indices, tokens, num_accepted, num_emitted, num_rejected, next_token,
            last_row, path, kv_source, commit_mask, flags, anchors, anchor_positions, ticket, group_count, *per_request,
            *partials, *residuals, *per_row, *per_node, record,
            requests, parents.shape[0], rows, commit_mask.shape[0], nodes, vocab, draft_vocab, leaves,
            target_logits.stride(0), stride(draft_logits, 0), stride(draft_logits, 1), stride(anchors, 0),
            stride(anchor_positions, 0),
        ),
        rule=rule,
        without_replacement=without_replacement and rule > 0,
        leaves=max(4, 1 << (leaves - 1).bit_length()),
        width=width,
        config=config,
    )  # fmt: skip
