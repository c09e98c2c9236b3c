"""What commands do with a bad argument: one line on stderr that names it, exit code 2."""

from __future__ import annotations

import argparse


class BadArgument(Exception):
    """Message of one line that names the argument."""


class Parser(argparse.ArgumentParser):
    """Raises BadArgument instead of ending the process."""

    def error(self, message):
        raise BadArgument(message)


def first_line(error: BaseException) -> str:
    """Of its message; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
