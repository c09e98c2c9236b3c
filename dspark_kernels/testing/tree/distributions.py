"""Tests of a tree acceptance function by what it emits under many seeds, each against a distribution that is known exactly.

The suite draws the trees itself, from the distributions that it hands over; what follows the emitted tokens comes from the
target, so that the exact distribution of the first tokens is the target's, whatever the trees were. Every test yields
`statistics.Finding`s; `run` is a `run.TreeRun`. As for chains, the models are chosen among random ones so that the known-bad rules
(known_wrong.py) are detected clearly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from ..chain import distributions as chain_distributions, models as chain_models
from ..chain.rules import NEG_INF
from ..statistics import Finding, at_least, compare, rare
from . import models, rules
from .asked import TreeRun

PAIR, STAR, CHAIN = (-1, 0, 0), (-1, 0, 0, 0), (-1, 0, 1)
ELDER, SECOND, ODD, DEEP = (-1, 0, 0, 1, 1), (-1, 0, 0, 2, 2), (-1, 0, 0, 1, 3, 3), (-1, 0, 0, 1, 2, 4)
MIXED = (ODD, (-1,), SECOND, STAR, (-1, 0, 1, 2, 2))
# Found by search. Node 1 at position 1, anchor position 0: the acceptance uniform is below 2^-24; or within 2^-25 of 1.
LOW_UNIFORMS = (
    34497534, 56870691, 91489961, 106471135, 116840421, 145210445, 149258720, 173433382, 174150232, 188839004, 209889237, 211985651,
)  # fmt: skip
HIGH_UNIFORMS = (66376731, 101300306, 151669353, 188727120)


def _depth(shapes: tuple[models.Shape, ...]) -> int:
    return max(int(rules.depths_of(torch.tensor([shape])).max()) for shape in shapes)


def _round(
    run: TreeRun,
    what: str,
    model: chain_models.Model,
    shapes: tuple[models.Shape, ...],
    tokens: int | None = None,
    **options: Any,
) -> Iterator[Finding]:
    """One round after the prompt, completed by the target: the distribution of the first tokens (None: all of a round)."""
    tokens = tokens or _depth(shapes) + 1
    temperature = options.get("temperature", 1.0)
    model, history, _ = run.decode(what, model, shapes, tokens, rounds=1, **options)
    while tokens > 1 and model.vocab**tokens * 20 > run.requests:  # fewer cells than samples
        tokens -= 1
    counts = chain_models.count_windows(history, 0, tokens, model.vocab)
    yield from compare(what, counts, chain_models.sequence_probs(model.target_probs(temperature), tokens), run.level)


def _windows(
    run: TreeRun, what: str, model: chain_models.Model, shapes: tuple[models.Shape, ...], **options: Any
) -> Iterator[Finding]:
    """Three rounds or more under one seed: the distribution of all windows of a few tokens."""
    tokens = 2 * (_depth(shapes) + 1) + 1
    model, history, _ = run.decode(what, model, shapes, tokens, rounds=None, **options)
    width = 3
    while width > 2 and model.vocab**width * 20 > run.requests:
        width -= 1
    for first in range(tokens - width + 1):
        counts = chain_models.count_windows(history, first, width, model.vocab)
        probs = chain_models.window_probs(model.target_probs(), first, width)
        yield from compare(f"{what}, tokens {first + 1} to {first + width}", counts, probs, run.level)


def _sampled(run: TreeRun) -> list[str]:
    return [drawn for drawn in run.drawn if drawn != "one_hot"] or [*run.drawn[:1]]


def one_round(run: TreeRun) -> Iterator[Finding]:
    """tokens of one round, V = 2 to 4, trees of 3 to 6 nodes, children drawn in every way"""
    for drawn in run.drawn:
        for model, shape in ROUND[drawn]:
            yield from _round(run, f"V={model.vocab} M={len(shape)} {drawn}", model, (shape,), kind=drawn)


def unequal(run: TreeRun) -> Iterator[Finding]:
    """trees of five shapes in a batch, from the root alone to six nodes"""
    for drawn in run.drawn:
        yield from _round(run, f"five shapes, {drawn}", UNEQUAL, MIXED, kind=drawn)


def rounds(run: TreeRun) -> Iterator[Finding]:
    """three consecutive rounds and more under one seed: noise that is met again"""
    for drawn in run.drawn:
        yield from _windows(run, f"rounds, {drawn}", ROUNDS[drawn], (PAIR if drawn == "one_hot" else ELDER,), kind=drawn)


def prefix(run: TreeRun) -> Iterator[Finding]:
    """which nodes have children depends on their own tokens; rows behind a tree's nodes hold something else"""
    for drawn in _sampled(run):
        yield from _round(run, f"one round, {drawn}", PREFIX, (DEEP,), cut=True, kind=drawn)


def noise(run: TreeRun) -> Iterator[Finding]:
    """draft noise in the draw; neighbouring seeds, high words of seeds, neighbouring positions"""
    for drawn in _sampled(run):
        yield from _round(run, f"frequent draws, {drawn}", DRAWS, (PAIR,), tokens=1, kind=drawn)
    seeds = run.seeds("pairs")
    model = run.model(chain_distributions.PAIRS)
    probs = chain_models.sequence_probs(model.target_probs(), 1)
    others = {"seed + 1": (1, 0), "seed + 2^32": (1 << 32, 0), "position + 1": (0, 1), "seed + 1, position - 1": (1, -1)}
    for what, (step, offset) in others.items():
        tokens = []
        for given, position in ((seeds, 7), (seeds + step, 7 + offset)):
            history, _ = run.play(model, (PAIR,), kind=run.drawn[0]).decode(given, 1, 1, position, salt=position)
            tokens.append(history[:, 0])
        counts = torch.bincount(tokens[0] * model.vocab + tokens[1], minlength=model.vocab**2)
        yield from compare(what, counts, probs[:, None] * probs, run.level)


def siblings(run: TreeRun) -> Iterator[Finding]:
    """each sibling has an acceptance uniform of its own: one for all is off by a total variation of 0.003 to 0.02 on most models"""
    for drawn in _sampled(run):
        yield from _round(run, f"siblings, {drawn}", SIBLINGS[drawn], (STAR,), tokens=1, kind=drawn)


def temperature(run: TreeRun) -> Iterator[Finding]:
    """temperatures other than 1 on both sides of the ratio; logits far from 0"""
    for value in (0.5, 1.75):
        yield from _round(run, f"temperature {value}", OFFSET, (ODD,), temperature=value, kind=_sampled(run)[-1])


def filters(run: TreeRun) -> Iterator[Finding]:
    """-inf logits in either distribution, as filters leave them: fewer children than a shape has room for"""
    for drawn in run.drawn:
        yield from _round(run, f"V=4 M=5 {drawn}", SUPPORT, (SECOND,), kind=drawn)


def widths(run: TreeRun) -> Iterator[Finding]:
    """draft logits wider and narrower than the target's: what is drawn outside is no node's token"""
    for name, model in chain_distributions.WIDTHS.items():
        for drawn in _sampled(run):
            yield from _round(run, f"{name}, {drawn}", model, (ELDER,), kind=drawn)


def accepts(run: TreeRun) -> Iterator[Finding]:
    """as many drafts accepted as the rule promises, so that always rejecting does not pass"""
    for drawn in run.drawn:
        for model, shape in ROUND[drawn]:
            what = f"V={model.vocab} M={len(shape)} {drawn}"
            depth = _depth((shape,))
            model, _, accepted = run.decode(what, model, (shape,), depth + 1, rounds=1, kind=drawn)
            mean, deviation = models.mean_accepted(run.rule, model, shape, drawn)
            yield at_least(f"accepted, {what}", float(accepted.double().mean()), mean, deviation, len(accepted))


def chain(run: TreeRun) -> Iterator[Finding]:
    """traversal of a chain is block verification: the distribution of how much is accepted and of what is emitted"""
    model, drafts = run.model(BLOCK), 2
    probs, outcomes = models.block_probs(model, drafts)
    play = run.play(model, ((-1, *range(drafts)),), kind="iid")
    seeds = run.seeds("chain")
    out, _ = play.round(torch.full_like(seeds, chain_models.PROMPT), seeds, torch.full_like(seeds, 7))
    base = model.vocab + 1
    places = torch.tensor([base**i for i in range(drafts + 1)])

    def keys(tokens: torch.Tensor) -> torch.Tensor:
        return ((tokens + 1) * places.to(tokens.device)).sum(1)

    rows = torch.tensor([[*outcome, *[-1] * (drafts + 1 - len(outcome))] for outcome in outcomes])
    number = torch.zeros(base ** (drafts + 1), dtype=torch.int64)
    number[keys(rows)] = torch.arange(len(outcomes))
    counts = torch.bincount(number.to(out.device)[keys(out)], minlength=len(outcomes))
    yield from compare("accepted and emitted", counts.cpu(), probs, run.level)


def residual(run: TreeRun) -> Iterator[Finding]:
    """nothing left of [p - q]+: drawn from p"""
    requests, vocab = min(run.requests, 1 << 14), 5
    row = torch.full((vocab,), NEG_INF)
    row[[1, 3]] = torch.tensor([0.0, 1.0])
    seeds = run.seeds("residual", requests)
    rows = row.expand(requests, 2, -1)
    tokens, parents = torch.tensor([[0, 2]]).repeat(requests, 1), torch.tensor([[-1, 0]]).int().repeat(requests, 1)
    for drawn in _sampled(run)[:1]:
        out = run.call_rows(rows, tokens, parents, None if drawn == "one_hot" else rows, drawn, seeds)
        probs = torch.softmax(row.double(), 0)
        what = "equal distributions, impossible child"
        yield from compare(what, torch.bincount(out[:, 0], minlength=vocab).cpu(), probs, run.level)


def tails(run: TreeRun) -> Iterator[Finding]:
    """impossible tokens never, uniforms near 0 and 1 among the noise; tokens of 1e-6 and unlikely children at their rate"""
    yield from _impossible(run)
    yield _rare_tokens(run)
    yield _rare_children(run)


def _impossible(run: TreeRun) -> Iterator[Finding]:
    extreme = torch.tensor([*LOW_UNIFORMS, *HIGH_UNIFORMS, *chain_distributions.EXTREME_DRAWS], device=run.device)
    seeds = torch.cat([extreme, run.seeds("impossible", max(64, run.requests - len(extreme)) if run.requests > 64 else 16)])
    vocab, count = 4, len(seeds)
    target = torch.tensor([[0.0, NEG_INF, 1.0, NEG_INF], *[[1.0, 0.0, NEG_INF, NEG_INF]] * 2])
    draft = torch.tensor([[-1.0, 2.0, -1.0, 2.0]]).expand(count, 3, vocab)
    first = torch.where(torch.arange(count) % 2 == 0, 1, 3)
    tokens = torch.stack([torch.zeros_like(first), first, 4 - first], 1)
    parents = torch.tensor([PAIR]).int().repeat(count, 1)
    for drawn in run.drawn:
        draft_logits = None if drawn == "one_hot" else draft
        out = run.call_rows(target.expand(count, 3, vocab), tokens, parents, draft_logits, drawn, seeds, anchor_position=0)
        wrong = int(((out[:, 0] == 1) | (out[:, 0] == 3) | (out[:, 1] > 1)).sum())
        yield Finding(f"{drawn} children: {wrong} of {count} requests emitted an impossible token", 0.0 if wrong else 1.0)


def _rare_tokens(run: TreeRun) -> Finding:
    """Tokens behind a root without children, among TAIL ids: as rare as 24 expected ones allow, but not below 2^-24 each."""
    requests = max(16, min(run.requests // 16, 1 << 21))
    each = max(2.0**-24, 24.0 / requests / chain_distributions.TAIL)
    row = torch.zeros(chain_distributions.TAIL + 1)
    row[1:] = torch.tensor(each / (1 - each * chain_distributions.TAIL)).log() if each * chain_distributions.TAIL < 0.5 else 0.0
    total = float(torch.softmax(row.double(), 0)[1:].sum())
    count, chunk, drawn = 0, (1 << 24) // (chain_distributions.TAIL + 1), run.drawn[0]
    for part in run.seeds("rare tokens", requests).split(chunk):
        rows = row.to(run.device).expand(len(part), 1, -1)
        tokens = torch.zeros(len(part), 1, dtype=torch.int64)
        out = run.call_rows(rows, tokens, tokens.int() - 1, None if drawn == "one_hot" else rows, drawn, part)
        count += int((out[:, 0] > 0).sum())
    return rare(f"tokens of {total / chain_distributions.TAIL:.1e}", count, total * requests)


def _rare_children(run: TreeRun) -> Finding:
    """A child that the drafter always makes and the target hardly ever says."""
    requests, drawn = run.requests, run.drawn[0]
    probability = min(0.25, 64.0 / requests)
    row = torch.tensor([probability, 1 - probability]).double().log().float().expand(requests, 2, -1)
    probability = float(torch.softmax(row[0, 0].double(), 0)[0])
    draft_logits = torch.tensor([0.0, NEG_INF]).expand(requests, 2, -1)
    tokens, parents = torch.zeros(requests, 2, dtype=torch.int64), torch.tensor([[-1, 0]]).int().repeat(requests, 1)
    seeds = run.seeds("rare children", requests)
    out = run.call_rows(row, tokens, parents, None if drawn == "one_hot" else draft_logits, drawn, seeds)
    return rare(f"children of {probability:.1e} emitted", int((out[:, 0] == 0).sum()), probability * requests)


# ---- the models


def _chosen(*found: tuple[int, int, models.Shape]) -> list[tuple[chain_models.Model, models.Shape]]:
    """(seed, vocabulary, shape) to (model, shape)."""
    return [(chain_models.random_model(seed, vocab, sharpness=1.5), shape) for seed, vocab, shape in found]


ROUND = {
    "one_hot": _chosen((4, 3, ODD)),
    "iid": _chosen((1, 2, PAIR), (25, 3, SECOND), (3, 3, ODD)),
    "without_replacement": _chosen((5, 4, STAR), (6, 3, ODD)),
}
UNEQUAL = chain_models.random_model(14, 3, sharpness=1.5)
ROUNDS = {
    "one_hot": chain_models.random_model(35, 3, sharpness=2.5),
    "iid": chain_models.random_model(35, 3, sharpness=2.5),
    "without_replacement": chain_models.random_model(26, 3, sharpness=2.5),
}
PREFIX = dataclasses.replace(chain_models.random_model(37, 3, sharpness=2.5), confidence=torch.tensor([0.9, 0.95, 0.1]))
DRAWS = chain_models.random_model(113, 4, sharpness=2.5)
SIBLINGS = {
    "one_hot": chain_models.random_model(289, 3, sharpness=1.5),
    "iid": chain_models.random_model(289, 3, sharpness=1.5),  # one uniform for all: off by 0.048
    "without_replacement": chain_models.random_model(234, 4, sharpness=1.5),  # by 0.19
}
BLOCK = chain_models.random_model(25, 3, sharpness=1.5)
OFFSET = chain_models.random_model(9, 3, sharpness=1.0)
OFFSET = dataclasses.replace(OFFSET, draft=OFFSET.draft + 300)  # where bf16 has steps of 2
SUPPORT = chain_models.random_model(10, 4, impossible=True)
