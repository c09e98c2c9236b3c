"""Sums of exponentials that do not depend on how the vocabulary is cut: fixed octets in fp32, everything above in int64.

sum of exponentials = sum over octets of trunc(2^40 * octet), octet = ((e0+e1)+(e2+e3)) + ((e4+e5)+(e6+e7)), e = exp2((logit - max)
* scale). Integer sums commute, so chunks, programs, phases and shards give the same bits. An octet is 8 neighbouring ids from a
multiple of 8."""

import triton
import triton.language as tl

from .constants import NEG_INF, POS_INF


@triton.jit
def octet_sums(e, COUNT: tl.constexpr):
    """[COUNT, 8] (any shape with COUNT * 8 elements) -> [COUNT] in the fixed association."""
    a, b = tl.split(tl.reshape(e, [COUNT, 4, 2]))
    a, b = tl.split(tl.reshape(a + b, [COUNT, 2, 2]))
    a, b = tl.split(a + b)
    return a + b


@triton.jit
def fixed_sums(e, SUB_BLOCKS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr):
    """fp32 [UNITS * WIDTH] elements -> int64 [UNITS], WIDTH a multiple of 8."""
    fixed = (octet_sums(e, SUB_BLOCKS * WIDTH // 8) * SCALE).to(tl.int64)
    return tl.sum(tl.reshape(fixed, [SUB_BLOCKS, WIDTH // 8]), axis=1)


@triton.jit
def below_max(x, top):
    """x - top with top = -inf read as 0 and top = +inf giving 0 (the caller treats such a row apart): never NaN."""
    safe = tl.where((top == NEG_INF) | (top == POS_INF), 0.0, top)
    return tl.where(top == POS_INF, 0.0, x - safe)


@triton.jit
def numbers(x):
    """NaN read as -inf."""
    return tl.where(x == x, x, NEG_INF)


@triton.jit
def log2_scale(temperature):
    """log2(e) / temperature, bounded so that 0 * scale stays 0; greedy rows (temperature not > 0) get log2(e)."""
    return 1.4426950408889634 * tl.minimum(1.0 / tl.where(temperature > 0.0, temperature, 1.0), 1e30)
