"""Simulate serving under load: how much is gained by choosing, step by step, how many drafts the target verifies.

N requests decode at once, all the time: where one ends, the next takes its slot. Every round each request draws one measured
round of its domain (bench/acceptance.py: confidences, and how many of 7 drafts were accepted); with length L it emits
min(accepted, L) + 1 tokens. That is exact for the token rule, which judges each draft by its own coin, whatever follows it. A step
takes cost(N anchors + admitted drafts) + the time of drafting for N requests, which is due whatever is verified; without
speculation there is no drafting. Draws, domains and lengths of requests are the same for every policy.

Left out: prompts, the host, correlation between the rounds of a request other than by its domain. A round that was cut leads to
another next anchor than the measured one; the draws do not know that. As in bench.decode, the last round of a request is not
clipped.

policies:
  none           no speculation
  fixed-K        the first K drafts of every request, K = 1 to 7
  threshold-T    up to the first draft whose calibrated confidence is below T
  causal         drafts by survival, one by one, until the first that does not raise tokens per second
  causal-convex  the same on the largest convex curve below the cost table: not stopped by the edge of a captured graph
  budget         the number of drafts that the confidences of two rounds ago make best
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dspark_kernels import cost as costs
from dspark_kernels.scheduling import ConfidenceHistory, plan_budget, plan_lengths
from dspark_kernels.types import CostTable, DraftBlock, OneHotProposal
from reference.drafters import Anchors, Committed, DSpark
from reference.loop import REFERENCE_OPS
from reference.model import Rows, Target
from reference.schedule import COST_LIMIT, COST_UNITS_PER_SECOND, StepCost, threshold_lengths

from . import acceptance, assets, roofline
from .decode import BadArgument, Progress as _TokenProgress

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
THRESHOLDS = (0.3, 0.5, 0.7)
DOMAINS = ("code", "foreign")  # easy and hard
LAG = 2  # rounds between a confidence and the budget made of it
MEAN_TOKENS = 256  # of a request, geometric
WARM = 10  # steps that are not counted: until every slot has a history
BATCHES = 20  # of steps, for standard errors


# --- policies ---------------------------------------------------------------------------------------------------------


class Policy:
    """Chooses lengths. One instance serves one simulation."""

    drafting = True

    def __init__(self, name: str):
        self.name = name

    def start(self, requests: int, drafts: int, table: CostTable) -> None:
        """Before the first step."""

    def reset(self, slots: Sequence[int]) -> None:
        """New requests are in these slots."""

    def lengths(self, confidence: Tensor) -> Tensor:
        """Drafts to verify per request [N], from this round's calibrated confidences fp32 [N, K]."""
        raise NotImplementedError


class Fixed(Policy):
    def __init__(self, length: int):
        super().__init__(f"fixed-{length}" if length else "none")
        self.length, self.drafting = length, length > 0

    def lengths(self, confidence):
        return torch.full(confidence.shape[:1], min(self.length, confidence.shape[1]))


class Threshold(Policy):
    def __init__(self, threshold: float):
        super().__init__(f"threshold-{threshold:g}")
        self.threshold = threshold

    def lengths(self, confidence):
        return threshold_lengths(confidence, self.threshold)


class Causal(Policy):
    def __init__(self, bypass: float | None = None, convex: bool = False):
        super().__init__("causal-convex" if convex else "causal")
        self.bypass, self.convex = bypass, convex

    def start(self, requests, drafts, table):
        self.table = convex_below(table, requests) if self.convex else table

    def lengths(self, confidence):
        return plan_lengths(confidence, self.table, bypass=self.bypass)


class Budget(Policy):
    def __init__(self, bypass: float | None = None):
        super().__init__("budget")
        self.bypass = bypass

    def start(self, requests, drafts, table):
        self.table, self.history = table, ConfidenceHistory(requests, drafts, "cpu", lag=LAG)
        self._shared = torch.zeros(requests, drafts, dtype=torch.int64), OneHotProposal(), torch.zeros(requests, dtype=torch.int32)

    def reset(self, slots):
        self.history.reset(slots)

    def lengths(self, confidence):
        budget = plan_budget(self.history.on_host(), self.table, bypass=self.bypass)
        lengths = plan_lengths(confidence, self.table, policy="budget", budget=budget, bypass=self.bypass)
        self.history.record(DraftBlock(*self._shared, confidence=confidence))
        self.history.send()
        return lengths


def convex_below(table: CostTable, first: int) -> CostTable:
    """The largest convex curve that is nowhere above the table from entry `first` on (entries before it are copied).

    With survivals in descending order, tau is concave in the number of drafts; over a convex cost, tau / cost then rises to its
    maximum and falls after it, and "stop at the first draft that does not pay" finds that maximum. The curve comes from the table
    alone, so the policy stays lossless.
    """
    seconds = table.seconds.double().tolist()
    if first >= len(seconds):
        return table
    corners: list[int] = []
    for at in range(first, len(seconds)):
        while len(corners) > 1:
            left, middle = corners[-2:]
            if (seconds[middle] - seconds[left]) * (at - left) < (seconds[at] - seconds[left]) * (middle - left):
                break
            corners.pop()
        corners.append(at)
    whole = np.arange(first, len(seconds))
    curve = np.interp(whole, corners, [seconds[at] for at in corners])
    # fp32 rounds up as often as down, and a curve above its table by one bit would be no harm, but no lower bound either.
    curve = np.minimum(curve.astype(np.float32), table.seconds[first:].numpy())
    return dataclasses.replace(table, seconds=torch.cat([table.seconds[:first], torch.from_numpy(curve)]))


def policy_of(name: str, bypass: float | None) -> Policy:
    """Raises BadArgument."""
    if name == "none":
        return Fixed(0)
    if re.fullmatch(r"fixed-[1-9]\d*", name):
        return Fixed(int(name.removeprefix("fixed-")))
    if name.startswith("threshold-"):
        return Threshold(float(name.removeprefix("threshold-")))
    return {"causal": Causal(bypass), "causal-convex": Causal(bypass, convex=True), "budget": Budget(bypass)}[name]


# --- the simulation ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """Rounds to draw from, one domain after another: confidence fp32 [M, K], accepted int64 [M], first int64 [domains+1]."""

    confidence: Tensor
    accepted: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, rounds: Sequence[tuple[Tensor, Tensor]]) -> Source:
        """From (confidence [N, K], accepted [N]) of each domain."""
        first = np.cumsum([0, *(len(accepted) for _, accepted in rounds)])
        return cls(torch.cat([c for c, _ in rounds]), torch.cat([a for _, a in rounds]).numpy(), first)

    @property
    def drafts(self) -> int:
        return self.confidence.shape[1]


@dataclasses.dataclass(frozen=True)
class Draws:
    """All chance of a simulation, the same for every policy.

    pick: fp64 [steps, N], which round a slot draws; domain, length: [N, requests], of the requests that come into a slot, in turn.
    """

    pick: np.ndarray
    domain: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, seed: int, steps: int, requests: int, mix: float, mean_tokens: float = MEAN_TOKENS) -> Draws:
        random = np.random.default_rng([seed, requests])
        # At most one request ends in a slot per step.
        shape = (requests, steps + 1)
        domain = (random.random(shape) >= mix).astype(np.int64)
        return cls(random.random((steps, requests)), domain, random.geometric(1 / mean_tokens, shape))


@dataclasses.dataclass(frozen=True)
class Run:
    """What happened, step by step: tokens, seconds, verified drafts, int64 or fp64 [steps]; N requests."""

    policy: str
    requests: int
    tokens: np.ndarray
    seconds: np.ndarray
    verified: np.ndarray

    def batches(self, values: np.ndarray) -> np.ndarray:
        """Sums over BATCHES runs of consecutive steps (fewer where there are fewer steps)."""
        return np.array([part.sum() for part in np.array_split(values, min(BATCHES, len(values)))], dtype=np.float64)

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        return jackknife(lambda t, s: t / s, self.batches(self.tokens), self.batches(self.seconds))

    @property
    def tokens_per_round(self) -> tuple[float, float]:
        rounds = self.batches(np.full(len(self.tokens), self.requests))
        return jackknife(lambda t, r: t / r, self.batches(self.tokens), rounds)

    @property
    def verified_per_round(self) -> float:
        return float(self.verified.mean()) / self.requests

    @property
    def rows_per_step(self) -> float:
        return self.requests + float(self.verified.mean())

    def gain_over(self, other: Run) -> tuple[float, float]:
        """By how many percent more tokens per second than `other`, batch against batch of the same draws."""
        parts = [run.batches(values) for run in (self, other) for values in (run.tokens, run.seconds)]
        return jackknife(lambda t, s, u, r: 100 * (t / s / (u / r) - 1), *parts)


def jackknife(statistic: Callable[..., float], *sums: np.ndarray) -> tuple[float, float]:
    """A function of totals and its standard error, from leaving out one batch at a time. NaN for a single batch."""
    count, totals = len(sums[0]), [values.sum() for values in sums]
    if count < 2:
        return float(statistic(*totals)), math.nan
    without = np.array([statistic(*(t - v[i] for t, v in zip(totals, sums, strict=True))) for i in range(count)])
    return float(statistic(*totals)), float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))


def simulate(policy: Policy, source: Source, draws: Draws, table: CostTable, warm: int = WARM) -> Run:
    """Run every step of `draws`; the first `warm` are not in the result. table: on the CPU."""
    steps, requests = draws.pick.shape
    policy.start(requests, source.drafts, table)
    cost = StepCost(table, requests if policy.drafting else 0)  # the same integers that scheduling reads
    slots, turn = np.arange(requests), np.zeros(requests, dtype=np.int64)
    domain, left = draws.domain[:, 0].copy(), draws.length[:, 0].copy()
    size = np.diff(source.first)
    tokens, units, verified = (np.zeros(steps, dtype=np.int64) for _ in range(3))
    policy.reset(slots.tolist())
    for step in range(steps):
        drawn = source.first[domain] + (draws.pick[step] * size[domain]).astype(np.int64)
        lengths = policy.lengths(source.confidence[torch.from_numpy(drawn)]).numpy()
        emitted = np.minimum(source.accepted[drawn], lengths) + 1
        tokens[step], verified[step] = emitted.sum(), lengths.sum()
        units[step] = cost(requests + int(verified[step]))
        left -= emitted
        ended = slots[left <= 0]
        if len(ended):
            turn[ended] += 1
            domain[ended], left[ended] = draws.domain[ended, turn[ended]], draws.length[ended, turn[ended]]
            policy.reset(ended.tolist())
    if units.max() >= COST_LIMIT:
        limit = COST_LIMIT / COST_UNITS_PER_SECOND
        raise ValueError(f"expected steps below {limit:.2f} s, which is all that a table can tell, got more at {requests} requests")
    return Run(policy.name, requests, tokens[warm:], units[warm:] / COST_UNITS_PER_SECOND, verified[warm:])


def steps_for(requests: int) -> int:
    """Counted steps by default: 20000 rounds of requests, in 100 to 2000 steps."""
    return min(2000, max(100, 20000 // requests))


# --- what a step costs ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Costs:
    """table(N): what a step of N requests costs; lines: where that comes from."""

    table: Callable[[int], CostTable]
    lines: Sequence[str]


def measure_demo(progress: Callable[[int, int], object] | None = None, repeats: int = 15) -> CostTable:
    """Times of the embedded target's and drafter's step on this CPU (reference code, fp32, one thread: two of them that wait for
    each other beside other processes take ten times as long every now and then).

    A step of n rows is ceil(n / 8) requests of up to 8 rows at 64 tokens of context. The reference attends request by request, so
    a row that is a request of its own costs more than the table says.
    """
    context, most = 64, 64
    target = Target(*assets.weights("target"))
    drafter = DSpark(*assets.weights("dspark"), target)
    per_request = drafter.max_drafts + 1
    cache = target.new_cache(most)
    drafter.start(most)
    ids = torch.arange(context * most) % 256
    with torch.inference_mode():
        rows = Rows.of([(slot, 0, context) for slot in range(most)], "cpu")
        output = target.forward(ids, rows, cache, drafter.feature_layers)
        drafter.commit(Committed(rows, ids, ids, output.pre_norm, output.features))
    anchors, positions = torch.arange(most), torch.full((most,), context)

    def step(n):
        with torch.inference_mode():
            full, rest = divmod(n, per_request)
            counts = [per_request] * full + [rest] * bool(rest)
            rows = Rows.of([(slot, context, count) for slot, count in enumerate(counts)], "cpu")
            target.logits(target.forward(ids[:n], rows, cache).hidden)
            for slot in range(len(counts)):
                cache.crop(slot, context)

    def draft(n):
        with torch.inference_mode():
            at = Anchors.of(anchors, positions, range(n))
            drafter.propose(at, drafts=drafter.max_drafts, sampling=None, noise="draft", ops=REFERENCE_OPS)

    sizes, draft_sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512], [1, 4, 16, 64]
    rules = {"draft_step": draft, "draft_sizes": draft_sizes, "device": "cpu", "warmup": 1, "repeats": repeats}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return costs.measure(step, sizes, progress=progress, **rules)
    finally:
        torch.set_num_threads(threads)


def costs_of(arguments) -> Costs:
    """Raises BadArgument."""
    if arguments.measure_cost:
        progress = Progress(0, "call")
        progress.start("measuring")
        table = measure_demo(lambda done, total: progress(1))
        progress.close()
        if arguments.save_cost is not None:
            try:
                table.save(arguments.save_cost)
            except OSError as error:
                raise BadArgument(f"--save-cost: {arguments.save_cost}: {error.strerror}") from None
        title = f"costs: the embedded demo, measured on this machine: {table.info['device']}"
        return Costs(lambda requests: table, [title, *_drafts(table)])
    if arguments.cost is not None:
        try:
            table = CostTable.load(arguments.cost)
        except (OSError, ValueError) as error:
            raise BadArgument(f"--cost: {(str(error).splitlines() or [''])[0]}") from None
        device = (table.info or {}).get("device", "a device that the file does not name")
        return Costs(lambda requests: table, [f"costs: {arguments.cost}, of {device}", *_drafts(table)])
    captured = () if arguments.no_graphs else roofline.CAPTURED
    return Costs(
        lambda requests: roofline.table(requests, arguments.context, captured), roofline.lines(arguments.context, captured)
    )


def _drafts(table: CostTable) -> list[str]:
    return [] if table.draft_seconds is not None else ["  no times of drafting in this table: drafts are free here"]


# --- the report -------------------------------------------------------------------------------------------------------

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


# --- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    width = max(len(name) for name, _ in COLUMNS)
    columns = "\n".join(f"  {name.ljust(width)}  {meaning}" for name, meaning in COLUMNS)
    p = argparse.ArgumentParser(
        prog="python -m bench.load",
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:]) + "\n\ncolumns:\n" + columns,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    load = p.add_argument_group("load")
    load.add_argument(
        "--concurrency", metavar="N[,N]", default=",".join(map(str, CONCURRENCY)), help="requests at once (default: %(default)s)"
    )
    load.add_argument("--mix", type=float, default=0.5, help="share of requests of the easy domain (default: %(default)s)")
    load.add_argument(
        "--domains", metavar="EASY,HARD", default=",".join(DOMAINS),
        help=f"two of the domains in the rounds file, {', '.join(acceptance.DOMAINS)} (default: %(default)s)",
    )  # fmt: skip
    load.add_argument("--mean-tokens", type=float, metavar="T", default=MEAN_TOKENS, help="of a request (default: %(default)s)")
    load.add_argument(
        "--rounds", type=int, metavar="STEPS",
        help="steps that are counted, per policy and concurrency (default: 20000 / concurrency, from 100 to 2000)",
    )  # fmt: skip
    load.add_argument("--seed", type=int, default=0, help="of all draws (default: %(default)s)")
    what = p.add_argument_group("policies")
    what.add_argument(
        "--policies", metavar="NAME[,NAME]", help="none, fixed (all K), fixed-K, threshold, causal, causal-convex, budget"
    )
    what.add_argument(
        "--threshold", type=float, action="append", metavar="T",
        help=f"of the policy threshold (repeatable; default: {', '.join(map(str, THRESHOLDS))})",
    )  # fmt: skip
    what.add_argument(
        "--bypass", type=float, metavar="DELTA",
        help="causal and budget verify everything where that costs at most 1 + DELTA times as much as nothing (default: never)",
    )  # fmt: skip
    times = p.add_argument_group("costs (default: a model of Qwen3-4B on an H200, see bench/roofline.py)")
    times.add_argument("--cost", metavar="FILE", help="a measured table (JSON of CostTable.save)")
    times.add_argument("--measure-cost", action="store_true", help="measure the embedded demo on this CPU")
    times.add_argument("--save-cost", metavar="FILE", help="keep what --measure-cost measured")
    times.add_argument(
        "--context", type=int, metavar="TOKENS", default=1024, help="of every request, in the model (default: %(default)s)"
    )
    times.add_argument("--no-graphs", action="store_true", help="the model without padding to captured sizes")
    rounds = p.add_argument_group("measured rounds")
    rounds.add_argument(
        "--acceptance", metavar="FILE", default=str(acceptance.FILE), help="where they are (default: the embedded ones)"
    )
    rounds.add_argument(
        "--measure-rounds", action="store_true", help="measure them again with the embedded models, write that file, and stop"
    )
    out = p.add_argument_group("output")
    out.add_argument("--csv", metavar="FILE", help="write the table")
    out.add_argument(
        "--plot", metavar="FILE", action="append", default=[], help="write a picture, PNG or SVG by its suffix (repeatable)"
    )
    return p


def check(arguments) -> None:
    """Fill in defaults and refuse what cannot be. Raises BadArgument."""
    a = arguments
    try:
        a.concurrency = sorted({int(n) for n in a.concurrency.split(",")})
    except ValueError:
        raise BadArgument(f"--concurrency: expected whole numbers with commas between them, got {a.concurrency!r}") from None
    if a.concurrency[0] < 1 or a.concurrency[-1] > 4096:
        raise BadArgument(f"--concurrency: expected numbers from 1 to 4096, got {a.concurrency[0]} to {a.concurrency[-1]}")
    if not 0 <= a.mix <= 1:
        raise BadArgument(f"--mix: expected a number from 0 to 1, got {a.mix:g}")
    if not 1 <= a.mean_tokens < math.inf:
        raise BadArgument(f"--mean-tokens: expected a number of at least 1, got {a.mean_tokens:g}")
    if a.rounds is not None and a.rounds < 1:
        raise BadArgument(f"--rounds: expected at least 1, got {a.rounds}")
    if not 0 <= a.seed < 1 << 32:
        raise BadArgument(f"--seed: expected a number from 0 to 2^32 - 1, got {a.seed}")
    a.threshold = list(dict.fromkeys(THRESHOLDS if a.threshold is None else a.threshold))
    for value in a.threshold:
        if not 0 <= value <= 1:
            raise BadArgument(f"--threshold: expected a number from 0 to 1, got {value:g}")
    if a.bypass is not None and not 0 <= a.bypass <= 1024:
        raise BadArgument(f"--bypass: expected a number from 0 to 1024, got {a.bypass:g}")
    if not 0 <= a.context <= 1 << 20:
        raise BadArgument(f"--context: expected a number from 0 to 2^20, got {a.context}")
    if a.cost is not None and a.measure_cost:
        raise BadArgument("--cost: expected without --measure-cost, got both")
    if a.save_cost is not None and not a.measure_cost:
        raise BadArgument("--save-cost: expected together with --measure-cost, there is nothing measured to keep")
    for path in a.plot:
        if Path(path).suffix.lower() not in (".png", ".svg"):
            raise BadArgument(f"--plot: expected a name that ends in .png or .svg, got {path}")
    for option, path in [("csv", a.csv), ("save-cost", a.save_cost), *(("plot", path) for path in a.plot)]:
        if path is not None and (Path(path).is_dir() or not Path(path).resolve().parent.is_dir()):
            raise BadArgument(f"--{option}: expected a file in a directory that exists, got {path}")


def names_of(arguments, drafts: int) -> list[str]:
    """Names of the policies to simulate, in the order of the table. Raises BadArgument."""
    groups = {
        "none": ["none"],
        "fixed": [f"fixed-{k}" for k in range(1, drafts + 1)],
        "threshold": [f"threshold-{t:g}" for t in arguments.threshold],
        **{name: [name] for name in ("causal", "causal-convex", "budget")},
    }
    found = []
    for name in groups if arguments.policies is None else [name.strip() for name in arguments.policies.split(",")]:
        if name not in groups and name not in groups["fixed"]:
            raise BadArgument(f"--policies: expected names among {', '.join(groups)} and fixed-1 to fixed-{drafts}, got {name!r}")
        found += groups.get(name, [name])
    return list(dict.fromkeys(found))


def read_rounds(arguments) -> tuple[dict[str, acceptance.Calibrated], Tensor]:
    """The two domains, calibrated. Raises BadArgument."""
    wanted = [name.strip() for name in arguments.domains.split(",")]
    try:
        rounds, _ = acceptance.load(arguments.acceptance)
    except OSError as error:
        raise BadArgument(f"--acceptance: {arguments.acceptance}: {error.strerror}") from None
    except ValueError as error:
        raise BadArgument(f"--acceptance: {error}") from None
    if len(wanted) != 2 or any(name not in rounds for name in wanted):
        raise BadArgument(f"--domains: expected two of {', '.join(rounds)}, got {arguments.domains!r}")
    try:
        return acceptance.calibrate({name: rounds[name] for name in wanted})
    except ValueError as error:
        raise BadArgument(f"--acceptance: {arguments.acceptance}: {error}") from None


class Progress(_TokenProgress):
    """Bar on stderr, where tqdm is installed and somebody watches."""

    def __init__(self, total: int, unit: str):
        super().__init__(total)
        if self._bar is not None:
            self._bar.unit = unit


def measure_rounds(arguments) -> str:
    """Write the rounds file anew; what it holds, in a sentence per domain. Raises BadArgument."""
    torch.set_num_threads(1)
    progress, rounds = Progress(0, "round"), {}
    for domain in acceptance.DOMAINS:
        progress.start(domain)
        rounds[domain] = acceptance.measure(domain, progress=progress)
    progress.close()
    try:
        acceptance.save(arguments.acceptance, rounds, acceptance.settings())
    except OSError as error:
        raise BadArgument(f"--acceptance: {arguments.acceptance}: {error.strerror}") from None
    return "\n".join(
        f"{name}: {len(found)} rounds of {acceptance.DOMAINS[name]}, {found.tokens_per_round:.2f} tokens per round"
        for name, found in rounds.items()
    )


def run_all(arguments, names: Sequence[str], source: Source, prices: Costs) -> list[Run]:
    counts = {n: WARM + (arguments.rounds or steps_for(n)) for n in arguments.concurrency}
    progress, runs = Progress(sum(counts.values()) * len(names), "step"), []
    for requests, steps in counts.items():
        table = prices.table(requests)
        draws = Draws.of(arguments.seed, steps, requests, arguments.mix, arguments.mean_tokens)
        for name in names:
            progress.start(f"{name}, {requests} at once")
            runs.append(simulate(policy_of(name, arguments.bypass), source, draws, table))
            progress(steps)
    progress.close()
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: a bad argument."""
    arguments = parser().parse_args(argv)
    try:
        check(arguments)
        if arguments.measure_rounds:
            print(measure_rounds(arguments))
            return 0
        rounds, temperatures = read_rounds(arguments)
        source = Source.of([(found.confidence, found.accepted) for found in rounds.values()])
        names = names_of(arguments, source.drafts)
        prices = costs_of(arguments)
        print("\n".join(prices.lines))
        easy, hard = rounds
        print(f"load: {arguments.mix:.0%} of requests {easy}, the others {hard}, {arguments.mean_tokens:g} tokens on average")
        for name, found in rounds.items():
            errors = f"ECE {100 * found.before:.1f} % before calibration and {100 * found.after:.1f} % after"
            tokens = f"{found.tokens_per_round:.2f} tokens per round with all {source.drafts} drafts verified"
            print(f"  {name}: {len(found.accepted)} held-out rounds, {tokens}, {errors}")
        print("  temperatures: " + " ".join(f"{t:.2f}" for t in temperatures.tolist()))
        cheap = "never" if arguments.bypass is None else f"where verifying everything costs at most {arguments.bypass:.0%} more"
        print(f"bypass: {cheap}")
        try:
            runs = run_all(arguments, names, source, prices)
        except ValueError as error:
            raise BadArgument(f"--concurrency: {error}") from None
        rows = records(runs)
        print(table_of(rows))
        print("\n" + "\n".join(sentences(runs)))
        if arguments.csv is not None:
            with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        for path in arguments.plot:
            try:
                plot(runs, path, prices.lines[0])
            except ImportError as error:
                raise BadArgument(f"--plot: {error}") from None
    except BadArgument as error:
        print(f"bench.load: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
