"""Sequential heads at many nodes of a draft tree at once: the latents that the nodes of a depth multiply with W2.

    vanilla: W1[x];  gated: sigmoid(G [h; W1[x]] + b) * W1[x];
    rnn: (gate, candidate, output) = chunks of J [s; W1[x]; h] + b, s' = sig(gate) s + (1 - sig(gate)) tanh(candidate), tanh(output)

Every node has a state of its own, made from its parent's. The products with h are those of the depth (`hidden_products`). Latents
stay in fp32: nothing of a tree is stored from which they could be rebuilt. Symbols: ROWS nodes, x = a node's token, r = rank, s =
state, zero at the anchor. Reference: reference/heads.py. Source: DSpark, arXiv 2607.05147.
"""

import triton
import triton.language as tl

from ..draft.candidate_heads import _values, exact_dot
from ..primitives.activations import sigmoid, tanh
from .args import LatentScratch


@triton.jit
def rows_product(total, row_ptrs, there, weight_ptr, columns, used, first_column, size, BLOCK: tl.constexpr):
    """total [ROWS, M] + rows . weights, the products of fp32. row_ptrs [ROWS], 0 where not `there`; columns: offsets [M] of rows of
    weights that are `used`, from first_column on."""
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        a = tl.load(row_ptrs[:, None] + i[None, :], mask=there[:, None] & (i < size)[None, :], other=0.0)
        inside = (i < size)[:, None] & used[None, :]
        w = tl.load(weight_ptr + columns[None, :] + (first_column + i)[:, None], mask=inside, other=0)
        total = exact_dot(total, a, _values(w))
    return total


@triton.jit
def node_bias(ids, used, row_ptrs, there, head, BLOCK_R: tl.constexpr):
    """fp32 [ROWS, N]: latents of ROWS nodes . W2[ids]. head: Head."""
    total = tl.zeros([row_ptrs.shape[0], ids.shape[0]], tl.float32)
    columns = ids.to(tl.int64) * head.stride_w2
    total = rows_product(total, row_ptrs, there, head.w2_ptr, columns, used, 0, head.rank, BLOCK_R)
    if head.scale_ptr is not None:
        total = total * tl.load(head.scale_ptr + ids, mask=used, other=0.0)[None, :]
    return total


@triton.jit
def latents_of(scratch, request, num_drafts, latent, head, NODES: tl.constexpr):
    """LatentScratch from a request on. scratch: of all requests."""
    products_ptr, latent_ptr, states_ptr = scratch.products_ptr, scratch.latent_ptr, scratch.states_ptr
    if latent is not None:
        products_ptr += request * num_drafts * latent.outputs
        latent_ptr += request * (NODES * head.rank)
        states_ptr += request * (2 * NODES * head.rank)
    return LatentScratch(products_ptr, latent_ptr, states_ptr)


@triton.jit
def advance_gated_nodes(
    depth, live, embedded_ptrs, known, origin, latent, hidden_size, own, rank,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Latents fp32 [ROWS, r] of the rows that are `live`. own: LatentScratch of the request."""
    ROWS: tl.constexpr = live.shape[0]
    products_ptr = own.products_ptr + depth * latent.outputs
    row_ptrs = own.latent_ptr + tl.arange(0, ROWS).to(tl.int64) * rank
    for first in range(0, rank, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        total = tl.zeros([ROWS, BLOCK_O], tl.float32)
        columns = o.to(tl.int64) * latent.stride_weight
        total = rows_product(total, embedded_ptrs, known, latent.weight_ptr, columns, o < rank, hidden_size, rank, BLOCK_J)
        z = total + tl.load(products_ptr + o, mask=o < rank, other=0.0, volatile=True)[None, :]
        there = (o < rank)[None, :]
        e = tl.load(embedded_ptrs[:, None] + o[None, :], mask=known[:, None] & there, other=0.0).to(tl.float32)
        tl.store(row_ptrs[:, None] + o[None, :], sigmoid(z) * e, mask=live[:, None] & there)


@triton.jit
def advance_rnn_nodes(
    depth, live, embedded_ptrs, known, origin, latent, hidden_size, own, rank,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The same; the states of a depth and of the next take turns in two tables [ROWS, r]. origin: the parent's row in its depth."""
    ROWS: tl.constexpr = live.shape[0]
    products_ptr = own.products_ptr + depth * latent.outputs
    row = tl.arange(0, ROWS).to(tl.int64)
    row_ptrs = own.latent_ptr + row * rank
    new_ptrs = own.states_ptr + ((1 - depth % 2) * ROWS + row) * rank
    old_ptrs = own.states_ptr + ((depth % 2) * ROWS + tl.maximum(origin, 0)).to(tl.int64) * rank
    begun = live & (origin * 0 + depth > 0)
    for first in range(0, rank, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        there = (o < rank)[None, :]
        old = tl.load(old_ptrs[:, None] + o[None, :], mask=begun[:, None] & there, other=0.0, volatile=True)
        gate = old
        for part in range(3):  # gate, candidate, output
            total = tl.zeros([ROWS, BLOCK_O], tl.float32)
            columns = (part * rank + o).to(tl.int64) * latent.stride_weight
            total = rows_product(total, old_ptrs, begun, latent.weight_ptr, columns, o < rank, 0, rank, BLOCK_J)
            total = rows_product(total, embedded_ptrs, known, latent.weight_ptr, columns, o < rank, rank, rank, BLOCK_J)
            z = total + tl.load(products_ptr + part * rank + o, mask=o < rank, other=0.0, volatile=True)[None, :]
            if part == 0:
                gate = sigmoid(z)
            elif part == 1:
                tl.store(new_ptrs[:, None] + o[None, :], gate * old + (1.0 - gate) * tanh(z), mask=live[:, None] & there)
            else:
                tl.store(row_ptrs[:, None] + o[None, :], tanh(z), mask=live[:, None] & there)
