"""Does the machine see what orders memory? Every fence of the kernels is taken out, one at a time, and tests run on what is left.

    python tests/machine/mutants.py --list                 the mutants
    python tests/machine/mutants.py accept                 those of files whose path holds "accept"

Mutants: a block barrier, a fence before a release or a grid barrier left out; a release, an acquire or both made relaxed; the
volatile loads of a file made plain. Each is made in a copy of the tree and runs the tests that TESTS names for its file, every
launch in all modes. Seen: a test fails. A mutant that no mode sees is named in UNSEEN with the reason why the order holds without
it, or it is a gap.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "dspark_kernels" / "kernels"
TABLE = ROOT / "bench" / "results" / "machine" / "mutants.csv"
COLUMNS = ("file", "function", "occurrence", "change", "seen", "by", "seconds")

LEFT_OUT = re.compile(r"^\s*(tl\.debug_barrier|stores_done|grid_barrier)\(.*\)")
RELAXED = re.compile(r'sem="(release|acquire|acq_rel)"')


class Mutant(NamedTuple):
    """A change of one line, or (line 0) of a whole file. `function` and `occurrence` name it whatever the line numbers."""

    file: str
    line: int
    function: str
    occurrence: int
    change: str


def mutants() -> list[Mutant]:
    found = []
    for path in sorted(KERNELS.rglob("*.py")):
        file, text = str(path.relative_to(KERNELS)), path.read_text()
        function, seen = "", {}
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.match(r"def (\w+)", line):
                function = match[1]
            for pattern, change in ((LEFT_OUT, "without {}"), (RELAXED, "{} made relaxed")):
                if match := pattern.search(line):
                    change = change.format(match[1])
                    seen[function, change] = seen.get((function, change), 0) + 1
                    found.append(Mutant(file, number, function, seen[function, change], change))
        if "volatile=True" in text:
            found.append(Mutant(file, 0, "", text.count("volatile=True"), "volatile loads made plain"))
    return found


def changed(text: str, mutant: Mutant) -> str:
    if mutant.change == "nothing":
        return text
    if not mutant.line:
        return text.replace("volatile=True", "volatile=False")
    lines = text.splitlines(keepends=True)
    line = lines[mutant.line - 1]
    if mutant.change.startswith("without"):
        lines[mutant.line - 1] = LEFT_OUT.sub(re.match(r"\s*", line)[0] + "pass", line)
    else:
        lines[mutant.line - 1] = RELAXED.sub('sem="relaxed"', line)
    return "".join(lines)


# What tests of tests/ops a mutant of a file runs, by the longest prefix of its path: few binaries, all phases of the kernel.
TESTS = {
    "": ("test_accept.py::test_many_uniforms_of_the_block_rule",),
    "accept/chain": ("test_accept.py::test_many_uniforms_of_the_block_rule", "test_accept.py::test_any_lag_between_the_phases"),
    "accept/dense": ("test_accept.py::test_draft_and_target_widths_differ",),
    "accept/first_pass": ("test_first_pass.py::test_chains_cut_anyhow_give_the_same_bits",),
    "accept/outputs": ("test_accept.py::test_sampling_settings_act_inside",),
    "accept/rows": ("test_accept.py::test_sampling_settings_act_inside", "test_accept.py::test_odd_logits"),
    "accept/shards": (
        "test_shards_accept.py::test_any_cut_draws_what_the_reference_draws",
        "test_shards_accept.py::test_entries_share_octets_with_each_other_and_with_another_rank",
        "test_shards_accept.py::test_one_workspace_for_all_phases_stays_clean",
    ),
    "accept/sparse": ("test_accept.py::test_entries_that_share_ids_and_octets", "test_accept.py::test_odd_lists"),
    "accept/target": ("test_accept.py::test_sampling_settings_act_inside",),
    "accept/tree": ("test_tree.py::test_many_decisions", "test_tree.py::test_full_trees"),
    "attention": ("test_attention.py::test_a_tree_node_is_the_last_row_of_its_path",),
    "compact": ("test_compact.py",),
    "draft/": ("test_draft_heads.py::test_many_requests_and_positions", "test_draft_sampling.py"),
    "draft/candidate_heads": (
        "test_candidates.py::test_any_batch",
        "test_candidates.py::test_programs_at_once_with_one_workspace",
        "test_candidates.py::test_rank_beyond_one_block",
    ),
    "draft/candidate_walk": (
        "test_candidates.py::test_any_batch",
        "test_candidates.py::test_penalties_follow_the_path",
        "test_candidates.py::test_programs_at_once_with_one_workspace",
        "test_candidates.py::test_ties_go_to_the_lowest_ids",
    ),
    "draft/candidates": (
        "test_candidates.py::test_any_batch",
        "test_candidates.py::test_penalties_follow_the_path",
        "test_candidates.py::test_programs_at_once_with_one_workspace",
        "test_candidates.py::test_ties_go_to_the_lowest_ids",
    ),
    "draft/selection": (
        "test_candidates.py::test_any_batch",
        "test_candidates.py::test_penalties_follow_the_path",
        "test_candidates.py::test_programs_at_once_with_one_workspace",
        "test_candidates.py::test_ties_go_to_the_lowest_ids",
    ),
    "draft/candidate_shards": (
        "test_shards_candidates.py::test_the_bits_of_the_whole_op",
        "test_shards_candidates.py::test_settings_maps_and_heads",
    ),
    "draft/heads": ("test_draft_heads.py::test_many_requests_and_positions",),
    "draft/shards": ("test_shards_draft.py::test_any_cut_draws_what_the_reference_draws_with_latents",),
    "draft_tree/append": ("test_tree_draft.py::test_a_full_tree_of_64_nodes",),
    "draft_tree/best_first": ("test_tree_paths.py::test_candidates_equal_reference",),
    "draft_tree/best_first_dense": ("test_tree_paths.py::test_whole_rows_equal_reference",),
    "draft_tree/nodes": ("test_tree_paths.py::test_candidates_equal_reference",),
    "draft_tree/static": ("test_tree_draft.py::test_long_branchings_and_many_programs",),
    "layout/": ("test_schedule.py::test_large_batches", "test_schedule.py::test_equals_reference_in_pieces"),
    "primitives/filters": (
        "test_sampling.py::test_more_elements_than_the_list_holds",
        "test_sampling.py::test_support_equals_reference",
        "test_accept.py::test_sampling_settings_act_inside",
    ),
    "primitives/vocab_blocks": ("test_tree.py::test_many_decisions",),
    "primitives/sync": (
        "test_candidates.py::test_any_batch",
        "test_attention.py::test_a_tree_node_is_the_last_row_of_its_path",
        "test_accept.py::test_many_uniforms_of_the_block_rule",
        "test_draft_heads.py::test_many_requests_and_positions",
        "test_tree_draft.py::test_long_branchings_and_many_programs",
    ),
}

PLAIN_LOADS = (
    "the acquire or the block barrier before these loads orders plain loads, too; volatile keeps the compiler from taking an earlier"
    " value again"
)

ANOTHER_BARRIER = (
    "between the two accesses stands a reduction, a scan or an exchange over several warps, which Triton compiles to block barriers of"
    " its own: race detection finds the accesses ordered by these; no code may rely on it"
)

RESULT_HANDED_ON = (
    "one thread executes a scalar atomic and hands its result to the others through shared memory, behind a block barrier of Triton's"
    " own, which the warps that read the result pass; no code may rely on it"
)

EARLIER_LOADS = "the barrier makes the compiler ask for memory before it computes; it orders no access"

# Mutants that no mode sees, (file, function, change) -> why the order holds without it.
UNSEEN: dict[tuple[str, str, str], str] = {
    ("accept/chain.py", "_merge_group", "without tl.debug_barrier"): EARLIER_LOADS,
    ("accept/chain.py", "_stats", "without tl.debug_barrier"): EARLIER_LOADS,
    ("accept/dense.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("accept/first_pass.py", "first_logits", "without tl.debug_barrier"): EARLIER_LOADS,
    ("accept/first_pass.py", "_stream", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("accept/outputs.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("accept/rows.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("accept/rules.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("accept/shards.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("accept/shards.py", "_inner_list", "without stores_done"): ANOTHER_BARRIER,
    ("accept/shards.py", "_without_list", "without stores_done"): ANOTHER_BARRIER,
    ("accept/shards_rows.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("accept/sparse.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("accept/sparse.py", "residual_of_blocks", "without stores_done"): ANOTHER_BARRIER,
    ("accept/target.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("accept/tree.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("accept/tree_rows.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("accept/tree_rules.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("accept/tree_state.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft/candidate_heads.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft/candidate_heads.py", "advance_gated", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("draft/candidate_heads.py", "advance_rnn", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("draft/candidate_scores.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft/candidate_walk.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft/candidate_walk.py", "walk", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("draft/dense.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft/filters.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft/heads.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft/rows.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft/selection.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft/selection.py", "store_sub_block_keys", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("draft/shards.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft_tree/append.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft_tree/append.py", "append", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("draft_tree/best_first.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft_tree/best_first.py", "_expand", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("draft_tree/best_first.py", "draft_paths_kernel", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("draft_tree/best_first.py", "_store_logits", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("draft_tree/heads.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft_tree/nodes.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft_tree/nodes.py", "merge_children", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("draft_tree/best_first_dense.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft_tree/best_first_dense.py", "_start", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("draft_tree/static.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("draft_tree/static.py", "_rows_item", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("layout/schedule.py", "_next_in_order", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("layout/schedule.py", "_read_values", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("layout/schedule.py", "schedule_prefixes_kernel", "without tl.debug_barrier"): EARLIER_LOADS,
    ("primitives/filters.py", "", "volatile loads made plain"): PLAIN_LOADS,
    ("primitives/filters.py", "_collect", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("primitives/filters.py", "sums_in_support", "without tl.debug_barrier"): ANOTHER_BARRIER,
    ("primitives/sync.py", "arrive", "without stores_done"): ANOTHER_BARRIER,
    ("primitives/sync.py", "arrive", "without tl.debug_barrier"): RESULT_HANDED_ON,
    ("primitives/sync.py", "wait_for", "without tl.debug_barrier"): RESULT_HANDED_ON,
    ("primitives/sync.py", "grid_barrier", "without tl.debug_barrier"): RESULT_HANDED_ON,
    ("primitives/sync.py", "finish_item", "without stores_done"): ANOTHER_BARRIER,
    ("primitives/vocab_blocks.py", "", "volatile loads made plain"): PLAIN_LOADS,
}


def tests_of(file: str) -> tuple[str, ...]:
    return tuple(f"tests/ops/{name}" for name in TESTS[max((prefix for prefix in TESTS if file.startswith(prefix)), key=len)])


def run(mutant: Mutant, folder: Path) -> dict:
    """Its row of the table."""
    path = folder / "dspark_kernels" / "kernels" / mutant.file
    text = path.read_text()
    path.write_text(changed(text, mutant))
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--compiled=all", "--compiled-examples=4", "--tb=short",
        *tests_of(mutant.file),
    ]  # fmt: skip
    started = time.perf_counter()
    try:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=900)
        seen, by = done.returncode == 1, _first_word(done.stdout)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{mutant}: {done.stdout[-3000:]}{done.stderr[-2000:]}")
    except subprocess.TimeoutExpired:
        seen, by = True, "did not end"
    finally:
        path.write_text(text)
    row = dict(file=mutant.file, function=mutant.function, occurrence=mutant.occurrence, change=mutant.change)
    return row | dict(seen="yes" if seen else "no", by=by if seen else "", seconds=round(time.perf_counter() - started))


def _first_word(output: str) -> str:
    """What saw it: a kind of race, other bits in a mode, a comparison with the reference."""
    if match := re.search(r"race\.\w+", output):
        mode = re.search(r"mode (\w+), seed", output)
        return f"{match[0]} in mode {mode[1]}" if mode else match[0]
    if match := re.search(r"bytes of .* differ in mode (\w+)", output):
        return f"other bits in mode {match[1]}"
    if match := re.search(r"(deadlock|livelock|bounds|uninitialised)", output):
        return match[1]
    return "a comparison of the test"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="only mutants of files whose path holds one of these")
    parser.add_argument("--list", action="store_true", help="print the mutants, and stop")
    parser.add_argument("--again", action="store_true", help="also those that the table has")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table (default: %(default)s)")
    options = parser.parse_args()
    chosen = [m for m in mutants() if not options.files or any(name in m.file for name in options.files)]
    if options.list:
        for m in chosen:
            print(f"{m.file}:{m.line} {m.function} {m.occurrence}: {m.change}  [{' '.join(tests_of(m.file))}]")
        return 0
    rows = {}
    if options.out.exists():
        with options.out.open(newline="") as file:
            there = {_key(mutant._asdict()) for mutant in mutants()}
            rows = {_key(row): row for row in csv.DictReader(file) if _key(row) in there}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tree"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "assets", "results"))
        due = [mutant for mutant in chosen if options.again or _key(mutant._asdict()) not in rows]
        for file in sorted({mutant.file for mutant in due}):
            row = run(Mutant(file, 0, "", 0, "nothing"), folder)  # a test that fails by itself would see every mutant
            if row["seen"] == "yes":
                raise RuntimeError(f"{' '.join(tests_of(file))} fails without a mutant: {row['by']}")
        for number, mutant in enumerate(due, 1):
            key = _key(mutant._asdict())
            row = {name: str(value) for name, value in run(mutant, folder).items()}
            rows[key] = row
            print(f"[{number}/{len(due)}]", " ".join(row.values()), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(sorted(rows.values(), key=lambda r: tuple(str(r[name]) for name in COLUMNS[:4])))
    gaps = [row for row in rows.values() if row["seen"] == "no" and (row["file"], row["function"], row["change"]) not in UNSEEN]
    for row in gaps:
        print("not seen, and no reason named:", row["file"], row["function"], row["change"])
    return 1 if gaps else 0


def _key(row: dict) -> tuple:
    return tuple(str(row[name]) for name in COLUMNS[:4])


if __name__ == "__main__":
    sys.exit(main())
