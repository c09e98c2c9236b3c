"""Stored weights, keys and values to the type they are computed in. fp8 comes as bytes: not every compiler takes e4m3 pointers."""

import triton
import triton.language as tl


@triton.jit
def as_stored(x, dtype: tl.constexpr):
    """What is in the type already."""
    return x


@triton.jit
def by_cast(x, dtype: tl.constexpr):
    """Floats and int8; int8 is exact in bf16 and fp16, too."""
    return x.to(dtype)


@triton.jit
def fp8_by_cast(x, dtype: tl.constexpr):
    """e4m3 bytes to `dtype` where the GPU has the cast."""
    return x.to(tl.float8e4nv, bitcast=True).to(dtype)


@triton.jit
def fp8_by_bits(x, dtype: tl.constexpr):
    """e4m3 bytes to `dtype` anywhere: the same bits are an fp16 number 2^8 times smaller, subnormals too."""
    half = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((x & 0x7F) == 0x7F, float("nan"), value).to(dtype)
