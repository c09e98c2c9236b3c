"""The package in a process of its own: two copies, the interpreter on in part, no interpreter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels import library
from dspark_kernels.launch import arch


def _fresh(code, **environment):
    """What a fresh process with this code says."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


ROOT = Path(__file__).resolve().parents[2]
CALL = """
import torch, {package} as dk
z = torch.zeros(1, dtype=torch.int64)
block = dk.draft_block(torch.arange(8.0).flip(0).view(1, 1, 8), z, anchor_positions=z)
assert block.tokens.tolist() == [[0]]
"""


def test_two_copies_of_the_package_in_one_process(tmp_path):
    """A vendored copy, deep inside another package, and its ops seen by torch under a name of their own."""
    pytest.importorskip("triton")
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "__init__.py").write_text("")
    for name in ("copied", "vendor/kernels_of_ours"):
        shutil.copytree(ROOT / "dspark_kernels", tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    packages = ("dspark_kernels", "copied", "vendor.kernels_of_ours")
    names = "print([len(dir(getattr(torch.ops, name))) > 9 for name in ('dspark_kernels', 'copied', 'vendor__kernels_of_ours')])"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + "".join(CALL.format(package=name) for name in packages) + names
    code += "\nfrom dspark_kernels.testing import interpreter as a\nfrom copied.testing import interpreter as b\n"
    code += "assert a._group is b._group, 'threads of a copy would not see that a launch has failed'"
    done = _fresh(code, TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (0, "[True, True, True]\n"), done.stderr


@pytest.mark.parametrize(
    "before",
    [
        "import triton, os; os.environ['TRITON_INTERPRET'] = '1'",
        "import triton, os; os.environ['TRITON_INTERPRET'] = '1'; from dspark_kernels.testing import interpreter; interpreter.repair()",
        "import os; os.environ['TRITON_INTERPRET'] = '1'; import triton; del os.environ['TRITON_INTERPRET']",
        "import triton",
    ],
    ids=["set_late", "set_late_and_repaired", "unset_late", "not_set"],
)
def test_an_interpreter_that_is_on_in_part_says_what_to_do(before):
    pytest.importorskip("triton")
    done = _fresh(before + CALL.format(package="dspark_kernels"))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("RuntimeError: dspark_kernels: ") and "InterpreterError" not in done.stderr
    assert "set TRITON_INTERPRET=1 in the environment before importing triton and dspark_kernels" in last


def test_the_interpreter_is_repaired_by_the_first_op():
    pytest.importorskip("triton")
    code = CALL.format(package="dspark_kernels") + "from triton.runtime import interpreter as stock\nprint(hasattr(stock, {!r}))"
    done = _fresh(code.format("_repaired_by_dspark_kernels"), TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_a_cpu_tensor_without_the_interpreter_says_what_to_do(monkeypatch):
    monkeypatch.setattr(library, "_interpreted", lambda *a: False)
    monkeypatch.setattr(arch, "_override", None)  # which says where kernels run instead
    anchor = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        dk.draft_block(torch.zeros(1, 1, 8), anchor, anchor_positions=anchor)
