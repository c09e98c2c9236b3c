"""Sequential heads as device functions that the draft kernels take as a constexpr: the transition bias of a tile of ids.

vanilla: bias(v) = W1[previous] . W2[v] (DSpark, arXiv 2607.05147); none: 0. Symbols: r = rank, previous = the token drafted
one position earlier (the anchor at the first). A projection always has one form, a dot of [BLOCK_V, BLOCK_R] by [BLOCK_R, 16],
whatever the number of requests, so that a request gets the same bits in any batch.
"""

import triton
import triton.language as tl

DOT_ROWS = tl.constexpr(16)  # requests per dot; unused columns are zero


@triton.jit
def _w2_block(w2_ptr, stride_2v, ids, vocab, rank, first_rank, BLOCK_R: tl.constexpr):
    ranks = first_rank + tl.arange(0, BLOCK_R)
    inside = (ids < vocab)[:, None] & (ranks < rank)[None, :]
    return tl.load(w2_ptr + ids.to(tl.int64)[:, None] * stride_2v + ranks[None, :], mask=inside, other=0.0)


@triton.jit
def _latent_block(w1_ptr, stride_1v, previous, known, rank, first_rank, BLOCK_R: tl.constexpr):
    ranks = first_rank + tl.arange(0, BLOCK_R)
    inside = (ranks < rank)[:, None] & known[None, :]
    return tl.load(w1_ptr + ranks[:, None] + previous[None, :] * stride_1v, mask=inside, other=0.0)


@triton.jit
def no_weights(w2_ptr, stride_2v, ids, vocab, rank, BLOCK_R: tl.constexpr):
    return ids


@triton.jit
def no_bias(tile, w1_ptr, w2_ptr, stride_1v, stride_2v, ids, previous, known, vocab, rank,
            BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, DOT_TYPE: tl.constexpr):  # fmt: skip
    return tl.zeros([BLOCK_V, DOT_ROWS], tl.float32)


@triton.jit
def vanilla_weights(w2_ptr, stride_2v, ids, vocab, rank, BLOCK_R: tl.constexpr):
    """The part of W2 that a tile of ids keeps for all requests: [BLOCK_V, BLOCK_R]."""
    return _w2_block(w2_ptr, stride_2v, ids, vocab, rank, 0, BLOCK_R)


@triton.jit
def vanilla_bias(tile, w1_ptr, w2_ptr, stride_1v, stride_2v, ids, previous, known, vocab, rank,
                 BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, DOT_TYPE: tl.constexpr):  # fmt: skip
    """fp32 [BLOCK_V, DOT_ROWS]. previous int64 [DOT_ROWS]; known: where it is a token of W1 (elsewhere the bias is 0)."""
    latent = _latent_block(w1_ptr, stride_1v, previous, known, rank, 0, BLOCK_R)
    bias = tl.dot(tile.to(DOT_TYPE), latent.to(DOT_TYPE), input_precision="ieee")
    for first_rank in range(BLOCK_R, rank, BLOCK_R):
        more = _w2_block(w2_ptr, stride_2v, ids, vocab, rank, first_rank, BLOCK_R)
        latent = _latent_block(w1_ptr, stride_1v, previous, known, rank, first_rank, BLOCK_R)
        bias = tl.dot(more.to(DOT_TYPE), latent.to(DOT_TYPE), bias, input_precision="ieee")
    return bias
