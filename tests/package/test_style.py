"""The tree is formatted and free of what ruff's chosen rules find (rules and line length: pyproject.toml); a record name means one layout."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def ruff(*arguments):
    return subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [("check", "."), ("format", "--check", ".")])
def test_the_tree_is_clean(arguments):
    done = ruff(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_faults_are_found(tmp_path):
    (tmp_path / "unused.py").write_text("import os\n")
    (tmp_path / "long.py").write_text("x = [" + ", ".join("1" * 9 for _ in range(20)) + "]\n")
    rules = str(ROOT / "pyproject.toml")
    found = [ruff(*call, "--config", rules, str(tmp_path)) for call in (("check",), ("format", "--check"))]
    assert [done.returncode for done in found] == [1, 1]
    assert "unused.py" in found[0].stdout and "long.py" in found[1].stdout


def test_a_record_name_means_one_layout():
    places = {}
    for path in sorted((ROOT / "dspark_kernels" / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
