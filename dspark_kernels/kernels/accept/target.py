"""Target logits as acceptance sees them: after penalties, bias and mask, and -inf outside what top-k, top-p and min-p keep.

A row's path is the drafts before it; in a tree, where row i is node i, the nodes from the anchor to it, not their siblings. The
support of a row is two scalars, found by the row's last arriver from maxima of max-groups (128 ids), so that nothing is written
back. Records: args.py (View, Limits). Reference: reference/sampling.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives.adjust import adjusted
from ..primitives.constants import FILTER_LIST, MAX_GROUP, NEG_INF, POS_INF
from ..primitives.filters import EVERYTHING, filter_is_on, filter_row, kept, sums_in_support
from ..primitives.sumexp import numbers
from .values import View


class Path(NamedTuple):
    """What came before rows of a request: `rows` [ROWS] are their drafts' numbers, of a tree their ancestors as bits."""

    token_ids_ptr: Any
    logits_indices_ptr: Any
    row0: Any
    rows: Any


@triton.jit
def draft_before(j, path):
    """Draft j of a request as the path of rows i, -1 where it does not come before the row."""
    i = path.rows
    before = j < i
    row = tl.load(path.logits_indices_ptr + path.row0 + 1 + j + i * 0, mask=before, other=0)
    return tl.load(path.token_ids_ptr + row, mask=before, other=-1)


@triton.jit
def token_above(j, path):
    """Node j + 1 of a request as the path of the nodes whose ancestors are given as bits, -1 where it is none of them."""
    ancestors = path.rows
    above = ((ancestors >> (j + 1)) & 1) > 0
    row = tl.load(path.logits_indices_ptr + path.row0 + 1 + j + ancestors * 0, mask=above, other=0)
    return tl.load(path.token_ids_ptr + row, mask=above, other=-1)


@triton.jit
def read_raw(view, i, ids, inside):
    """fp32 logits of ids [ROWS, WIDTH] in rows i [ROWS] of the request, adjusted; NaN stays NaN, no filter."""
    rows = (view.row0 + i).to(tl.int64)
    x = tl.load(view.logits_ptr + rows[:, None] * view.stride + ids, mask=inside, other=NEG_INF).to(tl.float32)
    if view.adjustments is not None:
        slots = view.slot + tl.zeros_like(rows)
        if view.lineage is None:
            path = Path(view.token_ids_ptr, view.logits_indices_ptr, view.row0, i)
            x = adjusted(x, ids, inside, slots, rows, view.adjustments, path, view.length, draft_before)
        else:
            tree = view.lineage
            has_node = (i >= 0) & (i <= view.length)
            ancestors = tl.load(tree.ancestors_ptr + slots * tree.num_nodes + i, mask=has_node, other=0)
            path = Path(view.token_ids_ptr, view.logits_indices_ptr, view.row0, ancestors)
            x = adjusted(x, ids, inside, slots, rows, view.adjustments, path, view.length, token_above)
    return x


@triton.jit
def read_rows(view, i, ids, inside):
    """The same with NaN read as -inf, and -inf outside the row's support."""
    x = numbers(read_raw(view, i, ids, inside))
    if view.limits is not None:
        rows = view.row0 + i
        threshold = tl.load(view.limits.threshold_ptr + rows, volatile=True)
        cut = tl.load(view.limits.cut_ptr + rows, volatile=True)
        x = tl.where(kept(x, ids, threshold[:, None], cut[:, None]), x, NEG_INF)
    return x


@triton.jit
def read_each(view, i, ids, inside):
    """One id per row: fp32 [ROWS]."""
    x = read_rows(view, i, ids[:, None], inside[:, None])
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def read_row(view, i, ids, inside):
    """Ids [WIDTH] of row i (one number)."""
    WIDTH: tl.constexpr = ids.shape[0]
    x = read_rows(view, i + tl.zeros([1], tl.int32), ids[None, :], inside[None, :])
    return tl.reshape(x, [WIDTH])


@triton.jit
def read_tile(view, i, ids, inside):
    """Ids [A, B] of row i (one number)."""
    A: tl.constexpr = ids.shape[0]
    B: tl.constexpr = ids.shape[1]
    flat = tl.reshape(ids, [A * B])
    return tl.reshape(read_row(view, i, flat, tl.reshape(inside, [A * B])), [A, B])


@triton.jit
def _setting(pointer, slot, off):
    setting = off
    if pointer is not None:
        setting = tl.load(pointer + slot)
    return setting


class RowSource(NamedTuple):
    """Row i of a view, for filters."""

    view: View
    i: Any


@triton.jit
def _load(ids, inside, source):
    """Ids [WIDTH] of the row, whose support is not known yet."""
    WIDTH: tl.constexpr = ids.shape[0]
    x = numbers(read_raw(source.view, source.i + tl.zeros([1], tl.int32), ids[None, :], inside[None, :]))
    return tl.reshape(x, [WIDTH])


@triton.jit
def limit_row(
    i, row, view, filters, partials, top, sumexp, scratch, scale, num_blocks,
    JOINT: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Find the support of a row and sum its blocks again over that. Gives whether anything is left out."""
    num_groups = tl.cdiv(view.vocab, MAX_GROUP)
    top_k = _setting(filters.top_k_ptr, view.slot, 0)
    top_p = _setting(filters.top_p_ptr, view.slot, 1.0)
    min_p = _setting(filters.min_p_ptr, view.slot, 0.0)
    threshold = tl.full((), EVERYTHING, tl.int64)
    cut = tl.full((), -1, tl.int32)
    limited = filter_is_on(top_k, top_p, min_p, view.vocab) & (tl.abs(top) < POS_INF)
    if limited:
        source = RowSource(view, i)
        groups_ptr = scratch.groups_ptr + row * num_groups
        list_ptr = scratch.lists_ptr + row * 2 * FILTER_LIST
        threshold, cut, reached = filter_row(
            _load, source, view.vocab, scratch.maxima_ptr + row * num_groups, num_groups, groups_ptr, list_ptr, list_ptr + FILTER_LIST,
            top, sumexp, scale, top_k, top_p, min_p, JOINT, MAX_GROUP, GROUPS,
        )  # fmt: skip
        sums_in_support(_load, source, view.vocab, groups_ptr, reached, threshold, cut, partials.max_ptr + row * num_blocks,
                    partials.sumexp_ptr + row * num_blocks, num_blocks, scale, MAX_GROUP, BLOCKS)  # fmt: skip
    tl.store(view.limits.threshold_ptr + row, threshold)
    tl.store(view.limits.cut_ptr + row, cut)
    return limited
