"""accept_partial, accept_finish: lossless acceptance where every rank has the logits of a shard of the vocabulary.

In phases, each one launch per rank with one gather behind it; the finish is one launch, the same on every rank. Oracle: the op on
the whole vocabulary, to the bit where shards start at multiples of 1024 ids. Sources: arXiv 2211.17192, 2302.01318, 2408.07978.

    gathered = ()
    for phase in accept_phases(proposal, sampling=sampling, rule=rule):
        part = accept_partial(target_logits, layout, proposal, phase=phase, gathered=gathered, **common)
        gathered += (all_gather(part),)
    acceptance = accept_finish(target_logits, layout, proposal, gathered=gathered, **common)

| rows, rule | gathers | phases: int64 words per rank |
| --- | --- | --- |
| greedy (sampling=None), coupled | 1 | normalise: 5 per row |
| token, one-hot proposal or none | 2 | normalise: 5 per row + 1.5 per row and leaf of 1024 ids; draw: 3 per request |
| token, dense proposal | 3 | the same (twice per leaf without lse), residual: 6 per request + 1 per leaf of one row |

Rows are logit rows, their leaves those a shard can touch. A row of 151936 ids on 8 ranks is 20 leaves and 280 bytes per rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import library, workspace as workspaces
from ..checks import INT_DTYPES, LOGIT_DTYPES, check_choice, check_optional, check_tensor, check_type, not_yet
from ..launch import accept_shards as accept_launch, arch
from ..types import Acceptance, DenseProposal, OneHotProposal, SamplingTensors, SparseProposal, VerifyLayout
from . import accept
from .shards import Fields, Shard, check_shard

PARTIAL = "accept_partial"
PHASES = ("normalise", "residual", "draw")


@workspaces.declare(PARTIAL)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    rows = requests * (drafts + 1)
    return 2 * workspaces.words_of(rows, torch.int64) + 2 * workspaces.words_of(rows, torch.int32), 0


def _fields(phase: str, requests: int, rows: int, shard: Shard, masses: bool, draft_masses: bool) -> Fields:
    """What a part of `phase` holds: masses where the rule draws, draft_masses where the proposal is summed here."""
    leaves = shard.blocks(accept.LEAF)
    if phase == "normalise":
        fields = dict(row_words=(torch.int64, (rows, 4)), row_logits=(torch.float32, (rows, 2)))
        if masses:
            fields |= dict(mass=(torch.int64, (rows, leaves)), top=(torch.float32, (rows, leaves)))
        if draft_masses:
            fields |= dict(draft_mass=(torch.int64, (rows, leaves)), draft_top=(torch.float32, (rows, leaves)))
    elif phase == "residual":
        fields = dict(
            record=(torch.int64, (requests, 4)), values=(torch.float32, (requests, 4)), residual=(torch.int64, (requests, leaves))
        )
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
        layout, sampling, rule ("token" or "coupled"), state_indices: as in `accept_chain`, the same on every rank.
        proposal: as in `accept_chain`; dense: this rank's columns of the logits [S, K, W], lse of whole rows.
        phase: one of `accept_phases(proposal, sampling=sampling, rule=rule)`.
        gathered: the parts of the phases before, of all ranks: int64 [vocab_shards, words] each.
        vocab_start, vocab_shards, vocab_size: first id of this rank, number of ranks, ids in all (default W * vocab_shards).
        out: int64 part to write. Entries of rows that belong to no request are left alone.

    Returns:
        The part, to be gathered over ranks into [vocab_shards, words], in the order of their ids.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument of the wrong type, dtype, shape, device or stride, or of a kind that
        shards do not have (filters, penalties, masks, sparse proposals, reduced draft vocabularies).
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    call = _check(target_logits, layout, proposal, vocab_start, vocab_shards, vocab_size, sampling, rule, state_indices)
    device, dense = target_logits.device, call.dense
    check_choice("phase", phase, call.phases)
    call.check_gathered(gathered, call.phases.index(phase))
    part = call.fields(phase).check_part(out, device)
    if call.requests == 0:
        return part
    counters, _ = workspaces.lend(
        PARTIAL, workspace, max(call.requests, -(-call.rows // (call.drafts + 1))), call.drafts, call.shard.width, device
    )
    _accept_partial(
        target_logits,
        layout.cu_num_logits,
        layout.logits_indices,
        layout.token_ids,
        layout.positions,
        None if dense is None else dense.logits,
        None if dense is None else dense.lse,
        None if dense is None else dense.temperature,
        None if sampling is None else sampling.temperature,
        None if sampling is None else sampling.seed,
        state_indices,
        list(gathered),
        part,
        counters,
        layout.draft_lens.shape[0],
        call.drafts,
        phase,
        len(call.phases) > 1,
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
        out = accept._allocate(call.requests, call.drafts, forward_rows, device)
    else:
        accept._check_out(out, call.requests, call.drafts, forward_rows, device)
    if call.requests == 0:
        return out
    by_slot = [t for t in (None if sampling is None else sampling.temperature, anchors, anchor_positions) if t is not None]
    _accept_finish(
        gathered[-1],
        layout.query_start_loc,
        layout.cu_num_logits,
        layout.logits_indices,
        layout.token_ids,
        layout.positions,
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
        by_slot[0].shape[0] if by_slot else 2**31 - 1,  # without any, a slot number is not used to reach memory
        call.rows,
        call.shard.width,
        call.shard.count,
        call.shard.vocab,
        len(call.phases) > 1,
    )
    return out


def part_words(target_logits, layout, proposal=None, *, phase, vocab_start, vocab_shards, vocab_size=None, sampling=None,
               rule="token", state_indices=None) -> int:  # fmt: skip
    """Size of the part of a phase: int64 words, the same on every rank."""
    call = _check(target_logits, layout, proposal, vocab_start, vocab_shards, vocab_size, sampling, rule, state_indices)
    return call.fields(check_choice("phase", phase, call.phases)).words


class _Call:
    """What the arguments of a call say about sizes."""

    def __init__(self, requests, rows, drafts, slots, shard, dense, phases, device):
        self.requests, self.rows, self.drafts, self.slots = requests, rows, drafts, slots
        self.shard, self.dense, self.phases, self._device = shard, dense, phases, device

    def fields(self, phase: str) -> Fields:
        draws = len(self.phases) > 1
        sums = draws and self.dense is not None and self.dense.lse is None
        return _fields(phase, self.requests, self.rows, self.shard, draws, sums)

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
    if rule == "block":
        not_yet(PARTIAL, "rule", "the block rule on vocabulary shards is")
    check_optional("state_indices", state_indices, dtype=torch.int32, shape=(requests,), device=device, contiguous=True)
    slots = requests if state_indices is None else None
    if sampling is not None:
        check_type("sampling", sampling, SamplingTensors)
        check_tensor("sampling.temperature", sampling.temperature, shape=("S" if slots is None else slots,), device=device)
        for name in ("top_k", "top_p", "min_p", "logit_bias", "token_bitmask", "penalties"):
            if getattr(sampling, name) is not None:
                not_yet(PARTIAL, f"sampling.{name}", "filters, biases, masks and penalties on vocabulary shards are")
        slots = sampling.temperature.shape[0]
    dense = _check_proposal(proposal, slots, width, device)
    drafts = accept._width(layout, proposal, dense, rows)
    if dense is not None and dense.logits.shape[1] < drafts:
        raise ValueError(f"proposal.logits: expected K >= layout.max_drafts = {drafts}, got K = {dense.logits.shape[1]}")
    if len(phases) == 1:
        dense = None  # greedy and coupled rows do not ask how a draft was drawn
    return _Call(requests, rows, drafts, slots, shard, dense, phases, device)


def _check_proposal(proposal, slots, width, device) -> DenseProposal | None:
    if proposal is None or isinstance(proposal, OneHotProposal):
        return None
    check_type("proposal", proposal, (DenseProposal, SparseProposal))
    if isinstance(proposal, SparseProposal):
        not_yet(PARTIAL, "proposal", "a sparse proposal on vocabulary shards is")
    if proposal.draft_to_target is not None:
        not_yet(PARTIAL, "proposal.draft_to_target", "a reduced draft vocabulary on shards is")
    shape = ("S" if slots is None else slots, "K", width)
    check_tensor("proposal.logits", proposal.logits, shape=shape, device=device)
    return proposal


def _stride(tensor, dim):
    return 0 if tensor is None else tensor.stride(dim)


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _gathered(fields: Fields, part: Tensor | None) -> tuple:
    """Regions of the gathered parts of the first phase, as the kernels take them, and the ranks' distance in int64 words."""
    names = ("row_words", "row_logits", "top", "mass", "draft_top", "draft_mass")
    if part is None:
        return (*(None for _ in names), 0)
    return (*(fields.view(part, name) for name in names), part.stride(0))


@library.register(
    "accept_partial(Tensor target_logits, Tensor cu_num_logits, Tensor logits_indices, Tensor token_ids, Tensor positions, "
    "Tensor? draft_logits, Tensor? draft_lse, Tensor? draft_temperature, Tensor? temperature, Tensor? seed, "
    "Tensor? state_indices, Tensor[] gathered, Tensor(a!) part, Tensor(b!) counters, int requests, int drafts, str phase, "
    "bool draws, int vocab_start, int vocab_shards, int vocab_size) -> ()"
)
def _accept_partial(
    target_logits, cu_num_logits, logits_indices, token_ids, positions, draft_logits, draft_lse, draft_temperature, temperature,
    seed, state_indices, gathered, part, counters, requests, drafts, phase, draws, vocab_start, vocab_shards, vocab_size,
):  # fmt: skip
    device = target_logits.device
    kernels = library.kernels("accept_shards", device)
    rows, width = target_logits.shape
    shard = Shard(vocab_start, width, vocab_shards, vocab_size)
    leaves = shard.blocks(accept.LEAF)
    sweeps_draft = draws and draft_logits is not None and draft_lse is None
    config = accept_launch.pick(arch.current(device), leaves, drafts, sweeps_draft)
    num_slots = temperature.shape[0] if temperature is not None else 2**31 - 1

    def fields(phase):
        return _fields(phase, requests, rows, shard, draws, sweeps_draft)

    view = fields(phase).view
    layout = (logits_indices, token_ids, positions)
    sizes = (requests, num_slots, rows, drafts)
    strides = (target_logits.stride(0), _stride(draft_logits, 0), _stride(draft_logits, 1))
    if phase == "normalise":
        clean = workspaces.Carver(counters, workspaces.RESERVED)
        best, draft_best = clean.take(rows, torch.int64), clean.take(rows, torch.int64)
        seen, arrivals = clean.take(rows, torch.int32), clean.take(requests * (drafts + 1), torch.int32)
        names = ("row_words", "row_logits", "top", "mass", "draft_top", "draft_mass")
        kernels.launch_accept_normalise(
            requests * -(-(drafts + 1) // config.group) * -(-leaves // config.chunk),
            (
                target_logits, cu_num_logits, *layout, draft_logits, draft_temperature, temperature, seed, state_indices,
                *(view(part, name) for name in names), best, draft_best, seen, arrivals,
                *sizes, shard.start, shard.held, shard.start // accept.LEAF, leaves, *strides,
            ),
            noisy=not draws and temperature is not None,
            config=config,
        )  # fmt: skip
        return
    constants = dict(width=max(2, 1 << drafts.bit_length()), shards=_power(vocab_shards), config=config)
    first = _gathered(fields("normalise"), gathered[0])
    if phase == "residual":
        kernels.launch_accept_residual(
            requests * -(-leaves // config.chunk),
            (
                target_logits, cu_num_logits, layout, first, draft_logits, draft_lse, draft_temperature, temperature, seed,
                state_indices, *(view(part, name) for name in ("record", "values", "residual")),
                *sizes, vocab_shards, shard.start, shard.held, shard.start // accept.LEAF, leaves, vocab_size, *strides,
                _stride(draft_lse, 0),
            ),
            **constants,
        )  # fmt: skip
        return
    decided = (None, None, None, 0)
    if len(gathered) > 1:
        second = fields("residual")
        decided = (*(second.view(gathered[1], name) for name in ("record", "values", "residual")), gathered[1].stride(0))
    kernels.launch_accept_draw(
        requests,
        (
            target_logits, cu_num_logits, layout, first, decided, draft_logits, draft_temperature, temperature, seed,
            state_indices, view(part, "word"), view(part, "verdict"),
            *sizes, vocab_shards, shard.start, shard.held, width, leaves, shard.pieces(accept.LEAF), vocab_size, *strides,
        ),
        leaves=max(4, _power(-(-vocab_size // accept.LEAF))),
        **constants,
    )  # fmt: skip


@library.register(
    "accept_finish(Tensor gathered, Tensor query_start_loc, Tensor cu_num_logits, Tensor logits_indices, Tensor token_ids, "
    "Tensor positions, Tensor? state_indices, Tensor(a!) tokens, Tensor(b!) num_accepted, Tensor(c!) num_emitted, "
    "Tensor(d!) num_rejected, Tensor(e!) next_token, Tensor(f!) last_row, Tensor(g!) commit_mask, Tensor(h!) flags, "
    "Tensor(i!)? anchors, Tensor(j!)? anchor_positions, int slots, int rows, int width, int vocab_shards, int vocab_size, "
    "bool draws) -> ()"
)
def _accept_finish(
    gathered, query_start_loc, cu_num_logits, logits_indices, token_ids, positions, state_indices, tokens, num_accepted,
    num_emitted, num_rejected, next_token, last_row, commit_mask, flags, anchors, anchor_positions, slots, rows, width,
    vocab_shards, vocab_size, draws,
):  # fmt: skip
    kernels = library.kernels("accept_shards", tokens.device)
    requests, drafts = tokens.shape[0], tokens.shape[1] - 1
    shard = Shard(0, width, vocab_shards, vocab_size)
    fields = _fields("draw" if draws else "normalise", requests, rows, shard, draws, False)
    kernels.launch_accept_finish(
        requests,
        (
            query_start_loc, cu_num_logits, (logits_indices, token_ids, positions),
            *(fields.view(gathered, name) for name in ("row_words", "word", "verdict")), state_indices, tokens, num_accepted,
            num_emitted, num_rejected, next_token, last_row, commit_mask, flags, anchors, anchor_positions,
            requests, slots, rows, commit_mask.shape[0], drafts, vocab_shards, vocab_size,
            gathered.stride(0), _stride(anchors, 0), _stride(anchor_positions, 0),
        ),
        width=max(2, 1 << drafts.bit_length()),
        shards=_power(vocab_shards),
    )  # fmt: skip
