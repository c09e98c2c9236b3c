"""Sparse draft block on vocabulary shards: the candidates of a rank's ids, and a block from the candidates of all ranks.

The C best of a row are among the C best of each rank, so one part has all that a block needs: of every (request, position) the
rank's C best ids in ascending order, their logits, their keys after penalties, bias and mask, their target ids where those are
others, and their rows of W2 where no rank has all. The finish keeps the C largest keys (ties: lowest ids, which are the lowest
ranks' entries) and walks the positions as kernels/draft/candidates.py does, on the same numbers in the same order: the bits do not
depend on the cut. Symbols: N ranks, R requests, K positions, W ids of a shard, C candidates, r rank of the head, S request slots, U
sub-blocks. Reference: the op on the whole vocabulary (reference/candidates.py). Source: DSpark, arXiv 2607.05147.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..primitives.adjust import no_path
from ..primitives.options import options_of
from ..primitives.select import ABSENT, ordered_key, select
from ..primitives.sumexp import numbers
from ..primitives.sync import arrive
from .args import BaseLogits, CandidateWidths, Merged, RowSettings, WalkSizes
from .candidate_heads import awaited, hidden_score, latent_item, latent_items_of, latent_programs as latent_programs
from .candidate_walk import walk, walk_options
from .selection import best_ids, finish_part, selection_tile, slot_of, sweep_part, target_logits

COPIED = tl.constexpr(32)  # ranks of W2 copied at a time


class ListTile(NamedTuple):
    """Sizes of the merge of lists, one constexpr."""

    SHARDS: int  # padded number of ranks
    WIDTH: int  # padded number of candidates


@triton.jit
def _write_list(row, row_ptr, ids, start, settings, weights, part, num_candidates, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """Entries of a row: ids [WIDTH] of this rank's columns, -1 = none. weights: ShardWeights or None; part: CandidateList."""
    c = tl.arange(0, WIDTH)
    there = ids >= 0
    entry = row * num_candidates + c
    kept = c < num_candidates
    x = tl.load(row_ptr + ids, mask=there, other=0.0)
    tl.store(part.logits_ptr + entry, x, mask=kept)
    x, targets, used = target_logits(x.to(tl.float32), ids, there, settings, tl.zeros([1], tl.int64), 0, no_path, start)
    tl.store(part.ids_ptr + entry, tl.where(there, ids + start, -1), mask=kept)
    tl.store(part.keys_ptr + entry, tl.where(there, ordered_key(numbers(x), SHIFT), ABSENT), mask=kept)
    if part.targets_ptr is not None:
        tl.store(part.targets_ptr + entry, tl.where(used, targets, -1), mask=kept)
    if weights is not None:
        rank = weights.rank
        for first in range(0, rank, COPIED):
            i = first + tl.arange(0, COPIED)
            at = ids.to(tl.int64)[:, None] * weights.stride + i[None, :]
            w = tl.load(weights.ptr + at, mask=there[:, None] & (i < rank)[None, :], other=0)
            tl.store(part.rows_ptr + entry[:, None] * rank + i[None, :], w, mask=kept[:, None] & (i < rank)[None, :])
        if weights.scale_ptr is not None:
            tl.store(part.scales_ptr + entry, tl.load(weights.scale_ptr + ids, mask=there, other=0.0), mask=kept)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_drafts", "start", "held", "parts"])
def candidates_partial_kernel(
    base,  # BaseLogits [R, K, W]
    slots_ptr,  # int32 [R] or None
    map_ptr,  # int64 [W], ids in the target's vocabulary, or None
    adjust,  # Adjustments, by target id; or None
    weights,  # ShardWeights where rows of W2 are to be gathered, or None
    part,  # CandidateList
    selection,  # Selection, of the rank's columns
    seen_ptr,  # int32 [R, K], zero before and after
    num_requests, num_slots, num_drafts, start, held, num_targets, num_candidates, parts,
    TILE: tl.constexpr,  # SelectionTile
):  # fmt: skip
    item = tl.program_id(0)
    row = (item // parts).to(tl.int64)
    piece = item % parts
    request = item // parts // num_drafts
    k = item // parts % num_drafts
    num_rows = num_requests * num_drafts
    slot = slot_of(slots_ptr, request, num_requests, num_slots)
    row_ptr = base.ptr + request.to(tl.int64) * base.stride_request + k.to(tl.int64) * base.stride_position
    settings = RowSettings(map_ptr, num_targets, adjust, slot, slot * num_drafts + k)
    c = tl.arange(0, TILE.WIDTH)
    if slot >= 0:
        sweep_part(row, piece, parts, row_ptr, settings, None, 1.0, selection, seen_ptr + row, held, TILE, start)
        if finish_part(row, parts, row_ptr, settings, selection, held, num_candidates, TILE, start):
            tl.debug_barrier()
            ids = best_ids(selection.ids_ptr, row, num_rows, c, num_candidates, held)
            _write_list(row, row_ptr, ids, start, settings, weights, part, num_candidates, TILE.SHIFT, TILE.WIDTH)
            tl.store(part.status_ptr + row, tl.atomic_xchg(seen_ptr + row, 0, sem="relaxed"))
    else:
        if piece == 0:
            _write_list(row, row_ptr, c * 0 - 1, start, settings, weights, part, num_candidates, TILE.SHIFT, TILE.WIDTH)
            tl.store(part.status_ptr + row, 0)


@triton.jit
def _merge(row, lists, stride, merged, num_candidates, vocab, TILE: tl.constexpr):
    """The C best of all ranks' entries of a row, ascending ids: (id, place); -1 behind the last. stride: int32 of a rank's part;
    merged: MergedIds."""
    rank = tl.arange(0, TILE.SHARDS)[:, None]
    c = tl.arange(0, TILE.WIDTH)[None, :]
    at = rank.to(tl.int64) * stride + row * num_candidates + c
    there = (rank < lists.shards) & (c < num_candidates)
    ids = tl.load(lists.ids_ptr + at, mask=there, other=-1)
    there = there & (ids >= 0) & (ids < vocab)
    keys = tl.load(lists.keys_ptr + at, mask=there, other=ABSENT)
    wanted = tl.minimum(num_candidates, tl.sum(there.to(tl.int32)))
    _, selected, place = select(keys, wanted)
    tl.store(merged.ids_ptr + row * num_candidates + place, ids, mask=selected)
    tl.store(merged.places_ptr + row * num_candidates + place, rank * num_candidates + c, mask=selected)
    behind = tl.arange(0, TILE.WIDTH)
    tl.store(merged.ids_ptr + row * num_candidates + behind, behind * 0 - 1, mask=(behind >= wanted) & (behind < num_candidates))


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_drafts", "first_draft", "column", "stride_part"])
def candidates_finish_kernel(
    lists,  # GatheredLists
    state,  # RequestState
    adjust, filters, head, latent, hidden, confidence, out,  # as in kernels/draft/candidates.py; W2 whole, or its rows of the parts
    selection,  # MergedIds
    scratch,  # WalkScratch
    num_requests, num_slots, num_drafts,
    widths,  # CandidateWidths
    first_draft, column,
    stride_part,  # int64 words
    TILE: tl.constexpr,  # ListTile
    OPTIONS: tl.constexpr,  # WalkOptions
):  # fmt: skip
    """A program per row merges its lists, and as many as latents need; the last of a request walks it."""
    slots_ptr = state.slots_ptr
    num_candidates = widths.num_candidates
    program = tl.program_id(0)
    latent_items = latent_items_of(latent, num_requests * num_drafts)
    first = tl.zeros((), tl.int32)
    count = tl.zeros((), tl.int32)
    if program < latent_items:
        if latent is not None:
            first, count = latent_item(
                program, slots_ptr, latent, hidden, scratch.products_ptr, num_requests, num_slots, num_drafts, OPTIONS.BLOCK_J
            )
    else:
        row = program - latent_items
        request = row // num_drafts
        k = row % num_drafts
        slot = slot_of(slots_ptr, request, num_requests, num_slots)
        if slot >= 0:
            _merge(row.to(tl.int64), lists, stride_part * 2, selection, num_candidates, widths.vocab, TILE)
            if confidence is not None:
                tl.store(scratch.score_ptr + row, hidden_score(request, k, hidden, confidence.weight_ptr))
            first = request
            count = tl.full((), 1, tl.int32)
        else:
            if k == 0:
                tl.store(out.flags_ptr + request, 0)

    # The ids of all ranks' lists are global; a row has at most C of them.
    widths = CandidateWidths(num_candidates, None, widths.num_targets, num_candidates)
    sizes = WalkSizes(num_drafts, first_draft, column)
    for request in range(first, first + count):
        slot = slot_of(slots_ptr, request, num_requests, num_slots)
        if slot >= 0:
            if arrive(scratch.arrivals_ptr + request, awaited(request, latent, num_drafts)):
                base = BaseLogits(lists.logits_ptr, num_drafts.to(tl.int64) * num_candidates, num_candidates)
                merged = Merged(selection.places_ptr, stride_part, lists.targets_ptr, lists.rows_ptr, lists.shards)
                walk(
                    request, slot, lists.status_ptr, base, state, None, merged, adjust, filters, head, latent, hidden,
                    confidence, out, selection, scratch, widths, sizes, OPTIONS,
                )  # fmt: skip


def launch_candidates_partial(programs, args, *, shift, config):
    """Launch one program per chunk of a row."""
    candidates_partial_kernel[(programs,)](
        *args,
        TILE=selection_tile(config, shift),
        **options_of(config),
    )


def launch_candidates_finish(programs, args, *, kind, coupled, with_markov, joint, shift, rank, shards, config):
    """Launch a program per row, those of latents before them."""
    candidates_finish_kernel[(programs,)](
        *args,
        TILE=ListTile(SHARDS=shards, WIDTH=config.width),
        OPTIONS=walk_options(kind, coupled, with_markov, joint, shift, rank, config),
        **options_of(config),
    )
