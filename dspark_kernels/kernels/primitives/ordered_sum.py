"""A sum of floats whose bits depend on nothing but the floats: not on the tile's layout, the number of warps or the launch.

`tl.sum` adds in the order in which the compiler spreads a tile over threads. Here every addition is of two numbers that are named: halves of
octets, octets of octets, and at last a pair, whose order does not matter.
"""

import triton
import triton.language as tl

from .mass import octet_sums

SUMMED = tl.constexpr(1024)


@triton.jit
def ordered_sum(x):
    """Sum of fp32 [SUMMED]."""
    return tl.sum(octet_sums(octet_sums(octet_sums(x, SUMMED // 8), SUMMED // 64), SUMMED // 512), axis=0)
