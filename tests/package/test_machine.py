"""The machine against torch: small Triton kernels, compiled, in a plain mode and with everything on that it can check."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests import machine

pytestmark = pytest.mark.compiled_only

MODES = {
    "plain": {},
    "checked": dict(quantum=3, races=True, weak=True, uninitialised=True, bank_conflicts=True),
}


@pytest.fixture(autouse=True, params=MODES)
def mode(request):
    torch.manual_seed(0)
    with machine.replaying(), machine.using(**MODES[request.param]):
        yield request.param


@triton.jit
def elementwise(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    b = tl.load(y + i, mask=i < n, other=1.0).to(tl.float32)
    r = tl.exp(a) * 0.5 + tl.log(tl.abs(b) + 1.0) - tl.sqrt(tl.abs(a)) / (1.0 + b * b) + tl.sigmoid(a) + tl.floor(b)
    tl.store(out + i, r.to(out.dtype.element_ty), mask=i < n)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_elementwise(dtype, tolerance):
    x, y, out = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype), torch.empty(1000, dtype=dtype)
    elementwise[(4,)](x, y, out, 1000, BLOCK=256)
    a, b = x.float(), y.float()
    expected = a.exp() * 0.5 + (b.abs() + 1).log() - a.abs().sqrt() / (1 + b * b) + a.sigmoid() + b.floor()
    torch.testing.assert_close(out.float(), expected.to(dtype).float(), rtol=tolerance, atol=tolerance)


@triton.jit
def reductions(x, out, where, N: tl.constexpr):
    row = tl.program_id(0)
    v = tl.load(x + row * N + tl.arange(0, N))
    tl.store(out + row * 3, tl.sum(v))
    tl.store(out + row * 3 + 1, tl.max(v))
    tl.store(out + row * 3 + 2, tl.min(v))
    tl.store(where + row, tl.argmax(v, 0))


@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_reductions(num_warps):
    x, out, where = torch.randn(5, 1024), torch.empty(5, 3), torch.empty(5, dtype=torch.int32)
    reductions[(5,)](x, out, where, N=1024, num_warps=num_warps)
    expected = torch.stack([x.sum(1), x.max(1).values, x.min(1).values], 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    assert where.tolist() == x.argmax(1).tolist()


GPU_IR = """#linear = #ttg.linear<{register = [], lane = LANES, warp = [], block = []}>
module attributes {"ttg.num-ctas" = 1 : i32, "ttg.num-warps" = 1 : i32, ttg.target = "cuda:80", "ttg.threads-per-warp" = 32 : i32} {
  tt.func public @largest(%x: !tt.ptr<i32>, %out: !tt.ptr<i32>) {
    %place = tt.make_range {end = 8 : i32, start = 0 : i32} : tensor<8xi32, LAYOUT>
    %base = tt.splat %x : !tt.ptr<i32> -> tensor<8x!tt.ptr<i32>, LAYOUT>
    %at = tt.addptr %base, %place : tensor<8x!tt.ptr<i32>, LAYOUT>, tensor<8xi32, LAYOUT>
    %values = tt.load %at : tensor<8x!tt.ptr<i32>, LAYOUT>
    %max = "tt.reduce"(%values) <{axis = 0 : i32}> ({
    ^bb0(%a: i32, %b: i32):
      %larger = arith.maxsi %a, %b : i32
      tt.reduce.return %larger : i32
    }) : (tensor<8xi32, LAYOUT>) -> i32
    tt.store %out, %max : !tt.ptr<i32>
    tt.return
  }
}
"""


@pytest.mark.parametrize(
    ("lanes", "layout", "gap"),
    [
        ("[[1], [2], [4], [0], [0]]", "#linear", False),
        ("[[0], [0], [2], [4], [1]]", "#linear", False),
        ("[[2], [4], [0], [0], [1]]", "#linear", True),
        ("[[2, 0], [4, 0], [0, 1], [0, 2], [1, 0]]", "#ttg.slice<{dim = 1, parent = #linear}>", True),
        ("[[0, 1], [0, 2], [0, 4], [1, 0], [2, 0]]", "#ttg.slice<{dim = 0, parent = #linear}>", False),
    ],
)
def test_a_reduction_over_lanes_with_copies_between_is_refused(lanes, layout, gap, tmp_path):
    """Compiled all the same, it takes the largest of half of the elements in each half of the warp, before Triton 3.9."""
    text = GPU_IR.replace("LAYOUT", layout).replace("LANES", lanes)
    assert len(machine.reductions.over_gaps(text)) == gap
    (tmp_path / "largest.ttgir").write_text(text)

    def compiled():
        return triton.compile(str(tmp_path / "largest.ttgir"), options=dict(num_warps=1))

    if machine.reductions.wrong(text):
        with pytest.raises(machine.MachineError, match="compiles these reductions wrongly"):
            compiled()
    else:
        assert "largest" in compiled().asm["ptx"]


@triton.jit
def follow(next_ptr, out_ptr, ALIAS: tl.constexpr, PAIR: tl.constexpr, FOR: tl.constexpr):
    """Steps along a list. ALIAS, or PAIR together with it: a variable holds before the loop what another one holds."""
    node = tl.zeros((), tl.int32)
    child = tl.zeros((), tl.int32)
    if ALIAS:
        child = node
    pair = (node, node + 1)
    if PAIR:
        node = child + 2
    if FOR:
        for _ in range(tl.load(next_ptr)):
            node = child
            child = tl.load(next_ptr + child)
    else:
        while child < 8:
            if PAIR:
                pair = (child, pair[1])
            else:
                node = child
            child = tl.load(next_ptr + child)
    tl.store(out_ptr, node + pair[0])


@pytest.mark.parametrize(
    ("alias", "pair", "counted", "dropped"),
    [
        (False, False, False, None),
        (False, True, False, None),
        (True, False, False, "node"),
        (True, False, True, "node"),
        (True, True, False, "pair"),
    ],
)
def test_a_loop_that_drops_a_variable_is_refused(alias, pair, counted, dropped):
    follows, out = torch.tensor([3, 0, 0, 9], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def launch():
        follow[(1,)](follows, out, ALIAS=alias, PAIR=pair, FOR=counted)

    if dropped is None:
        launch()
        assert int(out) == (5 if pair else 3)
    else:
        with pytest.raises(machine.DroppedCarry, match=rf"\d+ {dropped}$"):
            launch()


@triton.jit
def cumulative_sum(x, out, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, tl.cumsum(tl.load(x + i), 0))


def test_cumulative_sum():
    x = torch.randint(-100, 100, (3, 2048))
    out = torch.empty_like(x)
    cumulative_sum[(3,)](x, out, N=2048)
    assert torch.equal(out, x.cumsum(1))


@triton.jit
def sorting(x, out, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, tl.sort(tl.load(x + i)))


def test_sort():
    x = torch.randn(3, 512)
    out = torch.empty_like(x)
    sorting[(3,)](x, out, N=512)
    assert torch.equal(out, x.sort(1).values)


@triton.jit
def product(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, B_ROWS: tl.constexpr,
            SCALED: tl.constexpr):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :])
        if SCALED:  # through registers
            x = (x * 2.0).to(x.dtype)
        if B_ROWS:
            y = tl.load(b + (start + k)[:, None] * N + n[None, :])
        else:
            y = tl.load(b + (start + k)[:, None] + n[None, :] * K)
        total += tl.dot(x, y, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], total)


PRODUCTS = {
    "bf16": (torch.bfloat16, "tf32", 1e-4), "fp16": (torch.float16, "tf32", 1e-4), "tf32": (torch.float32, "tf32", 3e-2),
    "ieee": (torch.float32, "ieee", 1e-4), "tf32x3": (torch.float32, "tf32x3", 1e-4),
}  # fmt: skip


def _check_product(kind, num_warps, stages, m=32, n=64, block=32, b_rows=True, scaled=False):
    dtype, precision, tolerance = PRODUCTS[kind]
    depth = 128
    a, b, c = torch.randn(m, depth).to(dtype), torch.randn(depth, n).to(dtype), torch.empty(m, n)
    given = b if b_rows else b.T.contiguous()
    how = dict(M=m, N=n, BLOCK=block, PRECISION=precision, B_ROWS=b_rows, SCALED=scaled, num_warps=num_warps, num_stages=stages)
    product[(1,)](a, given, c, depth, **how)
    expected = (a * 2 if scaled else a).float() @ b.float()
    torch.testing.assert_close(c, expected, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize(("num_warps", "stages"), [(4, 3), (8, 1)])
def test_product(kind, num_warps, stages):
    _check_product(kind, num_warps, stages)


# Large enough for wgmma, where the architecture has it: rows of 32, 64 and 128 bytes, either operand either way round, a from registers.
@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32"])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("b_rows", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_large_product(kind, block, b_rows, scaled):
    _check_product(kind, 4, 2, m=64, n=64 if block < 64 else 128, block=block, b_rows=b_rows, scaled=scaled)


@triton.jit
def integer_product(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros([M, N], tl.int32)
    for start in range(0, K, BLOCK):
        total += tl.dot(tl.load(a + m[:, None] * K + (start + k)[None, :]), tl.load(b + (start + k)[:, None] * N + n[None, :]))
    tl.store(c + m[:, None] * N + n[None, :], total)


def test_integer_product():
    a, b = torch.randint(-128, 127, (32, 128), dtype=torch.int8), torch.randint(-128, 127, (128, 64), dtype=torch.int8)
    c = torch.empty(32, 64, dtype=torch.int32)
    integer_product[(1,)](a, b, c, 128, M=32, N=64, BLOCK=64)
    assert torch.equal(c, a.int() @ b.int())


@triton.jit
def atomics(x, cells, histogram, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0)
    tl.atomic_add(histogram + v, 1, mask=i < n)
    tl.atomic_max(cells, tl.max(v))
    tl.atomic_add(cells + 1, 1)
    tl.atomic_xor(cells + 2, tl.program_id(0))
    tl.atomic_cas(cells + 3, 0, tl.program_id(0) + 1)


def test_atomics():
    x = torch.randint(0, 17, (3000,), dtype=torch.int32)
    cells, histogram = torch.zeros(4, dtype=torch.int32), torch.zeros(17, dtype=torch.int32)
    atomics[(12,)](x, cells, histogram, 3000, BLOCK=256)
    assert torch.equal(histogram, torch.bincount(x, minlength=17).int())
    assert (cells[0], cells[1], cells[2]) == (x.max(), 12, 0) and 1 <= cells[3] <= 12


@triton.jit
def collatz(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v, steps = tl.load(x + i), tl.zeros([BLOCK], tl.int32)
    while tl.max(v) > 1:
        steps += (v > 1).to(tl.int32)
        v = tl.where(v > 1, tl.where(v % 2 == 1, 3 * v + 1, v // 2), v)
    tl.store(out + i, steps)


def test_while():
    x, out = torch.arange(1, 257), torch.empty(256, dtype=torch.int32)
    collatz[(1,)](x, out, BLOCK=256)

    def steps(n):
        return 0 if n <= 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    assert out.tolist() == [steps(n) for n in x.tolist()]


@triton.jit
def integers(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n)
    tl.store(out + i, (v // 7 + v % 5 + (v >> 1)) ^ (v * 3), mask=i < n)


def test_integers():
    x = torch.randint(0, 1 << 30, (777,))
    out = torch.empty_like(x)
    integers[(4,)](x, out, 777, BLOCK=256)
    assert torch.equal(out, (x // 7 + x % 5 + (x >> 1)) ^ (x * 3))


@triton.jit
def eight_bits(x, out, rounded, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(out + i, v.to(tl.float32))
    tl.store(rounded + i, v.to(tl.bfloat16))


def test_eight_bit_floats():
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2)
    out, rounded = torch.empty(256), torch.empty(256, dtype=torch.bfloat16)
    eight_bits[(1,)](x, out, rounded, N=256)
    finite = x.float().isfinite()
    assert torch.equal(out[finite], x.float()[finite]) and torch.equal(rounded.float()[finite], x.float()[finite])


@triton.jit
def gathered(x, index, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.gather(tl.load(x + i), tl.load(index + i), 0))


def test_gather():
    x, index, out = torch.randn(256), torch.randint(0, 256, (256,), dtype=torch.int32), torch.empty(256)
    gathered[(1,)](x, index, out, N=256)
    assert torch.equal(out, x[index.long()])


@triton.jit
def random_numbers(out, seed, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.rand(seed, tl.arange(0, N)))


def test_random_numbers():
    out = torch.empty(4096)
    random_numbers[(1,)](out, 7, N=4096)
    assert 0 <= out.min() and out.max() < 1 and abs(out.mean() - 0.5) < 0.02


# --- what it is for -----------------------------------------------------------------------------------------------------


@triton.jit
def exchange(x, scratch, arrived, out, P: tl.constexpr, N: tl.constexpr, ORDERED: tl.constexpr, VOLATILE: tl.constexpr):
    """Programs write their part of scratch, wait for each other, and read their neighbour's."""
    p = tl.program_id(0)
    i = p * N + tl.arange(0, N)
    other = (p + 1) % P * N + tl.arange(0, N)
    if not VOLATILE:  # brings lines into L1
        tl.store(out + P * N + i, tl.load(scratch + other))
    tl.store(scratch + i, tl.load(x + i) * 2)
    if ORDERED:
        tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release" if ORDERED else "relaxed")
    while tl.atomic_add(arrived, 0, sem="acquire" if ORDERED else "relaxed") < P:
        pass
    if ORDERED:
        tl.debug_barrier()
    tl.store(out + i, tl.load(scratch + other, volatile=VOLATILE))


def _exchange(ordered=True, volatile=True, num_warps=4) -> bool:
    """Whether every program read what its neighbour wrote."""
    programs, size = 4, 128
    x, scratch, out = torch.randn(programs, size), torch.zeros(programs * size), torch.zeros(2 * programs * size)
    arrived = torch.zeros(1, dtype=torch.int32)
    how = dict(P=programs, N=size, ORDERED=ordered, VOLATILE=volatile, num_warps=num_warps, launch_cooperative_grid=True)
    exchange[(programs,)](x, scratch, arrived, out, **how)
    return torch.equal(out[: programs * size], x.roll(-1, 0).reshape(-1) * 2)


@pytest.mark.parametrize("volatile", [False, True])
@pytest.mark.parametrize("num_warps", [1, 4])
def test_exchange(volatile, num_warps):
    for _ in range(5):
        with machine.using(races=machine.settings.races and volatile):  # reading the old values is a race, by design
            assert _exchange(volatile=volatile, num_warps=num_warps)


def test_stale_reads_are_seen():
    """Without fences some runs read old values."""
    with machine.using(races=False, weak=True, quantum=10):
        assert not all(_exchange(ordered=False) for _ in range(10))


def test_races_are_seen():
    with (
        machine.using(races=True),
        pytest.raises(machine.MachineError, match=r"race.global: .*test_machine.py:\d+.*test_machine.py:\d+"),
    ):
        _exchange(ordered=False)


@triton.jit
def beyond(x, out, n):
    tl.store(out + tl.arange(0, 64), tl.load(x + n + tl.arange(0, 64)))


def test_bounds():
    with pytest.raises(machine.MachineError, match="bounds: read of .* 4 bytes past the end of one of 256 bytes"):
        beyond[(1,)](torch.randn(64), torch.empty(64), 4)


@triton.jit
def endless(cell):
    while tl.atomic_add(cell, 0) == 0:
        pass


def test_livelock():
    with machine.using(stall=100000), pytest.raises(machine.MachineError, match="no progress"):
        endless[(1,)](torch.zeros(1, dtype=torch.int32))


def test_counters():
    x, y, out = torch.randn(1024), torch.randn(1024), torch.empty(1024)
    elementwise[(4,)](x, y, out, 1024, BLOCK=256)
    launch = machine.launches[-1]
    got = launch.counters
    # 4096 bytes each are read twice and written once, in sectors of 32 bytes; the storages may begin within one.
    assert 256 <= got["distinct_read_sectors"] <= 258 and 128 <= got["distinct_written_sectors"] <= 129
    assert (got["load_bytes"], got["store_bytes"], got["races"], got["races_unchecked"]) == (8192, 4096, 0, 0)
    assert got["warp_instructions"] == sum(launch.run.warp_classes.values()) and launch.run.warp_classes["st.global"] >= 8
