"""Kernels compile without spills, within shared memory: a few on two architectures here, all on all eight by the committed report."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "bench" / "results" / "compile.csv"
HERE = ("sm_90", "gfx942")
ALL = (*HERE, "sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx950")
# Of a few kernels that compile within seconds; the report has the rest.
CASES = {
    "draft_block": ("sampled_r1",),
    "fixed_layout": ("r64",),
    "plan_attention": ("r64_slots",),
    "tree_attention": ("fp8_cached",),
    "draft_candidates": ("c64_r1",),
    "accept_chain": ("greedy",),
    "compact_kv": ("r64",),
    "draft_block_finish": ("sampled_r64",),
}


def _run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _read(path):
    with open(path, newline="") as file:
        return {(row["op"], row["case"], row["arch"]): row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_kernels_compile_without_spills(tmp_path):
    output = tmp_path / "compile.csv"
    arguments = [f"--arch={arch}" for arch in HERE] + [f"--op={op}" for op in CASES]
    arguments += [f"--case={case}" for case in sum(CASES.values(), ())]
    done = _run(*arguments, "--cached", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = _read(output)
    assert {(op, case, arch) for op in CASES for case in CASES[op] for arch in HERE} <= rows.keys()
    report = _read(REPORT)
    for key, row in rows.items():
        # Measured numbers are a compiler version's own; the same version gives the same (but binaries hold the sources' paths).
        if report[key]["triton"] == triton.__version__:
            different = {name for name in row if row[name] != report[key][name]} - {"compile_seconds", "binary_bytes"}
            assert not different, f"{key}: {different} differ from the report"


def test_the_report_is_that_of_the_code():
    done = _run("--check")
    assert done.returncode == 0, f"run python -m bench.compile\n{done.stdout}{done.stderr}"
    report = _read(REPORT)
    assert {arch for _, _, arch in report} == set(ALL)


def test_attention_uses_matrix_units():
    for (op, case, arch), row in _read(REPORT).items():
        if op == "tree_attention" and "fp32" not in case:
            assert int(row["matrix_instructions"]) > 0, (case, arch)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(source="0" * 16), "source changed since it was compiled"),
        (dict(launch="0" * 16), "launch changed since it was compiled"),
        (dict(spill_stores="4"), "spill_stores is 4, must be 0"),
        (dict(stack="16"), "stack is 16, must be 0"),
        (dict(shared="999999"), "999999 bytes of shared memory"),
        (dict(case="gone"), "in the report, but no such launch"),
        (None, "not in the report"),
    ],
)
def test_the_check_sees_what_is_wrong(tmp_path, change, message):
    with open(REPORT, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arch"] == "sm_90" and row["op"] == "fixed_layout"]
    if change is None:
        del rows[0]
    else:
        rows[0].update(change)
    path = tmp_path / "compile.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    done = _run("--check", "--arch=sm_90", "--op=fixed_layout", "--output", str(path))
    assert done.returncode == 1 and message in done.stdout, done.stdout + done.stderr


SPILLING = """
import torch, triton, triton.language as tl
from bench.compile.report import problems
from bench.shared.offline.report import row_of

@triton.jit
def kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x - tl.max(x, axis=0))  # all of x is kept for the subtraction

def call(size):
    return lambda: kernel[(1,)](torch.empty(size), size, num_warps=1)

for arch, size in (("sm_90", 16384), ("gfx942", 65536)):
    row = row_of(arch, "toy", "large", call(size), compiled=True)
    print(arch, row["spill_stores"], row["spill_loads"], row["stack"], len(problems(row)))
"""


def test_a_spill_is_seen(tmp_path):
    path = tmp_path / "spilling.py"
    path.write_text(SPILLING)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["sm_90", "gfx942"], done.stderr
    for arch, *numbers in lines:
        assert all(int(number) > 0 for number in numbers), (arch, numbers)


def test_a_digest_follows_code_and_not_words(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    kernel = '"""Words."""\nfrom .low import helper  # words\n\ndef kernel(x):\n    """Words."""\n    helper(x)\n'
    low = "def helper(x):\n    return x + 1\n"
    texts = [
        (kernel, low),
        (kernel.replace("Words", "Other").replace("  # words", ""), "# New.\n" + low.replace("):\n", "):\n\n")),
        (kernel, low.replace("x + 1", "x + 2")),
        (kernel.replace("helper(x)", "helper(x, x)"), low),
    ]
    for number, (text, other) in enumerate(texts):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "kernel.py").write_text(text)
        (folder / "low.py").write_text(other)
    code = f"from pathlib import Path; from bench.shared.offline.capture import code_digest; p = Path({str(tmp_path)!r})\n"
    code += "for n in '0123': print(code_digest(p / n / 'kernel.py', p / n))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    digests = done.stdout.split()
    assert digests[0] == digests[1] and len(set(digests)) == 3


BUNDLED = """
import torch, triton, triton.language as tl
from bench.shared.offline.report import row_of

@triton.jit
def kernel(pair, N: tl.constexpr):
    x_ptr, (count, factor) = pair
    tl.store(x_ptr + tl.arange(0, N), count)

x = torch.empty(64)
for pair in ((x, (5, None)), (x, (7, None)), (x, (16, None)), (x, (5, x)), (x[1:], (5, None)), (None, (5, None))):
    print(row_of("sm_90", "toy", "bundled", lambda: kernel[(1,)](pair, 16), compiled=False)["launch"])
"""


def test_a_digest_sees_into_tuples(tmp_path):
    path = tmp_path / "bundled.py"
    path.write_text(BUNDLED)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path], cwd=ROOT, env=environment, capture_output=True, text=True)
    digests = done.stdout.split()
    assert len(digests) == 6 and digests[0] == digests[1] and len(set(digests)) == 5, done.stderr
