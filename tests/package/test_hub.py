"""`python -m hub`: the Hub kernel has the package's own source, describes it rightly, and lives beside an installed copy."""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hub import __main__ as hub

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dspark_kernels"
BACKENDS = ("cuda", "rocm", "cpu")
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None, reason="needs kernels (the extra `hub`), the Hub's loader"
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    assert hub.main(["--out", str(folder), "--repo-id", "someone/dspark-kernels"]) == 0
    return folder


def described(built, backend):
    return json.loads((built / "build" / f"torch-{backend}" / "metadata.json").read_text())


def run(code, *arguments, **environment):
    """A program in a process of its own, without the network."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["torch-ext/dspark_kernels", *(f"build/torch-{backend}" for backend in BACKENDS)])
def test_the_source_is_the_packages_own(built, folder):
    own = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.suffix in (".py", ".json")}
    own = {name for name in own if name.split("/")[0] not in ("checkpoint", "integrations")}
    there = {path.relative_to(built / folder).as_posix() for path in (built / folder).rglob("*.*") if path.is_file()}
    assert there - own == (set() if folder.startswith("torch-ext") else {"metadata.json", "dspark_kernels/__init__.py"})
    assert own <= there and len([name for name in own if name.startswith("launch/tables/")]) >= 8
    for name in own:
        assert (built / folder / name).read_bytes() == (PACKAGE / name).read_bytes(), name


def test_a_kernel_imports_itself_by_relative_names_and_little_else(built):
    """At import time the standard library and torch; Triton, numpy and matplotlib only where something asks for them."""
    folder = built / "torch-ext" / "dspark_kernels"
    for path in folder.rglob("*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        lazy = {child for node in ast.walk(module) if isinstance(node, (ast.FunctionDef, ast.Try)) for child in ast.walk(node)}
        for node in ast.walk(module):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in names:
                top = name.split(".")[0]
                assert top != "dspark_kernels", f"{path}: {name}"
                late = node in lazy or path.is_relative_to(folder / "kernels") or name == "numpy.typing"
                assert top in sys.stdlib_module_names or top == "torch" or (late and top in ("triton", "numpy", "matplotlib")), name


def test_metadata_names_every_file_with_its_hash(built):
    for backend in BACKENDS:
        folder, facts = built / "build" / f"torch-{backend}", described(built, backend)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        del files["metadata.json"]
        assert facts["digest"]["algorithm"] == "sha256" and set(facts["digest"]["files"]) == set(files)
        for name, path in files.items():
            assert base64.b64decode(facts["digest"]["files"][name]) == hashlib.sha256(path.read_bytes()).digest()
        assert facts["name"].replace("-", "_") == "dspark_kernels" and facts["backend"]["type"] == backend


def test_an_id_names_the_backend_and_the_source(built):
    ids = [described(built, backend)["id"] for backend in BACKENDS]
    assert len(set(ids)) == 3 and all(id.isidentifier() for id in ids)
    files = hub.package_files()
    assert ids[0] == f"_dspark_kernels_cuda_{hub.source_hash(files)}"
    for changed in (files | {"types.py": files["types.py"] + b"\n"}, {k: v for k, v in files.items() if k != "env.py"}):
        assert hub.source_hash(changed) != hub.source_hash(files)
    moved = dict(files)
    moved["types1.py"] = moved.pop("types.py")  # in the same place of the order
    assert hub.source_hash(moved) != hub.source_hash(files)


def test_the_description_has_the_architectures_with_launch_tables(built):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    build = tomllib.loads((built / "build.toml").read_text())
    assert build["general"]["name"] == "dspark-kernels" and build["general"]["backends"] == list(BACKENDS)
    assert build["general"]["hub"]["repo-id"] == "someone/dspark-kernels"
    tables = {path.stem for path in (PACKAGE / "launch" / "tables").glob("*.json")}
    noarch = build["torch-noarch"]
    named = {"sm_" + text.replace(".", "") for text in noarch["cuda_capabilities"]} | set(noarch["rocm_archs"])
    assert named == tables and "json" in noarch["pyext"]
    assert described(built, "cuda")["backend"]["archs"] == noarch["cuda_capabilities"]
    assert (
        described(built, "rocm")["backend"]["archs"] == noarch["rocm_archs"] and "archs" not in described(built, "cpu")["backend"]
    )


def test_the_card_is_filled_in_and_names_what_there_is(built):
    import dspark_kernels as dk

    card = (built / "README.md").read_text(encoding="utf-8")
    assert "{{" not in card and 'get_kernel("someone/dspark-kernels", version=0' in card
    assert "{{ repo_id }}" in (built / "CARD.md").read_text(encoding="utf-8")
    listed = card.split("\n## Use")[0]
    ops = {name for name in dk.__all__ if getattr(getattr(dk, name), "__module__", "").startswith("dspark_kernels.ops.")}
    assert len(ops) == 17 and {name for name in ops if f"`{name}`" not in listed} == set()
    for name in re.findall(r"`(\w+)`", listed):
        assert hasattr(dk, name) or hasattr(dk.cost, name), name


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: --out"),
        (["--out", "FULL"], "--out: expected a new or an empty folder"),
        (["--out", "x", "--backends", "cuda,metal"], "--backends: expected names among cuda, rocm, cpu, got 'metal'"),
        (["--out", "x", "--repo-id", "mine"], "--repo-id: expected OWNER/NAME, got 'mine'"),
    ],
)
def test_bad_arguments_take_one_line(tmp_path, arguments, message, capsys):
    (tmp_path / "file").write_text("")
    assert hub.main([str(tmp_path) if a == "FULL" else a for a in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"hub: {message}") and said.err.count("\n") == 1


# --- how it is loaded -------------------------------------------------------------------------------------------------

# Imports folders as the loader does, under the ids in their metadata, beside the installed package, and runs an op of each.
BESIDE = """
import importlib.util, json, sys
from pathlib import Path
import torch
import dspark_kernels

def load(file, name):
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

copies = [dspark_kernels]
for folder in map(Path, sys.argv[1:]):
    copies.append(load(folder / "__init__.py", json.loads((folder / "metadata.json").read_text())["id"]))
copies.append(load(folder / "dspark_kernels" / "__init__.py", "in_a_folder_of_its_name"))
base, anchors = torch.arange(24.0).view(2, 3, 4), torch.zeros(2, dtype=torch.int64)
results = [copy.draft_block(base, anchors, anchor_positions=anchors) for copy in copies]
assert all(torch.equal(result.tokens, base.argmax(2)) for result in results)
assert len({type(result) for result in results}) == len(copies), "records of one copy are not those of another"
names = [type(result).__module__.rpartition(".")[0] for result in results]
calls = {getattr(getattr(torch.ops, name), "draft_block").default for name in names}
assert len(calls) == len(copies), "an op of torch that two copies share"
try:
    copies[1].fixed_layout(results[0], anchors.int(), anchors=anchors, anchor_positions=anchors)
except TypeError as error:
    assert "block: expected DraftBlock" in str(error)
else:
    raise AssertionError("a record of another copy was taken")
print(*names)
"""


@needs_triton
def test_copies_in_one_process_share_no_ops(built):
    folders = [str(built / "build" / f"torch-{backend}") for backend in ("cuda", "cpu")]
    names = run(BESIDE, *folders).split()
    assert names[0] == "dspark_kernels" and names[1:3] == [described(built, backend)["id"] for backend in ("cuda", "cpu")]
    assert len(names) == len(set(names)) == 4


@needs_kernels
def test_the_tools_own_readers_accept_it(built):
    """kernel-builder's parser of build.toml and metadata.json, and its digest, which `kernels` brings along."""
    _rust = pytest.importorskip("kernels._rust", reason="needs kernels 0.17")
    build = _rust.Build.open(built)
    assert [str(backend).lower() for backend in build.general.backends] == list(BACKENDS)
    for backend in BACKENDS:
        folder = built / "build" / f"torch-{backend}"
        facts = _rust.Metadata.read_from_file(folder / "metadata.json")
        facts.digest.validate(_rust.Digest.hash_variant(facts.digest.algorithm, folder))
        assert facts.version == 0 and str(facts.name) == "dspark-kernels" and facts.python_depends == []


@needs_kernels
def test_its_tests_pass_on_what_the_loader_loads(built):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "kernels_ci", "-p", "no:cacheprovider", "--rootdir", str(built), "tests"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=built, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"^7 passed", done.stdout, re.M), done.stdout[-3000:] + done.stderr


@needs_kernels
def test_the_cards_example_runs(built):
    card = (built / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
    printed = run(example, LOCAL_KERNELS=f"someone/dspark-kernels={built}")
    assert printed.startswith("tensor([[") and "dtype=torch.int32" in printed


def test_every_test_of_the_kernel_is_marked():
    """kernel-builder's CI runs those marked alone."""
    text = (ROOT / "hub" / "tests" / "test_dspark_kernels.py").read_text(encoding="utf-8")
    tests = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert len(tests) == 6
    assert all("pytest.mark.kernels_ci" in map(ast.unparse, test.decorator_list) for test in tests)
