"""The machine's control flow, lanes and registers, instruction by instruction, against what the PTX ISA says.

Needs g++, not Triton.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.machine import core
from tests.package.instructions import PLAIN, THREADS, address, integers, lanes, run, same

# --- lanes of a warp ----------------------------------------------------------------------------------------------------


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
    run(body + address(out, 1) + "st.global.u32 [at], r2;", cell, out, threads=32)
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
    done = run(body + address(out, 0) + "st.global.b32 [at], r10;", out, module=module, shared=4 * THREADS, settings=settings)
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
    done = run(body + address(out, 0) + "st.global.b32 [at], r10;", out, settings=dataclasses.replace(PLAIN, races=True), **how)
    assert {report.kind for report in done.reports} == {"race.shared"}
    done = run(
        body + address(out, 0) + "st.global.b32 [at], r10;", out, settings=dataclasses.replace(PLAIN, uninitialised=True), **how
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
