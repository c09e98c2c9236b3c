"""bench.kernels --host: the calls that it times, and that the documentation says what it found."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "bench" / "results" / "host.csv"


def _python(*arguments):
    """A process of its own: what times calls wants kernels that are compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def _run(*arguments):
    return _python("-m", "bench.kernels", "--host", *arguments)


def test_a_call_is_timed_before_its_launch(tmp_path):
    out = tmp_path / "host.csv"
    done = _run("--op", "draft_layout", "--out", str(out))
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    plain, prepared, repeated, triton = (float(row[name]) for name in ("plain_us", "prepared_us", "repeated_us", "triton_us"))
    assert 0 < repeated < prepared < 1e4 and repeated < plain < 1e4 and 0 < triton < 1e4
    assert (row["op"], row["case"], row["torch"]) == ("draft_layout", "r64", torch.__version__)


RENEWED = """
from bench.kernels import host

arguments = host.arguments_of("accept_chain", host.CASES["accept_chain"]["dense_r64"])
assert arguments["target_logits"].shape[0] == 64 * 8 and arguments["layout"].max_drafts == 7
for name in ("target_logits", "layout", "proposal", "sampling"):
    assert host.renewed(arguments[name]) is not arguments[name]
layout = host.renewed(arguments["layout"])
assert layout.token_ids is not arguments["layout"].token_ids and layout.slot_mapping is None
assert layout.token_ids.data_ptr() == arguments["layout"].token_ids.data_ptr()
assert host.renewed(arguments["workspace"]) is arguments["workspace"]
"""


def test_arguments_are_those_of_the_call_and_renewed_ones_others():
    done = _python("-c", RENEWED)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--op", "accept"), "--op: expected one of draft_block, schedule_prefixes, "),
        (("--case", "dense_r65"), "--case: expected one of sampled_r64, "),
        (("--op", "fixed_layout", "--case", "dense_r64"), "--case: expected one of r64, got dense_r64"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    done = _run(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"bench.kernels: {message}")


def test_every_case_was_timed_and_the_page_says_so():
    with RESULT.open(newline="") as file:
        costs = {(row["op"], row["case"]): row for row in csv.DictReader(file)}
    assert set(costs) == {tuple(line.split()) for line in _run("--list").stdout.splitlines()}
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    table = page.split("## Calls on the host")[1].split("\n## ")[0]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    assert len(shown) >= 4
    for call, *times in shown:
        op, case = call.replace("`", "").split()
        assert times == [f"{float(costs[op, case][name]):.0f}" for name in ("plain_us", "prepared_us", "repeated_us", "triton_us")]
