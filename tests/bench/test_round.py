"""bench.round: a round against the reference, into given memory, with a stand-in clock; bytes, shares and the report."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

import dspark_kernels as dk
from bench.round import __main__ as job, ops, report, work
from bench.shared import measure, timing
from bench.shared.cases.tensors import tensors
from bench.shared.round_ops import DECISIONS, GRAPH, OPS, SUM

pytest.importorskip("triton")

CPU = torch.device("cpu")
SMALL = dataclasses.replace(ops.Sizes(2).small(), layers=1)
ENGINE = report.Engine(None, 2.0, 1e9, 4e9)


def test_bytes_grow_with_what_they_count():
    one, many = ops.Sizes(1).bytes(), ops.Sizes(64).bytes()
    assert set(one) == set(OPS)
    w2 = 7 * 151936 * 256 * 2
    assert w2 < one["draft_block"] < 1.02 * w2  # W2 once per position is nearly all of it
    keys = 36 * 64 * 2048 * 8 * 128 * 2 * 2
    assert keys < many["tree_attention"] < 1.05 * keys
    assert ops.Sizes(1, layers=72).bytes()["tree_attention"] == 2 * one["tree_attention"]
    assert 64 * 8 * 151936 * 2 < many["accept_chain"] < 1.2 * 64 * 8 * 151936 * 2


def test_models_are_modelled_where_no_time_is_given():
    backbone, target = ENGINE.times(ops.Sizes(1), 4e12)
    assert (backbone, target) == (1e3 * 2e9 / 4e12, 2.0)
    many, _ = ENGINE.times(ops.Sizes(256), 4e12)  # products, not weights
    assert math.isclose(many, 1e3 * 2e9 * 256 * 7 / (0.6 * 989e12))
    assert ENGINE.words() == "models: target as given, backbone MODELLED from 1e+09 parameters"
    assert "MODELLED" not in report.Engine(1.0, 2.0, 1, 1).words()


def test_shares_of_a_round():
    rows = report.predicted(ops.Sizes(1), 4e12, report.Engine(0.3, 0.5, 1, 1))
    by = {row.op: row for row in rows}
    total = by[SUM].predicted_us
    assert math.isclose(total, sum(by[op].predicted_us for op in OPS))
    assert math.isclose(by[SUM].share_of_round, total / (total + 800))
    assert by[SUM].launches == 40 and by["tree_attention"].launches == 36
    text = "\n".join(report.lines(rows))
    few = 1 / (1 - sum(by[op].share_of_round for op in DECISIONS))
    assert f"{1 / (1 - total / (total + 800)):.2f} times as fast if no op took time, {few:.2f} if attention alone did" in text
    assert "(predicted)" in text and "measured" not in text


@pytest.fixture(scope="module")
def given():
    return ops.make(SMALL, CPU)


def test_a_round_equals_the_reference():
    assert ops.check(SMALL, CPU) == 3 + SMALL.layers


def with_fault(op, corrupt):
    """The ops, of which one corrupts its result."""
    right = getattr(dk, op)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        corrupt(result)
        return result

    names = (*OPS,)
    return SimpleNamespace(**{name: wrong if name == op else getattr(dk, name) for name in names})


@pytest.mark.parametrize(
    "op, corrupt",
    [
        ("draft_block", lambda block: block.tokens.add_(1)),
        ("schedule_prefixes", lambda layout: layout.positions.add_(1)),
        ("tree_attention", lambda out: out.mul_(1.1)),
        ("accept_chain", lambda result: result.num_accepted.add_(1)),
    ],
)
def test_a_corrupted_result_is_found(op, corrupt):
    with pytest.raises(AssertionError):
        ops.check(SMALL, CPU, with_fault(op, corrupt))


def test_what_a_round_writes_into_given_memory_is_compared(given, monkeypatch):
    """As a captured graph does; and `measure` compares what it captured before it takes a time."""
    again, want = ops.into_memory(dk, SMALL, given)
    ops.same(again, want, again, given)

    def late():
        again()
        again.results["accept_chain"].next_token[0] += 1

    with pytest.raises(AssertionError, match="accept_chain: a round into given memory"):
        ops.same(again, want, late, given)
    monkeypatch.setattr(ops, "into_memory", lambda *_: (again, want))
    bench = dataclasses.replace(bench_of([]), capture=lambda call: late)
    with pytest.raises(AssertionError, match="accept_chain: a round into given memory"):
        ops.measure(SMALL, bench)
    assert all(
        tensor.data_ptr() == kept.data_ptr()
        for op in ("draft_block", "schedule_prefixes", "accept_chain")
        for tensor, kept in zip(*(tensors(r) for r in (again.results[op], again._into[op])), strict=True)
    )


class Clock:
    """A stand-in: each call takes as many microseconds as there were calls."""

    now = 0

    def mark(self):
        self.now += 1
        return self.now

    def microseconds(self, start, end):
        return 100.0 * (end - start)

    def wait(self):
        pass

    busy = wait


MACHINE = timing.Machine("Stand-in GPU", "1", "2", "3", "abc", l2_bytes=1000)


class Quick:
    """A round that does nothing."""

    results: dict = {}

    def __call__(self):
        pass

    def __getattr__(self, op):
        assert op in OPS
        return self


def bench_of(captured):
    def capture(call):
        captured.append(call)
        return call

    return measure.Bench(
        device=CPU, clock=Clock(), machine=MACHINE, bandwidth=1e9, samples=2, baselines=(), small=False, capture=capture, facts=dict
    )


def test_times_are_reported_with_predictions_beside(tmp_path, monkeypatch, capsys):
    captured, path = [], tmp_path / "round.csv"
    monkeypatch.setattr(work, "check", lambda sizes, device: 5)
    monkeypatch.setattr(timing, "WARMUP", 0)
    sizes = [dataclasses.replace(SMALL, requests=n) for n in (2, 1)]
    monkeypatch.setattr(ops, "into_memory", lambda ops, sizes, given: (Quick(), {}))
    monkeypatch.setattr(ops, "same", lambda *_: None)
    assert work.report(sizes, report.Engine(0.1, 0.2, 1, 1), bench_of(captured), path) == 0
    assert len(captured) == 2 * 6  # each op, and all of them
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["op"] for row in rows] == [*OPS, SUM, GRAPH] * 2
    assert {row["gpu"] for row in rows} == {"Stand-in GPU"} and {row["commit"] for row in rows} == {"abc"}
    by = {row["op"]: row for row in rows[:7]}
    assert (by["draft_block"]["p50_us"], by[SUM]["p50_us"], by[GRAPH]["p50_us"]) == ("100", "500", "100")
    assert by[GRAPH]["share_of_round"] == "0.25" and float(by["draft_block"]["predicted_us"]) > 0
    out = capsys.readouterr().out
    assert "25.0% all ops" in out and "(measured)" in out and "if no op took time" in out
    # Run again: the same rows are replaced, others stay.
    assert work.report(sizes[:1], report.Engine(0.1, 0.2, 1, 1), bench_of([]), path) == 0
    with open(path, newline="") as file:
        assert len(list(csv.DictReader(file))) == 14


def test_a_wrong_round_gives_no_time_and_hides_no_other(tmp_path, monkeypatch, capsys):
    def measured(sizes, bench):
        if sizes.requests == 2:
            raise AssertionError("deliberate")
        return {op: timing.Timing(1.0, 2.0, 3.0, 4) for op in (*OPS, GRAPH)}

    monkeypatch.setattr(work, "check", lambda sizes, device: 5)
    monkeypatch.setattr(work, "measure", measured)
    path = tmp_path / "round.csv"
    assert work.report([SMALL, dataclasses.replace(SMALL, requests=1)], ENGINE, bench_of([]), path) == 1
    assert "R = 2: RED: deliberate" in capsys.readouterr().out
    with open(path, newline="") as file:
        assert {row["requests"] for row in csv.DictReader(file)} == {"1"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_predicts_compares_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(ops.Sizes, "small", lambda self: dataclasses.replace(SMALL, requests=1))
    assert job.main(["--requests", "1,64", "--target-ms", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("MODELLED, not measured: bytes at 4300 GB/s") and "R = 64, K = 7" in out
    assert "target as given, backbone MODELLED" in out and "[1/1] small round, R = 1: 4 calls equal the reference" in out
    assert out.endswith("no times were taken\n")
    monkeypatch.setattr(work, "check", lambda *_: (_ for _ in ()).throw(AssertionError("deliberate")))
    assert job.main(["--requests", "1"]) == 1
    assert "RED: deliberate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--requests", "0"], "--requests: expected numbers from 1 to 1024, got 0"),
        (["--requests", "a"], "--requests: expected whole numbers with commas between them, got 'a'"),
        (["--layers", "0"], "--layers: expected at least 1, got 0"),
        (["--target-ms", "-1"], "--target-ms: expected a number above 0, got -1"),
        (["--bandwidth", "nan"], "--bandwidth: expected a number above 0, got nan"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, message, capsys):
    assert job.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.round: {message}") and error.count("\n") == 1
