"""The report of bench.kernels: rows of a case on the screen and in the CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.shared import rows
from bench.shared.measure import Bench, Row, run


def write(path: Path, new: Sequence[Row]) -> None:
    """Put rows into the file: all rows of their cases are replaced, those of other cases stay."""
    rows.replace(path, new, ("op", "case"))


HEADER = ("", "p20", "median", "p80", "floor", "share", "target", "met")


def lines(done: Sequence[Row]) -> list[str]:
    """The rows of a case for the screen."""
    text = []
    for row in done:
        label = " ".join(part for part in (row.contender, row.call, row.cache) if part)
        if row.status != "ok":
            text.append(f"  {label.ljust(26)} {row.status}")
            continue
        cells = [f"{value:9.2f}" for value in (row.p20_us, row.p50_us, row.p80_us, row.floor_us)]
        cells.append(f"{row.share_of_floor:8.0%}")
        if row.target_us is not None:
            cells.append(f"{row.target_us:9.2f}  {row.met}")
        text.append(f"  {label.ljust(26)} {''.join(cells)}")
    return text


def report(cases, bench: Bench, path: Path) -> int:
    """Run cases one after another, each printed and written as soon as it is done."""
    wrong = []
    header = HEADER[0].ljust(29) + "".join(name.rjust(9) for name in HEADER[1:5]) + HEADER[5].rjust(8) + HEADER[6].rjust(9)
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.op} {case.name}", flush=True)
        done = run(case, bench)
        if number == 1:
            print(f"{header}  {HEADER[7]}")
        print("\n".join(lines(done)), flush=True)
        write(path, done)
        if any(row.status != "ok" and row.contender == "kernel" for row in done):
            wrong.append(f"{case.op} {case.name}")
    print(f"written to {path}")
    if wrong:
        print(f"not right, so not timed: {', '.join(wrong)}")
    return 1 if wrong else 0
