"""Which functions of serving engines bench.kernels times beside the ops, and whether they are installed here.

    python -m bench.engines

A line per op and engine: the function's module, and its version or why it does not import. Nothing is timed or written here:
`python -m bench.kernels` does that, in the same run as the ops, each engine only after its results were right. What is timed of an
engine and against which versions it was written stands in bench/shared/engines.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.shared import command


def parser() -> command.Parser:
    return command.Parser("bench.engines", __doc__)


def state(module: str) -> str:
    """The version of an installed module, or why there is none."""
    import importlib

    try:
        importlib.import_module(module)
    except Exception as error:  # whatever an engine raises where something that it needs is missing
        return f"not here: {command.first_line(error)}"
    package = sys.modules[module.split(".")[0]]
    return f"version {getattr(package, '__version__', 'unknown')}"


def work(arguments) -> int:
    from bench.shared.engines import ENGINES

    states = {module: state(module) for engines in ENGINES.values() for module in {e.module for e in engines.values()}}
    for op, engines in ENGINES.items():
        for name, engine in engines.items():
            print(f"{op:16} {name:22} {engine.module:36} {states[engine.module]}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """0: told; 2: a bad argument; 130: stopped."""
    return command.run(parser, None, work, argv)


if __name__ == "__main__":
    sys.exit(main())
