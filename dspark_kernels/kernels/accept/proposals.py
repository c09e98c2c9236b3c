"""What acceptance asks of how drafts were drawn, as functions that a kernel takes as one constexpr (args.ChainProposal).

    draft_logits       what draft_stats needs of the logits of target and draft
    draft_stats        the draft's part of a row's statistics: its distribution, and the draft's probability under it
    residual_sums      sums per vocabulary block of [P_i * target - draft]+ (in units of 2^-60), of one of the parts of a row that
                       the second phase sums, into memory
    residual_of_blocks those of all blocks of a row, int64 [BLOCKS]
    residual_in_block  that residual inside one block, fp32 [1024]
    column_of          the column of an id in dense draft logits

dense.py: logits [S, K, Vd], ids are columns, or columns are mapped to ids. sparse.py: C candidates with logits, or the draft alone
(one-hot). P_i: prefix probability of the block rule, 1 under the token rule. Reference: reference/accept.py.
"""

import triton
import triton.language as tl

from ..primitives.constants import ROW_IDS, ROW_VALUES
from .rows import (
    DRAFT_OF,
    DRAFT_PROB,
    FACTOR,
    NOBODY,
    REFERENCE,
    finite_or_zero,
    pick,
    soft_prob,
)
from .target import read_row
from .values import Distribution, RowPair


@triton.jit
def row_pair(i, stats, prefix_prob, every):
    """Both distributions of row i (one number) of a request, and its prefix probability. every: 0 .. WIDTH - 1."""
    target, draft = stats.target, stats.draft
    return RowPair(
        Distribution(pick(target.point, i, every), finite_or_zero(pick(target.reference, i, every)), pick(target.factor, i, every)),
        Distribution(pick(draft.point, i, every), pick(draft.reference, i, every), pick(draft.factor, i, every)),
        pick(prefix_prob, i, every),
        pick(stats.target_prob, i, every),
        pick(stats.removed, i, every),
    )


@triton.jit
def store_draft_stats(stats, rows, draft, draft_prob):
    """rows [GROUP], -1 = none; draft: their distributions."""
    values, ids_of = stats.values_ptr + rows * ROW_VALUES, stats.ids_ptr + rows * ROW_IDS
    live = rows >= 0
    tl.store(values + REFERENCE, draft.reference, mask=live)
    tl.store(values + FACTOR, draft.factor, mask=live)
    tl.store(values + DRAFT_PROB, draft_prob, mask=live)
    tl.store(ids_of + DRAFT_OF, draft.point, mask=live)


@triton.jit
def as_point(draft):
    """A draft as the id of a point mass."""
    return tl.where((draft >= 0) & (draft < 2147483647), draft, NOBODY).to(tl.int32)


@triton.jit
def target_probs(view, i, ids, target, scale):
    """Of ids [WIDTH] of row i."""
    return soft_prob(read_row(view, i, ids, ids < view.vocab), ids, target, scale)
