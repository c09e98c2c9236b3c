"""Sequential heads on the candidates of one request: the latent that position k multiplies with its rows of W2.

    vanilla: W1[x];  gated: sigmoid(G [h; W1[x]] + b) * W1[x];
    rnn: (gate, candidate, output) = chunks of J [s; W1[x]; h] + b, s' = sig(gate) s + (1 - sig(gate)) tanh(candidate), tanh(output)

The products with h are made for all positions at once (`hidden_products`), the rest follows the drafts. Symbols: x = the previous
token, r = rank, O = r (gated) or 3 r (rnn) outputs, s = state, zero at first. Reference: reference/heads.py. Source: DSpark, arXiv
2607.05147.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from ..primitives.activations import sigmoid, tanh
from ..primitives.constants import DOT_ROWS
from ..primitives.ordered_sum import ordered_sum
from ..primitives.slots import state_slots
from ..primitives.widen import fp8_by_bits

PAIRS = tl.constexpr(16)  # (request, position) pairs that share one product with hidden states
LINES = tl.constexpr(4)  # of 128 bytes that one turn of a prefetch asks for, in each row


@triton.jit
def _values(stored):
    """Weights in a type whose values they have; bytes are e4m3."""
    if stored.dtype == tl.uint8:
        value = fp8_by_bits(stored, tl.bfloat16)
    elif stored.dtype == tl.int8:
        value = stored.to(tl.bfloat16)
    else:
        value = stored
    return value


@triton.jit
def _in_rows(x_ptr, i, known):
    """Elements i of x, of which `known` are there, as rows of bf16 [ROWS, N] whose sum they are: one of bf16, three of fp32."""
    row = tl.arange(0, DOT_ROWS)[:, None]
    if x_ptr.dtype.element_ty == tl.bfloat16:
        rows = tl.load(x_ptr + i[None, :] + row * 0, mask=i[None, :] < tl.where(row == 0, known, 0), other=0.0)
    else:
        x = tl.load(x_ptr + i, mask=i < known, other=0.0).to(tl.float32)
        high = x.to(tl.bfloat16)
        x -= high.to(tl.float32)
        middle = x.to(tl.bfloat16)
        low = (x - middle.to(tl.float32)).to(tl.bfloat16)
        rows = tl.where(row == 0, high[None, :], tl.where(row == 1, middle[None, :], low[None, :]))
        rows = tl.where(row < 3, rows, 0.0).to(tl.bfloat16)
    return rows


@triton.jit
def exact_dot(total, a, b):
    """total + a @ b with the products of fp32, all by dots of bf16: a factor is the sum of as many bf16 as its type needs."""
    a_parts: tl.constexpr = 3 if a.dtype == tl.float32 else 2 if a.dtype == tl.float16 else 1
    b_parts: tl.constexpr = 3 if b.dtype == tl.float32 else 2 if b.dtype == tl.float16 else 1
    for i in tl.static_range(a_parts):
        part = a.to(tl.bfloat16)
        if i + 1 < a_parts:
            a = a.to(tl.float32) - part.to(tl.float32)
        rest = b
        for j in tl.static_range(b_parts):
            other = rest.to(tl.bfloat16)
            if j + 1 < b_parts:
                rest = rest.to(tl.float32) - other.to(tl.float32)
            total = tl.dot(part, other, total)
    return total


@triton.jit
def _product(total, weight_ptr, rows, there, first_column, begin, size, x_ptr, known, BLOCK: tl.constexpr):
    """total [ROWS, M] + x . weight by rows, from element `begin` on. rows: offsets [M] of rows of weights that are `there`; x
    [size], of which `known` elements are there. One form: dots of [ROWS, BLOCK] by [BLOCK, M], since Blackwell's compiler fails on
    one with few columns."""
    for first in range(begin, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = (i < size)[:, None] & there[None, :]
        w = tl.load(weight_ptr + rows[None, :] + (first_column + i)[:, None], mask=inside, other=0)
        total = exact_dot(total, _in_rows(x_ptr, i, known), _values(w))
    return total


@triton.jit
def weighted_rows(rows, scales, latent_ptr, known, head, BLOCK_R: tl.constexpr, MORE_RANKS: tl.constexpr):
    """fp32 [WIDTH]: rows of W2 . latent. rows, scales: offsets of each row and of its scale; known: ranks of the latent that there
    are. The first BLOCK_R ranks stand outside of a loop: in one over positions their loads are a position ahead."""
    i = tl.arange(0, BLOCK_R)
    w = tl.load(head.w2_ptr + rows[None, :] + i[:, None], mask=i[:, None] < head.rank, other=0)
    total = tl.zeros([DOT_ROWS, rows.shape[0]], tl.float32)
    total = exact_dot(total, _in_rows(latent_ptr, i, known), _values(w))
    if MORE_RANKS:
        total = _product(total, head.w2_ptr, rows, rows >= 0, 0, BLOCK_R, head.rank, latent_ptr, known, BLOCK_R)
    bias = tl.sum(total, axis=0)
    if head.scale_ptr is not None:
        bias = bias * tl.load(head.scale_ptr + scales)
    return bias


@triton.jit
def weighted(ids, latent_ptr, known, head, BLOCK_R: tl.constexpr):
    """fp32 [WIDTH]: W2[ids] . latent; something else where an id is -1."""
    own = tl.maximum(ids, 0)
    return weighted_rows(own.to(tl.int64) * head.stride_w2, own, latent_ptr, known, head, BLOCK_R, True)


@triton.jit
def prefetch_rows(table_ptr, stride, ids, size):
    """Have the first `size` elements of these rows (id -1 = none) brought to L2, where an instruction for that is known."""
    if is_cuda():
        LINE: tl.constexpr = 1024 // table_ptr.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
        for first in range(0, size, LINES * LINE):
            i = first + tl.arange(0, LINES) * LINE
            address = (table_ptr + ids.to(tl.int64)[:, None] * stride + i[None, :]).to(tl.int64)
            there = ((ids >= 0)[:, None] & (i < size)[None, :]).to(tl.int32)
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, $2; }",
                "=r,l,r", [address, there], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def hidden_products(pairs, requests, slots, block, latent, hidden, products_ptr, num_drafts, BLOCK_H: tl.constexpr):
    """16 outputs of (weight . h + bias) for 16 (request, position) pairs. One form whatever the batch: dots of [16, BLOCK_H] by
    [BLOCK_H, 16]."""
    o = block * 16 + tl.arange(0, 16)
    i = tl.arange(0, BLOCK_H)
    at = requests.to(tl.int64) * hidden.stride_request + (pairs % num_drafts).to(tl.int64) * hidden.stride_position
    total = tl.zeros([16, pairs.shape[0]], tl.float32)
    for first in range(0, hidden.size, BLOCK_H):
        there = first + i < hidden.size
        w = tl.load(
            latent.weight_ptr + o.to(tl.int64)[:, None] * latent.stride_weight + latent.hidden_column + first + i[None, :],
            mask=(o < latent.outputs)[:, None] & there[None, :],
            other=0.0,
        )
        h = tl.load(hidden.ptr + at[None, :] + first + i[:, None], mask=(slots >= 0)[None, :] & there[:, None], other=0.0)
        total = exact_dot(total, w, h)
    total += tl.load(latent.bias_ptr + o, mask=o < latent.outputs, other=0.0).to(tl.float32)[:, None]
    where = products_ptr + pairs.to(tl.int64)[None, :] * latent.outputs + o[:, None]
    tl.store(where, total, mask=(slots >= 0)[None, :] & (o < latent.outputs)[:, None])


@triton.jit
def latent_item(program, slots_ptr, latent, hidden, products_ptr, num_requests, num_slots, num_drafts, BLOCK_J: tl.constexpr):
    """The products with hidden states that are this program's; returns the first request they are for, and how many requests."""
    outputs = tl.cdiv(latent.outputs, 16)
    pairs = program // outputs * PAIRS + tl.arange(0, PAIRS)
    requests = pairs // num_drafts
    slots = state_slots(slots_ptr, requests, num_requests, num_slots)
    hidden_products(pairs, requests, slots, program % outputs, latent, hidden, products_ptr, num_drafts, BLOCK_J)
    first = program // outputs * PAIRS // num_drafts
    count = tl.minimum((program // outputs * PAIRS + PAIRS - 1) // num_drafts, num_requests - 1) - first + 1
    return first, count


@triton.jit
def awaited(request, latent, num_drafts):
    """How many programs a request's walk waits for: its rows, and those that multiply its hidden states."""
    total = num_drafts
    if latent is not None:
        tiles = (request * num_drafts + num_drafts - 1) // PAIRS - request * num_drafts // PAIRS + 1
        total += tiles * tl.cdiv(latent.outputs, 16)
    return total


@triton.jit
def latent_items_of(latent, num_rows):
    """`latent_programs`, of a kernel."""
    items = tl.zeros((), tl.int32)
    if latent is not None:
        items = tl.cdiv(num_rows, PAIRS) * tl.cdiv(latent.outputs, 16)
    return items


def latent_programs(rows, outputs):
    """How many programs multiply `outputs` weights with the hidden states of `rows` positions."""
    return -(-rows // PAIRS.value) * -(-outputs // 16)


@triton.jit
def hidden_score(request, k, hidden, weight_ptr):
    """The confidence head's product with the hidden state of one position."""
    BLOCK: tl.constexpr = 1024
    hidden_ptr = hidden.ptr + request.to(tl.int64) * hidden.stride_request + tl.cast(k, tl.int64) * hidden.stride_position
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, hidden.size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + i, mask=i < hidden.size, other=0.0).to(tl.float32)
        total += h * tl.load(weight_ptr + i, mask=i < hidden.size, other=0.0).to(tl.float32)
    return ordered_sum(total)


@triton.jit
def no_latent(
    turn, embedded_ptr, known, latent, hidden, products_ptr, latent_ptr, states_ptr, rank,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    pass


@triton.jit
def advance_gated(
    turn, embedded_ptr, known, latent, hidden, products_ptr, latent_ptr, states_ptr, rank,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """latent [r] = sigmoid(G [h; W1[x]] + b) * W1[x]."""
    tl.debug_barrier()  # the latent of k - 1 has been read
    for first in range(0, rank, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        total = tl.zeros([DOT_ROWS, BLOCK_O], tl.float32)
        rows = o.to(tl.int64) * latent.stride_weight
        total = _product(total, latent.weight_ptr, rows, o < rank, hidden.size, 0, rank, embedded_ptr, known, BLOCK_J)
        z = tl.sum(total, axis=0) + tl.load(products_ptr + o, mask=o < rank, other=0.0, volatile=True)
        e = tl.load(embedded_ptr + o, mask=o < known, other=0.0).to(tl.float32)
        tl.store(latent_ptr + o, (sigmoid(z) * e).to(latent_ptr.dtype.element_ty), mask=o < rank)
    tl.debug_barrier()


@triton.jit
def advance_rnn(
    turn, embedded_ptr, known, latent, hidden, products_ptr, latent_ptr, states_ptr, rank,
    BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """latent [r] = tanh(output). The states of k - 1 and k take turns in two rows of r."""
    old_ptr = states_ptr + (turn.k % 2) * rank
    tl.debug_barrier()
    if turn.k == 0:
        for first in range(0, rank, BLOCK_O):
            o = first + tl.arange(0, BLOCK_O)
            state = tl.zeros([BLOCK_O], tl.float32)
            if latent.carried_ptr is not None:
                state = tl.load(
                    latent.carried_ptr + turn.slot * latent.stride_carried + o,
                    mask=o < tl.where(turn.first_draft > 0, rank, 0),
                    other=0.0,
                )
            tl.store(old_ptr + o, state, mask=o < rank)
        tl.debug_barrier()
    for first in range(0, rank, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        old = tl.load(old_ptr + o, mask=o < rank, other=0.0)
        gate = old
        for part in range(3):  # gate, candidate, output
            total = tl.zeros([DOT_ROWS, BLOCK_O], tl.float32)
            rows = (part * rank + o).to(tl.int64) * latent.stride_weight
            total = _product(total, latent.weight_ptr, rows, o < rank, 0, 0, rank, old_ptr, rank, BLOCK_J)
            total = _product(total, latent.weight_ptr, rows, o < rank, rank, 0, rank, embedded_ptr, known, BLOCK_J)
            z = tl.sum(total, axis=0) + tl.load(products_ptr + part * rank + o, mask=o < rank, other=0.0, volatile=True)
            if part == 0:
                gate = sigmoid(z)
            elif part == 1:
                state = gate * old + (1.0 - gate) * tanh(z)
                tl.store(states_ptr + (1 - turn.k % 2) * rank + o, state, mask=o < rank)
                if latent.carried_ptr is not None:
                    tl.store(
                        latent.carried_ptr + turn.slot * latent.stride_carried + o,
                        state,
                        mask=o < tl.where(turn.k == turn.num_drafts - 1, rank, 0),
                    )
            else:
                tl.store(latent_ptr + o, tanh(z).to(latent_ptr.dtype.element_ty), mask=o < rank)
    tl.debug_barrier()
