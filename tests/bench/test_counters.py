"""bench.kernels --counters: counts of compiled kernels, from what they must read and write at least."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.shared import counters
from bench.shared.cases.registry import registry
from tests import machine

ROOT = Path(__file__).resolve().parents[2]


def _run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernels", "--counters", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_op_is_counted_and_every_case_is_there():
    cases = registry()
    there = {(case.op, case.name) for case in cases}
    assert {op for op, _ in there} == set(counters.CHOSEN)
    assert {(op, name) for op, names in counters.CHOSEN.items() for name in names} <= there
    for case in counters.chosen(cases):
        element, number = counters.elements_of(case.spec)
        assert element in ("logit", "key", "row", "byte") and number > 0


def test_elements_of_a_case():
    specs = {(case.op, case.name): case.spec for case in registry()}
    assert counters.elements_of(specs["accept_chain", "dense_r8"]) == ("logit", 8 * 8 * 151936)
    assert counters.elements_of(specs["draft_block", "sampled_r8"]) == ("logit", 8 * 7 * 151936)
    assert counters.elements_of(specs["accept_tree", "walk_m32_r8"]) == ("logit", 8 * 32 * 151936)
    assert counters.elements_of(specs["tree_attention", "r32_c8192_q8"]) == ("key", 32 * 8192)


@pytest.mark.slow
@pytest.mark.skipif(machine.available() is not None, reason=f"needs the machine that runs compiled kernels: {machine.available()}")
def test_a_layout_is_counted(tmp_path):
    out = tmp_path / "counters.csv"
    done = _run("--op", "draft_layout", "--case", "r64", "--requests", "64", "--requests", "8", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout
    with out.open(newline="") as file:
        rows = {int(row["requests"]): row for row in csv.DictReader(file)}
    assert set(rows) == {8, 64}
    for row in rows.values():
        # What must move was counted by hand; a launch touches at least that, in whole sectors.
        assert int(row["touched"]) >= int(row["must_move"]) and int(row["moved"]) >= int(row["touched"]) // 2
        assert int(row["thread_instructions"]) > int(row["elements"])
    again = _run("--op", "draft_layout", "--case", "r64", "--requests", "8", "--out", str(out))
    assert again.returncode == 0
    with out.open(newline="") as file:
        assert sorted(int(row["requests"]) for row in csv.DictReader(file)) == [8, 64]
