"""The reference's acceptance rules on examples worked by hand, and the margins of their decisions.

Probabilities are multiples of 1/8, so that every comparison below is exact in fp64.
"""

from __future__ import annotations

import math

import pytest
import torch

from reference.accept import RULES, Verdict
from reference.decisions import NEAR, Decisions

INF, NAN = math.inf, math.nan
ANCHOR = 40


def probs_of(*rows):
    return torch.tensor(rows, dtype=torch.float64) / 8


# Drafts [1, 0] have p/q = 3/4 and 1/4.
TARGET = probs_of((4, 3, 1), (1, 4, 3), (1, 1, 6))
DRAFT = probs_of((2, 4, 2), (4, 3, 1))


class Script:
    """Acceptance uniforms and Gumbel noise by position, written down; a draw keeps its weights and gives their largest."""

    def __init__(self, uniforms=None, noise=None):
        self.uniforms, self.noise, self.asked, self.drawn = uniforms or {}, noise or {}, [], None

    def accepts(self, position, denominator, numerator):
        self.asked.append(position)
        return self.uniforms[position] * denominator < numerator

    def draw(self, position, weights):
        assert self.drawn is None, "one draw ends a round"
        self.drawn = (position, (8 * weights).tolist())
        return int(weights.argmax())

    def coupled(self, position, log_weights):
        return int((log_weights + torch.tensor(self.noise[position], dtype=torch.float64)).argmax())


def verify(rule, uniforms=(), drafts=(1, 0), target=TARGET, draft=DRAFT):
    script = Script({ANCHOR + 1 + i: u for i, u in enumerate(uniforms)})
    verdict = RULES[rule](target, draft, list(drafts), script, ANCHOR)
    return verdict, script


# --- the rules by themselves


@pytest.mark.parametrize(
    ("uniforms", "accepted", "weights"),
    [
        ((0.75, 0.0), 0, (2, 0, 0)),  # 0.75 * 4/8 = 3/8 is not below 3/8
        ((0.7499999, 0.25), 1, (0, 1, 2)),
        ((0.7499999, 0.2499999), 2, (1, 1, 6)),
        ((0.0, 0.0), 2, (1, 1, 6)),
        ((0.99, 0.0), 0, (2, 0, 0)),  # the second uniform changes nothing
    ],
)
def test_token_rule(uniforms, accepted, weights):
    verdict, script = verify("token", uniforms)
    assert verdict == Verdict(accepted, weights.index(max(weights)))
    assert script.drawn == (ANCHOR + accepted + 1, list(weights))
    assert script.asked == [ANCHOR + 1 + i for i in range(min(accepted + 1, 2))]


@pytest.mark.parametrize("rule", ["token", "block"])
def test_no_drafts_is_plain_sampling(rule):
    verdict, script = verify(rule, drafts=())
    assert verdict == Verdict(0, 0) and script.drawn == (ANCHOR + 1, [4, 3, 1]) and script.asked == []


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_uniform_of_zero_accepts_nothing_impossible(rule):
    """The target gives the draft probability 0: 0 < 0 fails."""
    verdict, script = verify(rule, (0.0,), [1], probs_of((5, 0, 3), (8, 0, 0)), probs_of((4, 4, 0)))
    assert verdict == Verdict(0, 2) and script.drawn == (ANCHOR + 1, [1, 0, 3])


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    ("draft", "proposed", "bad", "missing", "weights"),
    [
        (-1, None, False, True, (4, 3, 1)),  # nothing was proposed: the target's own distribution
        (-1, (2, 4, 2), False, True, None),  # even where a distribution is given the draft is missing
        (-2, (2, 4, 2), True, False, (2, 0, 0)),
        (3, (2, 4, 2), True, False, (2, 0, 0)),
        (1, (6, 0, 2), True, False, (0, 3, 0)),  # outside the support of its own distribution
        (3, (0, 0, 0), True, False, (4, 3, 1)),  # a one-hot draft outside the vocabulary takes nothing away
        (1, None, False, True, (4, 3, 1)),
    ],
)
def test_drafts_that_cannot_be_accepted(rule, draft, proposed, bad, missing, weights):
    """No acceptance uniform decides them, not even 0."""
    draft_probs = [None if proposed is None else probs_of(proposed)[0]]
    verdict, script = verify(rule, (0.0,), [draft], TARGET, draft_probs)
    assert (verdict.num_accepted, verdict.bad_draft, verdict.missing_draft) == (0, bad, missing)
    assert not verdict.empty_residual
    assert script.drawn == (ANCHOR + 1, list((4, 3, 1) if weights is None else weights))
    assert rule == "block" or script.asked == []


@pytest.mark.parametrize("rule", ["token", "block"])
def test_empty_residual_draws_from_the_target(rule):
    """p = q and a draft of probability 0 in both: rejected, and the residual is zero."""
    verdict, script = verify(rule, (0.0,), [2], probs_of((5, 3, 0), (8, 0, 0)), probs_of((5, 3, 0)))
    assert verdict == Verdict(0, 0, empty_residual=True, bad_draft=True)
    assert script.drawn == (ANCHOR + 1, [5, 3, 0])


# P = 1, 3/4, 3/16; Z_1 = [3/4 (1, 4, 3) - (4, 3, 1)]+ / 8 = 5/32, h_1 = 5/32 / (5/32 + 1/4) = 5/13; h_2 = 3/16.
@pytest.mark.parametrize(
    ("uniforms", "accepted", "weights"),
    [
        ((0.384, 0.1875), 1, (0, 0, 1.25)),  # 3/16 is not below 3/16
        ((0.385, 0.1875), 0, (2, 0, 0)),
        ((0.385, 0.1874), 2, (1, 1, 6)),  # the largest that passes, though the first fails
        ((0.384, 0.1874), 2, (1, 1, 6)),
    ],
)
def test_block_rule(uniforms, accepted, weights):
    verdict, script = verify("block", uniforms)
    assert verdict == Verdict(accepted, weights.index(max(weights)))
    assert script.drawn == (ANCHOR + accepted + 1, list(weights))


def test_block_rule_of_one_draft_is_the_token_rule():
    for u in (0.0, 0.2, 0.7499, 0.75, 0.8):
        one = dict(uniforms=(u,), drafts=(1,), target=TARGET[:2], draft=DRAFT[:1])
        (block, script), (token, other) = verify("block", **one), verify("token", **one)
        assert block == token and script.drawn == other.drawn


def test_block_rule_caps_the_product_at_one():
    """x_1 = 0 has p/q = 2: P_1 = 1, not 2, and h_1 = Z_1/Z_1. P_2 = 1/4 (2/4 without the cap)."""
    verdict, script = verify("block", (0.9999, 0.25), (0, 0))
    assert verdict == Verdict(1, 2) and script.drawn == (ANCHOR + 2, [0, 1, 2])
    verdict, _ = verify("block", (0.9999, 0.2499), (0, 0))
    assert verdict.num_accepted == 2


def test_block_rule_zero_over_zero_passes():
    """P_1 = 1 and p_2 = q_2: Z_1 = 0, h_1 = 0/0 = 1, and no acceptance uniform is read."""
    equal = probs_of((4, 3, 1), (4, 3, 1), (8, 0, 0))
    verdict, script = verify("block", (0.9999, 0.9999), (0, 1), equal, probs_of((2, 4, 2), (4, 3, 1)))
    assert verdict == Verdict(2, 0) and script.asked == [ANCHOR + 2]


def test_block_rule_before_a_missing_draft_ends_there():
    """Nothing proposed for x_2: [P_1 p_2 - 0]+ sums to P_1, so h_1 = P_1 as in a block of one draft."""
    for u, accepted, weights in ((0.7499, 1, (0.75, 3, 2.25)), (0.75, 0, (2, 0, 0))):
        verdict, script = verify("block", (u, 0.0), (1, -1), draft=[DRAFT[0], None])
        assert verdict == Verdict(accepted, weights.index(max(weights)), missing_draft=accepted == 1)
        assert script.drawn == (ANCHOR + accepted + 1, list(weights))


def test_block_rule_keeps_nothing_behind_an_impossible_draft():
    """q_1(x_1) = 0 makes P zero from there on, whatever comes next."""
    verdict, script = verify("block", (0.0, 0.0), (1, 0), draft=probs_of((6, 0, 2), (4, 3, 1)))
    assert verdict == Verdict(0, 1, bad_draft=True) and script.drawn == (ANCHOR + 1, [0, 3, 0])


NOISE = {ANCHOR + 1: (0.0, 1.0, 0.0), ANCHOR + 2: (2.0, 0.0, 0.0), ANCHOR + 3: (0.0, 2.0, 0.0)}


@pytest.mark.parametrize(
    ("drafts", "verdict"),
    [
        # With this noise the target's own tokens are 1 (3e > 4), 0 (e^2 > 4) and 1 (e^2 > 6).
        ((1, 0), Verdict(2, 1)),
        ((1, 1), Verdict(1, 0)),
        ((0, 0), Verdict(0, 1)),
        ((1, -1), Verdict(1, 0, missing_draft=True)),
        ((1, 3), Verdict(1, 0, bad_draft=True)),
        ((-2, 0), Verdict(0, 1, bad_draft=True)),
        ((2, 3), Verdict(0, 1)),  # the draft that stopped acceptance was in order
        ((), Verdict(0, 1)),
    ],
)
def test_coupled_rule(drafts, verdict):
    script = Script(noise=NOISE)
    assert RULES["coupled"](TARGET, None, list(drafts), script, ANCHOR) == verdict
    assert script.drawn is None and script.asked == []


@pytest.mark.parametrize(
    ("drafts", "verdict"),
    [
        ((0, 1), Verdict(2, 2)),
        ((0, 0), Verdict(1, 1)),
        ((1, 1), Verdict(0, 0)),
        ((0, -1), Verdict(1, 1, missing_draft=True)),
        ((3, 1), Verdict(0, 0, bad_draft=True)),
        ((), Verdict(0, 0)),
    ],
)
def test_greedy_rule(drafts, verdict):
    assert RULES["greedy"](TARGET, None, list(drafts), Script(), ANCHOR) == verdict


def test_greedy_rule_takes_the_lowest_of_equals():
    assert RULES["greedy"](probs_of((1, 3, 3), (2, 2, 2)), None, [1], Script(), 0) == Verdict(1, 0)


# --- decisions and their margins


def test_pick():
    decisions = Decisions()
    keys = torch.tensor([0.5, -INF, 3.0, 2.5], dtype=torch.float64)
    assert decisions.pick(0, "a", keys) == 2
    assert decisions.pick(1, "b", 4 * keys) == 2
    assert decisions.pick(0, "c", torch.tensor([1.0, 7.0, 7.0])) == 1  # equal keys: the lowest id, without a margin
    assert decisions.pick(0, "d", torch.tensor([-0.0, 0.0])) == decisions.pick(0, "d", torch.tensor([0.0, -0.0])) == 0
    assert decisions.pick(0, "e", torch.tensor([0.0, INF, INF])) == 1
    assert decisions.pick(0, "f", torch.tensor([0.1, 0.2])) == 1  # scale at least 1
    assert decisions.pick(0, "alone", torch.tensor([5.0])) == 0  # no choice, no decision
    assert decisions.margins == {
        (0, 0): ("a", 0.5, 3.0),
        (1, 0): ("b", 2.0, 12.0),
        (0, 1): ("c", INF, 7.0),
        (0, 2): ("d", INF, 1.0),
        (0, 3): ("d", INF, 1.0),
        (0, 4): ("e", INF, 1.0),
        (0, 5): ("f", pytest.approx(0.1), 1.0),
    }
    assert decisions.total == 7 and decisions.near() == []


def test_below_is_strict_and_its_margin_a_log_ratio():
    decisions = Decisions()
    assert not decisions.below(0, "accept", 0.5, 0.5, 0.25)
    assert decisions.below(0, "accept", 0.5, 0.5, 0.5)
    assert not decisions.below(0, "accept", 0.5, 1.0, 0.25)
    assert not decisions.below(0, "accept", 0.0, 1.0, 0.0)
    assert decisions.below(0, "accept", 0.0, 1.0, 1e-30)
    margins = [margin for _, margin, _ in decisions.margins.values()]
    assert margins == [0.0, pytest.approx(math.log(2)), pytest.approx(math.log(2)), INF, INF]
    assert decisions.near() == [(0, 0)]


def test_near_and_flips():
    """Near within 2^-17 * max(1, |key|); a flip takes the runner-up, or the other side of the uniform."""
    assert NEAR == 2.0**-17

    def decide(decisions):
        keys = [
            torch.tensor([10.0, 10.0 + 9 * NEAR, -50.0], dtype=torch.float64),  # near: the scale is 10
            torch.tensor([0.5, 0.5 + 2 * NEAR], dtype=torch.float64),
            torch.tensor([0.5 + NEAR, 0.5], dtype=torch.float64),
        ]
        picks = [decisions.pick(7, "key", key) for key in keys]
        return picks, decisions.below(7, "accept", 0.5 * (1 + NEAR / 2), 1.0, 0.5), decisions.pick(8, "key", keys[0])

    decisions = Decisions()
    assert decide(decisions) == ([1, 1, 0], False, 1)
    assert decisions.near() == [(7, 0), (7, 2), (7, 3), (8, 0)]
    assert decide(Decisions(frozenset([(7, 0), (7, 3)]))) == ([0, 1, 0], True, 1)
    assert decide(Decisions(frozenset([(7, 1), (8, 0)]))) == ([1, 0, 0], False, 0)
