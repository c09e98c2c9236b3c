"""What is done of a GPU run, in state.json, and files that are written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Result:
    """status: done, failed (exit code not 0), killed (past its limit), no time, missing."""

    status: str
    seconds: float = 0.0
    limit: float = 0.0
    exit: int | None = None
    tail: str = ""
    source: str = ""


def load_state(out: Path) -> dict[str, Result]:
    try:
        state = json.loads((out / "state.json").read_text(encoding="utf-8"))
        return {name: Result(**result) for name, result in state.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save_state(out: Path, state: dict[str, Result]) -> None:
    text = json.dumps({name: dataclasses.asdict(result) for name, result in state.items()}, indent=1)
    replace(out / "state.json", text + "\n")


def replace(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
