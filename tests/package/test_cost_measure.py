"""`cost.measure`: step functions timed by a clock that the tests move."""

from __future__ import annotations

import contextlib
import importlib.metadata

import numpy as np
import pytest
import torch

from dspark_kernels import cost
from dspark_kernels.cost import CostTable
from tests.package.test_cost import TICK

# --- measuring ------------------------------------------------------------------------------------


class Clock:
    """Stands still unless a step moves it. `calls` are the sizes in the order of the calls."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def step(self, ticks, label=""):
        """A step function; ticks(n, number of calls before this one) -> how long it takes."""

        def run(n):
            self.now += TICK * ticks(n, len(self.calls))
            self.calls.append(f"{label}{n}" if label else n)

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock.now)
    return clock


def test_measure_by_hand(clock):
    table = cost.measure(clock.step(lambda n, _: n + 1), [1, 3, 4], device="cpu")
    assert table.seconds.tolist() == [0.0, 2 * TICK, 3 * TICK, 4 * TICK, 5 * TICK]
    assert table.draft_seconds is None and table.seconds.device.type == "cpu"
    assert len(clock.calls) == 3 * (3 + 20)  # the defaults


def test_order_of_calls(clock):
    cost.measure(
        clock.step(lambda n, _: n), [1, 2, 5], draft_step=clock.step(lambda n, _: n, "d"), draft_sizes=[1, 4],
        device="cpu", warmup=2, repeats=3,
    )  # fmt: skip
    up = [1, 2, 5, "d1", "d4"]
    assert clock.calls == [1, 1, 2, 2, 5, 5, "d1", "d1", "d4", "d4", *up, *up[::-1], *up]


def test_a_steady_drift_is_the_same_for_every_size(clock):
    """A machine on which each call takes two ticks longer than the one before: 9 sizes, 10 rounds."""
    sizes = list(range(1, 10))
    table = cost.measure(clock.step(lambda n, call: 8 * n + 2 * call), sizes, device="cpu", warmup=0, repeats=10)
    # The mean of the call numbers 0..89 is 44.5, and each size has it.
    assert table.seconds[1:].tolist() == [(8 * n + 2 * 44.5) * TICK for n in sizes]


def test_an_outlier_does_not_move_the_median(clock):
    table = cost.measure(clock.step(lambda n, call: 10_000 if call == 4 else n), [1, 2], device="cpu", warmup=1, repeats=5)
    assert table.seconds.tolist() == [0.0, TICK, 2 * TICK]


def test_the_median_of_an_even_number_is_the_middle_of_two(clock):
    ticks = (1, 100, 2, 4)
    table = cost.measure(clock.step(lambda n, call: ticks[call]), [1], device="cpu", warmup=0, repeats=4)
    assert table.seconds[1] == 3 * TICK


def test_warmup_is_not_counted(clock):
    step = clock.step(lambda n, call: 1000 if call < 6 else n)  # compiling
    table = cost.measure(step, [1, 2], device="cpu", warmup=3, repeats=2)
    assert table.seconds.tolist() == [0.0, TICK, 2 * TICK]
    # Power: with one warm-up call less the first timing would show.
    clock.calls.clear()
    assert cost.measure(step, [1, 2], device="cpu", warmup=2, repeats=1).seconds[1] == 1000 * TICK


def test_the_smallest_measurement(clock):
    table = cost.measure(clock.step(lambda n, _: 7), [2], device="cpu", warmup=0, repeats=1)
    assert table.seconds.tolist() == [0.0, 7 * TICK, 7 * TICK] and clock.calls == [2]


def test_drafting_and_captured_sizes(clock):
    table = cost.measure(
        clock.step(lambda n, _: n), [1, 2, 4, 6], captured=[2, 4], draft_step=clock.step(lambda n, _: 10 * n),
        draft_sizes=range(1, 4, 2), device="cpu", repeats=4,
    )  # fmt: skip
    assert table.seconds.tolist() == [TICK * n for n in (0, 2, 2, 4, 4, 5, 6)]
    assert table.draft_seconds.tolist() == [TICK * n for n in (0, 10, 20, 30)]
    assert table.info["draft_sizes"] == [1, 3] and table.info["draft_medians"] == [10 * TICK, 30 * TICK]
    assert len(table.info["draft_p20"]) == len(table.info["draft_p80"]) == 2 and table.info["captured"] == [2, 4]


def test_progress(clock):
    seen = []
    cost.measure(
        clock.step(lambda n, _: n), [1, 2], draft_step=clock.step(lambda n, _: n), draft_sizes=[1], device="cpu",
        warmup=1, repeats=2, progress=lambda *counts: seen.append((*counts, len(clock.calls))),
    )  # fmt: skip
    assert seen == [(n, 9, n) for n in range(1, 10)]  # after each call, warm-up calls too


def test_progress_does_not_cost_time(clock):
    def progress(done, total):
        clock.now += 1000.0

    table = cost.measure(clock.step(lambda n, _: n), [1, 2], device="cpu", progress=progress)
    assert table.seconds.tolist() == [0.0, TICK, 2 * TICK]


def test_info(clock, tmp_path):
    ticks = {1: iter((1, 2, 3, 4, 5, 6)), 4: iter((10, 60, 20, 50, 30, 40))}
    table = cost.measure(clock.step(lambda n, _: next(ticks[n])), [1, 4], device="cpu", warmup=0, repeats=6)
    info = dict(table.info)
    assert info.pop("medians") == [3.5 * TICK, 35 * TICK]
    assert info.pop("p20") == pytest.approx([2 * TICK, 20 * TICK], rel=1e-12)
    assert info.pop("p80") == pytest.approx([5 * TICK, 50 * TICK], rel=1e-12)
    assert info.pop("date").endswith("+00:00")
    assert info.pop("device").startswith("cpu (")
    assert info.pop("python").startswith("3.")
    assert info.pop("triton") == cost._version("triton")
    assert info == {
        "torch": torch.__version__, "clock": "perf_counter", "warmup": 0, "repeats": 6, "sizes": [1, 4], "captured": [],
    }  # fmt: skip
    table.save(tmp_path / "t.json")
    assert CostTable.load(tmp_path / "t.json").info == table.info


def test_versions():
    assert cost._version("torch") == importlib.metadata.version("torch")
    assert cost._version("a-package-that-is-not-there") is None


def test_an_error_of_the_step_passes_through(clock):
    class Broken(Exception):
        pass

    def step(n):
        raise Broken

    with pytest.raises(Broken):
        cost.measure(step, [1], device="cpu")
    with pytest.raises(Broken):
        cost.measure(clock.step(lambda n, _: n), [1], draft_step=step, draft_sizes=[1], device="cpu")


def test_a_step_that_takes_no_time_is_refused(clock):
    with pytest.raises(ValueError, match=r"^step: expected a step that takes time, got a median of 0.0 s at size 2"):
        cost.measure(clock.step(lambda n, _: 2 - n), [1, 2], device="cpu")
    with pytest.raises(ValueError, match=r"^draft_step: expected a step that takes time"):
        cost.measure(clock.step(lambda n, _: n), [1], draft_step=clock.step(lambda n, _: 0), draft_sizes=[1], device="cpu")


def test_a_step_that_no_table_can_tell_is_refused(clock):
    """2048 ticks are 2 seconds."""
    with pytest.raises(ValueError, match=r"^step: expected a step of at most 1.678 seconds .*got a median of 2 s at size 2$"):
        cost.measure(clock.step(lambda n, _: 1024 * n), [1, 2], device="cpu")


@pytest.mark.parametrize(
    "rules, error, message",
    [
        (dict(step=3), TypeError, "step: expected a function, got int"),
        (dict(sizes=[]), ValueError, "sizes: expected at least one size"),
        (dict(sizes=[2, 2]), ValueError, "sizes[1]: expected more than 2"),
        (dict(sizes=5), TypeError, "sizes: expected a sequence"),
        (dict(draft_step=len), ValueError, "draft_sizes: expected together with draft_step, got None"),
        (dict(draft_sizes=[1]), ValueError, "draft_step: expected together with draft_sizes, got None"),
        (dict(draft_step=1, draft_sizes=[1]), TypeError, "draft_step: expected a function"),
        (dict(draft_step=len, draft_sizes=[0]), ValueError, "draft_sizes[0]: expected >= 1"),
        (dict(captured=[5]), ValueError, "captured: expected sizes up to 2"),
        (dict(warmup=-1), ValueError, "warmup: expected >= 0, got -1"),
        (dict(repeats=0), ValueError, "repeats: expected >= 1, got 0"),
        (dict(repeats=1.0), TypeError, "repeats: expected an int"),
        (dict(progress=True), TypeError, "progress: expected a function, got bool"),
        (dict(device="meta"), ValueError, "device: expected a CUDA device or 'cpu', got 'meta'"),
        (dict(device="nonsense"), ValueError, "device: expected a CUDA device or 'cpu', got 'nonsense'"),
        (dict(device="cuda:77"), ValueError, "device: expected one of the "),
    ],
)
def test_refused_measurements(clock, rules, error, message):
    arguments = dict(step=clock.step(lambda n, _: n), sizes=[1, 2], device="cpu") | rules
    with pytest.raises(error) as caught:
        cost.measure(**arguments)
    assert str(caught.value).startswith(message)
    assert clock.calls == [], "refused before anything ran"


def test_without_a_gpu_the_wall_clock_is_the_default(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cost.measure(clock.step(lambda n, _: n), [1]).info["clock"] == "perf_counter"


class FakeCuda:
    """A device with one queue: a step queues work and returns; events are queued too; synchronising runs the queue."""

    def __init__(self, monkeypatch):
        self.now, self.queue, self.log, self.devices = 0.0, [], [], []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self) if enable_timing else None)

    @contextlib.contextmanager
    def device(self, device):
        self.devices.append(str(device))
        yield
        self.devices.append("left")

    def synchronize(self):
        for work in self.queue:
            work()
        self.queue.clear()
        self.log.append("synchronize")

    def step(self, ticks):
        def work(n):
            self.now += TICK * ticks * n

        def run(n):
            self.log.append(n)
            self.queue.append(lambda: work(n))

        return run


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.cuda.log.append("event")
        self.cuda.queue.append(lambda: setattr(self, "at", self.cuda.now))

    def elapsed_time(self, end):
        return (end.at - self.at) * 1000  # milliseconds


def test_events_time_a_cuda_device(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    table = cost.measure(cuda.step(1), [1, 2], draft_step=cuda.step(5), draft_sizes=[1], device="cuda:1", warmup=1, repeats=2)
    assert table.seconds.tolist() == pytest.approx([0.0, TICK, 2 * TICK], rel=1e-7)
    assert table.draft_seconds.tolist() == pytest.approx([0.0, 5 * TICK], rel=1e-7)
    assert table.seconds.device.type == "cpu"
    assert table.info["clock"] == "cuda events" and table.info["device"] == "a GPU, cuda:1"
    # Every call between its two events, on a device that has finished the one before.
    want = [1, 2, 1, 1, 2, 1, 1, 2, 1]
    assert cuda.log == [entry for n in want for entry in ("event", n, "event", "synchronize")]
    assert cuda.devices == ["cuda:1", "left"]
    assert cost.measure(cuda.step(1), [1]).info["device"] == "a GPU, cuda"  # the default where there is a GPU


@pytest.mark.gpu
def test_a_matmul_on_a_gpu(device, tmp_path):
    weight = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    inputs = torch.randn(16384, 4096, device=device, dtype=torch.float16)
    table = cost.measure(lambda n: inputs[:n] @ weight, [1024, 4096, 16384], repeats=10)
    small, middle, large = table.info["medians"]
    # Four times the work: well over twice the time, and no unit of seconds mistaken for another.
    assert 0 < small and 2 * small < middle and 2 * middle < large < 1.0
    assert table.info["clock"] == "cuda events" and table.info["device"] == torch.cuda.get_device_name(device)
    assert all(low <= high for low, high in zip(table.info["p20"], table.info["p80"], strict=True))
    assert table.seconds[16384].item() == np.float32(large)
    table.to(device).save(tmp_path / "t.json")
    assert torch.equal(CostTable.load(tmp_path / "t.json", device=device).seconds, table.seconds.to(device))
    # A device table is not read when it is made, but before it is kept.
    with pytest.raises(ValueError, match="CostTable.seconds: expected finite, positive seconds"):
        CostTable(torch.tensor([0.0, -1.0], device=device)).save(tmp_path / "t.json")
