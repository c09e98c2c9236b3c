"""What the tests of the machine's instructions share: a kernel around a few lines of PTX, and values at the edges of each type.

Needs g++, not Triton.
"""

from __future__ import annotations

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


def address(array, base):
    return f"mul.wide.u32 at, tid, {array.itemsize}; add.u64 at, at, d{base};\n"


def apply(opcode, result, *sources, extra=""):
    """opcode on every thread's values of `sources`, as an array of the type `result`; bool is a predicate."""
    sources = [np.ascontiguousarray(source) for source in sources]
    out = np.zeros(len(sources[0]), np.uint32 if result is bool else result)
    body, names = "", []
    for i, source in enumerate(sources):
        name = f"{REGISTER[source.itemsize]}{FIRST + i}"
        body += address(source, i)
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
    body += address(out, len(sources)) + f"st.global.b{8 * out.itemsize} [at], {kind}10;\n"
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


def bf16_of(x):
    """float32 -> bfloat16 bits, to the nearest, ties to even."""
    x = np.ascontiguousarray(x, np.float32)
    u = x.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FFF, (u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def of_bf16(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def lanes(body, *arrays, threads=THREADS, **how):
    """`body` on arrays loaded to r0, r1, ...; what it leaves in r10 by thread."""
    out = np.zeros(threads, np.uint32)
    loads = "".join(address(x, i) + f"ld.global.b32 r{i}, [at];\n" for i, x in enumerate(arrays))
    run(loads + body + address(out, len(arrays)) + "st.global.b32 [at], r10;", *arrays, out, threads=threads, **how)
    return out
