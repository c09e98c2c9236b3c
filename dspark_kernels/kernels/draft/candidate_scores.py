"""What a sparse draft block computes when all its drafts are there: log-sum-exp and confidence of every position of a request.

lse_k = ln sum over S_k of exp(logits_k / T), confidence_k = sigmoid((w . [h_k; W1[x_{k-1}]] + b) / T_k); the product with h_k is there
already. Symbols as in kernels/draft/candidates.py. Reference: reference/candidates.py. Source: DSpark, arXiv 2607.05147.
"""

import triton
import triton.language as tl

from ..primitives.constants import NEG_INF, SUMEXP_ONE
from ..primitives.sumexp import below_max
from .rows import log_sum_exp

SCORE_RANKS = tl.constexpr(256)  # ranks of the confidence head at a time


@triton.jit
def stored_logits(first, slot, out, width, sizes, OPTIONS: tl.constexpr):
    """fp32 [ROWS, WIDTH] of positions from `first` on."""
    k = first + tl.arange(0, OPTIONS.ROWS)
    c = tl.arange(0, OPTIONS.WIDTH)[None, :]
    place = slot * out.stride_logits + (sizes.column + k).to(tl.int64)[:, None] * out.stride_logits_position + c
    inside = (k < sizes.num_drafts)[:, None] & (c < width)
    return tl.load(out.logits_ptr + place, mask=inside, other=NEG_INF, volatile=True).to(tl.float32)


@triton.jit
def store_lse(first, x, slot, scale, out, sizes, OPTIONS: tl.constexpr):
    """ln sum exp(logit / T) of the positions of `stored_logits`."""
    k = first + tl.arange(0, OPTIONS.ROWS)
    top = tl.max(x, axis=1)
    sumexp = tl.sum((tl.exp2(below_max(x, top[:, None]) * scale) * SUMEXP_ONE).to(tl.int64), axis=1)
    lse_ptr = out.lse_ptr + slot * out.stride_lse + sizes.column
    tl.store(lse_ptr + k, log_sum_exp(top, sumexp, scale), mask=k < sizes.num_drafts)


@triton.jit
def _w1_scores(first, followed, head, weight_ptr):
    """fp32 [DRAFTS]: SCORE_RANKS ranks of W1 from `first` on, of the token that each position follows, times the confidence head."""
    i = first + tl.arange(0, SCORE_RANKS)
    tokens = followed[:, None]
    there = (tokens >= 0) & (tokens < head.vocab) & (i < head.rank)[None, :]
    e = tl.load(head.w1_ptr + tokens * head.stride_w1 + i[None, :], mask=there, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + i, mask=i < head.rank, other=0.0).to(tl.float32)
    return tl.sum(e * w[None, :], axis=1)


@triton.jit
def score(request, slot, followed, head, hidden, confidence, score_ptr, sizes, OPTIONS: tl.constexpr):
    """Confidence of all positions of one request. followed int64 [DRAFTS]: the token before each, -1 where there is no position."""
    k = tl.arange(0, OPTIONS.DRAFTS)
    inside = k < sizes.num_drafts
    raw = tl.load(score_ptr + request.to(tl.int64) * sizes.num_drafts + k, mask=inside, other=0.0, volatile=True)
    if confidence.bias_ptr is not None:
        bias = tl.load(confidence.bias_ptr).to(tl.float32)
    if confidence.sts_ptr is not None:
        temperatures = tl.load(confidence.sts_ptr + sizes.first_draft + k, mask=inside, other=1.0)
    if OPTIONS.WITH_MARKOV:
        weight_ptr = confidence.weight_ptr + hidden.size
        raw += _w1_scores(0, followed, head, weight_ptr)
        for first in range(SCORE_RANKS, head.rank, SCORE_RANKS):
            raw += _w1_scores(first, followed, head, weight_ptr)
    if confidence.bias_ptr is not None:
        raw += bias
    tl.store(confidence.raw_ptr + slot * confidence.stride_raw + sizes.column + k, raw, mask=inside)
    if confidence.sts_ptr is not None:
        raw = raw / temperatures
    scores_ptr = confidence.scores_ptr + slot * confidence.stride_scores + sizes.column + k
    tl.store(scores_ptr, 1.0 / (1.0 + tl.exp(-raw)), mask=inside)
