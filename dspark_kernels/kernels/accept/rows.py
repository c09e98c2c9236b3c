"""Rows of target logits in acceptance: partial results per leaf, and what a request's decision needs to know of each row.

prob(id) = exp2((logit - top) * scale) * inverse, inverse = 2^40 / mass; a row whose maximum is +inf, or that has no finite logit,
has all its mass on its first maximum instead. Symbols: R requests, L rows, V vocabulary, leaf = 1024 ids, NL leaves. Oracle:
reference/accept.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives.fence import stores_done
from ..primitives.leaves import SAW_FINITE, SAW_NAN, first_leaf, first_of, leaf_masses, merge_leaves
from ..primitives.mass import LEAF, NEG_INF, ONE, POS_INF, numbers
from ..primitives.philox import COUPLED, lane_words, log2_exponential
from ..primitives.race import pack, unpack_id
from .args import Distribution
from .target import GROUP_IDS, limit_row, read_each, read_raw, read_row, read_rows

# Bits of `flags`; the public names are dspark_kernels.types.Flag (a test keeps both equal).
NONFINITE_ROW = tl.constexpr(1)
NAN = tl.constexpr(2)
BAD_TOKEN_ID = tl.constexpr(4)
MISSING_DRAFT = tl.constexpr(8)
EMPTY_RESIDUAL = tl.constexpr(16)

# Who has the probability mass of a row: nobody, everybody by softmax, or (any id >= 0) that id alone.
NOBODY = tl.constexpr(-2)
SOFTMAX = tl.constexpr(-1)

LOG2E = tl.constexpr(1.4426950408889634)

# The record of a row, fp32 [L, VALUES].
VALUES = tl.constexpr(12)
TOP = tl.constexpr(0)
INVERSE = tl.constexpr(1)
REFERENCE = tl.constexpr(2)  # of the draft's law, see soft_prob
FACTOR = tl.constexpr(3)
DRAFT_PROB = tl.constexpr(4)  # of the draft that the row judges, under its law
TARGET_PROB = tl.constexpr(5)  # and under the target's
PREFIX_PROB = tl.constexpr(6)  # P_i of the block rule
RAW_TOP = tl.constexpr(7)
RAW_LOG = tl.constexpr(8)  # log2 of the raw row's mass at temperature 1, relative to its maximum
# And int32 [L, IDS].
IDS = tl.constexpr(4)
FIRST = tl.constexpr(0)  # lowest id of the maximum; under the coupled rule the token that the row emits
STATUS = tl.constexpr(1)
TARGET_OF = tl.constexpr(2)  # who has the target's mass
DRAFT_OF = tl.constexpr(3)  # and the draft's


@triton.jit
def load_leaf(row_ptr, ids, inside):
    return numbers(tl.load(row_ptr + ids, mask=inside, other=NEG_INF).to(tl.float32))


@triton.jit
def soft_prob(x, ids, distribution, scale):
    """Probability of ids with logits x: exp2((x - reference) * scale) * factor, or a point mass.

    One form for target and draft, so that equal rows leave a residual of exactly nothing.
    """
    soft = tl.exp2((x - distribution.reference) * scale) * distribution.factor
    return tl.where(distribution.point == SOFTMAX, soft, tl.where(ids == distribution.point, 1.0, 0.0))


@triton.jit
def finite_or_zero(x):
    """An infinite maximum read as 0: such a row's law is a point, and no difference with it is taken."""
    return tl.where(tl.abs(x) == POS_INF, 0.0, x)


@triton.jit
def sweep_rows(i, leaf, keep, view, layout, sampling, partials, raw, filters, scale, num_leaves, PAIRS: tl.constexpr):
    """First pass on PAIRS pairs of a row (i-th of its request) and a leaf: maximum and mass, one pass over the logits.

    Coupled: the leaf's best key of logit * scale + noise, too. Raw log-probabilities: maximum and mass of what the target gave, at
    temperature 1. Filters: maxima of groups of ids.
    """
    row = (view.row0 + i).to(tl.int64)
    ids = leaf[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    inside = keep[:, None] & (ids < view.vocab)
    adjusted = read_raw(view, i, ids, inside)
    x = numbers(adjusted)
    top, mass = leaf_masses(x, scale, PAIRS)
    mass |= tl.where(tl.max(tl.where(adjusted != adjusted, 1, 0), axis=1) > 0, SAW_NAN, 0)
    mass |= tl.where(tl.max(tl.where(tl.abs(x) < POS_INF, 1, 0), axis=1) > 0, SAW_FINITE, 0)
    where = row * num_leaves + leaf
    tl.store(partials.max_ptr + where, top, mask=keep)
    tl.store(partials.sumexp_ptr + where, mass, mask=keep)
    if filters is not None:
        maxima = tl.max(tl.reshape(x, [PAIRS, LEAF // GROUP_IDS, GROUP_IDS]), axis=2)
        group = leaf[:, None] * (LEAF // GROUP_IDS) + tl.arange(0, LEAF // GROUP_IDS)[None, :]
        num_groups = tl.cdiv(view.vocab, GROUP_IDS)
        tl.store(filters.maxima_ptr + row[:, None] * num_groups + group, maxima, mask=keep[:, None] & (group < num_groups))
    if raw is not None:
        raw_x = x
        if view.adjustments is not None:
            raw_x = numbers(tl.load(view.logits_ptr + row[:, None] * view.stride + ids, mask=inside, other=NEG_INF).to(tl.float32))
        raw_top, raw_mass = leaf_masses(raw_x, LOG2E, PAIRS)
        tl.store(raw.max_ptr + where, raw_top, mask=keep)
        tl.store(raw.sumexp_ptr + where, raw_mass, mask=keep)
    if partials.best_ptr is not None:
        position = tl.load(layout.positions_ptr + tl.load(layout.logits_indices_ptr + view.row0)) + 1 + i
        temperature, seed = tl.load(sampling.temperature_ptr + view.slot), tl.load(sampling.seed_ptr + view.slot)
        key = coupled_keys(x, leaf, position, temperature, seed, scale, PAIRS)
        tl.store(partials.best_ptr + where, tl.max(tl.where(inside, pack(key, ids), 0), axis=1), mask=keep)


@triton.jit
def coupled_keys(x, leaf, position, temperature, seed, scale, PAIRS: tl.constexpr):
    """Keys of leaves x [PAIRS, LEAF] under the noise that the draft of the position was drawn with; no anchor in its address."""
    seeds = seed + position * 0
    words = lane_words(seeds[:, None], leaf[:, None] * LEAF, position[:, None], (position * 0)[:, None], COUPLED, PAIRS, LEAF)
    return tl.where(temperature > 0.0, x * scale - log2_exponential(words), x)


@triton.jit
def _best_in_support(i, row, view, layout, sampling, best_ptr, scale, num_leaves, LEAVES: tl.constexpr):
    """Best keys of a row's leaves where filters leave ids out: a leaf whose best is out is read again, but only if it would win.

    The row's winner takes the place of its first leaf's, nobody that of the others.
    """
    leaf = tl.arange(0, LEAVES)
    best = tl.load(best_ptr + row * num_leaves + leaf, mask=leaf < num_leaves, other=0, volatile=True)
    word = tl.max(best, axis=0)
    one = tl.zeros([1], tl.int32)
    position = tl.load(layout.positions_ptr + tl.load(layout.logits_indices_ptr + view.row0)) + 1 + i + one
    temperature, seed = tl.load(sampling.temperature_ptr + view.slot), tl.load(sampling.seed_ptr + view.slot)
    out = tl.max(read_row(view, i, unpack_id(word).to(tl.int32) + one, one == 0), axis=0) == NEG_INF
    while out:
        again = unpack_id(word).to(tl.int32) // LEAF
        ids = again * LEAF + tl.arange(0, LEAF)
        x = read_row(view, i, ids, ids < view.vocab)
        key = coupled_keys(x[None, :], again + one, position, temperature, seed, scale, 1)
        new = tl.max(tl.where(x > NEG_INF, pack(tl.reshape(key, [LEAF]), ids), 0), axis=0)
        best = tl.where(leaf == again, new, best)
        word = tl.max(best, axis=0)
        out = tl.max(read_row(view, i, unpack_id(word).to(tl.int32) + one, one == 0), axis=0) == NEG_INF
    tl.store(best_ptr + row * num_leaves + leaf, tl.where(leaf == 0, word, 0), mask=leaf < num_leaves)


@triton.jit
def limit_rows(
    first_row, view, limited_view, layout, sampling, partials, scratch, scale, num_leaves,
    JOINT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """The support of each of GROUP rows, its leaf masses and best keys without the rest."""
    sampled = tl.load(sampling.temperature_ptr + view.slot) > 0.0
    for i in range(first_row, tl.minimum(first_row + GROUP, view.length + 1)):
        row = (view.row0 + i).to(tl.int64)
        one_row = row + tl.zeros([1], tl.int64)
        tops, sums, words, leaves = merge_leaves(partials.max_ptr, partials.sumexp_ptr, one_row, num_leaves, scale, LEAVES)
        top, mass = tl.max(tops, axis=0), tl.max(sums, axis=0)
        top = tl.where(sampled, top, NEG_INF)  # a greedy row keeps all
        limited = limit_row(i, row, view, sampling.filters, partials, top, mass, limited_view.limits, scratch, scale, num_leaves,
                            JOINT, GROUPS, LEAVES)  # fmt: skip
        stores_done()
        if partials.best_ptr is not None:
            if limited:
                _best_in_support(i, row, limited_view, layout, sampling, partials.best_ptr, scale, num_leaves, LEAVES)
                stores_done()


@triton.jit
def rows_status(rows, sumexp_ptr, num_leaves, LEAVES: tl.constexpr):
    """What the logits of rows [GROUP] showed, before filters."""
    leaf = tl.arange(0, LEAVES)[None, :]
    inside = (rows >= 0)[:, None] & (leaf < num_leaves)
    words = tl.load(sumexp_ptr + rows[:, None] * num_leaves + leaf, mask=inside, other=0, volatile=True)
    status = tl.where(tl.max(words & SAW_FINITE, axis=1) > 0, 0, NONFINITE_ROW)
    return status | tl.where(tl.max(words & SAW_NAN, axis=1) > 0, NAN, 0)


class MergedRows(NamedTuple):
    """Of rows [GROUP]: FIRST, and the target distribution (its reference may be infinite); of their blocks maxima and sums [GROUP,
    LEAVES]."""

    first: Any
    target: Distribution
    tops: Any
    words: Any


@triton.jit
def merge_target(i, rows, status, view, temperature_ptr, partials, raw, stats, scale, num_leaves, LEAVES: tl.constexpr):
    """All leaves of rows [GROUP] (-1 = none) are there: the target's part of their statistics."""
    live = rows >= 0
    row_of = tl.minimum(i, view.length)  # a row of this group: another group's limits may still be on their way
    top, mass, words, tops = merge_leaves(partials.max_ptr, partials.sumexp_ptr, rows, num_leaves, scale, LEAVES)
    point = (top == POS_INF) | ((status & NONFINITE_ROW) > 0)
    if partials.best_ptr is not None:
        leaf = tl.arange(0, LEAVES)[None, :]
        there = live[:, None] & (leaf < num_leaves)
        best = tl.load(partials.best_ptr + rows[:, None] * num_leaves + leaf, mask=there, other=0, volatile=True)
        first = tl.where(live, unpack_id(tl.max(best, axis=1)), 0).to(tl.int32)
    else:
        # The first maximum is needed for greedy rows and for rows without a proper law.
        first = tl.zeros(rows.shape, tl.int32)
        need = tl.where(live & point, 1, 0)
        if temperature_ptr is None:
            need = tl.where(live, 1, 0)
        else:
            need = need | tl.where((tl.load(temperature_ptr + view.slot) > 0.0) == 0, 1, 0)
        if tl.max(need, axis=0) > 0:
            ids = first_leaf(tops, top, LEAVES)
            first = first_of(read_rows(view, row_of, ids, live[:, None] & (ids < view.vocab)), ids, top, view.vocab)
    mass_of = tl.where(point, first, SOFTMAX)
    inverse = 1.0 / tl.maximum(mass, 1).to(tl.float32) * ONE
    values, ids_of = stats.values_ptr + rows * VALUES, stats.ids_ptr + rows * IDS
    tl.store(values + TOP, top, mask=live)
    tl.store(values + INVERSE, inverse, mask=live)
    tl.store(ids_of + FIRST, first, mask=live)
    tl.store(ids_of + STATUS, status, mask=live)
    tl.store(ids_of + TARGET_OF, mass_of, mask=live)
    if raw is not None:
        raw_top, raw_mass, _words, _tops = merge_leaves(raw.max_ptr, raw.sumexp_ptr, rows, num_leaves, LOG2E, LEAVES)
        tl.store(values + RAW_TOP, raw_top, mask=live)
        tl.store(values + RAW_LOG, tl.log2(tl.maximum(raw_mass, 1).to(tl.float32)) - 40.0, mask=live)
    return MergedRows(first, Distribution(mass_of, top, inverse), tops, words)


@triton.jit
def merge_rows(i, rows, status, view, layout, temperature_ptr, partials, raw, stats, scale, num_leaves, LEAVES: tl.constexpr):
    """The target's part of the statistics, with the probability of the drafts that rows [GROUP] (-1 = none) verify.

    Gives those drafts, int64 [GROUP], -1 where there is none.
    """
    merged = merge_target(i, rows, status, view, temperature_ptr, partials, raw, stats, scale, num_leaves, LEAVES)
    target = merged.target
    live = rows >= 0
    has_draft = live & (i < view.length)
    forward = tl.load(layout.logits_indices_ptr + rows + 1, mask=has_draft, other=0)
    draft = tl.load(layout.token_ids_ptr + forward, mask=has_draft, other=-1)
    inside = has_draft & (draft >= 0) & (draft < view.vocab)
    x = read_each(view, tl.minimum(i, view.length), tl.where(inside, draft, 0).to(tl.int32), inside)
    target_prob = soft_prob(x, draft, Distribution(target.point, finite_or_zero(target.reference), target.factor), scale)
    tl.store(stats.values_ptr + rows * VALUES + TARGET_PROB, tl.where(inside, target_prob, 0.0), mask=live)
    return draft
