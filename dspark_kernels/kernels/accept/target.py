"""Target logits as acceptance sees them: after penalties, bias and mask, and -inf outside what top-k, top-p and min-p keep.

A view is (logits [L, V], row stride, V, what is adjusted or None, token ids and the ancestors of tree nodes or None, their rows,
first row of the request, its state slot, its drafts, limits per row or None). A row's path is the drafts before it; in a tree,
where row i is node i, the nodes from the anchor to it, not their siblings. What is kept of a row is two scalars, found
by the row's last arriver from maxima of groups of 128 ids, so that nothing is written back. Oracle: reference/sampling.py.
"""

import triton
import triton.language as tl

from ..primitives.adjust import adjusted
from ..primitives.filters import BLOCK, EVERYTHING, filter_is_on, filter_row, keep_masses, kept
from ..primitives.mass import NEG_INF, POS_INF, numbers

GROUP_IDS = tl.constexpr(128)  # ids per stored maximum


@triton.jit
def draft_before(j, path):
    """Draft j of a request as the path of rows i, -1 where it does not come before the row."""
    token_ids_ptr, logits_indices_ptr, row0, i = path
    before = j < i
    row = tl.load(logits_indices_ptr + row0 + 1 + j + i * 0, mask=before, other=0)
    return tl.load(token_ids_ptr + row, mask=before, other=-1)


@triton.jit
def token_above(j, path):
    """Node j + 1 of a request as the path of the nodes whose ancestors are given as bits, -1 where it is none of them."""
    token_ids_ptr, logits_indices_ptr, row0, ancestors = path
    above = ((ancestors >> (j + 1)) & 1) > 0
    row = tl.load(logits_indices_ptr + row0 + 1 + j + ancestors * 0, mask=above, other=0)
    return tl.load(token_ids_ptr + row, mask=above, other=-1)


@triton.jit
def read_raw(view, i, ids, inside):
    """fp32 logits of ids [ROWS, WIDTH] in rows i [ROWS] of the request, adjusted; NaN stays NaN, no filter."""
    target_ptr, stride_t, vocab, settings, tokens, logits_indices_ptr, row0, slot, length, _ = view
    rows = (row0 + i).to(tl.int64)
    x = tl.load(target_ptr + rows[:, None] * stride_t + ids, mask=inside, other=NEG_INF).to(tl.float32)
    if settings is not None:
        slots = slot + tl.zeros_like(rows)
        token_ids_ptr, lineage = tokens
        if lineage is None:
            path = (token_ids_ptr, logits_indices_ptr, row0, i)
            x = adjusted(x, ids, inside, slots, rows, settings, path, length, draft_before)
        else:
            ancestors_ptr, num_nodes = lineage
            ancestors = tl.load(ancestors_ptr + slots * num_nodes + i, mask=(i >= 0) & (i <= length), other=0)
            path = (token_ids_ptr, logits_indices_ptr, row0, ancestors)
            x = adjusted(x, ids, inside, slots, rows, settings, path, length, token_above)
    return x


@triton.jit
def read_rows(view, i, ids, inside):
    """The same with NaN read as -inf, and -inf outside what the row keeps."""
    _, _, _, _, _, _, row0, _, _, limits = view
    x = numbers(read_raw(view, i, ids, inside))
    if limits is not None:
        threshold_ptr, cut_ptr = limits
        rows = row0 + i
        threshold = tl.load(threshold_ptr + rows, volatile=True)
        cut = tl.load(cut_ptr + rows, volatile=True)
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


@triton.jit
def _load(ids, inside, source):
    view, i = source
    return read_row(view, i, ids, inside)


@triton.jit
def limit_row(
    i, row, view, filters, top_ptr, mass_ptr, top, mass, limits, groups, scale, num_leaves,
    JOINT: tl.constexpr, GROUPS: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """Find what a row keeps and sum its leaves again over that. view: without limits. Gives whether anything is left out."""
    _, _, vocab, _, _, _, _, slot, _, _ = view
    top_k_ptr, top_p_ptr, min_p_ptr = filters
    threshold_ptr, cut_ptr = limits
    maxima_ptr, groups_ptr, lists_ptr = groups
    num_groups = tl.cdiv(vocab, GROUP_IDS)
    top_k = _setting(top_k_ptr, slot, 0)
    top_p = _setting(top_p_ptr, slot, 1.0)
    min_p = _setting(min_p_ptr, slot, 0.0)
    threshold = tl.full((), EVERYTHING, tl.int64)
    cut = tl.full((), -1, tl.int32)
    limited = filter_is_on(top_k, top_p, min_p, vocab) & (tl.abs(top) < POS_INF)
    if limited:
        listed_ptr = groups_ptr + row * num_groups
        list_ptr = lists_ptr + row * 2 * BLOCK
        threshold, cut, reached = filter_row(
            _load, (view, i), vocab, maxima_ptr + row * num_groups, num_groups, listed_ptr, list_ptr, list_ptr + BLOCK, top, mass,
            scale, top_k, top_p, min_p, JOINT, GROUP_IDS, GROUPS,
        )  # fmt: skip
        keep_masses(_load, (view, i), vocab, listed_ptr, reached, threshold, cut, top_ptr + row * num_leaves,
                    mass_ptr + row * num_leaves, num_leaves, scale, GROUP_IDS, LEAVES)  # fmt: skip
    tl.store(threshold_ptr + row, threshold)
    tl.store(cut_ptr + row, cut)
    return limited
