"""Cost tables: curves to tables by hand, and JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st

import dspark_kernels as dk
from dspark_kernels import checks, cost, types
from dspark_kernels.cost import CostTable
from reference.schedule import StepCost

TICK = 2.0**-10  # sums of a few ticks are exact


def table_of(sizes, ticks, **rules):
    """The entries in ticks of a curve in ticks. A power of two, so nothing is rounded on the way."""
    table = CostTable.from_curve(sizes, [TICK * value for value in ticks], **rules)
    return [value / TICK for value in table.seconds.tolist()]


def test_one_class_under_three_names():
    assert dk.CostTable is types.CostTable is cost.CostTable
    assert issubclass(CostTable, checks.Checked) and issubclass(types.VerifyLayout, checks.Checked)


# --- from a curve to a table ----------------------------------------------------------------------


def test_a_curve_by_hand():
    table = CostTable.from_curve([1, 2, 4, 8], [0.125, 0.25, 0.375, 0.875])
    assert (8 * table.seconds).tolist() == [0.0, 1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert table.seconds.dtype == torch.float32 and table.draft_seconds is None and table.info is None


def test_flat_below_the_first_size():
    assert table_of([3, 5], [2.0, 6.0]) == [0.0, 2.0, 2.0, 2.0, 4.0, 6.0]


def test_a_step_function_up_to_the_largest_captured_size():
    have = table_of([1, 2, 4, 8, 12], [1.0, 2.0, 4.0, 16.0, 20.0], captured=[2, 4, 8])
    assert have == [0.0, 2.0, 2.0, 4.0, 4.0, 16.0, 16.0, 16.0, 16.0, 17.0, 18.0, 19.0, 20.0]


def test_captured_sizes_that_were_not_measured_are_read_off_the_curve():
    # The curve: 2 up to size 2, then 1 more per row. Graphs of 1, 4 and 6 rows.
    have = table_of([2, 10, 12], [2.0, 10.0, 16.0], captured=[1, 4, 6])
    assert have == [0.0, 2.0, 4.0, 4.0, 4.0, 6.0, 6.0, 7.0, 8.0, 9.0, 10.0, 13.0, 16.0]


def test_every_size_captured_and_none():
    sizes, seconds = [1, 4, 6], [1.0, 2.0, 5.0]
    assert table_of(sizes, seconds, captured=sizes) == [0.0, 1.0, 2.0, 2.0, 2.0, 5.0, 5.0]
    assert table_of(sizes, seconds, captured=[]) == table_of(sizes, seconds)


def test_a_single_size():
    assert table_of([1], [3.0]) == [0.0, 3.0]
    assert table_of([4], [3.0]) == table_of([4], [3.0], captured=[4]) == [0.0, 3.0, 3.0, 3.0, 3.0]


def test_a_jagged_curve_stays_jagged():
    assert table_of([1, 2, 3, 5], [5.0, 3.0, 9.0, 1.0]) == [0.0, 5.0, 3.0, 9.0, 5.0, 1.0]


def between_fp32(seconds):
    """A double just above the middle of two fp32 numbers: an error in its last bits decides which of them it becomes."""
    low = np.float32(seconds)
    return math.nextafter((float(low) + float(np.nextafter(low, np.float32(100)))) / 2, math.inf)


@given(st.floats(1e-7, 1.0).map(between_fp32), st.sets(st.integers(1, 400), min_size=1))
def test_a_flat_curve_is_exactly_flat(seconds, sizes):
    sizes = sorted(sizes)
    assert len(set(table_of(sizes, [seconds] * len(sizes))[1:])) == 1


@given(
    st.dictionaries(st.integers(1, 300), st.floats(1e-6, 10.0).map(between_fp32), min_size=1, max_size=20),
    st.sets(st.integers(1, 300), max_size=10),
)
def test_curves_equal_numpy(curve, captured):
    sizes = sorted(curve)
    seconds = [curve[n] for n in sizes]
    captured = sorted(n for n in captured if n <= sizes[-1])
    rows = np.arange(1, sizes[-1] + 1)
    padded = np.array([next((n for n in captured if n >= row), row) for row in rows])
    have = table_of(sizes, seconds, captured=captured)
    assert len(have) == sizes[-1] + 1
    np.testing.assert_allclose(have[1:], np.interp(padded, sizes, seconds), rtol=2e-7)
    # A measured size that no graph pads has its own time, to the bit.
    for n in sizes:
        if padded[n - 1] == n:
            assert have[n] == np.float32(curve[n])


def test_draft_curve():
    table = CostTable.from_curve(
        [1, 2, 4], [0.25, 0.5, 1.0], draft_sizes=[1, 3], draft_seconds=[0.125, 0.375], captured=[4], info={"by": "hand"}
    )
    assert table.draft_seconds.tolist() == [0.0, 0.125, 0.25, 0.375]  # not padded: `captured` is about target steps
    assert table.seconds.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert table.info == {"by": "hand"}


def test_tensors_and_numpy_scalars_make_a_curve():
    want = CostTable.from_curve([1, 3], [0.5, 1.0]).seconds.tolist()
    assert CostTable.from_curve(torch.tensor([1, 3]), torch.tensor([0.5, 1.0])).seconds.tolist() == want
    assert CostTable.from_curve(range(1, 4, 2), (np.float64(0.5), 1)).seconds.tolist() == want


def test_devices():
    curve = dict(sizes=[1, 2], seconds=[0.1, 0.2], draft_sizes=[1], draft_seconds=[0.1], info={"n": 1})
    for table in (CostTable.from_curve(**curve, device="meta"), CostTable.from_curve(**curve).to("meta")):
        assert {table.seconds.device.type, table.draft_seconds.device.type} == {"meta"}
        assert table.info == {"n": 1} and table.seconds.shape == (3,)
    assert CostTable.from_curve([1], [1.0]).to("meta").draft_seconds is None
    # A curve is checked on the host, whatever device the table is for.
    with pytest.raises(ValueError, match="seconds"):
        CostTable.from_curve([1], [-1.0], device="meta")


def test_beyond_the_table():
    """The documented rule, as the reference reads tables, in units of 100 ns."""

    def units(*args, at, **rules):
        step = StepCost(CostTable.from_curve(*args, **rules), 0)
        return [step(rows) for rows in at]

    ms = 1e-3
    assert units([1, 2, 4], [1 * ms, 2 * ms, 4 * ms], at=(4, 5, 9)) == [40_000, 50_000, 90_000]
    assert units([1, 2], [2 * ms, 1 * ms], at=(2, 3, 9)) == [10_000] * 3  # ends falling
    assert units([1], [2 * ms], at=(1, 2, 9)) == [20_000] * 3
    # What from_curve warns of: graphs up to the last size, against one size above them.
    assert units([1, 4, 8], [1 * ms, 2 * ms, 4 * ms], captured=[4, 8], at=(8, 9, 99)) == [40_000] * 3
    assert units([1, 4, 8], [1 * ms, 2 * ms, 4 * ms], captured=[4], at=(4, 8, 9)) == [20_000, 40_000, 45_000]


NAN, INF = math.nan, math.inf
FINITE = "expected finite, positive seconds from entry 1 on"
LONG = "expected at most 1.678 seconds (2^24 - 1 units of 100 ns, all that the scheduler tells apart)"


@pytest.mark.parametrize(
    "sizes, seconds, rules, error, message",
    [
        ([], [], {}, ValueError, "sizes: expected at least one size, got none"),
        ([1, 2], [1.0], {}, ValueError, "seconds: expected 2 times, one per size, got 1"),
        ([1], [1.0, 2.0], {}, ValueError, "seconds: expected 1 times, one per size, got 2"),
        ([2, 1], [1.0, 1.0], {}, ValueError, "sizes[1]: expected more than 2, the size before it, got 1"),
        ([1, 3, 3], [1.0] * 3, {}, ValueError, "sizes[2]: expected more than 3"),
        ([0, 1], [1.0, 1.0], {}, ValueError, "sizes[0]: expected >= 1, got 0"),
        ([-1], [1.0], {}, ValueError, "sizes[0]: expected >= 1, got -1"),
        ([1.5], [1.0], {}, TypeError, "sizes[0]: expected an int, got float"),
        ([True], [1.0], {}, TypeError, "sizes[0]: expected an int, got bool"),
        (4, [1.0], {}, TypeError, "sizes: expected a sequence of numbers, got int"),
        ("12", [1.0, 1.0], {}, TypeError, "sizes: expected a sequence of numbers, got str"),
        ([1], 1.0, {}, TypeError, "seconds: expected a sequence of numbers, got float"),
        ([1, 2], [1.0, NAN], {}, ValueError, "seconds[1]: expected finite, positive seconds (fp32), got nan"),
        ([1], [INF], {}, ValueError, "seconds[0]: expected finite, positive seconds (fp32), got inf"),
        ([1], [0.0], {}, ValueError, "seconds[0]: expected finite, positive"),
        ([1], [-1.0], {}, ValueError, "seconds[0]: expected finite, positive"),
        ([1], [1e39], {}, ValueError, "seconds[0]: expected finite, positive"),
        ([1, 2], [1.6, 2], {}, ValueError, f"seconds[1]: {LONG}, got 2 seconds; did you give milliseconds?"),
        ([1], [1.67772155], {}, ValueError, f"seconds[0]: {LONG}, got 1.67772 seconds; did you"),
        ([1], [1.0], dict(draft_sizes=[1], draft_seconds=[3.5]), ValueError, f"draft_seconds[0]: {LONG}, got 3.5 seconds; did"),
        (
            [1],
            [1.0],
            dict(draft_sizes=[1], draft_seconds=[0.7]),
            ValueError,
            f"CostTable.draft_seconds: {LONG}, got 1 seconds for the longest step and 0.7 seconds for drafting; did you give",
        ),
        ([1], [1e-46], {}, ValueError, "seconds[0]: expected finite, positive"),
        ([1], ["1"], {}, ValueError, "seconds[0]: expected finite, positive seconds (fp32), got '1'"),
        ([1], [True], {}, ValueError, "seconds[0]: expected finite, positive"),
        ([1], [1.0], dict(captured=[2]), ValueError, "captured: expected sizes up to 1, the last measured one, got 2"),
        ([4], [1.0], dict(captured=[2, 1]), ValueError, "captured[1]: expected more than 2"),
        ([4], [1.0], dict(captured=[0]), ValueError, "captured[0]: expected >= 1"),
        ([4], [1.0], dict(captured=4), TypeError, "captured: expected a sequence"),
        ([1], [1.0], dict(draft_sizes=[1]), ValueError, "draft_seconds: expected together with draft_sizes, got None"),
        ([1], [1.0], dict(draft_seconds=[1.0]), ValueError, "draft_sizes: expected together with draft_seconds"),
        ([1], [1.0], dict(draft_sizes=[], draft_seconds=[]), ValueError, "draft_sizes: expected at least one size"),
        ([1], [1.0], dict(draft_sizes=[1], draft_seconds=[0.0]), ValueError, "draft_seconds[0]: expected finite"),
        ([1], [1.0], dict(draft_sizes=[1], draft_seconds=[]), ValueError, "draft_seconds: expected 1 times"),
        ([1], [1.0], dict(info="by hand"), TypeError, "CostTable.info: expected Mapping, got str"),
        ([1], [1.0], dict(info={"a": NAN}), ValueError, "CostTable.info: expected plain JSON values"),
        ([1], [1.0], dict(info={"a": torch.zeros(1)}), ValueError, "CostTable.info: expected plain JSON values"),
        ([1], [1.0], dict(info={"a": [(1, 2)]}), ValueError, "CostTable.info: expected plain JSON values"),
        ([1], [1.0], dict(info={1: 2}), ValueError, "CostTable.info: expected plain JSON values"),
    ],
)
def test_refused_curves(sizes, seconds, rules, error, message):
    with pytest.raises(error) as caught:
        CostTable.from_curve(sizes, seconds, **rules)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "seconds, drafts, error, message",
    [
        (torch.tensor([0.0, 2.0, NAN]), None, ValueError, f"CostTable.seconds: {FINITE}, got nan at entry 2"),
        (torch.tensor([0.0, INF]), None, ValueError, f"CostTable.seconds: {FINITE}, got "),
        (torch.tensor([0.0, 0.0]), None, ValueError, f"CostTable.seconds: {FINITE}, got "),
        (torch.tensor([0.0, 1.0, 1.7, 5.0]), None, ValueError, f"CostTable.seconds: {LONG}, got 1.7 seconds at entry 2; did you give"),
        (torch.ones(2), torch.tensor([0.0, 8.0]), ValueError, f"CostTable.draft_seconds: {LONG}, got 8 seconds at entry 1; did you"),
        (torch.ones(2), torch.ones(2), ValueError, f"CostTable.draft_seconds: {LONG}, got 1 seconds for the longest step and 1"),
        (torch.tensor([0.0]), None, ValueError, "CostTable.seconds: expected at least 2 entries, got 1"),
        (torch.zeros(2, 2), None, ValueError, "CostTable.seconds: expected shape [B_max+1]"),
        (torch.ones(2).double(), None, TypeError, "CostTable.seconds: expected dtype float32"),
        (torch.ones(4)[::2], None, ValueError, "CostTable.seconds: expected a contiguous tensor"),
        (torch.ones(2), torch.tensor([1.0, -1.0]), ValueError, f"CostTable.draft_seconds: {FINITE}, got -1.0 at entry 1"),
        (torch.ones(2), torch.ones(1), ValueError, "CostTable.draft_seconds: expected at least 2 entries"),
        (torch.ones(2), torch.ones(2, device="meta"), ValueError, "CostTable.draft_seconds: expected a tensor on cpu"),
    ],
)  # fmt: skip
def test_refused_tables(seconds, drafts, error, message):
    with pytest.raises(error) as caught:
        CostTable(seconds, drafts)
    assert str(caught.value).startswith(message)


def test_the_longest_step():
    """2^24 - 1 units of 100 ns, to the unit; half a unit more is refused. The cost is then read exactly."""
    limit, cells = 2**24 - 1, ((2**24 - 1) / 1e7, (2**24 - 0.6) / 1e7)
    for seconds in cells:
        assert StepCost(CostTable.from_curve([1], [seconds]), 0)(1) == limit
    CostTable(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.677]))
    with pytest.raises(ValueError):
        CostTable.from_curve([1], [(2**24 - 0.5) / 1e7])


def test_entry_0_is_no_measurement():
    for zeroth in (NAN, INF, -1.0, 0.0):
        CostTable(torch.tensor([zeroth, 1.0]), torch.tensor([zeroth, 0.5]))


# --- JSON -----------------------------------------------------------------------------------------


def bits(table):
    return None if table is None else table.view(torch.int32).tolist()


# Positive fp32 numbers by their bits: up to 1 second, up to half a second, and the largest that a table holds.
ONE, HALF, LONGEST = (torch.tensor(seconds).view(torch.int32).item() for seconds in (1.0, 0.5, (2**24 - 1) * 1e-7))


@given(st.lists(st.integers(1, ONE), min_size=1), st.none() | st.lists(st.integers(1, HALF), min_size=1))
@example([LONGEST], None)
def test_json_round_trip_is_bit_exact(tmp_path_factory, seconds, drafts):
    """Every fp32 number that a table holds, by its bits, the subnormal ones too."""

    def floats(patterns):
        return torch.tensor([0, *patterns], dtype=torch.int32).view(torch.float32)

    info = {"device": "Größe", "sizes": [1, 2], "triton": None, "nested": {"a": 0.1, "b": True}}
    table = CostTable(floats(seconds), None if drafts is None else floats(drafts), info)
    file = tmp_path_factory.getbasetemp() / "table.json"
    table.save(file)
    loaded = CostTable.load(str(file))
    assert bits(loaded.seconds) == bits(table.seconds) and bits(loaded.draft_seconds) == bits(table.draft_seconds)
    assert loaded.info == info and loaded.seconds.dtype == torch.float32


@pytest.mark.parametrize("zeroth", [0.0, -1.0, 0.25, NAN, INF])
def test_entry_0_round_trip(tmp_path, zeroth):
    CostTable(torch.tensor([zeroth, 1.0]), torch.tensor([1.0, 0.5])).save(tmp_path / "t.json")
    loaded = CostTable.load(tmp_path / "t.json")
    have = loaded.seconds[0].item()
    assert have == zeroth or (math.isnan(have) and not math.isfinite(zeroth))
    assert loaded.seconds[1] == 1.0 and loaded.draft_seconds.tolist() == [1.0, 0.5] and loaded.info is None


def test_what_the_file_holds(tmp_path):
    CostTable.from_curve([1, 2], [0.1, 0.25], info={"clock": "none"}).save(tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text()
    assert json.loads(text) == {
        "format": "dspark_kernels cost table",
        "version": 1,
        "seconds": [0.0, float(np.float32(0.1)), 0.25],
        "draft_seconds": None,
        "info": {"clock": "none"},
    }
    assert repr(float(np.float32(0.1))) in text and "NaN" not in text
    assert CostTable.load(tmp_path / "t.json", device="meta").seconds.device.type == "meta"


GOOD = {"format": cost.FORMAT, "version": 1, "seconds": [None, 0.25, 0.5], "draft_seconds": [0.0, 1.0], "info": None}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(format="something else"), "format: expected 'dspark_kernels cost table', got 'something else'"),
        (dict(format=None), "format: expected"),
        (dict(version=2), "version: expected 1, got 2"),
        (dict(seconds=...), "seconds: expected this field, found none"),
        (dict(info=...), "info: expected this field, found none"),
        (dict(draft_second=[0.0, 1.0]), "draft_second: expected the fields"),
        (dict(seconds=None), "seconds: expected a list, got NoneType"),
        (dict(seconds=3.0), "seconds: expected a list, got float"),
        (dict(seconds=[]), "seconds: expected at least 2 entries, got 0"),
        (dict(seconds=[0.0]), "seconds: expected at least 2 entries, got 1"),
        (dict(draft_seconds=[]), "draft_seconds: expected at least 2 entries, got 0"),
        (dict(seconds=[0.0, 1.0, NAN]), "seconds[2]: expected finite, positive seconds (fp32), got nan"),
        (dict(seconds=[0.0, INF]), "seconds[1]: expected finite, positive seconds (fp32), got inf"),
        (dict(seconds=[0.0, 0.0]), "seconds[1]: expected finite, positive"),
        (dict(seconds=[0.0, -1.0]), "seconds[1]: expected finite, positive"),
        (dict(seconds=[0.0, 10**400]), "seconds[1]: expected finite, positive"),
        (dict(seconds=[0.0, 1e-50]), "seconds[1]: expected finite, positive"),
        (dict(seconds=[0.0, 1.0, 12.5]), f"seconds[2]: {LONG}, got 12.5 seconds; did you give milliseconds?"),
        (dict(seconds=[0.0, None]), "seconds[1]: expected finite, positive seconds (fp32), got None"),
        (dict(seconds=[0.0, "1"]), "seconds[1]: expected finite, positive"),
        (dict(seconds=[0.0, [1.0]]), "seconds[1]: expected finite, positive"),
        (dict(seconds=[NAN, 1.0]), "seconds[0]: expected a finite number or null, got nan"),
        (dict(seconds=["", 1.0]), "seconds[0]: expected a finite number or null, got ''"),
        (dict(draft_seconds=[0.0, -1.0]), "draft_seconds[1]: expected finite, positive"),
        (dict(info=[1]), "CostTable.info: expected Mapping, got list"),
        (dict(info={"a": INF}), "CostTable.info: expected plain JSON values"),
    ],
)
def test_refused_files(tmp_path, change, message):
    file = tmp_path / "t.json"
    file.write_text(json.dumps(GOOD))
    assert CostTable.load(file).seconds.tolist()[1:] == [0.25, 0.5]
    file.write_text(json.dumps({k: v for k, v in {**GOOD, **change}.items() if v is not ...}))
    with pytest.raises(ValueError) as caught:
        CostTable.load(file)
    assert str(caught.value).startswith(f"{file}: {message}")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "expected JSON, got a file that does not parse"),
        (b"\xff\xfe\x00", "expected JSON, got a file that does not parse"),
        (b"[" * 100_000, "expected JSON, got a file that does not parse"),
        (b"version https://git-lfs.github.com/spec/v1", "expected JSON, got a file that does not parse"),
        (b"[0.0, 1.0]", "expected a JSON object, got list"),
        (b'{"sizes": [1], "seconds": [0.0, 1.0]}', "format: expected 'dspark_kernels cost table', got None"),
    ],
)
def test_foreign_files(tmp_path, content, message):
    file = tmp_path / "t.json"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        CostTable.load(file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_every_truncation_is_refused(tmp_path):
    file = tmp_path / "t.json"
    CostTable.from_curve([1, 3], [0.5, 1.0], info={"a": 1}).save(file)
    text = file.read_text().rstrip()
    for length in range(len(text)):
        file.write_text(text[:length])
        with pytest.raises(ValueError, match="expected JSON"):
            CostTable.load(file)


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json: no such file"):
        CostTable.load(tmp_path / "absent.json")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        CostTable.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder"):
        CostTable.from_curve([1], [1.0]).save(tmp_path / "folder" / "t.json")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    file, info = tmp_path / "t.json", {"a": 1}
    table = CostTable.from_curve([1], [1.0], info=info)
    table.save(file)
    info["a"] = NAN
    with pytest.raises(ValueError):
        table.save(file)
    assert CostTable.load(file).info == {"a": 1}
