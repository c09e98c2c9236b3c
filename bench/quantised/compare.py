"""Rounds with W2 in each type, on the same cuts, seeds and noise (bench/quantised)."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch

from bench.shared import acceptance
from dspark_kernels import MarkovHead, quantise_head

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


def run(options) -> int:
    """0: done."""
    rows = []
    for domain in acceptance.DOMAINS:
        rows += compare(domain, range(options.texts), options.stride)
        for row in rows[-len(WEIGHTS) :]:
            print(" ".join(f"{row[name]:>16}" for name in COLUMNS), flush=True)
        write(options.out, rows)
    return 0


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
