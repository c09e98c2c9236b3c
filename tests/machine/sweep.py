"""Every test of ops on compiled kernels, every launch in every mode: a table of files, made one process per file.

    python tests/machine/sweep.py                         all files; rows of files already in the table are renewed
    python tests/machine/sweep.py --examples 20 accept tree

Columns: tests passed, failed and skipped; launches; how many of them were replayed in each mode; thread instructions of all runs;
reports by kind; seconds. A launch that leaves other bits in a replay, races or reads beyond a tensor fails its test.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "bench" / "results" / "machine" / "files.csv"
MODES = ("fine", "one", "ahead", "race", "race_ahead", "weak", "lazy", "weak_ahead")
COLUMNS = ("file", "arch", "triton", "passed", "failed", "skipped", "launches", *MODES, "not_replayed", "instructions", "races_within",
           "benign", "seconds")  # fmt: skip


def run(stem: str, path: str, arch: str, examples: int, extra: list[str]) -> dict:
    """One file in a process of its own: its row. Output goes to the screen where a test failed."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [
            sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", "--compiled=all", f"--compiled-arch={arch}",
            f"--compiled-examples={examples}", f"--compiled-record={record}", f"tests/{path}", *extra,
        ]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - started
        seen = json.loads(record.read_text()) if record.exists() else dict(modes={}, reports=[])
    if done.returncode not in (0, 5):
        print(done.stdout[-20000:], done.stderr[-4000:], flush=True)
    counted = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    kinds = {kind: sum(r["count"] for r in seen["reports"] if r["kind"] == kind) for kind in ("race.within", "benign")}
    modes = seen["modes"]
    return dict(
        file=f"test_{stem}.py", arch=arch, triton=triton.__version__, passed=counted.get("passed", 0),
        failed=counted.get("failed", 0) + counted.get("error", 0), skipped=counted.get("skipped", 0),
        launches=modes.get("plain", {}).get("launches", 0), **{mode: modes.get(mode, {}).get("launches", 0) for mode in MODES},
        not_replayed=modes.get("plain", {}).get("not_replayed", 0),
        instructions=sum(counts["thread_instructions"] for counts in modes.values()), races_within=kinds["race.within"],
        benign=kinds["benign"], seconds=round(seconds),
    )  # fmt: skip


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from tests.conftest import OPS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="STEM", help=f"test files (default: {' '.join(OPS)})")
    parser.add_argument("--arch", default="sm_80")
    parser.add_argument("--examples", type=int, default=5, help="at most this many examples of a hypothesis test")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table (default: %(default)s)")
    parser.add_argument("--pytest", default="", help="further arguments of pytest, separated by blanks")
    options = parser.parse_args()
    if unknown := [stem for stem in options.files if stem not in OPS]:
        parser.error(f"no test file of ops: {' '.join(unknown)}")
    failed = 0
    for stem in options.files or OPS:
        row = {
            name: str(value) for name, value in run(stem, OPS[stem], options.arch, options.examples, options.pytest.split()).items()
        }
        failed += int(row["failed"]) > 0
        print(" ".join(f"{name} {row[name]}" for name in COLUMNS if row[name] != "0"), flush=True)
        rows = []
        if options.out.exists():
            with options.out.open(newline="") as file:
                rows = [old for old in csv.DictReader(file) if any(old[k] != row[k] for k in ("file", "arch", "triton"))]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted([*rows, row], key=lambda r: (r["triton"], r["arch"], r["file"])))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
