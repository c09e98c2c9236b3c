"""The pictures of systems.json: acceptance by position, tokens per round against time, reliability."""

from __future__ import annotations

from collections.abc import Sequence

from bench.shared.figures import line_style


def _panels(figure, names: Sequence[str]) -> list:
    figure.set_size_inches(max(5.5, 1 + 4 * len(names)), 4.2)
    return list(figure.subplots(1, len(names), squeeze=False, sharey=True)[0])


def systems_position(figure, found: dict) -> None:
    """A panel per domain: probability that draft k is accepted given the ones before it, teacher-forced, a line per system."""
    rows = found["teacher_forced"]
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    for panel, domain in zip(_panels(figure, domains), domains, strict=True):
        own = [row for row in rows if row["domain"] == domain]
        for number, row in enumerate(own):
            panel.plot(range(1, len(row["acceptance"]) + 1), row["acceptance"], label=row["system"], **line_style(number))
        panel.set(xlabel="draft position", ylim=(0, 1), title=f"{domain}, {own[0]['nats']:.2f} nats per token")
        panel.grid(color="0.85", linewidth=0.5)
        if domain == domains[0]:
            panel.set_ylabel("accepted, of those whose predecessors were")
        if domain == domains[-1]:  # of lowest entropy: nothing is drawn below
            panel.legend(fontsize=7, loc="lower left")
    figure.suptitle("Acceptance by draft position of the embedded systems\nT = 1, after the target's own text", fontsize=9)


def systems_time(figure, found: dict) -> None:
    """A panel per domain: tokens per round of 1 to 7 drafts against the time to make them, a line per system."""
    rows = found["teacher_forced"]
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    for panel, domain in zip(_panels(figure, domains), domains, strict=True):
        for number, row in enumerate(row for row in rows if row["domain"] == domain):
            taus = [1 + sum(row["reached"][: k + 1]) for k in range(len(row["reached"]))]
            times = found["draft_ms"][row["system"]]
            panel.plot(times, taus[: len(times)], label=row["system"], **line_style(number))
        panel.set(xlabel="CPU ms to draft, one request, one thread", title=domain, xlim=(0, None))
        panel.grid(color="0.85", linewidth=0.5)
        if domain == domains[0]:
            panel.set_ylabel("tokens per round with 1 to 7 drafts")
            panel.legend(fontsize=7, loc="upper left")
    figure.suptitle("Tokens per round against draft time\nT = 1, teacher-forced; up and to the left is better", fontsize=9)


def systems_reliability(figure, found: dict) -> None:
    """A panel per pair of domains: survival as predicted and as observed, before and after calibration."""
    rows = found["calibration"]
    columns = -(-len(rows) // 2)
    figure.set_size_inches(1 + 3 * columns, 6.6)
    panels = figure.subplots(-(-len(rows) // columns), columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel, row in zip(panels, rows, strict=False):
        panel.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
        for name, marker, line, fill in (("before", "o", ":", "none"), ("after", "s", "-", "full")):
            predicted, observed, _ = zip(*row[f"{name}_bins"], strict=True)
            label = f"{name}: ECE {100 * row[name]:.2f} %"
            panel.plot(predicted, observed, marker=marker, linestyle=line, fillstyle=fill, color="black", markersize=5, label=label)
        panel.set_title(f"{row['domain']}, temperatures from {row['fitted']}", fontsize=9)
        panel.grid(color="0.85", linewidth=0.5)
        panel.legend(fontsize=7, loc="upper left")
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    figure.supxlabel("predicted survival of a draft", fontsize=9)
    figure.supylabel("observed", fontsize=9)
    figure.suptitle("Confidence of the embedded DSpark drafter (ECE: mean over positions; curves: all together)", fontsize=9)


SYSTEMS = {"systems-position": systems_position, "systems-time": systems_time, "systems-ece": systems_reliability}
