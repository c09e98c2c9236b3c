"""Sparse draft block on vocabulary shards: the candidates of a rank's ids, and a block from the candidates of all ranks.

The C best of a row are among the C best of each rank, so one part has all that a block needs: of every (request, position) the
rank's C best ids in ascending order, their logits, their keys after penalties, bias and mask, their target ids where those are
others, and their rows of W2 where no rank has all. The finish keeps the C largest keys (ties: lowest ids, which are the lowest
ranks' entries) and walks the positions as kernels/draft/candidates.py does, on the same numbers in the same order: the bits do not depend
on the cut. Symbols: N ranks, R requests, K positions, W ids of a shard, C candidates, r rank of the head, S state slots, U units.
Oracle: the op on the whole vocabulary (reference/candidates.py). Source: DSpark, arXiv 2607.05147.
"""

import triton
import triton.language as tl

from ..primitives.adjust import no_path
from ..primitives.mass import numbers
from ..primitives.philox import COUPLED, DRAFT
from ..primitives.select import ABSENT, ordered_key, select
from ..primitives.ticket import arrive
from .candidates import (
    ADVANCES,
    _awaited as awaited,
    _best_ids as best_ids,
    _hidden_score as hidden_score,
    _judged as judged,
    _keep_best as keep_best,
    _latent_item as latent_item,
    _slot as slot_of,
    _store_unit_keys as store_unit_keys,
    _walk as walk,
    latent_programs as latent_programs,
    padded_units,
)
from .rows import NAN

COPIED = tl.constexpr(32)  # ranks of W2 copied at a time


@triton.jit
def _write_list(row, row_ptr, ids, start, choice, weights, part, num_candidates, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """Entries of a row: ids [WIDTH] of this rank's columns, -1 = none."""
    ids_ptr, keys_ptr, logits_ptr, targets_ptr, rows_ptr, scales_ptr, _ = part
    c = tl.arange(0, WIDTH)
    there = ids >= 0
    entry = row * num_candidates + c
    kept = c < num_candidates
    x = tl.load(row_ptr + ids, mask=there, other=0.0)
    tl.store(logits_ptr + entry, x, mask=kept)
    x, targets, used = judged(x.to(tl.float32), ids, there, choice, tl.zeros([1], tl.int64), 0, no_path, start)
    tl.store(ids_ptr + entry, tl.where(there, ids + start, -1), mask=kept)
    tl.store(keys_ptr + entry, tl.where(there, ordered_key(numbers(x), SHIFT), ABSENT), mask=kept)
    if targets_ptr is not None:
        tl.store(targets_ptr + entry, tl.where(used, targets, -1), mask=kept)
    if weights is not None:
        w2_ptr, stride_2v, scale_ptr, rank = weights
        for first in range(0, rank, COPIED):
            i = first + tl.arange(0, COPIED)
            at = ids.to(tl.int64)[:, None] * stride_2v + i[None, :]
            w = tl.load(w2_ptr + at, mask=there[:, None] & (i < rank)[None, :], other=0)
            tl.store(rows_ptr + entry[:, None] * rank + i[None, :], w, mask=kept[:, None] & (i < rank)[None, :])
        if scale_ptr is not None:
            tl.store(scales_ptr + entry, tl.load(scale_ptr + ids, mask=there, other=0.0), mask=kept)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_drafts", "start", "held", "parts"])
def candidates_partial_kernel(
    base,  # (logits [R, K, W], strides of R and K)
    slots_ptr,  # [R] or None
    map_ptr,  # int64 [W] ids in the target's vocabulary, or None
    adjust,  # settings of primitives/adjust.py, by target id; or None
    weights,  # (W2 [W, r], stride, scale [W] or None, r) where its rows are to be gathered, or None
    part,  # (ids, keys int32 [R, K, C], logits [R, K, C], targets int32 [R, K, C] or None, rows [R, K, C, r] and scales fp32
    # [R, K, C] or None, status int32 [R, K])
    keys_ptr,  # int32 [R, K, U]
    units_ptr, best_ptr, bounds_ptr,  # int32 [R, K, C], [R, K, C], [R, K, 2]
    row_count_ptr, seen_ptr,  # int32 [R, K], zero before and after
    num_requests, num_slots, num_drafts, start, held, num_targets, num_candidates, parts,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, CHOSEN: tl.constexpr, WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    base_ptr, stride_br, stride_bk = base
    item = tl.program_id(0)
    row = (item // parts).to(tl.int64)
    piece = item % parts
    request = item // parts // num_drafts
    k = item // parts % num_drafts
    num_rows = num_requests * num_drafts
    slot = slot_of(slots_ptr, request, num_requests, num_slots)
    row_ptr = base_ptr + request.to(tl.int64) * stride_br + k.to(tl.int64) * stride_bk
    choice = (map_ptr, num_targets, adjust, slot, slot * num_drafts + k)
    c = tl.arange(0, WIDTH)
    if slot >= 0:
        chunks = tl.cdiv(held, BLOCK)
        nan = store_unit_keys(
            row_ptr, keys_ptr + row * padded_units(tl.cdiv(held, GROUP)), choice, piece * chunks // parts,
            (piece + 1) * chunks // parts, held, BLOCK, GROUP, SHIFT, start,
        )  # fmt: skip
        if nan > 0:
            tl.atomic_or(seen_ptr + row, NAN, sem="relaxed")
        if arrive(row_count_ptr + row, parts):
            keep_best(
                row, row_ptr, choice, None, keys_ptr, units_ptr, best_ptr, bounds_ptr, num_rows, held, num_candidates,
                GROUP, UNITS, CHOSEN, WIDTH, SHIFT, start,
            )  # fmt: skip
            tl.debug_barrier()
            ids = best_ids(best_ptr, row, num_rows, c, num_candidates, held)
            _write_list(row, row_ptr, ids, start, choice, weights, part, num_candidates, SHIFT, WIDTH)
            tl.store(part[6] + row, tl.atomic_xchg(seen_ptr + row, 0, sem="relaxed"))
    else:
        if piece == 0:
            _write_list(row, row_ptr, c * 0 - 1, start, choice, weights, part, num_candidates, SHIFT, WIDTH)
            tl.store(part[6] + row, 0)


@triton.jit
def _merge(row, lists, own_ids_ptr, places_ptr, shards, num_candidates, vocab, SHARDS: tl.constexpr, WIDTH: tl.constexpr):
    """The C best of all ranks' entries of a row, ascending ids: (id, place); -1 behind the last."""
    ids_ptr, keys_ptr, stride = lists
    rank = tl.arange(0, SHARDS)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    at = rank.to(tl.int64) * stride + row * num_candidates + c
    there = (rank < shards) & (c < num_candidates)
    ids = tl.load(ids_ptr + at, mask=there, other=-1)
    there = there & (ids >= 0) & (ids < vocab)
    keys = tl.load(keys_ptr + at, mask=there, other=ABSENT)
    wanted = tl.minimum(num_candidates, tl.sum(there.to(tl.int32)))
    _, selected, place = select(keys, wanted)
    tl.store(own_ids_ptr + row * num_candidates + place, ids, mask=selected)
    tl.store(places_ptr + row * num_candidates + place, rank * num_candidates + c, mask=selected)
    behind = tl.arange(0, WIDTH)
    tl.store(own_ids_ptr + row * num_candidates + behind, behind * 0 - 1, mask=(behind >= wanted) & (behind < num_candidates))


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_drafts", "first_draft", "column", "latent_items", "shards",
                               "stride_part"])  # fmt: skip
def candidates_finish_kernel(
    lists,  # (ids, keys int32 [N, R, K, C]) of the parts of all ranks
    logits_ptr,  # [N, R, K, C]
    targets_ptr,  # int32 [N, R, K, C] or None
    rows_ptr,  # [N, R, K, C, r] where W2's rows are gathered: the W2 of `head`; or None
    status_ptr,  # int32 [N, R, K]
    state,  # (anchors [S], stride, positions [S], stride, slots [R] or None, temperature [S] or None, seed [S])
    adjust, filters, head, latent, hidden, confidence, out,  # as in kernels/draft/candidates.py; W2 whole, or its rows of the parts
    scratch,  # as in kernels/draft/candidates.py
    places_ptr,  # int32 [R, K, C]
    request_count_ptr,  # int32 [R], zero before and after
    num_requests, num_slots, num_drafts, vocab, num_targets, num_candidates, first_draft, column, latent_items, shards,
    stride_part,  # int64 words
    ADVANCE: tl.constexpr, STREAM: tl.constexpr, WITH_MARKOV: tl.constexpr, JOINT: tl.constexpr,
    LOG_WIDTH: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, SHARDS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr, DRAFTS: tl.constexpr,
):  # fmt: skip
    """A program per row merges its lists, and as many as latents need; the last of a request walks it."""
    slots_ptr = state[4]
    program = tl.program_id(0)
    first = tl.zeros((), tl.int32)
    count = tl.zeros((), tl.int32)
    if program < latent_items:
        if latent is not None:
            first, count = latent_item(program, slots_ptr, latent, hidden, scratch[3], num_requests, num_slots, num_drafts, BLOCK_J)
    else:
        row = program - latent_items
        request = row // num_drafts
        k = row % num_drafts
        slot = slot_of(slots_ptr, request, num_requests, num_slots)
        if slot >= 0:
            of_parts = (lists[0], lists[1], stride_part * 2)
            _merge(row.to(tl.int64), of_parts, scratch[0], places_ptr, shards, num_candidates, vocab, SHARDS, WIDTH)
            if confidence is not None:
                hidden_ptr, stride_hr, stride_hk, hidden_size = hidden
                own_ptr = hidden_ptr + request.to(tl.int64) * stride_hr + k.to(tl.int64) * stride_hk
                tl.store(scratch[2] + row, hidden_score(own_ptr, confidence[0], hidden_size))
            first = request
            count = tl.full((), 1, tl.int32)
        else:
            if k == 0:
                tl.store(out[10] + request, 0)

    for request in range(first, first + count):
        slot = slot_of(slots_ptr, request, num_requests, num_slots)
        if slot >= 0:
            if arrive(request_count_ptr + request, awaited(request, latent, num_drafts)):
                base = (logits_ptr, num_drafts.to(tl.int64) * num_candidates, num_candidates)
                shared = (places_ptr, stride_part, targets_ptr, rows_ptr, shards)
                walk(
                    request, slot, status_ptr, base, state, None, None, shared, adjust, filters, head, latent, hidden, confidence,
                    out, scratch, num_drafts, num_candidates, num_targets, num_candidates, first_draft, column,
                    ADVANCE, STREAM, WITH_MARKOV, JOINT, LOG_WIDTH, WIDTH, SHIFT, BLOCK_R, BLOCK_O, BLOCK_J, DRAFTS,
                )  # fmt: skip


def launch_candidates_partial(programs, args, *, shift, config):
    """Launch one program per chunk of a row."""
    candidates_partial_kernel[(programs,)](
        *args,
        BLOCK=config.block,
        GROUP=config.group,
        UNITS=config.units,
        CHOSEN=config.chosen,
        WIDTH=config.width,
        SHIFT=shift,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )


def launch_candidates_finish(programs, args, *, kind, coupled, with_markov, joint, shift, shards, config):
    """Launch a program per row, those of latents before them."""
    candidates_finish_kernel[(programs,)](
        *args,
        ADVANCE=ADVANCES[kind],
        STREAM=COUPLED if coupled else DRAFT,
        WITH_MARKOV=with_markov,
        JOINT=joint,
        LOG_WIDTH=config.width.bit_length() - 1,
        WIDTH=config.width,
        SHIFT=shift,
        SHARDS=shards,
        BLOCK_R=config.block_r,
        BLOCK_O=config.block_o,
        BLOCK_J=config.block_j,
        DRAFTS=config.drafts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
