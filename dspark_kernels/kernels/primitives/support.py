"""top-k, top-p and min-p of a distribution on a few entries, all of which one program holds: sort, then count from the top.

kept <=> among the first n in the order (key descending, id ascending), n the least that any filter blocks: k; the fewest whose
sum of exponentials reaches p of what top-k left ("joint": of all); as many as have min_p times the largest probability. Sums are
integers, 2^40 for the largest, as in primitives/filters.py. Reference: reference/sampling.py.
"""

import triton
import triton.language as tl

from .constants import NEG_INF, SUMEXP_ONE
from .race import unpack_key
from .sumexp import below_max


@triton.jit
def sorted_words(words, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    """int64 words [SIZE] in descending order: a bitonic network in a loop, since tl.sort writes out every step of it."""
    i = tl.arange(0, SIZE)
    for stage in range(1, LOG_SIZE + 1):
        for step in range(stage):
            distance = 1 << (stage - 1 - step)
            other = tl.gather(words, i ^ distance, axis=0)
            larger = ((i >> stage) & 1) == ((i & distance) != 0).to(tl.int32)
            words = tl.where(larger, tl.maximum(words, other), tl.minimum(words, other))
    return words


@triton.jit
def last_kept(words, top, scale, top_k, top_p, min_p, JOINT: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    """The word of the last entry that is kept, of words made by race.pack of logits and ids (0 = no entry).

    top: the largest logit, finite; scale = log2(e) / temperature. top_k off: <= 0; top_p off: >= 1; min_p off: <= 0.
    """
    words = sorted_words(words, SIZE, LOG_SIZE)
    rank = tl.arange(0, SIZE)
    x = tl.where(words > 0, unpack_key(words), NEG_INF)
    sumexp = (tl.exp2(below_max(x, top) * scale) * SUMEXP_ONE).to(tl.int64)
    keep = tl.sum((x > NEG_INF).to(tl.int32), axis=0)
    by_k = tl.where(top_k > 0, tl.minimum(keep, top_k), keep)
    if top_p < 1.0:
        counted = by_k
        if JOINT:
            counted = keep
        total = tl.sum(tl.where(rank < counted, sumexp, 0), axis=0)
        wanted = tl.maximum((total.to(tl.float32) * top_p).to(tl.int64), 1)
        # The entry that crosses is kept.
        keep = tl.minimum(keep, 1 + tl.sum((tl.cumsum(sumexp, axis=0) < wanted).to(tl.int32), axis=0))
    keep = tl.minimum(keep, by_k)
    least = tl.log2(tl.minimum(tl.maximum(min_p, 1e-30), 1.0))
    by_p = tl.sum(((x - top) * scale >= least).to(tl.int32), axis=0)
    keep = tl.where(min_p > 0.0, tl.minimum(keep, by_p), keep)
    return tl.sum(tl.where(rank == keep - 1, words, 0), axis=0)
