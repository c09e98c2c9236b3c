"""What a quantised W2 costs in acceptance: tokens per round of the embedded DSpark drafter with W2 in bf16, fp8 e4m3 and int8.

    difference = mean over rounds of accepted(W2 quantised) - accepted(W2 in bf16), the same cuts, seeds and noise for both

Its standard error is that of the mean over texts, since two cuts of one text share most of their context. Reference path on the
CPU, token rule at temperature 1, one round per cut (bench/shared/acceptance.py). The embedded weights are int8 by rows already
(bench/assets/quantise.py) with the same scale, so int8 restores them exactly and its line shows the effect of rounding to bf16.

    python -m bench.quantised --texts 8        writes bench/results/quantised.csv
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import torch

from bench.shared import acceptance
from bench.shared.paths import RESULTS
from dspark_kernels import MarkovHead, quantise_head

FILE = RESULTS / "quantised.csv"
WEIGHTS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
COLUMNS = ("domain", "w2", "texts", "rounds", "tokens_per_round", "difference", "standard_error")


def stored(head: MarkovHead, w2: str) -> MarkovHead:
    """The head with W2 rounded to its type, in fp32: the weights are compared, not the arithmetic on them."""
    if w2 == "bf16":
        rounded = head.w2.bfloat16().float()
    else:
        small = quantise_head(head, WEIGHTS[w2])
        rounded = small.w2.float() * small.w2_scale[:, None]
    return type(head)(**(vars(head) | dict(w2=rounded)))


def compare(domain: str, texts: range, stride: int) -> list[dict]:
    """Rows of the report for one domain."""
    accepted = {
        w2: acceptance.measure(domain, texts, stride=stride, change_head=lambda head, w2=w2: stored(head, w2)) for w2 in WEIGHTS
    }
    rows = []
    for w2, rounds in accepted.items():
        change = (rounds.accepted - accepted["bf16"].accepted).double()
        by_text = torch.stack([change[rounds.prompt == text].mean() for text in rounds.prompt.unique()])
        error = float(by_text.std() / math.sqrt(len(by_text))) if len(by_text) > 1 else math.nan
        numbers = rounds.tokens_per_round, float(change.mean()), error
        rows.append(dict(zip(COLUMNS, (domain, w2, len(by_text), len(rounds), *(f"{x:.4f}" for x in numbers)), strict=True)))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quantised", description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=8, metavar="N", help="texts of each domain (default %(default)s)")
    parser.add_argument("--stride", type=int, default=6, metavar="N", help="tokens between two cuts (default %(default)s)")
    parser.add_argument("--out", "--output", type=Path, default=FILE, metavar="FILE", help="the report (default: %(default)s)")
    options = parser.parse_args(arguments)
    rows = []
    for domain in acceptance.DOMAINS:
        rows += compare(domain, range(options.texts), options.stride)
        for row in rows[-len(WEIGHTS) :]:
            print(" ".join(f"{row[name]:>16}" for name in COLUMNS), flush=True)
        write(options.out, rows)


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
