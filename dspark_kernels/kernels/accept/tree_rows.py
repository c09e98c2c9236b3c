"""What the decision about a tree needs to know of its rows, and draws from them.

Wave 1 as in rows.py, row i of a request being its node i; a row's record is the chain's, with the token that the walk
draws there and the weight of the law of the node's children. The walk's draws are made for all rows at once: each has noise of its
own, and nothing has to wait for the way down. Symbols: R requests, M nodes, L rows, NL leaves. Oracle: reference/tree.py.
"""

import triton
import triton.language as tl

from ..primitives.leaves import MASS_BITS, race_ids, race_leaves
from ..primitives.mass import LEAF, NEG_INF, below_max
from .rows import (
    DRAFT_OF,
    FIRST,
    IDS,
    INVERSE,
    NOBODY,
    REFERENCE,
    SOFTMAX,
    STATUS,
    TARGET_OF,
    TOP,
    VALUES,
    finite_or_zero,
    limit_rows,
    merge_target,
    rows_status,
)
from .target import read_rows


@triton.jit
def has_children(i, slot, length, parents_ptr, num_nodes, WIDTH: tl.constexpr):
    """Whether nodes i [N] are parents."""
    m = tl.arange(0, WIDTH)
    parent = tl.load(parents_ptr + slot * num_nodes + m, mask=(m > 0) & (m <= length), other=-1)
    return tl.max(tl.where(i[:, None] == parent[None, :], 1, 0), axis=1) > 0


@triton.jit
def leaf_weights(tops, words, top, scale):
    """log2 weights of leaves [ROWS, LEAVES] from what wave 1 stored of them."""
    mass = words & MASS_BITS
    weight = tl.log2(tl.maximum(mass, 1).to(tl.float32)) + below_max(tops, top[:, None]) * scale
    return tl.where(mass > 0, weight, NEG_INF)


@triton.jit
def id_weights(view, i, leaf, top, scale):
    """log2 weights of the ids of a leaf of rows i [ROWS], relative to the rows' maxima."""
    _, _, vocab, _, _, _, _, _, _, _ = view
    ids = leaf[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    x = read_rows(view, i, ids, ids < vocab)
    return tl.where(x == NEG_INF, NEG_INF, below_max(x, top[:, None]) * scale)


@triton.jit
def merge_nodes(
    first_node, row0, length, whole_view, view, layout, law, temperature_ptr, seed_ptr, filters, parents_ptr, memory, raw_memory,
    draft_memory, groups, records, walks, scale, draft_scale, num_leaves, num_nodes,
    RECORD: tl.constexpr, JOINT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, CANDIDATES: tl.constexpr,
    LEAVES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """All leaves of GROUP nodes are there: their records."""
    _starts, _logits, logits_indices_ptr, _tokens, positions_ptr = layout
    _, _, vocab, _, _, _, _, slot, _, limits = view
    _tops, mass_ptr, _best = memory
    row_values_ptr, row_ids_ptr, row_rest_ptr, row_token_ptr = records
    i = first_node + tl.arange(0, GROUP)
    rows = tl.where(i <= length, row0 + i, -1).to(tl.int64)
    live = rows >= 0
    status = rows_status(rows, mass_ptr, num_leaves, LEAVES)
    if limits is not None:
        limit_rows(first_node, whole_view, view, filters, layout, temperature_ptr, seed_ptr, memory, groups, scale, num_leaves,
                   length, JOINT, GROUP, GROUPS, LEAVES)  # fmt: skip
    first, mass_of, top, inverse, tops, words = merge_target(i, rows, status, view, temperature_ptr, memory, raw_memory,
                                                             row_values_ptr, row_ids_ptr, scale, num_leaves, LEAVES)  # fmt: skip
    token = first
    if temperature_ptr is not None:
        if (tl.load(temperature_ptr + slot) > 0.0) & (walks > 0):
            forward = tl.load(logits_indices_ptr + rows, mask=live, other=0)
            position = (tl.load(positions_ptr + forward, mask=live, other=0) + 1)[:, None]
            anchor = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0))
            seed = tl.load(seed_ptr + slot)
            leaf = race_leaves(leaf_weights(tops, words, top, scale), seed, position, anchor, i[:, None], GROUP, LEAVES)
            weight = id_weights(view, tl.minimum(i, length), leaf, top, scale)
            drawn = race_ids(weight, leaf, seed, position, anchor, i[:, None], GROUP)
            token = tl.where(mass_of == SOFTMAX, drawn, first)
    tl.store(row_token_ptr + rows, token, mask=live)
    if RECORD is not None:
        inner = has_children(i, slot, length, parents_ptr, num_nodes, WIDTH)
        draft_of, reference, rest = RECORD(i, tl.where(inner, rows, -1), slot, vocab, law, draft_memory, draft_scale, num_leaves,
                                           LEAVES, CANDIDATES)  # fmt: skip
        rest = tl.where(draft_of == SOFTMAX, rest, tl.where(draft_of == NOBODY, 0, 1099511627776))
        tl.store(row_values_ptr + rows * VALUES + REFERENCE, reference, mask=live)
        tl.store(row_ids_ptr + rows * IDS + DRAFT_OF, draft_of, mask=live)
        tl.store(row_rest_ptr + rows, rest, mask=live)


@triton.jit
def node_status(rows, inside, records):
    _, row_ids_ptr, _, _ = records
    return tl.load(row_ids_ptr + rows * IDS + STATUS, mask=inside, other=0, volatile=True)


@triton.jit
def node_laws(rows, inside, records):
    """Of rows, any shape: target's law (who has mass, maximum, factor) and draft's (who has mass, reference)."""
    row_values_ptr, row_ids_ptr, _, _ = records
    values, ids_of = row_values_ptr + rows * VALUES, row_ids_ptr + rows * IDS
    target_law = (
        tl.load(ids_of + TARGET_OF, mask=inside, other=NOBODY, volatile=True),
        finite_or_zero(tl.load(values + TOP, mask=inside, other=0.0, volatile=True)),
        tl.load(values + INVERSE, mask=inside, other=0.0, volatile=True),
    )
    draft_law = (
        tl.load(ids_of + DRAFT_OF, mask=inside, other=NOBODY, volatile=True),
        tl.load(values + REFERENCE, mask=inside, other=0.0, volatile=True),
    )
    return target_law, draft_law


@triton.jit
def first_token(row, records):
    _, row_ids_ptr, _, _ = records
    return tl.load(row_ids_ptr + row * IDS + FIRST, volatile=True)
