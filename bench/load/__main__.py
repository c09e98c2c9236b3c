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

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.shared import command
from bench.shared.command import BadArgument
from bench.shared.paths import ROOT
from bench.shared.source import literal

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
THRESHOLDS = (0.3, 0.5, 0.7)
DOMAINS = ("code", "foreign")  # easy and hard
TEXTS, ROUNDS = literal("bench.shared.acceptance", "DOMAINS"), ROOT / "bench" / "assets" / "rounds.json"
MEAN_TOKENS, COLUMNS = literal("bench.load.simulation", "MEAN_TOKENS"), literal("bench.load.report", "COLUMNS")


def parser() -> command.Parser:
    width = max(len(name) for name, _ in COLUMNS)
    columns = "\n".join(f"  {name.ljust(width)}  {meaning}" for name, meaning in COLUMNS)
    p = command.Parser("bench.load", f"{__doc__}\ncolumns:\n{columns}")
    load = p.add_argument_group("load")
    load.add_argument(
        "--concurrency", metavar="N[,N]", default=",".join(map(str, CONCURRENCY)), help="requests at once (default: %(default)s)"
    )
    load.add_argument("--mix", type=float, default=0.5, help="share of requests of the easy domain (default: %(default)s)")
    load.add_argument(
        "--domains", metavar="EASY,HARD", default=",".join(DOMAINS),
        help=f"two of the domains in the rounds file, {', '.join(TEXTS)} (default: %(default)s)",
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
    rounds.add_argument("--acceptance", metavar="FILE", default=str(ROUNDS), help="where they are (default: the embedded ones)")
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
        command.check_file(f"--{option}", path)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, "bench.load.work", argv)


if __name__ == "__main__":
    sys.exit(main())
