"""A progress bar on stderr, where tqdm is installed and somebody watches."""

from __future__ import annotations

import sys


class Progress:
    """unit: of what is counted."""

    def __init__(self, total: int, unit: str = "tok"):
        self._bar = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, unit=unit, leave=False, disable=not sys.stderr.isatty())

    def start(self, label: str) -> None:
        if self._bar is not None:
            self._bar.set_description(label)

    def __call__(self, tokens: int) -> None:
        if self._bar is not None:
            self._bar.update(tokens)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
