"""The machine, instruction by instruction: PTX written here against what the PTX ISA says, computed by Python and numpy.

Needs g++, not Triton.
"""

from __future__ import annotations

import dataclasses
import math
import struct

import numpy as np
import pytest

from tests.machine import core
from tests.machine.settings import Settings

if (reason := core.available()) is not None:
    pytest.skip(reason, allow_module_level=True)

THREADS = 256
PLAIN = Settings()
REGISTERS = """
    .reg .pred p<20>; .reg .b16 h<40>; .reg .b32 r<200>; .reg .b64 d<60>;
    .reg .b32 tid; .reg .b64 at;
    mov.u32 tid, %tid.x;
"""


def run(body, *arrays, threads=THREADS, grid=1, settings=PLAIN, shared=0, module="", cooperative=False, check=True):
    """Run `body` on arrays, whose addresses are in d0, d1, ...; thread index in tid."""
    names = ", ".join(f".param .u64 a{i}" for i in range(len(arrays)))
    loads = "\n".join(f"ld.param.u64 d{i}, [a{i}];" for i in range(len(arrays)))
    ptx = f".version 8.4\n.target sm_90a\n.address_size 64\n{module}\n"
    ptx += f".visible .entry k({names})\n.reqntid {threads}, 1, 1\n{{\n{REGISTERS}{loads}\n{body}\nret;\n}}\n"
    places = [array.__array_interface__["data"][0] for array in arrays]
    storages = [(place, place + array.nbytes) for place, array in zip(places, arrays, strict=True)]
    values = [struct.pack("<Q", place) for place in places]
    done = core.run(core.Kernel("k", ptx), (grid, 1, 1), values, storages, settings, shared=shared, cooperative=cooperative)
    if check:
        assert done.code == 0, done.error
    return done


REGISTER = {1: "h", 2: "h", 4: "r", 8: "d"}
FIRST = 20  # registers of sources


def _address(array, base):
    return f"mul.wide.u32 at, tid, {array.itemsize}; add.u64 at, at, d{base};\n"


def apply(opcode, result, *sources, extra=""):
    """opcode on every thread's values of `sources`, as an array of the type `result`; bool is a predicate."""
    sources = [np.ascontiguousarray(source) for source in sources]
    out = np.zeros(len(sources[0]), np.uint32 if result is bool else result)
    body, names = "", []
    for i, source in enumerate(sources):
        name = f"{REGISTER[source.itemsize]}{FIRST + i}"
        body += _address(source, i)
        if source.dtype == bool:
            body += f"ld.global.u8 h19, [at]; setp.ne.u16 p{i}, h19, 0;\n"
            name = f"p{i}"
        else:
            body += f"ld.global.b{8 * source.itemsize} {name}, [at];\n"
        names.append(name)
    target = "p10" if result is bool else f"{REGISTER[out.itemsize]}10"
    body += f"{opcode} {', '.join([target, *names])}{extra};\n"
    if result is bool:
        body += "selp.b32 r10, 1, 0, p10;\n"
    kind = {1: "h", 2: "h", 4: "r", 8: "d"}[out.itemsize]
    body += _address(out, len(sources)) + f"st.global.b{8 * out.itemsize} [at], {kind}10;\n"
    run(body, *sources, out, threads=len(out))
    return out.astype(bool) if result is bool else out


def integers(dtype, seed=0):
    """Edge values in front, then random ones of all sizes."""
    info = np.iinfo(dtype)
    bits = info.bits
    edges = [
        0,
        1,
        -1,
        2,
        info.max,
        info.min,
        info.max - 1,
        info.min + 1,
        5,
        -5,
        0x55,
        0xAA,
        1 << (bits - 2),
        31,
        32,
        33,
        63,
        64,
        65,
    ]
    rng = np.random.default_rng(seed)
    values = [rng.integers(0, 1 << 63) >> int(rng.integers(0, 64)) for _ in range(THREADS)]
    return np.array([int(v) & ((1 << bits) - 1) for v in edges + values][:THREADS], np.uint64).astype(f"u{bits // 8}").view(dtype)


def pair(dtype):
    """Two arrays in which edge values meet edge values."""
    a, b = integers(dtype, 1), integers(dtype, 2)
    n = 15
    a[: n * n], b[: n * n] = np.repeat(integers(dtype)[:n], n), np.tile(integers(dtype)[:n], n)
    return a, b


FLOAT_EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 1e-40, -1e-40, 65504.0]


def floats(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=THREADS) * 10.0 ** rng.integers(-6, 6, THREADS)
    with np.errstate(over="ignore"):
        return np.array(FLOAT_EDGES + list(values), dtype)[:THREADS]


def float_pair(dtype=np.float32):
    a, b = floats(1, dtype), floats(2, dtype)
    n = 14
    a[: n * n], b[: n * n] = np.repeat(floats(0, dtype)[:n], n), np.tile(floats(0, dtype)[:n], n)
    return a, b


def wrapped(values, dtype):
    mask = (1 << 8 * np.dtype(dtype).itemsize) - 1
    return np.array([int(v) & mask for v in values], np.uint64).astype(f"u{np.dtype(dtype).itemsize}").view(dtype)


def same(got, expected):
    """Equal, bit by bit but for the payload of NaNs; the message shows where they are not."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    both_nan = np.isnan(got) & np.isnan(expected) if got.dtype.kind == "f" else np.zeros(got.shape, bool)
    unlike = (got.view(f"u{got.itemsize}") != expected.view(f"u{got.itemsize}")) & ~both_nan
    assert not unlike.any(), [(int(i), got[i], expected[i]) for i in np.flatnonzero(unlike)[:8]]


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


def bf16_of(x):
    """float32 -> bfloat16 bits, to the nearest, ties to even."""
    x = np.ascontiguousarray(x, np.float32)
    u = x.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FFF, (u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def of_bf16(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


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
    body = "".join(_address(x, i) + f"ld.global.b32 r{i}, [at];\n" for i, x in enumerate(packed))
    body += "setp.lt.bf16x2 p0|p1, r0, r1; selp.b32 r2, 1, 0, p0; selp.b32 r3, 2, 0, p1; or.b32 r2, r2, r3;\n"
    run(body + _address(out, 2) + "st.global.b32 [at], r2;", *packed, out, threads=THREADS // 2)
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
    body = _address(a, 0) + "ld.global.b32 r0, [at];" + _address(b, 1) + "ld.global.b32 r1, [at];"
    body += "mov.b64 d10, {r0, r1}; mov.b64 {r2, r3}, d10; mov.b32 {h0, _}, r0; mov.b32 {_, h1}, r0; mov.b32 r4, {h1, h0};"
    body += "mov.b64 {_, r5}, d10; mul.wide.u32 at, tid, 16; add.u64 at, at, d2; st.global.v4.b32 [at], {r2, r3, r4, r5};"
    run(body, a, b, got)
    same(got, np.stack([a, b, a >> 16 | a << 16, b], 1))


# --- lanes of a warp ----------------------------------------------------------------------------------------------------


def lanes(body, *arrays, threads=THREADS, **how):
    """`body` on arrays loaded to r0, r1, ...; what it leaves in r10 by thread."""
    out = np.zeros(threads, np.uint32)
    loads = "".join(_address(x, i) + f"ld.global.b32 r{i}, [at];\n" for i, x in enumerate(arrays))
    run(loads + body + _address(out, len(arrays)) + "st.global.b32 [at], r10;", *arrays, out, threads=threads, **how)
    return out


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4, 2])
def test_shuffles(mode, width):
    a = integers(np.uint32)
    by = np.random.default_rng(width).integers(0, 33, THREADS).astype(np.uint32)
    clamp = (32 - width << 8) | (0 if mode == "up" else 31)
    got = lanes(f"shfl.sync.{mode}.b32 r10|p0, r0, r1, {clamp}, -1; selp.b32 r11, 0x80000000, 0, p0; xor.b32 r10, r10, r11;", a, by)
    expected = []
    for i in range(THREADS):
        lane, b, segment = i % 32, int(by[i]) & 31, 32 - width
        first = lane & segment
        last = first | 31 & ~segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segment & 31}[mode]
        inside = source >= first if mode == "up" else source <= last
        value = int(a[i - lane + (source if inside else lane)])
        expected.append(value ^ (0x80000000 if inside else 0))
    same(got, np.array(expected, np.uint32))


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 16])
def test_butterfly(distance):
    a = integers(np.uint32)
    got = lanes(f"shfl.sync.bfly.b32 r10, r0, {distance}, 31, -1;", a)
    same(got, a[np.arange(THREADS) ^ distance])


def test_votes():
    a = (np.arange(THREADS, dtype=np.uint32) // 32 % 3 == 0) | (np.arange(THREADS) % 7 == 0) & (np.arange(THREADS) < 224)
    a = a.astype(np.uint32)
    warps = a.reshape(-1, 32)
    start = "setp.ne.u32 p0, r0, 0; "
    for name, f in (("all", lambda w: w.all(1)), ("any", lambda w: w.any(1)), ("uni", lambda w: w.all(1) | ~w.any(1))):
        got = lanes(start + f"vote.sync.{name}.pred p1, p0, -1; selp.b32 r10, 1, 0, p1;", a)
        same(got, np.repeat(f(warps), 32).astype(np.uint32))
    ballots = np.repeat((warps << np.arange(32, dtype=np.uint32)).sum(1), 32).astype(np.uint32)
    same(lanes(start + "vote.sync.ballot.b32 r10, p0, -1;", a), ballots)
    same(lanes(start + "vote.sync.ballot.b32 r10, !p0, -1;", a), ~ballots)


def test_match():
    a = np.random.default_rng(0).integers(0, 5, THREADS).astype(np.uint32)
    a[64:96] = 3
    warps = a.reshape(-1, 32)
    masks = ((warps[:, :, None] == warps[:, None, :]) << np.arange(32, dtype=np.uint64)).sum(2).reshape(-1).astype(np.uint32)
    same(lanes("match.any.sync.b32 r10, r0, -1;", a), masks)
    same(lanes("match.all.sync.b32 r10, r0, -1;", a), np.where(masks == 0xFFFFFFFF, masks, 0).astype(np.uint32))
    same(lanes("mov.b64 d10, {r0, r0}; match.any.sync.b64 r10, d10, -1;", a), masks)


@pytest.mark.parametrize(
    ("name", "dtype", "f"),
    [
        ("add.s32", np.uint32, np.add.reduce), ("min.s32", np.int32, np.min), ("max.s32", np.int32, np.max),
        ("min.u32", np.uint32, np.min),
        ("max.u32", np.uint32, np.max), ("and.b32", np.uint32, np.bitwise_and.reduce), ("or.b32", np.uint32, np.bitwise_or.reduce),
        ("xor.b32", np.uint32, np.bitwise_xor.reduce),
    ],
)  # fmt: skip
def test_reductions(name, dtype, f):
    a = integers(np.uint32) | np.uint32(1 << 9)
    with np.errstate(over="ignore"):
        expected = np.repeat([f(row.view(dtype)) for row in a.reshape(-1, 32)], 32).astype(dtype).view(np.uint32)
    same(lanes(f"redux.sync.{name} r10, r0, -1;", a), expected)


def test_masks_of_lanes():
    lane = np.arange(THREADS) % 32
    bit = (1 << lane).astype(np.uint64)
    for name, expected in (("lt", bit - 1), ("le", 2 * bit - 1), ("eq", bit), ("gt", ~(2 * bit - 1)), ("ge", ~(bit - 1))):
        same(lanes(f"mov.u32 r10, %lanemask_{name};"), expected.astype(np.uint32))
    same(lanes("mov.u32 r10, %laneid;"), lane.astype(np.uint32))
    same(lanes("setp.lt.u32 p0, tid, 40; @p0 bra ON; mov.u32 r10, 7; bra OFF; ON: activemask.b32 r10; OFF:"),
         np.array([0xFFFFFFFF] * 32 + [0xFF] * 8 + [7] * (THREADS - 40), np.uint32))  # fmt: skip


# --- control ------------------------------------------------------------------------------------------------------------


def test_lanes_diverge_and_meet_again():
    """Each lane runs its own number of rounds; a shuffle and a ballot behind need all of them."""
    body = """
    and.b32 r20, tid, 15; mov.u32 r21, 0;
    LOOP: setp.ge.u32 p0, r21, r20; @p0 bra DONE;
    and.b32 r22, r21, 1; setp.eq.u32 p1, r22, 0; @p1 bra EVEN;
    add.u32 r23, r23, 0; bra NEXT;
    EVEN: add.u32 r24, r21, 1;
    NEXT: add.u32 r21, r21, 1; bra LOOP;
    DONE: shfl.sync.idx.b32 r10, r21, 15, 31, -1; vote.sync.ballot.b32 r25, p0, -1; popc.b32 r25, r25; add.u32 r10, r10, r25;
    """
    same(lanes(body), np.full(THREADS, 15 + 32, np.uint32))


def test_a_loop_that_one_lane_leaves_last():
    """Lane k leaves after k rounds, having added the rounds' numbers."""
    body = (
        "mov.u32 r10, 0; mov.u32 r1, 0; and.b32 r2, tid, 31; L: setp.gt.u32 p0, r1, r2; @p0 bra E; add.u32 r10, r10, "
        "r1; add.u32 r1, r1, 1; bra L; E:"
    )
    k = np.arange(THREADS) % 32
    same(lanes(body), (k * (k + 1) // 2).astype(np.uint32))


def test_lanes_wait_for_others_of_their_warp():
    """Half of a warp spins on what the other half writes: without turns between groups it would never end."""
    cell, out = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    body = """
    setp.lt.u32 p0, tid, 16; @p0 bra WAIT;
    st.volatile.global.u32 [d0], 5; bra END;
    WAIT: ld.volatile.global.u32 r1, [d0]; setp.eq.u32 p1, r1, 0; @p1 bra WAIT;
    END: ld.volatile.global.u32 r2, [d0];
    """
    run(body + _address(out, 1) + "st.global.u32 [at], r2;", cell, out, threads=32)
    same(out, np.full(32, 5, np.uint32))


@pytest.mark.parametrize("members", ["-1", "r5"])
def test_collectives_wait_for_their_members(members):
    """The odd lanes come to the shuffle by a detour that lies behind it."""
    body = f"""
    and.b32 r1, tid, 1; setp.eq.u32 p0, r1, 1; mov.u32 r2, tid; mov.u32 r5, 0xffffffff; @p0 bra DETOUR;
    MEET: shfl.sync.bfly.b32 r10, r2, 1, 31, {members}; bra END;
    DETOUR: add.u32 r2, r2, 1000; bra MEET;
    END:
    """
    tid = np.arange(THREADS) ^ 1
    same(lanes(body), (tid + 1000 * (tid % 2)).astype(np.uint32))


@pytest.mark.parametrize("early", [False, True])
def test_block_barrier(early):
    """Every thread reads what another warp wrote; threads that have ended are not waited for."""
    module = ".extern .shared .align 16 .b8 memory[];"
    leave = "setp.ge.u32 p3, tid, 192; @p3 exit;" if early else ""
    body = (
        leave
        + """
    mov.u32 r0, memory; shl.b32 r1, tid, 2; add.u32 r0, r0, r1; mul.lo.u32 r2, tid, 3; st.shared.u32 [r0], r2;
    bar.sync 0;
    xor.b32 r3, tid, 32; shl.b32 r3, r3, 2; mov.u32 r4, memory; add.u32 r3, r3, r4; ld.shared.u32 r10, [r3];
    """
    )
    n = 192 if early else THREADS
    settings = dataclasses.replace(PLAIN, quantum=2, races=True)
    out = np.zeros(THREADS, np.uint32)
    done = run(body + _address(out, 0) + "st.global.b32 [at], r10;", out, module=module, shared=4 * THREADS, settings=settings)
    same(out[:n], (3 * (np.arange(n) ^ 32)).astype(np.uint32))
    assert not done.reports and done.counters["block_barriers"] == n // 32


def test_named_barriers():
    """Two pairs of warps meet at barriers of their own, with the number of threads given."""
    module = ".extern .shared .align 16 .b8 memory[];"
    body = """
    mov.u32 r0, memory; shl.b32 r1, tid, 2; add.u32 r0, r0, r1; st.shared.u32 [r0], tid;
    setp.lt.u32 p0, tid, 64; @p0 bra FIRST;
    bar.sync 2, 64; bra READ;
    FIRST: bar.sync 1, 64;
    READ: xor.b32 r3, tid, 32; shl.b32 r3, r3, 2; mov.u32 r4, memory; add.u32 r3, r3, r4; ld.shared.u32 r10, [r3];
    """
    for seed in range(5):
        settings = dataclasses.replace(PLAIN, quantum=1, races=True, seed=seed)
        got = lanes(body, threads=128, module=module, shared=512, settings=settings)
        same(got, (np.arange(128) ^ 32).astype(np.uint32))


def test_a_missing_barrier_is_a_race():
    module = ".extern .shared .align 16 .b8 memory[];"
    body = (
        "mov.u32 r0, memory; shl.b32 r1, tid, 2; add.u32 r2, r0, r1; st.shared.u32 [r2], tid; xor.b32 r1, r1, 128; "
        "add.u32 r2, r0, r1; ld.shared.u32 r10, [r2];"
    )
    out = np.zeros(THREADS, np.uint32)
    how = dict(module=module, shared=4 * THREADS)
    done = run(body + _address(out, 0) + "st.global.b32 [at], r10;", out, settings=dataclasses.replace(PLAIN, races=True), **how)
    assert {report.kind for report in done.reports} == {"race.shared"}
    done = run(
        body + _address(out, 0) + "st.global.b32 [at], r10;", out, settings=dataclasses.replace(PLAIN, uninitialised=True), **how
    )
    assert {report.kind for report in done.reports} == {"uninitialised"} and done.counters["uninitialised"]


def test_a_barrier_orders_only_what_came_before():
    module = ".extern .shared .align 16 .b8 memory[];"
    body = """
    bar.sync 0; mov.u32 r0, memory; setp.eq.u32 p0, tid, 0; setp.eq.u32 p1, tid, 32;
    @p0 st.shared.u32 [r0], 9; @p1 ld.shared.u32 r1, [r0];
    """
    for seed in range(3):
        settings = dataclasses.replace(PLAIN, races=True, seed=seed, quantum=1)
        assert {report.kind for report in run(body, module=module, shared=16, settings=settings).reports} == {"race.shared"}


def test_predicated_instructions():
    a = integers(np.uint32)
    got = lanes("and.b32 r1, tid, 1; setp.eq.u32 p0, r1, 0; mov.u32 r10, 7; @p0 add.u32 r10, r0, 1; @!p0 mul.lo.u32 r10, r0, 2;", a)
    with np.errstate(over="ignore"):
        same(got, np.where(np.arange(THREADS) % 2 == 0, a + np.uint32(1), a * np.uint32(2)))


def test_trap_deadlock_and_livelock():
    assert "trap" in run("setp.eq.u32 p0, tid, 40; @p0 trap;", check=False).error
    stuck = run("setp.lt.u32 p0, tid, 32; @p0 bar.sync 0, 256; @!p0 bar.sync 1, 256;", check=False)
    assert stuck.code and "deadlock" in stuck.error and "bar.sync" in stuck.error
    endless = run("L: bra L;", check=False, settings=dataclasses.replace(PLAIN, stall=100000))
    assert endless.code and "no progress" in endless.error


# --- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(
    ("kind", "elements"), [("b8", 1), ("b8", 4), ("b16", 2), ("b16", 4), ("b32", 1), ("b32", 2), ("b32", 4), ("b64", 2)]
)
def test_vectors(space, kind, elements):
    width = int(kind[1:]) // 8
    data = np.random.default_rng(0).integers(0, 256, THREADS * width * elements).astype(np.uint8)
    out = np.zeros_like(data)
    size = width * elements
    names = ", ".join(f"{REGISTER[width]}{30 + i}" for i in range(elements))
    vector = "" if elements == 1 else f".v{elements}"
    names = f"{{{names}}}" if elements > 1 else names
    body = f"mul.wide.u32 d10, tid, {size}; add.u64 d11, d10, d0; add.u64 d12, d10, d1; ld.global{vector}.{kind} {names}, [d11];\n"
    if space == "shared":
        body += f"mov.u32 r0, memory; mad.lo.u32 r0, tid, {size}, r0; st.shared{vector}.{kind} [r0], {names};"
        body += f"ld.shared{vector}.{kind} {names}, [r0 + 0];\n"
    body += f"st.global{vector}.{kind} [d12], {names};"
    for settings in (PLAIN, dataclasses.replace(PLAIN, races=True, weak=True, uninitialised=True)):
        out[:] = 0
        done = run(body, data, out, module=".extern .shared .align 16 .b8 memory[];", shared=THREADS * size, settings=settings)
        assert (out == data).all() and not done.reports


def test_narrow_loads_extend():
    a = np.random.default_rng(0).integers(0, 256, THREADS).astype(np.uint8)
    out = np.zeros((THREADS, 2), np.int32)
    body = (
        _address(a, 0) + "ld.global.s8 r1, [at]; ld.global.u8 r2, [at]; mul.wide.u32 at, tid, 8; add.u64 at, at, d1; "
        "st.global.v2.b32 [at], {r1, r2};"
    )
    run(body, a, out)
    assert (out == np.stack([a.view(np.int8), a], 1)).all()


def test_predicated_memory():
    """Lanes that are off touch nothing, wherever their addresses point."""
    a, out = integers(np.uint32), np.zeros(THREADS, np.uint32)
    body = "setp.lt.u32 p0, tid, 100; mov.u32 r1, 9;" + _address(a, 0) + "@!p0 mov.u64 at, 4; @p0 ld.global.u32 r1, [at];"
    run(body + _address(out, 1) + "@!p0 add.u64 at, at, 1000000; @p0 st.global.u32 [at], r1;", a, out)
    same(out, np.where(np.arange(THREADS) < 100, a, 0).astype(np.uint32))


def test_bounds_and_alignment():
    a = np.zeros(THREADS, np.uint32)
    beyond = run(_address(a, 0) + "ld.global.u32 r1, [at + 4];", a, check=False)
    assert beyond.code and [r.kind for r in beyond.reports] == ["bounds"]
    odd = run("ld.global.u32 r1, [d0 + 2];", a, check=False)
    assert odd.code and [r.kind for r in odd.reports] == ["misaligned"]
    shared = run("mov.u32 r0, 4096; ld.shared.u32 r1, [r0];", a, check=False, shared=1024)
    assert shared.code and [r.kind for r in shared.reports] == ["bounds"]


def test_local_memory():
    """Every thread has its own; addresses come from registers and from the name."""
    body = """
    .local .align 8 .b8 depot[64];
    mov.u64 d20, depot; mov.u32 r1, 0;
    FILL: mad.lo.u32 r2, r1, 1000, tid; mul.wide.u32 d21, r1, 4; add.u64 d22, d20, d21; st.local.u32 [d22], r2;
    add.u32 r1, r1, 1; setp.lt.u32 p0, r1, 16; @p0 bra FILL;
    and.b32 r3, tid, 15; mul.wide.u32 d21, r3, 4; add.u64 d22, d20, d21; ld.local.u32 r10, [d22]; ld.local.u32 r4, [depot + 8];
    add.u32 r10, r10, r4;
    """
    tid = np.arange(THREADS)
    same(lanes(body), ((tid % 16) * 1000 + tid + 2000 + tid).astype(np.uint32))


def test_constants_of_the_module():
    module = ".global .align 4 .b32 table[4] = {10, 20, 30, 40};"
    got = lanes(
        "mov.u64 d20, table; and.b32 r1, tid, 3; mul.wide.u32 d21, r1, 4; add.u64 d20, d20, d21; ld.global.u32 r10, [d20];",
        module=module,
    )
    same(got, (np.arange(THREADS) % 4 * 10 + 10).astype(np.uint32))


# --- atomics ------------------------------------------------------------------------------------------------------------

ATOMICS = {
    "add.u32": np.uint32, "add.s32": np.int32, "add.u64": np.uint64, "min.s32": np.int32, "max.s32": np.int32, "min.u32": np.uint32,
    "max.u32": np.uint32, "min.s64": np.int64, "max.s64": np.int64, "min.u64": np.uint64, "max.u64": np.uint64,
    "and.b32": np.uint32,
    "or.b32": np.uint32, "xor.b32": np.uint32, "and.b64": np.uint64, "or.b64": np.uint64, "xor.b64": np.uint64,
}  # fmt: skip
FOLD = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name, space):
    """All threads on one cell: its end, and that the old values are a chain of a possible order."""
    dtype = np.dtype(ATOMICS[name])
    a = integers(dtype, 3)
    operation = FOLD[name.split(".")[0]]
    old, cell = np.zeros_like(a), a[-1:].copy()
    start = cell[0]
    register, size = REGISTER[dtype.itemsize], 8 * dtype.itemsize
    body = _address(a, 0) + f"ld.global.b{size} {register}30, [at];\n"
    if space == "shared":
        body += (
            f"setp.eq.u32 p0, tid, 0; ld.global.b{size} {register}31, [d2]; mov.u32 r0, memory; "
            f"@p0 st.shared.b{size} [r0], {register}31; bar.sync 0;\n"
        )
        body += f"atom.shared.{name} {register}32, [r0], {register}30; bar.sync 0; @p0 ld.shared.b{size} {register}33, [r0];"
        body += f"@p0 st.global.b{size} [d2], {register}33;\n"
    else:
        body += f"atom.global.gpu.relaxed.{name} {register}32, [d2], {register}30;\n"
    body += _address(old, 1) + f"st.global.b{size} [at], {register}32;"
    for settings in (PLAIN, dataclasses.replace(PLAIN, races=True, weak=True, quantum=3)):
        cell[0] = start
        done = run(body, a, old, cell, module=".extern .shared .align 16 .b8 memory[];", shared=16, settings=settings)
        with np.errstate(over="ignore"):
            assert cell[0] == operation.reduce(np.concatenate([[start], a]).astype(dtype), dtype=dtype) and not done.reports
            if name.startswith("add"):  # every old value is another one's new value, or the start
                assert sorted((old + a).tolist() + [start.item()]) == sorted(old.tolist() + [cell[0].item()])


def test_atomic_exchange_and_compare_and_swap():
    a = np.arange(1, THREADS + 1, dtype=np.uint32)
    old, cell = np.zeros_like(a), np.zeros(1, np.uint32)
    load = _address(a, 0) + "ld.global.b32 r30, [at];"
    store = _address(old, 1) + "st.global.b32 [at], r31;"
    run(load + "atom.global.exch.b32 r31, [d2], r30;" + store, a, old, cell)
    assert sorted([*old.tolist(), int(cell[0])]) == list(range(THREADS + 1))
    cell[0] = 0
    run(load + "atom.global.acq_rel.gpu.cas.b32 r31, [d2], 0, r30;" + store, a, old, cell)
    assert (old == 0).sum() == 1 and cell[0] == a[old == 0][0] and set(old.tolist()) == {0, int(cell[0])}
    wide = np.zeros(1, np.uint64)
    run(load + "cvt.u64.u32 d30, r30; atom.global.cas.b64 d31, [d2], 0, d30; cvt.u32.u64 r31, d31;" + store, a, old, wide)
    assert wide[0] in a


def test_atomic_increment_and_decrement_wrap():
    cell = np.zeros(2, np.uint32)
    run("red.global.gpu.relaxed.inc.u32 [d0], 9; red.global.gpu.relaxed.dec.u32 [d0 + 4], 9;", cell, threads=64)
    up = down = 0
    for _ in range(64):
        up = 0 if up >= 9 else up + 1
        down = 9 if down == 0 or down > 9 else down - 1
    assert cell.tolist() == [up, down]


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16", "f16x2", "bf16x2"])
def test_atomic_sums_of_floats(kind):
    """Small integers, whose sums are exact in any order."""
    values = np.arange(64) % 4
    dtype = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "f16x2": np.float16}.get(kind, np.uint16)
    narrow = bf16_of if kind.startswith("bf16") else lambda x: np.asarray(x).astype(dtype)
    a = narrow(np.repeat(values, 2) if kind.endswith("x2") else values)
    cell = np.zeros(2 if kind.endswith("x2") else 1, dtype)
    width = cell.nbytes
    register = REGISTER[width]
    noftz = ".noftz" if width <= 4 and kind != "f32" else ""
    run(f"mul.wide.u32 at, tid, {width}; add.u64 at, at, d0; ld.global.b{8 * width} {register}30, [at]; "
        f"atom.global.add{noftz}.{kind} {register}31, [d1], {register}30;",
        a, cell, threads=64)  # fmt: skip
    got = of_bf16(cell) if dtype == np.uint16 else cell
    assert (got.astype(float) == values.sum()).all()


# --- asynchronous copies, matrices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", ["at_once", "at_the_wait", "either"])
def test_asynchronous_copies(copies):
    """16 bytes per thread, of which some read fewer, the rest being zero; two groups, waited for one after the other."""
    data = np.random.default_rng(0).integers(0, 256, (2, THREADS, 16)).astype(np.uint8)
    out = np.zeros_like(data)
    body = f"""
    mul.wide.u32 d10, tid, 16; add.u64 d11, d10, d0; add.u64 d12, d10, d1; mov.u32 r0, memory; mad.lo.u32 r0, tid, 16, r0;
    and.b32 r1, tid, 3; mul.lo.u32 r1, r1, 5; and.b32 r1, r1, 15; setp.eq.u32 p0, r1, 0; selp.b32 r1, 16, r1, p0;
    cp.async.cg.shared.global [r0 + 0], [d11 + 0], 16, r1; cp.async.commit_group;
    cp.async.cg.shared.global [r0 + {16 * THREADS}], [d11 + {16 * THREADS}], 16; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.v4.b32 {{r10, r11, r12, r13}}, [r0]; st.global.v4.b32 [d12], {{r10, r11, r12, r13}};
    cp.async.wait_group 0; ld.shared.v4.b32 {{r10, r11, r12, r13}}, [r0 + {16 * THREADS}];
    st.global.v4.b32 [d12 + {16 * THREADS}], {{r10, r11, r12, r13}};
    """
    how = dict(module=".extern .shared .align 16 .b8 memory[];", shared=32 * THREADS)
    run(body, data, out, settings=dataclasses.replace(PLAIN, copies=copies, races=True), **how)
    lengths = np.arange(THREADS) % 4 * 5 % 16
    lengths[lengths == 0] = 16
    expected = data.copy()
    expected[0][np.arange(16) >= lengths[:, None]] = 0
    assert (out == expected).all()


def test_a_copy_lands_no_sooner_than_its_wait():
    data, out = np.full(4, 7, np.uint32), np.zeros(1, np.uint32)
    body = (
        "mov.u32 r0, memory; mov.u32 r1, 1; st.shared.u32 [r0], r1; cp.async.ca.shared.global [r0], [d0], 4; "
        "ld.shared.u32 r2, [r0]; st.global.u32 [d1], r2; cp.async.wait_all;"
    )
    for copies, seen in (("at_once", 7), ("at_the_wait", 1)):
        run(
            body,
            data,
            out,
            threads=1,
            module=".extern .shared .align 16 .b8 memory[];",
            shared=16,
            settings=dataclasses.replace(PLAIN, copies=copies),
        )
        assert out[0] == seen


def _fragments(matrix, per):
    """Registers of a matrix of 8 rows a block: lane 4g + t has `per` neighbours at per * t of row g, block by block."""
    rows, columns = matrix.shape
    blocks = matrix.reshape(rows // 8, 8, columns // (4 * per), 4, per)
    return blocks.transpose(2, 0, 1, 3, 4).reshape(-1, 32, per)  # register (column block, row block), lane


@pytest.mark.parametrize(
    ("shape", "kind", "total", "dtype"),
    [
        ("m16n8k16", "f16", "f32", np.float16), ("m16n8k8", "f16", "f32", np.float16), ("m16n8k16", "f16", "f16", np.float16),
        ("m16n8k16", "bf16", "f32", None), ("m16n8k8", "tf32", "f32", np.float32), ("m16n8k4", "tf32", "f32", np.float32),
        ("m16n8k32", "s8", "s32", np.int8), ("m16n8k32", "u8", "s32", np.uint8), ("m16n8k16", "s8", "s32", np.int8),
    ],
)  # fmt: skip
def test_matrix_products(shape, kind, total, dtype):
    rng = np.random.default_rng(0)
    k = int(shape.split("k")[1])
    low = 0 if kind == "u8" else -8
    a, b, c = rng.integers(low, 8, (16, k)), rng.integers(low, 8, (k, 8)), rng.integers(-9, 9, (16, 8))
    narrow = (lambda x: bf16_of(x.astype(np.float32))) if dtype is None else lambda x: x.astype(dtype)
    per = {"f16": 2, "bf16": 2, "tf32": 1}.get(kind, 4)
    words_a = np.ascontiguousarray(_fragments(narrow(a), per)).view(np.uint32).reshape(-1)
    words_b = np.ascontiguousarray(_fragments(narrow(b.T.copy()), per)).view(np.uint32).reshape(-1)
    sums = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[total]
    registers = 2 if total == "f16" else 4
    layout = np.ascontiguousarray(_fragments(c.astype(sums), 2)).reshape(2, 32, 2)  # rows g and g + 8; two neighbours each
    words_c = layout.view(np.uint32).reshape(2, 32, -1).transpose(0, 2, 1).reshape(-1).copy()
    out = np.zeros_like(words_c)
    body, names = "mul.wide.u32 at, tid, 4;", {}
    for i, (letter, words) in enumerate((("a", words_a), ("b", words_b), ("c", words_c))):
        names[letter] = [f"r{20 + 10 * i + j}" for j in range(len(words) // 32)]
        body += f"add.u64 d1{i}, at, d{i};" + "".join(
            f"ld.global.b32 {name}, [d1{i} + {128 * j}];" for j, name in enumerate(names[letter])
        )
    names["d"] = [f"r{60 + j}" for j in range(registers)]
    listed = {letter: "{" + ", ".join(of) + "}" for letter, of in names.items()}
    body += (
        f"mma.sync.aligned.{shape}.row.col.{total}.{kind}.{kind}.{total} {listed['d']}, {listed['a']}, {listed['b']}, "
        f"{listed['c']};"
    )
    body += "add.u64 d13, at, d3;" + "".join(f"st.global.b32 [d13 + {128 * j}], {name};" for j, name in enumerate(names["d"]))
    run(body, words_a, words_b, words_c, out, threads=32)
    expected = (a @ b + c).astype(sums)
    wanted = np.ascontiguousarray(_fragments(expected, 2)).reshape(2, 32, 2)
    assert (out == wanted.view(np.uint32).reshape(2, 32, -1).transpose(0, 2, 1).reshape(-1)).all()


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_loading_and_storing_matrices(count, transposed):
    data = np.arange(64 * count, dtype=np.uint16).reshape(count, 8, 8)
    out, back = np.zeros((count, 32), np.uint32), np.zeros_like(data)
    registers = ", ".join(f"r{20 + i}" for i in range(count))
    body = f"""
    setp.lt.u32 p0, tid, {8 * count}; mul.wide.u32 d10, tid, 16; add.u64 d11, d10, d0; add.u64 d12, d10, d2; mov.u32 r0, memory;
    mad.lo.u32 r1, tid, 16, r0; @p0 ld.global.v4.b32 {{r2, r3, r4, r5}}, [d11];
    @p0 st.shared.v4.b32 [r1], {{r2, r3, r4, r5}}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {{{registers}}}, [r1];
    stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [r1 + 512], {{{registers}}}; bar.sync 0;
    @p0 ld.shared.v4.b32 {{r2, r3, r4, r5}}, [r1 + 512]; @p0 st.global.v4.b32 [d12], {{r2, r3, r4, r5}};
    mul.wide.u32 at, tid, 4; add.u64 at, at, d1;
    """ + "".join(f"st.global.b32 [at + {128 * i}], r{20 + i};" for i in range(count))
    run(body, data, out, back, threads=32, module=".extern .shared .align 16 .b8 memory[];", shared=1024 + 512)
    turned = data.transpose(0, 2, 1) if transposed else data
    assert (out == np.ascontiguousarray(turned).view(np.uint32).reshape(count, 32)).all() and (back == data).all()


WGMMA = """
    mov.u32 r0, memory; mad.lo.u32 r1, tid, 16, r0; mul.wide.u32 d10, tid, 16; add.u64 d11, d10, d0; add.u64 d12, d10, d1;
    ld.global.v4.b32 {r2, r3, r4, r5}, [d11]; st.shared.v4.b32 [r1], {r2, r3, r4, r5};
    setp.lt.u32 p0, tid, 16; @p0 ld.global.v4.b32 {r2, r3, r4, r5}, [d12]; @p0 st.shared.v4.b32 [r1 + 2048], {r2, r3, r4, r5};
    FENCE bar.sync 0; mov.u32 r10, 0x3f800000; mov.u32 r11, r10; mov.u32 r12, r10; mov.u32 r13, r10;
    shr.u32 r6, r0, 4; cvt.u64.u32 d20, r6; add.u64 d20, d20, 0x1000080000; add.u64 d21, d20, 128;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {r10, r11, r12, r13}, d20, d21, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned; EARLY wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 at, tid, 16; add.u64 at, at, d2; st.global.v4.b32 [at], {r10, r11, r12, r13};
"""


@pytest.mark.parametrize(
    ("fence", "early", "reported"),
    [
        ("fence.proxy.async.shared::cta;", "", set()),
        ("", "", {"race.proxy"}),  # what ordinary stores wrote, read through another proxy
        (
            "fence.proxy.async.shared::cta;",
            "setp.eq.u32 p2, tid, 0; @p2 st.shared.u32 [r0], r10;",
            {"race.shared"},
        ),  # before its wait
    ],
)
def test_products_of_four_warps(fence, early, reported):
    """Both operands in shared memory, in blocks of 8 rows of 16 bytes: the next 8 of k 128 bytes on, the next 8 rows 256."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 8, (64, 16)), rng.integers(-8, 8, (8, 16))

    def blocks(x):
        return bf16_of(np.ascontiguousarray(x.reshape(-1, 8, 2, 8).transpose(0, 2, 1, 3)).astype(np.float32)).reshape(-1)

    out = np.zeros((4, 32, 2, 2), np.float32)  # warp, lane, row g or g + 8, neighbours
    body = WGMMA.replace("FENCE", fence).replace("EARLY", early)
    how = dict(threads=128, module=".extern .shared .align 1024 .b8 memory[];", shared=2048 + 256)
    done = run(body, blocks(a), blocks(b), out, settings=dataclasses.replace(PLAIN, races=True), **how)
    assert {report.kind for report in done.reports} == reported
    if not early:
        got = out.reshape(4, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(64, 8)
        same(got, (a @ b.T + 1).astype(np.float32))


# --- registers, text ----------------------------------------------------------------------------------------------------


def test_many_registers_alive_at_once():
    """Sums of 100 values that are all alive: places in the register file are shared only where lives do not meet."""
    body = "".join(f"mad.lo.u32 r{20 + i}, tid, {i}, {i * i};" for i in range(100))
    body += "mov.u32 r10, 0;" + "".join(f"add.u32 r10, r10, r{20 + i};" for i in range(100))
    tid = np.arange(THREADS)
    same(lanes(body), sum(tid * i + i * i for i in range(100)).astype(np.uint32))


def test_a_guarded_write_keeps_the_register_alive():
    """r1 is written in the first round alone, and read in every one; nothing else may have its place meanwhile."""
    temporaries = "".join(f"add.u32 r{50 + i}, r3, {i + 7};" for i in range(8))
    used = "".join(f"xor.b32 r11, r11, r{50 + i};" for i in range(8))
    body = f"""
    mov.u32 r10, 0; mov.u32 r11, 0; mov.u32 r3, 0;
    L: setp.eq.u32 p0, r3, 0; @p0 add.u32 r1, tid, 5; add.u32 r10, r10, r1;
    {temporaries} {used}
    add.u32 r3, r3, 1; setp.lt.u32 p1, r3, 4; @p1 bra L;
    """
    same(lanes(body), (4 * (np.arange(THREADS) + 5)).astype(np.uint32))


def test_names_in_scopes():
    """A scope's names hide those outside, and a name may be a single register and a numbered set at once."""
    body = (
        "mov.u32 r10, 1; { .reg .b32 r10; .reg .b32 a; .reg .b32 a<2>; mov.u32 a, 5; mov.u32 a0, 6; add.u32 r10, a, "
        "a0; mov.u32 r11, r10; } add.u32 r10, r10, r11;"
    )
    same(lanes(body), np.full(THREADS, 12, np.uint32))


@pytest.mark.parametrize(
    "statement", ["frobnicate.b32 r1, r2;", "add.u24 r1, r2, r3;", "ld.global.v3.b32 {r1, r2, r3}, [d0];", "call f;"]
)
def test_unknown_instructions_are_named(statement):
    with pytest.raises(core.MachineError, match=statement.split(" ")[0].split(".")[0]):
        run(statement)


def test_races_name_both_source_lines():
    module = '.file 1 "/x/kernel.py"'
    body = """
    .loc 1 10 4 // kernel.py:10:4
    setp.eq.u32 p0, tid, 0; @p0 st.global.u32 [d0], 5;
    .loc 1 20 4 // kernel.py:20:4 @[ kernel.py:30:8 ]
    ld.global.u32 r1, [d0];
    """
    cell = np.zeros(1, np.uint32)
    for seed in range(5):
        done = run(body, cell, settings=dataclasses.replace(PLAIN, races=True, quantum=1, seed=seed), module=module)
        assert {report.kind for report in done.reports} == {"race.within"} and done.counters["races_within"]
        assert all(
            "kernel.py:10:4" in report.text and "kernel.py:20:4 @[ kernel.py:30:8 ]" in report.text for report in done.reports
        )
        cell[0] = 0


@pytest.mark.parametrize("programs", [300, 3000])
def test_races_of_many_programs(programs):
    """There is no number of programs from which on races are not looked for."""
    cells = np.zeros(programs, np.uint32)
    body = "mov.u32 r0, %ctaid.x; mul.wide.u32 at, r0, 4; add.u64 at, at, d0; setp.eq.u32 p0, tid, 0; @p0 st.global.u32 [at], r0;"
    settings = dataclasses.replace(PLAIN, races=True)
    fine = run(body, cells, grid=programs, settings=settings)
    assert not fine.reports and fine.counters["races_unchecked"] == 0 and cells.tolist() == list(range(programs))
    body += f"setp.eq.u32 p1, r0, {programs - 1}; @p1 ld.global.u32 r1, [d0];"
    racing = run(body, cells, grid=programs, settings=settings)
    assert {report.kind for report in racing.reports} <= {"race.global", "benign"} and racing.counters["races"] + racing.counters[
        "benign"
    ]


def test_release_and_acquire_order():
    """A flag with release and acquire orders plain accesses of two programs; relaxed, it does not."""
    body = """
    mov.u32 r0, %ctaid.x; setp.eq.u32 p0, r0, 0; @!p0 bra READER;
    mov.u32 r1, 42; st.global.u32 [d0], r1; atom.global.gpu.RELEASE.exch.b32 r2, [d0 + 64], 1; bra END;
    READER: ld.global.u32 r9, [d0 + 128]; SPIN: ld.ACQUIRE.gpu.global.u32 r3, [d0 + 64]; setp.eq.u32 p1, r3, 0; @p1 bra SPIN;
    ld.global.u32 r4, [d0]; st.global.u32 [d0 + 192], r4;
    END:
    """
    memory = np.zeros(64, np.uint32)
    settings = dataclasses.replace(PLAIN, races=True, weak=True, quantum=2, flush=0)
    good = body.replace("RELEASE", "release").replace("ACQUIRE", "acquire")
    for seed in range(5):
        memory[:] = 0
        done = run(good, memory, threads=1, grid=2, settings=dataclasses.replace(settings, seed=seed), cooperative=True)
        assert not done.reports and memory[48] == 42
    bad = body.replace("RELEASE", "relaxed").replace("ACQUIRE", "relaxed")
    memory[:] = 0
    done = run(bad, memory, threads=1, grid=2, settings=settings, cooperative=True)
    assert {report.kind for report in done.reports} == {"race.global"} and memory[48] == 0


def test_a_release_orders_only_what_came_before():
    """A store behind the release races with a load behind the acquire."""
    body = """
    mov.u32 r0, %ctaid.x; setp.eq.u32 p0, r0, 0; @!p0 bra READER;
    atom.global.gpu.release.exch.b32 r2, [d0 + 64], 1; st.global.u32 [d0], 42; bra END;
    READER: SPIN: ld.acquire.gpu.global.u32 r3, [d0 + 64]; setp.eq.u32 p1, r3, 0; @p1 bra SPIN;
    ld.global.u32 r4, [d0];
    END:
    """
    memory = np.zeros(64, np.uint32)
    done = run(body, memory, threads=1, grid=2, settings=dataclasses.replace(PLAIN, races=True, quantum=1), cooperative=True)
    assert {report.kind for report in done.reports} == {"race.global"}


@pytest.mark.parametrize("ordered", [False, True])
def test_a_release_publishes_other_warps_stores_only_behind_a_barrier(ordered):
    """Warp 1 stores, warp 0 releases: without bar.sync between, "
    "the store may still be in the buffer when the other program acquires."""
    wait = "bar.sync 0;" if ordered else "L: ld.volatile.global.u32 r7, [d0 + 256]; setp.eq.u32 p3, r7, 0; @p3 bra L;"
    body = f"""
    mov.u32 r0, %ctaid.x; setp.eq.u32 p0, r0, 0; @!p0 bra READER;
    setp.eq.u32 p2, tid, 32; @p2 st.global.u32 [d0], 42; @p2 red.global.gpu.relaxed.add.u32 [d0 + 256], 1;
    {wait}
    setp.eq.u32 p1, tid, 0; @p1 atom.global.gpu.release.exch.b32 r2, [d0 + 64], 1; bra END;
    READER: SPIN: ld.acquire.gpu.global.u32 r3, [d0 + 64]; setp.eq.u32 p1, r3, 0; @p1 bra SPIN;
    ld.global.u32 r4, [d0]; st.global.u32 [d0 + 192], r4;
    END:
    """
    memory = np.zeros(96, np.uint32)
    settings = dataclasses.replace(PLAIN, weak=True, quantum=3, flush=0)
    body = body.replace("st.global.u32 [d0], 42", "st.global.u32 [d0], r30").replace(
        "mov.u32 r0, %ctaid.x;", "mov.u32 r0, %ctaid.x; mov.u32 r30, 42;"
    )
    run(body, memory, threads=64, grid=2, settings=settings, cooperative=True)
    assert memory[48] == (42 if ordered else 0)
