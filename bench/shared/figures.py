"""Styles that are readable without colour, and saving: the same data gives the same PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

FORMATS = ("png", "svg")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "--")
MARKERS = "osD^vx*P"
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
GREYS = ("0.25", "0.85", "0.6", "1.0", "0.45", "0.95", "0.7", "0.5")


def save(draw: Callable, data, path: Path) -> list[Path]:
    """Draw into path.png and path.svg. Raises LookupError where the data has nothing to draw."""
    import matplotlib
    from matplotlib.figure import Figure

    written = []
    # A fixed salt and no date: the same data gives the same files.
    with matplotlib.rc_context({"svg.hashsalt": "dspark_kernels", "font.size": 9, "hatch.linewidth": 0.6}):
        figure = Figure(layout="constrained")
        draw(figure, data)
        for suffix in FORMATS:
            to = path.with_name(f"{path.name}.{suffix}")
            figure.savefig(to, dpi=120, metadata={"Date": None} if suffix == "svg" else {"Software": None})
            written.append(to)
    return written


def line_style(number: int) -> dict:
    """Of one curve among several in a panel."""
    return dict(marker=MARKERS[number % 8], linestyle=LINES[number % 6], color=("black", "0.35", "0.55")[number % 3], markersize=5)
