"""Types of the public names: annotated whole, exported by name, and checked by mypy in the program of a user who makes mistakes.

The host side of the package is checked by mypy --strict, too (`[tool.mypy]` in pyproject.toml).
"""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import dspark_kernels as dk

ROOT = Path(__file__).resolve().parents[2]
NOT_CHECKED = ("kernels", "checkpoint", "integrations")  # why: pyproject.toml
PROGRAM = ROOT / "tests" / "data" / "typed_user.py"


def test_public_names_are_exported():
    public = {name for name, value in vars(dk).items() if not name.startswith("_") and not isinstance(value, types.ModuleType)}
    assert set(dk.__all__) == public | {"calibration", "cost", "scheduling", "__version__"} and sorted(dk.__all__) == list(
        dk.__all__
    )


@pytest.mark.parametrize("name", [name for name in dk.__all__ if callable(getattr(dk, name))])
def test_public_functions_are_annotated_whole(name):
    value = getattr(dk, name)
    functions = [value] if inspect.isfunction(value) else [f for n, f in vars(value).items() if n[0] != "_" or n == "__init__"]
    for function in functions:
        function = getattr(function, "__func__", getattr(function, "fget", function))
        if not inspect.isfunction(function) or function.__module__ == "enum":
            continue
        signature = inspect.signature(function)
        bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")]
        assert not bare, f"{function.__qualname__}: {bare}"
        words = [p.name for p in signature.parameters.values() if p.annotation in ("str", "str | None")]
        assert not words, f"{function.__qualname__}: {words}: name the words (dspark_kernels/choices.py)"


needs_mypy = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy (the extra `types`)")


@needs_mypy
def test_mypy_finds_nothing_in_the_host_side(tmp_path):
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    checked = int(re.search(r"no issues found in (\d+) source files", done.stdout)[1])
    left_out = sum(len(list((ROOT / "dspark_kernels" / folder).rglob("*.py"))) for folder in NOT_CHECKED)
    assert checked == len(list((ROOT / "dspark_kernels").rglob("*.py"))) - left_out


@needs_mypy
def test_mypy_finds_the_mistakes_of_a_user_and_no_others(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--follow-imports=silent",
        "--cache-dir",
        str(tmp_path),
        str(PROGRAM),
    ]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True)
    found = {int(line) for line in re.findall(rf"{PROGRAM.name}:(\d+): error", done.stdout)}
    wrong = {number for number, line in enumerate(PROGRAM.read_text().splitlines(), 1) if "# wrong:" in line}
    assert found == wrong and len(wrong) > 10, done.stdout[-3000:] + done.stderr
