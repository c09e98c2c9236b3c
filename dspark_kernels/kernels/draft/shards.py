"""Dense draft block on vocabulary shards: one position's part of a rank, and its finish from the parts of all ranks.

x_k = argmax over ranks of argmax_{v of the rank} key_k(v), key and logits as in kernels/draft/dense.py; lse_k from the (maximum, mass)
pairs of all ranks' units of 64 ids. Symbols: R requests, K positions, W ids of a shard, r rank of the head, S state slots, N ranks,
U units that a shard can touch. Ids, units and noise lanes are global, so that the word of an id does not depend on which rank has
it. Oracle: the op on the whole vocabulary (reference/draft.py). Source: DSpark, arXiv 2607.05147.

Latents of gated and rnn heads are the same on every rank, each makes them for itself: the products with hidden states, a grid
barrier, the latents, a barrier, the vocabulary, all in the launch of the part. An rnn's state goes from position to position in
the caller's [S, r].
"""

import triton
import triton.language as tl

from ..primitives.adjust import adjusted
from ..primitives.barrier import grid_barrier
from ..primitives.mass import NEG_INF, ONE, POS_INF, below_max, log2_scale, masses, numbers
from ..primitives.philox import COUPLED, DRAFT, lane_words, log2_exponential, words_at
from ..primitives.race import NOBODY, pack, unpack_id, unpack_key
from ..primitives.slots import state_slots
from ..primitives.ticket import arrive
from ..primitives.widen import by_cast, fp8_by_bits, fp8_by_cast
from .heads import DOT_ROWS, gated_latent, hoist, keep_state, low_rank_bias, rnn_latent, w2_tile
from .rows import BAD_TOKEN_ID, NAN, NONFINITE_ROW, UNIT, _confidence_logit as confidence_logit, log_sum_exp

FINITE = tl.constexpr(256)  # a finite logit was seen; beside the bits of `flags`
PHASES = tl.constexpr(3)  # of a part: hoisted products, latents, vocabulary


@triton.jit
def _previous(anchors_ptr, tokens_ptr, slots, k, column, stride_a, stride_ts):
    """Token that position k follows: the anchor, or the draft before it."""
    if k == 0:
        tokens = tl.load(anchors_ptr + slots * stride_a, mask=slots >= 0, other=-1).to(tl.int64)
    else:
        tokens = tl.load(tokens_ptr + slots * stride_ts + column + k - 1, mask=slots >= 0, other=-1)
    return tokens


@triton.jit
def _drafted(j, path):
    """PATH of adjusted: drafts of this round, all of which are stored."""
    tokens_ptr, stride_ts, slots = path
    return tl.load(tokens_ptr + slots * stride_ts + j, mask=slots >= 0, other=-1)


@triton.jit
def _latents(
    k, anchors_ptr, tokens_ptr, slots_ptr, head, mixer, num_requests, num_slots, column, stride_a, stride_ts,
    MIX: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """kernels/draft/dense.py's phase of latents where a block has this one position."""
    vocab_w1, rank = head[5], head[6]
    latent_ptr = mixer[6]
    tiles = tl.cdiv(rank, BLOCK_J)
    for item in range(tl.program_id(0), tiles * tl.cdiv(num_requests, DOT_ROWS), tl.num_programs(0)):
        j = item % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
        requests = item // tiles * DOT_ROWS + tl.arange(0, DOT_ROWS)
        slots = state_slots(slots_ptr, requests, num_requests, num_slots)
        live = slots >= 0
        previous = _previous(anchors_ptr, tokens_ptr, slots, k, column, stride_a, stride_ts)
        known = live & (previous >= 0) & (previous < vocab_w1)
        latent = MIX(mixer, head, j, requests, live, previous, known, k * 0, num_requests, 1, BLOCK_S, MIX_TYPE)
        at = latent_ptr + requests.to(tl.int64)[None, :] * rank + j[:, None]
        tl.store(at, latent.to(latent_ptr.dtype.element_ty), mask=(j < rank)[:, None] & live[None, :])


@triton.jit
def _shard_tile(
    tile, ids, local, first_request, k,
    base_ptr, anchors_ptr, positions_ptr, map_ptr, head, mixer, adjust, temperature_ptr, seed_ptr, slots_ptr, tokens_ptr,
    logits_ptr, best_ptr, seen_ptr, unit_max_ptr, unit_mass_ptr,
    num_requests, num_slots, num_drafts, num_targets, first_unit, num_units, held, width, first_draft, column,
    stride_br, stride_bk, stride_a, stride_p, stride_ts, stride_ls, stride_lk,
    WIDEN: tl.constexpr, STREAM: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """ROWS requests of one tile: `ids` global, `local` their columns in the shard (`width` where they are in none).

    Columns from `held` on have no id of the vocabulary: the law gives them nothing.
    """
    requests = first_request + tl.arange(0, ROWS)
    slots = state_slots(slots_ptr, requests, num_requests, num_slots)
    live = slots >= 0
    inside = live[:, None] & (local < held)[None, :]
    x = tl.zeros([ROWS, BLOCK_V], tl.float32)
    if head is not None:
        # The dot always has DOT_ROWS columns; ROWS of them are this tile's requests, the others stay zero.
        columns = first_request + tl.arange(0, DOT_ROWS)
        column_slots = state_slots(slots_ptr, columns, tl.minimum(num_requests, first_request + ROWS), num_slots)
        if mixer is None:
            w1_ptr, _, _, stride_1v, _, vocab_w1, _ = head
            previous = _previous(anchors_ptr, tokens_ptr, column_slots, k, column, stride_a, stride_ts)
            known = (column_slots >= 0) & (previous >= 0) & (previous < vocab_w1)
            bias = low_rank_bias(tile, head, w1_ptr, previous * stride_1v, known, local, held, WIDEN, BLOCK_R, DOT_TYPE)
        else:
            known = column_slots >= 0
            at = columns.to(tl.int64) * head[6]
            bias = low_rank_bias(tile, head, mixer[6], at, known, local, held, WIDEN, BLOCK_R, DOT_TYPE)
        bias = tl.trans(bias)  # [DOT_ROWS, BLOCK_V]
        if ROWS < DOT_ROWS:
            # Keep the first ROWS columns; the others are zero and adding zeros is exact.
            bias = tl.sum(tl.reshape(bias, [DOT_ROWS // ROWS, ROWS, BLOCK_V]), axis=0)
        x += bias
    rows = requests.to(tl.int64) * stride_br + tl.cast(k, tl.int64) * stride_bk
    base = tl.load(base_ptr + rows[:, None] + local[None, :], mask=inside, other=0.0).to(tl.float32)
    x += base
    tokens = ids  # in the target's vocabulary
    if map_ptr is not None:
        mapped = tl.load(map_ptr + local, mask=local < held, other=-1)
        used = (mapped >= 0) & (mapped < num_targets)
        tokens = tl.where(used, mapped, 0).to(tl.int32)
    if adjust is not None:
        path = (tokens_ptr, stride_ts, slots)
        x = adjusted(x, tokens[None, :], inside, slots, slots * num_drafts + k, adjust, path, column + k, _drafted)
    if map_ptr is not None:
        x = tl.where(used[None, :], x, NEG_INF)  # else an id that stands for no token
        base = tl.where(used[None, :], base, NEG_INF)
    nan = tl.max(tl.where(inside & (x != x), 1, 0), axis=1)
    stored = numbers(x).to(base_ptr.dtype.element_ty)  # rounded once; everything below reads the rounded value
    x = tl.where(inside, stored.to(tl.float32), NEG_INF)
    if adjust is not None:
        base = x
    finite = tl.max(tl.where(inside & (tl.abs(base) < POS_INF), 1, 0), axis=1)
    tl.atomic_or(seen_ptr + requests, tl.where(nan > 0, NAN, 0) | tl.where(finite > 0, FINITE, 0), mask=live, sem="relaxed")
    if logits_ptr is not None:
        out = logits_ptr + slots[:, None] * stride_ls + tl.cast(column + k, tl.int64) * stride_lk + local[None, :]
        tl.store(out, tl.where(inside, stored, NEG_INF), mask=live[:, None] & (local < width)[None, :])

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
        if unit_max_ptr is not None:
            units = tl.reshape(x, [ROWS, BLOCK_V // UNIT, UNIT])
            top = tl.max(units, axis=2)
            e = tl.exp2(below_max(units, top[:, :, None]) * scale[:, None, None])
            mass = tl.reshape(masses(e, ROWS * BLOCK_V // UNIT, UNIT, ONE), [ROWS, BLOCK_V // UNIT])
            unit = tl.min(ids, axis=0) // UNIT - first_unit + tl.arange(0, BLOCK_V // UNIT)
            where = requests.to(tl.int64)[:, None] * num_units + unit[None, :]
            keep = (requests < num_requests)[:, None] & (unit < num_units)[None, :]
            tl.store(unit_max_ptr + where, top, mask=keep)
            tl.store(unit_mass_ptr + where, mass, mask=keep)

    words = pack(key, tokens[None, :])
    if map_ptr is not None:
        words = tl.where(used[None, :], words, NOBODY)
    best = tl.max(tl.where(inside, words, 0), axis=1)
    tl.atomic_max(best_ptr + requests, best, mask=live, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "first_phase", "end_phase", "k", "num_requests", "num_slots", "num_drafts", "start", "held", "first_unit", "first_draft",
        "column",
    ]
)  # fmt: skip
def draft_partial_kernel(
    base_ptr,  # [R, K, W]
    anchors_ptr, positions_ptr,  # [S]
    map_ptr,  # [W] ids in the target's vocabulary, or None
    head, mixer,  # kernels/draft/heads.py, with W2 and its scales of the shard; head None = none, mixer None = vanilla or none
    adjust,  # settings of primitives/adjust.py, by target id; or None
    hidden_ptr,  # [R, K, H] or None
    temperature_ptr, seed_ptr,  # [S]; temperature None = every row greedy
    slots_ptr,  # [R] or None
    tokens_ptr,  # [S, K], drafts before position k
    logits_ptr,  # [S, K, W] or None
    words_ptr, status_ptr,  # int64 [R]: the part
    unit_max_ptr, unit_mass_ptr,  # [R, U] of the part, or None
    best_ptr,  # int64 [R], zero before and after
    seen_ptr,  # int32 [R], zero before and after
    arrivals_ptr,  # int32 [1], zero before and after
    barrier_ptr,  # int32 [1]
    first_phase, end_phase, k, num_requests, num_slots, num_drafts, num_targets, start, held, width, first_unit, num_units,
    hidden_size, first_draft, column,
    stride_br, stride_bk, stride_a, stride_p, stride_hr, stride_hk, stride_ts, stride_ls, stride_lk,
    MIX: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr, STREAM: tl.constexpr, ONE_TILE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    DOT_TYPE: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """Position k on this rank's ids start .. start + held - 1; ids from first_unit * UNIT on are walked, others are masked.

    A launch runs the phases [first_phase, end_phase) of PHASES; the first two are those of latents.
    """
    programs = tl.num_programs(0)
    if MIX is not None:
        if first_phase == 0:
            own_ptr = hidden_ptr + tl.cast(k, tl.int64) * stride_hk
            hoist(
                mixer, head, own_ptr, slots_ptr, num_requests, num_slots, 1, hidden_size, first_draft + k, stride_hr, stride_hk,
                PARTS, BLOCK_N, BLOCK_S, MIX_TYPE,
            )  # fmt: skip
        if (first_phase < 1) & (end_phase > 1):
            grid_barrier(barrier_ptr)
        if (first_phase <= 1) & (end_phase > 1):
            _latents(
                k, anchors_ptr, tokens_ptr, slots_ptr, head, mixer, num_requests, num_slots, column, stride_a, stride_ts,
                MIX, BLOCK_J, BLOCK_S, MIX_TYPE,
            )  # fmt: skip
        if (first_phase <= 1) & (end_phase > 2):
            grid_barrier(barrier_ptr)
    if end_phase > 2:
        if PARTS == 3:
            keep_state(mixer, head, slots_ptr, num_requests, num_slots, k * 0 + 1, BLOCK_N)
        for first_id in range(tl.program_id(0) * BLOCK_V, num_units * UNIT, programs * BLOCK_V):
            ids = first_unit * UNIT + first_id + tl.arange(0, BLOCK_V)
            local = tl.where((ids >= start) & (ids - start < width), ids - start, width)
            tile = ids
            if head is not None:
                tile = w2_tile(head, local, held, BLOCK_R)
            if ONE_TILE:
                _shard_tile(
                    tile, ids, local, 0, k,
                    base_ptr, anchors_ptr, positions_ptr, map_ptr, head, mixer, adjust, temperature_ptr, seed_ptr, slots_ptr,
                    tokens_ptr, logits_ptr, best_ptr, seen_ptr, unit_max_ptr, unit_mass_ptr,
                    num_requests, num_slots, num_drafts, num_targets, first_unit, num_units, held, width, first_draft, column,
                    stride_br, stride_bk, stride_a, stride_p, stride_ts, stride_ls, stride_lk,
                    WIDEN, STREAM, ROWS, BLOCK_V, BLOCK_R, DOT_TYPE,
                )  # fmt: skip
            else:
                for first_request in range(0, num_requests, ROWS):
                    _shard_tile(
                        tile, ids, local, first_request, k,
                        base_ptr, anchors_ptr, positions_ptr, map_ptr, head, mixer, adjust, temperature_ptr, seed_ptr, slots_ptr,
                        tokens_ptr, logits_ptr, best_ptr, seen_ptr, unit_max_ptr, unit_mass_ptr,
                        num_requests, num_slots, num_drafts, num_targets, first_unit, num_units, held, width, first_draft, column,
                        stride_br, stride_bk, stride_a, stride_p, stride_ts, stride_ls, stride_lk,
                        WIDEN, STREAM, ROWS, BLOCK_V, BLOCK_R, DOT_TYPE,
                    )  # fmt: skip
        if arrive(arrivals_ptr, programs):
            for first_request in range(0, num_requests, 128):
                requests = first_request + tl.arange(0, 128)
                inside = requests < num_requests
                tl.store(words_ptr + requests, tl.load(best_ptr + requests, mask=inside, other=0, volatile=True), mask=inside)
                seen = tl.load(seen_ptr + requests, mask=inside, other=0, volatile=True)
                tl.store(status_ptr + requests, seen.to(tl.int64), mask=inside)
                tl.debug_barrier()  # every warp has read what is put back to zero
                tl.store(best_ptr + requests, tl.zeros([128], tl.int64), mask=inside)
                tl.store(seen_ptr + requests, tl.zeros([128], tl.int32), mask=inside)


@triton.jit
def _row_mass(unit_max_ptr, unit_mass_ptr, stride_max, stride_mass, row, num_units, shards, scale, BLOCK: tl.constexpr):
    """Maximum and mass of a row from the units of all ranks: integers, so their order and number do not matter."""
    top = tl.full((), float("-inf"), tl.float32)
    for first in range(0, shards * num_units, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        where = row * num_units + piece % num_units
        inside = piece < shards * num_units
        m = tl.load(unit_max_ptr + (piece // num_units).to(tl.int64) * stride_max + where, mask=inside, other=NEG_INF)
        top = tl.maximum(top, tl.max(m, axis=0))
    total = tl.zeros((), tl.int64)
    for first in range(0, shards * num_units, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        where = row * num_units + piece % num_units
        inside = piece < shards * num_units
        shard = (piece // num_units).to(tl.int64)
        m = tl.load(unit_max_ptr + shard * stride_max + where, mask=inside, other=NEG_INF)
        mass = tl.load(unit_mass_ptr + shard * stride_mass + where, mask=inside, other=0)
        total += tl.sum((mass.to(tl.float32) * tl.exp2(below_max(m, top) * scale)).to(tl.int64), axis=0)
    return top, total


@triton.jit(do_not_specialize=["k", "num_requests", "num_slots", "first_draft", "column", "stride_part", "stride_max"])
def draft_finish_kernel(
    words_ptr, status_ptr,  # int64 [N, R]: the parts of all ranks
    unit_max_ptr, unit_mass_ptr,  # [N, R, U] or None
    anchors_ptr,  # [S]
    head,  # kernels/draft/heads.py, of which W1 is read; or None
    hidden_ptr,  # [R, K, H] or None
    scores,  # as in kernels/draft/rows.py, or None
    temperature_ptr, slots_ptr,  # [S], [R] or None
    tokens_ptr, lse_ptr,  # [S, K]; lse may be None
    flags_ptr,  # [R], those of earlier positions included
    k, num_requests, num_slots, shards, num_units, hidden_size, first_draft, column,
    stride_part, stride_max, stride_a, stride_hr, stride_hk, stride_ts, stride_es,
    WITH_MARKOV: tl.constexpr, SHARDS: tl.constexpr,
):  # fmt: skip
    """Request = program: everything follows from the gathered words, so every rank writes the same."""
    request = tl.program_id(0)
    slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
    before = tl.zeros((), tl.int32)
    if k > 0:
        before = tl.load(flags_ptr + request)
        tl.debug_barrier()  # every warp has read what one of them now writes
    if slot < 0:
        tl.store(flags_ptr + request, 0)
    else:
        shard = tl.arange(0, SHARDS)
        part = shard.to(tl.int64) * stride_part + request
        word = tl.max(tl.load(words_ptr + part, mask=shard < shards, other=0), axis=0)
        seen = tl.load(status_ptr + part, mask=shard < shards, other=0).to(tl.int32)
        finite = tl.max(seen & FINITE, axis=0) > 0
        key = unpack_key(word)
        status = tl.max(seen & NAN, axis=0) | tl.where((key == NEG_INF) | (key != key), NONFINITE_ROW, 0)
        status |= tl.where((key == POS_INF) & (finite == 0), NONFINITE_ROW, 0)
        previous = tl.load(anchors_ptr + slot * stride_a).to(tl.int64)
        if head is not None:
            status |= tl.where((previous < 0) | (previous >= head[5]), BAD_TOKEN_ID, 0)
        tl.store(flags_ptr + request, before | status)
        tl.store(tokens_ptr + slot * stride_ts + column + k, unpack_id(word))
        if lse_ptr is not None:
            scale = log2_scale(tl.load(temperature_ptr + slot))
            top, total = _row_mass(unit_max_ptr, unit_mass_ptr, stride_max, stride_part, request.to(tl.int64), num_units, shards,
                                   scale, 1024)  # fmt: skip
            tl.store(lse_ptr + slot * stride_es + column + k, log_sum_exp(top, total, scale))
        if scores is not None:
            _, _, sts_ptr, confidence_ptr, raw_ptr, stride_cs, stride_rs = scores
            if k > 0:
                previous = tl.load(tokens_ptr + slot * stride_ts + column + k - 1)
            logit = confidence_logit(hidden_ptr, scores, head, request, k, previous, hidden_size, stride_hr, stride_hk,
                                     WITH_MARKOV)  # fmt: skip
            tl.store(raw_ptr + slot * stride_rs + column + k, logit)
            if sts_ptr is not None:
                logit = logit / tl.load(sts_ptr + first_draft + k)
            tl.store(confidence_ptr + slot * stride_cs + column + k, 1.0 / (1.0 + tl.exp(-logit)))


_WIDENINGS = {"by_cast": by_cast, "fp8_by_cast": fp8_by_cast, "fp8_by_bits": fp8_by_bits}
_MIXERS = {None: (None, 0), "gated": (gated_latent, 1), "rnn": (rnn_latent, 3)}  # and parts of r outputs


def launch_draft_partial(programs, args, tail, *, mixer, widening, dot_type, mix_type, coupled, one_tile, rows, config):
    """Without a mixer nobody waits for another. With one, a cooperative launch, or one for each phase. args, tail: before and after
    the range of phases."""
    end = PHASES.value
    apart = mixer is not None and programs > 1 and not config.one_launch
    mix, parts = _MIXERS[mixer]
    for span in [(phase, phase + 1) for phase in range(end)] if apart else [(0, end)]:
        draft_partial_kernel[(programs,)](
            *args,
            *span,
            *tail,
            MIX=mix,
            PARTS=parts,
            WIDEN=_WIDENINGS[widening],
            STREAM=COUPLED if coupled else DRAFT,
            ONE_TILE=one_tile,
            ROWS=rows,
            BLOCK_V=config.block_v,
            BLOCK_R=config.block_r,
            BLOCK_J=config.block_j,
            BLOCK_N=config.block_n,
            BLOCK_S=config.block_s,
            DOT_TYPE=getattr(tl, dot_type),
            MIX_TYPE=getattr(tl, mix_type),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            launch_cooperative_grid=mixer is not None and programs > 1 and config.one_launch,
            enable_fp_fusion=False,
            **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
        )


def launch_draft_finish(requests, args, *, with_markov, shards):
    """Launch one program per request."""
    draft_finish_kernel[(requests,)](*args, WITH_MARKOV=with_markov, SHARDS=shards, num_warps=4, enable_fp_fusion=False)
