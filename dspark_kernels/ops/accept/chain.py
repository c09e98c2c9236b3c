"""accept_chain: lossless acceptance of drafted chains from raw target logits in one launch.

Token rule: accept while u * draft_prob(x) < target_prob(x), then draw from [target - draft]+ or, after the last draft, from the
target. Block rule: keep the longest prefix whose coin passes; coupled rule: follow the token that the noise shared with the draft
gives. Oracle: reference/accept.py. Sources: arXiv 2211.17192 and 2302.01318; 2403.10444; 2408.07978.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import INT_DTYPES, LOGIT_DTYPES, check_choice, check_optional, check_tensor, check_type
from ...kernels.accept.args import (
    Anchors,
    BlockPartials,
    ChainCounters,
    ChainScratch,
    DenseDraft,
    FilterScratch,
    IdMap,
    Layout,
    Limits,
    MapProgress,
    Outputs,
    RowStats,
    Sampling,
    SparseDraft,
    SparseScratch,
    Target,
)
from ...launch import arch
from ...launch.accept import chain as accept_launch
from ...types import Acceptance, DenseProposal, OneHotProposal, SamplingTensors, SparseProposal, VerifyLayout
from .. import sampling as sampling_args

OP = "accept_chain"
LEAF = 1024  # ids per leaf, as in kernels/primitives/mass.py
VALUES, IDS = 12, 4  # numbers per row, as in kernels/accept/rows.py
GROUP_IDS, LISTED = 128, 2048  # of primitives/filters.py: ids per group, numbers kept of a row's candidates
MAP_COLUMNS = 4096  # per item that inverts a draft vocabulary's map, as in kernels/accept/chain.py
MAX_CANDIDATES = 512


def _counter_words(requests: int, drafts: int) -> int:
    # Arrivals of row groups (at most one per row), of requests, of residual items; states; the map's two counters.
    words = workspaces.words_of
    return words(requests * (drafts + 1), torch.int32) + 3 * words(requests, torch.int32) + words(2, torch.int32)


def _scratch_words(requests: int, rows: int, leaves: int) -> int:
    words = workspaces.words_of
    partials = 3 * words(rows * leaves, torch.float32) + 4 * words(rows * leaves, torch.int64)
    per_row = words(VALUES * rows, torch.float32) + words(IDS * rows, torch.int32)
    # For filters: maxima and numbers of groups, elements of the groups that matter, limits.
    groups = rows * leaves * (LEAF // GROUP_IDS)
    filters = words(groups, torch.float32) + words(groups, torch.int32) + words(rows * LISTED, torch.int32)
    filters += words(rows, torch.int64) + words(rows, torch.int32)
    inverse = words(leaves * LEAF, torch.int32)
    return partials + per_row + filters + inverse + words(requests * LEAF, torch.float32) + words(requests, torch.int32)


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    rows = requests * (drafts + 1)
    return _counter_words(requests, drafts), _scratch_words(requests, rows, -(-vocab // LEAF))


def accept_chain(
    target_logits: Tensor,
    layout: VerifyLayout,
    proposal: OneHotProposal | DenseProposal | SparseProposal | None = None,
    *,
    sampling: SamplingTensors | None = None,
    rule: str = "token",
    logprobs: str | None = None,
    anchors: Tensor | None = None,
    anchor_positions: Tensor | None = None,
    synthetic_rates: Tensor | None = None,
    state_indices: Tensor | None = None,
    out: Acceptance | None = None,
    workspace: workspaces.Workspace | None = None,
) -> Acceptance:
    """Judge every request's drafts against the target and emit what follows, in one launch.

    Args:
        target_logits: [L, V] bf16, fp16 or fp32, last dimension contiguous; row j belongs to layout.logits_indices[j].
        layout: which rows and drafts belong to which request (drafts are read from layout.token_ids).
        proposal: the law the drafts were drawn from; None = one-hot. Dense: its logits [S, K, Vd] and, if given, its lse; columns
            beyond V, or that draft_to_target maps to no id, hold mass that no target has. Sparse: 1 to 512 candidates in any
            order; entries of one id count as one id with their sum, ids outside the vocabulary keep their mass to themselves.
            The coupled rule and forced acceptance read none.
        sampling: settings per slot; None = every row greedy. All of them act inside: token_bitmask has a row per row of
            target_logits, penalties see the drafts before a row as emitted.
        rule: "token", "block" or "coupled"; greedy rows are greedy under each.
        logprobs: "raw" (softmax of target_logits as they came, at temperature 1) or "processed" (the law that tokens were drawn
            from; greedy: all mass on the arg-max) adds `Acceptance.logprobs`: ln of the probability of each emitted token, -inf
            for a token without probability (a row without any finite logit, a forced draft), 0 beyond num_emitted.
        synthetic_rates: fp32 [K], for load tests: draft k is accepted with this chance, given its predecessors, by the ACCEPT
            coins and whatever the laws say (not beyond a row without finite logits, nor an id outside the vocabulary); the
            token that follows is drawn as after a last draft, from the target's law. Not lossless.
        anchors, anchor_positions: int64 or int32 [S], advanced in place to the next round's anchor if given.
        state_indices: int32 [R], state slot of each row, -1 = padding row.
        out, workspace: with both, nothing is allocated.

    Returns:
        Acceptance; tokens is [R, K + 1] with K = layout.max_drafts, else the proposal's K, else L - 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    check_tensor("target_logits", target_logits, dtype=LOGIT_DTYPES, shape=("L", "V"), last_contiguous=True)
    check_type("layout", layout, VerifyLayout)
    rows, vocab = target_logits.shape
    device = target_logits.device
    requests, forward_rows = layout.draft_lens.shape[0], layout.token_ids.shape[0]
    check_tensor("layout.draft_lens", layout.draft_lens, device=device)
    if layout.logits_indices.shape[0] < rows:
        raise ValueError(
            f"layout.logits_indices: expected an entry for each of the {rows} rows of target_logits, got "
            f"{layout.logits_indices.shape[0]}"
        )
    if requests and (vocab == 0 or rows == 0):
        raise ValueError(f"target_logits: expected L >= 1 and V >= 1, got shape {list(target_logits.shape)}")
    check_choice("rule", rule, ("token", "block", "coupled"))
    check_choice("logprobs", logprobs, (None, "raw", "processed"))
    check_optional("state_indices", state_indices, dtype=torch.int32, shape=(requests,), device=device, contiguous=True)
    slots = requests if state_indices is None else None
    sampling_args.check_sampling(sampling, slots=slots, vocab=vocab, mask_shape=(rows,), device=device)
    if sampling is not None and slots is None:
        slots = sampling.temperature.shape[0]
    law = _check_proposal(proposal, slots, device)
    for name, tensor in (("anchors", anchors), ("anchor_positions", anchor_positions)):
        check_optional(name, tensor, dtype=INT_DTYPES, shape=("S" if slots is None else slots,), device=device)
    logits = None if law is None else law.logits
    drafts = _width(layout, logits, rows)
    if logits is not None and logits.shape[1] < drafts:
        raise ValueError(f"proposal.logits: expected K >= layout.max_drafts = {drafts}, got K = {logits.shape[1]}")
    if synthetic_rates is not None:
        check_tensor("synthetic_rates", synthetic_rates, dtype=torch.float32, shape=(drafts,), device=device, contiguous=True)
        if sampling is None:
            raise ValueError("sampling: expected SamplingTensors, whose seeds give the coins of synthetic_rates, got None")
    if out is None:
        out = _allocate(requests, drafts, forward_rows, device, logprobs is not None)
    else:
        _check_out(out, requests, drafts, forward_rows, device, logprobs is not None)
    if requests == 0:
        return out
    if sampling is None or rule == "coupled" or synthetic_rates is not None:
        law = logits = None  # these do not ask how a draft was drawn
    sparse, dense = isinstance(law, SparseProposal), isinstance(law, DenseProposal)
    leaves = _leaves(vocab, None if sparse else logits)
    counters, scratch = workspaces.lend(OP, workspace, max(requests, -(-rows // (drafts + 1))), drafts, leaves * LEAF, device)
    _accept_chain(
        target_logits,
        layout.query_start_loc,
        layout.cu_num_logits,
        layout.logits_indices,
        layout.token_ids,
        layout.positions,
        logits,
        law.ids if sparse else None,
        None if law is None or sparse else law.lse,
        None if law is None else law.temperature,
        law.draft_to_target if dense else None,
        *sampling_args.flatten(sampling),
        synthetic_rates,
        state_indices,
        rule,
        logprobs,
        out.tokens,
        out.num_accepted,
        out.num_emitted,
        out.num_rejected,
        out.next_token,
        out.last_row,
        out.commit_mask,
        out.flags,
        out.logprobs if logprobs is not None else None,
        anchors,
        anchor_positions,
        counters,
        scratch,
    )
    return out


def _check_proposal(proposal, slots, device) -> DenseProposal | SparseProposal | None:
    """The proposal; None where the drafts stand for themselves."""
    if proposal is None or isinstance(proposal, OneHotProposal):
        return None
    check_type("proposal", proposal, (DenseProposal, SparseProposal))
    shape = ["S" if slots is None else slots, "K", "Vd"]
    if isinstance(proposal, SparseProposal):
        shape[2] = "C"
        if not 1 <= proposal.logits.shape[-1] <= MAX_CANDIDATES:
            raise ValueError(f"proposal.logits: expected 1 to {MAX_CANDIDATES} candidates, got {proposal.logits.shape[-1]}")
    check_tensor("proposal.logits", proposal.logits, shape=tuple(shape), device=device)
    return proposal


def _width(layout, draft_logits, rows) -> int:
    if layout.max_drafts is not None:
        return layout.max_drafts
    return draft_logits.shape[1] if draft_logits is not None else max(rows - 1, 0)


def _leaves(vocab: int, draft_logits: Tensor | None) -> int:
    return -(-max(vocab, 0 if draft_logits is None else draft_logits.shape[2]) // LEAF)


def _allocate(requests, drafts, forward_rows, device, logprobs) -> Acceptance:
    def ints():
        return torch.empty(requests, dtype=torch.int32, device=device)

    return Acceptance(
        tokens=torch.empty(requests, drafts + 1, dtype=torch.int64, device=device),
        num_accepted=ints(),
        num_emitted=ints(),
        num_rejected=ints(),
        next_token=torch.empty(requests, dtype=torch.int64, device=device),
        last_row=ints(),
        # Without requests nothing is launched, and no row is committed.
        commit_mask=(torch.empty if requests else torch.zeros)(forward_rows, dtype=torch.bool, device=device),
        flags=ints(),
        logprobs=torch.empty(requests, drafts + 1, device=device) if logprobs else None,
    )


def _check_out(out, requests, drafts, forward_rows, device, logprobs):
    check_type("out", out, Acceptance)
    check_tensor("out.tokens", out.tokens, shape=(requests, drafts + 1), device=device)
    check_tensor("out.commit_mask", out.commit_mask, shape=(forward_rows,), device=device)
    if logprobs:
        check_tensor("out.logprobs", out.logprobs, shape=(requests, drafts + 1), device=device)


@library.register(
    "accept_chain(Tensor target_logits, Tensor query_start_loc, Tensor cu_num_logits, Tensor logits_indices, Tensor token_ids, "
    "Tensor positions, Tensor? draft_logits, Tensor? draft_ids, Tensor? draft_lse, Tensor? draft_temperature, "
    "Tensor? draft_to_target, " + sampling_args.SCHEMA + ", Tensor? rates, "
    "Tensor? state_indices, str rule, str? logprobs, Tensor(a!) tokens, Tensor(b!) num_accepted, Tensor(c!) num_emitted, "
    "Tensor(d!) num_rejected, Tensor(e!) next_token, Tensor(f!) last_row, Tensor(g!) commit_mask, "
    "Tensor(h!) flags, Tensor(m!)? log_probs, Tensor(i!)? anchors, Tensor(j!)? anchor_positions, Tensor(k!) counters, "
    "Tensor(l!) scratch) -> ()"
)
def _accept_chain(
    target_logits, query_start_loc, cu_num_logits, logits_indices, token_ids, positions, draft_logits, draft_ids, draft_lse,
    draft_temperature, draft_to_target, temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask,
    listed, counts, repetition, presence, frequency, joint, rates, state_indices, rule, logprobs, tokens, num_accepted,
    num_emitted, num_rejected, next_token, last_row, commit_mask, flags, log_probs, anchors, anchor_positions, counters, scratch,
):  # fmt: skip
    device = target_logits.device
    kernels = library.kernels("accept.chain", device)
    rows, vocab = target_logits.shape
    requests, drafts = tokens.shape[0], tokens.shape[1] - 1
    flat = sampling_args.Flat(
        temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed, counts, repetition, presence, frequency, joint
    )

    verify, kind = rule, "sparse"
    if temperature is None or rule == "coupled":
        verify, kind = "match", "none"
    if rates is not None:
        verify, kind = "forced", "none"
    if drafts == 0:
        verify, kind = "match", "none"  # plain sampling: there is nothing to verify
    draws = temperature is not None and rule != "coupled"
    if kind == "sparse" and draft_logits is not None and draft_ids is None:
        kind = "stored" if draft_to_target is None else "mapped"
    dense = kind in ("stored", "mapped")
    two_phases = dense or (kind == "sparse" and verify == "block")
    leaves = _leaves(vocab, draft_logits if dense else None)
    swept = dense and draft_lse is None
    heavy = swept or draft_ids is not None or target_logits.dtype == torch.float32
    config = accept_launch.pick(arch.current(device), leaves, drafts, heavy, flat.adjusts, flat.filters is not None)
    parts = -(-leaves // (config.group * config.chunk)) if dense else 1
    map_parts = -(-draft_logits.shape[2] // MAP_COLUMNS) if kind == "mapped" else 0
    items = -(-(drafts + 1) // config.group) * -(-leaves // config.chunk)
    if two_phases:
        items += parts * (drafts if verify == "block" else 1)

    take = workspaces.Carver(counters, workspaces.RESERVED).take
    ticket = counters[1:2].view(torch.int32)
    arrivals = ChainCounters(ticket, take(requests * (drafts + 1), torch.int32), *(take(requests, torch.int32) for _ in range(3)))
    map_progress = take(2, torch.int32)
    take = workspaces.Carver(scratch).take
    top, draft_top, raw_top = (take(rows * leaves, torch.float32) for _ in range(3))
    mass, draft_mass, residual, raw_mass = (take(rows * leaves, torch.int64) for _ in range(4))
    stats = RowStats(take(VALUES * rows, torch.float32), take(IDS * rows, torch.int32))
    patch = take(requests * LEAF, torch.float32)
    accepted = take(requests, torch.int32)
    inverse = take(leaves * LEAF, torch.int32)
    num_groups = leaves * (LEAF // GROUP_IDS)
    filters = FilterScratch(
        take(rows * num_groups, torch.float32), take(rows * num_groups, torch.int32), take(rows * LISTED, torch.int32)
    )
    limits = Limits(take(rows, torch.int64), take(rows, torch.int32))

    draft, candidates = None, 1
    if dense:
        draft = DenseDraft(
            draft_logits, draft_lse, draft_logits.stride(0), draft_logits.stride(1), _stride(draft_lse, 0), draft_logits.shape[2],
            IdMap(draft_to_target, inverse) if kind == "mapped" else None,
        )  # fmt: skip
    elif kind == "sparse" and draft_ids is not None:
        draft = SparseDraft(
            draft_ids, draft_logits, *draft_ids.stride()[:2], *draft_logits.stride()[:2], draft_logits.shape[2]
        )  # fmt: skip
        candidates = 1 << (draft_logits.shape[2] - 1).bit_length()
    by_slot = [t for t in (temperature, draft_logits, anchors, anchor_positions) if t is not None]
    num_slots = by_slot[0].shape[0] if by_slot else 2**31 - 1  # without any, a slot number is not used to reach memory
    kernels.launch_accept_chain(
        map_parts + requests * items,
        (
            Target(target_logits, target_logits.stride(0), sampling_args.adjust_settings(flat) if flat.adjusts else None),
            Layout(query_start_loc, cu_num_logits, logits_indices, token_ids, positions),
            draft,
            Sampling(draft_temperature, temperature, seed, flat.filters),
            rates,
            state_indices,
            Outputs(
                tokens, num_accepted, num_emitted, num_rejected, next_token, last_row, commit_mask, flags, log_probs,
                Anchors(anchors, _stride(anchors, 0), anchor_positions, _stride(anchor_positions, 0)),
            ),
            arrivals,
            MapProgress(map_progress, map_progress[1:]) if kind == "mapped" else None,
            ChainScratch(
                # Best keys are needed where no residual is.
                target=BlockPartials(top, mass, residual if rule == "coupled" and temperature is not None else None),
                raw=BlockPartials(raw_top, raw_mass) if logprobs == "raw" else None,
                draft=BlockPartials(draft_top, draft_mass) if swept else None,
                residual_ptr=residual,
                sparse=SparseScratch(draft_mass, patch),
                filters=None if flat.filters is None else filters,
                limits=None if flat.filters is None else limits,
                stats=stats,
                accepted_ptr=accepted,
            ),
            requests, num_slots, rows, commit_mask.shape[0], drafts, vocab, leaves, parts, map_parts,
        ),
        rule=verify,
        proposal=kind,
        two_phases=two_phases,
        draws=draws,
        joint=joint and flat.filters is not None,
        candidates=candidates,
        leaves=max(4, 1 << (leaves - 1).bit_length()),
        groups=1 if flat.filters is None else 1 << (num_groups - 1).bit_length(),
        width=max(2, 1 << drafts.bit_length()),
        config=config,
    )  # fmt: skip


def _stride(tensor: Tensor | None, dim: int) -> int:
    return 0 if tensor is None else tensor.stride(dim)
