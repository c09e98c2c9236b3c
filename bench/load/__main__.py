"""Simulate serving under load: how much is gained by choosing, step by step, how many drafts the target verifies.

N requests decode at once, all the time: where one ends, the next takes its slot. Every round each request draws one measured
round of its domain (bench/shared/acceptance.py: confidences, and how many of 7 drafts were accepted); with length L it emits
min(accepted, L) + 1 tokens. That is exact for the token rule, where each draft is accepted or rejected by its own uniform,
whatever follows it. A step
takes cost(N anchors + admitted drafts) + the time of drafting for N requests, however many drafts are verified; without
speculation there is no drafting. Draws, domains and lengths of requests are the same for every policy.

The simulation leaves out prompts, the host, and correlation between the rounds of a request beyond its domain. It also draws the
next round of a request independently of where the last one was cut. As in bench.decode, the last round of a request is not clipped.

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
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.load.costs import Costs, costs_of
from bench.load.report import COLUMNS, FIELDS, plot, records, sentences, table_of
from bench.load.simulation import MEAN_TOKENS, WARM, Draws, Run, Source, policy_of, simulate, steps_for
from bench.shared import acceptance
from bench.shared.arguments import BadArgument
from bench.shared.progress import Progress

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
THRESHOLDS = (0.3, 0.5, 0.7)
DOMAINS = ("code", "foreign")  # easy and hard


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
    times = p.add_argument_group("costs (default: a model of Qwen3-4B on an H200, see bench/shared/roofline.py)")
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
    out.add_argument("--out", "--csv", metavar="FILE", help="write the table")
    out.add_argument(
        "--plot", metavar="FILE", action="append", default=[], help="write a picture, PNG or SVG by its suffix (repeatable)"
    )
    return p


def check(arguments) -> None:
    """Fill in defaults. Raises BadArgument for impossible arguments."""
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
    for option, path in [("out", a.out), ("save-cost", a.save_cost), *(("plot", path) for path in a.plot)]:
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
        if arguments.out is not None:
            with open(arguments.out, "w", newline="", encoding="utf-8") as file:
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
