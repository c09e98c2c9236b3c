"""What bench.load does once its arguments are known: read or measure rounds, simulate, print, write and draw."""

from __future__ import annotations

import csv
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.load.costs import Costs, costs_of
from bench.load.report import FIELDS, plot, records, sentences, table_of
from bench.load.simulation import WARM, Draws, Run, Source, policy_of, simulate, steps_for
from bench.shared import acceptance
from bench.shared.command import BadArgument
from bench.shared.progress import Progress


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


def run(arguments) -> int:
    """0: done. Raises BadArgument."""
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
    return 0
