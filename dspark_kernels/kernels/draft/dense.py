"""Dense draft block: K positions of a block drafted left to right under the sequential head, in one persistent launch.

x_k = argmax_v of logits_k(v) (greedy) or of logits_k(v) / T - ln E_k(v) (sampled), logits_k = round(adjust(base_k +
bias(x_{k-1}))). Symbols: R requests, K positions, V vocabulary of the head, r rank, H hidden size, S request slots, U sub-blocks of
64 ids.

The block is a row of phases with a grid barrier between any two:
    [project_hidden]  the products of a gated or rnn head with the hidden states of all positions (kernels/draft/heads.py)
    per position:  [latents]  of a gated or rnn head;  vocabulary: every program sweeps its tiles of ids for up to 64 requests at
        once, while the next tiles of W2 and of the base logits are on their way, and tells its winners by one integer atomic
        maximum per request (kernels/draft/tile.py);  [filter]  one program per request finds the support and the winner in it
        (kernels/draft/filters.py)
    finish   log-sum-exp, confidence, last draft, flags (kernels/draft/rows.py)
A launch runs the phases [first_phase, end_phase): all of them in a cooperative launch, or one after the other where launches of a
graph cost less than a barrier. Both run the same code on the same tiles, so they give the same bits. Reference: reference/draft.py.
Source: DSpark, arXiv 2607.05147.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..args import Pointer, functions_key
from ..primitives.adjust import adjusted
from ..primitives.constants import DOT_ROWS, NAN, NEG_INF, NO_ID, SUB_BLOCK
from ..primitives.exponential import log2_approx, log2_of
from ..primitives.options import options_of
from ..primitives.philox import COUPLED, DRAFT
from ..primitives.slots import state_slots
from ..primitives.sumexp import numbers
from ..primitives.sync import grid_barrier
from .args import BaseLogits, BlockSizes, DraftOutputs, Hidden, RequestState
from .filters import filter_rows, mask_rows
from .heads import all_latents, block_tile, head_kind, keep_state, project_hidden, w2_tile
from .rows import finish, previous_tokens, settle
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


class BlockOptions(NamedTuple):
    """Choices of a dense block, one constexpr."""

    STREAM: int  # of the noise
    LOG2: Callable  # of the noise, of primitives/exponential.py
    WITH_MARKOV: bool  # the confidence head reads W1[x], too
    JOINT: bool  # filters apply jointly, not one after another
    GROUPS: int  # padded number of groups of a row, with filters

    cache_key = functions_key


class BlockPath(NamedTuple):
    """Drafts of a round before position k of a dense block, for primitives/adjust.py."""

    tokens_ptr: Pointer  # int64 [S, K]
    stride_tokens: int
    slots: Any  # int64 [ROWS]
    last: Any  # number of the draft that is not among the tokens yet, or the path's length
    previous: Any  # int64 [ROWS], that draft


@triton.jit
def latents(k, state, best_ptr, head, projection, sizes, KIND: tl.constexpr, TILE: tl.constexpr):
    """Latents of position k, rounded to the type of the W2 product: a program takes BLOCK_J of r for DOT_ROWS requests."""
    BLOCK_J: tl.constexpr = TILE.BLOCK_J
    rank, num_requests = head.rank, sizes.num_requests
    tiles = tl.cdiv(rank, BLOCK_J)
    for item in range(tl.program_id(0), tiles * tl.cdiv(num_requests, DOT_ROWS), tl.num_programs(0)):
        j = item % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
        requests = item // tiles * DOT_ROWS + tl.arange(0, DOT_ROWS)
        slots = state_slots(state.slots_ptr, requests, num_requests, sizes.num_slots)
        live = slots >= 0
        previous = previous_tokens(state, best_ptr, requests, slots, k, num_requests)
        known = live & (previous >= 0) & (previous < head.vocab)
        latent = KIND.latent(
            projection, head, j, requests, live, previous, known, k, num_requests, sizes.num_drafts, TILE.BLOCK_S, KIND.mix_type
        )  # fmt: skip
        at = projection.latent_ptr + requests.to(tl.int64)[None, :] * rank + j[:, None]
        tl.store(at, latent.to(projection.latent_ptr.dtype.element_ty), mask=(j < rank)[:, None] & live[None, :])


@triton.jit
def _drafted(j, path):
    """PATH of adjusted: drafts of this round, the last of which is still in its word and not among the tokens."""
    inside = (path.slots >= 0) & (path.slots * 0 + j < path.last)
    token = tl.load(path.tokens_ptr + path.slots * path.stride_tokens + j, mask=inside, other=-1, volatile=True)
    return tl.where(j == path.last, path.previous, token)


@triton.jit
def _adjusted(x, tokens, inside, slots, requests, k, state, best_ptr, out, adjust, sizes):
    """Logits with penalties, bias and mask; the mask's rows are [S, K]."""
    path = tokens
    path_max = 0
    if adjust.penalties is not None:
        previous = previous_tokens(state, best_ptr, requests, slots, k, sizes.num_requests)
        path_max = sizes.column + k
        path = BlockPath(out.tokens_ptr, out.stride_tokens, slots, tl.where(k > 0, path_max - 1, path_max), previous)
    return adjusted(x, tokens[None, :], inside, slots, slots * sizes.num_drafts + k, adjust, path, path_max, _drafted)


@triton.jit
def _base_logits(base, requests, k, ids, vocab):
    """[ROWS, BLOCK_V] as stored, 0 outside."""
    rows = requests.rows.to(tl.int64) * base.stride_request + tl.cast(k, tl.int64) * base.stride_position
    inside = (requests.slots >= 0)[:, None] & ((ids >= 0) & (ids < vocab))[None, :]
    return tl.load(base.ptr + rows[:, None] + ids[None, :], mask=inside, other=0.0)


@triton.jit
def _draft_tile(
    base_logits, bias, first_id, requests, k, state, map_ptr, adjust, out, scratch, sizes, OPTIONS: tl.constexpr, TILE: tl.constexpr
):
    """One tile of ids at position k: proposal and sub-blocks are stored; keys, ids that can win, and where a NaN was."""
    vocab, column = sizes.vocab, sizes.column
    slots = requests.slots
    live = slots >= 0
    ids = first_id + tl.arange(0, TILE.BLOCK_V)
    inside = live[:, None] & (ids < vocab)[None, :]
    x = base_logits.to(tl.float32)
    if bias is not None:
        x += bias
    tokens = ids  # in the target's vocabulary
    can_win = tl.where(ids < vocab, ids, NO_ID)
    if map_ptr is not None:
        mapped = tl.load(map_ptr + ids, mask=ids < vocab, other=-1)
        used = (mapped >= 0) & (mapped < sizes.num_targets)
        tokens = tl.where(used, mapped, 0).to(tl.int32)
        can_win = tl.where(used, tokens, NO_ID)
    if adjust is not None:
        x = _adjusted(x, tokens, inside, slots, requests.rows, k, state, scratch.best_ptr, out, adjust, sizes)
    if map_ptr is not None:
        x = tl.where(used[None, :], x, NEG_INF)  # else an id that stands for no token
    nan = inside & (x != x)
    stored = numbers(x).to(base_logits.dtype)  # rounded once; everything below reads the rounded value
    x = tl.where(inside, stored.to(tl.float32), NEG_INF)
    if out.logits_ptr is not None:
        at = out.logits_ptr + slots[:, None] * out.stride_logits
        at = at + (column + k).to(tl.int64) * out.stride_logits_position + ids[None, :]
        tl.store(at, stored, mask=inside)
    key = x
    if state.temperature_ptr is not None:
        key = noisy_keys(x, first_id, tokens, requests, map_ptr is not None, OPTIONS, TILE)
        num_sub_blocks = tl.cdiv(vocab, SUB_BLOCK)
        first_row = (requests.rows.to(tl.int64) * sizes.num_drafts + k) * num_sub_blocks
        store_sub_blocks(
            scratch.sub_block_max_ptr, scratch.sub_block_sumexp_ptr, x, first_row, requests.scale, live,
            first_id // SUB_BLOCK, num_sub_blocks, TILE,
        )  # fmt: skip
    return key, can_win, nan


@triton.jit
def _sweep(
    first_request, k, base, state, map_ptr, head, projection, adjust, out, scratch, sizes,
    KIND: tl.constexpr, OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """This program's tiles of ids for ROWS requests at position k, and its winner of each."""
    ROWS: tl.constexpr = TILE.ROWS
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    num_requests, num_slots, vocab = sizes.num_requests, sizes.num_slots, sizes.vocab
    requests = tile_requests(first_request, state, num_requests, num_slots, sizes.first_draft + k + 1, OPTIONS.STREAM, ROWS)
    if head is not None:
        columns, slots = dot_requests(first_request, state, num_requests, num_slots, ROWS)
        previous = columns.to(tl.int64)
        if projection is None:
            previous = previous_tokens(state, scratch.best_ptr, columns, slots, k, num_requests)
        latents = tile_latents(head, projection, columns, slots, previous)
        loaded = None
        if TILE.ONE_DOT:
            loaded = all_latents(latents.ptr, latents.offsets, latents.known, head, KIND, TILE.BLOCK_R)
    first, step, tiles = sweep_range(vocab, k * tl.cdiv(num_requests, ROWS) + first_request // ROWS, BLOCK_V)
    ahead = _base_logits(base, requests, k, first + tl.arange(0, BLOCK_V), vocab)
    best = no_best(ROWS, BLOCK_V)
    for tile in tl.range(0, tiles, num_stages=TILE.STAGES):
        first_id = first + tile * step
        ids = first_id + tl.arange(0, BLOCK_V)
        base_logits = ahead
        ahead = _base_logits(base, requests, k, ids + step, vocab)  # on its way while this tile is looked at
        bias = None
        if head is not None:
            bias = tile_bias(w2_tile(head, ids, vocab, TILE.BLOCK_R), latents, loaded, head, ids, vocab, KIND, TILE)
        key, can_win, nan = _draft_tile(
            base_logits, bias, first_id, requests, k, state, map_ptr, adjust, out, scratch, sizes, OPTIONS, TILE
        )  # fmt: skip
        best = best_with(best, key, can_win, tl.where(nan, NAN, 0), ROWS, BLOCK_V)
    live = requests.slots >= 0
    nans = tl.max(best.seen, axis=1)
    tl.atomic_or(scratch.status_ptr + requests.rows, nans, mask=live & (nans > 0), sem="relaxed")
    at = scratch.best_ptr + k * num_requests + requests.rows
    tl.atomic_max(at, winners(best), mask=live, sem="relaxed")


@triton.jit
def _draft_block(
    first_phase, end_phase, base, state, map_ptr, head, projection, adjust, support, hidden, confidence, out, scratch, sizes,
    KIND: tl.constexpr, OPTIONS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The phases [first_phase, end_phase) of a block."""
    num_requests, num_slots, num_drafts = sizes.num_requests, sizes.num_slots, sizes.num_drafts
    MIXED: tl.constexpr = 0 if KIND.latent is None else 1
    STAGES: tl.constexpr = MIXED + (1 if support is None else 2)  # phases per position
    end_blocks = MIXED + num_drafts * STAGES
    if KIND.latent is not None:
        if first_phase == 0:
            project_hidden(
                projection, head, hidden, state.slots_ptr, num_requests, num_slots, num_drafts, sizes.first_draft, KIND, TILE
            )
    begin = tl.maximum(first_phase - MIXED, 0) // STAGES
    end = tl.cdiv(tl.minimum(end_phase, end_blocks) - MIXED, STAGES)
    # The search of filters and the sweep would fill each other's registers with what the compiler can move out of this loop.
    FILTERED: tl.constexpr = support is not None
    for k in tl.range(begin, end, disable_licm=FILTERED):
        phase = MIXED + k * STAGES
        if phase > first_phase:
            grid_barrier(scratch.barrier_ptr)
        if phase >= first_phase:
            if k > 0:
                settle(k - 1, base, state, map_ptr, head, adjust, out, scratch, sizes)
                if support is not None:
                    mask_rows(k - 1, state, support, out, sizes, TILE)
        if KIND.latent is not None:
            if phase >= first_phase:
                latents(k, state, scratch.best_ptr, head, projection, sizes, KIND, TILE)
            phase += 1
            if (phase > first_phase) & (phase < end_phase):
                grid_barrier(scratch.barrier_ptr)
        if (phase >= first_phase) & (phase < end_phase):
            for first_request in range(0, num_requests, TILE.ROWS):
                _sweep(
                    first_request, k, base, state, map_ptr, head, projection, adjust, out, scratch, sizes, KIND, OPTIONS, TILE
                )  # fmt: skip
        if support is not None:
            phase += 1
            if (phase > first_phase) & (phase < end_phase):
                grid_barrier(scratch.barrier_ptr)
            if (phase >= first_phase) & (phase < end_phase):
                filter_rows(k, state, map_ptr, support, out, scratch, sizes, OPTIONS)
    if end_phase > end_blocks:
        if end_blocks > first_phase:
            grid_barrier(scratch.barrier_ptr)
        settle(num_drafts - 1, base, state, map_ptr, head, adjust, out, scratch, sizes)
        if support is not None:
            mask_rows(num_drafts - 1, state, support, out, sizes, TILE)
        finish(
            state, head, confidence, hidden, out, out.lse_ptr if support is None else None, scratch, sizes, OPTIONS.WITH_MARKOV
        )  # fmt: skip
        if KIND.parts == 3:
            keep_state(projection, head, state.slots_ptr, num_requests, num_slots, num_drafts, TILE.BLOCK_N)


@triton.jit(do_not_specialize=["first_phase", "end_phase", "num_requests", "num_slots", "num_drafts", "first_draft", "column"])
def draft_dense_kernel(
    # Records of kernels/draft/args.py and kernels/args.py; those of constants are of kernels/draft/heads.py and of this file.
    inputs,  # BlockInputs
    head,  # Head or None
    projection,  # Projection of a gated or rnn head, or None
    adjust,  # Adjustments or None
    support,  # Support, with filters, or None
    confidence,  # Confidence or None
    results,  # BlockResults
    scratch,  # BlockScratch
    first_phase, end_phase, num_requests, num_slots, num_drafts,
    widths,  # BlockWidths
    first_draft, column,
    strides,  # BlockStrides
    KIND: tl.constexpr,  # HeadKind
    OPTIONS: tl.constexpr,  # BlockOptions
    TILE: tl.constexpr,  # BlockTile
):  # fmt: skip
    # The records are made in the call: a variable would hold a stride of 1 as a number that the compiler does not know.
    _draft_block(
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
        support,
        Hidden(inputs.hidden_ptr, strides.hidden_request, strides.hidden_position, widths.hidden),
        confidence,
        DraftOutputs(
            results.tokens_ptr, strides.tokens, results.logits_ptr, strides.logits, strides.logits_position,
            results.lse_ptr, strides.lse, results.flags_ptr,
        ),
        scratch,
        BlockSizes(num_requests, num_slots, num_drafts, widths.vocab, widths.num_targets, first_draft, column),
        KIND,
        OPTIONS,
        TILE,
    )  # fmt: skip


def phases(projection, drafts: int, filtered: bool) -> int:
    """How many phases a block of `drafts` positions has; projection None, "gated" or "rnn"."""
    mixed = projection is not None
    return mixed + drafts * (1 + mixed + filtered) + 1


def launch_draft_dense(
    programs, args, tail, *, drafts, projection, widening, dot_type, mix_type, coupled, with_markov, one_dot, joint, groups,
    filtered, rows, fast_log2, config,
):  # fmt: skip
    """One launch of all phases (its programs must all be resident), or one for each. args, tail: before and after the range."""
    end = phases(projection, drafts, filtered)
    spans = [(0, end)] if config.one_launch or programs == 1 else [(phase, phase + 1) for phase in range(end)]
    stream = COUPLED if coupled else DRAFT
    for span in spans:
        draft_dense_kernel[(programs,)](
            *args,
            *span,
            *tail,
            KIND=head_kind(projection, widening, dot_type, mix_type),
            OPTIONS=BlockOptions(
                STREAM=stream, LOG2=log2_approx if fast_log2 else log2_of, WITH_MARKOV=with_markov, JOINT=joint, GROUPS=groups
            ),
            TILE=block_tile(rows, one_dot, config),
            launch_cooperative_grid=config.one_launch and programs > 1,
            **options_of(config),
        )
