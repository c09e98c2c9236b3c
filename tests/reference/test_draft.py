"""The reference's draft block against small sums done by hand, its noise addresses, and the distribution of what it samples."""

import math

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels.types import Flag, Stream
from reference import draft as reference, philox
from reference.decisions import Decisions

NEG_INF = -math.inf


def block(base_logits, anchors=(0,), positions=(10,), head=None, **options):
    base_logits = torch.as_tensor(base_logits)
    return reference.draft_block(
        base_logits if base_logits.dtype.is_floating_point else base_logits.float(),
        torch.tensor(anchors),
        head,
        anchor_positions=torch.tensor(positions),
        **options,
    )


def sampling(temperature, seed=(1,)):
    return dk.SamplingTensors(torch.tensor(temperature), torch.tensor(seed))


# A head over three tokens whose transition table is the identity times 4, with one feature per token: after x, x gets 4 more.
STICKY = dk.MarkovHead(torch.eye(3) * 4, torch.eye(3))
# After 0 comes 1, after 1 comes 2, after 2 comes 0.
CYCLE = dk.MarkovHead(torch.eye(3), torch.eye(3)[[2, 0, 1]] * 5)


def test_greedy_follows_the_token_before():
    base = [[[0, 0, 1], [0, 0, 1], [9, 0, 0]]]
    assert block(base).tokens.tolist() == [[2, 2, 0]]
    assert block(base, head=STICKY).tokens.tolist() == [[0, 0, 0]]
    assert block(base, anchors=(1,), head=STICKY).tokens.tolist() == [[1, 1, 0]]
    assert block(base, anchors=(1,), head=CYCLE).tokens.tolist() == [[2, 0, 0]]
    logits = block(base, anchors=(1,), head=CYCLE, keep_logits=True).proposal.logits
    assert logits.tolist() == [[[0, 0, 6], [5, 0, 1], [9, 5, 0]]]


def test_ties_go_to_the_lowest_id_and_zeros_are_equal():
    assert block([[[1, 3, 3]]]).tokens.tolist() == [[1]]
    assert block(torch.tensor([[[-0.0, 0.0, -0.0]]])).tokens.tolist() == [[0]]


def test_sum_is_rounded_once_and_the_token_chosen_from_what_is_stored():
    """256 + 0.75 and 256 + 1 are both 256 in bf16 (its steps there are 2): a tie after rounding, which the lowest id wins."""
    head = dk.MarkovHead(torch.ones(3, 1), torch.tensor([[0.75], [1.0], [0.0]]))
    base = torch.tensor([[[256.0, 256.0, 0.0]]])
    assert block(base, head=head).tokens.tolist() == [[1]]
    rounded = block(base.bfloat16(), head=head, keep_logits=True)
    assert rounded.tokens.tolist() == [[0]] and rounded.proposal.logits.tolist() == [[[256, 256, 0]]]
    assert rounded.proposal.logits.dtype == torch.bfloat16


def test_tokens_are_chosen_from_given_bits():
    stored = torch.tensor([[[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]]])
    have = block([[[9, 0, 0], [9, 0, 0]]], head=CYCLE, stored_logits=stored)
    assert have.tokens.tolist() == [[1, 0]]


def test_scaled_output_weights():
    head = dk.MarkovHead(torch.eye(3), torch.eye(3).to(torch.float8_e4m3fn), w2_scale=torch.tensor([1.0, 10.0, 100.0]))
    logits = [block([[[0, 0, 0]]], anchors=(a,), head=head, keep_logits=True).proposal.logits[0, 0].tolist() for a in range(3)]
    assert logits == [[1, 0, 0], [0, 10, 0], [0, 0, 100]]


@pytest.mark.parametrize("anchor", [-1, 3, 1 << 40])
def test_unknown_anchor_adds_nothing(anchor):
    have = block([[[0, 1, 0], [0, 0, 0]]], anchors=(anchor,), head=CYCLE)
    assert have.flags.tolist() == [Flag.BAD_TOKEN_ID] and have.tokens.tolist() == [[1, 2]]
    assert block([[[0, 1, 0]]], anchors=(anchor,)).flags.tolist() == [0], "without a head the anchor is not read"


def test_flags_and_tokens_of_odd_rows():
    nan, inf = math.nan, math.inf
    rows = torch.tensor(
        [[nan, 1.0, 0.0], [NEG_INF] * 3, [nan] * 3, [0.0, inf, inf], [NEG_INF, inf, NEG_INF], [NEG_INF, NEG_INF, 0.0]]
    )
    have = block(rows[:, None], anchors=(0,) * 6, positions=(1,) * 6)
    assert have.tokens.flatten().tolist() == [1, 0, 0, 1, 1, 2]
    both = int(Flag.NAN | Flag.NONFINITE_ROW)
    assert have.flags.tolist() == [int(Flag.NAN), int(Flag.NONFINITE_ROW), both, 0, int(Flag.NONFINITE_ROW), 0]
    drawn = block(rows[:, None], anchors=(0,) * 6, positions=(1,) * 6, sampling=sampling([1.0] * 6, list(range(6))))
    assert drawn.flags.tolist() == have.flags.tolist() and drawn.tokens.flatten().tolist()[1:] == [0, 0, 1, 1, 2]
    assert (drawn.tokens[0] != 0).all(), "a NaN was drawn"


def test_confidence_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [0.5, -1.0]]])
    plain = dk.ConfidenceHead(torch.tensor([1.0, 3.0]), torch.tensor([-2.0]))
    have = block([[[0, 0, 0], [0, 0, 0]]], hidden=hidden, confidence=plain)
    assert have.confidence_logits.tolist() == [[5.0, -4.5]]
    assert torch.allclose(have.confidence.double(), torch.sigmoid(torch.tensor([[5.0, -4.5]]).double()), atol=1e-7)
    # The Markov part reads the token before: the anchor 1, then 2, which CYCLE drafts.
    markov = dk.ConfidenceHead(torch.tensor([1.0, 3.0, 10.0, 20.0, 40.0]), sts_temperatures=torch.tensor([1.0, 2.0, 4.0]))
    have = block([[[0, 0, 0], [0, 0, 0]]], anchors=(1,), head=CYCLE, hidden=hidden, confidence=markov, first_draft=1)
    assert have.tokens.tolist() == [[2, 0]] and have.confidence_logits.tolist() == [[27.0, 37.5]]
    calibrated = torch.sigmoid(torch.tensor([[27.0 / 2, 37.5 / 4]]).double())
    assert torch.allclose(have.confidence.double(), calibrated, atol=1e-7)


def test_log_sum_exp_of_the_scaled_logits():
    row = torch.tensor([1.0, 2.0, 4.0])
    have = block(row.expand(3, 1, 3), (0, 0, 0), (1, 1, 1), sampling=sampling([2.0, 0.0, 0.5], [1, 2, 3])).proposal
    for lse, scale in zip(have.lse[:, 0].tolist(), (0.5, 1.0, 2.0), strict=True):  # a greedy row: at temperature 1
        assert math.isclose(lse, math.log(sum(math.exp(scale * x) for x in (1, 2, 4))), rel_tol=1e-6)


def test_slots_and_padding():
    base = torch.tensor([[[0.0, 5.0]], [[5.0, 0.0]], [[0.0, 0.0]]])
    slots = torch.tensor([3, 1, -1], dtype=torch.int32)
    have = block(base, (0, 0, 0, 0), (1, 1, 1, 1), sampling=sampling([0.0] * 4, [0] * 4), state_indices=slots)
    assert have.tokens.tolist() == [[-1], [0], [-1], [1]] and have.flags.tolist() == [0, 0, 0]
    assert have.proposal.logits[:, 0].tolist() == [[0, 0], [5, 0], [0, 0], [0, 5]]
    assert have.proposal.lse[0, 0] == have.proposal.lse[2, 0] == 0


@pytest.mark.parametrize("noise, stream", [("draft", Stream.DRAFT), ("coupled", Stream.COUPLED)])
def test_noise_is_addressed(noise, stream):
    """Draft k of anchor position t is decided for t + k; coupled noise knows no anchor."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(1, 3, 70, generator=generator)
    seed, temperature = -(7 << 40), 0.8
    have = block(base, positions=(100,), sampling=sampling([temperature], [seed]), noise=noise, first_draft=2)
    for k in range(3):
        gumbel = philox.gumbel(seed, torch.arange(70), 100 + 2 + k + 1, 100 if noise == "draft" else 0, stream)
        assert int((base[0, k].double() / torch.tensor(temperature).double() + gumbel).argmax()) == have.tokens[0, k]


def test_temperature_sharpens():
    base = torch.tensor([0.0, 1.0]).expand(2000, 1, 2)
    for temperature in (0.5, 1.0, 3.0):
        drawn = block(base, (0,) * 2000, (5,) * 2000, sampling=sampling([temperature] * 2000, list(range(2000)))).tokens
        share, want = float(drawn.double().mean()), 1 / (1 + math.exp(-1 / temperature))
        # 4.5 standard errors, 0.05 here: temperatures 0.5, 1 and 3 differ by 0.15.
        assert abs(share - want) <= 4.5 * math.sqrt(want * (1 - want) / 2000)


def test_sampled_distribution_along_the_block():
    """Chi-square over all 27 blocks of three drafts at level 1e-6: the threshold is 76 for 26 degrees of freedom. With 3000 seeds a
    distribution that is off by 0.11 total variation is detected with probability 0.999: noncentrality 4 N TV^2 = 145, mean 171,
    deviation 25."""
    seeds = 3000
    rows = torch.tensor([[0.3, -0.5, 0.1], [0.0, 0.4, -0.2], [0.7, 0.0, 0.2]])
    head = dk.MarkovHead(torch.eye(3), torch.tensor([[1.0, -0.5, 0.0], [0.2, 0.9, -0.8], [-0.6, 0.1, 0.5]]))
    drawn = block(
        rows.expand(seeds, 3, 3), (1,) * seeds, (9,) * seeds, head=head, sampling=sampling([1.3] * seeds, list(range(seeds)))
    ).tokens  # fmt: skip
    observed = torch.bincount(drawn @ torch.tensor([9, 3, 1]), minlength=27).double()
    expected = torch.zeros(27, dtype=torch.float64)
    for index in range(27):
        tokens, probability, before = (index // 9, index // 3 % 3, index % 3), 1.0, 1
        for k, token in enumerate(tokens):
            probs = torch.softmax((rows[k].double() + head.w2[:, before].double()) / 1.3, 0)
            probability, before = probability * float(probs[token]), token
        expected[index] = probability * seeds
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert float(torch.special.gammaincc(torch.tensor(13.0).double(), torch.tensor(statistic / 2).double())) >= 1e-6


def test_margins_are_recorded_and_decisions_can_be_turned():
    base = torch.tensor([[[0.0, 3.0, 3.0 + 1e-6], [0.0, 0.0, 9.0]]], dtype=torch.float32)
    decisions = Decisions()
    assert block(base, decisions=decisions).tokens.tolist() == [[2, 2]]
    assert decisions.total == 2 and decisions.near() == [(0, 0)]
    assert block(base, decisions=Decisions(frozenset([(0, 0)]))).tokens.tolist() == [[1, 2]]


def test_what_the_reference_does_not_take():
    with pytest.raises(ValueError, match="out: expected None"):
        block([[[0, 1]]], out=object())
