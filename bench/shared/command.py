"""How every command of bench begins and ends.

    main(argv) = run(parser, check, "bench.NAME.work", argv)

`parser` and `check` need no torch, so that `--help` and a bad argument are answered at once; the module whose `run(arguments)` does the
work is imported behind them. A bad argument is one line on stderr that names it, and exit status 2. Ctrl-C is one line that says what is kept, and 130. Where the reader
of the output has gone (`| head`) the command ends silently with 141.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench.shared.paths import RESULTS

BAD, STOPPED, CUT = 2, 130, 141
OUTPUTS = ("out", "results", "plot", "save_cost", "acceptance", "assets")  # arguments that name what a command writes


class BadArgument(Exception):
    """Message of one line that names the argument."""


class Parser(argparse.ArgumentParser):
    """Of a command's module: `python -m <module>`, described by the first line of its docstring, with the rest below the options.

    Raises BadArgument instead of ending the process.
    """

    def __init__(self, module: str, doc: str, **options):
        first, rest = doc.split("\n", 1)
        options = dict(epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter) | options
        super().__init__(prog=f"python -m {module}", description=first, **options)

    def error(self, message):
        raise BadArgument(message)


def run(
    parser: Callable[[], Parser],
    check: Callable[[argparse.Namespace], None] | None,
    work: str | Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """The command's exit status.

    check   fills in defaults and refuses what cannot be, of the parsed arguments
    work    all else: the module whose `run` does it, or a function that imports what it needs
    """
    p = parser()
    name, before, outputs = p.prog.removeprefix("python -m "), {}, []
    try:
        arguments = p.parse_args(argv)
        if check is not None:
            check(arguments)
        outputs = _outputs(arguments)
        before = _files(outputs)
        if isinstance(work, str):
            work = importlib.import_module(work).run
        return work(arguments) or 0
    except BadArgument as error:
        print(f"{name}: {error}", file=sys.stderr)
        return BAD
    except BrokenPipeError:  # who reads what is printed has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT
    except KeyboardInterrupt:
        written = [path for path, state in _files(outputs).items() if before.get(path) != state]
        print(f"{name}: stopped; {_kept(written)}", file=sys.stderr)
        return STOPPED


def _outputs(arguments: argparse.Namespace) -> list[Path]:
    """Where a command with these arguments may write."""
    found = [RESULTS]
    for name in OUTPUTS:
        value = getattr(arguments, name, None)
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [Path(path) for path in values if isinstance(path, (str, Path))]
    return found


def _files(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """(time of the last change, size) of the files, and of those in the folders and in theirs."""
    found = {}
    for path in paths:
        for file in (*path.glob("*"), *path.glob("*/*")) if path.is_dir() else (path,):
            try:
                if file.is_file():
                    found[file.absolute()] = (file.stat().st_mtime_ns, file.stat().st_size)
            except OSError:  # gone meanwhile
                continue
    return found


def _kept(written: Sequence[Path]) -> str:
    if not written:
        return "nothing is written"
    more = f" and {len(written) - 3} more files" if len(written) > 3 else ""
    return f"what was done until then is kept in {', '.join(map(str, sorted(written)[:3]))}{more}"


# --- what checks have in common ---------------------------------------------------------------------------------------


def check_file(option: str, path) -> None:
    """Raise BadArgument unless a file can be written there. None: nothing is to be written."""
    if path is not None and (Path(path).is_dir() or not Path(path).resolve().parent.is_dir()):
        raise BadArgument(f"{option}: expected a file in a folder that exists, got {path}")


def check_least(option: str, value, least) -> None:
    """Raise BadArgument for a number below `least`, or none; None: not given."""
    if value is not None and not least <= value < float("inf"):
        raise BadArgument(f"{option}: expected at least {least:g}, got {value:g}")


def check_above_zero(option: str, value) -> None:
    """Raise BadArgument for a number that is not above 0, or infinite; None: not given."""
    if value is not None and not 0 < value < float("inf"):
        raise BadArgument(f"{option}: expected a number above 0, got {value:g}")


def first_line(error: BaseException) -> str:
    """Of its message; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
