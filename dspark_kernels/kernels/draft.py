"""Dense draft block: K positions of a block drafted left to right under the sequential head, in one persistent launch.

x_k = argmax_v of logits_k(v) (greedy) or of logits_k(v) / T - ln E_k(v) (sampled), logits_k = round(base_k + bias(x_{k-1})),
confidence_k = sigmoid((w . [h_k; W1[x_{k-1}]] + b) / T_k). Symbols: R requests, K positions, V vocabulary, r rank, H hidden
size, S state slots, U units of 64 ids. Per position every program takes tiles of the vocabulary for the whole batch, so that W2 is
read once per position; one integer atomic maximum per request and tile finds the winner; then a grid barrier. After the
last position the programs share out the rest: log-sum-exp, confidence, last token, flags. Oracle: reference/draft.py. Source:
DSpark, arXiv 2607.05147.
"""

import triton
import triton.language as tl

from .heads import DOT_ROWS, no_bias, no_weights, vanilla_bias, vanilla_weights
from .primitives.barrier import grid_barrier
from .primitives.mass import NEG_INF, ONE, POS_INF, below_max, log2_scale, masses, numbers
from .primitives.philox import COUPLED, DRAFT, lane_words, log2_exponential
from .primitives.race import pack, unpack_id, unpack_key
from .primitives.slots import state_slots

UNIT = tl.constexpr(64)  # ids per stored (maximum, mass) pair: fine enough to balance tiles over programs

# Bits of `flags`; the public names are dspark_kernels.types.Flag (a test keeps both equal).
NONFINITE_ROW = tl.constexpr(1)
NAN = tl.constexpr(2)
BAD_TOKEN_ID = tl.constexpr(4)


@triton.jit
def _previous(anchors_ptr, stride_a, best_ptr, requests, slots, k, num_requests):
    """Token that position k follows: the anchor, or the winner of position k - 1."""
    if k == 0:
        tokens = tl.load(anchors_ptr + slots * stride_a, mask=slots >= 0, other=-1).to(tl.int64)
    else:
        words = tl.load(best_ptr + (k - 1) * num_requests + requests, mask=slots >= 0, other=0, volatile=True)
        tokens = unpack_id(words)
    return tokens


@triton.jit
def _draft_tile(
    tile, ids, first_request, k,
    base_ptr, anchors_ptr, positions_ptr, w1_ptr, w2_ptr, temperature_ptr, seed_ptr, slots_ptr,
    logits_ptr, best_ptr, unit_max_ptr, unit_mass_ptr, status_ptr,
    num_requests, num_slots, num_drafts, vocab, vocab_w1, rank, first_draft, column,
    stride_br, stride_bk, stride_a, stride_p, stride_1v, stride_2v, stride_ls, stride_lk,
    BIAS: tl.constexpr, STREAM: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """ROWS requests of one tile of ids at position k: logits, proposal, unit masses, winner so far."""
    # The dot always has DOT_ROWS columns; ROWS of them are requests of this batch.
    columns = first_request + tl.arange(0, DOT_ROWS)
    column_slots = state_slots(slots_ptr, columns, num_requests, num_slots)
    previous = _previous(anchors_ptr, stride_a, best_ptr, columns, column_slots, k, num_requests)
    known = (column_slots >= 0) & (previous >= 0) & (previous < vocab_w1)
    bias = BIAS(tile, w1_ptr, w2_ptr, stride_1v, stride_2v, ids, previous, known, vocab, rank, BLOCK_V, BLOCK_R, DOT_TYPE)
    bias = tl.trans(bias)  # [DOT_ROWS, BLOCK_V]
    if ROWS < DOT_ROWS:
        # Keep the first ROWS columns; the others are zero and adding zeros is exact.
        bias = tl.sum(tl.reshape(bias, [DOT_ROWS // ROWS, ROWS, BLOCK_V]), axis=0)

    requests = first_request + tl.arange(0, ROWS)
    slots = state_slots(slots_ptr, requests, num_requests, num_slots)
    live = slots >= 0
    inside = live[:, None] & (ids < vocab)[None, :]
    rows = requests.to(tl.int64) * stride_br + tl.cast(k, tl.int64) * stride_bk
    base = tl.load(base_ptr + rows[:, None] + ids[None, :], mask=inside, other=0.0)
    x = base.to(tl.float32) + bias
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
        words = lane_words(seed[:, None], tl.min(ids, axis=0), position[:, None], anchor[:, None], STREAM, ROWS, BLOCK_V)
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

    best = tl.max(tl.where(inside, pack(key, ids[None, :]), 0), axis=1)
    tl.atomic_max(best_ptr + k * num_requests + requests, best, mask=live, sem="relaxed")


@triton.jit
def _row_status(word, base_ptr, request, k, vocab, stride_br, stride_bk, BLOCK: tl.constexpr):
    """NONFINITE_ROW where the row of this winner has no finite logit."""
    key = unpack_key(word)
    status = 0
    if key == NEG_INF:
        status = NONFINITE_ROW
    if key == POS_INF:
        # Rare, so paid only here: a +inf won; look whether anything finite stood beside it.
        finite = 0
        row_ptr = base_ptr + request.to(tl.int64) * stride_br + tl.cast(k, tl.int64) * stride_bk
        for first in range(0, vocab, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + ids, mask=ids < vocab, other=NEG_INF)
            x = tl.abs(x.to(tl.float32))
            finite = tl.maximum(finite, tl.max(tl.where(x < POS_INF, 1, 0), axis=0))
        if finite == 0:
            status = NONFINITE_ROW
    return status


@triton.jit
def _log_sum_exp(unit_max_ptr, unit_mass_ptr, row, num_units, scale, BLOCK: tl.constexpr):
    """ln sum exp(logit / T) of a row from its units: the same bits for any order of units."""
    top = tl.full((), float("-inf"), tl.float32)
    for first in range(0, num_units, BLOCK):
        unit = first + tl.arange(0, BLOCK)
        m = tl.load(unit_max_ptr + row * num_units + unit, mask=unit < num_units, other=NEG_INF, volatile=True)
        top = tl.maximum(top, tl.max(m, axis=0))
    total = tl.zeros((), tl.int64)
    for first in range(0, num_units, BLOCK):
        unit = first + tl.arange(0, BLOCK)
        m = tl.load(unit_max_ptr + row * num_units + unit, mask=unit < num_units, other=NEG_INF, volatile=True)
        mass = tl.load(unit_mass_ptr + row * num_units + unit, mask=unit < num_units, other=0, volatile=True)
        total += tl.sum((mass.to(tl.float32) * tl.exp2(below_max(m, top) * scale)).to(tl.int64), axis=0)
    lse = (top * scale + (tl.log2(tl.maximum(total, 1).to(tl.float32)) - 40.0)) * 0.6931471805599453
    return tl.where((top == NEG_INF) | (top == POS_INF), top, lse)


@triton.jit
def _confidence_logit(hidden_ptr, weight_ptr, bias_ptr, w1_ptr, request, k, previous, hidden_size, rank, vocab_w1,
                      stride_hr, stride_hk, stride_1v, WITH_MARKOV: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    total = tl.zeros([BLOCK], tl.float32)
    row_ptr = hidden_ptr + request.to(tl.int64) * stride_hr + tl.cast(k, tl.int64) * stride_hk
    for first in range(0, hidden_size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        h = tl.load(row_ptr + i, mask=i < hidden_size, other=0.0)
        total += h.to(tl.float32) * tl.load(weight_ptr + i, mask=i < hidden_size, other=0.0).to(tl.float32)
    if WITH_MARKOV:
        known = tl.where((previous >= 0) & (previous < vocab_w1), rank, 0)  # ranks of W1[previous] that there are
        for first in range(0, rank, BLOCK):
            i = first + tl.arange(0, BLOCK)
            e = tl.load(w1_ptr + previous * stride_1v + i, mask=i < known, other=0.0)
            total += e.to(tl.float32) * tl.load(weight_ptr + hidden_size + i, mask=i < rank, other=0.0).to(tl.float32)
    logit = tl.sum(total, axis=0)
    if bias_ptr is not None:
        logit += tl.load(bias_ptr).to(tl.float32)
    return logit


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_drafts", "first_draft", "column"])
def draft_dense_kernel(
    base_ptr,  # [R, K, V]
    anchors_ptr, positions_ptr,  # [S]
    w1_ptr, w2_ptr,  # [V1, r], [V, r]
    hidden_ptr,  # [R, K, H] or None
    weight_ptr, bias_ptr, sts_ptr,  # confidence head: [H] or [H+r], [1] or None, [K] or None
    temperature_ptr, seed_ptr,  # [S]; temperature None = every row greedy
    slots_ptr,  # [R] or None
    tokens_ptr, confidence_ptr, raw_ptr,  # [S, K]
    logits_ptr, lse_ptr,  # [S, K, V] or None, [S, K] or None
    flags_ptr,  # [R]
    best_ptr,  # int64 [K, R], zero before and after
    status_ptr,  # int32 [R], zero before and after
    barrier_ptr,  # int32 [1]
    unit_max_ptr, unit_mass_ptr,  # [R, K, U]
    num_requests, num_slots, num_drafts, vocab, vocab_w1, rank, hidden_size, first_draft, column,
    stride_br, stride_bk, stride_a, stride_p, stride_1v, stride_2v, stride_hr, stride_hk,
    stride_ts, stride_cs, stride_rs, stride_ls, stride_lk, stride_es,
    WEIGHTS: tl.constexpr, BIAS: tl.constexpr, STREAM: tl.constexpr, WITH_MARKOV: tl.constexpr, ONE_TILE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    for k in range(num_drafts):
        for first_id in range(program * BLOCK_V, vocab, programs * BLOCK_V):
            ids = first_id + tl.arange(0, BLOCK_V)
            tile = WEIGHTS(w2_ptr, stride_2v, ids, vocab, rank, BLOCK_R)
            if ONE_TILE:
                _draft_tile(
                    tile, ids, 0, k,
                    base_ptr, anchors_ptr, positions_ptr, w1_ptr, w2_ptr, temperature_ptr, seed_ptr, slots_ptr,
                    logits_ptr, best_ptr, unit_max_ptr, unit_mass_ptr, status_ptr,
                    num_requests, num_slots, num_drafts, vocab, vocab_w1, rank, first_draft, column,
                    stride_br, stride_bk, stride_a, stride_p, stride_1v, stride_2v, stride_ls, stride_lk,
                    BIAS, STREAM, ROWS, BLOCK_V, BLOCK_R, DOT_TYPE,
                )  # fmt: skip
            else:
                for first_request in range(0, num_requests, ROWS):
                    _draft_tile(
                        tile, ids, first_request, k,
                        base_ptr, anchors_ptr, positions_ptr, w1_ptr, w2_ptr, temperature_ptr, seed_ptr, slots_ptr,
                        logits_ptr, best_ptr, unit_max_ptr, unit_mass_ptr, status_ptr,
                        num_requests, num_slots, num_drafts, vocab, vocab_w1, rank, first_draft, column,
                        stride_br, stride_bk, stride_a, stride_p, stride_1v, stride_2v, stride_ls, stride_lk,
                        BIAS, STREAM, ROWS, BLOCK_V, BLOCK_R, DOT_TYPE,
                    )  # fmt: skip
        grid_barrier(barrier_ptr)
        if k + 1 < num_drafts:
            # Request r belongs to one program. Everyone read the winners of k - 1 before this barrier, so they can go.
            for request in range(program, num_requests, programs):
                slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
                if slot >= 0:
                    word = tl.load(best_ptr + k * num_requests + request, volatile=True)
                    tl.store(tokens_ptr + slot * stride_ts + column + k, unpack_id(word))
                    status = _row_status(word, base_ptr, request, k, vocab, stride_br, stride_bk, 1024)
                    tl.atomic_or(status_ptr + request, status, sem="relaxed")
                    if k > 0:
                        tl.store(best_ptr + (k - 1) * num_requests + request, tl.zeros((), tl.int64))

    for item in range(program, num_requests * num_drafts, programs):
        request = item // num_drafts
        k = item % num_drafts
        last = k == num_drafts - 1
        slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
        if slot >= 0:
            anchor = tl.load(anchors_ptr + slot * stride_a).to(tl.int64)
            if last:
                word = tl.load(best_ptr + k * num_requests + request, volatile=True)
                tl.store(tokens_ptr + slot * stride_ts + column + k, unpack_id(word))
                status = _row_status(word, base_ptr, request, k, vocab, stride_br, stride_bk, 1024)
                if w1_ptr is not None:
                    status = status | tl.where((anchor < 0) | (anchor >= vocab_w1), BAD_TOKEN_ID, 0)
                status = status | tl.atomic_xchg(status_ptr + request, 0, sem="relaxed")
                tl.store(flags_ptr + request, status)
                tl.store(best_ptr + k * num_requests + request, tl.zeros((), tl.int64))
                if k > 0:
                    tl.store(best_ptr + (k - 1) * num_requests + request, tl.zeros((), tl.int64))
            if lse_ptr is not None:
                scale = log2_scale(tl.load(temperature_ptr + slot))
                row = request.to(tl.int64) * num_drafts + k
                lse = _log_sum_exp(unit_max_ptr, unit_mass_ptr, row, tl.cdiv(vocab, UNIT), scale, 1024)
                tl.store(lse_ptr + slot * stride_es + column + k, lse)
            if confidence_ptr is not None:
                previous = anchor
                if k > 0:
                    previous = tl.load(tokens_ptr + slot * stride_ts + column + k - 1, volatile=True)
                logit = _confidence_logit(hidden_ptr, weight_ptr, bias_ptr, w1_ptr, request, k, previous, hidden_size, rank,
                                          vocab_w1, stride_hr, stride_hk, stride_1v, WITH_MARKOV, 1024)  # fmt: skip
                tl.store(raw_ptr + slot * stride_rs + column + k, logit)
                if sts_ptr is not None:
                    logit = logit / tl.load(sts_ptr + first_draft + k)
                tl.store(confidence_ptr + slot * stride_cs + column + k, 1.0 / (1.0 + tl.exp(-logit)))
        else:
            if last:
                tl.store(flags_ptr + request, 0)


_HEADS = {None: (no_weights, no_bias), "vanilla": (vanilla_weights, vanilla_bias)}


def launch_draft_dense(programs, args, *, head, dot_type, coupled, with_markov, one_tile, rows, config, cooperative):
    """Launch on `programs` programs, all of which must be resident where there is more than one."""
    weights, bias = _HEADS[head]
    draft_dense_kernel[(programs,)](
        *args,
        WEIGHTS=weights,
        BIAS=bias,
        STREAM=COUPLED if coupled else DRAFT,
        WITH_MARKOV=with_markov,
        ONE_TILE=one_tile,
        ROWS=rows,
        BLOCK_V=config.block_v,
        BLOCK_R=config.block_r,
        DOT_TYPE=getattr(tl, dot_type or "float32"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_cooperative_grid=cooperative and programs > 1,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
