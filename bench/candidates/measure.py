"""What restricting drafts costs: rounds with and without it, on the same cuts and seeds (bench/candidates)."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import torch

from bench import assets
from bench.shared import acceptance
from dspark_kernels.types import MarkovHead
from reference import loop
from reference.drafters import DSpark
from reference.model import Target

CHOICES = ((16, 0), (64, 0), (256, 0), (16, 16), (64, 16))  # (C, B)
COLUMNS = ("domain", "candidates", "successors", "rounds", "tokens_per_round", "difference", "error")


def successors(head: MarkovHead, count: int) -> torch.Tensor:
    """int64 [V, count]: the ids that the head's bias favours most after each token."""
    return (head.w1.float() @ head.w2.float().T).topk(count, dim=1).indices


def accepted(target, drafter, requests, choice: tuple[int, int] | None) -> torch.Tensor:
    """Accepted drafts fp64 [N] of one round per request; choice None: all ids."""
    restricted = {}
    if choice is not None:
        restricted = dict(candidates=choice[0], bigrams=successors(drafter.head, choice[1]) if choice[1] else None)

    def draft_block(*arguments, **options):
        return loop.REFERENCE_OPS.draft_block(*arguments, **restricted, **options)

    ops = SimpleNamespace(**{**vars(loop.REFERENCE_OPS), "draft_block": draft_block})
    found = loop.decode(target, drafter, requests, ops=ops, batch_size=1)
    return torch.tensor([generation.acceptance_lengths[0] - 1 for generation in found], dtype=torch.float64)


def measure(domain: str, stride: int, choices=CHOICES, texts: int | None = None) -> list[dict]:
    """A row without candidates, then one for each of `choices`."""
    target = Target(*assets.weights("target"))
    drafter = DSpark(*assets.weights("dspark"), target)
    tokenizer, number = assets.tokenizer(), list(acceptance.DOMAINS).index(domain)
    by_text = {choice: [] for choice in (None, *choices)}
    for index, text in enumerate(acceptance.texts(domain)[:texts]):
        ids = tokenizer.encode(text)
        requests = [
            loop.Request(ids[:cut], 1, acceptance.TEMPERATURE, seed=(number << 16 | index) << 16 | cut)
            for cut in range(len(ids) // 2, len(ids) + 1, stride)
        ]
        for choice, lists in by_text.items():
            lists.append(accepted(target, drafter, requests, choice))
    rows = []
    for choice, lists in by_text.items():
        gaps = torch.stack([(some - dense).mean() for some, dense in zip(lists, by_text[None], strict=True)])
        every = torch.cat(lists)
        error = (gaps.std() / len(gaps) ** 0.5).item() if len(gaps) > 1 else float("nan")
        difference = (every - torch.cat(by_text[None])).mean().item()
        values = (domain, *(choice or ("all", 0)), len(every), 1 + every.mean().item(), difference, error)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def run(options) -> int:
    """0: done."""
    rows = []
    for domain in acceptance.DOMAINS:
        for row in measure(domain, options.stride):
            row |= {name: f"{row[name]:.4f}" for name in COLUMNS[4:]}
            rows.append(row)
            print(" ".join(f"{row[name]:>16}" for name in COLUMNS), flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0
