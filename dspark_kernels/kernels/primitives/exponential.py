"""log2 of an Exp(1) variate with two hardware logarithms, for noise that is drawn for every id of a vocabulary.

E = -ln(1 - v), v = min((word + 1/2) 2^-32, 1 - 2^-24):  v * p(v) for v < 1/2, else -ln 2 * log2(1 - v);
log2 E = e + log2 m,  E = m * 2^e,  m in [0.707, 1.415)

`lg2.approx` is off by 2^-22 at most between 1/2 and 2, and by 2^-22 of its result elsewhere (PTX ISA): hence m apart from e, and a
polynomial where log2(1 - v) would be near 0. p, of degree 8, is off by 2.3e-8 of its value. So log2 E is off by 7.6e-7 and the
rounding of its sum, together 1.8e-6 at most, 1.2e-6 in natural units, where equality with the reference leaves a key 3.8e-6 (docs/
randomness.md). Reference: reference/philox.py.
"""

import triton
import triton.language as tl

from .constants import LN2


@triton.jit
def log2_approx(x):
    """NVIDIA's instruction; tl.log2 is a polynomial of 20 instructions there."""
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log2_of(x):
    """Elsewhere: AMD's compiler has an instruction for it, the interpreter is exact."""
    return tl.log2(x)


@triton.jit
def log2_exponential_fast(words, LOG2: tl.constexpr):
    """philox.log2_exponential of uint32 words. LOG2: log2_approx or log2_of."""
    signed = words.to(tl.int32, bitcast=True)
    nearer = tl.where(signed < 0, ~signed, signed)  # the word or its complement: v or 1 - v, whichever is below 1/2
    u = tl.fma(nearer.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    p = tl.fma(u, 1.4411062, -1.6958085)
    p = tl.fma(u, p, 1.2576671)
    p = tl.fma(u, p, -0.20353779)
    p = tl.fma(u, p, 0.2696125)
    p = tl.fma(u, p, 0.24280511)
    p = tl.fma(u, p, 0.33370063)
    p = tl.fma(u, p, 0.49999285)
    p = tl.fma(u, p, 1.0)
    exponential = tl.where(signed < 0, LOG2(tl.maximum(u, 5.9604644775390625e-08)) * -LN2, u * p)
    bits = exponential.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return exponent.to(tl.float32) + LOG2(mantissa)
