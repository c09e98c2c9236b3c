"""Dense draft block on vocabulary shards: one position's part of a rank, and its finish from the parts of all ranks.

x_k = argmax over ranks of argmax_{v of the rank} key_k(v), key and logits as in kernels/draft/dense.py; lse_k from the (maximum,
sum of exponentials) pairs of all ranks' sub-blocks of 64 ids. Symbols: R requests, K positions, W ids of a shard, r rank of the
head, S request slots, N ranks, U sub-blocks that a shard can touch. Ids, sub-blocks and noise lanes are global, so that the word of
an id does not depend on which rank has it. Reference: the op on the whole vocabulary (reference/draft.py). Source: DSpark, arXiv
2607.05147.

Latents of gated and rnn heads are the same on every rank, each makes them for itself: the products with hidden states, a grid
barrier, the latents, a barrier, the vocabulary, all in the launch of the part. An rnn's state goes from position to position in
the caller's [S, r].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..args import Pointer, functions_key
from ..primitives.adjust import adjusted
from ..primitives.constants import BAD_TOKEN_ID, DOT_ROWS, NAN, NEG_INF, NO_ID, NONFINITE_ROW, POS_INF, SUB_BLOCK
from ..primitives.exponential import log2_approx, log2_of
from ..primitives.options import options_of
from ..primitives.philox import COUPLED, DRAFT
from ..primitives.race import unpack_id, unpack_key
from ..primitives.slots import state_slots
from ..primitives.sumexp import below_max, log2_scale, numbers
from ..primitives.sync import arrive, grid_barrier
from .args import BaseLogits, Hidden, RequestState
from .heads import all_latents, block_tile, head_kind, keep_state, project_hidden, w2_tile
from .rows import _confidence_logit as confidence_logit, log_sum_exp
from .tile import (
    best_with,
    dot_requests,
    no_best,
    noisy_keys,
    store_sub_blocks,
    sweep_range,
    tile_bias,
    tile_latents,
    tile_requests,
    winners,
)

FINITE = tl.constexpr(256)  # a finite logit was seen; beside the bits of `flags`
PHASES = tl.constexpr(3)  # of a part: precomputed products, latents, vocabulary


class ShardOutputs(NamedTuple):
    """Drafts before position k, which are read, and the logits that a part writes."""

    tokens_ptr: Pointer  # int64 [S, K]
    stride_tokens: int
    logits_ptr: Pointer | None  # [S, K, W]
    stride_logits: int
    stride_logits_position: int


class ShardPath(NamedTuple):
    """Drafts of a round before position k of a part, for primitives/adjust.py."""

    tokens_ptr: Pointer  # int64 [S, K]
    stride_tokens: int
    slots: Any  # int64 [ROWS]


class ShardColumns(NamedTuple):
    """Which ids a part walks: all are global, columns are the shard's."""

    num_targets: int  # ids of the target
    start: int  # id of the first column
    held: int  # columns with an id of the vocabulary
    width: int  # W
    first_sub_block: int  # number of the first sub-block
    num_sub_blocks: int  # U


class ShardPlace(NamedTuple):
    """Which position a part is of, and of which batch."""

    k: int  # position in this block
    num_requests: int  # R
    num_slots: int  # S
    num_drafts: int  # K
    first_draft: int  # number of the block's first draft in its round
    column: int  # of the block's first draft in the outputs


class ShardOptions(NamedTuple):
    """Choices of a part, one constexpr."""

    STREAM: int  # of the noise
    LOG2: Callable  # of the noise, of primitives/exponential.py

    cache_key = functions_key


@triton.jit
def _previous(state, out, slots, k, column):
    """Token that position k follows: the anchor, or the draft before it."""
    if k == 0:
        tokens = tl.load(state.anchors_ptr + slots * state.stride_anchors, mask=slots >= 0, other=-1).to(tl.int64)
    else:
        tokens = tl.load(out.tokens_ptr + slots * out.stride_tokens + column + k - 1, mask=slots >= 0, other=-1).to(tl.int64)
    return tokens


@triton.jit
def _drafted(j, path):
    """PATH of adjusted: drafts of this round, all of which are stored."""
    return tl.load(path.tokens_ptr + path.slots * path.stride_tokens + j, mask=path.slots >= 0, other=-1)


@triton.jit
def _latents(state, out, head, projection, place, KIND: tl.constexpr, TILE: tl.constexpr):
    """kernels/draft/dense.py's phase of latents where a block has this one position."""
    BLOCK_J: tl.constexpr = TILE.BLOCK_J
    k, num_requests, rank = place.k, place.num_requests, head.rank
    tiles = tl.cdiv(rank, BLOCK_J)
    for item in range(tl.program_id(0), tiles * tl.cdiv(num_requests, DOT_ROWS), tl.num_programs(0)):
        j = item % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
        requests = item // tiles * DOT_ROWS + tl.arange(0, DOT_ROWS)
        slots = state_slots(state.slots_ptr, requests, num_requests, place.num_slots)
        live = slots >= 0
        previous = _previous(state, out, slots, k, place.column)
        known = live & (previous >= 0) & (previous < head.vocab)
        latent = KIND.latent(
            projection, head, j, requests, live, previous, known, k * 0, num_requests, 1, TILE.BLOCK_S, KIND.mix_type
        )  # fmt: skip
        at = projection.latent_ptr + requests.to(tl.int64)[None, :] * rank + j[:, None]
        tl.store(at, latent.to(projection.latent_ptr.dtype.element_ty), mask=(j < rank)[:, None] & live[None, :])


@triton.jit
def _local(ids, columns):
    """Columns of global ids in the shard, `width` where they are in none."""
    local = ids - columns.start
    return tl.where((local >= 0) & (local < columns.width), local, columns.width)


@triton.jit
def _base_logits(base, requests, k, local, columns):
    """[ROWS, BLOCK_V] as stored, 0 outside."""
    rows = requests.rows.to(tl.int64) * base.stride_request + tl.cast(k, tl.int64) * base.stride_position
    inside = (requests.slots >= 0)[:, None] & (local < columns.held)[None, :]
    return tl.load(base.ptr + rows[:, None] + local[None, :], mask=inside, other=0.0)


@triton.jit
def _shard_tile(
    base_logits, bias, first_id, requests, state, map_ptr, adjust, out, part, place, columns,
    OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of ids: logits and sub-blocks are stored; keys, ids that can win, and what was seen of a row.

    Columns from `held` on have no id of the vocabulary: the distribution gives them nothing.
    """
    k, column = place.k, place.column
    slots = requests.slots
    live = slots >= 0
    ids = first_id + tl.arange(0, TILE.BLOCK_V)
    local = _local(ids, columns)
    held = local < columns.held
    inside = live[:, None] & held[None, :]
    base_x = base_logits.to(tl.float32)
    x = base_x
    if bias is not None:
        x += bias
    tokens = ids  # in the target's vocabulary
    can_win = tl.where(held, ids, NO_ID)
    if map_ptr is not None:
        mapped = tl.load(map_ptr + local, mask=held, other=-1)
        used = (mapped >= 0) & (mapped < columns.num_targets)
        tokens = tl.where(used, mapped, 0).to(tl.int32)
        can_win = tl.where(used, tokens, NO_ID)
    if adjust is not None:
        path = ShardPath(out.tokens_ptr, out.stride_tokens, slots)
        x = adjusted(x, tokens[None, :], inside, slots, slots * place.num_drafts + k, adjust, path, column + k, _drafted)
    if map_ptr is not None:
        x = tl.where(used[None, :], x, NEG_INF)  # else an id that stands for no token
        base_x = tl.where(used[None, :], base_x, NEG_INF)
    nan = inside & (x != x)
    stored = numbers(x).to(base_logits.dtype)  # rounded once; everything below reads the rounded value
    x = tl.where(inside, stored.to(tl.float32), NEG_INF)
    if adjust is not None:
        base_x = x
    seen = tl.where(nan, NAN, 0) | tl.where(inside & (tl.abs(base_x) < POS_INF), FINITE, 0)
    if out.logits_ptr is not None:
        at = out.logits_ptr + slots[:, None] * out.stride_logits
        at = at + tl.cast(column + k, tl.int64) * out.stride_logits_position + local[None, :]
        tl.store(at, tl.where(inside, stored, NEG_INF), mask=live[:, None] & (local < columns.width)[None, :])
    key = x
    if state.temperature_ptr is not None:
        key = noisy_keys(x, first_id, tokens, requests, map_ptr is not None, OPTIONS, TILE)
        if part.sub_block_max_ptr is not None:
            first_row = requests.rows.to(tl.int64) * columns.num_sub_blocks
            store_sub_blocks(
                part.sub_block_max_ptr, part.sub_block_sumexp_ptr, x, first_row, requests.scale, requests.rows < place.num_requests,
                first_id // SUB_BLOCK - columns.first_sub_block, columns.num_sub_blocks, TILE,
            )  # fmt: skip
    return key, can_win, seen


@triton.jit
def _sweep(
    first_request, base, state, map_ptr, head, projection, adjust, out, part, place, columns,
    KIND: tl.constexpr, OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """This program's tiles of the shard's ids for ROWS requests, and its winner of each."""
    ROWS: tl.constexpr = TILE.ROWS
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    k, num_requests, num_slots = place.k, place.num_requests, place.num_slots
    requests = tile_requests(first_request, state, num_requests, num_slots, place.first_draft + k + 1, OPTIONS.STREAM, ROWS)
    if head is not None:
        dot_rows, slots = dot_requests(first_request, state, num_requests, num_slots, ROWS)
        previous = dot_rows.to(tl.int64)
        if projection is None:
            previous = _previous(state, out, slots, k, place.column)
        latents = tile_latents(head, projection, dot_rows, slots, previous)
        loaded = None
        if TILE.ONE_DOT:
            loaded = all_latents(latents.ptr, latents.offsets, latents.known, head, KIND, TILE.BLOCK_R)
    sweep = k * tl.cdiv(num_requests, ROWS) + first_request // ROWS
    first, step, tiles = sweep_range(columns.num_sub_blocks * SUB_BLOCK, sweep, BLOCK_V)
    first += columns.first_sub_block * SUB_BLOCK
    ahead = _base_logits(base, requests, k, _local(first + tl.arange(0, BLOCK_V), columns), columns)
    best = no_best(ROWS, BLOCK_V)
    for tile in tl.range(0, tiles, num_stages=TILE.STAGES):
        first_id = first + tile * step
        ids = first_id + tl.arange(0, BLOCK_V)
        base_logits = ahead
        ahead = _base_logits(base, requests, k, _local(ids + step, columns), columns)  # on its way while this tile is looked at
        bias = None
        if head is not None:
            local = _local(ids, columns)
            w2 = w2_tile(head, local, columns.held, TILE.BLOCK_R)
            bias = tile_bias(w2, latents, loaded, head, local, columns.held, KIND, TILE)
        key, can_win, seen = _shard_tile(
            base_logits, bias, first_id, requests, state, map_ptr, adjust, out, part, place, columns, OPTIONS, TILE
        )  # fmt: skip
        best = best_with(best, key, can_win, seen, ROWS, BLOCK_V)
    status = tl.max(best.seen & NAN, axis=1) | tl.max(best.seen & FINITE, axis=1)
    live = requests.slots >= 0
    tl.atomic_or(part.seen_ptr + requests.rows, status, mask=live, sem="relaxed")
    tl.atomic_max(part.best_ptr + requests.rows, winners(best), mask=live, sem="relaxed")


@triton.jit
def _draft_part(
    first_phase, end_phase, base, state, map_ptr, head, projection, adjust, hidden, out, part, place, columns,
    KIND: tl.constexpr, OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The phases [first_phase, end_phase) of a rank's part of one position."""
    programs = tl.num_programs(0)
    k, num_requests, num_slots = place.k, place.num_requests, place.num_slots
    if KIND.latent is not None:
        if first_phase == 0:
            own_ptr = hidden.ptr + tl.cast(k, tl.int64) * hidden.stride_position
            project_hidden(
                projection, head, Hidden(own_ptr, hidden.stride_request, hidden.stride_position, hidden.size), state.slots_ptr,
                num_requests, num_slots, 1, place.first_draft + k, KIND, TILE,
            )  # fmt: skip
        if (first_phase < 1) & (end_phase > 1):
            grid_barrier(part.barrier_ptr)
        if (first_phase <= 1) & (end_phase > 1):
            _latents(state, out, head, projection, place, KIND, TILE)
        if (first_phase <= 1) & (end_phase > 2):
            grid_barrier(part.barrier_ptr)
    if end_phase > 2:
        if KIND.parts == 3:
            keep_state(projection, head, state.slots_ptr, num_requests, num_slots, k * 0 + 1, TILE.BLOCK_N)
        for first_request in range(0, num_requests, TILE.ROWS):
            _sweep(
                first_request, base, state, map_ptr, head, projection, adjust, out, part, place, columns, KIND, OPTIONS, TILE
            )  # fmt: skip
        if arrive(part.arrivals_ptr, programs):
            for first_request in range(0, num_requests, 128):
                requests = first_request + tl.arange(0, 128)
                inside = requests < num_requests
                tl.store(
                    part.words_ptr + requests,
                    tl.load(part.best_ptr + requests, mask=inside, other=0, volatile=True),
                    mask=inside,
                )
                seen = tl.load(part.seen_ptr + requests, mask=inside, other=0, volatile=True)
                tl.store(part.status_ptr + requests, seen.to(tl.int64), mask=inside)
                tl.debug_barrier()  # every warp has read what is put back to zero
                tl.store(part.best_ptr + requests, tl.zeros([128], tl.int64), mask=inside)
                tl.store(part.seen_ptr + requests, tl.zeros([128], tl.int32), mask=inside)


@triton.jit(
    do_not_specialize=[
        "first_phase", "end_phase", "k", "num_requests", "num_slots", "num_drafts", "start", "held", "first_draft", "column",
    ]
)  # fmt: skip
def draft_partial_kernel(
    # Records of kernels/draft/args.py and kernels/args.py.
    inputs,  # ShardInputs
    head, projection,  # Head with W2 and its scales of the shard, Projection of a gated or rnn head, or None
    adjust,  # Adjustments, by target id; or None
    part,  # ShardPart
    first_phase, end_phase, k, num_requests, num_slots, num_drafts, start, held,
    widths,  # ShardWidths
    first_draft, column,
    strides,  # ShardStrides
    KIND: tl.constexpr,  # HeadKind
    OPTIONS: tl.constexpr,  # ShardOptions
    TILE: tl.constexpr,  # BlockTile
):  # fmt: skip
    """Position k on this rank's ids start .. start + held - 1; those of whole sub-blocks are walked, others are masked.

    A launch runs the phases [first_phase, end_phase) of PHASES; the first two are those of latents. The records are made in the
    call: a variable would hold a stride of 1 as a number that the compiler does not know.
    """
    _draft_part(
        first_phase,
        end_phase,
        BaseLogits(inputs.base_ptr, strides.base_request, strides.base_position),
        RequestState(
            inputs.anchors_ptr, strides.anchors, inputs.positions_ptr, strides.positions, inputs.slots_ptr,
            inputs.temperature_ptr, inputs.seed_ptr,
        ),
        inputs.map_ptr,
        head,
        projection,
        adjust,
        Hidden(inputs.hidden_ptr, strides.hidden_request, strides.hidden_position, widths.hidden),
        ShardOutputs(inputs.tokens_ptr, strides.tokens, part.logits_ptr, strides.logits, strides.logits_position),
        part,
        ShardPlace(k, num_requests, num_slots, num_drafts, first_draft, column),
        ShardColumns(widths.num_targets, start, held, widths.width, start // SUB_BLOCK, widths.num_sub_blocks),
        KIND,
        OPTIONS,
        TILE,
    )  # fmt: skip


@triton.jit
def _row_sumexp(gathered, stride_max, stride_sumexp, row, num_sub_blocks, shards, scale, BLOCK: tl.constexpr):
    """Maximum and sum of exponentials of a row from the sub-blocks of all ranks: integers, so their order and number do not
    matter."""
    top = tl.full((), float("-inf"), tl.float32)
    for first in range(0, shards * num_sub_blocks, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        where = row * num_sub_blocks + piece % num_sub_blocks
        inside = piece < shards * num_sub_blocks
        m = tl.load(
            gathered.sub_block_max_ptr + (piece // num_sub_blocks).to(tl.int64) * stride_max + where, mask=inside, other=NEG_INF
        )
        top = tl.maximum(top, tl.max(m, axis=0))
    total = tl.zeros((), tl.int64)
    for first in range(0, shards * num_sub_blocks, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        where = row * num_sub_blocks + piece % num_sub_blocks
        inside = piece < shards * num_sub_blocks
        shard = (piece // num_sub_blocks).to(tl.int64)
        m = tl.load(gathered.sub_block_max_ptr + shard * stride_max + where, mask=inside, other=NEG_INF)
        sumexp = tl.load(gathered.sub_block_sumexp_ptr + shard * stride_sumexp + where, mask=inside, other=0)
        total += tl.sum((sumexp.to(tl.float32) * tl.exp2(below_max(m, top) * scale)).to(tl.int64), axis=0)
    return top, total


@triton.jit(do_not_specialize=["k", "num_requests", "num_slots", "first_draft", "column", "stride_part", "stride_max"])
def draft_finish_kernel(
    # Records of kernels/draft/args.py.
    gathered,  # GatheredParts
    anchors_ptr,  # int [S]
    head,  # Head, of which W1 is read; or None
    hidden_ptr,  # [R, K, H] or None
    confidence,  # Confidence or None
    tensors,  # FinishTensors
    k, num_requests, num_slots,
    widths,  # FinishWidths
    first_draft, column, stride_part, stride_max,
    strides,  # FinishStrides
    WITH_MARKOV: tl.constexpr, SHARDS: tl.constexpr,
):  # fmt: skip
    """Request = program: everything follows from the gathered words, so every rank writes the same."""
    flags_ptr = tensors.flags_ptr
    request = tl.program_id(0)
    slot = tl.max(state_slots(tensors.slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
    before = tl.zeros((), tl.int32)
    if k > 0:
        before = tl.load(flags_ptr + request)
        tl.debug_barrier()  # every warp has read what one of them now writes
    if slot < 0:
        tl.store(flags_ptr + request, 0)
    else:
        shard = tl.arange(0, SHARDS)
        part = shard.to(tl.int64) * stride_part + request
        word = tl.max(tl.load(gathered.words_ptr + part, mask=shard < widths.shards, other=0), axis=0)
        seen = tl.load(gathered.status_ptr + part, mask=shard < widths.shards, other=0).to(tl.int32)
        finite = tl.max(seen & FINITE, axis=0) > 0
        key = unpack_key(word)
        status = tl.max(seen & NAN, axis=0) | tl.where((key == NEG_INF) | (key != key), NONFINITE_ROW, 0)
        status |= tl.where((key == POS_INF) & (finite == 0), NONFINITE_ROW, 0)
        previous = tl.load(anchors_ptr + slot * strides.anchors).to(tl.int64)
        if head is not None:
            status |= tl.where((previous < 0) | (previous >= head.vocab), BAD_TOKEN_ID, 0)
        tl.store(flags_ptr + request, before | status)
        tl.store(tensors.tokens_ptr + slot * strides.tokens + column + k, unpack_id(word))
        if tensors.lse_ptr is not None:
            scale = log2_scale(tl.load(tensors.temperature_ptr + slot))
            row_max, sumexp = _row_sumexp(
                gathered, stride_max, stride_part, request.to(tl.int64), widths.num_sub_blocks, widths.shards, scale, 1024
            )
            tl.store(tensors.lse_ptr + slot * strides.lse + column + k, log_sum_exp(row_max, sumexp, scale))
        if confidence is not None:
            if k > 0:
                previous = tl.load(tensors.tokens_ptr + slot * strides.tokens + column + k - 1).to(tl.int64)
            logit = confidence_logit(
                Hidden(hidden_ptr, strides.hidden_request, strides.hidden_position, widths.hidden), confidence, head, request, k,
                previous, WITH_MARKOV,
            )  # fmt: skip
            tl.store(confidence.raw_ptr + slot * confidence.stride_raw + column + k, logit)
            if confidence.sts_ptr is not None:
                logit = logit / tl.load(confidence.sts_ptr + first_draft + k)
            scores_ptr = confidence.scores_ptr + slot * confidence.stride_scores + column + k
            tl.store(scores_ptr, 1.0 / (1.0 + tl.exp(-logit)))


def launch_draft_partial(
    programs, args, tail, *, projection, widening, dot_type, mix_type, coupled, one_dot, rows, fast_log2, config
):
    """Without a projection nobody waits for another. With one, a cooperative launch, or one for each phase. args, tail: before and
    after the range of phases."""
    end = PHASES.value
    apart = projection is not None and programs > 1 and not config.one_launch
    for span in [(phase, phase + 1) for phase in range(end)] if apart else [(0, end)]:
        draft_partial_kernel[(programs,)](
            *args,
            *span,
            *tail,
            KIND=head_kind(projection, widening, dot_type, mix_type),
            OPTIONS=ShardOptions(STREAM=COUPLED if coupled else DRAFT, LOG2=log2_approx if fast_log2 else log2_of),
            TILE=block_tile(rows, one_dot, config),
            launch_cooperative_grid=projection is not None and programs > 1 and config.one_launch,
            **options_of(config),
        )


def launch_draft_finish(requests, args, *, with_markov, shards):
    """Launch one program per request."""
    draft_finish_kernel[(requests,)](*args, WITH_MARKOV=with_markov, SHARDS=shards, num_warps=4, enable_fp_fusion=False)
