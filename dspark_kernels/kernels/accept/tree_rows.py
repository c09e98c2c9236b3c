"""What the decision about a tree needs to know of its rows, and draws from them.

The first pass as in rows.py, row i of a request being its node i; a row's statistics are the chain's, with the token that the walk
draws there and the sum of the weights that the node's children were drawn by. The walk's draws are made for all rows at once: each
has noise of its own, and nothing has to wait for the way down. Symbols: R requests, M nodes, L rows, NB blocks. Reference:
reference/tree.py."""

import triton
import triton.language as tl

from ..primitives.constants import NEG_INF, ROW_IDS, ROW_VALUES, VOCAB_BLOCK
from ..primitives.sumexp import below_max
from ..primitives.vocab_blocks import SUMEXP_BITS, load_blocks, race_blocks, race_ids
from .rows import (
    DRAFT_OF,
    FIRST,
    INV_SUMEXP,
    NOBODY,
    REFERENCE,
    ROW_MAX,
    SOFTMAX,
    STATUS,
    TARGET_OF,
    finite_or_zero,
    limit_rows,
    merge_target,
)
from .target import read_rows
from .values import Distribution, Weights


@triton.jit
def has_children(i, slot, length, parents_ptr, num_nodes, WIDTH: tl.constexpr):
    """Whether nodes i [N] are parents."""
    m = tl.arange(0, WIDTH)
    parent = tl.load(parents_ptr + slot * num_nodes + m, mask=(m > 0) & (m <= length), other=-1)
    return tl.max(tl.where(i[:, None] == parent[None, :], 1, 0), axis=1) > 0


@triton.jit
def blocks_weights(tops, words, top, scale):
    """log2 weights of blocks [ROWS, BLOCKS] from what the first pass stored of them."""
    sumexp = words & SUMEXP_BITS
    weight = tl.log2(tl.maximum(sumexp, 1).to(tl.float32)) + below_max(tops, top[:, None]) * scale
    return tl.where(sumexp > 0, weight, NEG_INF)


@triton.jit
def id_weights(view, i, block, top, scale):
    """log2 weights of the ids of a block of rows i [ROWS], relative to the rows' maxima."""
    ids = block[:, None] * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)[None, :]
    x = read_rows(view, i, ids, ids < view.vocab)
    return tl.where(x == NEG_INF, NEG_INF, below_max(x, top[:, None]) * scale)


@triton.jit
def merge_nodes(
    first_node, view, layout, draft, sampling, parents_ptr, scratch, walks, scales, sizes,
    PROPOSAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All blocks of GROUP nodes are there: their statistics."""
    GROUP: tl.constexpr = TILE.GROUP
    BLOCKS: tl.constexpr = TILE.BLOCKS
    stats = scratch.stats
    i = first_node + tl.arange(0, GROUP)
    rows = tl.where(i <= view.length, view.row0 + i, -1).to(tl.int64)
    live = rows >= 0
    sampled = view.length < 0
    if sampling.temperature_ptr is not None:
        sampled = tl.load(sampling.temperature_ptr + view.slot) > 0.0
    if scratch.limits is not None:
        limit_rows(first_node, view, layout, sampling, scratch.target, scratch.filters, scales.target, sizes.num_blocks,
                   TILE.JOINT, GROUP, TILE.GROUPS, BLOCKS)  # fmt: skip
    blocks = load_blocks(scratch.target.max_ptr, scratch.target.sumexp_ptr, rows, sizes.num_blocks, BLOCKS)
    merged = merge_target(i, rows, view, sampled, blocks, scratch.target, scratch.raw, stats.row,
                          scales.target, sizes.num_blocks, BLOCKS)  # fmt: skip
    target, token = merged.target, merged.first
    if sampling.temperature_ptr is not None:
        if sampled & (walks > 0):
            forward = tl.load(layout.logits_indices_ptr + rows, mask=live, other=0)
            position = (tl.load(layout.positions_ptr + forward, mask=live, other=0) + 1)[:, None]
            anchor = tl.load(layout.positions_ptr + tl.load(layout.logits_indices_ptr + view.row0))
            seed = tl.load(sampling.seed_ptr + view.slot)
            weight = blocks_weights(merged.tops, merged.words, target.reference, scales.target)
            block = race_blocks(weight, seed, position, anchor, i[:, None], GROUP, BLOCKS)
            weight = id_weights(view, tl.minimum(i, view.length), block, target.reference, scales.target)
            drawn = race_ids(weight, block, seed, position, anchor, i[:, None], GROUP)
            token = tl.where(target.point == SOFTMAX, drawn, merged.first)
    tl.store(stats.token_ptr + rows, token, mask=live)
    if PROPOSAL is not None:
        inner = has_children(i, view.slot, view.length, parents_ptr, sizes.num_drafts, TILE.WIDTH)
        drawn_from, rest = PROPOSAL.draft_stats(i, tl.where(inner, rows, -1), view.slot, view.vocab, draft, scratch.draft,
                                                scales.draft, sizes.num_blocks, BLOCKS, TILE.CANDIDATES)  # fmt: skip
        rest = tl.where(drawn_from.point == SOFTMAX, rest, tl.where(drawn_from.point == NOBODY, 0, 1099511627776))
        tl.store(stats.row.values_ptr + rows * ROW_VALUES + REFERENCE, drawn_from.reference, mask=live)
        tl.store(stats.row.ids_ptr + rows * ROW_IDS + DRAFT_OF, drawn_from.point, mask=live)
        tl.store(stats.draft_sum_ptr + rows, rest, mask=live)


@triton.jit
def node_status(rows, inside, stats):
    return tl.load(stats.row.ids_ptr + rows * ROW_IDS + STATUS, mask=inside, other=0, volatile=True)


@triton.jit
def node_distributions(rows, inside, stats):
    """Of rows, any shape: the target's Distribution and the draft's Weights."""
    values, ids_of = stats.row.values_ptr + rows * ROW_VALUES, stats.row.ids_ptr + rows * ROW_IDS
    target = Distribution(
        tl.load(ids_of + TARGET_OF, mask=inside, other=NOBODY, volatile=True),
        finite_or_zero(tl.load(values + ROW_MAX, mask=inside, other=0.0, volatile=True)),
        tl.load(values + INV_SUMEXP, mask=inside, other=0.0, volatile=True),
    )
    draft = Weights(
        tl.load(ids_of + DRAFT_OF, mask=inside, other=NOBODY, volatile=True),
        tl.load(values + REFERENCE, mask=inside, other=0.0, volatile=True),
    )
    return target, draft


@triton.jit
def first_token(row, stats):
    return tl.load(stats.row.ids_ptr + row * ROW_IDS + FIRST, volatile=True)
