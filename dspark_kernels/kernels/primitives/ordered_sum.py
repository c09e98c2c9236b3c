"""A sum of floats whose bits depend on nothing but the floats: not on the tile's layout, the number of warps or the launch.

`tl.sum` adds floats in the order in which the compiler spreads a tile over threads. Integers may be added in any order, so the
terms become integers first: 2^40 for the power of two at or below the largest one.
"""

import triton
import triton.language as tl

from .constants import SUMEXP_ONE


@triton.jit
def ordered_sum(x):
    """Sum of an fp32 vector, rounded once; of one that is not finite, or whose sum is not, what `tl.sum` says."""
    plain = tl.sum(x, axis=0)
    exponent = tl.max(tl.abs(x), axis=0).to(tl.int32, bitcast=True) >> 23  # 127 for 1.0
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)  # powers of two: products with them are exact
    up = (exponent << 23).to(tl.float32, bitcast=True)
    total = tl.sum((x * down * SUMEXP_ONE).to(tl.int64), axis=0)
    exact = total.to(tl.float32) * (1.0 / SUMEXP_ONE) * up
    return tl.where(tl.abs(plain) < float("inf"), exact, plain)
