"""Sequential heads on the candidates of one request: the latent that position k multiplies with its rows of W2.

    vanilla: W1[x];  gated: sigmoid(G [h; W1[x]] + b) * W1[x];
    rnn: (gate, candidate, output) = chunks of J [s; W1[x]; h] + b, s' = sig(gate) s + (1 - sig(gate)) tanh(candidate), tanh(output)

The products with h are made for all positions at once (`hidden_products`), the rest follows the drafts. Symbols: x = the previous
token, r = rank, O = r (gated) or 3 r (rnn) outputs, s = state, zero at first. Oracle: reference/heads.py. Source: DSpark, arXiv
2607.05147.
"""

import triton
import triton.language as tl


@triton.jit
def _weights(stored):
    """fp32 values of stored weights; bytes are e4m3, whose values fp16 has, too, with an exponent that is 8 higher."""
    if stored.dtype == tl.uint8:
        byte = stored.to(tl.int16)
        half = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value = tl.where((byte & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    else:
        value = stored.to(tl.float32)
    return value


@triton.jit
def w2_tile(head, ids, first_rank, BLOCK_R: tl.constexpr):
    """Rows of W2 (zeros for id -1), BLOCK_R ranks of them, as stored."""
    w2_ptr, stride_2v, rank = head[2], head[3], head[6]
    ranks = first_rank + tl.arange(0, BLOCK_R)
    inside = (ids >= 0)[:, None] & (ranks < rank)[None, :]
    return tl.load(w2_ptr + ids.to(tl.int64)[:, None] * stride_2v + ranks[None, :], mask=inside, other=0)


@triton.jit
def weighted(tile, ids, latent_ptr, known, head, BLOCK_R: tl.constexpr):
    """fp32 [WIDTH]: W2[ids] . latent. tile: the first BLOCK_R ranks of W2[ids]; known: ranks of the latent that there are."""
    scale_ptr, rank = head[4], head[6]
    ranks = tl.arange(0, BLOCK_R)
    latent = tl.load(latent_ptr + ranks, mask=ranks < known, other=0.0).to(tl.float32)
    total = tl.sum(_weights(tile) * latent[None, :], axis=1)
    for first_rank in range(BLOCK_R, rank, BLOCK_R):
        latent = tl.load(latent_ptr + first_rank + ranks, mask=first_rank + ranks < known, other=0.0).to(tl.float32)
        total += tl.sum(_weights(w2_tile(head, ids, first_rank, BLOCK_R)) * latent[None, :], axis=1)
    if scale_ptr is not None:
        total = total * tl.load(scale_ptr + ids, mask=ids >= 0, other=0.0)
    return total


@triton.jit
def hidden_products(
    pairs, requests, slots, block, latent, hidden, products_ptr, num_drafts, BLOCK_H: tl.constexpr, DOT_TYPE: tl.constexpr
):
    """16 outputs of (weight . h + bias) for 16 (request, position) pairs. One form whatever the batch: a dot of [16, BLOCK_H] by
    [BLOCK_H, 16]."""
    weight_ptr, stride_w, bias_ptr, outputs, first_column = latent
    hidden_ptr, stride_hr, stride_hk, hidden_size = hidden
    o = block * 16 + tl.arange(0, 16)
    i = tl.arange(0, BLOCK_H)
    at = requests.to(tl.int64) * stride_hr + (pairs % num_drafts).to(tl.int64) * stride_hk
    total = tl.zeros([16, pairs.shape[0]], tl.float32)
    for first in range(0, hidden_size, BLOCK_H):
        there = first + i < hidden_size
        w = tl.load(
            weight_ptr + o.to(tl.int64)[:, None] * stride_w + first_column + first + i[None, :],
            mask=(o < outputs)[:, None] & there[None, :],
            other=0.0,
        )
        h = tl.load(hidden_ptr + at[None, :] + first + i[:, None], mask=(slots >= 0)[None, :] & there[:, None], other=0.0)
        total = tl.dot(w.to(DOT_TYPE), h.to(DOT_TYPE), total, input_precision="ieee")
    total += tl.load(bias_ptr + o, mask=o < outputs, other=0.0).to(tl.float32)[:, None]
    where = products_ptr + pairs.to(tl.int64)[None, :] * outputs + o[:, None]
    tl.store(where, total, mask=(slots >= 0)[None, :] & (o < outputs)[:, None])


@triton.jit
def no_latent(
    k, embedded_ptr, known, latent, hidden, products_ptr, latent_ptr, rank, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr
):
    pass


@triton.jit
def _rows_times(weight_ptr, stride_w, o, outputs, first_column, x_ptr, known, size, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr):
    """fp32 [BLOCK_O]: weight[o, first_column:first_column + size] . x, of which `known` elements are there."""
    total = tl.zeros([BLOCK_O], tl.float32)
    for first in range(0, size, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        w = tl.load(
            weight_ptr + o.to(tl.int64)[:, None] * stride_w + first_column + j[None, :],
            mask=(o < outputs)[:, None] & (j < size)[None, :],
            other=0.0,
        )
        x = tl.load(x_ptr + j, mask=j < known, other=0.0).to(tl.float32)
        total += tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    return total


@triton.jit
def advance_gated(
    k, embedded_ptr, known, latent, hidden, products_ptr, latent_ptr, rank, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr
):
    """latent [r] = sigmoid(G [h; W1[x]] + b) * W1[x]."""
    weight_ptr, stride_w = latent[0], latent[1]
    tl.debug_barrier()  # the latent of k - 1 has been read
    for first in range(0, rank, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        z = tl.load(products_ptr + o, mask=o < rank, other=0.0, volatile=True)
        z += _rows_times(weight_ptr, stride_w, o, rank, hidden[3], embedded_ptr, known, rank, BLOCK_O, BLOCK_J)
        e = tl.load(embedded_ptr + o, mask=o < known, other=0.0).to(tl.float32)
        tl.store(latent_ptr + o, e / (1.0 + tl.exp(-z)), mask=o < rank)
    tl.debug_barrier()


@triton.jit
def _joint(part, first, k, embedded_ptr, known, latent, products_ptr, state_ptr, rank,
           BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr):  # fmt: skip
    """Chunk `part` (gate, candidate, output) of J [s; W1[x]; h] + b, outputs first .. first + BLOCK_O - 1."""
    weight_ptr, stride_w = latent[0], latent[1]
    o = first + tl.arange(0, BLOCK_O)
    row = part * rank + tl.where(o < rank, o, 0)
    z = tl.load(products_ptr + row, volatile=True)
    states = tl.where(k > 0, rank, 0)
    z += _rows_times(weight_ptr, stride_w, row, 3 * rank, 0, state_ptr, states, rank, BLOCK_O, BLOCK_J)
    return z + _rows_times(weight_ptr, stride_w, row, 3 * rank, rank, embedded_ptr, known, rank, BLOCK_O, BLOCK_J)


@triton.jit
def advance_rnn(
    k, embedded_ptr, known, latent, hidden, products_ptr, latent_ptr, rank, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr
):
    """latent [r] = tanh(output), then the states of k - 1 and k, which take turns in two more rows of r."""
    old_ptr = latent_ptr + (1 + k % 2) * rank
    new_ptr = latent_ptr + (2 - k % 2) * rank
    tl.debug_barrier()
    for first in range(0, rank, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        gate = _joint(0, first, k, embedded_ptr, known, latent, products_ptr, old_ptr, rank, BLOCK_O, BLOCK_J)
        gate = 1.0 / (1.0 + tl.exp(-gate))
        candidate = _joint(1, first, k, embedded_ptr, known, latent, products_ptr, old_ptr, rank, BLOCK_O, BLOCK_J)
        output = _joint(2, first, k, embedded_ptr, known, latent, products_ptr, old_ptr, rank, BLOCK_O, BLOCK_J)
        old = tl.load(old_ptr + o, mask=o < tl.where(k > 0, rank, 0), other=0.0)
        new = gate * old + (1.0 - gate) * (2.0 / (1.0 + tl.exp(-2.0 * candidate)) - 1.0)
        tl.store(new_ptr + o, new, mask=o < rank)
        tl.store(latent_ptr + o, 2.0 / (1.0 + tl.exp(-2.0 * output)) - 1.0, mask=o < rank)
    tl.debug_barrier()
