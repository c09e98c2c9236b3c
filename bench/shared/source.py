"""What a module of this repository says, read from its source: names and numbers for options, without importing torch.

Commands answer `--help` and bad arguments at once. What they take is decided where the work is done, in modules that import torch, and
stands there once.
"""

from __future__ import annotations

import ast
import functools

from bench.shared.paths import ROOT


def literal(module: str, name: str):
    """The value that a module gives to a name at its top level; of a dict whose values are no literals, its keys."""
    node = _assigned(module)[name]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return tuple(ast.literal_eval(key) for key in node.keys)


@functools.cache
def _assigned(module: str) -> dict[str, ast.expr]:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            names, values = (
                (target.elts, getattr(node.value, "elts", ())) if isinstance(target, ast.Tuple) else ([target], [node.value])
            )
            found |= {name.id: value for name, value in zip(names, values, strict=True) if isinstance(name, ast.Name)}
    return found


def architectures() -> list[str]:
    """The GPUs that kernels are compiled for: each has a table of launch configurations."""
    return sorted(path.stem for path in (ROOT / "dspark_kernels" / "launch" / "tables").glob("*.json"))
