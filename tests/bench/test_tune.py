"""bench.tune with stand-ins for compiler and clock: steps, predictions, what may replace an entry, resuming; and a real compile."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bench.shared import timing
from bench.tune import __main__ as job, binaries, entries, explaining, search, steps
from bench.tune.binaries import Binary
from bench.tune.kernels import KERNELS, case_bytes
from dspark_kernels.launch import arch, table
from dspark_kernels.launch.table import Entry

SM_90, GFX942 = arch.KNOWN["sm_90"], arch.KNOWN["gfx942"]
GOOD = Binary(64, 0, 1024, 232448, 4, "3")
SPACE = dict(block=(64, 128, 256), num_warps=(2, 4))
OWN = dict(block=128, num_warps=4, other=1)


def test_a_step_changes_one_parameter():
    found = steps.steps(OWN, SPACE | {"absent": (1, 2)})
    assert found == [OWN | {"block": 64}, OWN | {"block": 256}, OWN | {"num_warps": 2}]


@pytest.mark.parametrize(
    "gpu, registers, shared, warps, resident",
    [
        ("sm_90", 255, 0, 8, 1),  # 65536 / (256 * 256)
        ("sm_90", 128, 0, 8, 2),
        ("sm_90", 40, 0, 4, 12),  # 65536 / (40 * 128)
        ("sm_90", 16, 0, 8, 8),  # 64 warps
        ("sm_86", 16, 0, 8, 6),  # 48 warps
        ("sm_90", 32, 100 * 1024, 4, 2),  # 228 KB
        ("sm_90", 32, 120 * 1024, 4, 1),
        ("gfx942", 128, 0, 4, 4),  # 4 wavefronts on each of 4 SIMD units
        ("gfx942", 64, 32 * 1024, 4, 2),
    ],
)
def test_resident_programs(gpu, registers, shared, warps, resident):
    known = arch.KNOWN[gpu]
    assert Binary(registers, 0, shared, known.shared_memory, warps, "").resident(known) == resident


def test_a_prediction_is_bandwidth_or_what_is_on_the_way():
    size = 48_000_000
    enough = binaries.predicted(size, 10**6, GOOD, SM_90)
    assert math.isclose(enough, 1e6 * size / binaries.BANDWIDTH["sm_90"])
    wanted = binaries.BANDWIDTH["sm_90"] * binaries.LATENCY / (SM_90.multiprocessors * GOOD.resident(SM_90))
    assert math.isclose(binaries.predicted(size, int(wanted) // 2, GOOD, SM_90), 2 * enough, rel_tol=1e-3)
    assert set(binaries.BANDWIDTH) == set(arch.KNOWN)


def key(config):
    return config["block"], config["num_warps"]


def searched(times, binaries=None, most=9, deadline=math.inf, own=OWN):
    """Search with these medians by (block, warps); every configuration timed."""
    asked = []

    def time_of(config):
        asked.append(key(config))
        return times.get(key(config))

    def binary_of(configs):
        return [(binaries or {}).get(key(config), GOOD) for config in configs]

    found = search.search(Entry({}, own, {}), SPACE, binary_of, time_of, lambda c, b: c["block"], most, deadline)
    return found, asked


def test_the_search_goes_on_from_the_best():
    times = {(128, 4): 10.0, (64, 4): 12.0, (256, 4): 8.0, (128, 2): 9.0, (256, 2): 6.0, (64, 2): 1.0}
    (best, least, own, timed), asked = searched(times)
    assert key(best) == (256, 2) and (least, own) == (6.0, 10.0) and best["other"] == 1
    assert asked[:4] == [(128, 4), (64, 4), (128, 2), (256, 4)] and timed == len(asked) == len(set(asked)) and (64, 2) not in asked


def test_only_what_is_clearly_faster_replaces_an_entry():
    for time, kept in ((9.8, True), (9.6, False)):
        (best, *_), _ = searched({(128, 4): 10.0, (64, 4): time})
        assert (best == OWN) == kept


def test_what_spills_does_not_fit_or_is_wrong_is_out():
    import dataclasses

    worse = {
        (64, 4): dataclasses.replace(GOOD, spills=4), (256, 4): dataclasses.replace(GOOD, shared=10**6),
        (128, 2): None,
    }  # fmt: skip
    (best, least, own, timed), asked = searched({(128, 4): 10.0, (64, 4): 1.0, (256, 4): 1.0, (128, 2): 1.0}, worse)
    assert best == OWN and asked == [(128, 4)]
    (best, least, own, _), _ = searched({(128, 4): None, (64, 4): 5.0})  # the entry itself is red: anything right is better
    assert key(best) == (64, 4) and own is None
    (best, least, _, _), _ = searched({})
    assert least is None


def test_the_search_takes_the_best_predictions_and_ends_in_time():
    times = {(128, 4): 10.0}
    assert searched(times, most=1)[1] == [(128, 4), (64, 4)]
    assert searched(times, deadline=-1.0)[1] == [(128, 4)]


# --- tables -----------------------------------------------------------------------------------------------------------

TABLE = {
    "schedule": (
        Entry(dict(candidates=512, rows=1024), dict(block=512, sort=2048, num_warps=4, max_registers=255), {}),
        Entry(dict(candidates=512, rows=512), dict(block=256, sort=2048, num_warps=4, max_registers=255), {}),
    ),
    "layout": (Entry(dict(requests=256), dict(block=128, num_warps=4), {}),),
    "plan": (Entry(dict(requests=256), dict(block=128, num_warps=4), {}),),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("sm_90", "sm_80"):
        entries.write(tmp_path / f"{name}.json", name, TABLE)
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    return tmp_path


def done(binary):
    return lambda *given: SimpleNamespace(result=lambda: binary)


def tools(times, log=None):
    def timer(kernel, shape, config):
        (log if log is not None else []).append((kernel, tuple(shape.values()), config["block"]))
        return times(kernel, config)

    return SimpleNamespace(submit=done(GOOD), timer=timer, facts=lambda: {"gpu": "Fake", "commit": "abc"})


def test_a_table_is_read_as_it_was_written(folder):
    assert table.read(folder / "sm_90.json") == TABLE
    lines = (folder / "sm_90.json").read_text().splitlines()
    assert sum('"shape"' in line for line in lines) == 4  # one line per entry


def test_tuning_writes_each_entry_as_it_goes_and_resumes(folder, capsys):
    path, log = folder / "out.json", []

    def times(kernel, config):
        if kernel == "layout":
            raise KeyboardInterrupt
        return 5.0 if config["block"] == 128 else 10.0

    kernels = ["layout", "schedule", "plan"]
    with pytest.raises(KeyboardInterrupt):
        search.tune("sm_90", SM_90, kernels, path, tools(times, log), 9, math.inf)
    assert log[0] == ("schedule", (512, 512), 256)  # the most important first
    (later, first), (layout,) = (table.read(path)[name] for name in ("schedule", "layout"))
    assert first.config["block"] == later.config["block"] == 128 and layout == TABLE["layout"][0]
    record = first.why["time"]
    assert (record["us"], record["us_before"], record["gpu"], record["commit"]) == (5.0, 10.0, "Fake", "abc")
    assert first.why["compiled"]["registers"] == 64 and record["source"] == timing.source_digest(tables=False)
    assert table.read(folder / "sm_90.json") == TABLE  # only the file asked for
    log.clear()
    assert search.tune("sm_90", SM_90, kernels, path, tools(lambda *_: 3.0, log), 9, math.inf) == 0
    assert {kernel for kernel, *_ in log} == {"layout"}
    out = capsys.readouterr().out
    assert "[1/4] schedule candidates 512, rows 512: timed before" in out and "plan requests 256: no case to time" in out
    assert "5.00 us, 10.00 us before" in out and "block 256 -> 128" in out


def test_without_time_or_a_right_result_entries_stay_and_that_is_said(folder, capsys):
    path = folder / "out.json"
    assert search.tune("sm_90", SM_90, ["layout"], path, tools(lambda *_: 1.0), 9, -1.0) == 1 and not path.exists()
    assert search.tune("sm_90", SM_90, ["layout"], path, tools(lambda *_: None), 9, math.inf) == 1 and not path.exists()
    out = capsys.readouterr().out
    assert "no time left" in out and "no configuration equals the reference" in out


def test_a_gpu_without_a_table_starts_from_its_familys(folder):
    path = folder / "sm_91.json"
    other = SM_90.__class__("sm_91", SM_90.shared_memory, 10)
    assert search.tune("sm_91", other, ["layout"], path, tools(lambda *_: 1.0), 2, math.inf) == 0
    assert table.read(path)["schedule"] == TABLE["schedule"] and json.loads(path.read_text())["gpu"] == "sm_91"


def test_explaining_changes_reasons_only(folder, capsys):
    timed = {"us": 3.0, "gpu": "Fake"}
    entries.write(
        folder / "sm_90.json", "sm_90", TABLE | {"layout": (Entry(**vars(TABLE["layout"][0]) | {"why": {"time": timed}}),)}
    )
    assert explaining.explain(["sm_90", "sm_80"], ["layout", "schedule"], folder, done(GOOD), False) == 0
    for name in ("sm_90", "sm_80"):
        found = table.read(folder / f"{name}.json")
        assert {k: [(e.shape, e.config) for e in v] for k, v in found.items()} == {
            k: [(e.shape, e.config) for e in v] for k, v in TABLE.items()
        }
        assert found["layout"][0].why["compiled"]["registers"] == 64 and found["plan"][0].why == {}
        assert found["layout"][0].why["time"] == (timed if name == "sm_90" else "not measured")
    spilling = Binary(255, 8, 0, 100, 4, "3")
    assert explaining.explain(["sm_90"], ["layout"], folder, done(spilling), False) == 1
    out = capsys.readouterr().out
    assert "no times were taken" in out and "SPILLS OR TOO LARGE: 8 bytes" in out


def test_predictions_rank_and_change_nothing(folder, capsys):
    def submit(kernel, shape, config, name):
        return done(Binary(64, 8 if config["block"] == 512 else 0, 0, 100, config["num_warps"], "3"))()

    assert explaining.explain(["sm_90"], ["layout"], folder, submit, True) == 0
    out = capsys.readouterr().out
    listed = [line for line in out.splitlines() if line.startswith("    predicted")]
    assert len(listed) == 6 and "1 of 7 spill or do not fit" in out  # 3 other blocks, 3 other warps
    times = [float(line.split()[1]) for line in listed]
    assert times == sorted(times) and any("as it is" in line for line in listed)
    assert table.read(folder / "sm_90.json")["layout"][0].config == TABLE["layout"][0].config


# --- the command ------------------------------------------------------------------------------------------------------


def test_every_kernel_of_the_tables_can_be_tuned():
    for name in arch.KNOWN:
        entries = table.read(table.FOLDER / f"{name}.json")
        assert set(entries) <= set(KERNELS)
        for kernel, found in entries.items():
            for entry in found:
                assert set(KERNELS[kernel].space) <= set(entry.config), (name, kernel)
                assert KERNELS[kernel].flight(entry.shape, entry.config) > 0
                assert case_bytes(kernel, entry.shape) >= 0


@pytest.mark.parametrize("kernel", ["layout", "schedule", "attention"])
def test_the_case_that_is_timed_asks_for_the_entry(kernel, monkeypatch):
    """With the entry's own shape, or a size no doubling away, so that a trial is of what the entry is for."""

    for entry in table.read(table.FOLDER / "sm_90.json")[kernel]:
        spec = KERNELS[kernel].spec(entry.shape)
        if kernel == "layout":
            assert spec.requests == entry.shape["requests"]
        elif kernel == "schedule":
            assert spec.requests * 8 == entry.shape["candidates"]
        elif spec is not None:
            rows = spec.rows * spec.query_heads // spec.kv_heads
            assert (rows, spec.head_dim) == (entry.shape["block_m"], entry.shape["head"])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_entries_are_compiled_and_no_times_taken(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.tune", "--arch", "sm_90", "--kernel", "layout", "--jobs", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=timing.ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[2/2] sm_90 layout requests 1024: " in done.stdout and "no times were taken" in done.stdout
    found, committed = (table.read(path / "sm_90.json")["layout"] for path in (tmp_path, table.FOLDER))
    for new, old in zip(found, committed, strict=True):
        assert (new.shape, new.config) == (old.shape, old.config)
        assert new.why["compiled"]["report"].startswith("fixed_layout r")  # found, not compiled again
        if new.why["compiled"]["triton"] == old.why["compiled"]["triton"]:
            assert new.why == old.why


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--most", "0"], "--most: expected more than 0, got 0"),
        (["--seconds", "-1"], "--seconds: expected more than 0, got -1"),
        (["--out", "/no/such/folder"], "--out: expected a folder that exists, got /no/such/folder"),
        (["--arch", "sm_1"], "argument --arch: invalid choice"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, message, capsys):
    assert job.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.tune: {message}") and error.count("\n") == 1
