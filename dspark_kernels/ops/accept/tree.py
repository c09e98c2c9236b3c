"""accept_tree: lossless acceptance of draft trees from raw target logits, in one launch.

Rules walk, recursive, traversal: reference/tree.py, which is the oracle. Sources: SpecInfer arXiv 2305.09781, Sequoia arXiv
2402.12374, traversal verification arXiv 2505.12398.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import INT_DTYPES, LOGIT_DTYPES, check_choice, check_optional, check_tensor, check_type
from ...kernels.accept.args import (
    Anchors,
    BlockPartials,
    DenseDraft,
    FilterScratch,
    IdMap,
    Layout,
    Limits,
    MapProgress,
    NodeState,
    Outputs,
    RowStats,
    Sampling,
    SparseDraft,
    Target,
    TreeCounters,
    TreeOutputs,
    TreeResidual,
    TreeRowStats,
    TreeScratch,
)
from ...launch import arch
from ...launch.accept import tree as tree_launch
from ...types import Acceptance, DenseProposal, DraftTree, OneHotProposal, SamplingTensors, SparseProposal, VerifyLayout
from .. import sampling as sampling_args
from .chain import GROUP_IDS, IDS, LEAF, LISTED, MAP_COLUMNS, MAX_CANDIDATES, VALUES

OP = "accept_tree"
RULES = ("walk", "recursive", "traversal")  # in the order of the kernel's constants
NODE_VALUES, NODE_IDS = 6, 2  # numbers per node between sweeps, as in kernels/accept/tree_rules.py


def _width(nodes: int) -> int:
    return max(2, 1 << (nodes - 1).bit_length())


def _counter_words(requests: int, nodes: int) -> int:
    # Arrivals of node groups (at most one per node); of requests, of a sweep, of all sweeps; sweeps published; an inverted map's.
    words = workspaces.words_of
    return words(requests * nodes, torch.int32) + 4 * words(requests, torch.int32) + words(2, torch.int32)


def _scratch_words(requests: int, rows: int, nodes: int, leaves: int) -> int:
    words = workspaces.words_of
    partials = 3 * words(rows * leaves, torch.float32) + 3 * words(rows * leaves, torch.int64)
    records = words(VALUES * rows, torch.float32) + words(IDS * rows, torch.int32)
    records += words(rows, torch.int64) + words(rows, torch.int32)
    places = requests * _width(nodes)
    states = words(NODE_VALUES * places, torch.float32) + words(NODE_IDS * places, torch.int32) + words(places, torch.int64)
    states += words(2 * requests, torch.int32)
    groups = rows * leaves * (LEAF // GROUP_IDS)
    filters = words(groups, torch.float32) + words(groups, torch.int32) + words(rows * LISTED, torch.int32)
    filters += words(rows, torch.int64) + words(rows, torch.int32)
    inverse = words(leaves * LEAF, torch.int32)
    return partials + 2 * words(requests * leaves, torch.int64) + records + states + filters + inverse


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
    logprobs: str | None = None,
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
        tree: parents, with penalties ancestors, and for "recursive" and "traversal" of sampled trees the law of every node's
            children: a dense or sparse proposal, row m for node m, and how they were drawn.
        sampling: settings per slot; None = every row greedy. All of them act inside, along each node's own path: token_bitmask has
            a row per row of target_logits, penalties see the nodes from the anchor's child to the row's as emitted, and no sibling.
        rule: "walk", "recursive" or "traversal". Greedy requests and trees made without chance are walked under each: there the
            three emit the same law, and none keeps more.
        logprobs: "raw" (softmax of target_logits as they came, at temperature 1) or "processed" (the target's law, after
            all settings; greedy: all mass on the arg-max) adds `Acceptance.logprobs` [R, M]: ln of the probability of each emitted
            token, -inf for a token without probability, 0 beyond num_emitted.
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
    check_choice("logprobs", logprobs, (None, "raw", "processed"))
    check_optional("state_indices", state_indices, dtype=torch.int32, shape=(requests,), device=device, contiguous=True)
    if state_indices is None and slots != requests:
        raise ValueError(f"tree.tokens: expected {requests} rows (one per request, no state_indices), got {slots}")
    sampling_args.check_sampling(sampling, slots=slots, vocab=vocab, mask_shape=(rows,), device=device)
    law = _check_proposal(tree, slots, nodes, device)
    for name, tensor in (("anchors", anchors), ("anchor_positions", anchor_positions)):
        check_optional(name, tensor, dtype=INT_DTYPES, shape=(slots,), device=device)
    out = _output(out, requests, nodes, forward_rows, device, logprobs is not None)
    if requests == 0:
        return out
    if sampling is None or rule == "walk" or nodes == 1:
        law = None
    dense = isinstance(law, DenseProposal)
    leaves = -(-max(vocab, law.logits.shape[2] if dense else 0) // LEAF)
    counters, scratch = workspaces.lend(OP, workspace, max(requests, -(-rows // nodes)), nodes - 1, leaves * LEAF, device)
    _accept_tree(
        target_logits, layout.query_start_loc, layout.cu_num_logits, layout.logits_indices, layout.token_ids, layout.positions,
        tree.parents, tree.ancestors, None if law is None else law.logits, law.ids if isinstance(law, SparseProposal) else None,
        None if law is None else law.temperature, law.draft_to_target if dense else None, *sampling_args.flatten(sampling),
        state_indices, out.tokens, out.num_accepted, out.num_emitted, out.num_rejected, out.next_token, out.last_row, out.path,
        out.kv_source, out.commit_mask, out.flags, out.logprobs if logprobs is not None else None, anchors, anchor_positions,
        counters, scratch, 0 if law is None else RULES.index(rule), tree.drawn == "without_replacement", logprobs,
    )  # fmt: skip
    return out


def _check_proposal(tree, slots, nodes, device) -> DenseProposal | SparseProposal | None:
    """The laws of a tree that was drawn by chance; None where the nodes stand for themselves."""
    proposal = tree.proposal
    if isinstance(proposal, OneHotProposal) or tree.drawn == "one_hot":
        return None
    check_type("tree.proposal", proposal, (DenseProposal, SparseProposal))
    width = "Vd" if isinstance(proposal, DenseProposal) else "C"
    if width == "C" and not 1 <= proposal.logits.shape[-1] <= MAX_CANDIDATES:
        raise ValueError(f"tree.proposal.logits: expected 1 to {MAX_CANDIDATES} candidates, got {proposal.logits.shape[-1]}")
    check_tensor("tree.proposal.logits", proposal.logits, shape=(slots, nodes, width), device=device)
    return proposal


def _output(out, requests, nodes, forward_rows, device, logprobs) -> Acceptance:
    """The caller's result, checked, or a new one."""
    if out is not None:
        check_type("out", out, Acceptance)
        check_tensor("out.tokens", out.tokens, shape=(requests, nodes), device=device)
        check_tensor("out.commit_mask", out.commit_mask, shape=(forward_rows,), device=device)
        for name in ("path", "kv_source"):
            check_tensor(f"out.{name}", getattr(out, name), dtype=torch.int32, shape=(requests, nodes), device=device)
        if logprobs:
            check_tensor("out.logprobs", out.logprobs, shape=(requests, nodes), device=device)
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
        logprobs=torch.empty(requests, nodes, device=device) if logprobs else None,
        path=ints(requests, nodes),
        kv_source=ints(requests, nodes),
    )


@library.register(
    "accept_tree(Tensor target_logits, Tensor query_start_loc, Tensor cu_num_logits, Tensor logits_indices, Tensor token_ids, "
    "Tensor positions, Tensor parents, Tensor ancestors, Tensor? draft_logits, Tensor? draft_ids, Tensor? draft_temperature, "
    "Tensor? draft_to_target, " + sampling_args.SCHEMA + ", Tensor? state_indices, Tensor(a!) tokens, Tensor(b!) num_accepted, "
    "Tensor(c!) num_emitted, Tensor(d!) num_rejected, Tensor(e!) next_token, Tensor(f!) last_row, Tensor(g!) path, "
    "Tensor(h!) kv_source, Tensor(i!) commit_mask, Tensor(j!) flags, Tensor(o!)? log_probs, Tensor(k!)? anchors, "
    "Tensor(l!)? anchor_positions, Tensor(m!) counters, Tensor(n!) scratch, int rule, bool without_replacement, str? logprobs) "
    "-> ()"
)
def _accept_tree(
    target_logits, query_start_loc, cu_num_logits, logits_indices, token_ids, positions, parents, ancestors, draft_logits,
    draft_ids, draft_temperature, draft_to_target, temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed,
    counts, repetition, presence, frequency, joint, state_indices, tokens, num_accepted, num_emitted, num_rejected, next_token,
    last_row, path, kv_source, commit_mask, flags, log_probs, anchors, anchor_positions, counters, scratch, rule,
    without_replacement, logprobs,
):  # fmt: skip
    device = target_logits.device
    kernels = library.kernels("accept.tree", device)
    rows, vocab = target_logits.shape
    requests, nodes = tokens.shape
    flat = sampling_args.Flat(
        temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed, counts, repetition, presence, frequency, joint
    )
    kind, draft, candidates, wide = "none", None, 1, 0
    if rule > 0:
        kind = "sparse" if draft_ids is not None else "stored" if draft_to_target is None else "mapped"
        wide = draft_logits.shape[2]
    leaves = -(-max(vocab, wide if kind in ("stored", "mapped") else 0) // LEAF)
    changed = any(setting is not None for setting in (top_k, top_p, min_p, logit_bias, token_bitmask, listed))
    config = tree_launch.pick(arch.current(device), leaves, nodes, rule > 0, changed)
    map_parts = -(-wide // MAP_COLUMNS) if kind == "mapped" else 0
    items = -(-nodes // config.group) * -(-leaves // config.chunk)
    if rule > 0:
        items += (nodes - 1) * -(-leaves // (config.tile * config.span))

    take = workspaces.Carver(counters, workspaces.RESERVED).take
    ticket = counters[1:2].view(torch.int32)
    arrivals = TreeCounters(ticket, take(requests * nodes, torch.int32), *(take(requests, torch.int32) for _ in range(4)))
    map_progress = take(2, torch.int32)
    take = workspaces.Carver(scratch).take
    top, draft_top, raw_top = (take(rows * leaves, torch.float32) for _ in range(3))
    mass, draft_mass, raw_mass = (take(rows * leaves, torch.int64) for _ in range(3))
    residual = TreeResidual(take(requests * leaves, torch.int64), take(requests * leaves, torch.int64))
    stats = TreeRowStats(
        RowStats(take(VALUES * rows, torch.float32), take(IDS * rows, torch.int32)),
        take(rows, torch.int64),
        take(rows, torch.int32),
    )
    places = requests * _width(nodes)
    state = NodeState(
        take(NODE_VALUES * places, torch.float32), take(NODE_IDS * places, torch.int32), take(places, torch.int64),
        take(2 * requests, torch.int32),
    )  # fmt: skip
    num_groups = leaves * (LEAF // GROUP_IDS)
    filters = FilterScratch(
        take(rows * num_groups, torch.float32), take(rows * num_groups, torch.int32), take(rows * LISTED, torch.int32)
    )
    limits = Limits(take(rows, torch.int64), take(rows, torch.int32))
    inverse = take(leaves * LEAF, torch.int32)

    if kind == "sparse":
        draft = SparseDraft(draft_ids, draft_logits, *draft_ids.stride()[:2], *draft_logits.stride()[:2], wide)
        candidates = 1 << (wide - 1).bit_length()
    elif kind != "none":
        id_map = IdMap(draft_to_target, inverse) if kind == "mapped" else None
        draft = DenseDraft(draft_logits, None, *draft_logits.stride()[:2], 0, wide, id_map)
    kernels.launch_accept_tree(
        map_parts + requests * items,
        (
            Target(target_logits, target_logits.stride(0), sampling_args.adjust_settings(flat) if flat.adjusts else None),
            Layout(query_start_loc, cu_num_logits, logits_indices, token_ids, positions),
            parents,
            ancestors if listed is not None else None,
            draft,
            Sampling(draft_temperature, temperature, seed, flat.filters),
            state_indices,
            TreeOutputs(
                Outputs(
                    tokens, num_accepted, num_emitted, num_rejected, next_token, last_row, commit_mask, flags, log_probs,
                    Anchors(anchors, _stride(anchors), anchor_positions, _stride(anchor_positions)),
                ),
                path, kv_source,
            ),
            arrivals,
            MapProgress(map_progress, map_progress[1:]) if kind == "mapped" else None,
            TreeScratch(
                target=BlockPartials(top, mass),
                raw=BlockPartials(raw_top, raw_mass) if logprobs == "raw" else None,
                draft=BlockPartials(draft_top, draft_mass) if kind in ("stored", "mapped") else None,
                residual=residual,
                filters=None if flat.filters is None else filters,
                limits=None if flat.filters is None else limits,
                stats=stats,
                state=state,
            ),
            requests, parents.shape[0], rows, commit_mask.shape[0], nodes, vocab, leaves, map_parts,
        ),
        rule=rule,
        proposal=kind,
        without_replacement=without_replacement and rule > 0,
        joint=joint and flat.filters is not None,
        candidates=candidates,
        leaves=max(4, 1 << (leaves - 1).bit_length()),
        groups=1 if flat.filters is None else 1 << (num_groups - 1).bit_length(),
        width=_width(nodes),
        config=config,
    )  # fmt: skip


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)
