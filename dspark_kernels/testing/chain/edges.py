"""Tests of an acceptance function on batches whose output is known in advance, token by token.

Where a target row gives one id all probability, every lossless rule must say it, and every draft of that id is accepted: rows that
are read in the wrong place, ids beyond the vocabulary and lengths that are not respected show without any statistics. A test raises
`Detected`; `run` is a `suite.Run`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from . import rules
from .asked import Run
from .rules import NEG_INF

SURE = 60.0  # logit above all others: the rest has a probability of 1e-26


class Detected(Exception):
    """What a request got, and what it had to get."""


def expect(what: str, tokens: torch.Tensor, wanted: torch.Tensor) -> None:
    differs = (tokens != wanted).any(1)
    if bool(differs.any()):
        r = int(differs.long().argmax())
        raise Detected(
            f"{what}: {int(differs.sum())} of {len(differs)} requests; request {r} got {tokens[r].tolist()}, "
            f"expected {wanted[r].tolist()}"
        )


def expect_same_in_any_batch(tokens_of: Callable[[torch.Tensor], torch.Tensor], requests: int) -> None:
    """tokens_of: from indices of requests, of which there are at least 11, to what they get in a batch of these."""
    whole = torch.arange(requests)
    want = tokens_of(whole)
    expect("again", tokens_of(whole), want)
    for what, index in (
        ("in reverse", whole.flip(0)),
        ("alone", torch.tensor([3])),
        ("some", torch.tensor([10, 2, 7, 5, 3])),
        ("twice each", whole.repeat_interleave(2)),
    ):
        expect(what, tokens_of(index), want[index])


def _points(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """Logits [..., vocab] with all probability on the ids."""
    return torch.nn.functional.one_hot(ids, vocab) * SURE


def _every_end(num_drafts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lens [R] and accepted [R]: every number of accepted drafts of every length 0..K."""
    pairs = [(length, n) for length in range(num_drafts + 1) for n in range(length + 1)]
    lens, accepted = torch.tensor(pairs).unbind(1)
    return lens, accepted


def _point_batch(vocab: int, num_drafts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(target logits, drafts, lens, what every lossless rule emits)."""
    lens, accepted = _every_end(num_drafts)
    r, i = torch.arange(len(lens))[:, None], torch.arange(num_drafts + 1)
    says = (5 * r + 3 * i * i + 1) % vocab
    right = i[:-1] < accepted[:, None]
    drafts = torch.where(right, says[:, :-1], (says[:, :-1] + 1) % vocab)
    return _points(says, vocab).float(), drafts, lens, rules.emitted(drafts, accepted, rules.at(says, accepted))


def rows(run: Run) -> None:
    """each token from its own row: every length, every number of accepted drafts, bonus row of trimmed requests"""
    vocab, num_drafts = 11, 4
    target, drafts, lens, wanted = _point_batch(vocab, num_drafts)
    behind = torch.arange(num_drafts + 1) > lens[:, None]
    target = torch.where(behind[..., None], target.roll(2, 2), target)
    for what, draft_logits in (("sampled drafts", torch.zeros(len(lens), num_drafts, vocab)), ("one-hot drafts", None)):
        expect(what, run.call_rows(target, drafts, draft_logits, lens=lens), wanted)


def padding(run: Run) -> None:
    """rows that are views of wider ones: what lies behind column V is never read"""
    for vocab in (13, 1029):
        target, drafts, lens, wanted = _point_batch(vocab, 2)
        draft_logits = torch.zeros(len(lens), 2, vocab)
        wide = [torch.full((*x.shape[:-1], vocab + 7), 3 * SURE) for x in (target, draft_logits)]
        for buffer, x in zip(wide, (target, draft_logits), strict=True):
            buffer[..., :vocab] = x
        views = [buffer.to(run.device)[..., :vocab] for buffer in wide]
        expect(f"V={vocab}", run.call_rows(views[0], drafts, views[1], lens=lens), wanted)


def greedy(run: Run) -> None:
    """temperature 0: the arg-max whatever was drafted, ties to the lowest id, beside sampled requests too"""
    requests, num_drafts, vocab = 24, 3, 37
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(-4, 5, (requests, num_drafts + 1, vocab), generator=generator).float()  # many ties
    best = target.argmax(2)[:, :-1]
    other = torch.randint(0, vocab, best.shape, generator=generator)
    drafts = torch.where(torch.rand(best.shape, generator=generator) < 0.7, best, other)
    draft_logits = torch.randn(requests, num_drafts, vocab, generator=generator)
    lens = torch.randint(0, num_drafts + 1, (requests,), generator=generator)
    seeds = run.seeds("greedy", requests).cpu()
    wanted = rules.greedy(target, drafts, draft_logits, torch.zeros(requests), seeds, lens, torch.full((requests,), 7))
    for what, proposal in (("sampled drafts", draft_logits), ("one-hot drafts", None)):
        expect(what, run.call_rows(target, drafts, proposal, seeds, lens=lens, temperature=0.0), wanted)
    if run.rule != "greedy":
        cold = torch.arange(requests) % 2 == 0
        out = run.call_rows(target, drafts, draft_logits, seeds, lens=lens, temperature=torch.where(cold, 0.0, 1.0))
        expect("beside sampled requests", out[cold], wanted[cold])


def batch(run: Run) -> None:
    """a request gets the same tokens whatever else is in the batch, in whatever row, and again"""
    requests, num_drafts, vocab = 12, 3, 1100
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(requests, num_drafts + 1, vocab, generator=generator) * 3
    draft_logits = target[:, :-1] + torch.randn(requests, num_drafts, vocab, generator=generator)
    drafts = draft_logits.argmax(2)
    lens = torch.arange(requests) % (num_drafts + 1)
    heat = torch.full((requests,), 0.0 if run.rule == "greedy" else 1.0)
    seeds = run.seeds("batch", requests).cpu()

    def tokens(index: torch.Tensor) -> torch.Tensor:
        return run.call_rows(
            target[index], drafts[index], draft_logits[index], seeds[index], lens=lens[index], temperature=heat[index]
        )

    expect_same_in_any_batch(tokens, requests)


def bad_rows(run: Run) -> None:
    """NaN reads as -inf, +inf takes all, acceptance stops at a row without a finite logit, ids stay in range"""
    num_drafts, vocab = 2, 9
    target, drafts, lens, wanted = _point_batch(vocab, num_drafts)
    draft_logits = torch.zeros(len(lens), num_drafts, vocab)
    holes = torch.where(target == 0, float("nan"), target)
    expect("NaN beside one id", run.call_rows(holes, drafts, draft_logits, lens=lens), wanted)
    infinite = torch.where(target == SURE, float("inf"), target)
    expect("+inf", run.call_rows(infinite, drafts, draft_logits, lens=lens), wanted)
    for value in (float("nan"), NEG_INF):
        corrupted = target.clone()
        corrupted[:, 1] = value
        out = run.call_rows(corrupted, drafts, draft_logits, lens=lens)
        stopped = (wanted >= 0).sum(1).clamp(max=2)  # row 0 verifies a draft, row 1 can only end
        index = torch.arange(num_drafts + 1)
        known = torch.where((index < stopped[:, None] - (stopped == 2).long()[:, None]), wanted, -1)
        any_id = (index == 1) & (stopped == 2)[:, None]
        expect(f"row of {value}", torch.where(any_id, -1, out), known)
    if run.rule != "greedy":
        run.call_rows(target, drafts, draft_logits + float("nan"), lens=lens)


def extreme(run: Run) -> None:
    """fp16 logits of 6e4 and temperatures of 1e-6: no overflow, no NaN, the arg-max though another is close"""
    num_drafts, vocab = 2, 9
    target, drafts, lens, wanted = _point_batch(vocab, num_drafts)
    target = torch.maximum(target, 0.95 * target.roll(-1, 2))
    drawn = _points(drafts, vocab)
    for what, scale, heat in (("large logits", 1000.0, 1.0), ("temperature 1e-6", 0.05, 1e-6), ("both", 1000.0, 1e-6)):
        halves = (target * scale).half(), (drawn * scale).half()
        expect(what, run.call_rows(halves[0], drafts, halves[1], lens=lens, temperature=heat), wanted)


def empty(run: Run) -> None:
    """no request, no admitted draft, one draft"""
    none = run.call_rows(torch.zeros(0, 3, 5), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, 5))
    if tuple(none.shape) != (0, 3):
        raise Detected(f"no request: expected tokens [0, 3], got {list(none.shape)}")
    target, drafts, _, _ = _point_batch(7, 2)
    target, drafts = target[:, :2], drafts[:, :1]
    zero = torch.zeros(len(drafts), dtype=torch.int64)
    wanted = rules.emitted(drafts, zero, target[:, 0].argmax(1))
    expect("no draft admitted", run.call_rows(target, drafts, torch.zeros(len(drafts), 1, 7), lens=zero), wanted)


def shared(run: Run) -> None:
    """the coupled rule emits what plain sampling with the same seed does, whatever was drafted"""
    from . import distributions

    model, seeds = run.model(distributions.ROUNDS), run.seeds("shared", 64)
    drafted, _ = run.play(model, 3).decode(seeds, 6, None, 3)
    none = dataclasses.replace(run.play(model, 3, cut=True), schedule=lambda confidence: torch.zeros_like(confidence[:, 0]))
    plain, _ = none.decode(seeds, 6, None, 3)
    expect("with drafts, against no draft admitted", drafted, plain)
