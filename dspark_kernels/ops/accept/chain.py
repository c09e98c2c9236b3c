"""accept_chain: lossless acceptance of drafted chains from raw target logits in one launch.

Token rule: accept while u * draft_prob(x) < target_prob(x), then draw from [target - draft]+ or, after the last draft, from the
target. Block rule: accept the longest prefix whose acceptance uniform passes; coupled rule: follow the token that the noise shared
with the draft gives. Reference: reference/accept.py. Sources: arXiv 2211.17192 and 2302.01318; 2403.10444; 2408.07978.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import check_choice, check_tensor, check_type
from ...choices import CHAIN_RULES, LOG_PROBS, ChainRule, LogProbs
from ...kernels.accept.args import (
    BlockPartials,
    ChainCounters,
    ChainScratch,
    Extent,
    FilterScratch,
    Layout,
    Limits,
    RowStats,
    Sampling,
    SparseScratch,
)
from ...kernels.sizes import FILTER_LIST, MAX_GROUP, ROW_IDS, ROW_VALUES, VOCAB_BLOCK
from ...launch import arch
from ...launch.accept import chain as accept_launch
from ...library import Out
from ...types import Acceptance, DenseProposal, OneHotProposal, Proposal, SamplingTensors, SparseProposal, VerifyLayout
from .. import sampling as sampling_args
from .checks import (
    Emitted,
    LayoutArrays,
    check_anchors,
    check_candidates,
    check_map,
    check_rows,
    drafts_of,
    emitted,
    layout_arrays,
    output,
)
from .records import draft_record, map_parts, map_record, outputs_record, target_record, tile_of, used

OP = "accept_chain"


def counters_of(take: workspaces.Take, requests: int, drafts: int) -> tuple[ChainCounters, Tensor]:
    """Arrival counters, and the two counters of an id map. The ticket is one of the reserved words."""
    groups = take(requests * (drafts + 1), torch.int32)  # at most one per row
    counters = ChainCounters(None, groups, *(take(requests, torch.int32) for _ in range(2)))
    return counters, take(2, torch.int32)


def scratch_of(take: workspaces.Take, requests: int, rows: int, blocks: int) -> tuple[ChainScratch, Tensor]:
    """Scratch of a call with every option, and the inverse of an id map."""
    tops = [take(rows * blocks, torch.float32) for _ in range(3)]
    sums = [take(rows * blocks, torch.int64) for _ in range(4)]
    groups = rows * blocks * (VOCAB_BLOCK // MAX_GROUP)
    residual = sums[2]
    scratch = ChainScratch(
        # Best keys are needed where no residual is; sums of draft rows where no sparse proposal is.
        target=BlockPartials(tops[0], sums[0], residual),
        raw=BlockPartials(tops[2], sums[3]),
        draft=BlockPartials(tops[1], sums[1]),
        residual_ptr=residual,
        stats=RowStats(take(ROW_VALUES * rows, torch.float32), take(ROW_IDS * rows, torch.int32)),
        sparse=SparseScratch(sums[1], take(requests * VOCAB_BLOCK, torch.float32)),
        filters=FilterScratch(take(groups, torch.float32), take(groups, torch.int32), take(rows * 2 * FILTER_LIST, torch.int32)),
        limits=Limits(take(rows, torch.int64), take(rows, torch.int32)),
    )
    return scratch, take(blocks * VOCAB_BLOCK, torch.int32)


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    rows = requests * (drafts + 1)
    scratch = workspaces.measured(scratch_of, requests, rows, -(-vocab // VOCAB_BLOCK))
    return workspaces.measured(counters_of, requests, drafts), scratch


def accept_chain(
    target_logits: Tensor,
    layout: VerifyLayout,
    proposal: OneHotProposal | DenseProposal | SparseProposal | None = None,
    *,
    sampling: SamplingTensors | None = None,
    rule: ChainRule = "token",
    target_scaled: bool = False,
    logprobs: LogProbs | None = None,
    anchors: Tensor | None = None,
    anchor_positions: Tensor | None = None,
    synthetic_rates: Tensor | None = None,
    state_indices: Tensor | None = None,
    out: Acceptance | None = None,
    workspace: workspaces.Workspace | None = None,
) -> Acceptance:
    """Verify every request's drafts against the target, and emit the accepted ones and the next token, in one launch.

    Args:
        target_logits: [L, V] bf16, fp16 or fp32, last dimension contiguous; row j belongs to layout.logits_indices[j].
        layout: which rows and drafts belong to which request (drafts are read from layout.token_ids).
        proposal: the distribution that the drafts were drawn from; None = one-hot. Dense: logits [S, K, Vd] and, if given, lse,
            or probabilities [S, K, V] or packed [num_tokens, V] (`DenseProposal.of_probs`);
            columns beyond V, and columns that draft_to_target maps to no id, are part of the draft distribution but can never be
            accepted. Sparse: 1 to 512 candidates in any order; the probabilities of entries with the same id add up, and ids
            outside the vocabulary stay in the normalisation. The coupled rule and forced acceptance do not read the proposal.
        sampling: settings per slot; None = every row greedy. The op applies them to target_logits: token_bitmask has a row per
            row of target_logits, and penalties count the drafts before a row as emitted.
        rule: "token", "block" or "coupled". Greedy requests are verified greedily under every rule.
        target_scaled: target_logits were divided by the temperature of their request already, so they are not scaled again. The
            temperature of `sampling` still says which requests are greedy (0), and is that of the proposal; filters and bit mask
            act as ever. Bias and penalties, which act before temperature, are refused. Needs [S] fp32 of new memory.
        logprobs: adds `Acceptance.logprobs`, ln of the probability of each emitted token: under "raw" by softmax(target_logits) at
            temperature 1, before any setting; under "processed" by the distribution that tokens are drawn from (greedy: the
            arg-max has probability 1). A token of probability 0 has -inf (a row without any finite logit, a forced draft);
            entries from num_emitted on are 0.
        synthetic_rates: fp32 [K], for load tests, not lossless: draft k is accepted with the probability of its entry, given that
            the drafts before it were, whatever the two distributions are. The token that follows is drawn from the target
            distribution. Acceptance still ends at a row without a finite logit and at an id outside the vocabulary. Rates of a
            mean length: `dspark_kernels.synthetic_rates`.
        anchors, anchor_positions: int64 or int32 [S], advanced in place to the next round's anchor; both or neither.
        state_indices: int32 or int64 [R], request slot of each row, -1 = padding row.
        out, workspace: with both, nothing is allocated.

    Returns:
        Acceptance; tokens is [R, K + 1] with K = layout.max_drafts, else the proposal's K, else L - 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    requests = check_rows(target_logits, layout, state_indices)
    rows, vocab = target_logits.shape
    device = target_logits.device
    check_choice("rule", rule, CHAIN_RULES)
    check_choice("logprobs", logprobs, (None, *LOG_PROBS))
    slots = requests if state_indices is None else None
    sampling_args.check_sampling(sampling, slots=slots, vocab=vocab, mask_shape=(rows,), device=device)
    if sampling is not None and slots is None:
        slots = sampling.temperature.shape[0]
    draft = _check_proposal(proposal, slots, device)
    check_map(draft, vocab)
    check_anchors(anchors, anchor_positions, slots, device)
    logits = None if draft is None else draft.logits
    drafts = drafts_of(layout, logits if logits is not None and logits.dim() == 3 else None, rows)
    if synthetic_rates is not None:
        check_tensor("synthetic_rates", synthetic_rates, dtype=torch.float32, shape=(drafts,), device=device, contiguous=True)
        if sampling is None:
            raise ValueError(
                "sampling: expected SamplingTensors, whose seeds give the acceptance uniforms of synthetic_rates, got None"
            )
    out = output(out, requests, drafts + 1, layout.token_ids.shape[0], device, logprobs=logprobs is not None)
    if requests == 0:
        return out
    if target_scaled:
        sampling, draft = sampling_args.of_scaled_target(sampling, draft)
    if sampling is None or rule == "coupled" or synthetic_rates is not None:
        draft = logits = None  # these do not ask how a draft was drawn
    sparse = draft if isinstance(draft, SparseProposal) else None
    dense = draft if isinstance(draft, DenseProposal) else None
    starts = None if dense is None else dense.starts
    if starts is not None and logits is not None:
        logits = logits[None]
    blocks = _blocks(vocab, None if sparse else logits)
    lent = workspaces.lend(OP, workspace, max(requests, -(-rows // (drafts + 1))), drafts, blocks * VOCAB_BLOCK, device)
    arguments = Arguments(
        target_logits=target_logits,
        layout=layout_arrays(layout),
        draft_logits=logits,
        draft_ids=None if sparse is None else sparse.ids,
        draft_lse=None if dense is None else dense.lse,
        draft_temperature=None if draft is None else draft.temperature,
        draft_to_target=None if dense is None else dense.draft_to_target,
        draft_starts=starts,
        draft_probs=dense is not None and dense.probs,
        sampling=sampling_args.flatten(sampling),
        rates=synthetic_rates,
        state_indices=state_indices,
        rule=rule,
        logprobs=logprobs,
        emitted=emitted(out),
        commit_mask=out.commit_mask,
        flags=out.flags,
        log_probs=out.logprobs if logprobs is not None else None,
        anchors=anchors,
        anchor_positions=anchor_positions,
        lent=lent,
    )
    _accept_chain(arguments)
    return out


def _check_proposal(proposal: Proposal | None, slots: int | None, device: torch.device) -> DenseProposal | SparseProposal | None:
    """The proposal; None where it is one-hot."""
    if proposal is None or isinstance(proposal, OneHotProposal):
        return None
    check_type("proposal", proposal, (DenseProposal, SparseProposal))
    shape: list[int | str] = ["S" if slots is None else slots, "K", "Vd"]
    if isinstance(proposal, DenseProposal) and proposal.starts is not None:
        check_tensor("proposal.starts", proposal.starts, shape=tuple(shape[:1]), device=device)
        shape[:2] = ["num_tokens"]
        if proposal.logits.shape[0] == 0:
            return None  # nobody has a draft
    if isinstance(proposal, SparseProposal):
        shape[2] = "C"
        check_candidates("proposal.logits", proposal.logits)
    check_tensor("proposal.logits", proposal.logits, shape=tuple(shape), device=device)
    return proposal


def _blocks(vocab: int, draft_logits: Tensor | None) -> int:
    return -(-max(vocab, 0 if draft_logits is None else draft_logits.shape[2]) // VOCAB_BLOCK)


class Arguments(NamedTuple):
    """The op as torch.library knows it."""

    target_logits: Tensor
    layout: LayoutArrays
    draft_logits: Tensor | None
    draft_ids: Tensor | None
    draft_lse: Tensor | None
    draft_temperature: Tensor | None
    draft_to_target: Tensor | None
    draft_starts: Tensor | None
    draft_probs: bool
    sampling: sampling_args.Flat
    rates: Tensor | None
    state_indices: Tensor | None
    rule: str
    logprobs: str | None
    emitted: Emitted
    commit_mask: Out[Tensor]
    flags: Out[Tensor]
    log_probs: Out[Tensor | None]
    anchors: Out[Tensor | None]
    anchor_positions: Out[Tensor | None]
    lent: workspaces.Lent


@library.register("accept_chain", Arguments)
def _accept_chain(a: Arguments) -> None:
    device, flat = a.target_logits.device, a.sampling
    kernels = library.kernels("accept.chain", device)
    rows, vocab = a.target_logits.shape
    requests, drafts = a.emitted.tokens.shape[0], a.emitted.tokens.shape[1] - 1
    plan = _plan(a, drafts)
    kind, dense = plan.proposal, plan.dense
    blocks = _blocks(vocab, a.draft_logits if dense else None)
    swept = dense and a.draft_lse is None and not a.draft_probs
    filtered = flat.filters is not None
    residual_rows = (drafts if plan.rule == "block" else 1) if plan.two_phases else 0
    swept_rows = residual_rows if dense else 0  # of a sparse proposal one item sums a row
    if flat.adjusts or filtered:
        work = "wide"
    elif swept or a.draft_ids is not None or a.target_logits.dtype == torch.float32:
        work = "heavy"
    else:
        work = "middle" if a.rule == "coupled" or kind == "mapped" else "light"
    config = accept_launch.pick(arch.current(device), requests, blocks, drafts, swept_rows, work)
    parts = -(-blocks // (config.residual * config.span)) if dense else 1
    items = -(-(drafts + 1) // config.group) * -(-blocks // (config.chunk * config.steps))
    items += parts * residual_rows

    arrivals, map_progress = counters_of(workspaces.Carver(a.lent.counters, workspaces.RESERVED).take, requests, drafts)
    scratch, inverse = scratch_of(workspaces.Carver(a.lent.scratch).take, requests, rows, blocks)
    keyed = a.rule == "coupled" and a.sampling.temperature is not None
    scratch = used(scratch, raw=a.logprobs == "raw", swept=swept, filtered=filtered)
    if not keyed:
        scratch = scratch._replace(target=scratch.target._replace(best_ptr=None))
    draft = None
    if kind != "none":
        draft = draft_record(a.draft_logits, a.draft_ids, a.draft_lse, a.draft_to_target, inverse, a.draft_starts)
    by_slot = [t for t in (flat.temperature, a.draft_logits, a.anchors, a.anchor_positions) if t is not None]
    num_slots = by_slot[0].shape[0] if by_slot else 2**31 - 1  # without any, a slot number is not used to reach memory
    kernels.launch_accept_chain(
        map_parts(draft) + requests * items,
        (
            target_record(a.target_logits, flat), Layout(*a.layout), draft,
            Sampling(a.draft_temperature, flat.temperature, flat.seed, flat.filters, a.rates, a.state_indices),
            outputs_record(a, a.log_probs), arrivals._replace(ticket_ptr=a.lent.counters[1:2].view(torch.int32)),
            map_record(draft, map_progress), scratch,
            requests, num_slots, rows, a.commit_mask.shape[0], Extent(drafts, vocab, blocks),
            config.steps, config.lag, config.span, parts,
        ),
        rule=plan.rule,
        proposal=kind,
        two_phases=plan.two_phases,
        draws=plan.draws,
        config=config,
        **tile_of(draft, blocks, max(2, 1 << drafts.bit_length()), flat),
    )  # fmt: skip


class _Plan(NamedTuple):
    """What a call asks of the kernel."""

    rule: str  # as kernels/accept/chain.py names them
    proposal: str  # "none": drafts are compared with a token of each row
    draws: bool  # whether the token after the drafts is drawn
    two_phases: bool  # whether residuals of whole rows are summed by further work items

    @property
    def dense(self) -> bool:
        return self.proposal in ("stored", "mapped", "probs")


def _plan(a: Arguments, drafts: int) -> _Plan:
    sampled = a.sampling.temperature is not None
    draws = sampled and a.rule != "coupled"
    if a.rates is not None and drafts:
        return _Plan("forced", "none", draws, False)
    if not draws or drafts == 0:  # without drafts: plain sampling, there is nothing to verify
        return _Plan("match", "none", draws, False)
    if a.draft_logits is None or a.draft_ids is not None:
        return _Plan(a.rule, "sparse", draws, a.rule == "block")
    kind = "probs" if a.draft_probs else "stored" if a.draft_to_target is None else "mapped"
    return _Plan(a.rule, kind, draws, True)
