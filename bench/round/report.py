"""Times and predictions of a round: bytes over bandwidth, an engine's models beside, shares, the CSV file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bench.round.ops import Sizes
from bench.shared import roofline, rows as csv_rows, timing
from bench.shared.round_ops import DECISIONS, GRAPH, OPS, SUM


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the report. op: one of OPS, SUM or GRAPH. Times in microseconds, None where none was taken."""

    requests: int
    context: int
    layers: int
    drafts: int
    op: str
    launches: int
    bytes: int
    predicted_us: float
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    backbone_ms: float = 0.0
    target_ms: float = 0.0
    share_of_round: float = 0.0  # of times where they were taken, else of predictions
    copy_gb_per_s: float | None = None
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""


@dataclasses.dataclass(frozen=True)
class Engine:
    """The models' times, milliseconds or None = modelled from parameters (a number takes 2 bytes)."""

    backbone_ms: float | None
    target_ms: float | None
    backbone_parameters: float
    target_parameters: float

    def times(self, sizes: Sizes, bandwidth: float) -> tuple[float, float]:
        """(backbone, target) in milliseconds."""

        def products(parameters, rows):
            return 1e3 * max(2 * parameters / bandwidth, 2 * parameters * rows / roofline.Machine().flops)

        backbone = products(self.backbone_parameters, sizes.requests * sizes.drafts)
        target = products(self.target_parameters, sizes.rows)
        return (
            backbone if self.backbone_ms is None else self.backbone_ms,
            target if self.target_ms is None else self.target_ms,
        )

    def words(self) -> str:
        given = [name for name in ("backbone", "target") if getattr(self, f"{name}_ms") is not None]
        modelled = [
            f"{name} MODELLED from {getattr(self, f'{name}_parameters'):.3g} parameters"
            for name in ("backbone", "target")
            if name not in given
        ]
        return "models: " + ", ".join([f"{name} as given" for name in given] + modelled)


def predicted(sizes: Sizes, bandwidth: float, engine: Engine) -> list[Row]:
    """Rows without times: all ops, then their sum."""
    size = sizes.bytes()
    backbone, target = engine.times(sizes, bandwidth)
    size[SUM] = sum(size.values())
    launches = {op: sizes.launches(op) for op in OPS}
    launches[SUM] = sum(launches.values())
    whole = 1e6 * size[SUM] / bandwidth + 1e3 * (backbone + target)
    return [
        Row(
            sizes.requests, sizes.context, sizes.layers, sizes.drafts, op, launches[op], size[op], 1e6 * size[op] / bandwidth,
            backbone_ms=backbone, target_ms=target, share_of_round=1e6 * size[op] / bandwidth / whole,
        )
        for op in size
    ]  # fmt: skip


def timed(rows: Sequence[Row], taken: dict[str, timing.Timing], facts: dict) -> list[Row]:
    """The rows with times of the ops and of the graph of all; shares of the round that the graph makes."""
    total, last = sum(taken[op].p50 for op in OPS), rows[-1]
    whole = taken[GRAPH].p50 + 1e3 * (last.backbone_ms + last.target_ms)
    found = []
    for row in [*rows, dataclasses.replace(last, op=GRAPH)]:
        if row.op == SUM:
            values = dict(p50_us=total, share_of_round=total / whole)
        else:
            own = taken[row.op]
            values = dict(p20_us=own.p20, p50_us=own.p50, p80_us=own.p80, samples=own.samples, share_of_round=own.p50 / whole)
        found.append(dataclasses.replace(row, **values, **facts))
    return found


def _time(value: float | None) -> str:
    return "-".rjust(10) if value is None else f"{value:10.1f}"


def _faster(share: float) -> str:
    return f"{1 / max(1e-9, 1 - share):.2f}"


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows of one batch size for the screen."""
    first, last = rows[0], rows[-1]
    text = [
        f"R = {first.requests}, K = {first.drafts}, {first.context} tokens of context, {first.layers} layers".ljust(44)
        + "".join(name.rjust(10) for name in ("launches", "MB", "predicted", "p20", "median", "p80", "share"))
    ]
    for row in rows:
        times = "".join(_time(value) for value in (row.predicted_us, row.p20_us, row.p50_us, row.p80_us))
        text.append(f"  {row.op.ljust(50)}{row.launches:10}{row.bytes / 1e6:10.2f}{times}{row.share_of_round:10.1%}")
    basis = "predicted" if last.p50_us is None else "measured"
    few = sum(row.share_of_round for row in rows if row.op in DECISIONS)
    text.append(
        f"  backbone {last.backbone_ms:.2f} ms, target without attention {last.target_ms:.2f} ms. Of a round ({basis}):"
        f" {last.share_of_round:.1%} all ops, {few:.1%} drafting, scheduling and acceptance;"
    )
    text.append(
        f"  the most there is to gain: {_faster(last.share_of_round)} times as fast if no op took time,"
        f" {_faster(few)} if attention alone did"
    )
    return text


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace the rows of the same sizes, keep the others."""
    csv_rows.replace(path, rows, ("requests", "context", "layers"))
