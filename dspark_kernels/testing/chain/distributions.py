"""Tests of an acceptance function by what it emits under many seeds, each against a distribution that is known exactly.

Every test yields `statistics.Finding`s; `run` is a `suite.Run`. The models are chosen among random ones so that the
known-bad rules of known_wrong.py are detected clearly. Every finding says how large any other bias must be to be detected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from ..statistics import Finding, at_least, compare, rare
from . import models, rules
from .asked import Run

WINDOW = 4
# Found by search. Decided position 1, anchor position 0: the acceptance uniform is below 2^-24; or within 2^-25 of 1; or one of the
# first four lanes of the draw has a word below 64 or above 2^32 - 65.
LOW_UNIFORMS = (
    19551888, 30933614, 45543406, 48465000, 56038567, 66130735, 104063980, 105037334, 106304229, 123488002, 127003797, 142593104,
)  # fmt: skip
HIGH_UNIFORMS = (8025062, 8886381, 24627201, 53612539, 137632225, 223037540)
EXTREME_DRAWS = (
    5440943, 51604212, 67862186, 68919831, 73581764, 85600725, 98331357, 102135511, 3453547, 11116009, 14103637, 19735793, 35882025,
    60878372, 68637947, 129745419,
)  # fmt: skip
TAIL = 4096  # tokens that share the tail's probability


def _round(run: Run, what: str, model: models.Model, num_drafts: int, **options: Any) -> Iterator[Finding]:
    """One round after the prompt, completed by the target: the distribution of the first K + 1 tokens."""
    temperature = options.get("temperature", 1.0)
    model, history, _ = run.decode(what, model, num_drafts, num_drafts + 1, rounds=1, **options)
    tokens = num_drafts + 1
    while tokens > 1 and model.vocab**tokens * 20 > run.requests:  # fewer cells than samples
        tokens -= 1
    counts = models.count_windows(history, 0, tokens, model.vocab)
    yield from compare(what, counts, models.sequence_probs(model.target_probs(temperature), tokens), run.level)


def _windows(run: Run, what: str, model: models.Model, num_drafts: int, **options: Any) -> Iterator[Finding]:
    """Three rounds or more under one seed: the distribution of all windows of a few tokens."""
    tokens = 2 * (num_drafts + 1) + 1
    model, history, _ = run.decode(what, model, num_drafts, tokens, rounds=None, **options)
    width = WINDOW
    while width > 2 and model.vocab**width * 20 > run.requests:
        width -= 1
    for first in range(tokens - width + 1):
        counts = models.count_windows(history, first, width, model.vocab)
        probs = models.window_probs(model.target_probs(), first, width)
        yield from compare(f"{what}, tokens {first + 1} to {first + width}", counts, probs, run.level)


def one_round(run: Run) -> Iterator[Finding]:
    """tokens of one round, V = 2 to 4, K = 1 to 3, sampled and one-hot drafts"""
    for vocab, num_drafts, kind, model in ROUND:
        yield from _round(run, f"V={vocab} K={num_drafts} {kind}", model, num_drafts, kind=kind)


def rounds(run: Run) -> Iterator[Finding]:
    """three consecutive rounds and more under one seed: noise that is met again"""
    yield from _windows(run, "noise of the function", ROUNDS, 2)
    yield from _windows(run, "noise of the drafts", REDRAFTED, 2)


def prefix(run: Run) -> Iterator[Finding]:
    """lengths cut by confidences; rows that are not verified hold something else"""
    yield from _round(run, "one round, K=3", PREFIX, 3, cut=True)
    yield from _windows(run, "rounds, K=2", PREFIX_ROUNDS, 2, cut=True)


def noise(run: Run) -> Iterator[Finding]:
    """draft noise in the correction; neighbouring seeds, high words of seeds, neighbouring positions"""
    yield from _round(run, "frequent corrections", CORRECTIONS, 1)
    seeds = run.seeds("pairs")
    model = run.model(PAIRS)
    probs = models.sequence_probs(model.target_probs(), 1)
    others = {"seed + 1": (1, 0), "seed + 2^32": (1 << 32, 0), "position + 1": (0, 1), "seed + 1, position - 1": (1, -1)}
    for what, (step, offset) in others.items():
        tokens = []
        for given, position in ((seeds, 7), (seeds + step, 7 + offset)):
            history, _ = run.play(model, 1).decode(given, 1, 1, position, salt=position)
            tokens.append(history[:, 0])
        counts = torch.bincount(tokens[0] * model.vocab + tokens[1], minlength=model.vocab**2)
        yield from compare(what, counts, probs[:, None] * probs, run.level)


def temperature(run: Run) -> Iterator[Finding]:
    """temperatures other than 1 on both sides of the ratio; logits far from 0"""
    for value in (0.5, 1.75):
        yield from _round(run, f"temperature {value}", OFFSET, 2, temperature=value)


def filters(run: Run) -> Iterator[Finding]:
    """-inf logits in either distribution, as filters leave them"""
    yield from _round(run, "V=4 K=2", SUPPORT, 2)
    yield from _round(run, "one-hot", SUPPORT, 2, kind="one_hot")


def placeholder(run: Run) -> Iterator[Finding]:
    """drafts of -1 are rejected and corrected from the target's distribution"""
    yield from _round(run, "every second draft -1", MISSING, 2, kind="missing")


def widths(run: Run) -> Iterator[Finding]:
    """draft logits wider and narrower than the target's"""
    for name, model in WIDTHS.items():
        yield from _round(run, name, model, 2)


def accepts(run: Run) -> Iterator[Finding]:
    """as many drafts accepted as the rule promises, so that always rejecting does not pass"""
    for vocab, num_drafts, kind, model in ROUND:
        if kind != "dense":
            continue
        what = f"V={vocab} K={num_drafts} {kind}"
        model, _, accepted = run.decode(what, model, num_drafts, num_drafts + 1, rounds=1, kind=kind)
        mean, deviation = models.mean_accepted(run.rule, model, num_drafts)
        yield at_least(f"accepted, {what}", float(accepted.double().mean()), mean, deviation, len(accepted))


def residual(run: Run) -> Iterator[Finding]:
    """nothing left of [p - q]+: drawn from p"""
    requests, vocab = min(run.requests, 1 << 14), 5
    row = torch.full((vocab,), rules.NEG_INF)
    row[[1, 3]] = torch.tensor([0.0, 1.0])
    seeds = run.seeds("residual", requests)
    out = run.call_rows(row.expand(requests, 2, -1), torch.full((requests, 1), 2), row.expand(requests, 1, -1), seeds)
    probs = torch.softmax(row.double(), 0)
    yield from compare("equal distributions, impossible draft", torch.bincount(out[:, 0], minlength=vocab).cpu(), probs, run.level)


def tails(run: Run) -> Iterator[Finding]:
    """impossible tokens never, uniforms near 0 and 1 among the noise; tokens of 1e-6 and unlikely drafts at their rate"""
    yield from _impossible(run)
    yield _rare_tokens(run)
    yield _rare_drafts(run)


def _impossible(run: Run) -> Iterator[Finding]:
    extreme = torch.tensor([*LOW_UNIFORMS, *HIGH_UNIFORMS, *EXTREME_DRAWS], device=run.device)
    seeds = torch.cat([extreme, run.seeds("impossible", max(64, run.requests - len(extreme)) if run.requests > 64 else 16)])
    vocab, count = 4, len(seeds)
    target = torch.tensor([[0.0, rules.NEG_INF, 1.0, rules.NEG_INF], [1.0, 0.0, rules.NEG_INF, rules.NEG_INF]])
    draft = torch.tensor([[-1.0, 2.0, -1.0, 2.0]])
    drafts = torch.where(torch.arange(count) % 2 == 0, 1, 3)[:, None]
    for what, draft_logits in (("sampled draft", draft.expand(count, 1, vocab)), ("one-hot draft", None)):
        out = run.call_rows(target.expand(count, 2, vocab), drafts, draft_logits, seeds, anchor_position=0)
        wrong = int(((out[:, 0] == 1) | (out[:, 0] == 3) | (out[:, 1] > 1)).sum())
        probability = 0.0 if wrong else 1.0
        yield Finding(f"{what}: {wrong} of {count} requests emitted an impossible token", probability)


def _rare_tokens(run: Run) -> Finding:
    """Bonus tokens among TAIL ids, as rare as 24 expected ones allow, but not below 2^-24 each."""
    requests = max(16, min(run.requests // 16, 1 << 21))
    each = max(2.0**-24, 24.0 / requests / TAIL)
    row = torch.zeros(TAIL + 1)
    row[1:] = torch.tensor(each / (1 - each * TAIL)).log() if each * TAIL < 0.5 else 0.0
    total = float(torch.softmax(row.double(), 0)[1:].sum())
    each = total / TAIL
    count, chunk = 0, (1 << 24) // (TAIL + 1)
    seeds = run.seeds("rare tokens", requests)
    for part in seeds.split(chunk):
        rows = row.to(run.device).expand(len(part), 2, -1)
        out = run.call_rows(rows, torch.zeros(len(part), 1, dtype=torch.int64), rows[:, :1], part, lens=0)
        count += int((out[:, 0] > 0).sum())
    return rare(f"tokens of {each:.1e}", count, total * requests)


def _rare_drafts(run: Run) -> Finding:
    """A one-hot draft that the target hardly ever says."""
    requests = run.requests
    probability = min(0.25, 64.0 / requests)
    row = torch.tensor([probability, 1 - probability]).double().log().float()
    probability = float(torch.softmax(row.double(), 0)[0])
    seeds = run.seeds("rare drafts", requests)
    out = run.call_rows(row.expand(requests, 2, -1), torch.zeros(requests, 1, dtype=torch.int64), None, seeds)
    return rare(f"drafts of {probability:.1e} emitted", int((out[:, 0] == 0).sum()), probability * requests)


# ---- the models


ROUND = [
    (2, 1, "dense", models.random_model(1, 2)),
    (3, 2, "dense", models.random_model(25, 3, sharpness=1.5)),
    (4, 3, "dense", models.random_model(3, 4)),
    (3, 2, "one_hot", models.random_model(4, 3)),
]
ROUNDS, REDRAFTED = models.random_model(35, 3, sharpness=2.5), models.random_model(26, 3, sharpness=2.5)
# After token 2 hardly a draft survives: what is admitted behind it depends on it.
PREFIX, PREFIX_ROUNDS = (
    dataclasses.replace(models.random_model(seed, 3, sharpness=2.5), confidence=torch.tensor([0.9, 0.95, 0.1])) for seed in (37, 19)
)
CORRECTIONS = models.random_model(67, 4, sharpness=2.5)
PAIRS = models.random_model(8, 3)
OFFSET = models.random_model(9, 3, sharpness=1.0)
OFFSET = dataclasses.replace(OFFSET, draft=OFFSET.draft + 300)  # where bf16 has steps of 2
SUPPORT = models.random_model(10, 4, impossible=True)
MISSING = models.random_model(11, 3)
WIDTHS = {"wider": models.random_model(12, 3, draft_vocab=5), "narrower": models.random_model(13, 4, draft_vocab=3)}
