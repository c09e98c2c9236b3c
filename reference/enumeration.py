"""The exact distribution of what the rules emit, for vocabularies of a few tokens, and their simulation under many seeds at once.

    P(tokens) = sum, over the paths of choices that emit them, of the product of the choices' probabilities

Every path of choices is replayed through the very rule functions of `accept.py`: `EnumeratingSource` answers acceptance tests and
draws from a prescribed path and knows the exact probability of each answer; `CrowdSource` answers them for a set of seeds from
their Philox words and keeps the seeds that got that answer.

Races. A draw with weights w is the winner of a race of exponential clocks, arg-min E_i / w_i. Several races may run on the same
clocks (the coupled rule does so on purpose, faulty noise by accident), so the joint distribution of their winners is needed. Race
m, with winner a_m, says E_i >= (w_i / w_{a_m}) E_{a_m} for every i. With A the set of distinct winners and r_ia = the largest w_i /
w_a over the races that a won, the event is E_i >= max_{a in A} r_ia E_a for all i. The losers (i outside A) are integrated out one
by one, each leaving exp(-max_a r_ia E_a), hence

    P = integral over {E_b >= r_ba E_a for a, b in A} of exp(-sum_{a in A} E_a - sum_{i not in A} max_{a in A} r_ia E_a) dE_A

The domain is a polyhedral cone in |A| dimensions, and the exponent is linear on each of the cones into which the maxima split it.
A cone spanned by rays v_1..v_n with exponent -S(E), S linear, contributes |det(v_1..v_n)| / prod_j S(v_j). One race gives
P = w_a / sum w, two races with distributions p and q on one winner P = 1 / sum_i max(p_i / p_a, q_i / q_a), Daliri et al., arXiv
2408.07978.

Symbols: E_i independent Exp(1) clocks, one per token; K drafts of a round; V vocabulary. A context is the tuple of the tokens so
far, the anchor last; the anchor's position is its index. Everything is fp64. Source: this project; the rules as in accept.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.types import Stream

from . import philox
from .accept import Verdict
from .decisions import Decisions

Context = tuple[int, ...]
Address = tuple[int, int, int]  # stream | tree node << 8, decided position, anchor position
NEGLIGIBLE = 1e-18  # probabilities that are zero but for the rounding of a clipped cone


# ---- the joint distribution of races on the same clocks


def _clip(rays: list[tuple], normal: Sequence[float]) -> list[tuple]:
    """The part of a cone (rays in cyclic order, at most 3 dimensions) where normal . x >= 0."""
    values = [math.fsum(n * x for n, x in zip(normal, ray, strict=True)) for ray in rays]
    clipped = []
    for i, ray in enumerate(rays):
        if values[i] >= 0:
            clipped.append(ray)
        if i + 1 == len(rays) and len(rays) < 3:
            break  # two rays bound a wedge: there is no edge back to the first
        j = (i + 1) % len(rays)
        if values[i] * values[j] < 0:
            clipped.append(tuple(abs(values[j]) * x + abs(values[i]) * y for x, y in zip(ray, rays[j], strict=True)))
    return clipped


def _volume(rays: Sequence[tuple]) -> float:
    return abs(float(torch.linalg.det(torch.tensor(rays, dtype=torch.float64))))


def _cone_integral(rays: list[tuple], slope: Sequence[float]) -> float:
    """Integral of exp(-slope . x) over the cone."""
    size = len(slope)
    if len(rays) < size:
        return 0.0
    total = 0.0
    for i in range(1, len(rays) - size + 2):
        simplex = (rays[0], *rays[i : i + size - 1])
        heights = [math.fsum(s * x for s, x in zip(slope, ray, strict=True)) for ray in simplex]
        if all(height > 0 for height in heights):
            total += _volume(simplex) / math.prod(heights)
    return total


@functools.cache
def joint_probability(races: tuple[tuple[tuple[float, ...], int], ...]) -> float:
    """Probability that every race (weights, winner) on the same clocks has its winner. Up to three distinct winners."""
    winners = sorted({winner for _, winner in races})
    size = len(winners)
    if size > 3:
        raise NotImplementedError(f"joint_probability: up to 3 distinct winners on the same clocks, got {size}")
    if any(weights[winner] <= 0 for weights, winner in races):
        return 0.0
    width = max(len(weights) for weights, _ in races)

    def ratio(i: int, a: int) -> float:
        return max(weights[i] / weights[a] if i < len(weights) else 0.0 for weights, winner in races if winner == a)

    def unit(n: int, scale: float = 1.0) -> list[float]:
        return [scale if n == m else 0.0 for m in range(size)]

    cone = [tuple(unit(n)) for n in range(size)]
    for n, a in enumerate(winners):
        for m, b in enumerate(winners):
            if a != b:
                cone = _clip(cone, [x - y for x, y in zip(unit(m), unit(n, ratio(b, a)), strict=True)])
    pieces = [(cone, [1.0] * size)]
    for i in set(range(width)) - set(winners):
        ratios = [ratio(i, a) for a in winners]
        split = []
        for rays, slope in pieces:
            for n in range(size):
                part = rays
                for m in range(size):
                    if m != n and ratios[n] == ratios[m] == 0.0:
                        part = part if n < m else []  # the same piece twice: one of them counts
                    elif m != n:
                        part = _clip(part, [x - y for x, y in zip(unit(n, ratios[n]), unit(m, ratios[m]), strict=True)])
                split.append((part, [x + y for x, y in zip(slope, unit(n, ratios[n]), strict=True)]))
        pieces = split
    return math.fsum(_cone_integral(rays, slope) for rays, slope in pieces)


# ---- sources that follow one path of choices


class _Path:
    """Follows prescribed choices, then first choices; `untaken` lists the paths that branch off.

    weight: what the path has come to, its probability so far or the seeds that follow it. memo: options by path, shared by all
    paths.
    """

    def __init__(self, anchor_position: int, weight, path: tuple[int, ...] = (), memo: dict | None = None):
        self.anchor_position = anchor_position
        self.weight = weight
        self.untaken: list[tuple[int, ...]] = []
        self._path, self._taken = path, ()
        self._memo = {} if memo is None else memo

    def address(self, stream: Stream, position: int, node: int = 0) -> Address:
        """Where the noise of a decision comes from: equal addresses, equal noise."""
        return int(stream) | node << 8, position, 0 if stream == Stream.COUPLED else self.anchor_position

    def _choose(self, options: Callable[[], list]):
        """Take one of the (outcome, weight) options, each a possible one."""
        found = self._memo.get(self._taken)
        if found is None:
            found = self._memo[self._taken] = options()
        depth = len(self._taken)
        choice = self._path[depth] if depth < len(self._path) else 0
        if depth >= len(self._path):
            self.untaken += [(*self._taken, other) for other in range(1, len(found))]
        self._taken = (*self._taken, choice)
        outcome, self.weight = found[choice]
        return outcome

    def draw(self, position: int, weights: Tensor, node: int = 0) -> int:
        return self._race(self.address(Stream.CORRECT, position, node), weights.double().log())

    def coupled(self, position: int, log_weights: Tensor) -> int:
        return self._race(self.address(Stream.COUPLED, position), log_weights)

    def draft(self, position: int, log_weights: Tensor, node: int = 0) -> int:
        return self._race(self.address(Stream.DRAFT, position, node), log_weights)

    def _race(self, address: Address, log_weights: Tensor) -> int:
        raise NotImplementedError


def explore(function: Callable, source: Callable) -> Iterator[tuple]:
    """Run function(source(path, memo)) once per path of choices; yields (weight of the path, result)."""
    pending, memo = [()], {}
    while pending:
        at = source(pending.pop(), memo)
        result = function(at)
        pending += at.untaken
        yield at.weight, result


class EnumeratingSource(_Path):
    """`sources.Source` with exact probabilities: `weight` is the probability of the path.

    known: what earlier rounds showed of the noise, by address: an interval that holds the uniform, or the races so far on the
    clocks. levels: None for uniforms in (0, 1); otherwise u takes the values 0, 1/levels .. (levels-1)/levels with equal
    probability and is compared by the code that compares Philox uniforms, so that u = 0 is among them.
    """

    def __init__(self, anchor_position: int, known: dict | None = None, path=(), memo=None, levels: int | None = None):
        super().__init__(anchor_position, 1.0, path, memo)
        self.known = dict(known or {})
        self.levels = levels

    def accepts(self, position: int, denominator: float, numerator: float, node: int = 0) -> bool:
        address = self.address(Stream.ACCEPT, position, node)
        if self.levels is not None:
            return self._level(address, float(denominator), float(numerator))
        low, high = self.known.get(address, (0.0, 1.0))
        if denominator > 0:
            threshold = min(max(numerator / denominator, low), high)
        else:
            threshold = high if numerator > 0 else low
        sides = ((True, low, threshold), (False, threshold, high))
        options = [((verdict, a, b), self.weight * ((b - a) / (high - low))) for verdict, a, b in sides if b > a]
        verdict, *self.known[address] = self._choose(lambda: options)
        return verdict

    def _level(self, address: Address, denominator: float, numerator: float) -> bool:
        if address not in self.known:
            values = [n / self.levels for n in range(self.levels)]
            self.known[address] = self._choose(lambda: [(u, self.weight / self.levels) for u in values])
        return self.below(self.known[address], denominator, numerator)

    def below(self, uniform: float, denominator: float, numerator: float) -> bool:
        return Decisions().below(0, "accept", uniform, denominator, numerator)

    def _race(self, address: Address, log_weights: Tensor) -> int:
        weights = tuple((log_weights.double() - log_weights.max()).exp().tolist())
        before = self.known.get(address, ())

        def options():
            seen = joint_probability(before) if before else 1.0
            found = [(a, joint_probability((*before, (weights, a))) / seen) for a in range(len(weights)) if weights[a] > 0]
            return [(a, self.weight * probability) for a, probability in found if probability > NEGLIGIBLE]

        winner = self._choose(options)
        if (weights, winner) not in before:
            self.known[address] = (*before, (weights, winner))
        return winner


class CrowdSource(_Path):
    """What `sources.PhiloxSource` answers, for many seeds: `weight` holds the indices of those that follow the path.

    seeds: int64 [N]. noise: cache of what was made for this anchor position. The vocabulary is one block (V <= 1024), so that the
    race between blocks has one competitor and needs no noise.
    """

    def __init__(self, anchor_position: int, seeds: Tensor, members: Tensor, noise: dict, path=(), memo=None):
        super().__init__(anchor_position, members, path, memo)
        self.seeds, self.noise = seeds, noise

    def _words(self, address: Address, lanes: int) -> Tensor:
        """Words [N, lanes] of every seed at an address."""
        stream, position, anchor = address
        low, high = self.seeds & 0xFFFFFFFF, (self.seeds >> 32) & 0xFFFFFFFF
        blocks = [philox.philox(low, high, block, position, anchor, stream) for block in range(-(-lanes // 4))]
        return torch.stack([word for block in blocks for word in block][:lanes], 1)

    def accepts(self, position: int, denominator: float, numerator: float, node: int = 0) -> bool:
        address = self.address(Stream.ACCEPT, position, node)
        if address not in self.noise:
            self.noise[address] = philox.uniform(self._words(address, 1)[:, 0])

        def options():
            passes = self.noise[address][self.weight] * denominator < numerator
            return [(verdict, who) for verdict in (True, False) if len(who := self.weight[passes == verdict])]

        return self._choose(options)

    def _race(self, address: Address, log_weights: Tensor) -> int:
        lanes = log_weights.numel()
        if (address, lanes) not in self.noise:
            self.noise[address, lanes] = -philox.exponential(self._words(address, lanes)).log()

        def options():
            winners = (self.noise[address, lanes][self.weight] + log_weights).argmax(1)
            return [(token, who) for token in range(lanes) if len(who := self.weight[winners == token])]

        return self._choose(options)


# ---- a decoder of toy models


class Block(NamedTuple):
    """Drafts of a round and what verifies them: K draft distributions (None: none), K + 1 target distributions, K confidences."""

    drafts: Context
    draft_probs: list
    target_probs: list
    confidences: tuple


def _point(token: int, vocab: int) -> Tensor:
    probs = torch.zeros(vocab, dtype=torch.float64)
    probs[token] = 1.0
    return probs


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Toy target and drafter and how a round uses them.

    target, draft: context -> fp64 [V], the distribution of the next token. The drafter's may be wider than the target's, or None:
    no draft there (-1). rule: one of `accept.RULES`. one_hot: the draft is the drafter's most probable token, with probability 1.
    confidence: context up to the draft before -> probability that the next draft survives. length: (context, drafts, confidences of
    this block, confidences of the round before or None) -> how many of the drafts are verified (None: all). reported: the draft
    distribution given to the rule, where it is not the one that the drafts come from (which is an error).
    """

    target: Callable[[Context], Tensor]
    draft: Callable[[Context], Tensor | None]
    rule: Callable[..., Verdict]
    num_drafts: int
    length: Callable | None = None
    confidence: Callable[[Context], float] | None = None
    one_hot: bool = False
    coupled: bool = False
    greedy: bool = False
    reported: Callable[[Context], Tensor | None] | None = None

    def propose(self, source, context: Context) -> Block:
        """Draft a block. Target rows are there for all of it, as in a static buffer, whether they get verified or not."""
        drafts, draft_probs, target_probs, confidences = [], [], [self.target(context)], []
        so_far = context
        for _ in range(self.num_drafts):
            confidences.append(self.confidence(so_far) if self.confidence is not None else 1.0)
            drawn = self.draft(so_far)
            reported = drawn if self.reported is None else self.reported(so_far)
            if drawn is None:
                token = -1
            elif self.one_hot:
                token = int(drawn.argmax())
                reported = _point(token, len(drawn))
            else:
                token = (source.coupled if self.coupled else source.draft)(len(so_far), drawn.log())
            drafts.append(token)
            draft_probs.append(None if reported is None else reported[: len(target_probs[0])])
            so_far = (*so_far, max(token, 0))
            target_probs.append(self.target(so_far))
        return Block(tuple(drafts), draft_probs, target_probs, tuple(confidences))

    def verify(self, source, context: Context, block: Block, length: int) -> Context:
        """The tokens that a round emits when `length` drafts are admitted."""
        drafts = list(block.drafts[:length])
        verdict = self.rule(block.target_probs, block.draft_probs, drafts, source, len(context) - 1)
        return (*drafts[: verdict.num_accepted], verdict.token)

    def play(self, source, context: Context, stale: tuple | None = None) -> tuple[Context, tuple]:
        """One round: (emitted tokens, confidences of its block)."""
        block = self.propose(source, context)
        whole = self.length is None
        length = self.num_drafts if whole else self.length(context, block.drafts, block.confidences, stale)
        return self.verify(source, context, block, length), block.confidences

    def distribution(self, context: Context) -> Tensor:
        """The distribution that the next token has to have."""
        probs = self.target(context)
        if not self.greedy:
            return probs
        return _point(int(torch.argmax((probs == probs.max()).int())), len(probs))


Distribution = dict[Context, float]  # probability by emitted tokens


def target_distribution(decoder: Decoder, prompt: Context, tokens: int, start: Distribution | None = None) -> Distribution:
    """Distribution of `tokens` tokens after the prompt when each is drawn from the target.

    start: probabilities of what is already emitted. Completing an emitted prefix by the target's own distribution gives what later
    rounds without drafts would emit: how far a round got depends on noise of the positions that it decided, never on noise of those
    that it left open.
    """
    open_ends: dict[int, Distribution] = {}
    done: Distribution = {}
    for emitted, prob in ({(): 1.0} if start is None else start).items():
        where = done if len(emitted) >= tokens else open_ends.setdefault(len(emitted), {})
        where[emitted[:tokens]] = where.get(emitted[:tokens], 0.0) + prob
    for size in range(tokens):
        for emitted, prob in open_ends.get(size, {}).items():
            where = done if size + 1 == tokens else open_ends.setdefault(size + 1, {})
            for token, step in enumerate(decoder.distribution(prompt + emitted).tolist()):
                if step > 0:
                    where[(*emitted, token)] = where.get((*emitted, token), 0.0) + prob * step
    return done


class Place(NamedTuple):
    """Where decoding can stand after some rounds."""

    emitted: Context
    confidences: tuple | None  # of the last block, where lengths depend on them
    known: tuple  # (address, what is known) of noise that later rounds can still use: clocks of the coupled rule


def emitted_distribution(decoder: Decoder, prompt: Context, rounds: int = 1, source: Callable = EnumeratingSource) -> Distribution:
    """Exact distribution of what `rounds` rounds emit after the prompt, before any completion.

    source(anchor_position, known, path, memo). Rounds are chained over the places where decoding can stand.
    """
    places = {Place((), None, ()): 1.0}
    for _ in range(rounds):
        after: dict[Place, float] = {}
        for place, prob in places.items():
            context = prompt + place.emitted
            make = functools.partial(source, len(context) - 1, dict(place.known))

            def play(at, context=context, place=place):
                new, confidences = decoder.play(at, context, place.confidences)
                following = source(len(context) + len(new) - 1)
                known = [
                    (where, tuple(what) if isinstance(what, list) else what)
                    for where, what in at.known.items()
                    if where[1] > following.anchor_position and following.address(Stream(where[0] & 255), where[1]) == where
                ]
                return Place(place.emitted + new, confidences if decoder.length is not None else None, tuple(sorted(known)))

            for weight, reached in explore(play, make):
                after[reached] = after.get(reached, 0.0) + prob * weight
        places = after
    found: Distribution = {}
    for place, prob in places.items():
        found[place.emitted] = found.get(place.emitted, 0.0) + prob
    return found


def round_distribution(
    decoder: Decoder, prompt: Context, tokens: int, rounds: int = 1, source: Callable = EnumeratingSource
) -> Distribution:
    """Exact distribution of the first `tokens` tokens: `rounds` rounds, then the target's own distribution."""
    return target_distribution(decoder, prompt, tokens, emitted_distribution(decoder, prompt, rounds, source))


def total_variation(one: Distribution, other: Distribution) -> float:
    return 0.5 * math.fsum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys())


def simulate(decoder: Decoder, anchor: int, seeds: Tensor, tokens: int, source: Callable = CrowdSource) -> Tensor:
    """The first `tokens` tokens that each seed's request decodes after `anchor`, int64 [N, tokens], by as many rounds as it takes.

    The distributions must depend on the last token alone, so that one run of the rule serves all seeds at the same place.
    """
    width = tokens + decoder.num_drafts + 1
    history = torch.full((len(seeds), width), -1, dtype=torch.int64)
    places: list[dict] = [{} for _ in range(width)]
    places[0][anchor, None] = [torch.arange(len(seeds))]
    for position in range(tokens):
        noise: dict = {}
        for (token, stale), groups in places[position].items():
            context = (0,) * position + (token,)
            make = functools.partial(source, position, seeds, torch.cat(groups), noise)
            for members, (new, confidences) in explore(lambda at, c=context, s=stale: decoder.play(at, c, s), make):
                history[members, position : position + len(new)] = torch.tensor(new)
                place = (new[-1], confidences if decoder.length is not None else None)
                places[position + len(new)].setdefault(place, []).append(members)
    return history[:, :tokens]
