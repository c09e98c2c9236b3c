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

Where gated and rnn latents are made. The products with h do not depend on drafts: `hoist` does them for all positions in one phase
before the first. What is left, r x r weights of a gated head, 6 r x r of an rnn, is needed by every program of the vocabulary
phase. If each computed it, all of them would read those weights at once from L2, whose share per multiprocessor is about 40 bytes
per nanosecond on an H200: 3 us at r = 256 gated in bf16, 50 us at r = 1024, six times that for rnn, and 2 r^2 R operations each
(8.4 million at R = 64). Spread over the programs it is 48 KB or less for each at r = 256, and costs a barrier, 1 to 2 us: cheaper
from a rank of about 180 on, for any R, and published ranks are 256. So latents have a phase of their own. (Counted, not measured.)
Sources: DSpark, arXiv 2607.05147.
"""

import triton
import triton.language as tl

from ..primitives.activations import sigmoid, tanh
from ..primitives.slots import state_slots

DOT_ROWS = tl.constexpr(16)  # requests per dot; unused columns are zero


# --- the product with W2 ----------------------------------------------------------------------------------------------
# head = (W1 [V1, r], W2 [V, r], its scales fp32 [V] or None, row strides of W1 and W2, V1, r).


@triton.jit
def _w2_block(head, ids, vocab, first_rank, BLOCK_R: tl.constexpr):
    _, w2_ptr, _, _, stride_2v, _, rank = head
    ranks = first_rank + tl.arange(0, BLOCK_R)
    inside = (ids < vocab)[:, None] & (ranks < rank)[None, :]
    return tl.load(w2_ptr + ids.to(tl.int64)[:, None] * stride_2v + ranks[None, :], mask=inside, other=0)


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
def low_rank_bias(tile, head, latent_ptr, offsets, known, ids, vocab, WIDEN: tl.constexpr, BLOCK_R: tl.constexpr,
                  DOT_TYPE: tl.constexpr):  # fmt: skip
    """fp32 [BLOCK_V, DOT_ROWS]. offsets int64 [DOT_ROWS]: where each request's latent starts; known: where it has one (elsewhere
    the bias is 0)."""
    _, _, scale_ptr, _, _, _, rank = head
    latent = _latent_block(latent_ptr, offsets, known, rank, 0, BLOCK_R)
    bias = tl.dot(WIDEN(tile, DOT_TYPE), latent.to(DOT_TYPE), input_precision="ieee")
    for first_rank in range(BLOCK_R, rank, BLOCK_R):
        more = _w2_block(head, ids, vocab, first_rank, BLOCK_R)
        latent = _latent_block(latent_ptr, offsets, known, rank, first_rank, BLOCK_R)
        bias = tl.dot(WIDEN(more, DOT_TYPE), latent.to(DOT_TYPE), bias, input_precision="ieee")
    if scale_ptr is not None:
        bias *= tl.load(scale_ptr + ids, mask=ids < vocab, other=0.0)[:, None]
    return bias


# --- latents of gated and rnn -----------------------------------------------------------------------------------------
# mixer = (weight [P r, columns], bias [P r], its row stride, column of h, column of W1[x], hoisted fp32 [R, K, P r], latents
# [R, r], states fp32 [2, R, r] or None, carried state fp32 [S, r] or None, its row stride); P = 1 (gated) or 3 (rnn).


@triton.jit
def hoist_rows(
    program, programs, mixer, head, hidden_ptr, rows, num_drafts, hidden_size, stride_hr, stride_hk,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """The products with h for rows (request, position), shared out over `programs`."""
    weight_ptr, bias_ptr, stride_w, hidden_column, _, hoisted_ptr, _, _, _, _ = mixer
    outputs = PARTS * head[6]
    tiles = tl.cdiv(outputs, BLOCK_N)
    for item in range(program, tiles * tl.cdiv(rows, DOT_ROWS), programs):
        n = item % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row = item // tiles * DOT_ROWS + tl.arange(0, DOT_ROWS)
        starts = (row // num_drafts).to(tl.int64) * stride_hr + (row % num_drafts).to(tl.int64) * stride_hk
        weight_rows = weight_ptr + n.to(tl.int64)[:, None] * stride_w + hidden_column
        total = tl.zeros([BLOCK_N, DOT_ROWS], tl.float32)
        for first in range(0, hidden_size, BLOCK_H):
            i = first + tl.arange(0, BLOCK_H)
            there = i < hidden_size
            weight = tl.load(weight_rows + i[None, :], mask=(n < outputs)[:, None] & there[None, :], other=0.0)
            h = tl.load(hidden_ptr + starts[None, :] + i[:, None], mask=there[:, None] & (row < rows)[None, :], other=0.0)
            total = tl.dot(weight.to(MIX_TYPE), h.to(MIX_TYPE), total, input_precision="ieee")
        total += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
        at = hoisted_ptr + row.to(tl.int64)[None, :] * outputs + n[:, None]
        tl.store(at, total, mask=(n < outputs)[:, None] & (row < rows)[None, :])


@triton.jit
def hoist(
    mixer, head, hidden_ptr, slots_ptr, num_requests, num_slots, num_drafts, hidden_size, first_draft, stride_hr, stride_hk,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """The products with h for all positions, and the state before the first: carried from earlier drafts, else 0."""
    _, _, _, _, _, _, _, state_ptr, carried_ptr, stride_c = mixer
    _, _, _, _, _, _, rank = head
    program, programs = tl.program_id(0), tl.num_programs(0)
    hoist_rows(
        program, programs, mixer, head, hidden_ptr, num_requests * num_drafts, num_drafts, hidden_size, stride_hr, stride_hk,
        PARTS, BLOCK_N, BLOCK_H, MIX_TYPE,
    )  # fmt: skip
    if state_ptr is not None:
        for request in range(program, num_requests, programs):
            slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
            carried = tl.where((slot >= 0) & (first_draft > 0), rank, 0)  # how much of a state there is to take over
            for first in range(0, rank, BLOCK_N):
                j = first + tl.arange(0, BLOCK_N)
                state = tl.zeros([BLOCK_N], tl.float32)
                if carried_ptr is not None:
                    state = tl.load(carried_ptr + slot * stride_c + j, mask=j < carried, other=0.0)
                tl.store(state_ptr + tl.cast(request, tl.int64) * rank + j, state, mask=j < rank)


@triton.jit
def keep_state(mixer, head, slots_ptr, num_requests, num_slots, num_drafts, BLOCK: tl.constexpr):
    """The states after the last draft, to the caller's [S, r]."""
    _, _, _, _, _, _, _, state_ptr, carried_ptr, stride_c = mixer
    _, _, _, _, _, _, rank = head
    if carried_ptr is not None:
        for request in range(tl.program_id(0), num_requests, tl.num_programs(0)):
            slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
            there = tl.where(slot >= 0, rank, 0)
            last_ptr = state_ptr + (tl.cast(num_drafts % 2, tl.int64) * num_requests + request) * rank
            for first in range(0, rank, BLOCK):
                j = first + tl.arange(0, BLOCK)
                state = tl.load(last_ptr + j, mask=j < there, other=0.0, volatile=True)
                tl.store(carried_ptr + slot * stride_c + j, state, mask=j < there)


@triton.jit
def _mixed(
    part: tl.constexpr, mixer, head, j, live, previous, known, row, state_row,
    PARTS: tl.constexpr, BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """Outputs j of one part, the product with h included: fp32 [BLOCK_J, DOT_ROWS]. row, state_row int64 [DOT_ROWS]: of the
    hoisted products, and of the state before (-1: it is 0)."""
    weight_ptr, _, stride_w, _, w1_column, hoisted_ptr, _, state_ptr, _, _ = mixer
    w1_ptr, _, _, stride_1v, _, _, rank = head
    at = hoisted_ptr + row[None, :] * (PARTS * rank) + (part * rank + j)[:, None]
    total = tl.load(at, mask=(j < rank)[:, None] & live[None, :], other=0.0, volatile=True)
    weight_rows = weight_ptr + (part * rank + j).to(tl.int64)[:, None] * stride_w
    for first in range(0, rank, BLOCK_S):
        i = first + tl.arange(0, BLOCK_S)
        weight = tl.load(weight_rows + (w1_column + i)[None, :], mask=(j < rank)[:, None] & (i < rank)[None, :], other=0.0)
        latent = _latent_block(w1_ptr, previous * stride_1v, known, rank, first, BLOCK_S)
        total = tl.dot(weight.to(MIX_TYPE), latent.to(MIX_TYPE), total, input_precision="ieee")
    if state_ptr is not None:
        # The state is fp32 and stays so: a rounded one would drift along the block.
        for first in range(0, rank, BLOCK_S):
            i = first + tl.arange(0, BLOCK_S)
            weight = tl.load(weight_rows + i[None, :], mask=(j < rank)[:, None] & (i < rank)[None, :], other=0.0)
            inside = (i < rank)[:, None] & (live & (state_row >= 0))[None, :]
            state = tl.load(state_ptr + state_row[None, :] * rank + i[:, None], mask=inside, other=0.0, volatile=True)
            total = tl.dot(weight.to(tl.float32), state, total, input_precision="ieee")
    return total


@triton.jit
def gated_rows(mixer, head, j, live, previous, known, row, state_row, next_row, BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr):
    """Latents j of DOT_ROWS rows, fp32 [BLOCK_J, DOT_ROWS]."""
    w1_ptr, _, _, stride_1v, _, _, rank = head
    z = _mixed(0, mixer, head, j, live, previous, known, row, state_row, 1, BLOCK_S, MIX_TYPE)
    inside = (j < rank)[:, None] & known[None, :]
    embedding = tl.load(w1_ptr + j[:, None] + (previous * stride_1v)[None, :], mask=inside, other=0.0)
    return sigmoid(z) * embedding.to(tl.float32)


@triton.jit
def rnn_rows(mixer, head, j, live, previous, known, row, state_row, next_row, BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr):
    """The same, and the next state to next_row: other programs are reading state_row."""
    state_ptr = mixer[7]
    rank = head[6]
    z = _mixed(0, mixer, head, j, live, previous, known, row, state_row, 3, BLOCK_S, MIX_TYPE)
    gate = sigmoid(z)
    z = _mixed(1, mixer, head, j, live, previous, known, row, state_row, 3, BLOCK_S, MIX_TYPE)
    inside = (j < rank)[:, None] & live[None, :]
    before = state_ptr + state_row[None, :] * rank + j[:, None]
    state = tl.load(before, mask=inside & (state_row >= 0)[None, :], other=0.0, volatile=True)
    state = gate * state + (1.0 - gate) * tanh(z)
    tl.store(state_ptr + next_row[None, :] * rank + j[:, None], state, mask=inside)
    z = _mixed(2, mixer, head, j, live, previous, known, row, state_row, 3, BLOCK_S, MIX_TYPE)
    return tanh(z)


@triton.jit
def gated_latent(
    mixer, head, j, requests, live, previous, known, k, num_requests, num_drafts,
    BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """Latents of position k of a block."""
    row = requests.to(tl.int64) * num_drafts + k
    return gated_rows(mixer, head, j, live, previous, known, row, row, row, BLOCK_S, MIX_TYPE)


@triton.jit
def rnn_latent(
    mixer, head, j, requests, live, previous, known, k, num_requests, num_drafts,
    BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """The same; the states of k and k + 1 are in two buffers that take turns."""
    row = requests.to(tl.int64) * num_drafts + k
    state_row = (k % 2).to(tl.int64) * num_requests + requests
    next_row = ((k + 1) % 2).to(tl.int64) * num_requests + requests
    return rnn_rows(mixer, head, j, live, previous, known, row, state_row, next_row, BLOCK_S, MIX_TYPE)
