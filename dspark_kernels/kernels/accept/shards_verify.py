"""What every rank knows once the parts of all rows are gathered: the statistics of a request's rows, and what the rule says.

Everything follows from gathered bytes and what is the same on all ranks, so all decide the same, and the same as
kernels/accept/chain.py on whole rows as long as no block is cut. A cut block is two pieces with maxima of their own, merged by one
rounding of each sum of exponentials. Symbols: N ranks, L logit rows, NB blocks of 1024 ids that a shard can touch. Rules: rules.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives.constants import LOG2E, NAN, NEG_INF, NONFINITE_ROW, POS_INF, SUMEXP_ONE, VOCAB_BLOCK
from ..primitives.race import unpack_id
from ..primitives.sumexp import below_max, log2_scale
from .rows import NOBODY, SOFTMAX, RequestStats, finite_or_zero, soft_prob
from .rules import drafts_at, forward_rows, query_rows
from .shards_rows import FINITE
from .values import Distribution, Known


@triton.jit
def _row_sumexps(sums, gathered, rows, has_row, num_blocks, scale, TILE: tl.constexpr):
    """Maximum and integer sum of exponentials (relative to it) of rows from the pieces of all ranks."""
    WIDTH: tl.constexpr = TILE.WIDTH
    BLOCK: tl.constexpr = TILE.BLOCK
    stride = gathered.stride
    pieces = gathered.shards * num_blocks
    # Reduced after the loops, not in them: Triton 3.6's pass for such loops fails where the result is used twice.
    tall = tl.full([WIDTH, BLOCK], float("-inf"), tl.float32)
    for first in range(0, pieces, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        where = rows[:, None] * num_blocks + (piece % num_blocks)[None, :]
        inside = has_row[:, None] & (piece < pieces)[None, :]
        shard = (piece // num_blocks).to(tl.int64)[None, :]
        tops = tl.load(sums.max_ptr + shard * (2 * stride) + where, mask=inside, other=NEG_INF)
        tall = tl.maximum(tall, tops)
    top = tl.max(tall, axis=1)
    sumexp = tl.zeros([WIDTH, BLOCK], tl.int64)
    for first in range(0, pieces, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        where = rows[:, None] * num_blocks + (piece % num_blocks)[None, :]
        inside = has_row[:, None] & (piece < pieces)[None, :]
        shard = (piece // num_blocks).to(tl.int64)[None, :]
        tops = tl.load(sums.max_ptr + shard * (2 * stride) + where, mask=inside, other=NEG_INF)
        own = tl.load(sums.sumexp_ptr + shard * stride + where, mask=inside, other=0)
        sumexp += (own.to(tl.float32) * tl.exp2(below_max(tops, top[:, None]) * scale)).to(tl.int64)
    return top, tl.sum(sumexp, axis=1)


@triton.jit
def _row_stats(
    slot, row0, length, temperature, draft_temperature, gathered, dense, drafts, num_blocks, TILE: tl.constexpr,
):  # fmt: skip
    """RequestStats of a request, from the parts of all ranks."""
    WIDTH: tl.constexpr = TILE.WIDTH
    part, stride = gathered.part, gathered.stride
    i = tl.arange(0, WIDTH)
    rows = (row0 + i).to(tl.int64)
    live = i <= length
    shard = tl.arange(0, TILE.SHARDS).to(tl.int64)[None, :]
    there = live[:, None] & (shard < gathered.shards)
    words = part.words_ptr + shard * stride + rows[:, None] * 4
    best = tl.max(tl.load(words, mask=there, other=0), axis=1)
    first = tl.where(best > 0, unpack_id(best), 0).to(tl.int32)
    seen = tl.load(words + 3, mask=there, other=0).to(tl.int32)
    status = tl.max(seen & NAN, axis=1) | tl.where(tl.max(seen & FINITE, axis=1) > 0, 0, NONFINITE_ROW)
    status = tl.where(live, status, 0)
    nothing = tl.zeros([WIDTH], tl.float32)
    top, inv_sumexp, target_prob, draft_prob = nothing, nothing, nothing, nothing
    reference, factor = nothing, nothing
    point_mass_id = tl.full([WIDTH], NOBODY, tl.int32)
    drawn_from = point_mass_id
    if part.target.max_ptr is not None:
        scale = log2_scale(temperature)
        top, sumexp = _row_sumexps(part.target, gathered, rows, live, num_blocks, scale, TILE)
        inv_sumexp = 1.0 / tl.maximum(sumexp, 1).to(tl.float32) * SUMEXP_ONE
        point_mass_id = tl.where((top == POS_INF) | ((status & NONFINITE_ROW) > 0), first, SOFTMAX)
        draft, inside, missing = drafts.ids, drafts.inside, drafts.missing
        logits = part.logits_ptr + shard * (2 * stride) + rows[:, None] * 2
        logit = tl.max(tl.load(logits, mask=there, other=NEG_INF), axis=1)
        target_prob = soft_prob(logit, draft, Distribution(point_mass_id, finite_or_zero(top), inv_sumexp), scale)
        target_prob = tl.where(inside, target_prob, 0.0)

        # The draft's distribution: one-hot, by its lse, by the sums of its own blocks, or, of candidates, as each rank has written
        # it.
        has_draft = i < length
        own = tl.where((draft >= 0) & (draft < 2147483647), draft, NOBODY).to(tl.int32)
        drawn_from = own
        factor = tl.full([WIDTH], 1.0, tl.float32)
        x = tl.full([WIDTH], float("-inf"), tl.float32)
        draft_scale = log2_scale(draft_temperature)
        if dense is not None:
            x = tl.max(tl.load(logits + 1, mask=there, other=NEG_INF), axis=1)
            soft = tl.full([WIDTH], SOFTMAX, tl.int32)
            if dense.lse_ptr is None:
                draft_top, draft_sumexp = _row_sumexps(part.draft, gathered, rows, has_draft, num_blocks, draft_scale, TILE)
                reference = finite_or_zero(draft_top)
                factor = 1.0 / tl.maximum(draft_sumexp, 1).to(tl.float32) * SUMEXP_ONE
                infinite = unpack_id(tl.max(tl.load(words + 1, mask=there, other=0), axis=1)).to(tl.int32)
            else:
                draft_top = tl.load(dense.lse_ptr + slot * dense.stride_lse + i, mask=has_draft, other=0.0)
                # exp(x / T - lse) = exp2((x - lse T) log2(e) / T)
                reference = finite_or_zero(draft_top) * (LOG2E / draft_scale)
                # A +inf in the row: its first place is not stored, so the draft stands for it if it is +inf itself.
                infinite = tl.where(x == POS_INF, own, NOBODY)
            soft = tl.where(draft_top == POS_INF, infinite, tl.where(draft_top == NEG_INF, NOBODY, soft))
            drawn_from = tl.where(draft_temperature > 0.0, soft, own)
        drawn_from = tl.where(missing, NOBODY, drawn_from)
        draft_prob = soft_prob(x, draft, Distribution(drawn_from, reference, factor), draft_scale)
        if part.lists.rest_ptr is not None:
            of_row = part.lists.distributions_ptr + rows * 3
            reference = tl.load(of_row, mask=has_draft, other=0.0)
            factor = tl.load(of_row + 1, mask=has_draft, other=1.0)
            draft_prob = tl.load(of_row + 2, mask=has_draft, other=0.0)
            drawn_from = tl.load(part.lists.points_ptr + rows, mask=has_draft, other=NOBODY)
    return RequestStats(
        first, status, Distribution(point_mass_id, top, inv_sumexp), Distribution(drawn_from, reference, factor),
        draft_prob, target_prob, tl.zeros([WIDTH], tl.int64), nothing, nothing,
    )  # fmt: skip


class Verified(NamedTuple):
    """What every rank knows of a request."""

    verdict: Any  # Verdict
    stats: RequestStats
    known: Known


@triton.jit
def verify(
    request, slot, row0, length, temperature, draft_temperature, gathered, dense, layout, seed_ptr, num_forward, num_blocks, vocab,
    VERIFY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What the rule says, see rules.py, beside what is known of the request: Verified."""
    i = tl.arange(0, TILE.WIDTH)
    seed = tl.zeros((), tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + slot)
    rows = forward_rows(i, row0, length, layout)
    query = query_rows(request, num_forward, layout)
    drafts = drafts_at(rows.drafts, i, length, layout, vocab)
    known = Known(tl.load(layout.positions_ptr + rows.anchor), temperature > 0.0, seed, drafts, rows, query)
    stats = _row_stats(slot, row0, length, temperature, draft_temperature, gathered, dense, drafts, num_blocks, TILE)
    return Verified(VERIFY(i, length, known, stats, None), stats, known)


@triton.jit
def merged_blocks(max_ptr, sumexp_ptr, stride, row, cut, scale, excluded, removed, BLOCKS: tl.constexpr):
    """Maximum and sum of exponentials of every block of a row from its pieces, without what `excluded` (-1 = nobody) adds to its
    own."""
    block = tl.arange(0, BLOCKS)
    first = block * VOCAB_BLOCK // cut.width
    top = tl.full([BLOCKS], float("-inf"), tl.float32)
    for n in range(cut.pieces):
        shard = first + n
        here = shard * cut.width < tl.minimum((block + 1) * VOCAB_BLOCK, cut.vocab)
        where = row * cut.blocks + (block - shard * cut.width // VOCAB_BLOCK)
        tops = tl.load(max_ptr + shard.to(tl.int64) * (2 * stride) + where, mask=here, other=NEG_INF)
        top = tl.maximum(top, tops)
    sumexp = tl.zeros([BLOCKS], tl.int64)
    for n in range(cut.pieces):
        shard = first + n
        here = shard * cut.width < tl.minimum((block + 1) * VOCAB_BLOCK, cut.vocab)
        where = row * cut.blocks + (block - shard * cut.width // VOCAB_BLOCK)
        tops = tl.load(max_ptr + shard.to(tl.int64) * (2 * stride) + where, mask=here, other=NEG_INF)
        own = tl.load(sumexp_ptr + shard.to(tl.int64) * stride + where, mask=here, other=0)
        owner = (block == tl.where(excluded >= 0, excluded // VOCAB_BLOCK, -1)) & (shard == excluded // cut.width)
        own -= tl.where(owner, removed, 0)
        # The piece that has the maximum keeps its integer, so that a block of one piece is that piece.
        scaled = (own.to(tl.float32) * tl.exp2(below_max(tops, top) * scale)).to(tl.int64)
        sumexp += tl.where(tops == top, own, scaled)
    return top, sumexp
