"""What bench.load prints and draws: a row per run, tables, sentences, curves over the number of requests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.load.simulation import Run

COLUMNS = (
    ("tokens/s", "of all requests together, with its standard error; * the best of a concurrency, and those within 2 errors of it"),
    ("per user", "tokens per second of one request"),
    ("tokens/round", "accepted drafts and the token after them, per request and round"),
    ("verified", "drafts sent to verification, per request and round"),
    ("rows/step", "rows of the target's pass: anchors and admitted drafts"),
    ("ms/step", "drafting and the target's pass"),
)
FIELDS = (
    "policy", "concurrency", "steps", "tokens_per_second", "tokens_per_second_error", "tokens_per_second_per_user",
    "tokens_per_round", "tokens_per_round_error", "verified_per_round", "rows_per_step", "ms_per_step", "best",
)  # fmt: skip


def records(runs: Sequence[Run]) -> list[dict]:
    """A row per run, the fields of the CSV file."""
    most = {run.requests: best(runs, run.requests, "") for run in runs}
    found = []
    for run in runs:
        (speed, error), (tokens, tokens_error) = run.tokens_per_second, run.tokens_per_round
        behind, doubt = run.gain_over(most[run.requests])
        values = (
            run.policy, run.requests, len(run.tokens), speed, error, speed / run.requests, tokens, tokens_error,
            run.verified_per_round, run.rows_per_step, 1e3 * float(run.seconds.mean()), int(behind + 2 * np.nan_to_num(doubt) >= 0),
        )  # fmt: skip
        found.append(dict(zip(FIELDS, values, strict=True)))
    return found


def table_of(rows: Sequence[Mapping]) -> str:
    """One block per concurrency."""
    lines = [["", *(name for name, _ in COLUMNS)]]
    for row in rows:
        error = row["tokens_per_second_error"]
        mark = "*" if row["best"] else " "
        lines.append([
            row["policy"],
            f"{row['tokens_per_second']:.0f}" + ("" if math.isnan(error) else f" ±{error:.0f}") + mark,
            f"{row['tokens_per_second_per_user']:.1f}",
            f"{row['tokens_per_round']:.2f}",
            f"{row['verified_per_round']:.2f}",
            f"{row['rows_per_step']:.1f}",
            f"{row['ms_per_step']:.2f}",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text, last = [], None
    for line, row in zip(lines, [None, *rows], strict=True):
        if row is not None and row["concurrency"] != last:
            last = row["concurrency"]
            text.append(f"\n{last} request{'s' * (last > 1)}")
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def best(runs: Sequence[Run], requests: int, kind: str) -> Run | None:
    """The run with the most tokens per second whose policy's name begins with `kind`."""
    found = [run for run in runs if run.requests == requests and run.policy.startswith(kind)]
    return max(found, key=lambda run: run.tokens_per_second[0], default=None)


def sentences(runs: Sequence[Run]) -> list[str]:
    """What scheduling gains at the highest concurrency, and what it loses at the lowest, from the runs alone."""
    found = []
    scheduled = [name for name in ("causal", "causal-convex", "budget") if any(run.policy == name for run in runs)]
    by_name = {(run.policy, run.requests): run for run in runs}
    high = max(run.requests for run in runs)
    whole = max((int(run.policy[6:]) for run in runs if run.policy.startswith("fixed-")), default=0)
    kinds = [("fixed-", "the best fixed K"), (f"fixed-{whole}", f"{whole} drafts always")]
    kinds += [("threshold-", "the best static threshold"), ("none", "no speculation")]
    for name in scheduled:
        parts = []
        for kind, title in kinds:
            other = best(runs, high, kind)
            if other is not None:
                gain, error = by_name[name, high].gain_over(other)
                parts.append(f"{gain:+.1f} ±{error:.1f} % against {title}" + (f" ({other.policy})" if kind.endswith("-") else ""))
        if parts:
            found.append(f"At {high} requests {name}: " + ", ".join(parts) + ".")
    low = [n for n in (1, 8) if any(run.requests == n for run in runs)]
    worst = []
    for name in scheduled:
        for n in low:
            fixed = best(runs, n, "fixed-")
            if fixed is not None:
                worst.append((*by_name[name, n].gain_over(fixed), name, n, fixed.policy))
    if worst:
        gain, error, name, n, fixed = min(worst)
        where = f"{name} at {n} against {fixed}, {gain:+.2f} ±{error:.2f} %"
        at = " and ".join(map(str, low)) + " request" + "s" * (low != [1])
        loses = f"the largest loss of scheduling is {where}" if gain < 0 else f"scheduling loses nothing; closest is {where}"
        found.append(f"At {at} {loses}.")
    return found


def plot(runs: Sequence[Run], path, title: str) -> None:
    """Left: tokens/s of all requests against tokens/s of one. Right: percent over the best fixed K, by concurrency.

    PNG or SVG by the suffix of `path`. Raises ImportError without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plotting needs matplotlib: pip install dspark_kernels[plots]") from None
    names = list(dict.fromkeys(run.policy for run in runs))
    styles = _styles(names)
    all_requests = sorted({run.requests for run in runs})
    # A fixed salt and no date: the same data gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "dspark_kernels", "font.size": 9}):
        figure = Figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name in names:
            own = sorted((run for run in runs if run.policy == name), key=lambda run: run.requests)
            speeds = [run.tokens_per_second[0] for run in own]
            left.plot([s / run.requests for s, run in zip(speeds, own, strict=True)], speeds, label=name, **styles[name])
            pairs = [(run, best(runs, run.requests, "fixed-")) for run in own]
            gains = [(run.requests, *run.gain_over(fixed)) for run, fixed in pairs if fixed is not None]
            if gains and not name.startswith("fixed-"):
                at, percent, errors = zip(*gains, strict=True)
                right.errorbar(at, percent, yerr=np.nan_to_num(errors), label=name, capsize=2, **styles[name])
        # Where the curves are: a number at every second concurrency, on the outermost curve.
        for requests in all_requests[:: 2 if len(all_requests) > 5 else 1]:
            run = best(runs, requests, "")
            speed = run.tokens_per_second[0]
            left.annotate(f"{requests}", (speed / requests, speed), textcoords="offset points", xytext=(5, 5), fontweight="bold")
        left.set(xscale="log", yscale="log", xlabel="tokens/s per user", ylabel="tokens/s in total (numbers: requests at once)")
        left.grid(color="0.9", which="both", linewidth=0.5)
        left.legend(handlelength=4, fontsize=8)
        right.axhline(0, color="0.4", linewidth=1)
        right.set(xlabel="requests at once", ylabel="tokens/s over the best fixed K, percent (curves as left)")
        right.set_xscale("log", base=2)
        right.set_xticks(all_requests, [str(n) for n in all_requests])
        right.grid(color="0.9", linewidth=0.5)
        figure.suptitle(title, fontsize=9)
        figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix.lower() == ".svg" else None)


def _styles(names: Sequence[str]) -> dict[str, dict]:
    """Markers and lines that tell curves apart without colour; fixed K are thin and grey, their marker is the number."""
    own = {
        "none": ("black", "x", ":"), "causal": ("C0", "o", "-"), "causal-convex": ("C2", "D", "-."), "budget": ("C3", "s", "--"),
    }  # fmt: skip
    lines, markers, styles, thresholds = ((0, (1, 2)), (0, (4, 2)), (0, (4, 1, 1, 1)), (0, (8, 2))), "^v<>", {}, 0
    for name in names:
        if name.startswith("fixed-"):
            number = name.removeprefix("fixed-")
            styles[name] = dict(color="0.6", marker=f"${number}$", linestyle="-", linewidth=0.6, markersize=5)
        elif name in own:
            colour, marker, line = own[name]
            styles[name] = dict(color=colour, marker=marker, linestyle=line, linewidth=1.6, markersize=5)
        else:
            styles[name] = dict(
                color="C1", marker=markers[thresholds % 4], linestyle=lines[thresholds % 4], linewidth=1.2, markersize=4
            )
            thresholds += 1
    return styles
