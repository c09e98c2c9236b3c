"""Drafts of a dense proposal: one logit or probability per column, and columns are ids or mapped to ids, each id at most once.

A map is inverted at the start of the launch, by work items that all others wait for where they ask for a column. Symbols: S state
slots, K drafts, Vd draft vocabulary. Hooks: proposals.py. Reference: reference/accept.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives.constants import LOG2E, MAP_COLUMNS, NEG_INF, POS_INF, RESIDUAL_ONE, SUMEXP_ONE, VOCAB_BLOCK
from ..primitives.sumexp import fixed_sums
from ..primitives.sync import arrive, stores_done, wait_for
from ..primitives.vocab_blocks import first_block, first_of, merge_blocks
from .args import ChainProposal
from .proposals import as_point, store_draft_stats
from .rows import NOBODY, SOFTMAX, finite_or_zero, load_block, soft_prob
from .target import read_row
from .values import Distribution

# --- columns and ids --------------------------------------------------------------------------------------------------


@triton.jit
def column_is_id(draft, ids, vocab):
    """Column of each id, and whether it has one."""
    return ids, (ids >= 0) & (ids < draft.width)


@triton.jit
def column_of_id(draft, ids, vocab):
    """The same through the inverted map: an entry counts where the map leads back, so what nobody wrote does not matter."""
    inside = (ids >= 0) & (ids < vocab)
    column = tl.load(draft.id_map.to_draft_ptr + ids, mask=inside, other=-1, volatile=True)
    found = inside & (column >= 0) & (column < draft.width)
    return column, found & (tl.load(draft.id_map.to_target_ptr + column, mask=found, other=-1) == ids)


@triton.jit
def id_of_column(draft, columns, vocab):
    ids = columns
    if draft.id_map is not None:
        ids = tl.load(draft.id_map.to_target_ptr + columns)
        ids = tl.where((ids >= 0) & (ids < vocab), ids, NOBODY)
    return ids.to(tl.int32)


@triton.jit
def invert_map(part, draft, vocab, ready_ptr):
    """One part of a draft vocabulary's map into the inverse that everybody after it reads."""
    column = part * MAP_COLUMNS + tl.arange(0, MAP_COLUMNS)
    ids = tl.load(draft.id_map.to_target_ptr + column, mask=column < draft.width, other=-1)
    tl.store(draft.id_map.to_draft_ptr + ids, column, mask=(ids >= 0) & (ids < vocab))
    stores_done()
    tl.atomic_add(ready_ptr, 1, sem="release", scope="gpu")


@triton.jit
def map_used(progress, num_requests):
    """Called once per request: the last one puts the map's counter back. All parts of the map have earlier tickets."""
    if arrive(progress.finished_ptr, num_requests):
        wait_for(progress.ready_ptr, progress.parts)
        tl.store(progress.ready_ptr, 0)


# --- the hooks --------------------------------------------------------------------------------------------------------


class DraftLogits(NamedTuple):
    """Of drafts [GROUP]: their logits in their rows, and the rows' log-sum-exp, 0 where it is not stored."""

    x: Any
    lse: Any


@triton.jit
def _row_ptr(i, view, draft):
    """Rows i int64 of a request."""
    if draft.starts_ptr is None:
        row_ptr = draft.logits_ptr + view.slot * draft.stride_slot + i * draft.stride_row
    else:
        row = tl.load(draft.starts_ptr + view.slot).to(tl.int64) + i
        # A start that names no row reads another one, and no memory of others.
        row_ptr = draft.logits_ptr + tl.minimum(tl.maximum(row, 0) * draft.stride_row, draft.stride_slot - draft.stride_row)
    return row_ptr


@triton.jit
def _row_ptrs(i, rows, view, draft):
    return _row_ptr(tl.where(rows >= 0, i, 0).to(tl.int64), view, draft)


@triton.jit
def _draft_prob(x, ids, distribution, scale, PROPOSAL: tl.constexpr):
    """Probability of ids, x of them in their draft rows."""
    if PROPOSAL.PROBS:
        one = tl.where(ids == distribution.point, 1.0, 0.0)
        prob = tl.where(distribution.point == SOFTMAX, tl.minimum(tl.maximum(x, 0.0), 1.0), one)
    else:
        prob = soft_prob(x, ids, distribution, scale)
    return prob


@triton.jit
def draft_logits(i, rows, token, view, draft, PROPOSAL: tl.constexpr):
    """rows, token (the draft): [GROUP], rows -1 where no draft is verified."""
    column, inside = PROPOSAL.column_of(draft, token, view.vocab)
    x = load_block(_row_ptrs(i, rows, view, draft), column, (rows >= 0) & inside)
    lse = tl.zeros(rows.shape, tl.float32)
    if draft.lse_ptr is not None:
        lse = tl.load(draft.lse_ptr + view.slot * draft.stride_lse + i, mask=rows >= 0, other=0.0)
    return DraftLogits(x, lse)


@triton.jit
def draft_stats(
    i, rows, token, logits, blocks, view, draft, scratch, scales, draft_temperature, num_blocks,
    PROPOSAL: tl.constexpr, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """logits: DraftLogits. blocks: of the target, not asked for here."""
    partials, stats, draft_scale = scratch.draft, scratch.stats, scales.draft
    x = logits.x
    if PROPOSAL.PROBS:
        everybody = tl.full(rows.shape, SOFTMAX, tl.int32)
        unused = tl.zeros(rows.shape, tl.float32)
        _store(rows, token, x, Distribution(everybody, unused, unused), stats, draft_scale, draft_temperature, PROPOSAL)
    elif draft.lse_ptr is None:
        row_ptrs = _row_ptrs(i, rows, view, draft)
        top, sumexp, words, tops = merge_blocks(partials.max_ptr, partials.sumexp_ptr, rows, num_blocks, draft_scale, BLOCKS)
        point = tl.full(rows.shape, SOFTMAX, tl.int32)
        if tl.max(tl.where((rows >= 0) & (top == POS_INF), 1, 0), axis=0) > 0:
            columns = first_block(tops, top, BLOCKS)
            row = load_block(row_ptrs[:, None], columns, columns < draft.width)
            hot = id_of_column(draft, first_of(row, columns, top, draft.width), view.vocab)
            point = tl.where(top == POS_INF, hot, point)
        point = tl.where(top == NEG_INF, NOBODY, point)
        factor = 1.0 / tl.maximum(sumexp, 1).to(tl.float32) * SUMEXP_ONE
        _store(rows, token, x, Distribution(point, finite_or_zero(top), factor), stats, draft_scale, draft_temperature, PROPOSAL)
    else:
        _stats_from_lse(rows, token, logits, stats, draft_scale, draft_temperature, PROPOSAL)


@triton.jit
def _stats_from_lse(rows, token, logits, stats, draft_scale, draft_temperature, PROPOSAL: tl.constexpr):
    x, lse = logits.x, logits.lse
    # A +inf in the row: its first place is not stored, so the draft stands for it if it is +inf itself.
    infinite = tl.where(x == POS_INF, as_point(token), NOBODY)
    point = tl.where(lse == POS_INF, infinite, tl.where(lse == NEG_INF, NOBODY, SOFTMAX))
    # exp(x / T - lse) = exp2((x - lse T) log2(e) / T)
    reference = finite_or_zero(lse) * (LOG2E / draft_scale)
    factor = tl.full(rows.shape, 1.0, tl.float32)
    _store(rows, token, x, Distribution(point, reference, factor), stats, draft_scale, draft_temperature, PROPOSAL)


@triton.jit
def _store(rows, token, x, drawn_from, stats, draft_scale, draft_temperature, PROPOSAL: tl.constexpr):
    """The statistics of drafts with logits x; drawn_from: the distributions where the draft temperature is above 0."""
    point = drawn_from.point
    if (draft_temperature > 0.0) == 0:
        point = as_point(token)
    point = tl.where(token == -1, NOBODY, point)
    draft = Distribution(point, drawn_from.reference, drawn_from.factor)
    store_draft_stats(stats, rows, draft, _draft_prob(x, token, draft, draft_scale, PROPOSAL))


@triton.jit
def _residual(x, view, i, draft, ids, pair, scales, PROPOSAL: tl.constexpr):
    """Of ids [WIDTH] of row i, x: their target logits."""
    column, inside = PROPOSAL.column_of(draft, ids, view.vocab)
    draft_row = _row_ptr(i.to(tl.int64), view, draft)
    draft_prob = _draft_prob(load_block(draft_row, column, inside), ids, pair.draft, scales.draft, PROPOSAL)
    return tl.maximum(pair.prefix_prob * soft_prob(x, ids, pair.target, scales.target) - draft_prob, 0.0)


@triton.jit
def residual_sums(
    part, span, i, row, pair, view, draft, scratch, scales, num_blocks,
    PROPOSAL: tl.constexpr, PAIRS: tl.constexpr, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """A part: `span` times PAIRS blocks of a row."""
    for step in range(span):
        first = (part * span + step) * PAIRS
        block = first + tl.arange(0, PAIRS)
        ids = first * VOCAB_BLOCK + tl.arange(0, PAIRS * VOCAB_BLOCK)
        x = read_row(view, i, ids, ids < view.vocab)
        residual = _residual(x, view, i, draft, ids, pair, scales, PROPOSAL)
        sums = fixed_sums(residual, PAIRS, VOCAB_BLOCK, RESIDUAL_ONE)
        tl.store(scratch.residual_ptr + row * num_blocks + block, sums, mask=block < num_blocks)


@triton.jit
def residual_in_block(
    x, block, i, request, pair, view, draft, scratch, scales, PROPOSAL: tl.constexpr, CANDIDATES: tl.constexpr
):  # fmt: skip
    """x [VOCAB_BLOCK]: the block's target logits."""
    return _residual(x, view, i, draft, block * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK), pair, scales, PROPOSAL)


STORED = ChainProposal(draft_logits, draft_stats, residual_sums, None, residual_in_block, column_is_id)
MAPPED = ChainProposal(draft_logits, draft_stats, residual_sums, None, residual_in_block, column_of_id)
PROBS = ChainProposal(draft_logits, draft_stats, residual_sums, None, residual_in_block, column_is_id, PROBS=True)
