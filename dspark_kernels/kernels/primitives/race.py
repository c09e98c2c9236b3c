"""Arg-max by one integer word: (order-preserving bits of an fp32 key, inverted id), so that ties go to the lowest id.

The word is never negative and 0 is below every key, so that zeroed memory means "nobody yet" and an integer atomic maximum
merges any number of programs in any order to the same bits.
"""

import triton
import triton.language as tl

# Token 0 below every key (its own key unpacks as NaN): what an entry that stands for no token takes part with.


@triton.jit
def pack(key, ids):
    """int64 word of an fp32 key (not NaN) and an id in [0, 2^31)."""
    bits = (key + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 and 0.0 are one key
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return (ordered << 31) | (2147483647 - ids).to(tl.int64)


@triton.jit
def unpack_id(word):
    """int64 id of a word made by `pack`."""
    return 2147483647 - (word & 2147483647)


@triton.jit
def unpack_key(word):
    """fp32 key of a word made by `pack`."""
    ordered = ((word >> 31) - 2147483648).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def largest_word(words, SIZE: tl.constexpr):
    """The largest of int64 [SIZE], SIZE >= 16: each warp that of its own, and a gather brings what they leave to all warps. That
    takes two barriers, where `tl.max` of the whole takes three."""
    left = tl.max(tl.reshape(words, [SIZE // 16, 16]), axis=1)
    return tl.max(tl.gather(left, tl.arange(0, SIZE // 16), axis=0), axis=0)
