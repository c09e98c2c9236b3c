"""Rows of target logits in acceptance: partial results per block, and what a request's decision needs to know of each row.

prob(id) = exp2((logit - top) * scale) * inverse, inverse = 2^40 / sum of exponentials; a row whose maximum is +inf, or that has no
finite logit, has probability 1 at its first maximum instead. Symbols: R requests, L rows, V vocabulary, block = 1024 ids, NB
blocks. Reference: reference/accept.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives.constants import (
    LOG2E,
    NAN,
    NEG_INF,
    NONFINITE_ROW,
    POS_INF,
    ROW_IDS,
    ROW_VALUES,
    SUMEXP_ONE,
    VOCAB_BLOCK,
)
from ..primitives.philox import COUPLED, lane_words, log2_exponential
from ..primitives.race import pack, unpack_id
from ..primitives.sumexp import numbers
from ..primitives.sync import stores_done
from ..primitives.vocab_blocks import SAW_FINITE, SAW_NAN, RowBlocks, first_block, first_of, merge_blocks, row_sumexp
from .target import limit_row, read_row, read_rows
from .values import Distribution

# Who has the probability mass of a row: nobody, everybody by softmax, or (any id >= 0) that id alone.
NOBODY = tl.constexpr(-2)
SOFTMAX = tl.constexpr(-1)


# The statistics of a row, fp32 [L, ROW_VALUES].
ROW_MAX = tl.constexpr(0)
INV_SUMEXP = tl.constexpr(1)
REFERENCE = tl.constexpr(2)  # of the draft's distribution, see soft_prob
FACTOR = tl.constexpr(3)
DRAFT_PROB = tl.constexpr(4)  # of the draft that the row verifies, under its distribution
TARGET_PROB = tl.constexpr(5)  # and under the target's
RAW_MAX = tl.constexpr(6)
RAW_LOG_SUMEXP = tl.constexpr(7)  # log2 of the raw row's sum of exponentials at temperature 1, relative to its maximum
# And int32 [L, ROW_IDS].
FIRST = tl.constexpr(0)  # lowest id of the maximum; under the coupled rule the token that the row emits
STATUS = tl.constexpr(1)
TARGET_OF = tl.constexpr(2)  # the id that has all of the target's probability
DRAFT_OF = tl.constexpr(3)  # and the draft's


@triton.jit
def pick(vector, at, i):
    """vector[at] as a scalar, 0 where `at` is none of i."""
    return tl.sum(tl.where(i == at, vector, tl.zeros_like(vector)), axis=0)


@triton.jit
def load_block(row_ptr, ids, inside):
    return numbers(tl.load(row_ptr + ids, mask=inside, other=NEG_INF).to(tl.float32))


@triton.jit
def load_row_blocks(partials, row, num_blocks, BLOCKS: tl.constexpr):
    """Block partials [BLOCKS] of one row."""
    block = tl.arange(0, BLOCKS)
    where = row * num_blocks + block
    return RowBlocks(
        tl.load(partials.max_ptr + where, mask=block < num_blocks, other=NEG_INF, volatile=True),
        tl.load(partials.sumexp_ptr + where, mask=block < num_blocks, other=0, volatile=True),
    )


@triton.jit
def soft_prob(x, ids, distribution, scale):
    """Probability of ids with logits x: exp2((x - reference) * scale) * factor, or a point mass.

    One form for target and draft, so that equal rows leave a residual of exactly nothing.
    """
    soft = tl.exp2((x - distribution.reference) * scale) * distribution.factor
    return tl.where(distribution.point == SOFTMAX, soft, tl.where(ids == distribution.point, 1.0, 0.0))


@triton.jit
def finite_or_zero(x):
    """An infinite maximum read as 0: such a row's distribution is a point, and no difference with it is taken."""
    return tl.where(tl.abs(x) == POS_INF, 0.0, x)


@triton.jit
def coupled_keys(x, block, position, temperature, seed, scale, PAIRS: tl.constexpr):
    """Keys of blocks x [PAIRS, VOCAB_BLOCK] under the noise that the draft of the position was drawn with; no anchor in its
    address."""
    seeds = seed + position * 0
    words = lane_words(
        seeds[:, None], block[:, None] * VOCAB_BLOCK, position[:, None], (position * 0)[:, None], COUPLED, PAIRS, VOCAB_BLOCK
    )
    return tl.where(temperature > 0.0, x * scale - log2_exponential(words), x)


@triton.jit
def _best_in_support(i, row, view, layout, sampling, best_ptr, scale, num_blocks, BLOCKS: tl.constexpr):
    """Best keys of a row's blocks where filters leave ids out: a block whose best is out is read again, but only if it would win.

    The row's winner takes the place of its first block's, nobody that of the others.
    """
    block = tl.arange(0, BLOCKS)
    best = tl.load(best_ptr + row * num_blocks + block, mask=block < num_blocks, other=0, volatile=True)
    word = tl.max(best, axis=0)
    one = tl.zeros([1], tl.int32)
    position = tl.load(layout.positions_ptr + tl.load(layout.logits_indices_ptr + view.row0)) + 1 + i + one
    temperature, seed = tl.load(sampling.temperature_ptr + view.slot), tl.load(sampling.seed_ptr + view.slot)
    out = tl.max(read_row(view, i, unpack_id(word).to(tl.int32) + one, one == 0), axis=0) == NEG_INF
    while out:
        again = unpack_id(word).to(tl.int32) // VOCAB_BLOCK
        ids = again * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
        x = read_row(view, i, ids, ids < view.vocab)
        key = coupled_keys(x[None, :], again + one, position, temperature, seed, scale, 1)
        new = tl.max(tl.where(x > NEG_INF, pack(tl.reshape(key, [VOCAB_BLOCK]), ids), 0), axis=0)
        best = tl.where(block == again, new, best)
        word = tl.max(best, axis=0)
        out = tl.max(read_row(view, i, unpack_id(word).to(tl.int32) + one, one == 0), axis=0) == NEG_INF
    tl.store(best_ptr + row * num_blocks + block, tl.where(block == 0, word, 0), mask=block < num_blocks)


@triton.jit
def limit_rows(
    first_row, view, layout, sampling, partials, scratch, scale, num_blocks,
    JOINT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The support of each of GROUP rows, its block sums and best keys without the rest."""
    sampled = tl.load(sampling.temperature_ptr + view.slot) > 0.0
    for i in range(first_row, tl.minimum(first_row + GROUP, view.length + 1)):
        row = (view.row0 + i).to(tl.int64)
        one_row = row + tl.zeros([1], tl.int64)
        tops, sums, words, blocks = merge_blocks(partials.max_ptr, partials.sumexp_ptr, one_row, num_blocks, scale, BLOCKS)
        top, sumexp = tl.max(tops, axis=0), tl.max(sums, axis=0)
        top = tl.where(sampled, top, NEG_INF)  # a greedy row keeps all
        limited = limit_row(
            i, row, view, sampling.filters, partials, top, sumexp, scratch, scale, num_blocks, JOINT, GROUPS, BLOCKS
        )
        stores_done()
        if partials.best_ptr is not None:
            if limited:
                _best_in_support(i, row, view, layout, sampling, partials.best_ptr, scale, num_blocks, BLOCKS)
                stores_done()


@triton.jit
def _status(words):
    """What the logits of rows showed, from the words of their blocks [ROWS, BLOCKS]."""
    status = tl.where(tl.max(words & SAW_FINITE, axis=1) > 0, 0, NONFINITE_ROW)
    return status | tl.where(tl.max(words & SAW_NAN, axis=1) > 0, NAN, 0)


class RequestStats(NamedTuple):
    """The statistics of a request's rows, [WIDTH] each; those of the draft are 0 where no rule asks for them."""

    first: Any
    status: Any
    target: Distribution  # the reference may be infinite
    draft: Distribution
    draft_prob: Any
    target_prob: Any
    removed: Any  # int64: what a one-hot draft adds to its block's sum of exponentials
    raw_max: Any
    raw_log_sumexp: Any


@triton.jit
def read_stats(rows, has_row, has_draft, raw, removed_ptr, stats, DRAFTED: tl.constexpr):
    """All at once: whoever decides waits for memory once, and takes from registers what it then asks for.

    raw: of the scratch, None: raw rows were not summed. removed_ptr: None: no one-hot drafts. DRAFTED: whether it matters how
    drafts were drawn.
    """
    values, ids_of = stats.values_ptr + rows * ROW_VALUES, stats.ids_ptr + rows * ROW_IDS
    # In the order in which they are asked for: what decides how many drafts stay comes first.
    status = tl.load(ids_of + STATUS, mask=has_row, other=0, volatile=True)
    first = tl.load(ids_of + FIRST, mask=has_row, other=-1, volatile=True)
    draft_of = tl.zeros(rows.shape, tl.int32)
    reference = tl.zeros(rows.shape, tl.float32)
    factor, draft_prob, target_prob = reference, reference, reference
    raw_max, raw_log_sumexp = reference, reference
    removed = tl.zeros(rows.shape, tl.int64)
    if DRAFTED:
        draft_prob = tl.load(values + DRAFT_PROB, mask=has_draft, other=0.0, volatile=True)
        target_prob = tl.load(values + TARGET_PROB, mask=has_draft, other=0.0, volatile=True)
    target_of = tl.load(ids_of + TARGET_OF, mask=has_row, other=NOBODY, volatile=True)
    top = tl.load(values + ROW_MAX, mask=has_row, other=0.0, volatile=True)
    inv_sumexp = tl.load(values + INV_SUMEXP, mask=has_row, other=1.0, volatile=True)
    if DRAFTED:
        draft_of = tl.load(ids_of + DRAFT_OF, mask=has_draft, other=NOBODY, volatile=True)
        reference = tl.load(values + REFERENCE, mask=has_draft, other=0.0, volatile=True)
        factor = tl.load(values + FACTOR, mask=has_draft, other=0.0, volatile=True)
    if removed_ptr is not None:
        removed = tl.load(removed_ptr + rows, mask=has_draft, other=0, volatile=True)
    if raw is not None:
        raw_max = tl.load(values + RAW_MAX, mask=has_row, other=0.0, volatile=True)
        raw_log_sumexp = tl.load(values + RAW_LOG_SUMEXP, mask=has_row, other=0.0, volatile=True)
    target = Distribution(target_of, top, inv_sumexp)
    draft = Distribution(draft_of, reference, factor)
    return RequestStats(first, status, target, draft, draft_prob, target_prob, removed, raw_max, raw_log_sumexp)


class MergedRows(NamedTuple):
    """Of rows [GROUP]: FIRST, and the target distribution (its reference may be infinite); of their blocks maxima and sums [GROUP,
    BLOCKS]."""

    first: Any
    target: Distribution
    tops: Any
    words: Any


@triton.jit
def merge_target(i, rows, view, sampled, blocks, partials, raw, stats, scale, num_blocks, BLOCKS: tl.constexpr):
    """All blocks of rows [GROUP] (-1 = none) are there: the target's part of their statistics."""
    live = rows >= 0
    row_of = tl.minimum(i, view.length)  # a row of this group: another group's limits may still be on their way
    tops, words = blocks.tops, blocks.words
    top = tl.max(tops, axis=1)
    sumexp = row_sumexp(blocks, top, scale)
    status = _status(words)
    point = (top == POS_INF) | ((status & NONFINITE_ROW) > 0)
    if partials.best_ptr is not None:
        block = tl.arange(0, BLOCKS)[None, :]
        there = live[:, None] & (block < num_blocks)
        best = tl.load(partials.best_ptr + rows[:, None] * num_blocks + block, mask=there, other=0, volatile=True)
        first = tl.where(live, unpack_id(tl.max(best, axis=1)), 0).to(tl.int32)
    else:
        # The first maximum is needed for greedy rows and for rows without a proper distribution.
        first = tl.zeros(rows.shape, tl.int32)
        if (tl.max(tl.where(live & point, 1, 0), axis=0) > 0) | (sampled == 0):
            ids = first_block(tops, top, BLOCKS)
            first = first_of(read_rows(view, row_of, ids, live[:, None] & (ids < view.vocab)), ids, top, view.vocab)
    point_mass_id = tl.where(point, first, SOFTMAX)
    inv_sumexp = 1.0 / tl.maximum(sumexp, 1).to(tl.float32) * SUMEXP_ONE
    values, ids_of = stats.values_ptr + rows * ROW_VALUES, stats.ids_ptr + rows * ROW_IDS
    tl.store(values + ROW_MAX, top, mask=live)
    tl.store(values + INV_SUMEXP, inv_sumexp, mask=live)
    tl.store(ids_of + FIRST, first, mask=live)
    tl.store(ids_of + STATUS, status, mask=live)
    tl.store(ids_of + TARGET_OF, point_mass_id, mask=live)
    if raw is not None:
        raw_max, raw_sumexp, _words, _tops = merge_blocks(raw.max_ptr, raw.sumexp_ptr, rows, num_blocks, LOG2E, BLOCKS)
        tl.store(values + RAW_MAX, raw_max, mask=live)
        tl.store(values + RAW_LOG_SUMEXP, tl.log2(tl.maximum(raw_sumexp, 1).to(tl.float32)) - 40.0, mask=live)
    return MergedRows(first, Distribution(point_mass_id, top, inv_sumexp), tops, words)


@triton.jit
def store_target_prob(rows, x, drafts, target, stats, scale):
    """The probability of the drafts that rows [GROUP] (-1 = none) verify, from their logits x."""
    finite = Distribution(target.point, finite_or_zero(target.reference), target.factor)
    target_prob = tl.where(drafts.inside, soft_prob(x, drafts.ids, finite, scale), 0.0)
    tl.store(stats.values_ptr + rows * ROW_VALUES + TARGET_PROB, target_prob, mask=rows >= 0)
