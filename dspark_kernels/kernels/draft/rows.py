"""What a draft block computes per request rather than per tile of ids: drafts, flags, log-sum-exp, confidence.

lse_k = ln sum exp(logit / T), confidence_k = sigmoid((w . [h_k; W1[x_{k-1}]] + b) / T_k). Symbols: R requests, K positions, r
rank, H hidden size, U sub-blocks of 64 ids. Reference: reference/draft.py. Source: DSpark, arXiv 2607.05147.
"""

import triton
import triton.language as tl

from ..primitives.constants import BAD_TOKEN_ID, NEG_INF, NONFINITE_ROW, POS_INF, SUB_BLOCK
from ..primitives.ordered_sum import ordered_sum
from ..primitives.race import unpack_id, unpack_key
from ..primitives.slots import state_slots
from ..primitives.sumexp import below_max, log2_scale


@triton.jit
def previous_tokens(state, best_ptr, requests, slots, k, num_requests):
    """Token that position k follows: the anchor, or the winner of position k - 1."""
    if k == 0:
        tokens = tl.load(state.anchors_ptr + slots * state.stride_anchors, mask=slots >= 0, other=-1).to(tl.int64)
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
def settle(k, base, state, map_ptr, head, adjust, out, scratch, sizes):
    """Position k is decided: keep its drafts, and clear the winners that nobody reads any more. A request has one program."""
    last = k == sizes.num_drafts - 1
    num_requests = sizes.num_requests
    for request in range(tl.program_id(0), num_requests, tl.num_programs(0)):
        slot = tl.max(state_slots(state.slots_ptr, request + tl.arange(0, 1), num_requests, sizes.num_slots), axis=0)
        if slot >= 0:
            word = tl.load(scratch.best_ptr + k * num_requests + request, volatile=True)
            tl.store(out.tokens_ptr + slot * out.stride_tokens + sizes.column + k, unpack_id(word))
            if adjust is None:
                row_ptr = base.ptr + tl.cast(request, tl.int64) * base.stride_request + tl.cast(k, tl.int64) * base.stride_position
            else:
                row_ptr = out.logits_ptr + slot * out.stride_logits
                row_ptr += tl.cast(sizes.column + k, tl.int64) * out.stride_logits_position
            status = _row_status(word, row_ptr, map_ptr, sizes.vocab, sizes.num_targets, 1024)
            if k > 0:
                tl.store(scratch.best_ptr + (k - 1) * num_requests + request, tl.zeros((), tl.int64))
            if last:
                if head is not None:
                    anchor = tl.load(state.anchors_ptr + slot * state.stride_anchors).to(tl.int64)
                    status = status | tl.where((anchor < 0) | (anchor >= head.vocab), BAD_TOKEN_ID, 0)
                status = status | tl.atomic_xchg(scratch.status_ptr + request, 0, sem="relaxed")
                tl.store(out.flags_ptr + request, status)
                tl.store(scratch.best_ptr + k * num_requests + request, tl.zeros((), tl.int64))
            else:
                tl.atomic_or(scratch.status_ptr + request, status, sem="relaxed")
        else:
            if last:
                tl.store(out.flags_ptr + request, 0)


@triton.jit
def row_sumexp(sub_block_max_ptr, sub_block_sumexp_ptr, row, num_sub_blocks, scale, BLOCK: tl.constexpr):
    """(maximum fp32, sum of exponentials int64, 2^40 for the maximum) of a row from its sub-blocks, in any order the same bits."""
    top = tl.full((), float("-inf"), tl.float32)
    for first in range(0, num_sub_blocks, BLOCK):
        sub_block = first + tl.arange(0, BLOCK)
        m = tl.load(
            sub_block_max_ptr + row * num_sub_blocks + sub_block, mask=sub_block < num_sub_blocks, other=NEG_INF, volatile=True
        )
        top = tl.maximum(top, tl.max(m, axis=0))
    total = tl.zeros((), tl.int64)
    for first in range(0, num_sub_blocks, BLOCK):
        sub_block = first + tl.arange(0, BLOCK)
        m = tl.load(
            sub_block_max_ptr + row * num_sub_blocks + sub_block, mask=sub_block < num_sub_blocks, other=NEG_INF, volatile=True
        )
        sumexp = tl.load(
            sub_block_sumexp_ptr + row * num_sub_blocks + sub_block, mask=sub_block < num_sub_blocks, other=0, volatile=True
        )
        total += tl.sum((sumexp.to(tl.float32) * tl.exp2(below_max(m, top) * scale)).to(tl.int64), axis=0)
    return top, total


@triton.jit
def log_sum_exp(top, total, scale):
    """ln sum exp(logit / T) of what `row_sumexp` gives."""
    lse = (top * scale + tl.log2(tl.maximum(total, 1).to(tl.float32) * 9.094947017729282e-13)) * 0.6931471805599453
    return tl.where((top == NEG_INF) | (top == POS_INF), top, lse)


@triton.jit
def _confidence_logit(hidden, confidence, head, request, k, previous, WITH_MARKOV: tl.constexpr):
    BLOCK: tl.constexpr = 1024
    total = tl.zeros([BLOCK], tl.float32)
    row_ptr = hidden.ptr + request.to(tl.int64) * hidden.stride_request + tl.cast(k, tl.int64) * hidden.stride_position
    for first in range(0, hidden.size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        h = tl.load(row_ptr + i, mask=i < hidden.size, other=0.0)
        total += h.to(tl.float32) * tl.load(confidence.weight_ptr + i, mask=i < hidden.size, other=0.0).to(tl.float32)
    if WITH_MARKOV:
        rank = head.rank
        known = tl.where((previous >= 0) & (previous < head.vocab), rank, 0)  # ranks of W1[previous] that there are
        for first in range(0, rank, BLOCK):
            i = first + tl.arange(0, BLOCK)
            e = tl.load(head.w1_ptr + previous * head.stride_w1 + i, mask=i < known, other=0.0)
            e = e.to(tl.float32)
            total += e * tl.load(confidence.weight_ptr + hidden.size + i, mask=i < rank, other=0.0).to(tl.float32)
    logit = ordered_sum(total)
    if confidence.bias_ptr is not None:
        logit += tl.load(confidence.bias_ptr).to(tl.float32)
    return logit


@triton.jit
def finish(state, head, confidence, hidden, out, lse_ptr, scratch, sizes, WITH_MARKOV: tl.constexpr):
    """Log-sum-exp (lse_ptr None: done elsewhere) and confidence of every position, shared out over the programs."""
    num_requests, num_drafts, column = sizes.num_requests, sizes.num_drafts, sizes.column
    for item in range(tl.program_id(0), num_requests * num_drafts, tl.num_programs(0)):
        request = item // num_drafts
        k = item % num_drafts
        slot = tl.max(state_slots(state.slots_ptr, request + tl.arange(0, 1), num_requests, sizes.num_slots), axis=0)
        if slot >= 0:
            if lse_ptr is not None:
                scale = log2_scale(tl.load(state.temperature_ptr + slot))
                row = request.to(tl.int64) * num_drafts + k
                num_sub_blocks = tl.cdiv(sizes.vocab, SUB_BLOCK)
                row_max, sumexp = row_sumexp(
                    scratch.sub_block_max_ptr, scratch.sub_block_sumexp_ptr, row, num_sub_blocks, scale, 1024
                )
                tl.store(lse_ptr + slot * out.stride_lse + column + k, log_sum_exp(row_max, sumexp, scale))
            if confidence is not None:
                previous = tl.load(state.anchors_ptr + slot * state.stride_anchors).to(tl.int64)
                if k > 0:
                    previous = tl.load(out.tokens_ptr + slot * out.stride_tokens + column + k - 1, volatile=True).to(tl.int64)
                logit = _confidence_logit(hidden, confidence, head, request, k, previous, WITH_MARKOV)
                tl.store(confidence.raw_ptr + slot * confidence.stride_raw + column + k, logit)
                if confidence.sts_ptr is not None:
                    logit = logit / tl.load(confidence.sts_ptr + sizes.first_draft + k)
                scores_ptr = confidence.scores_ptr + slot * confidence.stride_scores + column + k
                tl.store(scores_ptr, 1.0 / (1.0 + tl.exp(-logit)))
