"""Sequential heads as device functions over one loop of positions: the latent of a request, and its product with W2.

    bias(v) = scale_v * W2[v] . round(latent),  latent =
    vanilla  W1[x]
    gated    sigmoid(G [h; W1[x]] + b) * W1[x]
    rnn      tanh(output),  s' = sigmoid(gate) s + (1 - sigmoid(gate)) tanh(candidate),
             (gate, candidate, output) = J [s; W1[x]; h] + b

x = the token drafted one position earlier (the anchor at the first), h = the position's hidden state, s = state, r = rank, H =
hidden size. Every product is a dot of [BLOCK, BLOCK] by [BLOCK, 16] whatever the number of requests, so that a request gets the
same bits in any batch. Latents are summed and activated in fp32 and rounded once, to the type of the W2 product: that of W1 where
W2 has the same or is quantised (e4m3 and int8 are exact in bf16 and fp16), else fp32. vanilla needs no rounding.

Where gated and rnn latents are made. The products with h do not depend on drafts: `project_hidden` does them for all positions in
one phase before the first. What is left, r x r weights of a gated head, 6 r x r of an rnn, is needed by every program of the
vocabulary phase. If each computed it, all of them would read those weights at once from L2, whose share per multiprocessor is about
40 bytes per nanosecond on an H200: 3 us at r = 256 gated in bf16, 50 us at r = 1024, six times that for rnn, and 2 r^2 R operations
each (8.4 million at R = 64). Spread over the programs it is 48 KB or less for each at r = 256, and costs a barrier, 1 to 2 us:
cheaper from a rank of about 180 on, for any R, and published ranks are 256. So latents have a phase of their own. (Counted, not
measured.) Sources: DSpark, arXiv 2607.05147.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..args import functions_key
from ..primitives.activations import sigmoid, tanh
from ..primitives.constants import DOT_ROWS
from ..primitives.slots import state_slots
from ..primitives.widen import by_cast, fp8_by_bits, fp8_by_cast


class HeadKind(NamedTuple):
    """How a dense head computes, one constexpr. Functions are of kernels/draft/heads.py and primitives/widen.py."""

    latent: Callable | None  # latents of a gated or rnn head; None: they are W1[x]
    parts: int  # parts of r outputs: 0, 1 (gated), 3 (rnn)
    widen: Callable  # stored W2 to the type of its product
    dot_type: Any  # of the product with W2
    mix_type: Any  # of the products that make latents

    cache_key = functions_key


class BlockTile(NamedTuple):
    """Sizes of the tiles of a dense block, one constexpr."""

    ROWS: int  # requests
    BLOCK_V: int  # ids
    BLOCK_R: int  # ranks of W2 per dot
    BLOCK_J: int  # latents
    BLOCK_N: int  # products with hidden states
    BLOCK_S: int  # columns of a weight per dot
    ONE_DOT: bool  # BLOCK_R covers all ranks
    STAGES: int  # tiles of W2 that are on their way or in use


# --- the product with W2 ----------------------------------------------------------------------------------------------
# head: Head (kernels/draft/args.py).


@triton.jit
def _w2_block(head, ids, vocab, first_rank, BLOCK_R: tl.constexpr):
    ranks = first_rank + tl.arange(0, BLOCK_R)
    inside = (ids < vocab)[:, None] & (ranks < head.rank)[None, :]
    return tl.load(head.w2_ptr + ids.to(tl.int64)[:, None] * head.stride_w2 + ranks[None, :], mask=inside, other=0)


@triton.jit
def _latent_block(latent_ptr, offsets, known, rank, first_rank, BLOCK_R: tl.constexpr):
    ranks = first_rank + tl.arange(0, BLOCK_R)
    inside = (ranks < rank)[:, None] & known[None, :]
    return tl.load(latent_ptr + ranks[:, None] + offsets[None, :], mask=inside, other=0.0)


@triton.jit
def w2_tile(head, ids, vocab, BLOCK_R: tl.constexpr):
    """The part of W2 that a tile of ids keeps for all requests: [BLOCK_V, BLOCK_R], as stored."""
    return _w2_block(head, ids, vocab, 0, BLOCK_R)


@triton.jit
def low_rank_bias(tile, head, latent_ptr, offsets, known, ids, vocab, KIND: tl.constexpr, BLOCK_R: tl.constexpr):
    """fp32 [BLOCK_V, DOT_ROWS]. offsets int64 [DOT_ROWS]: where each request's latent starts; known: where it has one (elsewhere
    the bias is 0)."""
    latent = _latent_block(latent_ptr, offsets, known, head.rank, 0, BLOCK_R)
    bias = tl.dot(KIND.widen(tile, KIND.dot_type), latent.to(KIND.dot_type), input_precision="ieee")
    for first_rank in range(BLOCK_R, head.rank, BLOCK_R):
        more = _w2_block(head, ids, vocab, first_rank, BLOCK_R)
        latent = _latent_block(latent_ptr, offsets, known, head.rank, first_rank, BLOCK_R)
        bias = tl.dot(KIND.widen(more, KIND.dot_type), latent.to(KIND.dot_type), bias, input_precision="ieee")
    return _scaled(bias, head, ids, vocab)


@triton.jit
def all_latents(latent_ptr, offsets, known, head, KIND: tl.constexpr, BLOCK_R: tl.constexpr):
    """[BLOCK_R, DOT_ROWS] in the type of the product, where BLOCK_R covers the rank: the same for every tile of W2."""
    return _latent_block(latent_ptr, offsets, known, head.rank, 0, BLOCK_R).to(KIND.dot_type)


@triton.jit
def one_dot_bias(tile, latents, head, ids, vocab, KIND: tl.constexpr):
    """low_rank_bias from `all_latents`: no loop over ranks is compiled, so that a loop over tiles can be pipelined."""
    bias = tl.dot(KIND.widen(tile, KIND.dot_type), latents, input_precision="ieee")
    return _scaled(bias, head, ids, vocab)


@triton.jit
def _scaled(bias, head, ids, vocab):
    if head.scale_ptr is not None:
        bias *= tl.load(head.scale_ptr + ids, mask=ids < vocab, other=0.0)[:, None]
    return bias


# --- latents of gated and rnn -----------------------------------------------------------------------------------------
# projection: Projection (kernels/draft/args.py), KIND: HeadKind.


@triton.jit
def project_hidden_rows(
    program, programs, projection, head, hidden, rows, num_drafts, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr
):
    """The products with h for rows (request, position), shared out over `programs`."""
    outputs = KIND.parts * head.rank
    tiles = tl.cdiv(outputs, BLOCK_N)
    for item in range(program, tiles * tl.cdiv(rows, DOT_ROWS), programs):
        n = item % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row = item // tiles * DOT_ROWS + tl.arange(0, DOT_ROWS)
        starts = (row // num_drafts).to(tl.int64) * hidden.stride_request
        starts = starts + (row % num_drafts).to(tl.int64) * hidden.stride_position
        weight_rows = projection.weight_ptr + n.to(tl.int64)[:, None] * projection.stride_weight + projection.hidden_column
        total = tl.zeros([BLOCK_N, DOT_ROWS], tl.float32)
        for first in range(0, hidden.size, BLOCK_H):
            i = first + tl.arange(0, BLOCK_H)
            there = i < hidden.size
            weight = tl.load(weight_rows + i[None, :], mask=(n < outputs)[:, None] & there[None, :], other=0.0)
            h = tl.load(hidden.ptr + starts[None, :] + i[:, None], mask=there[:, None] & (row < rows)[None, :], other=0.0)
            total = tl.dot(weight.to(KIND.mix_type), h.to(KIND.mix_type), total, input_precision="ieee")
        total += tl.load(projection.bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
        at = projection.precomputed_ptr + row.to(tl.int64)[None, :] * outputs + n[:, None]
        tl.store(at, total, mask=(n < outputs)[:, None] & (row < rows)[None, :])


@triton.jit
def project_hidden(
    projection, head, hidden, slots_ptr, num_requests, num_slots, num_drafts, first_draft, KIND: tl.constexpr, TILE: tl.constexpr
):
    """The products with h for all positions, and the state before the first: carried from earlier drafts, else 0."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    rank = head.rank
    program, programs = tl.program_id(0), tl.num_programs(0)
    project_hidden_rows(
        program, programs, projection, head, hidden, num_requests * num_drafts, num_drafts, KIND, BLOCK_N, TILE.BLOCK_S
    )
    if projection.state_ptr is not None:
        for request in range(program, num_requests, programs):
            slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
            carried = tl.where((slot >= 0) & (first_draft > 0), rank, 0)  # how much of a state there is to take over
            for first in range(0, rank, BLOCK_N):
                j = first + tl.arange(0, BLOCK_N)
                state = tl.zeros([BLOCK_N], tl.float32)
                if projection.carried_ptr is not None:
                    state = tl.load(projection.carried_ptr + slot * projection.stride_carried + j, mask=j < carried, other=0.0)
                tl.store(projection.state_ptr + tl.cast(request, tl.int64) * rank + j, state, mask=j < rank)


@triton.jit
def keep_state(projection, head, slots_ptr, num_requests, num_slots, num_drafts, BLOCK: tl.constexpr):
    """The states after the last draft, to the caller's [S, r]."""
    rank = head.rank
    if projection.carried_ptr is not None:
        for request in range(tl.program_id(0), num_requests, tl.num_programs(0)):
            slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
            there = tl.where(slot >= 0, rank, 0)
            last_ptr = projection.state_ptr + (tl.cast(num_drafts % 2, tl.int64) * num_requests + request) * rank
            for first in range(0, rank, BLOCK):
                j = first + tl.arange(0, BLOCK)
                state = tl.load(last_ptr + j, mask=j < there, other=0.0, volatile=True)
                tl.store(projection.carried_ptr + slot * projection.stride_carried + j, state, mask=j < there)


@triton.jit
def _mixed(
    part: tl.constexpr, projection, head, j, live, previous, known, row, state_row,
    PARTS: tl.constexpr, BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """Outputs j of one part, the product with h included: fp32 [BLOCK_J, DOT_ROWS]. row, state_row int64 [DOT_ROWS]: of the
    precomputed products, and of the state before (-1: it is 0)."""
    rank = head.rank
    at = projection.precomputed_ptr + row[None, :] * (PARTS * rank) + (part * rank + j)[:, None]
    total = tl.load(at, mask=(j < rank)[:, None] & live[None, :], other=0.0, volatile=True)
    weight_rows = projection.weight_ptr + (part * rank + j).to(tl.int64)[:, None] * projection.stride_weight
    for first in range(0, rank, BLOCK_S):
        i = first + tl.arange(0, BLOCK_S)
        weight = tl.load(
            weight_rows + (projection.w1_column + i)[None, :], mask=(j < rank)[:, None] & (i < rank)[None, :], other=0.0
        )
        latent = _latent_block(head.w1_ptr, previous * head.stride_w1, known, rank, first, BLOCK_S)
        total = tl.dot(weight.to(MIX_TYPE), latent.to(MIX_TYPE), total, input_precision="ieee")
    if projection.state_ptr is not None:
        # The state is fp32 and stays so: a rounded one would drift along the block.
        for first in range(0, rank, BLOCK_S):
            i = first + tl.arange(0, BLOCK_S)
            weight = tl.load(weight_rows + i[None, :], mask=(j < rank)[:, None] & (i < rank)[None, :], other=0.0)
            inside = (i < rank)[:, None] & (live & (state_row >= 0))[None, :]
            state = tl.load(projection.state_ptr + state_row[None, :] * rank + i[:, None], mask=inside, other=0.0, volatile=True)
            total = tl.dot(weight.to(tl.float32), state, total, input_precision="ieee")
    return total


@triton.jit
def gated_rows(projection, head, j, live, previous, known, row, state_row, next_row, BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr):
    """Latents j of DOT_ROWS rows, fp32 [BLOCK_J, DOT_ROWS]."""
    z = _mixed(0, projection, head, j, live, previous, known, row, state_row, 1, BLOCK_S, MIX_TYPE)
    inside = (j < head.rank)[:, None] & known[None, :]
    embedding = tl.load(head.w1_ptr + j[:, None] + (previous * head.stride_w1)[None, :], mask=inside, other=0.0)
    return sigmoid(z) * embedding.to(tl.float32)


@triton.jit
def rnn_rows(projection, head, j, live, previous, known, row, state_row, next_row, BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr):
    """The same, and the next state to next_row: other programs are reading state_row."""
    rank = head.rank
    z = _mixed(0, projection, head, j, live, previous, known, row, state_row, 3, BLOCK_S, MIX_TYPE)
    gate = sigmoid(z)
    z = _mixed(1, projection, head, j, live, previous, known, row, state_row, 3, BLOCK_S, MIX_TYPE)
    inside = (j < rank)[:, None] & live[None, :]
    before = projection.state_ptr + state_row[None, :] * rank + j[:, None]
    state = tl.load(before, mask=inside & (state_row >= 0)[None, :], other=0.0, volatile=True)
    state = gate * state + (1.0 - gate) * tanh(z)
    tl.store(projection.state_ptr + next_row[None, :] * rank + j[:, None], state, mask=inside)
    z = _mixed(2, projection, head, j, live, previous, known, row, state_row, 3, BLOCK_S, MIX_TYPE)
    return tanh(z)


@triton.jit
def gated_latent(
    projection, head, j, requests, live, previous, known, k, num_requests, num_drafts,
    BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """Latents of position k of a block."""
    row = requests.to(tl.int64) * num_drafts + k
    return gated_rows(projection, head, j, live, previous, known, row, row, row, BLOCK_S, MIX_TYPE)


@triton.jit
def rnn_latent(
    projection, head, j, requests, live, previous, known, k, num_requests, num_drafts,
    BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """The same; the states of k and k + 1 are in two buffers that take turns."""
    row = requests.to(tl.int64) * num_drafts + k
    state_row = (k % 2).to(tl.int64) * num_requests + requests
    next_row = ((k + 1) % 2).to(tl.int64) * num_requests + requests
    return rnn_rows(projection, head, j, live, previous, known, row, state_row, next_row, BLOCK_S, MIX_TYPE)


# --- what a launch chooses --------------------------------------------------------------------------------------------

_LATENTS = {None: (None, 0), "gated": (gated_latent, 1), "rnn": (rnn_latent, 3)}  # and parts of r outputs
WIDENINGS = {"by_cast": by_cast, "fp8_by_cast": fp8_by_cast, "fp8_by_bits": fp8_by_bits}


def head_kind(projection, widening, dot_type, mix_type) -> HeadKind:
    """projection: None, "gated" or "rnn"; the others are names of a device function and of types."""
    latent, parts = _LATENTS[projection]
    return HeadKind(
        latent=latent,
        parts=parts,
        widen=WIDENINGS[widening],
        dot_type=getattr(tl, dot_type),
        mix_type=getattr(tl, mix_type),
    )


def block_tile(rows, one_dot, config) -> BlockTile:
    return BlockTile(
        ROWS=rows,
        BLOCK_V=config.block_v,
        BLOCK_R=config.block_r,
        BLOCK_J=config.block_j,
        BLOCK_N=config.block_n,
        BLOCK_S=config.block_s,
        ONE_DOT=one_dot,
        STAGES=config.num_stages,
    )
