"""Measure the embedded systems side by side: tokens per round, acceptance by position, draft times, calibration across domains.

    python -m bench.systems                  measure what bench/assets holds, write bench/results/systems.json, print the tables
    python -m bench.systems --plot           draw the pictures from that file (python -m bench.plot does, too)
    python -m bench.systems --table          print the tables of that file
    python -m bench.systems --readme         write them into bench/assets/README.md

    decoded         tau = tokens / rounds of `reference.loop` at temperatures 1 and 0, up to 7 drafts, error: jackknife over prompts
    teacher-forced  tau = 1 + mean over cuts of sum_k prod_{j <= k} a_j,  a_j = 1 - |q_j - p_j|_1 / 2, the probability that draft j
                    is accepted where all tokens before it are the text's: what plain decoding wrote at temperature 1
    by position     mean of prod_{j <= k} a_j over mean of prod_{j < k} a_j: acceptance of draft k given those before it
    draft time      median over cuts of taking in what the target emitted and making k drafts, one request, plain PyTorch, one
                    thread, in CPU milliseconds
    calibration     expected calibration error of the survival of DSpark's drafts without temperatures, and with temperatures that
                    were fitted on another domain (rounds of bench/shared/acceptance.py)

The distributions of the drafters are computed here from base logits and head in plain PyTorch; the reference is `reference.draft`
with `reference.heads`. All but the times depends on the weights and seeds alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import assets
from bench.shared import acceptance
from bench.shared.figures import save as draw_into
from bench.shared.system_figures import SYSTEMS
from bench.shared.systems import DRAFTS, RESULTS, calibration, load, measure, save, table, write_readme


def parser() -> argparse.ArgumentParser:
    first, rest = __doc__.split("\n", 1)
    p = argparse.ArgumentParser(
        prog="python -m bench.systems", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--assets", metavar="DIR", type=Path, default=assets.FOLDER, help="the models (default: bench/assets)")
    p.add_argument("--rounds", metavar="FILE", type=Path, help="rounds to calibrate on (default: rounds.json beside the models)")
    p.add_argument("--out", "--results", metavar="FILE", type=Path, default=RESULTS, help="default: bench/results/systems.json")
    p.add_argument("--prompts", type=int, metavar="N", default=16, help="of each domain (default: %(default)s)")
    p.add_argument("--new-tokens", type=int, metavar="N", default=96, help="per prompt (default: %(default)s)")
    p.add_argument("--plot", action="store_true", help="draw what the file holds, beside it, and measure nothing")
    p.add_argument("--table", action="store_true", help="print the tables of the file, and measure nothing")
    p.add_argument("--readme", action="store_true", help="write them into the README of the models, and measure nothing")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: a bad argument."""
    p = parser()
    a = p.parse_args(argv)
    for name, value, least in (("prompts", a.prompts, 2), ("new-tokens", a.new_tokens, 2 * DRAFTS)):
        if value < least:
            p.error(f"--{name}: expected at least {least}, got {value}")
    try:
        if not (a.plot or a.table or a.readme):
            rounds, _ = acceptance.load(a.rounds or a.assets / "rounds.json")

            def told(text):
                print(text, file=sys.stderr, flush=True)

            found = measure(a.assets, prompts=a.prompts, new_tokens=a.new_tokens, progress=told)
            found["calibration"] = calibration(rounds)
            save(a.out, found)
        found = load(a.out)
        if a.readme:
            write_readme(found)
    except (OSError, ValueError) as error:
        p.error(str(error))
    if a.plot:
        for name, draw in SYSTEMS.items():
            print(", ".join(path.name for path in draw_into(draw, found, a.out.parent / name)))
    elif not a.readme:
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
