"""Who may import whom in bench: a helper is its command's own, no command imports another, and nothing imports in a circle.

A top-level entry of bench is a command: a file, or a folder with __main__.py and its helpers. Two are no commands, `shared`, for what
several of them use, and `assets`, the embedded models; in `assets` the modules build*.py are the command that makes these. Imports
inside functions count.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("shared", "assets")


def modules(root):
    """name -> path of every module below bench/."""
    found = {}
    for path in sorted((root / "bench").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def command_of(module):
    """The command that a module belongs to, None for what all may import."""
    _, *parts = module.split(".")
    if not parts:
        return None
    if parts[0] == "assets" and len(parts) > 1 and parts[1].startswith("build"):
        return "assets.build"
    return None if parts[0] in SHARED else parts[0]


def imports(root):
    """module -> modules of bench that it imports."""
    paths = modules(root)
    return {module: imported(module, path, paths) - {module} for module, path in paths.items()}


def imported(module, path, known):
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # A name is a submodule or something inside the module; without names the package alone is meant.
            names |= {name if (name := f"{base}.{alias.name}") in known else base for alias in node.names}
    return names & known.keys()


def foreign_imports(root):
    """ "importer: imported" wherever a module of a command is imported by what is not of that command."""
    return [
        f"{importer}: {module}"
        for importer, found in imports(root).items()
        for module in sorted(found)
        if command_of(module) is not None and command_of(importer) != command_of(module)
    ]


def circle(root):
    """Modules that import one another in a circle, in order; [] where there is none."""
    graph, done = imports(root), set()

    def walk(module, trail):
        if module in trail:
            return trail[trail.index(module) :]
        if module in done:
            return []
        for found in sorted(graph[module]):
            if ring := walk(found, [*trail, module]):
                return ring
        done.add(module)
        return []

    return next((ring for module in sorted(graph) if (ring := walk(module, []))), [])


def without_main(root):
    """Top-level entries that `python -m` cannot start."""
    found = []
    for entry in sorted((root / "bench").iterdir()):
        if entry.name in ("__init__.py", *SHARED):
            continue
        main = entry / "__main__.py" if entry.is_dir() else entry
        if main.suffix == ".py" and (entry.is_file() or list(entry.glob("*.py"))):
            if not (main.is_file() and '\nif __name__ == "__main__":\n' in main.read_text(encoding="utf-8")):
                found.append(entry.name)
    return found


def test_helpers_are_their_commands_own():
    assert foreign_imports(ROOT) == []


def test_no_circle():
    assert circle(ROOT) == []


def test_top_level_entries_are_commands():
    assert without_main(ROOT) == []


MAIN = 'from bench.round import report\n\n\nif __name__ == "__main__":\n    pass\n'
RIGHT = {
    "bench/__init__.py": "",
    "bench/shared/__init__.py": "",
    "bench/shared/timing.py": "",
    "bench/round/__init__.py": "",
    "bench/round/__main__.py": MAIN,
    "bench/round/report.py": "from bench.shared import timing\n",
    "bench/plot.py": 'from bench.shared import timing\n\n\nif __name__ == "__main__":\n    pass\n',
}
REPORT = "bench.round.report"


def tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_what_is_right_passes(tmp_path):
    tree(tmp_path, RIGHT)
    assert foreign_imports(tmp_path) == circle(tmp_path) == without_main(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("bench/plot.py", "from bench.round import report", [f"bench.plot: {REPORT}"]),
        ("bench/plot.py", "from bench.round.report import write", [f"bench.plot: {REPORT}"]),
        ("bench/plot.py", "from .round import report", [f"bench.plot: {REPORT}"]),
        ("bench/plot.py", "import bench.round.report", [f"bench.plot: {REPORT}"]),
        ("bench/plot.py", "def f():\n    from bench.round import report", [f"bench.plot: {REPORT}"]),
        ("bench/plot.py", "from bench import round", ["bench.plot: bench.round"]),
        ("bench/shared/timing.py", "from ..round import report", [f"bench.shared.timing: {REPORT}"]),
        ("bench/round/report.py", "from bench import plot", [f"{REPORT}: bench.plot"]),
    ],
)
def test_a_foreign_import_is_found(tmp_path, file, line, found):
    tree(tmp_path, RIGHT | {file: line + "\n" + RIGHT[file]})
    assert foreign_imports(tmp_path) == found


def test_a_circle_is_found(tmp_path):
    tree(
        tmp_path,
        RIGHT | {"bench/round/report.py": "def f():\n    from . import rows\n", "bench/round/rows.py": "from . import report\n"},
    )
    assert circle(tmp_path) == [REPORT, "bench.round.rows"]


def test_an_entry_that_does_not_start_is_found(tmp_path):
    tree(tmp_path, RIGHT | {"bench/helper.py": "", "bench/other/__init__.py": "", "bench/other/part.py": ""})
    assert without_main(tmp_path) == ["helper.py", "other"]
