"""The machine's memory, atomics, copies and matrices, instruction by instruction, against what the PTX ISA says.

Needs g++, not Triton.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.package.instructions import PLAIN, REGISTER, THREADS, address, bf16_of, integers, lanes, of_bf16, run, same

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
        address(a, 0) + "ld.global.s8 r1, [at]; ld.global.u8 r2, [at]; mul.wide.u32 at, tid, 8; add.u64 at, at, d1; "
        "st.global.v2.b32 [at], {r1, r2};"
    )
    run(body, a, out)
    assert (out == np.stack([a.view(np.int8), a], 1)).all()


def test_predicated_memory():
    """Lanes that are off touch nothing, wherever their addresses point."""
    a, out = integers(np.uint32), np.zeros(THREADS, np.uint32)
    body = "setp.lt.u32 p0, tid, 100; mov.u32 r1, 9;" + address(a, 0) + "@!p0 mov.u64 at, 4; @p0 ld.global.u32 r1, [at];"
    run(body + address(out, 1) + "@!p0 add.u64 at, at, 1000000; @p0 st.global.u32 [at], r1;", a, out)
    same(out, np.where(np.arange(THREADS) < 100, a, 0).astype(np.uint32))


def test_bounds_and_alignment():
    a = np.zeros(THREADS, np.uint32)
    beyond = run(address(a, 0) + "ld.global.u32 r1, [at + 4];", a, check=False)
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
    body = address(a, 0) + f"ld.global.b{size} {register}30, [at];\n"
    if space == "shared":
        body += (
            f"setp.eq.u32 p0, tid, 0; ld.global.b{size} {register}31, [d2]; mov.u32 r0, memory; "
            f"@p0 st.shared.b{size} [r0], {register}31; bar.sync 0;\n"
        )
        body += f"atom.shared.{name} {register}32, [r0], {register}30; bar.sync 0; @p0 ld.shared.b{size} {register}33, [r0];"
        body += f"@p0 st.global.b{size} [d2], {register}33;\n"
    else:
        body += f"atom.global.gpu.relaxed.{name} {register}32, [d2], {register}30;\n"
    body += address(old, 1) + f"st.global.b{size} [at], {register}32;"
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
    load = address(a, 0) + "ld.global.b32 r30, [at];"
    store = address(old, 1) + "st.global.b32 [at], r31;"
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
