"""accept_partial, accept_finish: lossless acceptance where every rank has the logits of a shard of the vocabulary.

In phases, each one launch per rank with one gather behind it; the finish is one launch, the same on every rank. Oracle: the op on
the whole vocabulary, to the bit where shards start at multiples of 1024 ids. Sources: arXiv 2211.17192, 2302.01318, 2408.07978.

    gathered = ()
    for phase in accept_phases(proposal, sampling=sampling, rule=rule):
        part = accept_partial(target_logits, layout, proposal, phase=phase, gathered=gathered, **common)
        gathered += (all_gather(part),)
    acceptance = accept_finish(target_logits, layout, proposal, gathered=gathered, **common)

| rows, rule | gathers | int64 words per rank: (n)ormalise, (r)esidual, (d)raw |
| --- | --- | --- |
| greedy (sampling=None), coupled | 1 | n: 5 per row |
| token, block; one-hot proposal or none | 2 | n: 5 per row and 1.5 per leaf of each; d: 3 per request |
| token, block; sparse proposal, the same on every rank | 2 | n: 7 and 0.5 per candidate of each row, 2.5 per leaf; d: the same |
| token, block; dense proposal | 3 | the same (without lse 3 per leaf); r: 1 per leaf of one row a request (block: of every row) |

Rows are logit rows, leaves those of 1024 ids that a shard can touch: a row of 151936 ids on 8 ranks has 20, 280 bytes a rank, and
with 64 candidates 712. Bias, bit mask and penalties take no gather: each rank applies them to its ids.

Filters are refused. The threshold of a row is global: it takes the maxima of groups of 128 ids (0.5 word a group, so 75 a row on 8
ranks) in the first part, a phase that searches the elements above the bound they give (each rank its counts and masses per
interval of keys, two or three gathers to fix 32 bits), and one more for the masses of what is kept, before `draw`. A draft
vocabulary with a map is refused: the columns of its ids lie on other ranks than the ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import INT_DTYPES, LOGIT_DTYPES, check_choice, check_optional, check_tensor, check_type, not_yet
from ...kernels.accept.args import (
    Anchors,
    ArrivingRows,
    Cut,
    DraftShard,
    Drawn,
    DrawScratch,
    Gathered,
    Layout,
    Outputs,
    Part,
    RowStats,
    Sampling,
    ShardedDraft,
    ShardLists,
    ShardSums,
    SparseDraft,
    Target,
)
from ...launch import arch
from ...launch.accept import shards as accept_launch
from ...types import Acceptance, DenseProposal, OneHotProposal, SamplingTensors, SparseProposal, VerifyLayout
from .. import sampling as sampling_args
from ..shards import Fields, Shard, check_shard
from . import chain as accept

OP = "accept_partial"
PHASES = ("normalise", "residual", "draw")


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    words, rows = workspaces.words_of, requests * (drafts + 1)
    # A program judges with records of its own: at most one per request and two leaves.
    records = requests * -(-(vocab // accept.LEAF + 2) // 2) * _width(drafts)
    scratch = words(accept.VALUES * records, torch.float32) + words(accept.IDS * records, torch.int32)
    # What listed ids add to their leaves, and one leaf, of every request.
    scratch += words(requests * _leaves(vocab), torch.int64) + words(requests * accept.LEAF, torch.float32)
    return 2 * words(rows, torch.int64) + 2 * words(rows, torch.int32), scratch + words(requests * _width(drafts), torch.int64)


def _width(drafts: int) -> int:
    return max(2, 1 << drafts.bit_length())


def _leaves(vocab: int) -> int:
    return max(4, _power(-(-vocab // accept.LEAF)))


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _fields(phase: str, requests: int, rows: int, shard: Shard, masses: bool, draft_masses: bool, every_row: bool,
            candidates: int) -> Fields:  # fmt: skip
    """What a part of `phase` holds: masses where the rule draws, draft_masses where the proposal is summed here; candidates of a
    list, 0 = no list."""
    leaves = shard.blocks(accept.LEAF)
    if phase == "normalise":
        fields = dict(row_words=(torch.int64, (rows, 4)), row_logits=(torch.float32, (rows, 2)))
        if masses:
            fields |= dict(mass=(torch.int64, (rows, leaves)), top=(torch.float32, (rows, leaves)))
        if draft_masses:
            fields |= dict(draft_mass=(torch.int64, (rows, leaves)), draft_top=(torch.float32, (rows, leaves)))
        if candidates:
            fields |= dict(rest=(torch.int64, (rows, leaves)), listed=(torch.float32, (rows, candidates)))
            fields |= dict(laws=(torch.float32, (rows, 3)), owners=(torch.int32, (rows,)))
    elif phase == "residual":
        fields = dict(residual=(torch.int64, (rows if every_row else requests, leaves)))
    else:
        fields = dict(word=(torch.int64, (requests,)), verdict=(torch.int64, (requests, 2)))
    return Fields(**fields)


def accept_phases(
    proposal: OneHotProposal | DenseProposal | SparseProposal | None = None,
    *,
    sampling: SamplingTensors | None = None,
    rule: str = "token",
) -> tuple[str, ...]:
    """The phases of `accept_partial` in their order: one launch and one gather each."""
    check_choice("rule", rule, ("token", "block", "coupled"))
    if sampling is None or rule == "coupled":
        return PHASES[:1]
    return PHASES if isinstance(proposal, DenseProposal) else (PHASES[0], PHASES[2])


def accept_partial(
    target_logits: Tensor,
    layout: VerifyLayout,
    proposal: OneHotProposal | DenseProposal | SparseProposal | None = None,
    *,
    phase: str,
    gathered: tuple[Tensor, ...] = (),
    vocab_start: int,
    vocab_shards: int,
    vocab_size: int | None = None,
    sampling: SamplingTensors | None = None,
    rule: str = "token",
    state_indices: Tensor | None = None,
    out: Tensor | None = None,
    workspace: workspaces.Workspace | None = None,
) -> Tensor:
    """This rank's part of a phase, in one launch.

    Args:
        target_logits: [L, W] bf16, fp16 or fp32: this rank's columns, the same W on every rank. Columns of ids from vocab_size on
            are ignored.
        layout, sampling, rule, state_indices: as in `accept_chain`, the same on every rank, for all of the vocabulary.
        proposal: as in `accept_chain`; dense: this rank's columns of the logits [S, K, W], lse of whole rows; sparse: the same on
            every rank.
        phase: one of `accept_phases(proposal, sampling=sampling, rule=rule)`.
        gathered: the parts of the phases before, of all ranks: int64 [vocab_shards, words] each.
        vocab_start, vocab_shards, vocab_size: first id of this rank, number of ranks, ids in all (default W * vocab_shards).
        out: int64 part to write. What no rank reads (rows of no request, residuals that nobody needs) is left alone.
        workspace: for a sparse proposal one made for all of the vocabulary, else for a shard is enough.

    Returns:
        The part, to be gathered over ranks into [vocab_shards, words], in the order of their ids.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument of the wrong type, dtype, shape, device or stride, or of a kind that
        shards do not have (filters, reduced draft vocabularies).
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    call = _check(target_logits, layout, proposal, vocab_start, vocab_shards, vocab_size, sampling, rule, state_indices)
    device = target_logits.device
    check_choice("phase", phase, call.phases)
    call.check_gathered(gathered, call.phases.index(phase))
    part = call.fields(phase).check_part(out, device)
    if call.requests == 0:
        return part
    counters, scratch = call.lend(workspace)
    _accept_partial(
        target_logits,
        layout.cu_num_logits,
        layout.logits_indices,
        layout.token_ids,
        layout.positions,
        *call.draft_arguments(),
        *sampling_args.flatten(sampling),
        state_indices,
        list(gathered),
        part,
        counters,
        scratch,
        call.requests,
        call.drafts,
        phase,
        rule if call.draws else "match",
        call.shard.start,
        call.shard.count,
        call.shard.vocab,
    )
    return part


def accept_finish(
    target_logits: Tensor,
    layout: VerifyLayout,
    proposal: OneHotProposal | DenseProposal | SparseProposal | None = None,
    *,
    gathered: tuple[Tensor, ...],
    vocab_start: int,
    vocab_shards: int,
    vocab_size: int | None = None,
    sampling: SamplingTensors | None = None,
    rule: str = "token",
    anchors: Tensor | None = None,
    anchor_positions: Tensor | None = None,
    state_indices: Tensor | None = None,
    out: Acceptance | None = None,
    workspace: workspaces.Workspace | None = None,
) -> Acceptance:
    """What every request emits, from the parts of all ranks, in one launch, the same bits on every rank.

    Args:
        gathered: int64 [vocab_shards, words] of every phase, in the order of `accept_phases`.
        anchors, anchor_positions: as in `accept_chain`, advanced in place if given.
        out: an Acceptance to write.
        The rest as in `accept_partial`; the logits themselves are not read.

    Returns:
        Acceptance.
    """
    call = _check(target_logits, layout, proposal, vocab_start, vocab_shards, vocab_size, sampling, rule, state_indices)
    device, slots = target_logits.device, call.slots
    call.check_gathered(gathered, len(call.phases))
    for name, tensor in (("anchors", anchors), ("anchor_positions", anchor_positions)):
        check_optional(name, tensor, dtype=INT_DTYPES, shape=("S" if slots is None else slots,), device=device)
    forward_rows = layout.token_ids.shape[0]
    if out is None:
        out = accept._allocate(call.requests, call.drafts, forward_rows, device, False)
    else:
        accept._check_out(out, call.requests, call.drafts, forward_rows, device, False)
    if call.requests == 0:
        return out
    by_slot = [t for t in (None if sampling is None else sampling.temperature, anchors, anchor_positions) if t is not None]
    _, scratch = call.lend(workspace)
    _accept_finish(
        list(gathered),
        layout.query_start_loc,
        layout.cu_num_logits,
        layout.logits_indices,
        layout.token_ids,
        layout.positions,
        *call.draft_arguments(),
        None if sampling is None else sampling.temperature,
        state_indices,
        out.tokens,
        out.num_accepted,
        out.num_emitted,
        out.num_rejected,
        out.next_token,
        out.last_row,
        out.commit_mask,
        out.flags,
        anchors,
        anchor_positions,
        scratch,
        by_slot[0].shape[0] if by_slot else 2**31 - 1,  # without any, a slot number is not used to reach memory
        call.rows,
        call.shard.width,
        call.shard.count,
        call.shard.vocab,
        rule if call.draws else "match",
    )
    return out


def part_words(target_logits, layout, proposal=None, *, phase, vocab_start, vocab_shards, vocab_size=None, sampling=None,
               rule="token", state_indices=None) -> int:  # fmt: skip
    """Size of the part of a phase: int64 words, the same on every rank."""
    call = _check(target_logits, layout, proposal, vocab_start, vocab_shards, vocab_size, sampling, rule, state_indices)
    return call.fields(check_choice("phase", phase, call.phases)).words


class _Call:
    """What the arguments of a call say about sizes."""

    def __init__(self, requests, rows, drafts, slots, shard, law, phases, rule, device):
        self.requests, self.rows, self.drafts, self.slots = requests, rows, drafts, slots
        self.shard, self.phases, self.draws = shard, phases, len(phases) > 1
        self._law, self._rule, self._device = law, rule, device
        self._candidates = law.ids.shape[2] if isinstance(law, SparseProposal) else 0

    def fields(self, phase: str) -> Fields:
        sums = isinstance(self._law, DenseProposal) and self._law.lse is None
        return _fields(phase, self.requests, self.rows, self.shard, self.draws, sums, self._rule == "block", self._candidates)

    def draft_arguments(self) -> tuple:
        """(logits, ids, lse, temperature) of the law of the drafts, each a tensor or None."""
        law = self._law
        if law is None:
            return None, None, None, None
        return law.logits, *((law.ids, None) if self._candidates else (None, law.lse)), law.temperature

    def lend(self, workspace):
        requests = max(self.requests, -(-self.rows // (self.drafts + 1)))
        vocab = max(self.shard.width, self.shard.vocab) if self._candidates else self.shard.width
        return workspaces.lend(OP, workspace, requests, self.drafts, vocab, self._device)

    def check_gathered(self, gathered, count):
        check_type("gathered", gathered, (tuple, list))
        if len(gathered) != count:
            raise ValueError(f"gathered: expected the parts of {count} phases, {self.phases[:count]}, got {len(gathered)}")
        for n, phase in enumerate(self.phases[:count]):
            self.fields(phase).check_gathered(f"gathered[{n}]", gathered[n], self.shard, self._device)


def _check(target_logits, layout, proposal, vocab_start, vocab_shards, vocab_size, sampling, rule, state_indices) -> _Call:
    check_tensor("target_logits", target_logits, dtype=LOGIT_DTYPES, shape=("L", "W"), last_contiguous=True)
    check_type("layout", layout, VerifyLayout)
    rows, width = target_logits.shape
    device = target_logits.device
    requests = layout.draft_lens.shape[0]
    check_tensor("layout.draft_lens", layout.draft_lens, device=device)
    if layout.logits_indices.shape[0] < rows:
        raise ValueError(
            f"layout.logits_indices: expected an entry for each of the {rows} rows of target_logits, got "
            f"{layout.logits_indices.shape[0]}"
        )
    if width == 0 or (requests and rows == 0):
        raise ValueError(f"target_logits: expected L >= 1 and W >= 1, got shape {list(target_logits.shape)}")
    shard = check_shard(width, vocab_start, vocab_shards, vocab_size)
    phases = accept_phases(proposal, sampling=sampling, rule=rule)
    check_optional("state_indices", state_indices, dtype=torch.int32, shape=(requests,), device=device, contiguous=True)
    slots = requests if state_indices is None else None
    if sampling is not None:
        sampling_args.check_sampling(sampling, slots=slots, vocab=shard.vocab, mask_shape=(rows,), device=device)
        for name in ("top_k", "top_p", "min_p"):
            if getattr(sampling, name) is not None:
                not_yet(OP, f"sampling.{name}", "filters on vocabulary shards are")
        slots = sampling.temperature.shape[0]
    law = _check_proposal(proposal, slots, width, device)
    drafts = accept._width(layout, None if law is None else law.logits, rows)
    if law is not None and law.logits.shape[1] < drafts:
        raise ValueError(f"proposal.logits: expected K >= layout.max_drafts = {drafts}, got K = {law.logits.shape[1]}")
    if len(phases) == 1:
        law = None  # greedy and coupled rows do not ask how a draft was drawn
    return _Call(requests, rows, drafts, slots, shard, law, phases, rule, device)


def _check_proposal(proposal, slots, width, device) -> DenseProposal | SparseProposal | None:
    if proposal is None or isinstance(proposal, OneHotProposal):
        return None
    check_type("proposal", proposal, (DenseProposal, SparseProposal))
    if isinstance(proposal, SparseProposal):
        return accept._check_proposal(proposal, slots, device)
    if proposal.draft_to_target is not None:
        not_yet(OP, "proposal.draft_to_target", "a reduced draft vocabulary on shards is")
    shape = ("S" if slots is None else slots, "K", width)
    check_tensor("proposal.logits", proposal.logits, shape=shape, device=device)
    return proposal


def _stride(tensor, dim):
    return 0 if tensor is None else tensor.stride(dim)


def _part(fields: Fields, part: Tensor) -> Part:
    """The regions of a part of the first phase; None for those that it does not have."""

    def view(*names):
        return (fields.view(part, name) for name in names)

    return Part(
        *view("row_words", "row_logits"),
        target=ShardSums(*view("top", "mass")),
        draft=ShardSums(*view("draft_top", "draft_mass")),
        lists=ShardLists(*view("rest", "listed", "laws", "owners")),
    )


def _draft(draft_logits, draft_ids, draft_lse) -> ShardedDraft:
    if draft_logits is None:
        return ShardedDraft(None, None)
    if draft_ids is None:
        return ShardedDraft(DraftShard(draft_logits, draft_lse, *draft_logits.stride()[:2], _stride(draft_lse, 0)), None)
    strides = (*draft_ids.stride()[:2], *draft_logits.stride()[:2])
    return ShardedDraft(None, SparseDraft(draft_ids, draft_logits, *strides, draft_logits.shape[2]))


def _stats(carver: workspaces.Carver, programs: int, drafts: int) -> RowStats:
    count = programs * _width(drafts)
    return RowStats(carver.take(accept.VALUES * count, torch.float32), carver.take(accept.IDS * count, torch.int32))


@library.register(
    "accept_partial(Tensor target_logits, Tensor cu_num_logits, Tensor logits_indices, Tensor token_ids, Tensor positions, "
    "Tensor? draft_logits, Tensor? draft_ids, Tensor? draft_lse, Tensor? draft_temperature, " + sampling_args.SCHEMA + ", "
    "Tensor? state_indices, Tensor[] gathered, Tensor(a!) part, Tensor(b!) counters, Tensor(c!) scratch, int requests, int drafts, "
    "str phase, str rule, int vocab_start, int vocab_shards, int vocab_size) -> ()"
)
def _accept_partial(
    target_logits, cu_num_logits, logits_indices, token_ids, positions, draft_logits, draft_ids, draft_lse, draft_temperature,
    temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed, counts, repetition, presence, frequency, joint,
    state_indices, gathered, part, counters, scratch, requests, drafts, phase, rule, vocab_start, vocab_shards, vocab_size,
):  # fmt: skip
    device = target_logits.device
    kernels = library.kernels("accept.shards", device)
    rows, width = target_logits.shape
    shard = Shard(vocab_start, width, vocab_shards, vocab_size)
    leaves, draws = shard.blocks(accept.LEAF), rule != "match"
    draft = _draft(draft_logits, draft_ids, draft_lse)
    sums, candidates = draft.dense is not None and draft_lse is None, 0 if draft.sparse is None else draft_ids.shape[2]
    flat = sampling_args.Flat(
        temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed, counts, repetition, presence, frequency, joint
    )
    target = Target(target_logits, target_logits.stride(0), sampling_args.adjust_settings(flat) if flat.adjusts else None)
    config = accept_launch.pick(arch.current(device), leaves, drafts, flat.adjusts)
    num_slots = temperature.shape[0] if temperature is not None else 2**31 - 1

    def fields(phase):
        return _fields(phase, requests, rows, shard, draws, sums, rule == "block", candidates)

    view = fields(phase).view
    layout = Layout(None, cu_num_logits, logits_indices, token_ids, positions)
    settings = Sampling(draft_temperature, temperature, seed)
    sizes = (requests, num_slots, rows, drafts)
    if phase == "normalise":
        take = workspaces.Carver(counters, workspaces.RESERVED).take
        arriving = ArrivingRows(
            take(rows, torch.int64), take(rows, torch.int64), take(rows, torch.int32), take(requests * (drafts + 1), torch.int32)
        )
        kernels.launch_accept_normalise(
            requests * -(-(drafts + 1) // config.group) * -(-leaves // config.chunk),
            (
                target, layout, draft, settings, state_indices, _part(fields(phase), part), arriving,
                *sizes, shard.start, shard.held, shard.start // accept.LEAF, leaves, vocab_size,
            ),
            noisy=not draws and temperature is not None,
            candidates=_power(max(candidates, 1)),
            config=config,
        )  # fmt: skip
        return
    first = Gathered(_part(fields("normalise"), gathered[0]), gathered[0].stride(0))
    constants = dict(rule=rule, WIDTH=_width(drafts), SHARDS=_power(vocab_shards), config=config)
    carver = workspaces.Carver(scratch)
    if phase == "residual":
        programs = requests * -(-leaves // config.chunk)
        kernels.launch_accept_residual(
            programs,
            (
                target, layout, first, draft.dense, settings, state_indices, view(part, "residual"),
                _stats(carver, programs, drafts),
                *sizes, vocab_shards, shard.start, shard.held, shard.start // accept.LEAF, leaves, vocab_size,
            ),
            **constants,
        )  # fmt: skip
        return
    residual = fields("residual").view(gathered[1], "residual") if len(gathered) > 1 else None
    stats, total = _stats(carver, requests, drafts), carver.take(requests * _width(drafts), torch.int64)
    added = patch = None
    if candidates:
        added = carver.take(requests * _leaves(vocab_size), torch.int64)
        patch = carver.take(requests * accept.LEAF, torch.float32)
    kernels.launch_accept_draw(
        requests,
        (
            target, layout, first, draft, residual, settings, state_indices,
            Drawn(view(part, "word"), view(part, "verdict")),
            DrawScratch(stats, total, added, patch),
            Cut(width, leaves, shard.pieces(accept.LEAF)),
            *sizes, vocab_shards, shard.start, shard.held, vocab_size, _stride(residual, 0),
        ),
        LEAVES=_leaves(vocab_size),
        CANDIDATES=_power(max(candidates, 1)),
        **constants,
    )  # fmt: skip


@library.register(
    "accept_finish(Tensor[] gathered, Tensor query_start_loc, Tensor cu_num_logits, Tensor logits_indices, Tensor token_ids, "
    "Tensor positions, Tensor? draft_logits, Tensor? draft_ids, Tensor? draft_lse, Tensor? draft_temperature, Tensor? temperature, "
    "Tensor? state_indices, Tensor(a!) tokens, Tensor(b!) num_accepted, Tensor(c!) num_emitted, "
    "Tensor(d!) num_rejected, Tensor(e!) next_token, Tensor(f!) last_row, Tensor(g!) commit_mask, Tensor(h!) flags, "
    "Tensor(i!)? anchors, Tensor(j!)? anchor_positions, Tensor(k!) scratch, int slots, int rows, int width, int vocab_shards, "
    "int vocab_size, str rule) -> ()"
)
def _accept_finish(
    gathered, query_start_loc, cu_num_logits, logits_indices, token_ids, positions, draft_logits, draft_ids, draft_lse,
    draft_temperature, temperature, state_indices, tokens, num_accepted, num_emitted, num_rejected, next_token, last_row,
    commit_mask, flags, anchors, anchor_positions, scratch, slots, rows, width, vocab_shards, vocab_size, rule,
):  # fmt: skip
    device = tokens.device
    kernels = library.kernels("accept.shards", device)
    requests, drafts = tokens.shape[0], tokens.shape[1] - 1
    shard, draws = Shard(0, width, vocab_shards, vocab_size), rule != "match"
    draft = _draft(draft_logits, draft_ids, draft_lse)
    leaves, sums, candidates = shard.blocks(accept.LEAF), draft.dense is not None and draft_lse is None, 0
    if draft.sparse is not None:
        candidates = draft_ids.shape[2]

    def fields(phase):
        return _fields(phase, requests, rows, shard, draws, sums, rule == "block", candidates)

    drawn = Drawn(None, None)
    if draws:
        drawn = Drawn(*(fields("draw").view(gathered[-1], name) for name in ("word", "verdict")))
    kernels.launch_accept_finish(
        requests,
        (
            Layout(query_start_loc, cu_num_logits, logits_indices, token_ids, positions),
            Gathered(_part(fields("normalise"), gathered[0]), gathered[0].stride(0)),
            draft.dense,
            drawn,
            Sampling(draft_temperature, temperature, None),
            state_indices,
            Outputs(
                tokens, num_accepted, num_emitted, num_rejected, next_token, last_row, commit_mask, flags, None,
                Anchors(anchors, _stride(anchors, 0), anchor_positions, _stride(anchor_positions, 0)),
            ),
            _stats(workspaces.Carver(scratch), requests, drafts),
            requests, slots, rows, commit_mask.shape[0], drafts, vocab_shards, leaves, vocab_size, gathered[-1].stride(0),
        ),
        WIDTH=_width(drafts),
        SHARDS=_power(vocab_shards),
        config=accept_launch.pick(arch.current(device), leaves, drafts),
    )  # fmt: skip
