"""What tree acceptance asks of how a node's children were drawn, as functions that it takes as one constexpr (args.TreeProposal).

    draft_stats    of rows of nodes: the point mass or SOFTMAX, the reference, and the sum of weights (integers of 2^-40)
    block_weights  exp2((logit - reference) * scale) of every id of a tile, under one node's distribution
    weight_at      the same of one id per node, under its parent's distribution
    weights_left, sum_left  what is left for the next child that is drawn without replacement

Dense: logits [S, M, Vd], ids are columns, or columns are mapped to ids, each id at most once. Sparse: C ids with logits, entries
of one id add up. Ids outside the vocabulary keep their weight. Symbols: S request slots, M nodes. Reference: reference/tree.py.
"""

import triton
import triton.language as tl

from ..primitives.constants import NEG_INF, POS_INF, SUMEXP_ONE, VOCAB_BLOCK
from ..primitives.sumexp import below_max, numbers
from ..primitives.vocab_blocks import first_block, first_of, merge_blocks
from .args import TreeProposal
from .dense import column_is_id, column_of_id, id_of_column
from .rows import NOBODY, SOFTMAX, finite_or_zero, load_block, pick, soft_prob
from .values import Distribution, Weights

ENTRIES = tl.constexpr(16)  # of a list that are compared with all nodes at once


@triton.jit
def next_of(mask, after, i, WIDTH: tl.constexpr):
    """The first of i behind `after` in a mask, or WIDTH."""
    return tl.min(tl.where(mask & (i > after), i, WIDTH), axis=0)


# --- dense: one logit per column --------------------------------------------------------------------------


@triton.jit
def _dense_stats(i, rows, slot, vocab, draft, partials, draft_scale, num_blocks, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr):
    """rows: [GROUP], -1 where a node has no children."""
    top, sumexp, words, tops = merge_blocks(partials.max_ptr, partials.sumexp_ptr, rows, num_blocks, draft_scale, BLOCKS)
    point_mass_id = tl.where(top == NEG_INF, NOBODY, tl.full(rows.shape, SOFTMAX, tl.int32))
    if tl.max(tl.where((rows >= 0) & (top == POS_INF), 1, 0), axis=0) > 0:
        columns = first_block(tops, top, BLOCKS)
        row_ptrs = draft.logits_ptr + slot * draft.stride_slot + tl.where(rows >= 0, i, 0).to(tl.int64) * draft.stride_row
        x = load_block(row_ptrs[:, None], columns, columns < draft.width)
        hot = id_of_column(draft, first_of(x, columns, top, draft.width), vocab)
        point_mass_id = tl.where(top == POS_INF, hot, point_mass_id)
    return Weights(point_mass_id, finite_or_zero(top)), sumexp


@triton.jit
def _dense_weights(node, ids, slot, vocab, draft, drawn_from, draft_scale, PROPOSAL: tl.constexpr, CANDIDATES: tl.constexpr):
    column, inside = PROPOSAL.column_of(draft, ids, vocab)
    y = load_block(draft.logits_ptr + slot * draft.stride_slot + node.to(tl.int64) * draft.stride_row, column, inside)
    return soft_prob(y, ids, Distribution(drawn_from.point, drawn_from.reference, 1.0), draft_scale)


@triton.jit
def _dense_weight_at(nodes, ids, inside, slot, vocab, draft, drawn_from, draft_scale, PROPOSAL: tl.constexpr):
    column, found = PROPOSAL.column_of(draft, ids, vocab)
    y = load_block(draft.logits_ptr + slot * draft.stride_slot + nodes.to(tl.int64) * draft.stride_row, column, inside & found)
    weight = soft_prob(y, ids, Distribution(drawn_from.point, drawn_from.reference, 1.0), draft_scale)
    return tl.where(inside & found, weight, 0.0)


# --- sparse: a few ids ------------------------------------------------------------------------------------------------


@triton.jit
def _entries(node, c, slot, draft):
    """Ids int64 (-1 = none) and logits of candidates c of nodes, broadcast against each other."""
    at = node.to(tl.int64)
    inside = (c < draft.count) & (at + c * 0 >= 0)
    ids = tl.load(draft.ids_ptr + slot * draft.stride_ids_slot + at * draft.stride_ids_row + c, mask=inside, other=-1).to(tl.int64)
    x = tl.load(draft.logits_ptr + slot * draft.stride_slot + at * draft.stride_row + c, mask=inside, other=NEG_INF).to(tl.float32)
    return ids, numbers(x)


@triton.jit
def _sparse_stats(i, rows, slot, vocab, draft, partials, draft_scale, num_blocks, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr):
    c = tl.arange(0, CANDIDATES)[None, :]
    ids, x = _entries(tl.where(rows >= 0, i, -1)[:, None], c, slot, draft)
    top = tl.max(x, axis=1)
    weight = tl.exp2(below_max(x, top[:, None]) * draft_scale)
    place = tl.min(tl.where(x == POS_INF, c, CANDIDATES), axis=1)
    hot = tl.sum(tl.where(c == place[:, None], ids, 0), axis=1)
    hot = tl.where((hot >= 0) & (hot < vocab), hot, NOBODY).to(tl.int32)
    point_mass_id = tl.where(top == POS_INF, hot, tl.where(top == NEG_INF, NOBODY, SOFTMAX))
    return Weights(point_mass_id, finite_or_zero(top)), tl.sum((weight * SUMEXP_ONE).to(tl.int64), axis=1)


@triton.jit
def _sparse_weights(node, ids, slot, vocab, draft, drawn_from, draft_scale, PROPOSAL: tl.constexpr, CANDIDATES: tl.constexpr):
    """ids: neighbours, a few of the candidates among them."""
    found = tl.where(ids == drawn_from.point, 1.0, 0.0)
    if drawn_from.point == SOFTMAX:
        c = tl.arange(0, CANDIDATES)
        entry_ids, x = _entries(node, c, slot, draft)
        weight = tl.exp2((x - drawn_from.reference) * draft_scale)
        low, high = tl.min(tl.min(ids, axis=1), axis=0), tl.max(tl.max(ids, axis=1), axis=0)
        near = (entry_ids >= low) & (entry_ids <= high) & (entry_ids < vocab)
        k = next_of(near, -1, c, CANDIDATES)
        while k < CANDIDATES:
            found += tl.where(ids == pick(entry_ids, k, c), pick(weight, k, c), 0.0)
            k = next_of(near, k, c, CANDIDATES)
    return found


@triton.jit
def _sparse_weight_at(nodes, ids, inside, slot, vocab, draft, drawn_from, draft_scale, PROPOSAL: tl.constexpr):
    found = tl.zeros(nodes.shape, tl.float32)
    for begin in range(0, draft.count, ENTRIES):
        c = begin + tl.arange(0, ENTRIES)[None, :]
        entry_ids, x = _entries(tl.where(inside, nodes, -1)[:, None], c, slot, draft)
        weight = tl.exp2((x - drawn_from.reference[:, None]) * draft_scale)
        found += tl.sum(tl.where((entry_ids == ids[:, None]) & (c < draft.count), weight, 0.0), axis=1)
    return tl.where(inside, tl.where(drawn_from.point == SOFTMAX, found, tl.where(ids == drawn_from.point, 1.0, 0.0)), 0.0)


# --- without replacement: what a distribution has left for the next child ------------------------------------------------------


@triton.jit
def _weights_left(node, block, slot, draft, drawn_from, taken, tokens, draft_scale, i, WIDTH: tl.constexpr):
    """Weights of columns in blocks [PAIRS] but for those of the taken tokens. By column: some ids are none of the vocabulary."""
    column = block[:, None] * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)[None, :]
    y = load_block(draft.logits_ptr + slot * draft.stride_slot + node.to(tl.int64) * draft.stride_row, column, column < draft.width)
    ids = tl.load(draft.id_map.to_target_ptr + column, mask=column < draft.width, other=-1)
    row = Distribution(drawn_from.point, drawn_from.reference, 1.0)
    weight = soft_prob(y, tl.where(ids >= 0, ids, SOFTMAX), row, draft_scale)
    return without(weight, ids, taken, tokens, i, WIDTH)


@triton.jit
def _sum_left(node, slot, draft, drawn_from, taken, tokens, draft_scale, i, CANDIDATES: tl.constexpr, WIDTH: tl.constexpr):
    """The same of candidates, summed: integers of 2^-40."""
    c = tl.arange(0, CANDIDATES)
    ids, x = _entries(node, c, slot, draft)
    weight = tl.exp2((x - drawn_from.reference) * draft_scale)
    if drawn_from.point != SOFTMAX:
        ids = tl.where(c == 0, drawn_from.point, -1).to(tl.int64)
        weight = tl.where(ids >= 0, 1.0, 0.0)
    weight = without(weight, ids, taken, tokens, i, WIDTH)
    return tl.sum((weight * SUMEXP_ONE).to(tl.int64), axis=0)


@triton.jit
def without(weight, ids, taken, tokens, i, WIDTH: tl.constexpr):
    """Weights with those of the taken tokens removed."""
    k = next_of(taken, -1, i, WIDTH)
    while k < WIDTH:
        weight = tl.where(ids == pick(tokens, k, i), 0.0, weight)
        k = next_of(taken, k, i, WIDTH)
    return weight


STORED = TreeProposal(_dense_stats, _dense_weights, _dense_weight_at, None, None, column_is_id)
MAPPED = TreeProposal(_dense_stats, _dense_weights, _dense_weight_at, _weights_left, None, column_of_id)
SPARSE = TreeProposal(_sparse_stats, _sparse_weights, _sparse_weight_at, None, _sum_left, None)
