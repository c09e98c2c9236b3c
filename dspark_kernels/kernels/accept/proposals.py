"""What acceptance asks of how drafts were drawn, as functions that a kernel takes as one constexpr (args.ChainProposal).

    draft_stats        the draft's part of a row's statistics: its distribution, and the draft's probability under it
    residual_sums      sums per vocabulary block of [P_i * target - draft]+ (in units of 2^-60), one of the parts of a row
                       that the second phase sums, or of a row at once
    residual_in_block  that residual inside one block, fp32 [1024]
    column_of          the column of an id in dense draft logits

dense.py: logits [S, K, Vd], ids are columns, or columns are mapped to ids. sparse.py: C candidates with logits, or the draft alone
(one-hot). P_i: prefix probability of the block rule, 1 under the token rule. Reference: reference/accept.py.
"""

import triton
import triton.language as tl

from ..primitives.constants import ROW_IDS, ROW_VALUES
from .args import Distribution, RowPair
from .rows import (
    DRAFT_OF,
    DRAFT_PROB,
    FACTOR,
    INV_SUMEXP,
    NOBODY,
    PREFIX_PROB,
    REFERENCE,
    ROW_MAX,
    TARGET_OF,
    finite_or_zero,
    soft_prob,
)
from .target import read_row


@triton.jit
def read_row_pair(stats, row):
    """Both distributions of a row, and its prefix probability."""
    values, ids_of = stats.values_ptr + row * ROW_VALUES, stats.ids_ptr + row * ROW_IDS
    target = Distribution(
        tl.load(ids_of + TARGET_OF, volatile=True),
        finite_or_zero(tl.load(values + ROW_MAX, volatile=True)),
        tl.load(values + INV_SUMEXP, volatile=True),
    )
    draft = Distribution(
        tl.load(ids_of + DRAFT_OF, volatile=True),
        tl.load(values + REFERENCE, volatile=True),
        tl.load(values + FACTOR, volatile=True),
    )
    return RowPair(target, draft, tl.load(values + PREFIX_PROB, volatile=True))


@triton.jit
def store_draft_stats(stats, rows, draft, draft_prob):
    """rows [GROUP], -1 = none; draft: their distributions."""
    values, ids_of = stats.values_ptr + rows * ROW_VALUES, stats.ids_ptr + rows * ROW_IDS
    live = rows >= 0
    tl.store(values + REFERENCE, draft.reference, mask=live)
    tl.store(values + FACTOR, draft.factor, mask=live)
    tl.store(values + DRAFT_PROB, draft_prob, mask=live)
    tl.store(values + PREFIX_PROB, draft.reference * 0.0 + 1.0, mask=live)
    tl.store(ids_of + DRAFT_OF, draft.point, mask=live)


@triton.jit
def as_point(draft):
    """A draft as the id of a point mass."""
    return tl.where((draft >= 0) & (draft < 2147483647), draft, NOBODY).to(tl.int32)


@triton.jit
def target_probs(view, i, ids, target, scale):
    """Of ids [WIDTH] of row i."""
    return soft_prob(read_row(view, i, ids, ids < view.vocab), ids, target, scale)
