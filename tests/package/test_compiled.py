"""A selection of the tests of ops on compiled kernels, in every mode of the machine: each part in a process of its own.

Kernels are interpreted or compiled for a whole process, and this one interprets. The parts cover every op, rule, head and form of
proposal; `python -m pytest --compiled=all` runs the rest of them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HAS_TRITON, NO_MACHINE, NO_TRITON, OPS

ROOT = Path(__file__).resolve().parents[2]

# name -> (pytest's expression of test names, or "" for all of the files; stems of files, as in OPS)
PARTS = {
    "the machine, layouts": ("", ["machine", "layout", "compact", "attention_plan", "example"]),
    "schedules": ("equals_reference or ties_across or beyond_tables or large_batches and not (700 and causal)", ["schedule"]),
    "attention": (
        "reference_in_parts and (tree or chain and plain) or number_types and False or byte_of_fp8 or last_row_of_its_path and 3 "
        "or a_prompt_shares",
        ["attention"],
    ),
    "dense drafts": ("not (shared or two_inf or fresh_outputs or anchor_outside or padding_rows)", ["draft", "golden_units"]),
    "heads": ("many_requests or goes_on or ranks_beyond", ["draft_heads"]),
    "candidates": (
        "equals_reference or equal_reference or filters_see and first or acceptance_reads or any_batch or successors_join",
        ["candidates", "candidates_drawn"],
    ),
    "acceptance": (
        "equals_reference or is_the_reference or many_uniforms or settings_act or forced_rates",
        ["accept"],
    ),
    "acceptance of trees": ("many_decisions or full_trees or (not_finite or bad_token_ids) and walk", ["tree"]),
    "draft trees": (
        "test_equals_reference or best_first_equals or candidates_equal or whole_rows_equal or distribution_of_their_method or "
        "latents_follow and (top_k and rnn or without_replacement and gated)",
        ["tree_draft", "tree_paths"],
    ),
    "shards of acceptance": (
        "any_cut and not sparse-False-token or block_rule and dense or one_gather or cut_vocabulary",
        ["shards_accept"],
    ),
    "shards of drafts": (
        "heads_with_latents and not dtype1 or any_cut and not with_latents or whole_sub_blocks or ties_go",
        ["shards_draft", "shards_candidates"],
    ),
    "batches": ("draft_block_in_any_batch and True and 21", ["invariance"]),
}


@pytest.mark.parametrize("name", PARTS)
def test_compiled(name, tmp_path, record_property):
    from tests import machine

    if not HAS_TRITON:
        pytest.skip(NO_TRITON)
    if (reason := machine.available()) is not None:
        pytest.skip(f"{NO_MACHINE}: {reason}")
    expression, files = PARTS[name]
    record = tmp_path / "record.json"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--compiled=all", "--compiled-examples=2", "--tb=short",
        f"--compiled-record={record}", *(["-k", expression] if expression else []), *(f"tests/{OPS[stem]}" for stem in files),
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    modes = json.loads(record.read_text())["modes"]
    assert all(modes[mode]["launches"] > 0 for mode in ("plain", *machine.GROUPS["all"])), "a mode in which nothing was launched"
    record_property("compiled", [int(passed[1]), sum(counts["launches"] for counts in modes.values())])


@pytest.mark.parametrize("arguments", [["--compiled=all,none"], ["--compiled", "tests/ops/test_layout.py"]])
def test_a_mode_that_is_none_is_named(arguments):
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4 and "--compiled: expected some of plain, schedules, race, weak, all" in done.stderr + done.stdout


@pytest.mark.parametrize(
    "arguments", [["tests/package/test_compiled.py", "-k", "heads or batches"], ["--compiled=race", "tests/ops/test_compact.py"]]
)
def test_without_a_compiler_compiled_tests_are_skipped_and_counted(tmp_path, arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k != "TRITON_INTERPRET"}
    environment |= {"PATH": str(tmp_path), "DSPARK_MACHINE_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(rf"skipped (\d+) tests: {NO_MACHINE}", done.stdout)
    assert counted and int(counted[1]) >= 2 and "passed" not in done.stdout
