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

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.shared import command
from bench.shared.paths import RESULTS, ROOT
from bench.shared.source import literal

DRAFTS = literal("bench.shared.systems", "DRAFTS")


def parser() -> command.Parser:
    p = command.Parser("bench.systems", __doc__)
    p.add_argument(
        "--assets", metavar="DIR", type=Path, default=ROOT / "bench" / "assets", help="the models (default: bench/assets)"
    )
    p.add_argument("--rounds", metavar="FILE", type=Path, help="rounds to calibrate on (default: rounds.json beside the models)")
    p.add_argument(
        "--out",
        "--results",
        metavar="FILE",
        type=Path,
        default=RESULTS / "systems.json",
        help="default: bench/results/systems.json",
    )
    p.add_argument("--prompts", type=int, metavar="N", default=16, help="of each domain (default: %(default)s)")
    p.add_argument("--new-tokens", type=int, metavar="N", default=96, help="per prompt (default: %(default)s)")
    p.add_argument("--plot", action="store_true", help="draw what the file holds, beside it, and measure nothing")
    p.add_argument("--table", action="store_true", help="print the tables of the file, and measure nothing")
    p.add_argument("--readme", action="store_true", help="write them into the README of the models, and measure nothing")
    return p


def check(arguments) -> None:
    """Raises BadArgument."""
    command.check_least("--prompts", arguments.prompts, 2)
    command.check_least("--new-tokens", arguments.new_tokens, 2 * DRAFTS)
    command.check_file("--out", arguments.out)
    measured = not (arguments.plot or arguments.table or arguments.readme)
    for path in [arguments.rounds or arguments.assets / "rounds.json"] if measured else [arguments.out]:
        if not path.is_file():
            raise command.BadArgument(f"{'--rounds' if measured else '--out'}: {path}: no such file")


def work(a) -> int:
    from bench.shared import acceptance
    from bench.shared.figures import save as draw_into
    from bench.shared.system_figures import SYSTEMS
    from bench.shared.systems import calibration, load, measure, save, table, write_readme

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
        raise command.BadArgument(command.first_line(error)) from None
    if a.plot:
        for name, draw in SYSTEMS.items():
            print(", ".join(path.name for path in draw_into(draw, found, a.out.parent / name)))
    elif not a.readme:
        print(table(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 2: a bad argument; 130: stopped."""
    return command.run(parser, check, work, argv)


if __name__ == "__main__":
    sys.exit(main())
