"""The sections of the report: which files each one reads, and what it shows of them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from bench.report import page
from bench.shared.command import BadArgument

Missing = list[tuple[str, str]]


class Source:
    """A folder of results. What is looked for and not there is kept, with the command that makes it."""

    def __init__(self, folder: Path):
        self.folder, self.missing = folder, []

    def rows(self, name: str, how: str, needed: tuple[str, ...]) -> list[dict]:
        """Of a CSV file; none where it is not there.

        Raises:
            BadArgument: it has not the columns `needed`.
        """
        path = self.folder / name
        if not path.is_file():
            self.missing.append((name, how))
            return []
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or ()
        if lacking := [column for column in needed if column not in columns]:
            raise BadArgument(f"{path}: has no column {', '.join(lacking)}")
        return rows

    def picture(self, name: str, how: str, caption: str) -> str:
        path = self.folder / name
        if path.is_file():
            return page.picture(path, caption)
        self.missing.append((name, how))
        return page.absent(name, how)


def run(arguments) -> int:
    """Writes the page and names what is not there."""
    html, missing = report(Path(arguments.results))
    Path(arguments.out).write_text(html, encoding="utf-8")
    for name, how in missing:
        print(f"not there: {name} ({how})")
    print(f"{arguments.out}: {len(html) // 1024} kB")
    return 0


def report(folder: Path) -> tuple[str, Missing]:
    """The page, and what was not there.

    Raises:
        BadArgument: a file has not the columns of its kind.
    """
    source = Source(folder)
    sections = [(name, heading, make(source)) for name, heading, make in SECTIONS]
    lead = (
        "Triton kernels for the draft and verify steps of speculative decoding, one launch per op. Each section says whether its "
        "numbers were measured, counted or modelled."
    )
    return page.page("dspark_kernels: results", lead, sections), source.missing


def _short(text: str, digits: int = 3) -> str:
    """A number in few digits; other text as it is."""
    try:
        return f"{float(text):.{digits}g}" if abs(float(text)) < 1000 else f"{float(text):,.0f}"
    except ValueError:
        return text


def _measured(source: Source) -> str:
    how = "python -m bench.gpu on a machine with a GPU"
    files = sorted(source.folder.glob("kernels-*.csv"))
    if not files:
        source.missing.append(("kernels-<gpu>.csv", how))
        return page.kind("NOT MEASURED", "No kernel has been timed on a GPU yet.") + page.absent("kernels-<gpu>.csv", how)
    html = ""
    for file in files:
        rows = source.rows(file.name, how, ("op", "case", "contender", "call", "cache", "p50_us", "share_of_floor"))
        shown = [row for row in rows if (row["call"], row["cache"]) == ("graph", "cold")]
        html += page.kind("MEASURED", f"{file.stem.removeprefix('kernels-')}: replays of CUDA graphs, inputs not in the cache.")
        head = ("op", "case", "of", "median us", "share of the floor")
        html += page.table(head, [[r["op"], r["case"], r["contender"], _short(r["p50_us"]), _short(r["share_of_floor"])]
                                  for r in shown])  # fmt: skip
    return html


def _modelled(source: Source) -> str:
    name, how = "model/h200.csv", "python -m bench.model"
    rows = source.rows(name, how, ("op", "case", "us", "low_us", "high_us", "floor_us", "target_us", "bound"))
    if not rows:
        return page.absent(name, how)
    peers = source.rows("model/peers-h200.csv", how, ("op", "case", "peer", "version", "path", "kernel", "us"))
    others: dict[tuple[str, str], list[str]] = {}
    for row in peers:
        if row["kernel"] == "step":
            others.setdefault((row["op"], row["case"]), []).append(
                f"{row['peer']} {row['version']} {row['path']}: {_short(row['us'])}"
            )
    shown, entries = [], []
    for row in rows:
        op, case = row["op"], row["case"]
        between = f"{_short(row['low_us'])} to {_short(row['high_us'])}"
        numbers = [_short(row["us"]), between, _short(row["floor_us"]), _short(row["target_us"] or "-"), row["bound"]]
        shown.append([f"{op} {case}", *numbers, "; ".join(others.get((op, case), ())) or "-"])
        times = float(row["us"]) / float(row["floor_us"])
        entries.append(page.Bar(f"{op} {case}", times, (1.0,), f"{times:.2f}"))
    head = ("op and case", "us", "range", "floor us", "target us", "bound by", "engines' kernels through the same model, us")
    text = "Times on an H200, made of what the compiled kernels hold and of constants; no GPU was there. The floor: bytes that must move."
    return (
        page.kind("MODELLED", text)
        + page.table(head, shown)
        + page.paragraph(
            "Modelled time over the floor; the mark is the floor, where nothing but the bytes that must move would count."
        )
        + page.bars([entry for entry in entries if entry.value < 20])
    )


def _compiled(source: Source) -> str:
    name, how = "compile.csv", "python -m bench.compile"
    rows = source.rows(name, how, ("op", "case", "arch", "registers", "spill_stores", "spill_loads", "scalar_spills", "triton"))
    if not rows:
        return page.absent(name, how)
    shown = []
    for arch in dict.fromkeys(row["arch"] for row in rows):
        own = [row for row in rows if row["arch"] == arch]
        spilling = [row for row in own if any(int(row[kind] or 0) for kind in ("spill_stores", "spill_loads", "scalar_spills"))]
        shown.append([arch, len(own), len({row["op"] for row in own}), len(spilling), max(int(row["registers"]) for row in own)])
    versions = ", ".join(sorted({row["triton"] for row in rows}))
    text = f"Every launch of the report compiled by Triton {versions} for each architecture, without a GPU."
    return page.kind("COMPILED", text) + page.table(("architecture", "launches", "ops", "that spill", "most registers"), shown)


def _counted(source: Source) -> str:
    html = page.kind("COUNTED", "Instructions and bytes of the compiled kernels while a CPU executes their PTX, 151,936 ids.")
    name, how = "counters.csv", "python -m bench.kernels --counters"
    needed = ("op", "case", "requests", "element", "instructions_per_element", "moved_per_element", "moved_over_must_move")
    if rows := source.rows(name, how, needed):
        head = ("op and case", "requests", "per", "thread instructions", "bytes", "bytes over those that must move")
        html += page.table(head, [[f"{r['op']} {r['case']}", r["requests"], r["element"], _short(r["instructions_per_element"]),
                                   _short(r["moved_per_element"]), _short(r["moved_over_must_move"])] for r in rows])  # fmt: skip
    else:
        html += page.absent(name, how)
    name, how = "host.csv", "python -m bench.kernels --host"
    if rows := source.rows(name, how, ("op", "case", "plain_us", "prepared_us", "cpu")):
        html += page.kind("MEASURED", f"CPU time of a call before its launch, {rows[0]['cpu']}.")
        head = ("op and case", "eager us", "prepared us")
        html += page.table(head, [[f"{r['op']} {r['case']}", _short(r["plain_us"]), _short(r["prepared_us"])] for r in rows])
    else:
        html += page.absent(name, how)
    return html


def _right(source: Source) -> str:
    html = page.kind(
        "CHECKED", "Tests of ops on compiled kernels, every launch again in each mode of the machine, race detection among them."
    )
    name, how = "machine/files.csv", "python tests/machine/sweep.py"
    if rows := source.rows(name, how, ("file", "passed", "failed", "launches", "races_within")):
        total = {key: sum(int(row[key]) for row in rows) for key in ("passed", "failed", "launches")}
        html += page.paragraph(
            f"{len(rows)} files, {total['passed']} tests passed, {total['failed']} failed, {total['launches']} launches."
        )
        head = ("file", "passed", "failed", "launches")
        html += page.table(head, [[row[key] for key in head] for row in rows])
    else:
        html += page.absent(name, how)
    name, how = "machine/mutants.csv", "python tests/machine/mutants.py"
    if rows := source.rows(name, how, ("file", "change", "seen")):
        seen = sum(row["seen"] == "yes" for row in rows)
        html += page.paragraph(f"Fences and barriers taken out one at a time: {seen} of {len(rows)} are seen by a test; the others stand "
                               "in tests/machine/mutants.py with the reason why the order holds without them.")  # fmt: skip
    else:
        html += page.absent(name, how)
    verdicts = []
    for file in sorted((source.folder / "conformance").rglob("*.txt")):
        lines = file.read_text(encoding="utf-8").strip().splitlines()
        where = "compiled" if file.parent.name == "compiled" else "interpreter"
        verdicts.append([file.stem, where, lines[-1].split(";")[0] if lines else "empty"])
    if verdicts:
        html += page.paragraph("Lossless: drawn tokens against exact distributions (python -m dspark_kernels.testing).")
        html += page.table(("rule", "kernels", "result"), verdicts)
    return html


def _decoding(source: Source) -> str:
    html = page.kind("MEASURED", "Rounds of the embedded models: counts do not depend on the machine.")
    for name, caption in (
        ("acceptance.svg", "Acceptance by draft position."),
        ("systems-position.svg", "Acceptance by draft position of the systems side by side."),
        ("systems-time.svg", "Tokens per round against the time that drafting takes."),
        ("systems-ece.svg", "Reliability of the confidence before and after temperatures from another domain."),
        ("launches.svg", "Launches per round: this package and plain PyTorch."),
    ):
        html += source.picture(name, "python -m bench.plot", caption)
    return html


def _load(source: Source) -> str:
    html = page.kind(
        "SIMULATED", "Steps of a served model priced by its cost table, with acceptance drawn from the measured rounds."
    )
    html += source.picture("load.svg", "python -m bench.load", "Throughput against the time that a user waits, by policy.")
    name, how = "load.csv", "python -m bench.load"
    if rows := source.rows(name, how, ("policy", "concurrency", "tokens_per_second", "tokens_per_second_per_user", "best")):
        best = [row for row in rows if row["best"] == "1"]
        head = ("requests at once", "best policy", "tokens per second", "per user")
        html += page.table(head, [[row["concurrency"], row["policy"], _short(row["tokens_per_second"]),
                                   _short(row["tokens_per_second_per_user"])] for row in best])  # fmt: skip
    else:
        html += page.absent(name, how)
    return html


SECTIONS: tuple[tuple[str, str, Callable[[Source], str]], ...] = (
    ("measured", "On a GPU", _measured),
    ("modelled", "Modelled times", _modelled),
    ("compiled", "Eight architectures", _compiled),
    ("counted", "Instructions, bytes, host time", _counted),
    ("right", "Right when compiled", _right),
    ("decoding", "Decoding", _decoding),
    ("load", "Under load", _load),
)
