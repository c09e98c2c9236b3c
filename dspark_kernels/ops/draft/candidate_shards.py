"""draft_block_partial, draft_block_finish with `candidates`: a whole block on vocabulary shards with one gather.

The part lists the rank's C best of every position, the finish merges the lists and walks the positions, the same on every rank.
Oracle: the op on the whole vocabulary, to the bit whatever the cut. Source: DSpark, arXiv 2607.05147.

| gathered, once | bytes per rank, request and position, C candidates |
| --- | --- |
| id, key after penalties, bias and mask, logit | C (8 + bytes of a logit) |
| with a reduced draft vocabulary: target id | 4 C |
| where head.w2 is the rank's rows [W, r]: those of its candidates | C r bytes of a weight, and 4 C of scales |

Where head.w2 is whole [V, r] on every rank no rows travel: at r = 256 in bf16 a row is 512 bytes against 10 of the rest, so the
whole W2 (78 MB at 151936 ids) is worth its memory from a few requests on; the rows are for few requests or little memory.
"""

from __future__ import annotations

import torch

from ... import library, workspace as workspaces
from ...checks import check_int, check_tensor, check_type
from ...kernels.draft.args import BaseLogits, CandidateList, CandidateWidths, GatheredLists, Selection, ShardWeights
from ...launch import arch
from ...launch.draft import candidates as launch
from ...types import DraftBlock, MarkovHead, SparseProposal
from ..sampling import SCHEMA, Flat, adjust_settings, flatten
from ..shards import Fields
from . import candidates as whole
from .outputs import allocate, check_out

PARTIAL, FINISH = "draft_block_partial candidates", "draft_block_finish candidates"
MOST_ENTRIES = 2**14  # of the lists of all ranks: what one program selects from


@workspaces.declare(PARTIAL)
def _part_needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    rows = requests * drafts
    return 2 * workspaces.words_of(rows, torch.int32), whole._needs(requests, drafts, vocab)[1]


@workspaces.declare(FINISH)
def _finish_needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    rows = requests * drafts
    lists = 2 * workspaces.words_of(rows * launch.MAX_CANDIDATES, torch.int32)
    return workspaces.words_of(requests, torch.int32), lists + workspaces.words_of(rows, torch.float32)


NAMES = ("ids", "keys", "logits", "targets", "rows", "scales", "status")  # of the fields of a part


def _fields(requests, drafts, candidates, dtype, w2, scaled, mapped) -> Fields:
    """w2: of the rank, where its rows travel, else None."""
    rows = (requests, drafts, candidates)
    fields = dict(ids=(torch.int32, rows), keys=(torch.int32, rows), logits=(dtype, rows), status=(torch.int32, (requests, drafts)))
    if mapped:
        fields["targets"] = (torch.int32, rows)
    if w2 is not None:
        stored = torch.uint8 if w2.dtype == torch.float8_e4m3fn else w2.dtype
        fields["rows"] = (stored, (*rows, w2.shape[1]))
        if scaled:
            fields["scales"] = (torch.float32, rows)
    return Fields(**fields)


def part_fields(base_logits, head, candidates, draft_to_target) -> Fields:
    requests, drafts, width = base_logits.shape
    travels = head is not None and head.w2.shape[0] == width
    scaled = travels and head.w2_scale is not None
    w2 = head.w2 if travels else None
    return _fields(requests, drafts, candidates, base_logits.dtype, w2, scaled, draft_to_target is not None)


def part_words(base_logits, head, *, candidates, draft_to_target=None) -> int:
    """Size of a part: int64 words, the same on every rank."""
    return part_fields(base_logits, head, candidates, draft_to_target).words


def check_candidates(head, candidates, shard, device) -> int:
    """Arguments that both calls have; returns rows that head.w2 is expected to have."""
    check_int("candidates", candidates, low=1, high=launch.MAX_CANDIDATES)
    entries = launch.padded(shard.count) * max(16, launch.padded(candidates))
    if entries > MOST_ENTRIES:
        raise ValueError(f"candidates: expected at most {MOST_ENTRIES} entries on all {shard.count} ranks, got {entries}")
    if head is None:
        return shard.width
    check_type("head", head, MarkovHead)
    rows = head.w2.shape[0]
    if rows not in (shard.width, shard.vocab):
        raise ValueError(
            f"head.w2: expected the {shard.width} rows of this rank or all {shard.vocab} of the vocabulary, got {rows}"
        )
    check_tensor("head.w2", head.w2, device=device, last_contiguous=True)
    return rows


def partial(base_logits, slots, head, *, shard, block, sampling, confidence, candidates, draft_to_target, targets, first_draft,
            state_indices, keep_logits, out, workspace):  # fmt: skip
    """ops.draft_shards.draft_block_partial where `candidates` is given, its other arguments checked."""
    device, (rows, drafts, width) = base_logits.device, base_logits.shape
    check_candidates(head, candidates, shard, device)
    common = (base_logits, slots, rows, sampling, confidence)
    if block is None:
        block = allocate(*common, keep_logits=keep_logits, scattered=state_indices is not None, candidates=candidates)
    else:
        check_out(block, *common, first_draft, candidates=candidates)
    fields = part_fields(base_logits, head, candidates, draft_to_target)
    part = fields.check_part(out, device)
    if rows == 0:
        return part, block
    travels = head is not None and head.w2.shape[0] == width
    counters, scratch = workspaces.lend(PARTIAL, workspace, rows, drafts, width, device)
    _draft_candidates_partial(
        base_logits,
        head.w2 if travels else None,
        head.w2_scale if travels else None,
        *flatten(sampling),
        draft_to_target,
        state_indices,
        part,
        counters,
        scratch,
        slots,
        shard.start,
        shard.held,
        candidates,
        targets,
    )
    return part, block


def finish(
    gathered, block, base_logits, anchors, head, mixing, *, anchor_positions, shard, sampling, hidden, confidence, candidates,
    draft_to_target, targets, first_draft, head_state, noise, state_indices, workspace,
) -> DraftBlock:  # fmt: skip
    """ops.draft_shards.draft_block_finish where `candidates` is given, its other arguments checked. mixing: weight and bias of a
    gated or rnn head, or two None."""
    device, (rows, drafts, _) = base_logits.device, base_logits.shape
    slots = anchors.shape[0]
    column = check_out(block, base_logits, slots, rows, sampling, confidence, first_draft, candidates=candidates)
    part_fields(base_logits, head, candidates, draft_to_target).check_gathered("gathered", gathered, shard, device)
    if rows == 0:
        return block
    sparse = block.proposal if isinstance(block.proposal, SparseProposal) else None
    counters, scratch = _lend(workspace, rows, drafts, shard.vocab, head, mixing[0], device)
    _draft_candidates_finish(
        gathered,
        base_logits,
        anchors,
        anchor_positions,
        None if head is None else head.w1,
        None if head is None else head.w2,
        None if head is None else head.w2_scale,
        *mixing,
        hidden if confidence is not None or mixing[0] is not None else None,
        None if confidence is None else confidence.weight,
        None if confidence is None else confidence.bias,
        None if confidence is None else confidence.sts_temperatures,
        *flatten(sampling),
        state_indices,
        block.tokens,
        block.confidence,
        block.confidence_logits,
        None if sparse is None else sparse.ids,
        None if sparse is None else sparse.logits,
        None if sparse is None else sparse.lse,
        block.flags,
        head_state,
        counters,
        scratch,
        draft_to_target is not None,
        shard.vocab,
        candidates,
        targets,
        first_draft,
        column,
        noise == "coupled",
    )
    return block


def _lend(workspace, rows, drafts, vocab, head, weight, device):
    if weight is None:
        return workspaces.lend(FINISH, workspace, rows, drafts, vocab, device)
    counters, scratch = _finish_needs(rows, drafts, vocab)
    scratch += workspaces.latent_words(rows, drafts, head.rank, weight.shape[0] // head.rank)
    message = f"expected room for {rows} requests x {drafts} drafts over {vocab} ids and markov_rank={head.rank}"
    return workspaces.lend_words(workspace, counters, scratch, device, message)


def _config(gpu, base_logits, candidates, w2, outputs, sampling, mapped):
    """As for the whole vocabulary: how many ranks a dot takes is part of what its sums are."""
    weights = "bfloat16" if w2 is None else str(w2.dtype).removeprefix("torch.")
    settings = sampling.adjusts or sampling.filters is not None or mapped
    rank = 0 if w2 is None else w2.shape[1]
    _, drafts, width = base_logits.shape
    return launch.pick(gpu, drafts, width, candidates, 0, rank, weights, outputs, settings)


@library.register(
    "draft_candidates_partial(Tensor base_logits, Tensor? w2, Tensor? w2_scale, "
    f"{SCHEMA}, Tensor? draft_to_target, Tensor? state_indices, Tensor(a!) part, Tensor(b!) counters, Tensor(c!) scratch, "
    "int slots, int vocab_start, int held, int candidates, int targets) -> ()"
)
def _draft_candidates_partial(
    base_logits, w2, w2_scale, temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed, counts, repetition,
    presence, frequency, joint, draft_to_target, state_indices, part, counters, scratch, slots, vocab_start, held, candidates,
    targets,
):  # fmt: skip
    device = base_logits.device
    kernels = library.kernels("draft.candidate_shards", device)
    rows, drafts, width = base_logits.shape
    sampling = Flat(
        temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed, counts, repetition, presence, frequency, joint
    )
    adjust = adjust_settings(sampling) if sampling.adjusts else None
    gpu = arch.current(device)
    config = _config(gpu, base_logits, candidates, w2, 0, sampling, draft_to_target is not None)
    config = launch.list_config(gpu, config, sampling.adjusts, draft_to_target is not None)
    positions = rows * drafts
    clean, carver = workspaces.Carver(counters, workspaces.RESERVED), workspaces.Carver(scratch)
    row_count, seen = (clean.take(positions, torch.int32) for _ in range(2))
    selection = Selection(
        keys_ptr=carver.take(positions * whole._units(width, config.group), torch.int32),
        units_ptr=carver.take(positions * candidates, torch.int32),
        ids_ptr=carver.take(positions * candidates, torch.int32),
        bounds_ptr=carver.take(2 * positions, torch.int32),
    )
    weights = None
    if w2 is not None:
        stored = w2.view(torch.uint8) if w2.dtype == torch.float8_e4m3fn else w2
        weights = ShardWeights(ptr=stored, stride=w2.stride(0), scale_ptr=w2_scale, rank=w2.shape[1])
    fields = _fields(rows, drafts, candidates, base_logits.dtype, w2, w2_scale is not None, draft_to_target is not None)
    own = {f"{name}_ptr": fields.view(part, name) for name in NAMES}
    parts = launch.parts(gpu, positions, -(-max(1, held) // config.block))
    kernels.launch_candidates_partial(
        positions * parts,
        (
            BaseLogits(ptr=base_logits, stride_request=base_logits.stride(0), stride_position=base_logits.stride(1)),
            state_indices, draft_to_target, adjust, weights, CandidateList(**own), selection, row_count, seen,
            rows, slots, drafts, vocab_start, held, targets, candidates, parts,
        ),
        shift=whole.unused_bits(base_logits, adjust),
        config=config,
    )  # fmt: skip


@library.register(
    "draft_candidates_finish(Tensor gathered, Tensor base_logits, Tensor anchors, Tensor anchor_positions, Tensor? w1, Tensor? w2, "
    "Tensor? w2_scale, Tensor? latent_weight, Tensor? latent_bias, Tensor? hidden, Tensor? weight, Tensor? bias, "
    f"Tensor? sts_temperatures, {SCHEMA}, Tensor? state_indices, Tensor(a!) tokens, "
    "Tensor(b!)? confidence, Tensor(c!)? confidence_logits, Tensor(d!)? ids, Tensor(e!)? logits, Tensor(f!)? lse, "
    "Tensor(g!) flags, Tensor(h!)? head_state, Tensor(i!) counters, Tensor(j!) scratch, bool mapped, int vocab_size, "
    "int candidates, int targets, int first_draft, int column, bool coupled) -> ()"
)
def _draft_candidates_finish(
    gathered, base_logits, anchors, anchor_positions, w1, w2, w2_scale, latent_weight, latent_bias, hidden, weight, bias,
    sts_temperatures, temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed, counts, repetition, presence,
    frequency, joint, state_indices, tokens, confidence, confidence_logits, ids, logits, lse, flags, head_state, counters, scratch,
    mapped, vocab_size, candidates, targets, first_draft, column, coupled,
):  # fmt: skip
    device = base_logits.device
    kernels = library.kernels("draft.candidate_shards", device)
    rows, drafts, width = base_logits.shape
    sampling = Flat(
        temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed, counts, repetition, presence, frequency, joint
    )
    adjust, filters = adjust_settings(sampling) if sampling.adjusts else None, sampling.filters
    outputs = 0 if latent_weight is None else latent_weight.shape[0]
    gpu = arch.current(device)
    config = launch.merge_config(gpu, _config(gpu, base_logits, candidates, w2, outputs, sampling, mapped))
    travels = w2 is not None and w2.shape[0] == width
    fields = _fields(rows, drafts, candidates, base_logits.dtype, w2 if travels else None, travels and w2_scale is not None, mapped)
    parts = {name: fields.view(gathered, name) for name in NAMES}
    lists = GatheredLists(**{f"{name}_ptr": view for name, view in parts.items() if name != "scales"})
    positions = rows * drafts
    request_count = workspaces.Carver(counters, workspaces.RESERVED).take(rows, torch.int32)
    carver = workspaces.Carver(scratch)
    best, places = (carver.take(positions * candidates, torch.int32) for _ in range(2))
    walk = whole.walk_records(
        w1, w2, w2_scale, latent_weight, latent_bias, hidden, weight, bias, sts_temperatures, confidence, confidence_logits,
        head_state, rows, drafts, carver.take(positions, torch.float32), carver,
    )  # fmt: skip
    head = walk.head
    if travels:
        head = head._replace(w2_ptr=parts["rows"], stride_w2=0, scale_ptr=parts["scales"])
    latent_items = kernels.latent_programs(positions, outputs)
    kernels.launch_candidates_finish(
        latent_items + positions,
        (
            lists, whole.request_state(anchors, anchor_positions, state_indices, temperature, seed),
            adjust, filters, head, walk.latent, walk.hidden, walk.confidence,
            whole.sparse_outputs(tokens, ids, logits, lse, flags),
            Selection(keys_ptr=None, units_ptr=None, ids_ptr=best, bounds_ptr=None), walk.scratch, places, request_count,
            rows, anchors.shape[0], drafts, CandidateWidths(vocab=vocab_size, num_targets=targets, num_candidates=candidates),
            first_draft, column, latent_items, gathered.shape[0], gathered.shape[1],
        ),
        kind=walk.kind,
        coupled=coupled,
        with_markov=weight is not None and weight.shape[0] > hidden.shape[2],
        joint=joint and filters is not None,
        shift=whole.unused_bits(base_logits, adjust),
        shards=launch.padded(gathered.shape[0]),
        config=config,
    )  # fmt: skip
