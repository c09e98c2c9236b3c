"""A draft's law rebuilt where it is needed, from base logits and the vanilla head, instead of stored for all positions.

logits(v) = round(base(v) + W1[previous] . W2[v]), bit for bit what drafting computed: the same dot of [64 ids, BLOCK_R] by
[BLOCK_R, 16] in the same order (kernels/heads.py), the same rounding. W2 is read once for each row that needs a residual. Symbols:
r = rank, previous = the token before the draft, from the layout's rows. Oracle: reference/accept.py. Source: DSpark, arXiv
2607.05147.
"""

import triton
import triton.language as tl

from .accept_laws import RESIDUAL_ONE, read_record, record_stored, target_probs
from .accept_rows import soft_prob
from .primitives.fence import stores_done
from .primitives.mass import LEAF, NEG_INF, masses, numbers

IDS = tl.constexpr(64)  # ids per dot
DOT_ROWS = tl.constexpr(16)  # columns per dot; only the first is a request


@triton.jit
def _product(w1_ptr, stride_1, w2_ptr, stride_2, ids, previous, vocab, rank, first_rank, BLOCK_R: tl.constexpr):
    """Operands of a dot: [IDS, BLOCK_R] of W2 and [BLOCK_R, DOT_ROWS] of W1."""
    ranks = first_rank + tl.arange(0, BLOCK_R)
    inside = (ids < vocab)[:, None] & (ranks < rank)[None, :]
    weights = tl.load(w2_ptr + ids.to(tl.int64)[:, None] * stride_2 + ranks[None, :], mask=inside, other=0.0)
    known = (ranks < rank)[:, None] & (previous >= 0)[None, :]
    latent = tl.load(w1_ptr + ranks[:, None] + previous[None, :] * stride_1, mask=known, other=0.0)
    if w1_ptr.dtype != w2_ptr.dtype:
        weights, latent = weights.to(tl.float32), latent.to(tl.float32)
    return weights, latent


@triton.jit
def _rebuilt(view, i, law, ids, BLOCK_R: tl.constexpr):
    """fp32 logits of ids [IDS] (neighbours) of the law of the draft that row i (one number) judges."""
    _, _, _, _, tokens, logits_indices_ptr, row0, slot, _, _ = view
    token_ids_ptr, _lineage = tokens
    base_ptr, _, stride_b, stride_k, _, width, head = law
    rows_ptr, w1_ptr, stride_1, vocab_1, w2_ptr, stride_2, rank = head
    base_row = slot
    if rows_ptr is not None:
        base_row = tl.load(rows_ptr + slot).to(tl.int64)
    token = tl.load(token_ids_ptr + tl.load(logits_indices_ptr + row0 + i))
    token = tl.where((token >= 0) & (token < vocab_1), token, -1)
    previous = tl.where(tl.arange(0, DOT_ROWS) == 0, token, -1)
    weights, latent = _product(w1_ptr, stride_1, w2_ptr, stride_2, ids, previous, width, rank, 0, BLOCK_R)
    bias = tl.dot(weights, latent, input_precision="ieee")
    for first_rank in range(BLOCK_R, rank, BLOCK_R):
        weights, latent = _product(w1_ptr, stride_1, w2_ptr, stride_2, ids, previous, width, rank, first_rank, BLOCK_R)
        bias = tl.dot(weights, latent, bias, input_precision="ieee")
    bias = tl.sum(bias, axis=1)  # the other columns are zero, and adding zeros is exact
    row_ptr = base_ptr + base_row * stride_b + i.to(tl.int64) * stride_k
    base = tl.load(row_ptr + ids, mask=ids < tl.where(base_row >= 0, width, 0), other=NEG_INF).to(tl.float32)
    return numbers(numbers(base + bias).to(base_ptr.dtype.element_ty).to(tl.float32))


@triton.jit
def record_rebuilt(
    i, rows, draft, view, law, draft_memory, row_values_ptr, row_ids_ptr, draft_scale, draft_temperature, num_leaves,
    COLUMN: tl.constexpr, LEAVES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """CANDIDATES: BLOCK_R here."""
    _, _, _, _, _, width, _ = law
    x = tl.full(rows.shape, NEG_INF, tl.float32)
    for k in range(tl.min(i, axis=0), tl.max(i, axis=0) + 1):
        token = tl.max(tl.where((i == k) & (rows >= 0), draft, -1), axis=0)
        if (token >= 0) & (token < width):
            ids = token.to(tl.int32) // IDS * IDS + tl.arange(0, IDS)
            logits = _rebuilt(view, k, law, ids, CANDIDATES)
            # Of a matrix: the compiler for sm_100 takes no reduction of a vector that comes from a product.
            own = tl.max(tl.reshape(tl.where(ids == token, logits, NEG_INF), [1, IDS]), axis=1)
            x = tl.where(i == k, own, x)
    record_stored(i, rows, draft, x, view, law, row_values_ptr, row_ids_ptr, draft_scale, draft_temperature)


@triton.jit
def _residual(view, i, law, ids, record, scale, draft_scale, BLOCK_R: tl.constexpr):
    target_law, draft_law, kept = record
    mass_of, reference, factor = draft_law
    draft_prob = soft_prob(_rebuilt(view, i, law, ids, BLOCK_R), ids, mass_of, reference, factor, draft_scale)
    return tl.maximum(kept * target_probs(view, i, ids, target_law, scale) - draft_prob, 0.0)


@triton.jit
def residual_rebuilt(
    item, i, row, view, law, removed_ptr, memory, residual_ptr, row_values_ptr, row_ids_ptr, scale, draft_scale, num_leaves,
    COLUMN: tl.constexpr, PAIRS: tl.constexpr, LEAVES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Item: PAIRS leaves of a row."""
    record = read_record(row_values_ptr, row_ids_ptr, row)
    for leaf in range(item * PAIRS, tl.minimum(item * PAIRS + PAIRS, num_leaves)):
        mass = tl.zeros([1], tl.int64)
        for part in range(LEAF // IDS):
            ids = leaf * LEAF + part * IDS + tl.arange(0, IDS)
            mass += masses(_residual(view, i, law, ids, record, scale, draft_scale, CANDIDATES), 1, IDS, RESIDUAL_ONE)
        tl.store(residual_ptr + row * num_leaves + leaf + tl.arange(0, 1), mass)


@triton.jit
def inner_rebuilt(
    leaf, i, row, request, view, law, patch_ptr, row_values_ptr, row_ids_ptr, scale, draft_scale,
    COLUMN: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    record = read_record(row_values_ptr, row_ids_ptr, row)
    patch = patch_ptr + request.to(tl.int64) * LEAF
    for part in range(LEAF // IDS):
        at = part * IDS + tl.arange(0, IDS)
        tl.store(patch + at, _residual(view, i, law, leaf * LEAF + at, record, scale, draft_scale, CANDIDATES))
    stores_done()
    return tl.load(patch + tl.arange(0, LEAF), volatile=True)
