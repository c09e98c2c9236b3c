"""The repaired interpreter against torch, and that each repair is one: the stock interpreter fails the same check."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from dspark_kernels.testing import interpreter

pytestmark = pytest.mark.skipif(not interpreter.interpreting(), reason="kernels are compiled in this process")

EDGES = [
    0.0, -0.0, 1.0, -1.5, 3.140625, 1.00390625, 1.01171875, -1.00390625, 65504.0, 3.4e38, -3.4e38, 1e-38, 1e-45, 447.0,
    448.0, 240.0, 57344.0, 0.001953125, 2**-7 * 1.5, 2**-9, 2**-10, 2**-16, 1.5 * 2**-16, float("inf"), -float("inf"),
    float("nan"),
]  # fmt: skip


def _numbers(count=4096):
    g = torch.Generator().manual_seed(0)
    count -= len(EDGES)
    wide = torch.randn(count, generator=g) * torch.exp2(torch.randint(-20, 20, (count,), generator=g))
    return torch.cat([torch.tensor(EDGES), wide])


def _same_bits(a, b):
    a, b = a.float(), b.float()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(
        a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()
    )  # fmt: skip


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


LOW = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", LOW)
def test_casts_round_to_nearest_even(dtype):
    x = _numbers()
    out = torch.zeros(x.shape, dtype=dtype)
    _cast[(1,)](x, out, x.numel())
    # torch does not saturate fp8, GPUs do.
    largest = torch.finfo(dtype).max
    want = (x if dtype == torch.bfloat16 else torch.where(x.isnan(), x, x.clamp(-largest, largest))).to(dtype)
    assert _same_bits(out, want)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("wider", [torch.float32, torch.float16, torch.float64])
def test_widening_is_exact(dtype, wider):
    bits = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
    x = bits.to(torch.uint8).view(dtype) if dtype.itemsize == 1 else bits.to(torch.uint16).view(dtype)
    out = torch.zeros(x.shape, dtype=wider)
    _cast[(1,)](x, out, x.numel())
    assert _same_bits(out, x.float().to(wider))


@triton.jit
def _to_int(x_ptr, out_ptr, back_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.int32))
    tl.store(back_ptr + i, i.to(tl.bfloat16))


def test_casts_between_bf16_and_integers():
    x = (torch.arange(512) * 0.75 - 100).bfloat16()
    out, back = torch.zeros(512, dtype=torch.int32), torch.zeros(512, dtype=torch.bfloat16)
    _to_int[(1,)](x, out, back, 512)
    assert torch.equal(out, x.int()) and torch.equal(back, torch.arange(512).bfloat16())


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + N + i, x * y)
    tl.store(out_ptr + 2 * N + i, x - y)
    tl.store(out_ptr + 3 * N + i, -x)
    tl.store(out_ptr + 4 * N + i, tl.abs(x))
    tl.store(out_ptr + 5 * N + i, tl.maximum(x, y))
    tl.store(out_ptr + 6 * N + i, tl.minimum(x, y))
    tl.store(out_ptr + 7 * N + i, tl.where(x > y, x, y * 2.0))
    tl.store(out_ptr + 8 * N + i, tl.clamp(x, y * 0.0 - 1.0, y * 0.0 + 1.0))
    tl.store(out_ptr + 9 * N + i, tl.where((x < y) | (x == y), x, y))


def test_bf16_arithmetic():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 1024, generator=g).bfloat16()
    out = torch.zeros(10, 1024, dtype=torch.bfloat16)
    _arithmetic[(1,)](x, y, out, 1024)
    want = [
        x + y, x * y, x - y, -x, x.abs(), torch.maximum(x, y), torch.minimum(x, y), torch.where(x > y, x, y * 2),
        x.clamp(-1, 1), torch.minimum(x, y),
    ]  # fmt: skip
    for i, row in enumerate(want):
        assert torch.equal(out[i], row), i


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a, b = tl.load(a_ptr + m * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n)
    tl.store(out_ptr + m * N + n, tl.dot(a, b, tl.dot(a, b)))


@pytest.mark.parametrize("dtype", LOW + [torch.float16])
def test_dot(dtype):
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(16, 32, generator=g).to(dtype), torch.randn(32, 16, generator=g).to(dtype)
    out = torch.zeros(16, 16)
    _dot[(1,)](a, b, out, 16, 16, 32)
    want = 2 * (a.double() @ b.double())
    assert (out - want).abs().max() <= 64 * 2**-24 * 2 * (a.double().abs() @ b.double().abs()).max()


@triton.jit
def _first_and_last(a_first, a_last, b_first, b_last):
    # Neither commutative nor idempotent: only the right order of operands gives the ends of the row.
    return a_first, b_last


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _reduce(x_ptr, out_ptr, low_ptr, ROWS: tl.constexpr, N: tl.constexpr):
    r, i = tl.arange(0, ROWS), tl.arange(0, N)
    x = tl.load(x_ptr + r[:, None] * N + i[None, :])
    first, last = tl.reduce((x, x), 1, _first_and_last)
    tl.store(out_ptr + r, first)
    tl.store(out_ptr + ROWS + r, last)
    tl.store(out_ptr + 2 * ROWS + r, tl.reduce(x, 1, _larger))
    tl.store(out_ptr + 3 * ROWS + r, tl.reduce(x, 1, _larger, keep_dims=True).reshape([ROWS]))
    tl.store(out_ptr + 4 * ROWS + i, tl.reduce(x, 0, _larger))
    tl.store(out_ptr + 4 * ROWS + N, tl.reduce(x, None, _larger))
    low = x.to(tl.bfloat16)
    tl.store(low_ptr + r, tl.reduce(low, 1, _plus))
    tl.store(low_ptr + ROWS + r, tl.max(low, axis=1))
    tl.store(low_ptr + 2 * ROWS + r, tl.sum(low, axis=1))


def test_reductions():
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-9, 9, (4, 32), generator=g).float()  # small integers: any order of sums is exact
    out, low = torch.zeros(16 + 32 + 1), torch.zeros(12, dtype=torch.bfloat16)
    _reduce[(1,)](x, out, low, 4, 32)
    top = x.amax(1)
    assert torch.equal(out, torch.cat([x[:, 0], x[:, -1], top, top, x.amax(0), x.amax().view(1)]))
    assert torch.equal(low.float(), torch.cat([x.sum(1), top, x.sum(1)]))


@triton.jit
def _segments(a_flag, a_sum, b_flag, b_sum):
    return a_flag | b_flag, tl.where(b_flag > 0, b_sum, a_sum + b_sum)


@triton.jit
def _scan(flag_ptr, x_ptr, out_ptr, ROWS: tl.constexpr, N: tl.constexpr):
    where = tl.arange(0, ROWS)[:, None] * N + tl.arange(0, N)[None, :]
    flag, x = tl.load(flag_ptr + where), tl.load(x_ptr + where)
    for axis in tl.static_range(2):
        _, forward = tl.associative_scan((flag, x), axis, _segments)
        tl.store(out_ptr + axis * ROWS * N + where, forward)
    tl.store(out_ptr + 2 * ROWS * N + where, tl.associative_scan(x, 1, _plus, reverse=True))
    tl.store(out_ptr + 3 * ROWS * N + where, tl.cumsum(x, axis=1))


def _segmented(flag, x):
    out = x.clone()
    for i in range(1, x.shape[1]):
        out[:, i] = torch.where(flag[:, i] > 0, x[:, i], out[:, i - 1] + x[:, i])
    return out


def test_scans():
    g = torch.Generator().manual_seed(4)
    flag, x = torch.randint(0, 2, (8, 32), generator=g), torch.randint(-9, 9, (8, 32), generator=g)
    out = torch.zeros(4, 8, 32, dtype=torch.int64)
    _scan[(1,)](flag, x, out, 8, 32)
    assert torch.equal(out[0], _segmented(flag.T, x.T).T) and torch.equal(out[1], _segmented(flag, x))
    assert torch.equal(out[2], x.flip(1).cumsum(1).flip(1)) and torch.equal(out[3], x.cumsum(1))


@triton.jit
def _loops(bound_ptr, out_ptr, n):
    total = tl.zeros((), tl.int64)
    for i in range(n):
        total += i.to(tl.int64)  # a loop variable is a tensor, as when compiled
    for i in range(0, tl.load(bound_ptr), 2):
        total += i.to(tl.int64) * 100
    for i in tl.range(tl.load(bound_ptr)):
        total += i.to(tl.int64) * 10000
    tl.store(out_ptr, total)


def test_loops_with_bounds_known_at_run_time():
    out = torch.zeros(1, dtype=torch.int64)
    _loops[(1,)](torch.tensor([6], dtype=torch.int32), out, 5)
    assert out.item() == 10 + 600 + 150000


@triton.jit
def _nan(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.maximum(x, 1.0))
    tl.store(out_ptr + N + i, tl.minimum(x, 1.0))


def test_minimum_and_maximum_ignore_nan():
    out = torch.zeros(2, 4)
    _nan[(1,)](torch.tensor([float("nan"), 0.5, 2.0, float("-inf")]), out, 4)
    assert out.tolist() == [[1.0, 1.0, 2.0, 1.0], [1.0, 0.5, 1.0, float("-inf")]]


@triton.jit
def _atomics(word_ptr, x_ptr, old_ptr, limit, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    keep = i < limit
    tl.store(old_ptr + i, tl.atomic_max(word_ptr + i % 2, x, mask=keep, sem="relaxed"))
    tl.store(old_ptr + N + i, tl.atomic_add(word_ptr + 2 + i * 0, x, mask=keep))
    tl.store(old_ptr + 2 * N + i, tl.atomic_min(word_ptr + 3 + i * 0, x, mask=keep))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint32, torch.int64, torch.uint64])
def test_masked_atomics_of_every_integer_type(dtype):
    large = torch.iinfo(dtype).max
    values = [large, large - 1, 3, 4, 0, large - 5, 1, 2]
    if dtype.is_signed:
        values[4] = torch.iinfo(dtype).min

    def make(numbers):
        bits = torch.tensor([n - 2**64 if n >= 2**63 else n for n in numbers], dtype=torch.int64)
        return bits.view(dtype) if dtype == torch.uint64 else bits.to(dtype)

    word, old = make([2, 3, 0, 5]), make([9] * 24)
    _atomics[(1,)](word, make(values), old, 6, 8)
    span = 2 ** (8 * dtype.itemsize)
    read = [int(n) % span for n in word.tolist()]
    kept = values[:6]
    assert read == [n % span for n in (max(2, *kept[0::2]), max(3, *kept[1::2]), sum(kept), min(5, *kept))]
    rows = [[int(n) % span for n in row] for row in old.view(3, 8).tolist()]
    assert [row[6:] for row in rows] == [[0, 0]] * 3, "a masked-out atomic returns 0"
    assert rows[0][:3] == [2, 3, large] and rows[1][:3] == [0, large, (2 * large - 1) % span]


@triton.jit
def _strided(out_ptr, x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    even, odd = tl.split(tl.reshape(tl.load(x_ptr + tl.arange(0, 2 * N)), [N, 2]))
    tl.store(out_ptr + i, even)
    tl.atomic_add(out_ptr + N + i, odd)
    tl.atomic_add(out_ptr + N + i, tl.broadcast_to(tl.load(x_ptr + 1 + tl.arange(0, 1)), [N]))
    tl.store(out_ptr + 2 * N + even, odd, mask=odd > 3)


def test_memory_operations_take_strided_and_broadcast_blocks():
    x = torch.tensor([0, 10, 1, 20, 2, 30, 3, 3])
    out = torch.zeros(12, dtype=torch.int64)
    _strided[(1,)](out, x, 4)
    assert out.tolist() == [0, 1, 2, 3, 20, 30, 40, 13, 10, 20, 30, 0]


@triton.jit
def _masks(x_ptr, y_ptr, flag_ptr, number_ptr, out_ptr, KIND: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if KIND == "loaded":
        mask = tl.broadcast_to(tl.load(flag_ptr), [N]) & (x > 3)
    elif KIND == "float":
        mask = (tl.load(y_ptr) > 0.25) & (x > 3)
    elif KIND == "integer":
        mask = (tl.load(x_ptr + 5) > 2) & (x > 3)
    elif KIND == "inverted":
        mask = ~tl.broadcast_to(tl.load(x_ptr + 5) < 2, [N]) & (x > 3)
    else:  # a compiler refuses these; the stock interpreter refuses them or not, as the version is
        mask = tl.load(number_ptr + i)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=mask, other=-1))
    if KIND != "numbers":
        tl.store(out_ptr + N + i, x, mask=mask)
        tl.store(out_ptr + 2 * N + i, mask.to(tl.int32))
    tl.store(out_ptr + 4 * N + i, tl.atomic_add(out_ptr + 3 * N + i, x, mask=mask))


@pytest.mark.parametrize("kind", ["loaded", "float", "integer", "inverted", "numbers"])
def test_masks_that_numpy_holds_as_numbers(kind):
    """Scalars that are broadcast into a mask: numbers to numpy, where what is true or false has its operands' type."""
    x, y = torch.arange(8, dtype=torch.int32), torch.tensor([0.5])
    flag, numbers = torch.tensor([True]), torch.tensor([0, 0, 0, 0, 2, 256, -1, 1], dtype=torch.int32)
    out = torch.zeros(5, 8, dtype=torch.int32)
    if kind == "numbers" and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        numbers = numbers != 0  # refused for atomics before it comes to memory
    _masks[(1,)](x, y, flag, numbers, out, kind, 8)
    kept = torch.where(x > 3, x, 0)
    assert out[0].tolist() == torch.where(x > 3, x, -1).tolist() and torch.equal(out[3], kept) and not out[4].any()
    if kind != "numbers":
        assert torch.equal(out[1], kept) and torch.equal(out[2], (x > 3).int())


@triton.jit
def _helper(x):
    y = 0
    for i in range(3):
        y += x * i
    return y


@triton.jit
def _nested(x_ptr, FUNCTION: tl.constexpr):
    tl.store(x_ptr, FUNCTION(tl.load(x_ptr)))


def test_a_launch_leaves_triton_as_it_was():
    before = {name: id(value) for name, value in vars(tl).items()}
    tensor = {name: id(value) for name, value in vars(tl.tensor).items()}
    x = torch.tensor([7])
    _nested[(1,)](x, _helper)
    assert x.item() == 21
    assert {name: id(value) for name, value in vars(tl).items()} == before
    assert {name: id(value) for name, value in vars(tl.tensor).items()} == tensor
    assert interpreter.repair(), "repairing again changes nothing"
    _nested[(1,)](x, _helper)
    assert x.item() == 63


@triton.jit
def _meet(counter_ptr, seen_ptr, value_ptr):
    """Everyone writes, all wait for all, everyone reads its neighbour."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(value_ptr + program, program * 10)
    tl.atomic_add(counter_ptr, 1, sem="release")
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < programs:
        pass
    tl.store(seen_ptr + program, tl.load(value_ptr + (program + 1) % programs))


def test_threads_run_the_programs_of_a_grid_together():
    counter, seen, value = (torch.zeros(n, dtype=torch.int32) for n in (1, 6, 6))
    with interpreter.threads(6):
        _meet[(6,)](counter, seen, value)
    assert seen.tolist() == [10, 20, 30, 40, 50, 0]
    with interpreter.threads(4), pytest.raises(Exception, match="6 programs does not fit 4 threads"):
        _meet[(6,)](counter, seen, value)
    with interpreter.threads(6, timeout=0.5), pytest.raises(Exception, match="did not all end within 0.5 s"):
        counter.fill_(-1000)
        _meet[(6,)](counter, seen, value)


@triton.jit
def _fails(counter_ptr):
    if tl.program_id(0) == 1:
        tl.static_assert(False, "deliberate")
    while tl.atomic_add(counter_ptr, 0) == 0:
        pass


def test_an_error_in_one_thread_ends_the_launch():
    with interpreter.threads(3), pytest.raises(Exception, match="deliberate"):
        _fails[(3,)](torch.zeros(1, dtype=torch.int32))


# What the checks above find without the repair: the same file, not repaired, in a fresh process. Reads past an array
# are not among them, because what those find is a matter of luck.
STOCK_FAILS = [
    "test_casts_round_to_nearest_even[dtype0]",
    "test_casts_round_to_nearest_even[dtype1]",
    "test_bf16_arithmetic",
    "test_dot[dtype0]",
    "test_reductions",
    "test_loops_with_bounds_known_at_run_time",
]


def test_the_stock_interpreter_fails_these_checks():
    here = Path(__file__).resolve()
    code = (
        "import sys; from dspark_kernels.testing import interpreter as i; i.repair = i.interpreting\n"
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    tests = [f"{here}::{name}" for name in STOCK_FAILS]
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "--tb=no", "-rA", "-p", "no:cacheprovider", *tests],
        cwd=here.parents[2], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    outcomes = [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR"))]
    assert outcomes == ["FAILED"] * len(STOCK_FAILS), done.stdout
