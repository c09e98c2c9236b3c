"""Random words addressed by meaning: Philox 4x32-10 with key = seed, counter = (lane >> 2, position, anchor, stream | node << 8).

The draw of a lane is output word lane & 3, so four neighbouring lanes share one Philox call. Symbols: lane = token id, block
index or 0; position = the sequence position being decided; node = slot of a draft tree, 0 in chains. Reference:
reference/philox.py. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import triton
import triton.language as tl

# Purpose of a word; the public names are dspark_kernels.types.Stream (a test keeps both equal).
DRAFT = tl.constexpr(1)
ACCEPT = tl.constexpr(2)
LEAF = tl.constexpr(3)
CORRECT = tl.constexpr(4)
COUPLED = tl.constexpr(5)
DRAFT_LEAF = tl.constexpr(6)


@triton.jit
def _four_words(seed, group, position, anchor, stream: tl.constexpr, node=0):
    # All counters as uint32 blocks of one shape: an int64 counter would select Philox 4x64.
    zero = (group * 0).to(tl.uint32)
    shape_seed = seed.to(tl.uint64) + zero.to(tl.uint64)
    return tl.philox(
        shape_seed,
        group.to(tl.uint32),
        zero + position.to(tl.uint32),
        zero + anchor.to(tl.uint32),
        zero + stream + (zero + node << 8),
    )


@triton.jit
def lane_words(seed, first_lane, position, anchor, stream: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, node=0):
    """Words of lanes first_lane .. first_lane + LANES - 1 (first_lane a multiple of 4) for each row: uint32 [ROWS, LANES].

    seed, position, anchor, first_lane, node: [ROWS, 1].
    """
    group = (first_lane >> 2) + tl.arange(0, LANES // 4)[None, :] + tl.zeros([ROWS, LANES // 4], tl.int32)
    w0, w1, w2, w3 = _four_words(seed, group, position, anchor, stream, node)
    even = tl.join(w0, w2)  # [ROWS, LANES/4, 2]: words 0 and 2
    odd = tl.join(w1, w3)
    return tl.reshape(tl.join(even, odd), [ROWS, LANES])  # index 4g + 2a + b = word 2a + b of group g


@triton.jit
def words_at(seed, lanes, position, anchor, stream: tl.constexpr, node=0):
    """Words of any lanes, one Philox call each: uint32 of the common shape of lanes and seed, position, anchor."""
    w0, w1, w2, w3 = _four_words(seed, (lanes >> 2) + tl.zeros_like(seed).to(lanes.dtype), position, anchor, stream, node)
    which = lanes & 3
    return tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))


@triton.jit
def acceptance_words(seed, position, anchor, stream: tl.constexpr, node=0):
    """The word of lane 0 for each position of a block: of the acceptance uniforms."""
    words = _four_words(seed, (position * 0).to(tl.int32), position, anchor, stream, node)
    return words[0]


@triton.jit
def uniform(words):
    """(word + 1/2) * 2^-32 in (0, 1 - 2^-24]."""
    return tl.minimum(words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994)


@triton.jit
def log2_exponential(words):
    """log2 of an Exp(1) variate E = -log1p(-v), v = uniform(word), to fp32 accuracy over the whole range.

    Near 0, where winners live, by polynomial; above 1/2 from the complement word, because 1 - v is not exact in fp32.
    """
    v = uniform(words)
    complement = (words ^ 4294967295).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    rest = tl.where(v < 0.5, 1.0 - v, tl.maximum(complement, 5.9604644775390625e-08))
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * (0.25 + v * (0.2 + v * (0.16666667 + v * 0.14285714))))))
    return tl.log2(tl.where(v < 0.0625, series, -tl.log(rest)))
