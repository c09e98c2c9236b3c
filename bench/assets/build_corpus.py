"""Text of the embedded models, from the Python that runs this: its library's source, its documentation, and tables made with it.

    code     source files of the standard library (no tests, encodings, vendored or generated files)
    docs     docstrings of those files and the topics of `pydoc_data`: English prose, high entropy
    tables   dates and characters, a line each, from `datetime` and `unicodedata`: low entropy

Held out: whole packages (a top-level module or directory with its docstrings; a topic, a year, a block of 256 characters), in the
order of a hash of their names, up to a share of each domain. Files that say the same twice are dropped; held-out text is cut at
every longer line that the training text has too, so that modules which share text (posixpath, ntpath) do not leak. Another Python
gives another corpus: the hash tells. Source text: PSF License Version 2; character names: Unicode License.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import hashlib
import inspect
import random
import sys
import sysconfig
import unicodedata
from collections.abc import Iterable
from pathlib import Path

DOMAINS = ("code", "docs", "tables")
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "ensurepip", "__pycache__", "lib-dynload"}
GENERATED = ("_sysconfigdata", "config-")
HELD_OUT = 0.05  # of a domain's characters, about
LONG_LINE = 30  # characters: shorter ones repeat everywhere
SHORTEST = 200  # characters of a held-out piece or of a docstring
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
YEARS = range(1600, 2400)
CHARACTERS = (range(0x20, 0x3400), range(0xA000, 0xAC00), range(0xF900, 0x10000))  # without ideographs and Hangul


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by domain, and what they came from."""

    training: dict[str, list[str]]
    held_out: dict[str, list[str]]
    facts: dict


def read(seed: int = 0, packages: int | None = None) -> Corpus:
    """The corpus of this Python; of the first so many packages of each domain where the number is given."""
    sources = _sources(packages)
    found = {"code": sources, "docs": _docs(sources), "tables": _tables(random.Random(seed))}
    training, held_out, names = {}, {}, {}
    for domain, by_package in found.items():
        order = _shuffled(by_package)[:packages]
        whole = sum(_size(by_package[name]) for name in order)
        # Docstrings go with their sources: the training code has them too.
        apart = [name for name in names["code"] if name in order] if domain == "docs" else []
        taken = sum(_size(by_package[name]) for name in apart)
        for name in order:
            if name in sources and domain == "docs":
                continue
            # A package that is most of what may be held out would be all that is evaluated.
            if taken < HELD_OUT * whole and _size(by_package[name]) < max(HELD_OUT, 1.5 / len(order)) * whole:
                apart.append(name)
                taken += _size(by_package[name])
        training[domain] = _distinct([text for name in order if name not in apart for text in by_package[name]])
        held_out[domain] = [text for name in apart for text in by_package[name]]
        names[domain] = apart
    known = {line.strip() for texts in training.values() for text in texts for line in text.splitlines()}
    held_out = {domain: [piece for text in texts for piece in _unknown(text, known)] for domain, texts in held_out.items()}
    facts = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "unicode": unicodedata.unidata_version,
        "characters": {domain: [sum(map(len, training[domain])), sum(map(len, held_out[domain]))] for domain in DOMAINS},
        "held_out": names,
        "sha256": digest(training, held_out),
    }
    return Corpus(training, held_out, facts)


def digest(*splits: dict[str, list[str]]) -> str:
    found = hashlib.sha256()
    for split in splits:
        for domain in DOMAINS:
            for text in split[domain]:
                found.update(f"{domain} {len(text)}\n{text}".encode())
    return found.hexdigest()


def _shuffled(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _size(texts: list[str]) -> int:
    return sum(map(len, texts))


def _distinct(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _unknown(text: str, known: set[str]) -> list[str]:
    """Pieces between the lines that the training text has."""
    pieces, lines = [], []
    for line in [*text.splitlines(keepends=True), None]:
        if line is None or (len(line.strip()) >= LONG_LINE and line.strip() in known):
            pieces.append("".join(lines))
            lines = []
        else:
            lines.append(line)
    return [piece for piece in pieces if len(piece) >= SHORTEST]


def _sources(packages: int | None) -> dict[str, list[str]]:
    """Source files by package."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if not LEFT_OUT.intersection(parts) and not parts[0].startswith(GENERATED):
            files.setdefault(parts[0].removesuffix(".py"), []).append(path)
    found: dict[str, list[str]] = {}
    for package in _shuffled(files)[:packages]:
        for path in files[package]:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                found.setdefault(package, []).append(text)
    return found


def _docs(sources: dict[str, list[str]]) -> dict[str, list[str]]:
    """Docstrings by package, and topics, each a package of its own."""
    found: dict[str, list[str]] = {}
    for package, texts in sources.items():
        for text in texts:
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                continue
            nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            for node in ast.walk(tree):
                words = ast.get_docstring(node, clean=False) if isinstance(node, nodes) else None
                if words and len(words) >= SHORTEST:
                    found.setdefault(package, []).append(inspect.cleandoc(words) + "\n")
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    for name, text in topics.items():
        found[f"topic {name}"] = [text]
    return found


def _tables(numbers: random.Random) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for year in YEARS:
        day, step = datetime.date(year, 1, 1), numbers.choice((1, 1, 7, 10))
        day += datetime.timedelta(numbers.randrange(300))
        lines = []
        while day.year == year and len(lines) < 40:
            name, of_year, week = WEEKDAYS[day.weekday()], day.timetuple().tm_yday, day.isocalendar()[1]
            lines.append(f"{day.isoformat()} {name} day {of_year:03d} week {week:02d}")
            day += datetime.timedelta(step)
        found[f"year {year}"] = ["\n".join(lines) + "\n"]
    for span in CHARACTERS:
        for first in range(span.start, span.stop, 256):
            lines = []
            for code in range(first, min(first + 256, span.stop)):
                name = unicodedata.name(chr(code), "")
                if name:
                    lines.append(f"U+{code:04X} {unicodedata.category(chr(code))} {name}")
            if lines:
                found[f"characters {first:04X}"] = ["\n".join(lines) + "\n"]
    return found
