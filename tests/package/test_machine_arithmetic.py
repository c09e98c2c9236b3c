"""The machine's arithmetic, instruction by instruction: PTX written here against what the PTX ISA says, computed by numpy.

Needs g++, not Triton.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from tests.package.instructions import (
    THREADS,
    address,
    apply,
    bf16_of,
    float_pair,
    floats,
    integers,
    of_bf16,
    pair,
    run,
    same,
    wrapped,
)

# --- integers -----------------------------------------------------------------------------------------------------------

INTEGERS = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}


def _quotient(a, b, all_ones):
    return all_ones if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
    "div": lambda a, b: _quotient(a, b, -1), "rem": lambda a, b: a if b == 0 else a - b * _quotient(a, b, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name", BINARY)
def test_integer_arithmetic(name, kind):
    """Division by zero gives all ones (and the dividend as remainder), as GPUs do; the ISA leaves it open."""
    a, b = pair(INTEGERS[kind])
    expected = wrapped([BINARY[name](int(x), int(y)) for x, y in zip(a, b, strict=True)], a.dtype)
    same(apply(f"{name}.{kind}", a.dtype, a, b), expected)


@pytest.mark.parametrize("kind", INTEGERS)
def test_products(kind):
    a, b = pair(INTEGERS[kind])
    bits = 8 * a.itemsize
    exact = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    same(apply(f"mul.hi.{kind}", a.dtype, a, b), wrapped([x >> bits for x in exact], a.dtype))
    c = integers(a.dtype, 5)
    same(apply(f"mad.lo.{kind}", a.dtype, a, b, c), wrapped([x + int(y) for x, y in zip(exact, c, strict=True)], a.dtype))
    if bits == 64:
        return
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    c = integers(wide, 5)
    same(apply(f"mul.wide.{kind}", wide, a, b), wrapped(exact, wide))
    same(apply(f"mad.wide.{kind}", wide, a, b, c), wrapped([x + int(y) for x, y in zip(exact, c, strict=True)], wide))
    if bits == 32:
        c = integers(a.dtype, 5)
        same(
            apply(f"mad.hi.{kind}", a.dtype, a, b, c),
            wrapped([(x >> bits) + int(y) for x, y in zip(exact, c, strict=True)], a.dtype),
        )
        sad = [abs(int(x) - int(y)) + int(z) for x, y, z in zip(a, b, c, strict=True)]
        same(apply(f"sad.{kind}", np.uint32, a, b, c), wrapped(sad, np.uint32))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits):
    a, b = pair(np.dtype(f"u{bits // 8}"))
    same(apply(f"and.b{bits}", a.dtype, a, b), a & b)
    same(apply(f"or.b{bits}", a.dtype, a, b), a | b)
    same(apply(f"xor.b{bits}", a.dtype, a, b), a ^ b)
    same(apply(f"not.b{bits}", a.dtype, a), ~a)
    same(apply(f"cnot.b{bits}", a.dtype, a), (a == 0).astype(a.dtype))
    signed = a.view(f"i{bits // 8}")
    same(apply(f"neg.s{bits}", signed.dtype, signed), wrapped([-int(x) for x in signed], signed.dtype))
    same(apply(f"abs.s{bits}", signed.dtype, signed), wrapped([abs(int(x)) for x in signed], signed.dtype))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_by_the_width_and_more(bits):
    a = integers(np.dtype(f"u{bits // 8}"))
    by = np.resize(np.array([0, 1, 7, bits - 1, bits, bits + 1, 255, 256, 1 << 31, 0xFFFFFFFF], np.uint32), THREADS)
    a = np.repeat(a, 10)[:THREADS]
    signed = a.view(f"i{bits // 8}")
    left = wrapped([int(x) << int(s) if s < bits else 0 for x, s in zip(a, by, strict=True)], a.dtype)
    same(apply(f"shl.b{bits}", a.dtype, a, by), left)
    same(
        apply(f"shr.u{bits}", a.dtype, a, by),
        wrapped([int(x) >> int(s) if s < bits else 0 for x, s in zip(a, by, strict=True)], a.dtype),
    )
    same(
        apply(f"shr.s{bits}", signed.dtype, signed, by),
        wrapped([int(x) >> min(int(s), bits - 1) for x, s in zip(signed, by, strict=True)], signed.dtype),
    )


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_bits(bits):
    a = integers(np.dtype(f"u{bits // 8}"))
    texts = [f"{int(x):0{bits}b}" for x in a]
    same(apply(f"popc.b{bits}", np.uint32, a), np.array([t.count("1") for t in texts], np.uint32))
    leading = [len(t) - len(t.lstrip("0")) for t in texts]
    same(apply(f"clz.b{bits}", np.uint32, a), np.array(leading, np.uint32))
    same(apply(f"brev.b{bits}", a.dtype, a), np.array([int(t[::-1], 2) for t in texts], a.dtype))
    same(apply(f"bfind.u{bits}", np.uint32, a), wrapped([bits - 1 - n for n in leading], np.uint32))  # none: 0xffffffff
    signed = [int(t, 2) if t[0] == "0" else (1 << bits) - 1 - int(t, 2) for t in texts]
    same(apply(f"bfind.s{bits}", np.uint32, a), wrapped([x.bit_length() - 1 for x in signed], np.uint32))
    if bits == 32:
        same(apply("bfind.shiftamt.u32", np.uint32, a), wrapped([n if n < 32 else -1 for n in leading], np.uint32))


def _bit_fields():
    edges = np.array([0, 1, 8, 16, 31, 32, 33, 63, 64, 65, 200, 255, 256 + 3, 0xFFFFFF05], np.uint32)
    n = len(edges)
    return np.repeat(edges, n)[:THREADS], np.tile(edges, n)[:THREADS]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_extracting_bits(bits, signed):
    position, length = _bit_fields()
    a = integers(np.dtype(f"{'i' if signed else 'u'}{bits // 8}"))[: len(position)]

    def extract(x, pos, size):
        pos, size, x = int(pos) & 255, int(size) & 255, int(x) & ((1 << bits) - 1)
        sign = x >> min(pos + size - 1, bits - 1) & 1 if signed and size else 0
        return sum((x >> (pos + i) & 1 if i < size and pos + i < bits else sign) << i for i in range(bits))

    expected = wrapped([extract(*row) for row in zip(a, position, length, strict=True)], a.dtype)
    same(apply(f"bfe.{'s' if signed else 'u'}{bits}", a.dtype, a, position, length), expected)


@pytest.mark.parametrize("bits", [32, 64])
def test_inserting_bits(bits):
    position, length = _bit_fields()
    a, b = (x[: len(position)] for x in pair(np.dtype(f"u{bits // 8}")))

    def insert(x, into, pos, size):
        pos, size = int(pos) & 255, int(size) & 255
        chosen = sum(1 << i for i in range(pos, min(pos + size, bits)))
        return (int(into) & ~chosen) | (int(x) << pos & chosen)

    same(
        apply(f"bfi.b{bits}", a.dtype, a, b, position, length),
        wrapped([insert(*row) for row in zip(a, b, position, length, strict=True)], a.dtype),
    )


def test_permuting_bytes():
    a, b = pair(np.uint32)
    selectors = integers(np.uint32, 3)
    selectors[:4] = [0x3210, 0x7654, 0xFEDC, 0xBA98]

    def permute(x, y, s):
        data = struct.pack("<II", x, y)
        chosen = [(data[s >> 4 * i & 7], s >> 4 * i & 8) for i in range(4)]
        return int.from_bytes(bytes((255 if byte & 128 else 0) if sign else byte for byte, sign in chosen), "little")

    same(
        apply("prmt.b32", np.uint32, a, b, selectors),
        np.array([permute(int(x), int(y), int(s)) for x, y, s in zip(a, b, selectors, strict=True)], np.uint32),
    )


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x80, 0x1A, 0x96, 0xCA, 0xE8, 0x01])
def test_three_operand_logic(table):
    a, b = pair(np.uint32)
    c = integers(np.uint32, 3)
    expected = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            expected |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    same(apply("lop3.b32", np.uint32, a, b, c, extra=f", {table}"), expected)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("direction", ["l", "r"])
def test_funnel_shifts(mode, direction):
    a, b = pair(np.uint32)
    by = np.resize(np.array([0, 1, 16, 31, 32, 33, 63, 64, 0xFFFFFFFF], np.uint32), THREADS)

    def funnel(x, y, s):
        s = s & 31 if mode == "wrap" else min(s, 32)
        both = y << 32 | x
        return both << s >> 32 if direction == "l" else both >> s

    expected = wrapped([funnel(int(x), int(y), int(s)) for x, y, s in zip(a, b, by, strict=True)], np.uint32)
    same(apply(f"shf.{direction}.{mode}.b32", np.uint32, a, b, by), expected)


# --- floats -------------------------------------------------------------------------------------------------------------


def bits(array):
    return array.view(f"u{array.itemsize}")


def flushed(x):
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x).astype(np.float32)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_float_arithmetic(kind):
    a, b = float_pair(np.float32 if kind == "f32" else np.float64)
    with np.errstate(all="ignore"):
        for name, f in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("add.rn", np.add), ("div.rn", np.divide)):
            same(apply(f"{name}.{kind}", a.dtype, a, b), f(a, b))
        same(apply(f"rcp.rn.{kind}", a.dtype, a), (1 / a).astype(a.dtype))
        same(apply(f"sqrt.rn.{kind}", a.dtype, a), np.sqrt(a))
    same(bits(apply(f"neg.{kind}", a.dtype, a))[~np.isnan(a)], bits(-a)[~np.isnan(a)])
    same(apply(f"abs.{kind}", a.dtype, a), np.abs(a))


def test_fused_multiply_add_rounds_once():
    a, b = float_pair()
    c = floats(9)
    with np.errstate(all="ignore"):
        c[32:] = -(a[32:].astype(np.float64) * b[32:]).astype(np.float32)  # all but the rounding error cancels
        exact = a.astype(np.longdouble) * b + c  # 64 bits of mantissa hold the product; the sum's error is far below a float's
        same(apply("fma.rn.f32", np.float32, a, b, c), exact.astype(np.float32))


def test_flushing_subnormals():
    a, b = float_pair()
    a[200:210], b[200:210] = np.float32(1.5e-38), np.float32(-1.2e-38)
    a[210:220], b[210:220] = np.float32(1e-20), np.float32(1e-20)
    with np.errstate(all="ignore"):
        for name, f in (("add", np.add), ("sub", np.subtract), ("mul.rn", np.multiply)):
            same(apply(f"{name}.ftz.f32", np.float32, a, b), flushed(f(flushed(a), flushed(b))))
    got = apply("setp.gt.ftz.f32", bool, a, b)
    assert (got == (flushed(a) > flushed(b))).all()


def _extreme(a, b, largest, nan):
    chosen = np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.maximum(a, b) if largest else np.minimum(a, b)))
    zeros = (a == 0) & (b == 0)  # -0 is below +0
    sign = np.signbit(a) & np.signbit(b) if largest else np.signbit(a) | np.signbit(b)
    chosen = np.where(zeros, np.where(sign, -0.0, 0.0).astype(a.dtype), chosen)
    return np.where(np.isnan(a) | np.isnan(b), np.nan, chosen).astype(a.dtype) if nan else chosen


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("name", ["min", "max"])
def test_minimum_and_maximum_of_floats(name, nan):
    a, b = float_pair()
    opcode = f"{name}{'.NaN' if nan else ''}"
    expected = _extreme(a, b, name == "max", nan)
    same(apply(f"{opcode}.f32", np.float32, a, b), expected)
    half_a, half_b = float_pair(np.float16)
    same(apply(f"{opcode}.f16", np.float16, half_a, half_b), _extreme(half_a, half_b, name == "max", nan))
    brain_a, brain_b = bf16_of(a), bf16_of(b)
    got = of_bf16(apply(f"{opcode}.bf16", np.uint16, brain_a, brain_b))
    same(got, _extreme(of_bf16(brain_a), of_bf16(brain_b), name == "max", nan))


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_comparing_floats(kind, name):
    """Ordered comparisons are false with a NaN; those with a u are true."""
    a, b = float_pair({"f64": np.float64, "f16": np.float16}.get(kind, np.float32))
    given = (bf16_of(a), bf16_of(b)) if kind == "bf16" else (a, b)
    if kind == "bf16":
        a, b = of_bf16(given[0]), of_bf16(given[1])
    unordered = np.isnan(a) | np.isnan(b)
    plain = COMPARISONS[name](a, b)
    assert (apply(f"setp.{name}.{kind}", bool, *given) == (plain & ~unordered)).all()
    assert (apply(f"setp.{name}u.{kind}", bool, *given) == (plain | unordered)).all()
    assert (apply(f"setp.num.{kind}", bool, *given) == ~unordered).all()
    assert (apply(f"setp.nan.{kind}", bool, *given) == unordered).all()


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("kind", INTEGERS)
def test_comparing_integers(kind, name):
    a, b = pair(INTEGERS[kind])
    expected = COMPARISONS[name](a, b)
    assert (apply(f"setp.{name}.{kind}", bool, a, b) == expected).all()
    names = {"lt": "lo", "le": "ls", "gt": "hi", "ge": "hs"}
    if kind[0] == "u" and name in names:
        assert (apply(f"setp.{names[name]}.{kind}", bool, a, b) == expected).all()


def test_comparisons_combined():
    a, b = pair(np.int32)
    c = np.arange(THREADS) % 3 == 0
    assert (apply("setp.lt.and.s32", bool, a, b, c) == ((a < b) & c)).all()
    assert (apply("setp.lt.or.s32", bool, a, b, c) == ((a < b) | c)).all()
    assert (apply("setp.lt.xor.s32", bool, a, b, c) == ((a < b) ^ c)).all()


def test_comparing_pairs():
    a, b = float_pair()
    halves = [bf16_of(x) for x in (a, b)]
    packed = [x[::2].astype(np.uint32) | x[1::2].astype(np.uint32) << 16 for x in halves]
    out = np.zeros(THREADS // 2, np.uint32)
    body = "".join(address(x, i) + f"ld.global.b32 r{i}, [at];\n" for i, x in enumerate(packed))
    body += "setp.lt.bf16x2 p0|p1, r0, r1; selp.b32 r2, 1, 0, p0; selp.b32 r3, 2, 0, p1; or.b32 r2, r2, r3;\n"
    run(body + address(out, 2) + "st.global.b32 [at], r2;", *packed, out, threads=THREADS // 2)
    x, y = (of_bf16(h) for h in halves)
    same(out, ((x < y)[::2] + 2 * (x < y)[1::2]).astype(np.uint32))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_floats_of_16_bits(kind):
    a, b = float_pair()
    c = floats(7)
    if kind == "f16":
        narrow = lambda x: np.asarray(x, np.float32).astype(np.float16)  # noqa: E731
        wide = lambda x: x.astype(np.float32)  # noqa: E731
        result = np.float16
    else:
        narrow, wide, result = bf16_of, of_bf16, np.uint16
    with np.errstate(all="ignore"):
        x, y, z = narrow(a), narrow(b), narrow(c)
        for name, f in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            got = apply(f"{name}.{kind}", result, x, y)
            expected = narrow(f(wide(x), wide(y)))
            same(wide(got), wide(expected))
            halves = [bits(v)[::2].astype(np.uint32) | bits(v)[1::2].astype(np.uint32) << 16 for v in (x, y)]
            packed = apply(f"{name}.{kind}x2", np.uint32, *halves)
            unpacked = np.stack([packed & 0xFFFF, packed >> 16], 1).reshape(-1).astype(np.uint16).view(result)
            same(wide(unpacked), wide(expected))
        exact = wide(x).astype(np.longdouble) * wide(y) + wide(z)
        expected = exact.astype(np.float16) if kind == "f16" else bf16_of(_to_odd(exact))
        same(wide(apply(f"fma.rn.{kind}", result, x, y, z)), wide(expected))
    same(bits(apply(f"neg.{kind}", result, x)), bits(x) ^ 0x8000)
    same(bits(apply(f"abs.{kind}", result, x)), bits(x) & 0x7FFF)


def _to_odd(x):
    """To float32 by rounding to odd, so that a second rounding does no harm."""
    near = x.astype(np.float32)
    u = near.view(np.uint32).copy()
    inexact = np.isfinite(near) & (near.astype(np.longdouble) != x)
    u[inexact & (np.abs(near) > np.abs(x))] -= 1
    u[inexact] |= 1
    return u.view(np.float32)


@pytest.mark.parametrize(
    ("name", "f", "tolerance"),
    [
        ("ex2.approx", np.exp2, 1e-6), ("lg2.approx", np.log2, 1e-6), ("rcp.approx", lambda x: 1 / x, 1e-6),
        ("sqrt.approx", np.sqrt, 1e-6), ("rsqrt.approx", lambda x: 1 / np.sqrt(x), 1e-6), ("sin.approx", np.sin, 1e-5),
        ("cos.approx", np.cos, 1e-5), ("tanh.approx", np.tanh, 1e-5),
    ],
)  # fmt: skip
def test_approximations(name, f, tolerance):
    a = floats(3)
    if name[:3] in ("sin", "cos"):
        a = a[(np.abs(a) < 100) & (np.abs(a) > 1e-30)]
    with np.errstate(all="ignore"):
        expected = f(a.astype(np.float64)).astype(np.float32)
    got = apply(f"{name}.f32", np.float32, a)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=1e-37, equal_nan=True)


def test_selecting_and_copying_signs():
    a, b = pair(np.uint32)
    chosen = np.arange(THREADS) % 5 == 0
    same(apply("selp.b32", np.uint32, a, b, chosen), np.where(chosen, a, b))
    x, y = float_pair()
    signs = np.where(np.isnan(y), y, np.copysign(y, x))
    got = apply("copysign.f32", np.float32, x, y)
    same(got[~np.isnan(x)], signs[~np.isnan(x)])


def test_predicates():
    a, b = np.arange(THREADS) % 2 == 0, np.arange(THREADS) % 3 == 0
    for name, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        assert (apply(f"{name}.pred", bool, a, b) == f(a, b)).all()
    assert (apply("not.pred", bool, a) == ~a).all()


# --- conversions --------------------------------------------------------------------------------------------------------


def _rounded(x, how):
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how](x)


@pytest.mark.parametrize("how", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("kind", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_floats_to_integers_saturate(kind, how):
    a = floats()
    a[16:32] = [127.5, 128, -128.5, 255.5, 256, 32767.5, 65536, 2**31, -(2**31), 2**32, 2**63, -(2**63), 2**64, -0.5, 0.5, -1.5]
    bytes_ = int(kind[1:]) // 8
    lowest, highest = (-(1 << 8 * bytes_ - 1), (1 << 8 * bytes_ - 1) - 1) if kind[0] == "s" else (0, (1 << 8 * bytes_) - 1)

    def convert(x):
        if math.isnan(x):
            return 1 << 63 if bytes_ == 8 else 0
        x = _rounded(x, how)
        return lowest if x <= lowest else highest if x >= highest else int(x)

    result = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{max(2, bytes_)}")
    same(apply(f"cvt.{how}.{kind}.f32", result, a), wrapped([convert(float(x)) for x in a], result))


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_to_floats(kind):
    a = integers(INTEGERS[kind])
    same(apply(f"cvt.rn.f32.{kind}", np.float32, a), a.astype(np.float32))
    same(apply(f"cvt.rn.f64.{kind}", np.float64, a), a.astype(np.float64))
    got = apply(f"cvt.rz.f32.{kind}", np.float32, a)
    assert all(abs(int(g)) <= abs(int(x)) < abs(int(g)) + max(1, abs(int(x)) >> 23) for g, x in zip(got, a, strict=True))


@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("saturates", [False, True])
def test_integers_to_integers(source, to, saturates):
    a = integers(INTEGERS[source])
    info = np.iinfo(INTEGERS[to])
    expected = [min(max(int(x), info.min), info.max) if saturates else int(x) for x in a]
    same(apply(f"cvt{'.sat' if saturates else ''}.{to}.{source}", info.dtype, a), wrapped(expected, info.dtype))


def test_narrow_integers_fill_their_registers():
    a = integers(np.uint32)
    same(apply("cvt.s8.s32", np.int16, a), a.astype(np.uint8).view(np.int8).astype(np.int16))
    same(apply("cvt.u8.u32", np.uint16, a), a.astype(np.uint8).astype(np.uint16))
    same(apply("cvt.s32.s8", np.int32, a.astype(np.uint16)), a.astype(np.uint8).view(np.int8).astype(np.int32))


def test_floats_to_floats():
    a = floats()
    a[16:24] = [65519.9, 65520, 5.9e-8, 2.9e-8, 6.2e-5, 1.00048828125, 1.0014648, -65520]
    with np.errstate(all="ignore"):
        same(apply("cvt.rn.f16.f32", np.float16, a), a.astype(np.float16))
        same(apply("cvt.f32.f16", np.float32, a.astype(np.float16)), a.astype(np.float16).astype(np.float32))
        same(of_bf16(apply("cvt.rn.bf16.f32", np.uint16, a)), of_bf16(bf16_of(a)))
        same(apply("cvt.f32.bf16", np.float32, bf16_of(a)), of_bf16(bf16_of(a)))
        truncated = np.where(np.isnan(a), np.uint32(0x7FFF), bits(a) >> 16).astype(np.uint16)
        same(of_bf16(apply("cvt.rz.bf16.f32", np.uint16, a)), of_bf16(truncated))
        double = floats(4, np.float64)
        double[16:22] = [1 + 2**-24, 1 + 2**-24 + 2**-50, 1 + 2**-11, 1 + 2**-11 + 2**-40, 1e300, 1e-300]  # ties, and a little more
        same(apply("cvt.rn.f32.f64", np.float32, double), double.astype(np.float32))
        same(apply("cvt.rn.f16.f64", np.float16, double), double.astype(np.float16))
        same(apply("cvt.f64.f32", np.float64, a), a.astype(np.float64))
        toward_zero = apply("cvt.rz.f32.f64", np.float32, double)
    finite = np.isfinite(toward_zero) & np.isfinite(double)
    assert (np.abs(toward_zero[finite].astype(np.float64)) <= np.abs(double[finite])).all()
    same(apply("cvt.rni.f32.f32", np.float32, a), np.rint(a))
    clamped = np.where(np.isnan(a) | (a < 0), 0, np.minimum(a, 1)).astype(np.float32)
    assert (apply("cvt.sat.f32.f32", np.float32, a) == clamped).all()


def test_rounding_to_tf32():
    a = floats(2)
    a = a[np.isfinite(a) & (np.abs(a) > 1e-30) & (np.abs(a) < 1e30)]
    a[:2] = [1 + 2**-11, -(1 + 2**-11)]  # ties go away from zero
    expected = ((bits(a) + 0x1000) & 0xFFFFE000).view(np.float32)
    same(apply("cvt.rna.tf32.f32", np.float32, a), expected)


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_pairs_of_floats(kind):
    a, b = float_pair()
    with np.errstate(all="ignore"):
        narrow = (lambda x: bits(x.astype(np.float16))) if kind == "f16x2" else bf16_of
        wide = (lambda x: x.view(np.float16).astype(np.float32)) if kind == "f16x2" else of_bf16
        got = apply(f"cvt.rn.{kind}.f32", np.uint32, a, b)  # the first goes to the upper half
        same(wide((got >> 16).astype(np.uint16)), wide(narrow(a)))
        same(wide((got & 0xFFFF).astype(np.uint16)), wide(narrow(b)))


def _eight_bit_values(mantissa_bits):
    """Values of all codes; NaN where a code is one."""
    exponent_bits = 7 - mantissa_bits
    bias = (1 << exponent_bits - 1) - 1
    values = []
    for code in range(256):
        exponent, mantissa = (code & 127) >> mantissa_bits, code & (1 << mantissa_bits) - 1
        size = math.ldexp(mantissa + (bool(exponent) << mantissa_bits), max(exponent, 1) - bias - mantissa_bits)
        if mantissa_bits == 3 and code & 127 == 127:
            size = math.nan
        if mantissa_bits == 2 and exponent == 31:
            size = math.nan if mantissa else math.inf
        values.append(-size if code & 128 else size)
    return np.array(values, np.float64)


@pytest.mark.parametrize(("kind", "mantissa_bits", "largest"), [("e4m3", 3, 448.0), ("e5m2", 2, 57344.0)])
def test_floats_of_8_bits(kind, mantissa_bits, largest):
    values = _eight_bit_values(mantissa_bits)
    codes = np.arange(256, dtype=np.uint16)
    halves = apply(f"cvt.rn.f16x2.{kind}x2", np.uint32, codes | codes[::-1] << 8)
    same((halves & 0xFFFF).astype(np.uint16).view(np.float16), values.astype(np.float16))
    same((halves >> 16).astype(np.uint16).view(np.float16), values[::-1].astype(np.float16))

    a = floats()
    finite = np.sort(np.unique(np.abs(values[np.isfinite(values)])))
    a[16 : 16 + 100] = ((finite[:-1] + finite[1:]) / 2)[:100]  # ties
    a[120:124] = [largest * 1.03, largest * 1.5, -1e9, 1e-9]

    def nearest(x):
        if math.isnan(x):
            return math.nan
        x = max(-largest, min(largest, x))
        distances = np.abs(finite - abs(x))
        best = np.flatnonzero(distances == distances.min())
        chosen = best[0] if len(best) == 1 or best[0] % 2 == 0 else best[1]  # codes ascend with values: the even code
        return math.copysign(finite[chosen], x)

    expected = np.array([nearest(float(x)) for x in a])
    got = apply(f"cvt.rn.satfinite.{kind}x2.f32", np.uint16, a, a[::-1].copy())
    same(values[got >> 8], expected)
    same(values[got & 255], expected[::-1])


def test_packing_and_unpacking():
    a, b = pair(np.uint32)
    got = np.zeros((THREADS, 4), np.uint32)
    body = address(a, 0) + "ld.global.b32 r0, [at];" + address(b, 1) + "ld.global.b32 r1, [at];"
    body += "mov.b64 d10, {r0, r1}; mov.b64 {r2, r3}, d10; mov.b32 {h0, _}, r0; mov.b32 {_, h1}, r0; mov.b32 r4, {h1, h0};"
    body += "mov.b64 {_, r5}, d10; mul.wide.u32 at, tid, 16; add.u64 at, at, d2; st.global.v4.b32 [at], {r2, r3, r4, r5};"
    run(body, a, b, got)
    same(got, np.stack([a, b, a >> 16 | a << 16, b], 1))
