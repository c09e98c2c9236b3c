"""Who may import whom, over the whole tree; and `import dspark_kernels` in fresh processes, without Triton or a GPU."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "dspark_kernels"
STANDARD = sys.stdlib_module_names

# What ops read of the kernels: records and sizes, which need no Triton.
RECORDS = tuple(
    f"dspark_kernels.kernels.{name}"
    for name in ("args", "sizes", "accept.args", "attention.args", "draft.args", "draft_tree.args", "layout.args")
)
SHARED = (*RECORDS[:2], "dspark_kernels.kernels.primitives")

# Layer -> modules of this repository it may import, as prefixes, besides its own layer. First match wins.
LAYERS = {
    **dict.fromkeys(RECORDS, RECORDS[:2]),
    "dspark_kernels.kernels.primitives": RECORDS[:2],
    "dspark_kernels.kernels.accept": (*SHARED, "dspark_kernels.kernels.accept.args", "dspark_kernels.kernels.layout.rows"),
    "dspark_kernels.kernels.attention": (*SHARED, "dspark_kernels.kernels.attention.args"),
    "dspark_kernels.kernels.draft": (*SHARED, "dspark_kernels.kernels.draft.args"),
    "dspark_kernels.kernels.draft_tree": (
        *SHARED,
        "dspark_kernels.kernels.draft_tree.args",
        "dspark_kernels.kernels.draft",
        "dspark_kernels.kernels.draft.args",
    ),
    "dspark_kernels.kernels.layout.rows": (*SHARED, "dspark_kernels.kernels.layout.args"),
    "dspark_kernels.kernels.layout": (*SHARED, "dspark_kernels.kernels.layout.args", "dspark_kernels.kernels.layout.rows"),
    "dspark_kernels.kernels": SHARED,
    "dspark_kernels.launch.arch": (),
    "dspark_kernels.launch.table": ("dspark_kernels.launch.arch",),
    "dspark_kernels.launch.accept.items": ("dspark_kernels.launch.arch",),
    "dspark_kernels.launch": (
        "dspark_kernels.launch.arch",
        "dspark_kernels.launch.table",
        "dspark_kernels.launch.accept.items",
        "dspark_kernels.kernels.sizes",
    ),
    "dspark_kernels.ops": (
        "dspark_kernels.caches",
        "dspark_kernels.types",
        "dspark_kernels.checks",
        "dspark_kernels.choices",
        "dspark_kernels.library",
        "dspark_kernels.workspace",
        "dspark_kernels.launch",
        *RECORDS,
    ),
    "dspark_kernels.library": ("dspark_kernels.launch.arch", "dspark_kernels.testing.interpreter"),
    "dspark_kernels.checks": (),
    "dspark_kernels.choices": (),
    "dspark_kernels.cost": ("dspark_kernels.checks",),
    "dspark_kernels.caches": ("dspark_kernels.checks",),
    "dspark_kernels.proposals": ("dspark_kernels.checks",),
    "dspark_kernels.types": (
        "dspark_kernels.checks",
        "dspark_kernels.choices",
        "dspark_kernels.cost",
        "dspark_kernels.caches",
        "dspark_kernels.proposals",
    ),
    "dspark_kernels.workspace": ("dspark_kernels.checks", "dspark_kernels.library"),
    "dspark_kernels.testing.interpreter": (),
    "dspark_kernels.testing.statistics": (),
    "dspark_kernels.testing.chain": ("dspark_kernels.types", "dspark_kernels.testing.statistics"),
    "dspark_kernels.testing.tree": (
        "dspark_kernels.types",
        "dspark_kernels.testing.statistics",
        "dspark_kernels.testing.chain",
    ),
    "dspark_kernels.checkpoint.places": (),
    "dspark_kernels.checkpoint.files": ("dspark_kernels.checkpoint.places",),
    "dspark_kernels.checkpoint.scaling": ("dspark_kernels.checkpoint.places",),
    "dspark_kernels.checkpoint.rope": ("dspark_kernels.checkpoint.places", "dspark_kernels.checkpoint.scaling"),
    "dspark_kernels.checkpoint.attention": ("dspark_kernels.checkpoint.places",),
    "dspark_kernels": ("dspark_kernels",),
    # Configurations and directories have one reading, which verifies no kernel.
    "reference": (
        "dspark_kernels.types",
        *(f"dspark_kernels.checkpoint.{name}" for name in ("files", "rope", "scaling", "attention")),
    ),
}
APART = ("dspark_kernels.launch",)  # layers whose modules do not import each other either
# Layer -> outside modules it may import.
OUTSIDE = {
    **dict.fromkeys(RECORDS, ()),
    "dspark_kernels.kernels": ("triton",),  # no torch: kernels know no ops, no types, no torch.library
    "dspark_kernels.launch": ("torch",),
    "dspark_kernels.testing": ("torch", "numpy", "triton"),
    "dspark_kernels.checkpoint": ("torch", "safetensors"),
    "dspark_kernels.calibration": ("torch", "matplotlib"),
    "dspark_kernels.integrations.transformers": ("torch", "transformers"),
    "dspark_kernels.library": ("torch", "triton"),
    "dspark_kernels.env": ("torch", "triton"),
    "dspark_kernels": ("torch",),
    "reference.huggingface": ("torch", "transformers"),
    "reference": ("torch", "numpy"),
}
EXTRAS = ("safetensors", "matplotlib", "transformers")  # only inside functions: the package works without them
# Only here may a module be named at run time: a kernel's, at its first launch; an engine's, when the engine asks for an adapter.
DYNAMIC = ("dspark_kernels.library", "dspark_kernels.integrations.guard")
ENVIRONMENT = ("os", "sys", "importlib", "subprocess")  # what a kernel may not look at, though it is standard


def _first(table, module):
    return next((value for layer, value in table.items() if _within(module, layer)), None)


def _layer(module):
    return next(layer for layer in LAYERS if _within(module, layer))


def _within(module, prefix):
    return module == prefix or module.startswith(prefix + ".")


def _name(path, root):
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path, root):
    """(line, module, whether inside a function) of every import; `from x import y` as x.y where y is a module."""
    tree = ast.parse(path.read_text())
    inside = {child for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for child in ast.walk(node)}
    package = list(path.relative_to(root).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, node in inside
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            for alias in node.names:
                whole = root.joinpath(*base.split("."), alias.name)
                is_module = whole.is_dir() or whole.with_suffix(".py").is_file()
                yield node.lineno, f"{base}.{alias.name}" if is_module else base, node in inside


def _dynamic(path):
    """Lines that import a module by a name made at run time."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                yield node.lineno


def _registered(path):
    """Lines that reach an op by its registered name, which needs no import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == f"torch.ops.{PACKAGE}":
            yield node.lineno


def violations(root):
    """Every import under root/dspark_kernels and root/reference that the arrows forbid."""
    found = []
    for folder in (PACKAGE, "reference"):
        for path in sorted((root / folder).rglob("*.py")):
            module = _name(path, root)
            where = path.relative_to(root)
            layer = _layer(module)
            if module not in DYNAMIC:
                found += [f"{where}:{line}: imports by a name made at run time" for line in _dynamic(path)]
            if layer == "reference":
                found += [f"{where}:{line}: {module} may not call a registered op" for line in _registered(path)]
            for line, target, in_function in _imports(path, root):
                top = target.split(".")[0]
                if top in (PACKAGE, "reference", "tests", "bench", "examples"):
                    own = () if layer in APART else (layer,)
                    allowed = any(_within(target, prefix) for prefix in (*own, *LAYERS[layer]))
                    if _within(target, "reference") or _within(target, PACKAGE):
                        target_layer = _layer(target)
                        # Being inside an allowed layer is not enough where a part of it is a layer of its own.
                        allowed &= target_layer == layer or any(_within(target_layer, p) for p in LAYERS[layer])
                    if layer == PACKAGE and _within(target, f"{PACKAGE}.kernels"):
                        allowed = False
                elif top in STANDARD:
                    allowed = not (_within(layer, f"{PACKAGE}.kernels") and top in ENVIRONMENT)
                else:
                    allowed = top in _first(OUTSIDE, module)
                    late = module in DYNAMIC or top in EXTRAS
                    allowed &= not late or in_function or top == "torch"
                if not allowed:
                    found.append(f"{where}:{line}: {module} may not import {target}")
    return found


def circles(root, folder):
    """Groups of modules under root/folder that import each other, imports inside functions included."""
    paths = {_name(path, root): path for path in (root / folder).rglob("*.py")}
    imported = {module: {target for _, target, _ in _imports(path, root)} & paths.keys() for module, path in paths.items()}
    while leaves := [module for module, targets in imported.items() if not targets - {module}]:
        for module in leaves:
            del imported[module]
        for targets in imported.values():
            targets.difference_update(leaves)
    # What is left is on a circle or imports one.
    reached = {module: set(targets) for module, targets in imported.items()}
    for through in imported:
        for targets in reached.values():
            if through in targets:
                targets |= reached[through]
    return sorted(
        {
            tuple(sorted(other for other in reached if {module} <= reached[other] and other in reached[module]))
            for module in reached
            if module in reached[module]
        }
    )


def test_arrows():
    assert violations(ROOT) == []


def test_no_module_of_the_reference_imports_itself_by_way_of_others():
    assert circles(ROOT, "reference") == []


def test_a_circle_is_found(tmp_path):
    (tmp_path / "reference" / "cases").mkdir(parents=True)
    for name, code in {
        "a": "from .b import B",
        "b": "def f():\n    from . import c",
        "c": "from reference import a",
        "d": "from . import a, e",
        "e": "",
        "cases/__init__": "from .x import X",
        "cases/x": "from . import X",
    }.items():
        (tmp_path / "reference" / f"{name}.py").write_text(code)
    assert circles(tmp_path, "reference") == [
        ("reference.a", "reference.b", "reference.c"),
        ("reference.cases", "reference.cases.x"),
    ]


@pytest.mark.parametrize(
    "path, code",
    [
        ("dspark_kernels/kernels/primitives/x.py", "from ..draft import draft_dense_kernel"),
        ("dspark_kernels/kernels/accept/x.py", "from ..draft.dense import draft_dense_kernel"),
        ("dspark_kernels/kernels/draft/x.py", "from ..draft_tree import static"),
        ("dspark_kernels/kernels/draft/x.py", "from ..accept.rows import soft_prob"),
        ("dspark_kernels/kernels/layout/rows.py", "from .fixed import fixed_layout_kernel"),
        ("dspark_kernels/kernels/compact.py", "from .draft import dense"),
        ("dspark_kernels/kernels/args.py", "import triton"),
        ("dspark_kernels/ops/x.py", "from ..kernels.draft import dense"),
        ("dspark_kernels/kernels/x.py", "from ..types import Flag"),
        ("dspark_kernels/kernels/x.py", "import dspark_kernels.ops.draft"),
        ("dspark_kernels/kernels/x.py", "import torch.library"),
        ("dspark_kernels/kernels/x.py", "def launch():\n    import os"),
        ("dspark_kernels/launch/x.py", "from ..kernels import draft"),
        ("dspark_kernels/launch/x.py", "from . import draft"),
        ("dspark_kernels/launch/arch.py", "from . import table"),
        ("dspark_kernels/launch/x.py", "from ..types import Flag"),
        ("dspark_kernels/ops/x.py", "from ..kernels import draft"),
        ("dspark_kernels/ops/x.py", "from .. import kernels"),
        ("dspark_kernels/ops/x.py", "import triton"),
        ("dspark_kernels/testing/chain/x.py", "from ..tree import draft"),
        ("dspark_kernels/testing/tree/x.py", "from ...ops.draft import draft_block"),
        ("dspark_kernels/types.py", "from .ops import draft"),
        ("dspark_kernels/cost.py", "from .types import Flag"),
        ("dspark_kernels/x.py", "from .kernels import draft"),
        ("dspark_kernels/x.py", "import reference.philox"),
        ("dspark_kernels/x.py", "def f():\n    from tests import equality"),
        ("dspark_kernels/x.py", "from bench import compile"),
        ("dspark_kernels/x.py", "import importlib\nimportlib.import_module('bench')"),
        ("dspark_kernels/x.py", "import numpy"),
        ("dspark_kernels/library.py", "import triton"),
        ("dspark_kernels/checkpoint/x.py", "import safetensors"),
        ("dspark_kernels/integrations/x.py", "def f():\n    import transformers"),
        ("dspark_kernels/integrations/transformers/x.py", "import transformers"),
        ("dspark_kernels/integrations/transformers/x.py", "from ...kernels import draft"),
        ("dspark_kernels/calibration.py", "from matplotlib.figure import Figure"),
        ("dspark_kernels/calibration.py", "def f():\n    import numpy"),
        ("dspark_kernels/x.py", "def f():\n    import matplotlib"),
        ("reference/x.py", "from dspark_kernels import draft_block"),
        ("reference/x.py", "import dspark_kernels.checks"),
        ("reference/x.py", "from dspark_kernels.checkpoint import load_target"),
        ("dspark_kernels/checkpoint/rope.py", "from . import x"),
        ("reference/x.py", "from dspark_kernels.kernels.primitives import philox"),
        ("reference/x.py", "from tests import equality"),
        ("reference/x.py", "import triton"),
        ("reference/x.py", "import torch\ntorch.ops.dspark_kernels.draft_block()"),
        ("reference/x.py", "def f():\n    import transformers"),
        ("reference/huggingface.py", "import transformers"),
    ],
)
def test_a_violation_is_found(tmp_path, path, code):
    kernels = [f"kernels/{folder}" for folder in ("accept", "draft", "draft_tree", "layout", "primitives")]
    for package in (
        "",
        "checkpoint",
        "integrations",
        "integrations/transformers",
        "kernels",
        *kernels,
        "launch",
        "ops",
        "testing",
        "testing/chain",
        "testing/tree",
    ):
        folder = tmp_path / PACKAGE / package
        folder.mkdir(exist_ok=True)
        for module in ("__init__", "types", "checks", "draft", "dense", "static", "fixed", "rows", "table"):
            (folder / f"{module}.py").write_text("")
    (tmp_path / "reference").mkdir()
    assert violations(tmp_path) == []
    (tmp_path / path).write_text(code)
    assert len(violations(tmp_path)) == 1


def _run(code, **environment):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


BLOCKED = "import sys; sys.modules['triton'] = None\n"


def test_the_package_imports_without_triton_and_without_a_gpu():
    code = "import dspark_kernels as dk, torch; print(dk.Flag.NAN.value, torch.cuda.is_available())"
    done = _run(BLOCKED + code, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["2", "False"], "")


def test_importing_the_package_does_not_import_triton_or_the_rest_of_the_repository():
    done = _run(
        "import dspark_kernels, sys\n"
        "outside = ('triton', 'reference', 'tests', 'bench', 'safetensors', 'matplotlib')\n"
        "print([m for m in sys.modules if m.split('.')[0] in outside])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_an_op_without_triton_says_what_is_missing():
    done = _run(
        BLOCKED + "import torch, dspark_kernels as dk\n"
        "z = torch.zeros(1, dtype=torch.int64)\n"
        "dk.draft_block(torch.zeros(1, 1, 8), z, anchor_positions=z)"
    )
    assert done.returncode == 1 and "RuntimeError: dspark_kernels: the kernels need Triton" in done.stderr


def test_the_interpreter_module_without_triton_has_nothing_to_do():
    done = _run(BLOCKED + "from dspark_kernels.testing import interpreter as i; print(i.interpreting(), i.repair())")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_the_reference_imports_without_triton():
    modules = [_name(path, ROOT) for path in sorted((ROOT / "reference").rglob("*.py"))]
    done = _run(BLOCKED + "\n".join(f"import {module}" for module in modules))
    assert done.returncode == 0, done.stderr
