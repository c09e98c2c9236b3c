"""What a draft block computes per request rather than per tile of ids: drafts, flags, log-sum-exp, confidence.

lse_k = ln sum exp(logit / T), confidence_k = sigmoid((w . [h_k; W1[x_{k-1}]] + b) / T_k). Symbols: R requests, K positions, r
rank, H hidden size, U units of 64 ids. Oracle: reference/draft.py. Source: DSpark, arXiv 2607.05147.
"""

import triton
import triton.language as tl

from ..primitives.mass import NEG_INF, POS_INF, below_max, log2_scale
from ..primitives.ordered_sum import ordered_sum
from ..primitives.race import unpack_id, unpack_key
from ..primitives.slots import state_slots

UNIT = tl.constexpr(64)  # ids per stored (maximum, mass) pair: fine enough to balance tiles over programs

# Bits of `flags`; the public names are dspark_kernels.types.Flag (a test keeps both equal).
NONFINITE_ROW = tl.constexpr(1)
NAN = tl.constexpr(2)
BAD_TOKEN_ID = tl.constexpr(4)


@triton.jit
def previous_tokens(anchors_ptr, stride_a, best_ptr, requests, slots, k, num_requests):
    """Token that position k follows: the anchor, or the winner of position k - 1."""
    if k == 0:
        tokens = tl.load(anchors_ptr + slots * stride_a, mask=slots >= 0, other=-1).to(tl.int64)
    else:
        words = tl.load(best_ptr + (k - 1) * num_requests + requests, mask=slots >= 0, other=0, volatile=True)
        tokens = unpack_id(words)
    return tokens


@triton.jit
def _row_status(word, row_ptr, map_ptr, vocab, num_targets, BLOCK: tl.constexpr):
    """NONFINITE_ROW where the row of this winner has no finite logit."""
    key = unpack_key(word)
    status = 0
    if (key == NEG_INF) | (key != key):
        status = NONFINITE_ROW
    if key == POS_INF:
        # Rare, so paid only here: a +inf won; look whether anything finite stood beside it.
        finite = 0
        for first in range(0, vocab, BLOCK):
            ids = first + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + ids, mask=ids < vocab, other=NEG_INF)
            there = tl.abs(x.to(tl.float32)) < POS_INF
            if map_ptr is not None:
                token = tl.load(map_ptr + ids, mask=ids < vocab, other=-1)
                there = there & (token >= 0) & (token < num_targets)
            finite = tl.maximum(finite, tl.max(there.to(tl.int32), axis=0))
        if finite == 0:
            status = NONFINITE_ROW
    return status


@triton.jit
def settle(
    k, base_ptr, anchors_ptr, slots_ptr, map_ptr, head, adjust, tokens_ptr, logits_ptr, flags_ptr, best_ptr, status_ptr,
    num_requests, num_slots, num_drafts, vocab, num_targets, column, stride_br, stride_bk, stride_a, stride_ts, stride_ls,
    stride_lk,
):  # fmt: skip
    """Position k is decided: keep its drafts, and clear the winners that nobody reads any more. A request has one program."""
    last = k == num_drafts - 1
    for request in range(tl.program_id(0), num_requests, tl.num_programs(0)):
        slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
        if slot >= 0:
            word = tl.load(best_ptr + k * num_requests + request, volatile=True)
            tl.store(tokens_ptr + slot * stride_ts + column + k, unpack_id(word))
            if adjust is None:
                row_ptr = base_ptr + tl.cast(request, tl.int64) * stride_br + tl.cast(k, tl.int64) * stride_bk
            else:
                row_ptr = logits_ptr + slot * stride_ls + tl.cast(column + k, tl.int64) * stride_lk
            status = _row_status(word, row_ptr, map_ptr, vocab, num_targets, 1024)
            if k > 0:
                tl.store(best_ptr + (k - 1) * num_requests + request, tl.zeros((), tl.int64))
            if last:
                if head is not None:
                    anchor = tl.load(anchors_ptr + slot * stride_a).to(tl.int64)
                    status = status | tl.where((anchor < 0) | (anchor >= head[5]), BAD_TOKEN_ID, 0)
                status = status | tl.atomic_xchg(status_ptr + request, 0, sem="relaxed")
                tl.store(flags_ptr + request, status)
                tl.store(best_ptr + k * num_requests + request, tl.zeros((), tl.int64))
            else:
                tl.atomic_or(status_ptr + request, status, sem="relaxed")
        else:
            if last:
                tl.store(flags_ptr + request, 0)


@triton.jit
def row_mass(unit_max_ptr, unit_mass_ptr, row, num_units, scale, BLOCK: tl.constexpr):
    """(maximum fp32, sum of exponentials int64, 2^40 for the maximum) of a row from its units, in any order the same bits."""
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
    return top, total


@triton.jit
def log_sum_exp(top, total, scale):
    """ln sum exp(logit / T) of what `row_mass` gives."""
    lse = (top * scale + tl.log2(tl.maximum(total, 1).to(tl.float32) * 9.094947017729282e-13)) * 0.6931471805599453
    return tl.where((top == NEG_INF) | (top == POS_INF), top, lse)


@triton.jit
def _confidence_logit(hidden_ptr, scores, head, request, k, previous, hidden_size, stride_hr, stride_hk,
                      WITH_MARKOV: tl.constexpr):  # fmt: skip
    BLOCK: tl.constexpr = 1024
    weight_ptr, bias_ptr, _, _, _, _, _ = scores
    total = tl.zeros([BLOCK], tl.float32)
    row_ptr = hidden_ptr + request.to(tl.int64) * stride_hr + tl.cast(k, tl.int64) * stride_hk
    for first in range(0, hidden_size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        h = tl.load(row_ptr + i, mask=i < hidden_size, other=0.0)
        total += h.to(tl.float32) * tl.load(weight_ptr + i, mask=i < hidden_size, other=0.0).to(tl.float32)
    if WITH_MARKOV:
        w1_ptr, _, _, stride_1v, _, vocab_w1, rank = head
        known = tl.where((previous >= 0) & (previous < vocab_w1), rank, 0)  # ranks of W1[previous] that there are
        for first in range(0, rank, BLOCK):
            i = first + tl.arange(0, BLOCK)
            e = tl.load(w1_ptr + previous * stride_1v + i, mask=i < known, other=0.0)
            total += e.to(tl.float32) * tl.load(weight_ptr + hidden_size + i, mask=i < rank, other=0.0).to(tl.float32)
    logit = ordered_sum(total)
    if bias_ptr is not None:
        logit += tl.load(bias_ptr).to(tl.float32)
    return logit


@triton.jit
def finish(
    anchors_ptr, slots_ptr, head, scores, hidden_ptr, temperature_ptr, tokens_ptr, lse_ptr, unit_max_ptr, unit_mass_ptr,
    num_requests, num_slots, num_drafts, vocab, hidden_size, first_draft, column,
    stride_hr, stride_hk, stride_a, stride_ts, stride_es, WITH_MARKOV: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (lse_ptr None: done elsewhere) and confidence of every position, shared out over the programs."""
    for item in range(tl.program_id(0), num_requests * num_drafts, tl.num_programs(0)):
        request = item // num_drafts
        k = item % num_drafts
        slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
        if slot >= 0:
            if lse_ptr is not None:
                scale = log2_scale(tl.load(temperature_ptr + slot))
                row = request.to(tl.int64) * num_drafts + k
                top, total = row_mass(unit_max_ptr, unit_mass_ptr, row, tl.cdiv(vocab, UNIT), scale, 1024)
                tl.store(lse_ptr + slot * stride_es + column + k, log_sum_exp(top, total, scale))
            if scores is not None:
                _, _, sts_ptr, confidence_ptr, raw_ptr, stride_cs, stride_rs = scores
                previous = tl.load(anchors_ptr + slot * stride_a).to(tl.int64)
                if k > 0:
                    previous = tl.load(tokens_ptr + slot * stride_ts + column + k - 1, volatile=True)
                logit = _confidence_logit(hidden_ptr, scores, head, request, k, previous, hidden_size, stride_hr, stride_hk,
                                          WITH_MARKOV)  # fmt: skip
                tl.store(raw_ptr + slot * stride_rs + column + k, logit)
                if sts_ptr is not None:
                    logit = logit / tl.load(sts_ptr + first_draft + k)
                tl.store(confidence_ptr + slot * stride_cs + column + k, 1.0 / (1.0 + tl.exp(-logit)))
