"""Dense draft block: K positions of a block drafted left to right under the sequential head, in one persistent launch.

x_k = argmax_v of logits_k(v) (greedy) or of logits_k(v) / T - ln E_k(v) (sampled), logits_k = round(adjust(base_k +
bias(x_{k-1}))). Symbols: R requests, K positions, V vocabulary of the head, r rank, H hidden size, S state slots, U units of 64
ids.

The block is a row of phases with a grid barrier between any two:
    [hoist]  the products of a gated or rnn head with the hidden states of all positions (kernels/draft/heads.py)
    per position:  [latents]  of a gated or rnn head;  vocabulary: every program takes tiles of ids for the whole batch, so that W2
        is read once per position, and one integer atomic maximum per request and tile finds the winner;  [filter]  one program
        per request finds the support and the winner in it (kernels/draft/filters.py)
    finish   log-sum-exp, confidence, last draft, flags (kernels/draft/rows.py)
A launch runs the phases [first_phase, end_phase): all of them in a cooperative launch, or one after the other where launches of a
graph cost less than a barrier. Both run the same code on the same tiles, so they give the same bits. Oracle: reference/draft.py.
Source: DSpark, arXiv 2607.05147.
"""

import triton
import triton.language as tl

from ..primitives.adjust import adjusted
from ..primitives.barrier import grid_barrier
from ..primitives.mass import NEG_INF, ONE, below_max, log2_scale, masses, numbers
from ..primitives.philox import COUPLED, DRAFT, lane_words, log2_exponential, words_at
from ..primitives.race import NOBODY, pack
from ..primitives.slots import state_slots
from ..primitives.widen import by_cast, fp8_by_bits, fp8_by_cast
from .filters import filter_rows, mask_rows
from .heads import DOT_ROWS, gated_latent, hoist, keep_state, low_rank_bias, rnn_latent, w2_tile
from .rows import NAN, UNIT, finish, previous_tokens, settle


@triton.jit
def latents(
    k, anchors_ptr, best_ptr, slots_ptr, head, mixer, num_requests, num_slots, num_drafts, stride_a,
    MIX: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """Latents of position k, rounded to the type of the W2 product: a program takes BLOCK_J of r for DOT_ROWS requests."""
    _, _, _, _, _, vocab_w1, rank = head
    latent_ptr = mixer[6]
    tiles = tl.cdiv(rank, BLOCK_J)
    for item in range(tl.program_id(0), tiles * tl.cdiv(num_requests, DOT_ROWS), tl.num_programs(0)):
        j = item % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
        requests = item // tiles * DOT_ROWS + tl.arange(0, DOT_ROWS)
        slots = state_slots(slots_ptr, requests, num_requests, num_slots)
        live = slots >= 0
        previous = previous_tokens(anchors_ptr, stride_a, best_ptr, requests, slots, k, num_requests)
        known = live & (previous >= 0) & (previous < vocab_w1)
        latent = MIX(mixer, head, j, requests, live, previous, known, k, num_requests, num_drafts, BLOCK_S, MIX_TYPE)
        at = latent_ptr + requests.to(tl.int64)[None, :] * rank + j[:, None]
        tl.store(at, latent.to(latent_ptr.dtype.element_ty), mask=(j < rank)[:, None] & live[None, :])


@triton.jit
def _drafted(j, path):
    """PATH of adjusted: drafts of this round, the last of which is still in its word and not among the tokens."""
    tokens_ptr, stride_ts, slots, last, previous = path
    token = tl.load(tokens_ptr + slots * stride_ts + j, mask=(slots >= 0) & (slots * 0 + j < last), other=-1, volatile=True)
    return tl.where(j == last, previous, token)


@triton.jit
def _adjusted(
    x, tokens, inside, slots, requests, k, anchors_ptr, best_ptr, tokens_ptr, adjust, num_requests, num_drafts, column,
    stride_a, stride_ts,
):  # fmt: skip
    """Logits with penalties, bias and mask; the mask's rows are [S, K]."""
    path = tokens
    path_max = 0
    if adjust[2] is not None:
        previous = previous_tokens(anchors_ptr, stride_a, best_ptr, requests, slots, k, num_requests)
        path_max = column + k
        path = (tokens_ptr, stride_ts, slots, tl.where(k > 0, path_max - 1, path_max), previous)
    return adjusted(x, tokens[None, :], inside, slots, slots * num_drafts + k, adjust, path, path_max, _drafted)


@triton.jit
def _draft_tile(
    tile, ids, first_request, k,
    base_ptr, anchors_ptr, positions_ptr, slots_ptr, map_ptr, head, mixer, adjust, temperature_ptr, seed_ptr, tokens_ptr,
    logits_ptr, best_ptr, status_ptr, unit_max_ptr, unit_mass_ptr,
    num_requests, num_slots, num_drafts, vocab, num_targets, first_draft, column,
    stride_br, stride_bk, stride_a, stride_p, stride_ts, stride_ls, stride_lk,
    WIDEN: tl.constexpr, STREAM: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """ROWS requests of one tile of ids at position k: logits, proposal, unit masses, winner so far."""
    if head is not None:
        # The dot always has DOT_ROWS columns; ROWS of them are this tile's requests, the others stay zero.
        columns = first_request + tl.arange(0, DOT_ROWS)
        column_slots = state_slots(slots_ptr, columns, tl.minimum(num_requests, first_request + ROWS), num_slots)
        if mixer is None:
            w1_ptr, _, _, stride_1v, _, vocab_w1, _ = head
            previous = previous_tokens(anchors_ptr, stride_a, best_ptr, columns, column_slots, k, num_requests)
            known = (column_slots >= 0) & (previous >= 0) & (previous < vocab_w1)
            bias = low_rank_bias(tile, head, w1_ptr, previous * stride_1v, known, ids, vocab, WIDEN, BLOCK_R, DOT_TYPE)
        else:
            known = column_slots >= 0
            bias = low_rank_bias(tile, head, mixer[6], columns.to(tl.int64) * head[6], known, ids, vocab, WIDEN, BLOCK_R, DOT_TYPE)
        bias = tl.trans(bias)  # [DOT_ROWS, BLOCK_V]
        if ROWS < DOT_ROWS:
            # Keep the first ROWS columns; the others are zero and adding zeros is exact.
            bias = tl.sum(tl.reshape(bias, [DOT_ROWS // ROWS, ROWS, BLOCK_V]), axis=0)

    requests = first_request + tl.arange(0, ROWS)
    slots = state_slots(slots_ptr, requests, num_requests, num_slots)
    live = slots >= 0
    inside = live[:, None] & (ids < vocab)[None, :]
    rows = requests.to(tl.int64) * stride_br + tl.cast(k, tl.int64) * stride_bk
    x = tl.load(base_ptr + rows[:, None] + ids[None, :], mask=inside, other=0.0).to(tl.float32)
    if head is not None:
        x += bias
    tokens = ids  # in the target's vocabulary
    if map_ptr is not None:
        mapped = tl.load(map_ptr + ids, mask=ids < vocab, other=-1)
        used = (mapped >= 0) & (mapped < num_targets)
        tokens = tl.where(used, mapped, 0).to(tl.int32)
    if adjust is not None:
        x = _adjusted(
            x, tokens, inside, slots, requests, k, anchors_ptr, best_ptr, tokens_ptr, adjust, num_requests, num_drafts, column,
            stride_a, stride_ts,
        )  # fmt: skip
    if map_ptr is not None:
        x = tl.where(used[None, :], x, NEG_INF)  # else an id that stands for no token
    nan = tl.max(tl.where(inside & (x != x), 1, 0), axis=1)
    tl.atomic_or(status_ptr + requests, NAN, mask=live & (nan > 0), sem="relaxed")
    stored = numbers(x).to(base_ptr.dtype.element_ty)  # rounded once; everything below reads the rounded value
    x = tl.where(inside, stored.to(tl.float32), NEG_INF)
    if logits_ptr is not None:
        out = logits_ptr + slots[:, None] * stride_ls + (column + k).to(tl.int64) * stride_lk + ids[None, :]
        tl.store(out, stored, mask=inside)

    key = x
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + slots, mask=live, other=0.0)
        scale = log2_scale(temperature)
        seed = tl.load(seed_ptr + slots, mask=live, other=0)
        anchor = tl.load(positions_ptr + slots * stride_p, mask=live, other=0).to(tl.int64)
        position = anchor + (first_draft + k + 1)
        if STREAM == COUPLED:
            anchor = anchor * 0
        if map_ptr is None:
            words = lane_words(seed[:, None], tl.min(ids, axis=0), position[:, None], anchor[:, None], STREAM, ROWS, BLOCK_V)
        else:
            words = words_at(seed[:, None], tokens[None, :], position[:, None], anchor[:, None], STREAM)
        noisy = x * scale[:, None] - log2_exponential(words)
        key = tl.where((temperature > 0.0)[:, None], noisy, x)

        units = tl.reshape(x, [ROWS, BLOCK_V // UNIT, UNIT])
        top = tl.max(units, axis=2)
        e = tl.exp2(below_max(units, top[:, :, None]) * scale[:, None, None])
        mass = tl.reshape(masses(e, ROWS * BLOCK_V // UNIT, UNIT, ONE), [ROWS, BLOCK_V // UNIT])
        unit = tl.min(ids, axis=0) // UNIT + tl.arange(0, BLOCK_V // UNIT)
        num_units = tl.cdiv(vocab, UNIT)
        where = (requests.to(tl.int64) * num_drafts + k)[:, None] * num_units + unit[None, :]
        keep = live[:, None] & (unit < num_units)[None, :]
        tl.store(unit_max_ptr + where, top, mask=keep)
        tl.store(unit_mass_ptr + where, mass, mask=keep)

    words = pack(key, tokens[None, :])
    if map_ptr is not None:
        words = tl.where(used[None, :], words, NOBODY)
    best = tl.max(tl.where(inside, words, 0), axis=1)
    tl.atomic_max(best_ptr + k * num_requests + requests, best, mask=live, sem="relaxed")


@triton.jit(do_not_specialize=["first_phase", "end_phase", "num_requests", "num_slots", "num_drafts", "first_draft", "column"])
def draft_dense_kernel(
    base_ptr,  # [R, K, V]
    anchors_ptr, positions_ptr,  # [S]
    slots_ptr,  # [R] or None
    map_ptr,  # [V] ids in the target's vocabulary, or None
    head, mixer,  # kernels/draft/heads.py; head None = none, mixer None = vanilla or none
    adjust,  # settings of primitives/adjust.py, or None
    filters,  # kernels/draft/filters.py, or None
    hidden_ptr,  # [R, K, H] or None
    scores,  # None, or confidence: (weight [H] or [H+r], bias [1] or None, sts [K] or None, calibrated and raw [S, K], row strides)
    temperature_ptr, seed_ptr,  # [S]; temperature None = every row greedy
    tokens_ptr,  # [S, K]
    logits_ptr, lse_ptr,  # [S, K, V] or None, [S, K] or None
    flags_ptr,  # [R]
    best_ptr,  # int64 [K, R], zero before and after
    status_ptr,  # int32 [R], zero before and after
    barrier_ptr,  # int32 [1]
    unit_max_ptr, unit_mass_ptr,  # [R, K, U]
    first_phase, end_phase, num_requests, num_slots, num_drafts, vocab, num_targets, hidden_size, first_draft, column,
    stride_br, stride_bk, stride_a, stride_p, stride_hr, stride_hk, stride_ts, stride_ls, stride_lk, stride_es,
    MIX: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr, STREAM: tl.constexpr, WITH_MARKOV: tl.constexpr,
    ONE_TILE: tl.constexpr, JOINT: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, DOT_TYPE: tl.constexpr,
    MIX_TYPE: tl.constexpr,
):  # fmt: skip
    MIXED: tl.constexpr = 0 if MIX is None else 1
    STAGES: tl.constexpr = MIXED + (1 if filters is None else 2)  # phases per position
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    end_blocks = MIXED + num_drafts * STAGES
    if MIX is not None:
        if first_phase == 0:
            hoist(
                mixer, head, hidden_ptr, slots_ptr, num_requests, num_slots, num_drafts, hidden_size, first_draft, stride_hr,
                stride_hk, PARTS, BLOCK_N, BLOCK_S, MIX_TYPE,
            )  # fmt: skip
    for k in range(tl.maximum(first_phase - MIXED, 0) // STAGES, tl.cdiv(tl.minimum(end_phase, end_blocks) - MIXED, STAGES)):
        phase = MIXED + k * STAGES
        if phase > first_phase:
            grid_barrier(barrier_ptr)
        if phase >= first_phase:
            if k > 0:
                settle(
                    k - 1, base_ptr, anchors_ptr, slots_ptr, map_ptr, head, adjust, tokens_ptr, logits_ptr, flags_ptr, best_ptr,
                    status_ptr, num_requests, num_slots, num_drafts, vocab, num_targets, column, stride_br, stride_bk, stride_a,
                    stride_ts, stride_ls, stride_lk,
                )  # fmt: skip
                if filters is not None:
                    mask_rows(
                        k - 1, slots_ptr, filters, logits_ptr, num_requests, num_slots, vocab, column, stride_ls, stride_lk,
                        ROWS, BLOCK_V,
                    )  # fmt: skip
        if MIX is not None:
            if phase >= first_phase:
                latents(
                    k, anchors_ptr, best_ptr, slots_ptr, head, mixer, num_requests, num_slots, num_drafts, stride_a,
                    MIX, BLOCK_J, BLOCK_S, MIX_TYPE,
                )  # fmt: skip
            phase += 1
            if (phase > first_phase) & (phase < end_phase):
                grid_barrier(barrier_ptr)
        if (phase >= first_phase) & (phase < end_phase):
            for first_id in range(program * BLOCK_V, vocab, programs * BLOCK_V):
                ids = first_id + tl.arange(0, BLOCK_V)
                tile = ids
                if head is not None:
                    tile = w2_tile(head, ids, vocab, BLOCK_R)
                if ONE_TILE:
                    _draft_tile(
                        tile, ids, 0, k,
                        base_ptr, anchors_ptr, positions_ptr, slots_ptr, map_ptr, head, mixer, adjust, temperature_ptr, seed_ptr,
                        tokens_ptr, logits_ptr, best_ptr, status_ptr, unit_max_ptr, unit_mass_ptr,
                        num_requests, num_slots, num_drafts, vocab, num_targets, first_draft, column,
                        stride_br, stride_bk, stride_a, stride_p, stride_ts, stride_ls, stride_lk,
                        WIDEN, STREAM, ROWS, BLOCK_V, BLOCK_R, DOT_TYPE,
                    )  # fmt: skip
                else:
                    for first_request in range(0, num_requests, ROWS):
                        _draft_tile(
                            tile, ids, first_request, k,
                            base_ptr, anchors_ptr, positions_ptr, slots_ptr, map_ptr, head, mixer, adjust, temperature_ptr,
                            seed_ptr, tokens_ptr, logits_ptr, best_ptr, status_ptr, unit_max_ptr, unit_mass_ptr,
                            num_requests, num_slots, num_drafts, vocab, num_targets, first_draft, column,
                            stride_br, stride_bk, stride_a, stride_p, stride_ts, stride_ls, stride_lk,
                            WIDEN, STREAM, ROWS, BLOCK_V, BLOCK_R, DOT_TYPE,
                        )  # fmt: skip
        if filters is not None:
            phase += 1
            if (phase > first_phase) & (phase < end_phase):
                grid_barrier(barrier_ptr)
            if (phase >= first_phase) & (phase < end_phase):
                filter_rows(
                    k, positions_ptr, slots_ptr, map_ptr, filters, temperature_ptr, seed_ptr, logits_ptr, lse_ptr, best_ptr,
                    unit_max_ptr, unit_mass_ptr, num_requests, num_slots, num_drafts, vocab, num_targets, first_draft, column,
                    stride_p, stride_ls, stride_lk, stride_es, STREAM, JOINT, GROUPS,
                )  # fmt: skip
    if end_phase > end_blocks:
        if end_blocks > first_phase:
            grid_barrier(barrier_ptr)
        settle(
            num_drafts - 1, base_ptr, anchors_ptr, slots_ptr, map_ptr, head, adjust, tokens_ptr, logits_ptr, flags_ptr, best_ptr,
            status_ptr, num_requests, num_slots, num_drafts, vocab, num_targets, column, stride_br, stride_bk, stride_a,
            stride_ts, stride_ls, stride_lk,
        )  # fmt: skip
        if filters is not None:
            mask_rows(
                num_drafts - 1, slots_ptr, filters, logits_ptr, num_requests, num_slots, vocab, column, stride_ls, stride_lk,
                ROWS, BLOCK_V,
            )  # fmt: skip
        finish(
            anchors_ptr, slots_ptr, head, scores, hidden_ptr, temperature_ptr, tokens_ptr, lse_ptr if filters is None else None,
            unit_max_ptr, unit_mass_ptr, num_requests, num_slots, num_drafts, vocab, hidden_size, first_draft, column,
            stride_hr, stride_hk, stride_a, stride_ts, stride_es, WITH_MARKOV,
        )  # fmt: skip
        if PARTS == 3:
            keep_state(mixer, head, slots_ptr, num_requests, num_slots, num_drafts, BLOCK_N)


_MIXERS = {None: (None, 0), "gated": (gated_latent, 1), "rnn": (rnn_latent, 3)}  # and parts of r outputs
_STREAMS = {"draft": DRAFT, "coupled": COUPLED}
_WIDENINGS = {"by_cast": by_cast, "fp8_by_cast": fp8_by_cast, "fp8_by_bits": fp8_by_bits}


def phases(mixer, drafts: int, filtered: bool) -> int:
    """How many phases a block of `drafts` positions has; mixer None, "gated" or "rnn"."""
    mixed = mixer is not None
    return mixed + drafts * (1 + mixed + filtered) + 1


def launch_draft_dense(programs, args, tail, *, drafts, mixer, filtered, constants, config):
    """One launch of all phases (its programs must all be resident), or one for each. args, tail: before and after the range.

    constants: by name; a device function or type stands as its name.
    """
    end = phases(mixer, drafts, filtered)
    spans = [(0, end)] if config.one_launch or programs == 1 else [(phase, phase + 1) for phase in range(end)]
    mix, parts = _MIXERS[mixer]
    named = dict(
        WIDEN=_WIDENINGS[constants["WIDEN"]],
        STREAM=_STREAMS[constants["STREAM"]],
        DOT_TYPE=getattr(tl, constants["DOT_TYPE"]),
        MIX_TYPE=getattr(tl, constants["MIX_TYPE"]),
    )
    for span in spans:
        draft_dense_kernel[(programs,)](
            *args,
            *span,
            *tail,
            **(constants | named),
            MIX=mix,
            PARTS=parts,
            BLOCK_V=config.block_v,
            BLOCK_R=config.block_r,
            BLOCK_J=config.block_j,
            BLOCK_N=config.block_n,
            BLOCK_S=config.block_s,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            launch_cooperative_grid=config.one_launch and programs > 1,
            enable_fp_fusion=False,
            **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
        )
