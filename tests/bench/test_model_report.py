"""bench.model's report is that of the code and not worse than the baseline; the command models a kernel again as it is
committed."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.model import machine

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "results" / "model"
REPORT, BASELINE = FOLDER / "h200.csv", FOLDER / "baseline.csv"


def _run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.model", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_is_that_of_the_code_and_not_worse_than_the_baseline():
    done = _run("--check")
    assert done.returncode == 0, f"run python -m bench.model\n{done.stdout}{done.stderr}"


def test_every_row_says_that_it_is_modelled():
    rows = _read(REPORT)
    assert {row["status"] for row in rows} == {"MODELLED"}
    # Nobody renamed a constant that a tile is counted from, and every hot part was found.
    assert {row["tile_from"] for row in rows} == {"constants"}
    assert {row["hot"] for row in rows} <= {"loop", "pass"} and all(float(row["per_element"]) > 0 for row in rows)
    assert all(float(row["low_us"]) <= float(row["us"]) <= float(row["high_us"]) for row in rows)
    # Streaming kernels ask for what must move at least, but for what stays in registers or what is stored.
    streaming = [row for row in rows if row["element"] == "logit"]
    assert all(float(row["moved"]) > 0.9 * float(row["must_move"]) for row in streaming)


def test_the_machine_executes_what_the_model_counts():
    """Instructions per element of SASS and of the PTX that was executed, within 15 % or with a reason."""
    modelled = {(row["op"], row["case"]): row for row in _read(REPORT) if row["element"] in ("logit", "key")}
    found = {(row["op"], row["case"]): row for row in _read(machine.FILE)}
    assert found.keys() == modelled.keys(), "run python -m bench.model --machine"
    for key, row in found.items():
        assert row["modelled"] == modelled[key]["per_element"], f"{key}: run python -m bench.model --machine"
        apart = abs(float(row["counted"]) / float(row["modelled"]) - 1)
        assert apart <= machine.WITHIN or key in machine.REASONS, f"{key}: {row['ratio']}"


@pytest.mark.slow
def test_a_kernel_is_modelled(tmp_path):
    out = tmp_path / "rows.csv"
    done = _run("--op", "compact_kv", "--out", out)
    assert done.returncode == 0 and done.stdout.startswith("MODELLED, not measured"), done.stderr
    (row,) = _read(out)
    (committed,) = [row for row in _read(REPORT) if row["op"] == "compact_kv"]
    if row["triton"] == committed["triton"]:
        assert row == committed
    assert _run("--compare", REPORT, out).returncode == 0


def test_a_bad_argument_is_named():
    done = _run("--op", "nothing")
    assert done.returncode == 2 and "--op" in done.stderr and len(done.stderr.splitlines()) == 1
