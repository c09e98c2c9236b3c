"""reference/calibration.py against golden numbers, hand-made cases and confidences distorted on purpose."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from reference.calibration import STS_GRID, auc, brier, expected_calibration_error, fit_sts

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "units.npz"


@pytest.mark.skipif(not GOLDEN.exists(), reason="golden data is not beside the checkout")
def test_golden_numbers():
    golden = np.load(GOLDEN)
    survival = torch.from_numpy(golden["calib.confidence"]).cumprod(1)
    survived = torch.from_numpy(golden["calib.survived"])
    for k in range(survival.shape[1]):
        pair = survival[:, k], survived[:, k]
        assert expected_calibration_error(*pair) == pytest.approx(golden["calib.ece"][k], abs=1e-12)
        assert auc(*pair) == pytest.approx(golden["calib.auc"][k], abs=1e-12)
        assert brier(*pair) == pytest.approx(golden["calib.brier"][k], abs=1e-12)


def test_calibration_error_by_hand():
    # Bins [0, .5), [.5, 1]: |0.3 - 0.5| for two samples, |0.8 - 1| for one, |1 - 0| for one in the same bin: |1.8 - 1|
    # / 2.
    probs, outcomes = torch.tensor([0.2, 0.4, 0.8, 1.0]), torch.tensor([0, 1, 1, 0])
    assert expected_calibration_error(probs, outcomes, bins=2) == pytest.approx((2 * 0.2 + 2 * 0.4) / 4, abs=1e-7)
    # A bin is closed below: 0.5 is in the upper one.
    assert expected_calibration_error(torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), bins=2) == pytest.approx(0.625)
    # Errors of opposite sign cancel inside a bin only.
    assert expected_calibration_error(torch.tensor([0.51, 0.52]), torch.tensor([0, 1]), bins=1) == pytest.approx(0.015)
    assert expected_calibration_error(torch.tensor([0.49, 0.51]), torch.tensor([0, 1]), bins=2) == pytest.approx(0.49)
    assert expected_calibration_error(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([False, True, True])) == 0.0


def test_calibration_error_equals_a_loop():
    random = np.random.default_rng(0)
    probs = random.beta(0.6, 0.4, 1013)
    outcomes = (random.uniform(size=1013) < probs**2).astype(np.int64)
    for bins in (1, 7, 20):
        total = 0.0
        for b in range(bins):
            inside = [i for i in range(1013) if min(int(probs[i] * bins), bins - 1) == b]
            if inside:
                total += len(inside) / 1013 * abs(np.mean(probs[inside]) - np.mean(outcomes[inside]))
        ours = expected_calibration_error(torch.from_numpy(probs), torch.from_numpy(outcomes), bins)
        assert ours == pytest.approx(total, abs=1e-12)


def test_auc_counts_pairs():
    random = np.random.default_rng(1)
    probs = random.integers(0, 50, 311) / 50 + 0.001  # at most one distinct value per bin: ties are real ties
    outcomes = (random.uniform(size=311) < probs).astype(np.int64)
    pairs = [(a > b) + (a == b) / 2 for a in probs[outcomes == 1] for b in probs[outcomes == 0]]
    assert auc(torch.from_numpy(probs.clip(max=1)), torch.from_numpy(outcomes)) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(torch.tensor([0.1, 0.9]), torch.tensor([0, 1])) == 1.0
    assert auc(torch.tensor([0.1, 0.9]), torch.tensor([1, 0])) == 0.0
    # One bin: everything tied.
    assert auc(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]), bins=1) == 0.5
    assert math.isnan(auc(torch.tensor([0.1, 0.9]), torch.tensor([1, 1])))


def test_brier_by_hand():
    assert brier(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0, 1, 0])) == pytest.approx(1.25 / 3)


# Distortion of the logits per position: over-confident, nearly honest, timid, ...
TRUE_TEMPERATURES = (2.5, 1.0, 0.5, 3.0, 1.6)


def rounds(count, seed):
    """Rounds whose draft k survives, given its prefix, with probability sigmoid(score_k); logits are score_k * T_k."""
    generator = torch.Generator().manual_seed(seed)
    scores = 1.5 + 1.2 * torch.randn(count, len(TRUE_TEMPERATURES), generator=generator, dtype=torch.float64)
    accepted = torch.rand(scores.shape, generator=generator, dtype=torch.float64) < scores.sigmoid()
    return scores * torch.tensor(TRUE_TEMPERATURES, dtype=torch.float64), accepted.long().cumprod(1)


def errors(logits, survived, temperatures):
    survival = (logits / temperatures).sigmoid().cumprod(1)
    return [expected_calibration_error(survival[:, k], survived[:, k]) for k in range(logits.shape[1])]


def test_distorted_confidences_are_recalibrated_on_held_out_rounds():
    logits, survived = rounds(20000, seed=0)
    temperatures = fit_sts(logits, survived)
    assert temperatures.dtype == torch.float32 and temperatures.shape == (5,)
    assert all(0.85 < fitted / true < 1.18 for fitted, true in zip(temperatures.tolist(), TRUE_TEMPERATURES, strict=True))

    held_out = rounds(20000, seed=1)
    raw, fitted = errors(*held_out, torch.ones(5)), errors(*held_out, temperatures)
    honest = errors(*held_out, torch.tensor(TRUE_TEMPERATURES))
    assert raw[0] > 0.1 and sum(raw) > 0.2  # the paper reports 0.03 to 0.08 before
    # Within sampling noise of the temperatures that made the data.
    assert max(fitted) < 0.012 and max(honest) < 0.012
    assert sum(fitted) < 0.25 * sum(raw)


def test_positions_are_fitted_from_left_to_right_on_the_product():
    """Temperature k is the grid's best for the cumulative product, given the earlier temperatures."""
    logits, survived = rounds(500, seed=2)
    temperatures = fit_sts(logits, survived).double()
    assert all(any(abs(t - g) < 1e-6 * g for g in STS_GRID) for t in temperatures.tolist())
    for k in range(5):
        earlier = torch.ones(500, dtype=torch.float64)
        for i in range(k):
            earlier = earlier * torch.sigmoid(logits[:, i] / min(STS_GRID, key=lambda g, i=i: abs(g - temperatures[i].item())))

        def error(temperature, earlier=earlier, k=k):
            return expected_calibration_error(earlier * torch.sigmoid(logits[:, k] / temperature), survived[:, k])

        chosen = min(STS_GRID, key=lambda g, k=k: abs(g - temperatures[k].item()))
        assert error(chosen) <= min(error(g) for g in STS_GRID) + 1e-12
    # Later positions do not change earlier ones.
    assert torch.equal(fit_sts(logits[:, :3], survived[:, :3]), temperatures[:3].float())


def test_temperature_stays_one_without_evidence():
    # Logit 0 is one half at any temperature.
    assert fit_sts(torch.zeros(10, 2), torch.tensor([[1, 1]] * 5 + [[0, 0]] * 5)).tolist() == [1.0, 1.0]
    assert STS_GRID[0] == 1.0 and min(STS_GRID) == 1 / 16 and max(STS_GRID) == 16.0


def test_equal_errors_leave_the_temperature_alone():
    # A mirrored pair of logits has mean probability 1/2 at any temperature; rounding alone tells the grid's errors apart.
    half = torch.randn(50, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits, survived = torch.cat([half, -half]), torch.arange(100)[:, None] % 3 == 0
    errors = {expected_calibration_error((logits / t).sigmoid(), survived, bins=1) for t in STS_GRID}
    assert len(errors) > 1 and max(errors) - min(errors) < 1e-15
    assert fit_sts(logits, survived, bins=1).tolist() == [1.0]


def cut(count, drafts, seed):
    """Random numbers of verified drafts, and which drafts that is."""
    lens = torch.randint(0, drafts + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return lens, torch.arange(drafts) < lens[:, None]


def test_a_position_is_fitted_on_the_rounds_that_verified_it():
    logits, survived = rounds(500, seed=4)
    lens, observed = cut(500, 5, seed=5)
    temperatures = fit_sts(logits, survived * observed, observed=observed)
    for k in range(5):
        kept = lens > k
        chosen = [min(STS_GRID, key=lambda g, i=i: abs(g - temperatures[i].item())) for i in range(k + 1)]
        earlier = (logits[kept, :k] / torch.tensor(chosen[:k], dtype=torch.float64)).sigmoid().prod(1)
        errors = {g: expected_calibration_error(earlier * torch.sigmoid(logits[kept, k] / g), survived[kept, k]) for g in STS_GRID}
        assert errors[chosen[k]] <= min(errors.values()) + 1e-12
    assert not torch.equal(temperatures, fit_sts(logits, survived))
    # What was not verified is not looked at, and a position never verified keeps 1.
    garbage = logits.masked_fill(~observed, float("nan")), survived.masked_fill(~observed, 7)
    assert torch.equal(fit_sts(*garbage, observed=observed), temperatures)
    assert torch.equal(fit_sts(logits, survived, observed=torch.ones_like(observed)), fit_sts(logits, survived))
    short = fit_sts(logits, survived, observed=observed & (torch.arange(5) < 2))
    assert short.tolist() == [*temperatures[:2].tolist(), 1.0, 1.0, 1.0]


def test_short_rounds_do_not_bias_the_fit():
    """Unverified drafts behind a rejection are no evidence: the rounds cut at the same place and accepted are missing."""
    logits, survived = rounds(20000, seed=6)
    lens, observed = cut(20000, 5, seed=7)
    known = survived * observed
    held_out = rounds(20000, seed=8)
    fair = errors(*held_out, fit_sts(logits, known, observed=observed))
    wrong = errors(*held_out, fit_sts(logits, known, observed=observed | (known.sum(1) < lens)[:, None]))
    # 3300 rounds reach the last position; true temperatures have 0.012 here.
    assert max(fair) < 0.03 and max(wrong) > 0.1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: expected_calibration_error(torch.tensor([0.5]), torch.tensor([1, 0])), "outcomes"),
        (lambda: expected_calibration_error(torch.tensor([]), torch.tensor([])), "probs"),
        (lambda: expected_calibration_error(torch.tensor([1.5]), torch.tensor([1])), "probs"),
        (lambda: brier(torch.tensor([float("nan")]), torch.tensor([1])), "probs"),
        (lambda: auc(torch.tensor([0.5]), torch.tensor([2])), "outcomes"),
        (lambda: auc(torch.tensor([0.5]), torch.tensor([1]), bins=0), "bins"),
        (lambda: fit_sts(torch.zeros(3, 2), torch.zeros(3, 3)), "survived"),
        (lambda: fit_sts(torch.zeros(0, 2), torch.zeros(0, 2)), "logits"),
        (lambda: fit_sts(torch.zeros(2, 0), torch.zeros(2, 0)), "logits"),
        (lambda: fit_sts(torch.full((1, 2), float("nan")), torch.zeros(1, 2)), "logits"),
        (lambda: fit_sts(torch.zeros(1, 2), torch.tensor([[0, 1]])), "survived"),
        (lambda: fit_sts(torch.zeros(1, 2), torch.tensor([[2, 1]])), "survived"),
        (lambda: fit_sts(torch.zeros(1, 2), torch.zeros(1, 2), observed=torch.ones(1, 2)), "observed"),
        (
            lambda: fit_sts(torch.zeros(1, 2), torch.zeros(1, 2), observed=torch.ones(2, 1, dtype=torch.bool)),
            "observed",
        ),
        (lambda: fit_sts(torch.zeros(1, 2), torch.zeros(1, 2), observed=torch.tensor([[False, True]])), "observed"),
    ],
)
def test_refused_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
