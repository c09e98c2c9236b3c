"""The files that set the project up agree with each other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import dspark_kernels as dk

ROOT = Path(__file__).resolve().parents[2]


def _command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    return lines[-1]


def test_ci_runs_the_second_command_of_the_readme():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    commands = [line for block in blocks for line in block.splitlines() if "-m venv" in line]
    assert len(commands) >= 2 and commands[1] == _command()
    assert "-m bench.decode" in commands[0] and "constraints.txt" in commands[0]


def test_every_tool_the_tests_need_is_pinned():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {re.match(r"[\w-]+", need)[0] for need in [*project["dependencies"], *sum(extras.values(), [])]}
    pins = (ROOT / "constraints.txt").read_text()
    pinned = set(re.findall(r"^([\w-]+)==", pins, re.M))
    assert names == pinned, "a requirement without a pin, or a pin that nothing requires"
    assert project["dependencies"] == ["torch>=2.9"]
    assert set(extras) == {"cpu", "test", "checkpoints", "transformers", "demo", "plots", "docs", "release", "types", "live", "hub"}
    packaging = {"build", "check-wheel-contents", "twine", "mkdocs", "mkdocs-material", "mkdocstrings-python"}
    assert not packaging & {re.match(r"[\w-]+", need)[0] for need in extras["test"]}, "the tests' environment stays small"


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_workflows_install_pinned_tools_and_run_every_python_that_is_promised():
    pins = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    for path in WORKFLOWS:
        for tools in re.findall(r"pip install -c constraints.txt ([\w -]+)$", path.read_text(), re.M):
            assert set(tools.split()) <= pins, path.name
    promised = re.findall(r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    tested = re.search(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "tests.yml").read_text())[1]
    assert len(promised) == 4 and re.findall(r"3\.\d+", tested) == promised


def test_workflows_and_templates_run_modules_and_files_that_exist():
    texts = [*WORKFLOWS, *(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"), ROOT / ".github" / "pull_request_template.md"]
    assert len(WORKFLOWS) >= 5 and len(texts) >= 9
    for text in (path.read_text() for path in texts):
        for module in re.findall(r"python\"? -m ((?:bench|dspark_kernels)[\w.]*)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
        assert [name for name in re.findall(r"\b(?:tests|bench)/[\w/]+\.\w+", text) if not (ROOT / name).exists()] == []


def test_every_test_file_that_is_named_exists():
    """In documents, comments, docstrings and commands."""
    texts = [path for suffix in ("*.md", "*.py", "*.toml") for path in ROOT.rglob(suffix) if ".venv" not in path.parts]
    named = {
        name for path in (ROOT / ".ci" / "run", *texts) for name in re.findall(r"\btests/[\w/]+\.(?:py|npz)", path.read_text())
    }
    assert len(named) > 10 and not {name for name in named if not (ROOT / name).exists()} - {
        "tests/a.py",
        "tests/test_nowhere.py",
    }  # made up in tests


def test_mutants_run_tests_that_exist():
    from tests.machine import mutants

    files = [str(path.relative_to(mutants.KERNELS)) for path in mutants.KERNELS.rglob("*.py")]
    assert [prefix for prefix in mutants.TESTS if not any(file.startswith(prefix) for file in files)] == []
    for test in {test for mutant in mutants.mutants() for test in mutants.tests_of(mutant.file)}:
        path, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / path).read_text() if name else (ROOT / path).exists(), test


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Files of a source distribution, made of the working tree by setuptools' own rules, without building one."""
    pytest.importorskip("setuptools", "77", reason="needs setuptools 77, which reads the licence of pyproject.toml")
    pytest.importorskip("tomllib")  # Python 3.11
    folder = tmp_path_factory.mktemp("packed")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set((folder / "dspark_kernels.egg-info" / "SOURCES.txt").read_text().split("\n"))


def test_a_source_distribution_has_what_the_tests_need(packed):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout: which files there are, git knows")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    assert tracked - packed == {".gitignore"}
    assert [name for name in packed if "__pycache__" in name] == []


def test_only_the_package_is_packaged():
    setuptools = pytest.importorskip("setuptools")
    found = setuptools.find_packages(str(ROOT), include=["dspark_kernels*"])
    folders = {path.parent for path in (ROOT / "dspark_kernels").rglob("*.py")}
    assert set(found) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    named = {path for package, rules in data.items() for rule in rules for path in (ROOT / package.replace(".", "/")).glob(rule)}
    present = {path for path in (ROOT / "dspark_kernels").rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert named == {path for path in present if path.is_file()} and ROOT / "dspark_kernels" / "py.typed" in named


def test_the_version_is_the_newest_of_the_changelog():
    """Or that of no release yet: entries stand under Unreleased."""
    releases = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert releases[0] == "Unreleased" and (not releases[1:] or releases[1] == dk.__version__)
