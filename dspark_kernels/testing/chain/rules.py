"""Chain acceptance in plain torch for many requests at once: what the suite drafts with, and what the known-bad rules change.

    token:   accept x_i while u_i q_i(x_i) < p_i(x_i), then draw from [p - q]+, or the bonus from p
    block:   P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i)), h_i = Z_i / (Z_i + 1 - P_i) with Z_i = sum [P_i p_{i+1} - q_{i+1}]+ for
             i < L, h_L = P_L; keep the longest prefix with u_i < h_i, then draw from [P p - q]+, or the bonus from p
    coupled: y_i = argmax(log p_i + G_i) with the draft's own noise; accept while x_i = y_i, then emit y
    greedy:  accept while x_i = argmax p_i, then emit the arg-max

`token`, `block`, `coupled` and `greedy` are acceptance functions as the suite takes them (see `suite.check`). Symbols: R requests,
K drafts, V vocabulary, L admitted drafts, p target distribution, q draft distribution, x drafts, u acceptance uniforms, G Gumbel
noise. Everything is fp64, every random word addressed by the request's seed, position and anchor position. References:
reference/accept.py and reference/philox.py. Sources: arXiv 2211.17192, 2302.01318, 2403.10444, 2408.07978; Salmon et al., SC 2011
(Philox).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...types import Stream

NEG_INF = float("-inf")
VOCAB_BLOCK = 1024  # ids per vocabulary block of the two-level race
_MASK = 0xFFFFFFFF


def philox(seeds: Tensor, counters: Sequence[Tensor | int]) -> list[Tensor]:
    """Philox 4x32-10: four output words (int64 holding uint32) of broadcastable counter words under 64-bit keys."""
    words = torch.broadcast_tensors(seeds, *(torch.as_tensor(c, device=seeds.device) for c in counters))
    (seeds, *words) = (word.to(torch.int64) for word in words)
    a, b, c, d = (word & _MASK for word in words)
    key0, key1 = seeds & _MASK, (seeds >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap around and keep all 64 bits.
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) & _MASK ^ b ^ key0, right & _MASK, (left >> 32) & _MASK ^ d ^ key1, left & _MASK
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return [a, b, c, d]


class Noise:
    """The noise of a batch: counter = (lane >> 2, decided position, anchor position, stream), word = output[lane & 3]."""

    def __init__(self, seeds: Tensor, anchor_positions: Tensor) -> None:
        self.seeds, self.anchor_positions = seeds, anchor_positions

    def words(self, stream: Stream, positions: Tensor, lanes: int, first: Tensor | int = 0) -> Tensor:
        """Words [R, lanes] of lanes first .. first + lanes - 1 (first a multiple of 4, one for all or [R])."""
        first = torch.as_tensor(first, device=self.seeds.device).view(-1, 1)
        groups = (first >> 2) + torch.arange(-(-lanes // 4), device=self.seeds.device)
        output = self.blocks(stream, positions[:, None], groups)
        return torch.stack(output, -1).flatten(1)[:, :lanes]

    def blocks(self, stream: Stream, positions: Tensor, groups: Tensor) -> list[Tensor]:
        """The four words at positions [R, n] and lane groups, which broadcast."""
        anchor = torch.zeros_like(self.anchor_positions) if stream == Stream.COUPLED else self.anchor_positions
        return philox(self.seeds[:, None], [groups, positions, anchor[:, None], int(stream)])

    def uniform(self, words: Tensor) -> Tensor:
        """In (0, 1 - 2^-24]."""
        return ((words.double() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)

    def exponential(self, words: Tensor) -> Tensor:
        return -torch.log1p(-self.uniform(words))

    def uniforms(self, count: int) -> Tensor:
        """[R, count], the acceptance uniforms of drafts 1..count."""
        positions = self.anchor_positions[:, None] + torch.arange(1, count + 1, device=self.seeds.device)
        return self.uniform(self.blocks(Stream.ACCEPT, positions, torch.zeros_like(positions))[0])

    def race(self, stream: Stream, positions: Tensor, log_weights: Tensor, first: Tensor | int = 0) -> Tensor:
        """[R]: which of log_weights [R, n] wins when Gumbel noise is added."""
        clocks = self.exponential(self.words(stream, positions, log_weights.shape[1], first))
        return (log_weights - clocks.log()).argmax(1)

    def draw(self, positions: Tensor, weights: Tensor) -> Tensor:
        """[R]: a correction or bonus token, in proportion to weights [R, V]: a vocabulary block first, then an id inside."""
        width = weights.shape[1]
        block = torch.zeros_like(positions)
        if width > VOCAB_BLOCK:
            blocks = torch.nn.functional.pad(weights, (0, -width % VOCAB_BLOCK)).unflatten(1, (-1, VOCAB_BLOCK))
            block = self.race(Stream.LEAF, positions, blocks.sum(2).log())
            weights = blocks[torch.arange(len(block), device=block.device), block]
        return block * VOCAB_BLOCK + self.race(Stream.CORRECT, positions, weights.log(), block * VOCAB_BLOCK)


def readable(logits: Tensor) -> Tensor:
    """fp64 with NaN read as -inf."""
    logits = logits.double()
    return torch.where(logits.isnan(), NEG_INF, logits)


def probs_of(logits: Tensor, temperature: Tensor) -> Tensor:
    """softmax(logits / temperature) over the last dimension; +inf takes all, a row of -inf has probability 0 everywhere.

    temperature: [R], above 0; logits [R, ..., V], readable.
    """
    top = logits.max(-1, keepdim=True).values
    scale = (1.0 / temperature.double()).view(-1, *[1] * (logits.dim() - 1))
    probs = torch.softmax(torch.where(logits == NEG_INF, NEG_INF, (logits - top) * scale), -1)
    hot = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    return torch.where(top == NEG_INF, 0.0, torch.where(top == float("inf"), hot, probs))


@dataclasses.dataclass
class Batch:
    """What a rule sees: probabilities target [R, K+1, V] and draft [R, K, V], drafts [R, K], how many are admitted lens [R]."""

    target: Tensor
    draft: Tensor
    drafts: Tensor
    lens: Tensor
    noise: Noise

    @property
    def num_drafts(self) -> int:
        return self.drafts.shape[1]

    def admitted(self) -> Tensor:
        """Whether draft i is verified, bool [R, K]."""
        return torch.arange(self.num_drafts, device=self.lens.device) < self.lens[:, None]

    def drafted_probs(self) -> tuple[Tensor, Tensor]:
        """Target's and drafter's probabilities of the drafts [R, K]; 0 where a draft is missing or no id of the target."""
        vocab = self.target.shape[2]
        valid = (self.drafts >= 0) & (self.drafts < vocab)
        ids = torch.where(valid, self.drafts, 0)[..., None]

        def pick(probs: Tensor) -> Tensor:
            return torch.where(valid, probs.gather(2, ids)[..., 0], 0.0)

        return pick(self.target[:, : self.num_drafts]), pick(self.draft)

    def finish(self, accepted: Tensor, prefix_probs: Tensor | None = None) -> Tensor:
        """[R]: the token after `accepted` drafts: from [P target - draft]+ after a rejection, else the bonus."""
        weights = torch.where((accepted < self.lens)[:, None], self.residual(accepted, prefix_probs), at(self.target, accepted))
        return self.noise.draw(self.noise.anchor_positions + accepted + 1, weights)

    def residual(self, accepted: Tensor, prefix_probs: Tensor | None = None) -> Tensor:
        """[R, V]; the target distribution itself where nothing is left."""
        probs = at(self.target, accepted)
        draft = at(self.draft, accepted.clamp(max=self.num_drafts - 1))
        rest = ((probs if prefix_probs is None else prefix_probs[:, None] * probs) - draft).clamp(min=0)
        return torch.where(rest.sum(1, keepdim=True) > 0, rest, probs)


def at(rows: Tensor, index: Tensor) -> Tensor:
    """rows [R, n, ...], one per request."""
    return rows[torch.arange(len(index), device=index.device), index]


def prefix(passes: Tensor) -> Tensor:
    """[R]: how many of the first entries [R, K] hold without a gap."""
    return passes.long().cumprod(1).sum(1)


def token_rule(batch: Batch) -> tuple[Tensor, Tensor]:
    """(accepted [R], token [R])."""
    target, draft = batch.drafted_probs()
    accepted = prefix(batch.admitted() & (draft > 0) & (batch.noise.uniforms(batch.num_drafts) * draft < target))
    return accepted, batch.finish(accepted)


def block_terms(batch: Batch) -> tuple[Tensor, Tensor]:
    """P_0..P_K [R, K+1] and h_1..h_K [R, K]."""
    target, draft = batch.drafted_probs()
    prefix_probs = [torch.ones_like(target[:, 0])] if batch.num_drafts else []
    accept_probs = []
    for i in range(batch.num_drafts):
        ratio = torch.where(draft[:, i] > 0, prefix_probs[-1] * target[:, i] / draft[:, i].clamp(min=1e-300), 0.0)
        prefix_probs.append(ratio.clamp(max=1.0))
        whole = prefix_probs[-1]
        if i + 1 < batch.num_drafts:
            total = (prefix_probs[-1][:, None] * batch.target[:, i + 1] - batch.draft[:, i + 1]).clamp(min=0).sum(1)
            rest = total + 1.0 - prefix_probs[-1]
            part = torch.where(rest > 0, total / torch.where(rest > 0, rest, 1.0), 1.0)
            whole = torch.where(batch.lens > i + 1, part, prefix_probs[-1])
        accept_probs.append(whole)
    return torch.stack(prefix_probs, 1), torch.stack(accept_probs, 1)


def block_rule(batch: Batch) -> tuple[Tensor, Tensor]:
    prefix_probs, accept_probs = block_terms(batch)
    passes = batch.admitted() & (batch.noise.uniforms(batch.num_drafts) < accept_probs) & (prefix_probs[:, 1:] > 0)
    index = torch.arange(1, batch.num_drafts + 1, device=passes.device)
    accepted = torch.where(passes, index, 0).amax(1)
    return accepted, batch.finish(accepted, at(prefix_probs, accepted))


def follow(batch: Batch, says: Tensor) -> tuple[Tensor, Tensor]:
    """Accept while the draft is what the target says [R, K+1], then emit what it says."""
    accepted = prefix(batch.admitted() & (batch.drafts == says[:, : batch.num_drafts]))
    return accepted, at(says, accepted)


def coupled_rule(batch: Batch) -> tuple[Tensor, Tensor]:
    noise, log_probs = batch.noise, batch.target.log()
    rows = range(batch.num_drafts + 1)
    says = [noise.race(Stream.COUPLED, noise.anchor_positions + i + 1, log_probs[:, i]) for i in rows]
    return follow(batch, torch.stack(says, 1))


def draft_probs(draft_logits: Tensor | None, draft_tokens: Tensor, temperature: Tensor, vocab: int) -> Tensor:
    """[R, K, V], over the target's ids; nothing where no draft was made (-1)."""
    if draft_logits is None:
        ids = torch.arange(vocab, device=draft_tokens.device)
        return (draft_tokens[..., None] == ids).double()
    probs = probs_of(readable(draft_logits), temperature)
    probs = torch.nn.functional.pad(probs, (0, max(0, vocab - probs.shape[-1])))[..., :vocab]
    return torch.where(draft_tokens[..., None] == -1, 0.0, probs)


def accept(
    rule: Callable[[Batch], tuple[Tensor, Tensor]] | None,
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    temperature: Tensor,
    seeds: Tensor,
    draft_lens: Tensor,
    anchor_positions: Tensor,
    noise: Callable[[Tensor, Tensor], Noise] = Noise,
) -> Tensor:
    """Tokens [R, K+1] of rule(batch) for sampled rows and of the greedy rule for rows of temperature 0, then -1."""
    rows = readable(target_logits)
    lens = draft_lens.to(torch.int64)
    # Acceptance stops at a row without a finite logit: it verifies nothing, and its lowest id is emitted.
    dead = ~rows.isfinite().any(-1)  # [R, K+1]
    stop = torch.where(dead.any(1), dead.long().argmax(1), rows.shape[1])
    verified = torch.minimum(lens, stop)
    scale = torch.where(temperature > 0, temperature, 1.0)
    batch = Batch(
        probs_of(rows, scale),
        draft_probs(draft_logits, draft_tokens, scale, rows.shape[2]),
        draft_tokens,
        verified,
        noise(seeds, anchor_positions),
    )
    says = rows.argmax(-1)
    accepted, token = follow(batch, says)
    if rule is not None:
        by_rule = rule(batch)
        accepted, token = (torch.where(temperature > 0, a, b) for a, b in zip(by_rule, (accepted, token), strict=True))
    token = torch.where(accepted == stop, at(says, accepted), token)
    return emitted(draft_tokens, accepted, token)


def emitted(draft_tokens: Tensor, accepted: Tensor, token: Tensor) -> Tensor:
    """Accepted drafts, the token, then -1: [R, K+1]."""
    index = torch.arange(draft_tokens.shape[1] + 1, device=accepted.device)
    out = torch.where(index < accepted[:, None], torch.nn.functional.pad(draft_tokens, (0, 1)), -1)
    return torch.where(index == accepted[:, None], token[:, None], out)


def _named(rule: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    function.rule = rule  # type: ignore[attr-defined]  # a function takes attributes, which its type cannot say
    return function


token = _named("token", functools.partial(accept, token_rule))
block = _named("block", functools.partial(accept, block_rule))
coupled = _named("coupled", functools.partial(accept, coupled_rule))
greedy = _named("greedy", functools.partial(accept, None))
