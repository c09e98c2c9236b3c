"""Draws the films of replay.py in a terminal: two columns, a counter line below each, and what the colours mean.

A frame is drawn whenever a round ends. Where the cursor cannot move (a pipe, a dumb terminal) the last frame is printed alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from bench.decode.replay import Film, Shown, Token

if TYPE_CHECKING:  # an extra: bench.decode works without it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

LEAST_LINES = 3  # of text, however low the terminal is
FIXED_LINES = 6  # of a frame: title, labels, counters, legend, and an empty line above and below the text
GAP = 2  # columns between the two


class Mark(NamedTuple):
    """How a token is shown."""

    before: str = ""
    after: str = ""
    style: str = ""


class Marks(NamedTuple):
    accepted: Mark
    own: Mark
    legend: str


COLOURED = Marks(Mark(style="green"), Mark(style="bold red"), "accepted drafts green, the target's own tokens red")
BRACKETS = Marks(Mark(), Mark("[", "]"), "accepted drafts plain, the target's own tokens in brackets")


def marks(console: Console) -> Marks:
    """Colours, or brackets where there are none (NO_COLOR, a dumb terminal, a file)."""
    return COLOURED if console.color_system is not None and not console.no_color else BRACKETS


def show(films: Sequence[Film], console: Console | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
    """Every film, one after the other."""
    if console is None:
        from rich.console import Console

        console = Console(highlight=False, markup=False, emoji=False)
    for film in films:
        if console.is_terminal and not console.is_dumb_terminal:
            _play(film, console, sleep)
        else:
            console.print(frame(film, film.times[-1], console))


def _play(film: Film, console: Console, sleep: Callable[[float], None]) -> None:
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as screen:  # leaves the cursor visible when it is interrupted, too
        begun = time.monotonic()
        for now in film.times:
            sleep(max(0.0, begun + now - time.monotonic()))
            screen.update(frame(film, now, console, console.height), refresh=True)


def frame(film: Film, now: float, console: Console, height: int | None = None) -> Table:
    """What is on the screen at a time.

    height: lines of the screen; of longer texts the end is shown. None: no limit.
    """
    from rich.table import Table
    from rich.text import Text

    of, shown = marks(console), film.at(now)
    width = max(1, (console.width - GAP) // 2)
    lines = None if height is None else max(LEAST_LINES, height - FIXED_LINES)
    texts = [_tail(_text(film.prompt, part.tokens, of), console, width, lines) for part in shown]
    columns = Table.grid(padding=(0, GAP, 0, 0))
    for _ in film.tracks:
        columns.add_column(width=width, no_wrap=True)
    columns.add_row(*(Text(_heading(film, index, part), "bold") for index, part in enumerate(shown)))
    columns.add_row(*texts)
    columns.add_row(*(Text(counters(part)) for part in shown))
    page = Table.grid()
    page.add_row(Text(f"{film.title}: {film.speed}", no_wrap=True, overflow="ellipsis"))
    page.add_row("")
    page.add_row(columns)
    page.add_row(Text(of.legend, no_wrap=True, overflow="ellipsis"))
    return page


def _heading(film: Film, index: int, shown: Shown) -> str:
    label = film.tracks[index].label
    return f"{label}, {shown.seconds:.2f} s" if film.pace == "measured" else label


def counters(shown: Shown) -> str:
    """The line below a column."""
    line = f"{len(shown.tokens)} tokens, {shown.rounds} rounds"
    return line + (f", {shown.tokens_per_round:.2f} per round" if shown.rounds else "")


def _text(prompt: str, tokens: Sequence[Token], of: Marks) -> Text:
    from rich.text import Text

    text = Text(_printable(prompt), "dim", end="")
    text = Text.assemble(text, "|")
    for token in tokens:
        mark = of.accepted if token.accepted else of.own
        text.append(mark.before + _printable(token.text) + mark.after, mark.style)
    return text


def _tail(text: Text, console: Console, width: int, lines: int | None) -> Text:
    """The last lines of a text as wide as a column."""
    from rich.text import Text

    wrapped = text.wrap(console, width, overflow="fold", tab_size=4)
    return Text("\n").join(wrapped if lines is None else wrapped[-lines:])


def _printable(text: str) -> str:
    """Without what would move the cursor: a model can emit any character."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
