"""Draw the measured results: PNG and SVG, readable without colour.

    python -m bench.plot                     everything there is data for, into bench/results
    python -m bench.plot --results DIR       CSV files from another folder; --out DIR pictures to another

    roofline-<gpu>    kernels-<gpu>.csv: share of the memory floor per op and case, targets beside
    latency-<gpu>     the same file: medians against the batch size, with what else was timed in the same run
    round-<gpu>       round-<gpu>.csv: what a round of ops consists of, against the batch size
    launches          launches.csv: launches per round, ours and plain PyTorch's
    acceptance        the embedded drafter's measured rounds (bench/assets/rounds.json): acceptance by draft position
    systems-position  systems.json: acceptance by draft position of the embedded systems
    systems-time      the same file: tokens per round against the time that drafting takes
    systems-ece       the same file: reliability of the confidence before and after temperatures from another domain

What was not measured is not drawn, and said. The same data gives the same files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.shared import command, launch_table, system_figures
from bench.shared.command import BadArgument, first_line
from bench.shared.figures import GREYS, HATCHES, LINES, MARKERS, save
from bench.shared.paths import RESULTS
from bench.shared.round_ops import DECISIONS, GRAPH, OPS, SUM
from bench.shared.rows import read as read_rows


def _title(row: dict, what: str) -> str:
    facts = [row.get("gpu") or "no GPU", *(f"{name} {row[name]}" for name in ("driver", "torch", "triton") if row.get(name))]
    return f"{what}\n{', '.join(facts)}, {row.get('commit', '')}"


def _batch(case: str) -> tuple[str, int] | None:
    """("sampled", 64) for the case sampled_r64, ("c8192_q8", 32) for r32_c8192_q8; None for a name without a batch size."""
    found = re.search(r"(?:^|_)r(\d+)(?:_|$)", case)
    return (re.sub(r"_?r\d+_?", "_", case).strip("_"), int(found[1])) if found else None


def roofline(figure, rows: Sequence[dict]) -> None:
    """Bars of floor / median, cold graph replays of the kernels; a tick where a target is."""
    wanted = dict(contender="kernel", call="graph", cache="cold", status="ok")
    rows = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    if not rows:
        raise LookupError("no cold graph replay in it")
    ops = list(dict.fromkeys(row["op"] for row in rows))
    figure.set_size_inches(9, 1.6 + 0.24 * len(rows))
    axes = figure.subplots()
    seen = set()
    for at, row in enumerate(rows):
        kind = ops.index(row["op"])
        axes.barh(
            at, float(row["share_of_floor"]), color=GREYS[kind % 8], hatch=HATCHES[kind % 8], edgecolor="black", linewidth=0.6,
            label=None if row["op"] in seen else row["op"],
        )  # fmt: skip
        seen.add(row["op"])
        if row["target_us"]:
            aim = float(row["floor_us"]) / float(row["target_us"])
            axes.plot([aim, aim], [at - 0.5, at + 0.5], color="C3", linewidth=2.5)
        verdict = {"yes": ", target met", "no": ", target missed"}.get(row["met"], "")
        axes.annotate(f"{float(row['share_of_floor']):.0%}{verdict}", (1.02, at), va="center", fontsize=7, annotation_clip=False)
    axes.set_yticks(range(len(rows)), [f"{row['op']} {row['case']}" for row in rows], fontsize=7)
    axes.set(xlabel="share of the memory floor (1 = a device copy's bandwidth); thick tick: target")
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="x", color="0.85", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06 - 0.3 / len(rows)), ncols=4)
    figure.suptitle(_title(rows[0], "Share of the memory floor, CUDA graph, cold inputs"), fontsize=9)


def latency(figure, rows: Sequence[dict]) -> None:
    """A panel per family of cases with at least two batch sizes: medians of every contender, and the floor."""
    families: dict[tuple[str, str], list[tuple[int, dict]]] = {}
    for row in rows:
        found = _batch(row["case"])
        if found and row["status"] == "ok" and row["cache"] == "cold":
            families.setdefault((row["op"], found[0]), []).append((found[1], row))
    families = {name: found for name, found in families.items() if len({batch for batch, _ in found}) > 1}
    if not families:
        raise LookupError("no case with two batch sizes in it")
    columns = min(3, len(families))
    figure.set_size_inches(4.2 * columns, 1 + 3.2 * -(-len(families) // columns))
    panels = figure.subplots(-(-len(families) // columns), columns, squeeze=False).flatten()
    contenders = list(dict.fromkeys((row["contender"], row["call"]) for found in families.values() for _, row in found))
    for panel, ((op, family), found) in zip(panels, families.items(), strict=False):
        for number, contender in enumerate(contenders):
            own = sorted((b, float(row["p50_us"])) for b, row in found if (row["contender"], row["call"]) == contender)
            if own:
                ours = contender[0] == "kernel"
                panel.plot(
                    *zip(*own, strict=True), marker=MARKERS[number % 8], linestyle=LINES[number % 6], markersize=5,
                    color="C0" if ours else "0.35", linewidth=2.0 if ours else 1.1, label=", ".join(contender),
                )  # fmt: skip
        floor = sorted({(b, float(row["floor_us"])) for b, row in found})
        panel.plot(*zip(*floor, strict=True), color="black", linewidth=0.8, marker="_", label="floor")
        panel.set(xscale="log", yscale="log", title=f"{op} {family}".strip(), xlabel="requests", ylabel="us, median, cold")
        batches = sorted({b for b, _ in found})
        panel.set_xticks(batches, [str(b) for b in batches])
        panel.minorticks_off()
        panel.grid(color="0.85", linewidth=0.5)
    for panel in panels[len(families) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=7)
    figure.suptitle(_title(rows[0], "Latency against batch size"), fontsize=9)


def whole_round(figure, rows: Sequence[dict]) -> None:
    """Per batch size what the ops' medians are of their sum, the graph of all above; and shares of an engine's round."""
    rows = [row for row in rows if row["p50_us"]]
    batches = sorted({int(row["requests"]) for row in rows})
    if not batches:
        raise LookupError("no times in it")
    figure.set_size_inches(9, 4.5)
    left, right = figure.subplots(1, 2)
    by = {(int(row["requests"]), row["op"]): row for row in rows}
    places, bottoms = range(len(batches)), [0.0] * len(batches)
    for number, op in enumerate(OPS):
        heights = [100 * float(by[b, op]["p50_us"]) / float(by[b, SUM]["p50_us"]) for b in batches]
        bars = left.bar(
            places, heights, bottom=bottoms, color=GREYS[number], hatch=HATCHES[number], edgecolor="black", linewidth=0.6, label=op
        )
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    left.bar_label(bars, [f"{float(by[b, GRAPH]['p50_us']):.0f} us" for b in batches], padding=2, fontsize=8)
    left.set(xlabel="requests (above: all in one graph, median, cold)", ylabel="percent of the ops' sum", ylim=(0, 108))
    left.legend(fontsize=7, loc="lower right", framealpha=1)
    kinds = (("all ops", [GRAPH], "0.85", "///"), ("drafting, scheduling, acceptance", DECISIONS, "0.3", ""))
    for number, (label, ops, grey, hatch) in enumerate(kinds):
        shares = [100 * sum(float(by[b, op]["share_of_round"]) for op in ops) for b in batches]
        bars = right.bar(
            [i + 0.4 * number for i in places], shares, width=0.38, color=grey, hatch=hatch, edgecolor="black", linewidth=0.6,
            label=label,
        )  # fmt: skip
        right.bar_label(bars, [f"{share:.1f}" for share in shares], fontsize=8)
    right.set(xlabel="requests", ylabel="percent of an engine's round")
    right.legend(fontsize=7)
    for panel, shift in ((left, 0.0), (right, 0.2)):
        panel.set_xticks([i + shift for i in places], [str(b) for b in batches])
    first = rows[0]
    context = f"{first['context']} tokens of context, {first['layers']} layers"
    figure.suptitle(_title(first, f"The ops of a round, {context}"), fontsize=9)


def launch_counts(figure, rows: Sequence[launch_table.Row]) -> None:
    """Two panels, sampled and greedy: per step the launches of both, numbers beside the bars."""
    figure.set_size_inches(9, 3.4)
    panels = figure.subplots(1, 2, sharex=True)
    for panel, setting in zip(panels, ("sampled", "greedy"), strict=True):
        names = [*DECISIONS, "together"]
        for number, (contender, label) in enumerate(((launch_table.OURS, "dspark_kernels"), (launch_table.EAGER, "PyTorch"))):
            steps = [DECISIONS if name == "together" else [name] for name in names]
            counts = [launch_table.launches_of(rows, setting, contender, ops) for ops in steps]
            at = [i + 0.4 * number for i in range(len(names))]
            bars = panel.barh(
                at, counts, height=0.38, color=("0.25", "0.85")[number], hatch=("", "///")[number], edgecolor="black",
                linewidth=0.6, label=label,
            )  # fmt: skip
            panel.bar_label(bars, [str(count) for count in counts], padding=3, fontsize=8)
        panel.set_yticks([i + 0.2 for i in range(len(names))], names if panel is panels[0] else [""] * len(names), fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set(xlabel="launches per round", title=f"{setting}, K = {rows[0].drafts}")
    panels[0].legend(fontsize=8, loc="center right")
    bound = "" if rows[0].gpu != "none" else "; PyTorch: a lower bound, one per operator"
    figure.suptitle(f"counted by {rows[0].method}{bound}", fontsize=8)


def _error(share: float, count: float) -> float:
    """Standard error of a share of `count`."""
    return (share * (1 - share) / max(1.0, count)) ** 0.5


def acceptance_curves(figure, rounds: dict) -> None:
    """Left: probability that draft k is accepted given the ones before it; right: that it is reached and accepted."""
    figure.set_size_inches(9, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (domain, found) in enumerate(rounds.items()):
        reach = found.survived.double().mean(0).tolist()
        before = [1.0, *reach[:-1]]
        given = [now / then for now, then in zip(reach, before, strict=True) if then]  # as far as anybody came
        errors = [_error(share, then * len(found)) for share, then in zip(given, before, strict=False)]
        style = dict(marker=MARKERS[number], linestyle=LINES[number], color=("black", "0.35", "0.55")[number % 3], capsize=2)
        at = range(1, found.drafts + 1)
        label = f"{domain}: {found.tokens_per_round:.2f} tokens per round, {len(found)} rounds"
        left.errorbar(at[: len(given)], given, yerr=errors, label=label, **style)
        right.errorbar(at, reach, yerr=[_error(share, len(found)) for share in reach], **style)
    left.set(xlabel="draft position", ylabel="accepted, of those whose predecessors were", ylim=(0, 1))
    right.set(xlabel="draft position", ylabel="accepted with all predecessors")
    for panel in (left, right):
        panel.grid(color="0.85", linewidth=0.5)
    left.legend(fontsize=7, loc="lower left")
    figure.suptitle("Acceptance of the embedded drafter, T = 1, token rule, one round per cut of real text", fontsize=9)


def pictures(results: Path) -> list[tuple[str, Callable, Callable]]:
    """(name, drawing, reader of its data) of every picture there is data for."""
    found = []
    for path in sorted(results.glob("kernels-*.csv")):
        gpu = path.stem.removeprefix("kernels-")
        found.append((f"roofline-{gpu}", roofline, lambda path=path: read_rows(path)))
        found.append((f"latency-{gpu}", latency, lambda path=path: read_rows(path)))
    for path in sorted(results.glob("round-*.csv")):
        found.append((path.stem, whole_round, lambda path=path: read_rows(path)))
    if (results / "launches.csv").exists():
        found.append(("launches", launch_counts, lambda: launch_table.read(results / "launches.csv")))
    if (results / "systems.json").exists():
        from bench.shared import systems  # which needs numpy and the models' code

        found += [(name, draw, lambda: systems.load(results / "systems.json")) for name, draw in system_figures.SYSTEMS.items()]
    return found


def embedded_rounds() -> dict:
    from bench.shared import acceptance

    return acceptance.load()[0]


def parser() -> command.Parser:
    p = command.Parser("bench.plot", __doc__)
    p.add_argument("--results", metavar="DIR", default=str(RESULTS), help="CSV files (default: bench/results)")
    p.add_argument("--out", metavar="DIR", help="pictures (default: beside the CSV files)")
    return p


def check(arguments) -> None:
    """Raises BadArgument."""
    for option, folder in (("--results", arguments.results), ("--out", arguments.out or arguments.results)):
        if not Path(folder).is_dir():
            raise BadArgument(f"{option}: expected a folder that exists, got {folder}")


def work(arguments) -> int:
    """0: done; 1: a file cannot be drawn. Raises BadArgument."""
    results, out = Path(arguments.results), Path(arguments.out or arguments.results)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadArgument("needs matplotlib: pip install dspark_kernels[plots]") from None
    todo, wrong = [*pictures(results), ("acceptance", acceptance_curves, embedded_rounds)], 0
    for number, (name, draw, reader) in enumerate(todo, 1):
        try:
            written = ", ".join(path.name for path in save(draw, reader(), out / name))
        except (OSError, LookupError, ValueError, TypeError) as error:
            written, wrong = f"cannot be drawn: {type(error).__name__}: {first_line(error)}", wrong + 1
        print(f"[{number}/{len(todo)}] {name}: {written}", flush=True)
    for kind in ("kernels", "round"):
        if not list(results.glob(f"{kind}-*.csv")):
            print(f"no {kind}-<gpu>.csv in {results}: not measured, no picture (python -m bench.{kind} on a GPU)")
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a file cannot be drawn; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, work, argv)


if __name__ == "__main__":
    sys.exit(main())
