"""Known-bad rules on chains, as implementations have shipped them: acceptance functions for the suite to detect.

Each is one of rules.py with one mistake. `KNOWN_BAD` holds them by name; `DRAFTS` and `SCHEDULES` hold what is wrong before
acceptance. Which test detects which: tests/package/test_testing.py. Try

    python -m dspark_kernels.testing dspark_kernels.testing.known_wrong:block_first_reject

Those on draft trees: tree/known_wrong.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...types import Stream
from . import models, rules
from .rules import Batch, Noise, at

Accepts = Callable[..., Tensor]  # an acceptance function
Verdict = tuple[Tensor, Tensor]  # of a rule on a Batch: accepted drafts, token

KNOWN_BAD: dict[str, Accepts] = {}


def known_bad(rule: str, table: dict[str, Accepts] = KNOWN_BAD) -> Callable[[Accepts], Accepts]:
    """Register an acceptance function under its name."""

    def register(function: Accepts) -> Accepts:
        function.rule = rule  # type: ignore[attr-defined]  # a function takes attributes, which its type cannot say
        table[function.__name__] = function
        return function

    return register


def known_bad_rule(rule: str, **options: Any) -> Callable[[Callable[[Batch], Verdict]], Accepts]:
    """Register a rule on a Batch: (accepted, token)."""

    def register(of_batch: Callable[[Batch], Verdict]) -> Accepts:
        @functools.wraps(of_batch)
        def function(*arguments: Any) -> Tensor:
            return rules.accept(of_batch, *arguments, **options)

        del function.__dict__["__wrapped__"]
        return known_bad(rule)(function)

    return register


# ---- noise


class _DraftNoiseInCorrection(Noise):
    def blocks(self, stream: Stream, positions: Tensor, groups: Tensor) -> list[Tensor]:
        return super().blocks(Stream.DRAFT if stream == Stream.CORRECT else stream, positions, groups)


class _PositionOnly(Noise):
    def blocks(self, stream: Stream, positions: Tensor, groups: Tensor) -> list[Tensor]:
        return Noise(self.seeds, torch.zeros_like(self.anchor_positions)).blocks(stream, positions, groups)


class _OneUniformPerRound(Noise):
    def uniforms(self, count: int) -> Tensor:
        return super().uniforms(1).expand(-1, count)


class _OneForAll(Noise):
    """The acceptance uniforms of the first request for the whole batch."""

    def uniforms(self, count: int) -> Tensor:
        return super().uniforms(count)[:1].expand(len(self.seeds), -1)


class _ByRow(Noise):
    def __init__(self, seeds: Tensor, anchor_positions: Tensor) -> None:
        super().__init__(seeds + torch.arange(len(seeds), device=seeds.device), anchor_positions)


class _LowWord(Noise):
    def __init__(self, seeds: Tensor, anchor_positions: Tensor) -> None:
        super().__init__(seeds & 0xFFFFFFFF, anchor_positions)


class _SeedPlusPosition(Noise):
    """Keyed by the sum of seed and anchor position, so that other seeds meet the same noise elsewhere."""

    def blocks(self, stream: Stream, positions: Tensor, groups: Tensor) -> list[Tensor]:
        start = self.anchor_positions
        return Noise(self.seeds + start, torch.zeros_like(start)).blocks(stream, positions - start[:, None], groups)


class _Coarse(Noise):
    """24 bits: 0 is among the uniforms."""

    def uniform(self, words: Tensor) -> Tensor:
        return (words >> 8).double() * 2.0**-24


class _GumbelFloor(Noise):
    """-log(-log(u)) of uniforms kept off 0 and 1 by 1e-4."""

    def exponential(self, words: Tensor) -> Tensor:
        return -torch.log(self.uniform(words).clamp(1e-4, 1 - 1e-4))

    def draw(self, positions: Tensor, weights: Tensor) -> Tensor:
        return self.race(Stream.CORRECT, positions, weights.log())


def _on(noise: type[Noise], rule_name: str, name: str, text: str) -> Accepts:
    def function(*arguments: Any) -> Tensor:
        of_rule: Accepts = getattr(rules, rule_name)
        return of_rule(*arguments, noise=noise)

    function.__name__, function.__doc__ = name, text
    return known_bad(rule_name)(function)


correction_with_draft_noise = _on(
    _DraftNoiseInCorrection, "token", "correction_with_draft_noise", "Corrections drawn with the noise of the rejected draft."
)
position_only_noise = _on(
    _PositionOnly, "block", "position_only_noise", "Noise without the anchor position: met again when a position is drafted again."
)
one_uniform_per_round = _on(
    _OneUniformPerRound, "token", "one_uniform_per_round", "The same acceptance uniform for every draft of a round."
)
one_uniform_per_batch = _on(_OneForAll, "token", "one_uniform_per_batch", "The same acceptance uniforms for every request.")
noise_by_row = _on(_ByRow, "token", "noise_by_row", "Noise that depends on the batch row.")
low_word_of_seed = _on(_LowWord, "token", "low_word_of_seed", "Seeds cut to 32 bits.")
seed_plus_position = _on(_SeedPlusPosition, "token", "seed_plus_position", "Noise keyed by the sum of seed and position.")
gumbel_floor = _on(_GumbelFloor, "token", "gumbel_floor", "Gumbel noise with a floor: rare tokens are never drawn.")


@known_bad_rule("token", noise=_Coarse)
def equality_passes(batch: Batch) -> Verdict:
    """u q <= p with a u that can be 0: impossible drafts pass."""
    target, draft = batch.drafted_probs()
    accepted = rules.prefix(batch.admitted() & (draft > 0) & (batch.noise.uniforms(batch.num_drafts) * draft <= target))
    fine = dataclasses.replace(batch, noise=Noise(batch.noise.seeds, batch.noise.anchor_positions))
    return accepted, fine.finish(accepted)


# ---- rules


@known_bad_rule("block")
def block_first_reject(batch: Batch) -> Verdict:
    """The block rule that stops at the first draft whose test fails; on some models off by a total variation of 0.008 only."""
    prefix_probs, accept_probs = rules.block_terms(batch)
    accepted = rules.prefix(batch.admitted() & (batch.noise.uniforms(batch.num_drafts) < accept_probs) & (prefix_probs[:, 1:] > 0))
    return accepted, batch.finish(accepted, at(prefix_probs, accepted))


@known_bad_rule("block")
def block_unverified_row(batch: Batch) -> Verdict:
    """The block rule over all K drafts and rows, cut back to the admitted ones."""
    whole = dataclasses.replace(batch, lens=torch.full_like(batch.lens, batch.num_drafts))
    accepted, token = rules.block_rule(whole)
    return torch.minimum(accepted, batch.lens), torch.where(accepted <= batch.lens, token, batch.finish(batch.lens))


@known_bad_rule("block")
def block_without_prefix_probability(batch: Batch) -> Verdict:
    """Residual [p - q]+ instead of [P p - q]+."""
    accepted, _ = rules.block_rule(batch)
    return accepted, batch.finish(accepted)


@known_bad_rule("token")
def correction_from_target(batch: Batch) -> Verdict:
    """Corrections from p: what was rejected is not taken out."""
    accepted, _ = rules.token_rule(batch)
    return accepted, batch.noise.draw(batch.noise.anchor_positions + accepted + 1, at(batch.target, accepted))


@known_bad_rule("token")
def correction_without_draft(batch: Batch) -> Verdict:
    """Corrections from p with the draft's id removed, where the draft was drawn from a distribution."""
    accepted, token = rules.token_rule(batch)
    row = at(batch.target, accepted)
    refused = at(batch.drafts, accepted.clamp(max=batch.num_drafts - 1)).clamp(0, row.shape[1] - 1)
    weights = row.scatter(1, refused[:, None], 0.0)
    weights = torch.where((weights.sum(1) > 0)[:, None], weights, row)
    drawn = batch.noise.draw(batch.noise.anchor_positions + accepted + 1, weights)
    return accepted, torch.where(accepted < batch.lens, drawn, token)


@known_bad_rule("token")
def bonus_at_row_k(batch: Batch) -> Verdict:
    """The bonus from row K, where a trimmed request has its last row at its own length."""
    accepted, token = rules.token_rule(batch)
    drawn = batch.noise.draw(batch.noise.anchor_positions + accepted + 1, batch.target[:, -1])
    return accepted, torch.where(accepted < batch.lens, token, drawn)


@known_bad_rule("token")
def bonus_one_row_early(batch: Batch) -> Verdict:
    """The bonus from the row that verified the last draft."""
    accepted, token = rules.token_rule(batch)
    drawn = batch.noise.draw(batch.noise.anchor_positions + accepted + 1, at(batch.target, (accepted - 1).clamp(min=0)))
    return accepted, torch.where(accepted < batch.lens, token, drawn)


@known_bad_rule("token")
def all_drafts_verified(batch: Batch) -> Verdict:
    """Verifies all K drafts whatever was admitted."""
    whole = dataclasses.replace(batch, lens=torch.full_like(batch.lens, batch.num_drafts))
    return rules.token_rule(whole)


@known_bad_rule("token")
def at_least_one_draft(batch: Batch) -> Verdict:
    """Takes a request without an admitted draft for one with one."""
    return rules.token_rule(dataclasses.replace(batch, lens=batch.lens.clamp(min=1)))


@known_bad_rule("token")
def last_id_without_residual(batch: Batch) -> Verdict:
    """The last id where nothing is left of [p - q]+."""
    accepted, token = rules.token_rule(batch)
    at_row = accepted.clamp(max=batch.num_drafts - 1)
    left = (at(batch.target, accepted) - at(batch.draft, at_row)).clamp(min=0).sum(1)
    return accepted, torch.where((accepted < batch.lens) & (left == 0), batch.target.shape[2] - 1, token)


@known_bad_rule("token")
def always_rejects(batch: Batch) -> Verdict:
    """Lossless and useless: one token of the target per round."""
    none = torch.zeros_like(batch.lens)
    return none, batch.noise.draw(batch.noise.anchor_positions + 1, batch.target[:, 0])


@known_bad_rule("coupled")
def coupled_without_sharing(batch: Batch) -> Verdict:
    """Samples the target with noise of its own: lossless, accepts by accident."""
    noise = Noise(batch.noise.seeds ^ 0x5555, batch.noise.anchor_positions)
    return rules.coupled_rule(dataclasses.replace(batch, noise=noise))


@known_bad_rule("coupled")
def coupled_with_anchor(batch: Batch) -> Verdict:
    """The draft's noise for the first draft, then noise of the round: what plain sampling gives depends on how rounds fall."""
    index = batch.noise.anchor_positions
    rows = [batch.noise.race(Stream.CORRECT, index + i + 1, batch.target[:, i].log()) for i in range(1, batch.num_drafts + 1)]
    first = batch.noise.race(Stream.COUPLED, index + 1, batch.target[:, 0].log())
    return rules.follow(batch, torch.stack([first, *rows], 1))


# ---- what is read


@known_bad("token")
def temperature_on_target_only(
    target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, temperature: Tensor, *rest: Tensor
) -> Tensor:
    """The ratio against a draft distribution without temperature."""
    if draft_logits is not None:
        draft_logits = draft_logits * torch.where(temperature > 0, temperature, 1.0)[:, None, None]
    return rules.token(target_logits, draft_tokens, draft_logits, temperature, *rest)


@known_bad("token")
def draft_distribution_cut(
    target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, temperature: Tensor, *rest: Tensor
) -> Tensor:
    """The draft distribution cut to its two best ids, where the drafts were drawn from all."""
    if draft_logits is not None and draft_logits.shape[-1] > 2:
        least = draft_logits.topk(2, -1).values[..., -1:]
        draft_logits = torch.where(draft_logits < least, rules.NEG_INF, draft_logits)
    return rules.token(target_logits, draft_tokens, draft_logits, temperature, *rest)


@known_bad("token")
def draft_distribution_rounded(
    target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, temperature: Tensor, *rest: Tensor
) -> Tensor:
    """The ratio against bf16 logits, where the drafts were drawn from finer ones."""
    draft_logits = None if draft_logits is None else draft_logits.bfloat16().float()
    return rules.token(target_logits, draft_tokens, draft_logits, temperature, *rest)


@known_bad("token")
def distribution_ignored(
    target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, temperature: Tensor, *rest: Tensor
) -> Tensor:
    """Sampled drafts taken for one-hot ones."""
    return rules.token(target_logits, draft_tokens, None, temperature, *rest)


@known_bad("token")
def one_hot_for_granted(
    target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, temperature: Tensor, *rest: Tensor
) -> Tensor:
    """One-hot drafts corrected from p, with the draft's id still in it."""
    if draft_logits is None:
        return correction_from_target(target_logits, draft_tokens, None, temperature, *rest)
    return rules.token(target_logits, draft_tokens, draft_logits, temperature, *rest)


@known_bad("token")
def placeholder_is_the_last_id(
    target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, temperature: Tensor, *rest: Tensor
) -> Tensor:
    """-1 indexes the last id, and is verified as if it were it."""
    vocab = target_logits.shape[2]
    return rules.token(target_logits, torch.where(draft_tokens == -1, vocab - 1, draft_tokens), draft_logits, temperature, *rest)


@known_bad("token")
def nan_passes(
    target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, temperature: Tensor, *rest: Tensor
) -> Tensor:
    """Rejects where u q >= p: a comparison with NaN does not hold, so the draft passes."""
    dead = ~rules.readable(target_logits).isfinite().any(-1, keepdim=True)
    ids = torch.arange(target_logits.shape[2], device=target_logits.device)
    hot = torch.where(ids == pad(draft_tokens, (0, 1))[..., None], 0.0, rules.NEG_INF)
    target_logits = torch.where(dead, hot.to(target_logits.dtype), target_logits)
    return rules.token(target_logits, draft_tokens, draft_logits, temperature, *rest)


@known_bad("token")
def masked_columns_win(target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, *rest: Tensor) -> Tensor:
    """Rows padded to a multiple of 8 with zeros, which win where they are the largest."""
    width = -target_logits.shape[2] % 8
    draft_logits = None if draft_logits is None else pad(draft_logits, (0, width), value=rules.NEG_INF)
    return rules.token(pad(target_logits, (0, width)), draft_tokens, draft_logits, *rest)


@known_bad("token")
def strides_ignored(target_logits: Tensor, *rest: Tensor | None) -> Tensor:
    """Rows read as if they lay one behind the other."""
    shape = target_logits.shape
    room = target_logits.untyped_storage().nbytes() // target_logits.element_size()
    if target_logits.numel() <= room and target_logits.numel():
        target_logits = target_logits.as_strided(shape, (shape[1] * shape[2], shape[2], 1))
    return rules.token(target_logits, *rest)


@known_bad("token")
def scaled_in_half(
    target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, temperature: Tensor, *rest: Tensor
) -> Tensor:
    """Logits divided by the temperature in fp16: overflow, and inf - inf."""
    scale = torch.where(temperature > 0, temperature, 1.0).half()[:, None, None]
    scaled = [None if x is None else (x.half() / scale).float() for x in (target_logits, draft_logits)]
    return rules.token(scaled[0], draft_tokens, scaled[1], torch.where(temperature > 0, 1.0, 0.0), *rest)


@known_bad("greedy")
def greedy_highest_tie(target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, *rest: Tensor) -> Tensor:
    """Ties to the highest id."""
    width = target_logits.shape[2]

    def flip(tokens: Tensor) -> Tensor:
        return torch.where(tokens >= 0, width - 1 - tokens, tokens)

    return flip(rules.greedy(target_logits.flip(2), flip(draft_tokens), draft_logits, *rest))


@known_bad("token")
def greedy_rows_sampled(
    target_logits: Tensor, draft_tokens: Tensor, draft_logits: Tensor | None, temperature: Tensor, *rest: Tensor
) -> Tensor:
    """Temperature 0 taken for 1."""
    return rules.token(target_logits, draft_tokens, draft_logits, torch.where(temperature > 0, temperature, 1.0), *rest)


# ---- before acceptance


def draft_rounded(draft_logits: Tensor, temperature: Tensor, *rest: Tensor) -> Tensor:
    """Drafts drawn from bf16 logits, where the distribution that is handed over has more digits."""
    return models.draft(draft_logits.bfloat16().float(), temperature, *rest)


def draft_hot(draft_logits: Tensor, temperature: Tensor, *rest: Tensor) -> Tensor:
    """Drafts drawn at half the temperature."""
    return models.draft(draft_logits, temperature * 0.5, *rest)


def draft_position_only(
    draft_logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, anchor_positions: Tensor
) -> Tensor:
    """A position that is drafted again meets its old noise."""
    return models.draft(draft_logits, temperature, seeds, positions, torch.zeros_like(anchor_positions))


DRAFTS = {f.__name__: f for f in (draft_rounded, draft_hot, draft_position_only)}


def global_maximum(confidence: Tensor) -> Tensor:
    """The length that maximises tokens per second over all confidences of the round, where times rise less and less."""
    seconds = torch.tensor([0.010, 0.020, 0.022, 0.023], device=confidence.device)[: confidence.shape[1] + 1]
    tokens = 1 + pad(confidence.cumprod(1).cumsum(1), (1, 0))
    return (tokens / seconds).argmax(1)


def retrospective(confidence: Tensor) -> Tensor:
    """Cut before the first draft whose own value says that nothing behind it survives: read one token too late."""
    return rules.prefix(pad(confidence[:, 1:], (0, 1), value=1.0) >= 0.5)


SCHEDULES = {f.__name__: f for f in (global_maximum, retrospective)}
