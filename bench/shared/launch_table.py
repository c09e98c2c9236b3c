"""The table of launches per round: ours beside those of plain PyTorch. Written by bench.launches."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bench.shared.round_ops import DECISIONS

OURS, EAGER = "dspark_kernels", "pytorch"
LAYERS = 36  # of Qwen3-4B


@dataclasses.dataclass(frozen=True)
class Row:
    """launches = triton + torch without a GPU (see above), device events with one."""

    setting: str  # sampled or greedy
    op: str
    per: str  # "round" or "layer"
    contender: str
    launches: int
    triton_launches: int | str
    torch_operators: int | str
    method: str
    drafts: int
    gpu: str
    torch: str
    triton: str
    commit: str


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def launches_of(rows: Sequence[Row], setting: str, contender: str, ops: Sequence[str]) -> int:
    return sum(int(row.launches) for row in rows if (row.setting, row.contender) == (setting, contender) and row.op in ops)


def table(rows: Sequence[Row]) -> str:
    """Markdown: launches per round, ours beside plain PyTorch."""
    text = [f"| launches per round, K = {rows[0].drafts} | dspark_kernels | PyTorch |", "| --- | --- | --- |"]
    for setting in ("sampled", "greedy"):
        for op in DECISIONS:
            pair = [launches_of(rows, setting, contender, [op]) for contender in (OURS, EAGER)]
            text.append(f"| `{op}`, {setting} | {pair[0]} | {pair[1]} |")
        pair = [launches_of(rows, setting, contender, DECISIONS) for contender in (OURS, EAGER)]
        text.append(f"| **together, {setting}** | **{pair[0]}** | **{pair[1]}** |")
    plan = launches_of(rows, "sampled", OURS, ["plan_attention"])
    layer = [launches_of(rows, "sampled", contender, ["tree_attention"]) for contender in (OURS, EAGER)]
    text.append(f"| attention, {LAYERS} layers | {plan} + {LAYERS} x {layer[0]} | {LAYERS} x {layer[1]} |")
    bound = "" if rows[0].gpu != "none" else "; PyTorch's is a lower bound: one per operator, of which some launch several kernels"
    return "\n".join([*text, "", f"Counted by {rows[0].method}{bound}."])


def write(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def read(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return [Row(**{**row, "launches": int(row["launches"]), "drafts": int(row["drafts"])}) for row in csv.DictReader(file)]
