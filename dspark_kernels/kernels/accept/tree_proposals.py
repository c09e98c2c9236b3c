"""The laws that a tree's children were drawn from, as functions the tree kernel takes as constexprs, three per kind of proposal.

    record   of rows of nodes: who has the mass, reference, total weight (integers of 2^-40)
    weights  exp2((logit - reference) * scale) of every id of a tile, under the law of one node
    at       the same of one id per node, under its parent's law

stored: logits [S, M, Vd], ids are columns, or columns are mapped to ids, each id at most once. listed: C ids with logits, entries
of one id add up. Ids outside the vocabulary keep their weight. Symbols: S state slots, M nodes. Oracle: reference/tree.py.
"""

import triton
import triton.language as tl

from ..primitives.leaves import first_leaf, first_of, merge_leaves
from ..primitives.mass import LEAF, NEG_INF, ONE, POS_INF, below_max, numbers
from .proposals import id_of_column
from .rows import NOBODY, SOFTMAX, finite_or_zero, load_leaf, soft_prob

ENTRIES = tl.constexpr(16)  # of a list that are compared with all nodes at once


@triton.jit
def pick(vector, at, i):
    """vector[at] as a scalar, 0 where `at` is none of i."""
    return tl.sum(tl.where(i == at, vector, tl.zeros_like(vector)), axis=0)


@triton.jit
def next_of(mask, after, i, WIDTH: tl.constexpr):
    """The first of i behind `after` in a mask, or WIDTH."""
    return tl.min(tl.where(mask & (i > after), i, WIDTH), axis=0)


# --- stored and mapped: one logit per column --------------------------------------------------------------------------


@triton.jit
def record_stored(i, rows, slot, vocab, law, draft_memory, draft_scale, num_leaves, LEAVES: tl.constexpr, CANDIDATES: tl.constexpr):
    """rows: [GROUP], -1 where a node has no children."""
    logits_ptr, _, stride_s, stride_m, _, width, _ = law
    draft_top_ptr, draft_mass_ptr = draft_memory
    top, mass, words, tops = merge_leaves(draft_top_ptr, draft_mass_ptr, rows, num_leaves, draft_scale, LEAVES)
    mass_of = tl.where(top == NEG_INF, NOBODY, tl.full(rows.shape, SOFTMAX, tl.int32))
    if tl.max(tl.where((rows >= 0) & (top == POS_INF), 1, 0), axis=0) > 0:
        columns = first_leaf(tops, top, LEAVES)
        row_ptrs = logits_ptr + slot * stride_s + tl.where(rows >= 0, i, 0).to(tl.int64) * stride_m
        x = load_leaf(row_ptrs[:, None], columns, columns < width)
        hot = id_of_column(law, first_of(x, columns, top, width), vocab)
        mass_of = tl.where(top == POS_INF, hot, mass_of)
    return mass_of, finite_or_zero(top), mass


@triton.jit
def weights_stored(node, ids, slot, vocab, law, mass_of, reference, draft_scale, COLUMN: tl.constexpr, CANDIDATES: tl.constexpr):
    logits_ptr, _, stride_s, stride_m, _, _, _ = law
    column, inside = COLUMN(law, ids, vocab)
    y = load_leaf(logits_ptr + slot * stride_s + node.to(tl.int64) * stride_m, column, inside)
    return soft_prob(y, ids, mass_of, reference, 1.0, draft_scale)


@triton.jit
def at_stored(nodes, ids, inside, slot, vocab, law, mass_of, reference, draft_scale, COLUMN: tl.constexpr):
    logits_ptr, _, stride_s, stride_m, _, _, _ = law
    column, found = COLUMN(law, ids, vocab)
    y = load_leaf(logits_ptr + slot * stride_s + nodes.to(tl.int64) * stride_m, column, inside & found)
    return tl.where(inside & found, soft_prob(y, ids, mass_of, reference, 1.0, draft_scale), 0.0)


# --- listed: a few ids ------------------------------------------------------------------------------------------------


@triton.jit
def _entries(node, c, slot, law):
    """Ids int64 (-1 = none) and logits of entries c of the lists of nodes, broadcast against each other."""
    ids_ptr, logits_ptr, stride_is, stride_im, stride_ls, stride_lm, count = law
    at = node.to(tl.int64)
    inside = (c < count) & (at + c * 0 >= 0)
    ids = tl.load(ids_ptr + slot * stride_is + at * stride_im + c, mask=inside, other=-1).to(tl.int64)
    x = tl.load(logits_ptr + slot * stride_ls + at * stride_lm + c, mask=inside, other=NEG_INF).to(tl.float32)
    return ids, numbers(x)


@triton.jit
def record_listed(i, rows, slot, vocab, law, draft_memory, draft_scale, num_leaves, LEAVES: tl.constexpr, CANDIDATES: tl.constexpr):
    c = tl.arange(0, CANDIDATES)[None, :]
    ids, x = _entries(tl.where(rows >= 0, i, -1)[:, None], c, slot, law)
    top = tl.max(x, axis=1)
    weight = tl.exp2(below_max(x, top[:, None]) * draft_scale)
    place = tl.min(tl.where(x == POS_INF, c, CANDIDATES), axis=1)
    hot = tl.sum(tl.where(c == place[:, None], ids, 0), axis=1)
    hot = tl.where((hot >= 0) & (hot < vocab), hot, NOBODY).to(tl.int32)
    mass_of = tl.where(top == POS_INF, hot, tl.where(top == NEG_INF, NOBODY, SOFTMAX))
    return mass_of, finite_or_zero(top), tl.sum((weight * ONE).to(tl.int64), axis=1)


@triton.jit
def weights_listed(node, ids, slot, vocab, law, mass_of, reference, draft_scale, COLUMN: tl.constexpr, CANDIDATES: tl.constexpr):
    """ids: neighbours, a few of the list's entries among them."""
    found = tl.where(ids == mass_of, 1.0, 0.0)
    if mass_of == SOFTMAX:
        c = tl.arange(0, CANDIDATES)
        listed, x = _entries(node, c, slot, law)
        weight = tl.exp2((x - reference) * draft_scale)
        low, high = tl.min(tl.min(ids, axis=1), axis=0), tl.max(tl.max(ids, axis=1), axis=0)
        near = (listed >= low) & (listed <= high) & (listed < vocab)
        k = next_of(near, -1, c, CANDIDATES)
        while k < CANDIDATES:
            found += tl.where(ids == pick(listed, k, c), pick(weight, k, c), 0.0)
            k = next_of(near, k, c, CANDIDATES)
    return found


@triton.jit
def at_listed(nodes, ids, inside, slot, vocab, law, mass_of, reference, draft_scale, COLUMN: tl.constexpr):
    _, _, _, _, _, _, count = law
    found = tl.zeros(nodes.shape, tl.float32)
    for begin in range(0, count, ENTRIES):
        c = begin + tl.arange(0, ENTRIES)[None, :]
        listed, x = _entries(tl.where(inside, nodes, -1)[:, None], c, slot, law)
        weight = tl.exp2((x - reference[:, None]) * draft_scale)
        found += tl.sum(tl.where((listed == ids[:, None]) & (c < count), weight, 0.0), axis=1)
    return tl.where(inside, tl.where(mass_of == SOFTMAX, found, tl.where(ids == mass_of, 1.0, 0.0)), 0.0)


# --- without replacement: what a law has left for the next child ------------------------------------------------------


@triton.jit
def left_mapped(node, leaf, slot, law, mass_of, reference, taken, tokens, draft_scale, i, WIDTH: tl.constexpr):
    """Weights of columns in leaves [PAIRS] but for those of the taken tokens. By column: some ids are none of the vocabulary."""
    logits_ptr, _, stride_s, stride_m, _, width, mapping = law
    map_ptr, _inverse = mapping
    column = leaf[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    y = load_leaf(logits_ptr + slot * stride_s + node.to(tl.int64) * stride_m, column, column < width)
    ids = tl.load(map_ptr + column, mask=column < width, other=-1)
    weight = soft_prob(y, tl.where(ids >= 0, ids, SOFTMAX), mass_of, reference, 1.0, draft_scale)
    return without(weight, ids, taken, tokens, i, WIDTH)


@triton.jit
def left_listed(node, slot, law, mass_of, reference, taken, tokens, draft_scale, i, CANDIDATES: tl.constexpr, WIDTH: tl.constexpr):
    """The same of a list, summed: integers of 2^-40."""
    c = tl.arange(0, CANDIDATES)
    ids, x = _entries(node, c, slot, law)
    weight = tl.exp2((x - reference) * draft_scale)
    if mass_of != SOFTMAX:
        ids = tl.where(c == 0, mass_of, -1).to(tl.int64)
        weight = tl.where(ids >= 0, 1.0, 0.0)
    weight = without(weight, ids, taken, tokens, i, WIDTH)
    return tl.sum((weight * ONE).to(tl.int64), axis=0)


@triton.jit
def without(weight, ids, taken, tokens, i, WIDTH: tl.constexpr):
    """Weights with those of the taken tokens removed."""
    k = next_of(taken, -1, i, WIDTH)
    while k < WIDTH:
        weight = tl.where(ids == pick(tokens, k, i), 0.0, weight)
        k = next_of(taken, k, i, WIDTH)
    return weight
