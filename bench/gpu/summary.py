"""summary.md of a GPU run: the steps, then the numbers beside their targets, from the files of the run."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.state import Result
from bench.gpu.steps import Step
from bench.shared import launch_table

HEAD = "##### "  # before a step in its log


def summary(todo: Sequence[Step], state: dict[str, Result], out: Path) -> str:
    """Markdown: the steps, then the numbers beside their targets."""
    text = ["# GPU run", ""]
    facts = _facts_line(out)
    if facts:
        text += [facts, ""]
    text += ["| step | status | seconds | limit | last line |", "| --- | --- | --- | --- | --- |"]
    for step in todo:
        result = state.get(step.name, Result("not yet"))
        last = result.tail.strip().splitlines()[-1:] or [""]
        cells = (step.name, result.status, f"{result.seconds:.0f}", f"{result.limit or step.limit:.0f}", _cell(last[0][:120]))
        text.append(f"| {' | '.join(cells)} |")
    counts = test_counts(out / "tests.txt")
    if counts:
        text += ["", "Tests marked gpu: " + ", ".join(f"{number} {name}" for name, number in counts.items()) + "."]
    text += _times(out / "kernels.csv") + _beside(out / "kernels.csv")
    text += _round(out / "round.csv") + _launches(out / "launches.csv")
    log = sections(out / "log.txt")
    text += _found(log.get("tune", ""), r"^\[\d+/\d+\] .*(?: before|no time left|reference).*", "Launch configurations")
    text += _found(log.get("decode", ""), r"^  (?:ok |NOT)  .*|^dspark.*|^autoregressive.*", "Decoding")
    checks = "\n".join(f"{HEAD}{name}\n{log[name]}" for name in ("memcheck", "racecheck") if name in log)
    text += _found(checks, rf"^{HEAD}.*|^=+ (?:ERROR SUMMARY|RACECHECK SUMMARY|Error:).*", "compute-sanitizer")
    return "\n".join(text) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/")


def sections(path: Path) -> dict[str, str]:
    """Step -> what its last run wrote to this log."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    parts = re.split(rf"^{HEAD}([^:\n]+): .*\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _facts_line(out: Path) -> str:
    lines = sections(out / "log.txt").get("environment", "").splitlines()
    wanted = ("gpu", "driver", "torch", "triton", "commit")
    found = dict(line.split(": ", 1) for line in lines if ": " in line)
    return ", ".join(f"{name} {found[name]}" for name in wanted if found.get(name))


def test_counts(path: Path) -> dict[str, int]:
    """Tests by outcome, from pytest's last line, or, where it was killed, from its lines so far."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").rsplit(f"\n{HEAD}", 1)[-1]  # of the last run
    except OSError:
        return {}
    kinds = ("passed", "failed", "skipped", "errors?", "deselected")
    ends = [line for line in text.splitlines() if re.search(r"\d+ (?:passed|failed|skipped|errors?|deselected).* in [\d.]+s", line)]
    if ends:
        return {kind.rstrip("s?"): int(m[1]) for kind in kinds if (m := re.search(rf"(\d+) {kind}", ends[-1]))}
    seen = {name.lower(): len(re.findall(rf"\b{name}\b", text)) for name in ("PASSED", "FAILED", "SKIPPED", "ERROR")}
    return {name: number for name, number in seen.items() if number}


def _rows(path: Path) -> list[dict]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def _times(path: Path) -> list[str]:
    """Replays on cold inputs: what an engine sees, and what targets are for."""
    rows = [row for row in _rows(path) if row["contender"] == "kernel"]
    wanted = [row for row in rows if row["status"] != "ok" or (row["call"], row["cache"]) == ("graph", "cold")]
    if not wanted:
        return []
    text = ["", f"Kernel times, us, graph replays on cold inputs; a copy moves {wanted[0]['copy_gb_per_s'] or '?'} GB/s.", ""]
    text += ["| op | case | p20 | median | p80 | floor | share | target | met |", "| --- " * 9 + "|"]
    for row in wanted:
        names = ("op", "case", "p20_us", "p50_us", "p80_us", "floor_us", "share_of_floor", "target_us", "met")
        if row["status"] == "ok":
            text.append(f"| {' | '.join(row[name] for name in names)} |")
        else:
            text.append(f"| {row['op']} | {row['case']} | {_cell(row['status'])} |" + " |" * 6)
    met = [row["met"] for row in wanted if row["met"]]
    return [*text, "", f"Targets met: {met.count('yes')} of {len(met)}."]


def _beside(path: Path) -> list[str]:
    """Medians of all contenders, graphs on cold inputs, of the cases that have others than the kernel."""
    rows = [row for row in _rows(path) if row["call"] == "graph" and row["cache"] in ("cold", "")]
    both = {(row["op"], row["case"]) for row in rows if row["contender"] != "kernel"}
    rows = [row for row in rows if (row["op"], row["case"]) in both]
    if not rows:
        return []
    text = ["", "Beside PyTorch and the engines that import, median us, graph replays on cold inputs.", ""]
    text.append("| op | case | contender | median |")
    text.append("| --- | --- | --- | --- |")
    for row in rows:
        text.append(f"| {row['op']} | {row['case']} | {row['contender']} | {row['p50_us'] or _cell(row['status'])} |")
    return text


def _round(path: Path) -> list[str]:
    """The ops of a round, alone and all in one graph."""
    rows = _rows(path)
    if not rows:
        return []
    head = f"{rows[0]['context']} tokens of context, {rows[0]['layers']} layers; shares with the models' times as in round.csv"
    text = ["", f"A whole round, us: {head}.", "", "| requests | op | median | predicted | share of a round |"]
    text.append("| --- | --- | --- | --- | --- |")
    for row in rows:
        share = f"{float(row['share_of_round']):.1%}"
        text.append(f"| {row['requests']} | {row['op']} | {row['p50_us']} | {row['predicted_us']} | {share} |")
    return text


def _launches(path: Path) -> list[str]:
    try:
        return ["", *launch_table.table(launch_table.read(path)).splitlines()]
    except (OSError, ValueError, TypeError, IndexError):
        return []


def _found(output: str, pattern: str, title: str) -> list[str]:
    """Telling lines of a step's output."""
    lines = output.splitlines()
    telling = [line for line in lines if re.match(pattern, line)]
    return ["", f"{title}:", "", "```", *telling[-40:], "```"] if telling else []
