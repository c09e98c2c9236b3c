"""draft_block_partial, draft_block_finish with `candidates`: a whole block on vocabulary shards with one gather.

The part lists the rank's C best of every position, the finish merges the lists and walks the positions, the same on every rank.
Reference: the op on the whole vocabulary, to the bit whatever the cut. Source: DSpark, arXiv 2607.05147.

| gathered, once | bytes per rank, request and position, C candidates |
| --- | --- |
| id, key after penalties, bias and mask, logit | C (8 + bytes of a logit) |
| with a reduced draft vocabulary: target id | 4 C |
| where head.w2 is the rank's rows [W, r]: those of its candidates | C r bytes of a weight, and 4 C of scales |

Where head.w2 is whole [V, r] on every rank no rows travel: at r = 256 in bf16 a row is 512 bytes against 10 of the rest, so the
whole W2 (78 MB at 151936 ids) is worth its memory from a few requests on; the rows are for few requests or little memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import check_int, check_tensor, check_type
from ...choices import Noise
from ...kernels.draft.args import CandidateList, CandidateWidths, GatheredLists, MergedIds, ShardWeights, WalkScratch
from ...launch import arch
from ...launch.draft import candidates as launch
from ...library import Out
from ...types import ConfidenceHead, DraftBlock, MarkovHead, SamplingTensors
from ..sampling import Flat, adjust_settings, flatten
from ..shards import Field, Fields, Shard
from . import candidates as whole
from .args import (
    ConfidenceWeights,
    LatentHead,
    SparseResults,
    base_record,
    confidence_weights,
    has_latents,
    latent_room,
    sparse_results,
    weights_name,
    weights_of,
)
from .outputs import allocate, check_out

PARTIAL, FINISH = "draft_block_partial candidates", "draft_block_finish candidates"
MOST_ENTRIES = 2**14  # of the lists of all ranks: what one program selects from


def _part_counters(take: workspaces.Take, positions: int) -> tuple[Tensor, Tensor]:
    """Arrival counters and flags of rows."""
    return take(positions, torch.int32), take(positions, torch.int32)


@workspaces.declare(PARTIAL)
def _part_needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    most = (requests * drafts, vocab, whole.LEAST_GROUP, launch.MAX_CANDIDATES)
    return workspaces.measured(_part_counters, requests * drafts), workspaces.measured(whole.selection_of, *most)


def _finish_counters(take: workspaces.Take, requests: int) -> Tensor:
    return take(requests, torch.int32)


def _finish_scratch(take: workspaces.Take, positions: int, candidates: int, width: int) -> tuple[MergedIds, WalkScratch]:
    ids, places = take(positions * candidates, torch.int32), take(positions * candidates, torch.int32)
    return MergedIds(ids_ptr=ids, places_ptr=places), whole.walk_scratch(take, positions, width)


@workspaces.declare(FINISH)
def _finish_needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    scratch = workspaces.measured(_finish_scratch, requests * drafts, launch.MAX_CANDIDATES, launch.MAX_WIDTH)
    return workspaces.measured(_finish_counters, requests), scratch


NAMES = ("ids", "keys", "logits", "targets", "rows", "scales", "status")  # of the fields of a part


def _fields(
    requests: int, drafts: int, candidates: int, dtype: torch.dtype, w2: Tensor | None, scaled: bool, mapped: bool
) -> Fields:
    """w2: this rank's rows, where they are gathered; else None."""
    rows = (requests, drafts, candidates)
    fields: dict[str, Field] = dict(ids=(torch.int32, rows), keys=(torch.int32, rows), logits=(dtype, rows))
    fields["status"] = (torch.int32, (requests, drafts))
    if mapped:
        fields["targets"] = (torch.int32, rows)
    if w2 is not None:
        stored = torch.uint8 if w2.dtype == torch.float8_e4m3fn else w2.dtype
        fields["rows"] = (stored, (*rows, w2.shape[1]))
        if scaled:
            fields["scales"] = (torch.float32, rows)
    return Fields(**fields)


def _own_rows(head: MarkovHead | None, width: int) -> MarkovHead | None:
    """The head, where its W2 is this rank's rows, which are gathered; else None."""
    return head if head is not None and head.w2.shape[0] == width else None


def part_fields(base_logits: Tensor, head: MarkovHead | None, candidates: int, draft_to_target: Tensor | None) -> Fields:
    requests, drafts, width = base_logits.shape
    own = _own_rows(head, width)
    w2, scaled = (None, False) if own is None else (own.w2, own.w2_scale is not None)
    return _fields(requests, drafts, candidates, base_logits.dtype, w2, scaled, draft_to_target is not None)


def part_words(base_logits: Tensor, head: MarkovHead | None, *, candidates: int, draft_to_target: Tensor | None = None) -> int:
    """Size of a part: int64 words, the same on every rank."""
    return part_fields(base_logits, head, candidates, draft_to_target).words


def check_candidates(head: MarkovHead | None, candidates: int, shard: Shard, device: torch.device) -> int:
    """Check the arguments that both calls have; returns the number of rows that head.w2 must have."""
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


def partial(
    base_logits: Tensor,
    slots: int,
    head: MarkovHead | None,
    *,
    shard: Shard,
    block: DraftBlock | None,
    sampling: SamplingTensors | None,
    confidence: ConfidenceHead | None,
    candidates: int,
    draft_to_target: Tensor | None,
    targets: int,
    first_draft: int,
    state_indices: Tensor | None,
    keep_logits: bool,
    out: Tensor | None,
    workspace: workspaces.Workspace | None,
) -> tuple[Tensor, DraftBlock]:
    """`draft_block_partial` with `candidates`, its other arguments checked."""
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
    own = _own_rows(head, width)
    lent = workspaces.lend(PARTIAL, workspace, rows, drafts, width, device)
    arguments = PartialArguments(
        base_logits=base_logits,
        w2=None if own is None else own.w2,
        w2_scale=None if own is None else own.w2_scale,
        sampling=flatten(sampling),
        draft_to_target=draft_to_target,
        state_indices=state_indices,
        part=part,
        lent=lent,
        slots=slots,
        vocab_start=shard.start,
        held=shard.held,
        candidates=candidates,
        targets=targets,
    )
    _draft_candidates_partial(arguments)
    return part, block


def finish(
    gathered: Tensor,
    block: DraftBlock,
    base_logits: Tensor,
    anchors: Tensor,
    head: MarkovHead | None,
    *,
    anchor_positions: Tensor,
    shard: Shard,
    sampling: SamplingTensors | None,
    hidden: Tensor | None,
    confidence: ConfidenceHead | None,
    candidates: int,
    draft_to_target: Tensor | None,
    targets: int,
    first_draft: int,
    head_state: Tensor | None,
    noise: Noise,
    state_indices: Tensor | None,
    workspace: workspaces.Workspace | None,
) -> DraftBlock:
    """`draft_block_finish` with `candidates`, its other arguments checked."""
    device, (rows, drafts, _) = base_logits.device, base_logits.shape
    slots = anchors.shape[0]
    column = check_out(block, base_logits, slots, rows, sampling, confidence, first_draft, candidates=candidates)
    part_fields(base_logits, head, candidates, draft_to_target).check_gathered("gathered", gathered, shard, device)
    if rows == 0:
        return block
    room = latent_room(head, rows, drafts)
    lent = workspaces.lend(FINISH, workspace, rows, drafts, shard.vocab, device, **room)
    arguments = FinishArguments(
        gathered=gathered,
        base_logits=base_logits,
        anchors=anchors,
        anchor_positions=anchor_positions,
        head=LatentHead(*weights_of(head)),
        hidden=hidden if confidence is not None or has_latents(head) else None,
        confidence_head=confidence_weights(confidence),
        sampling=flatten(sampling),
        state_indices=state_indices,
        results=sparse_results(block),
        head_state=head_state,
        lent=lent,
        mapped=draft_to_target is not None,
        vocab_size=shard.vocab,
        candidates=candidates,
        targets=targets,
        first_draft=first_draft,
        column=column,
        coupled=noise == "coupled",
    )
    _draft_candidates_finish(arguments)
    return block


def _config(
    gpu: arch.Arch,
    base_logits: Tensor,
    candidates: int,
    w2: Tensor | None,
    outputs: int,
    sampling: Flat,
    mapped: bool,
) -> launch.CandidatesConfig:
    """As for the whole vocabulary: the number of ranks of W2 in a dot decides the bits of its sums."""
    settings = sampling.adjusts or sampling.filters is not None or mapped
    rank = 0 if w2 is None else w2.shape[1]
    _, drafts, width = base_logits.shape
    return launch.pick(gpu, drafts, width, candidates, 0, rank, weights_name(w2), outputs, settings)


class PartialArguments(NamedTuple):
    """`draft_candidates_partial` as torch.library knows it. w2, w2_scale: this rank's, where their rows are gathered."""

    base_logits: Tensor
    w2: Tensor | None
    w2_scale: Tensor | None
    sampling: Flat
    draft_to_target: Tensor | None
    state_indices: Tensor | None
    part: Out[Tensor]
    lent: workspaces.Lent
    slots: int
    vocab_start: int
    held: int
    candidates: int
    targets: int


@library.register("draft_candidates_partial", PartialArguments)
def _draft_candidates_partial(a: PartialArguments) -> None:
    device, sampling, w2 = a.base_logits.device, a.sampling, a.w2
    kernels = library.kernels("draft.candidate_shards", device)
    rows, drafts, width = a.base_logits.shape
    adjust, mapped = adjust_settings(sampling) if sampling.adjusts else None, a.draft_to_target is not None
    gpu = arch.current(device)
    config = _config(gpu, a.base_logits, a.candidates, w2, 0, sampling, mapped)
    config = launch.list_config(gpu, config, sampling.adjusts, mapped)
    positions = rows * drafts
    row_arrivals, seen = _part_counters(workspaces.Carver(a.lent.counters, workspaces.RESERVED).take, positions)
    selection = whole.selection_of(workspaces.Carver(a.lent.scratch).take, positions, width, config.group, a.candidates)
    selection = selection._replace(arrivals_ptr=row_arrivals)
    weights = None
    if w2 is not None:
        stored = w2.view(torch.uint8) if w2.dtype == torch.float8_e4m3fn else w2
        weights = ShardWeights(ptr=stored, stride=w2.stride(0), scale_ptr=a.w2_scale, rank=w2.shape[1])
    fields = _fields(rows, drafts, a.candidates, a.base_logits.dtype, w2, a.w2_scale is not None, mapped)
    own = {f"{name}_ptr": fields.view(a.part, name) for name in NAMES}
    parts = launch.parts(gpu, positions, -(-max(1, a.held) // config.block))
    kernels.launch_candidates_partial(
        positions * parts,
        (
            base_record(a.base_logits), a.state_indices, a.draft_to_target, adjust, weights, CandidateList(**own), selection,
            seen, rows, a.slots, drafts, a.vocab_start, a.held, a.targets, a.candidates, parts,
        ),
        shift=whole.unused_bits(a.base_logits, adjust),
        config=config,
    )  # fmt: skip


class FinishArguments(NamedTuple):
    """`draft_candidates_finish` as torch.library knows it."""

    gathered: Tensor
    base_logits: Tensor
    anchors: Tensor
    anchor_positions: Tensor
    head: LatentHead
    hidden: Tensor | None
    confidence_head: ConfidenceWeights
    sampling: Flat
    state_indices: Tensor | None
    results: SparseResults
    head_state: Out[Tensor | None]
    lent: workspaces.Lent
    mapped: bool
    vocab_size: int
    candidates: int
    targets: int
    first_draft: int
    column: int
    coupled: bool


@library.register("draft_candidates_finish", FinishArguments)
def _draft_candidates_finish(a: FinishArguments) -> None:
    device, sampling, w2 = a.base_logits.device, a.sampling, a.head.w2
    kernels = library.kernels("draft.candidate_shards", device)
    rows, drafts, width = a.base_logits.shape
    adjust, filters = adjust_settings(sampling) if sampling.adjusts else None, sampling.filters
    gpu, outputs = arch.current(device), a.head.outputs
    config = launch.merge_config(gpu, _config(gpu, a.base_logits, a.candidates, w2, outputs, sampling, a.mapped))
    travels = w2 is not None and w2.shape[0] == width
    scaled = travels and a.head.w2_scale is not None
    fields = _fields(rows, drafts, a.candidates, a.base_logits.dtype, w2 if travels else None, scaled, a.mapped)
    parts = {name: fields.view(a.gathered, name) for name in NAMES}
    lists = GatheredLists(**{f"{name}_ptr": view for name, view in parts.items() if name != "scales"}, shards=a.gathered.shape[0])
    positions = rows * drafts
    arrivals = _finish_counters(workspaces.Carver(a.lent.counters, workspaces.RESERVED).take, rows)
    take = workspaces.Carver(a.lent.scratch).take
    merged, scratch = _finish_scratch(take, positions, a.candidates, config.width)
    scratch = scratch._replace(arrivals_ptr=arrivals)
    walk = whole.walk_records(a.head, a.hidden, a.confidence_head, a.results, a.head_state, rows, drafts, scratch, take)
    head = walk.head
    if travels and head is not None:
        head = head._replace(w2_ptr=parts["rows"], stride_w2=0, scale_ptr=parts["scales"])
    kernels.launch_candidates_finish(
        kernels.latent_programs(positions, outputs) + positions,
        (
            lists, whole.request_state(a.anchors, a.anchor_positions, a.state_indices, sampling),
            adjust, filters, head, walk.latent, walk.hidden, walk.confidence, a.results.outputs(),
            merged, walk.scratch,
            rows, a.anchors.shape[0], drafts,
            CandidateWidths(vocab=a.vocab_size, map_ptr=None, num_targets=a.targets, num_candidates=a.candidates),
            a.first_draft, a.column, a.gathered.shape[1],
        ),
        kind=walk.kind,
        coupled=a.coupled,
        with_markov=a.confidence_head.with_markov(a.hidden),
        joint=sampling.joint and filters is not None,
        shift=whole.unused_bits(a.base_logits, adjust),
        rank=a.head.rank,
        shards=launch.padded(a.gathered.shape[0]),
        config=config,
    )  # fmt: skip
