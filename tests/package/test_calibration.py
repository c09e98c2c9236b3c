"""dspark_kernels/calibration.py against the reference, golden numbers and distorted confidences; its diagram and refusals.

The golden arrays lie in `../shared/golden/units.npz`, beside the checkout, and a copy in `data/golden_calibration.npz`.
"""

from __future__ import annotations

import itertools
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_kernels import calibration
from dspark_kernels.calibration import (
    STS_GRID,
    OnlineCalibration,
    auc,
    brier,
    expected_calibration_error,
    fit_sts,
    plot_reliability,
    reliability,
    survival,
)
from reference import calibration as reference

HERE = Path(__file__).resolve().parents[1]
GOLDEN = {
    "copied": HERE / "data" / "golden_calibration.npz",
    "shared": HERE.parents[1] / "shared" / "golden" / "units.npz",
}
MEASURES = ("expected_calibration_error", "auc", "brier")
# Distortion of the logits per position: over-confident, nearly honest, timid, ...
TRUE_TEMPERATURES = (2.5, 1.0, 0.5, 3.0, 1.6)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def make_rounds(count, seed, temperatures=TRUE_TEMPERATURES):
    """fp32 logits and survival [count, K]: draft k survives, given its prefix, with probability sigmoid(logit_k / T_k)."""
    generator = generator_of(seed)
    scores = 1.5 + 1.2 * torch.randn(count, len(temperatures), generator=generator, dtype=torch.float64)
    accepted = torch.rand(scores.shape, generator=generator, dtype=torch.float64) < scores.sigmoid()
    return (scores * torch.tensor(temperatures, dtype=torch.float64)).float(), accepted.long().cumprod(1)


def prefix(lens, drafts):
    return torch.arange(drafts) < lens[:, None]


def errors(logits, survived, temperatures=None):
    probs = survival(logits, temperatures)
    return [expected_calibration_error(probs[:, k], survived[:, k]) for k in range(logits.shape[1])]


# Measures


@pytest.mark.parametrize("source", GOLDEN)
def test_golden_numbers(source):
    if not GOLDEN[source].exists():
        pytest.skip("the golden data is not beside this checkout")
    with np.load(GOLDEN[source]) as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files if key.startswith("calib.")}
    confidence, survived = golden["calib.confidence"], golden["calib.survived"]
    assert confidence.shape == survived.shape == (400, 7)
    probs = survival(confidence.logit())
    torch.testing.assert_close(probs, confidence.cumprod(1), rtol=1e-14, atol=0)
    for k in range(7):
        for measure, key in zip((expected_calibration_error, auc, brier), ("ece", "auc", "brier"), strict=True):
            assert measure(confidence.cumprod(1)[:, k], survived[:, k]) == pytest.approx(
                golden[f"calib.{key}"][k].item(), abs=1e-12
            ), (key, k)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (13,), (1009,), (7, 31, 3)])
def test_measures_equal_the_reference(measure, dtype, shape):
    ours, theirs = getattr(calibration, measure), getattr(reference, measure)
    for seed in range(4):
        generator = generator_of(seed)
        probs = torch.rand(shape, generator=generator, dtype=torch.float64)
        # The second half of the seeds: multiples of 1/8 only, so edges of bins, 0 and 1 occur.
        probs = ((probs * 9).floor() / 8 if seed >= 2 else probs).to(dtype)
        outcomes = torch.rand(shape, generator=generator, dtype=torch.float64) < probs.double() ** 2
        for bins in [()] if measure == "brier" else [(), (1,), (7,), (20,), (8,)]:
            want = theirs(probs, outcomes, *bins)
            for kind in (outcomes, outcomes.int(), outcomes.float()):
                assert ours(probs, kind, *bins) == pytest.approx(want, abs=1e-12, nan_ok=True), (seed, bins)


def test_reliability_is_what_the_error_sums():
    generator = generator_of(3)
    probs = torch.rand(997, generator=generator, dtype=torch.float64) * 0.7  # the highest bins stay empty
    outcomes = torch.rand(997, generator=generator) < probs
    for bins in (1, 7, 20):
        table = reliability(probs, outcomes, bins)
        assert torch.equal(table.edges, torch.tensor([b / bins for b in range(bins + 1)], dtype=torch.float64))
        error = 0.0
        for b in range(bins):
            inside = (probs * bins).floor() == b
            count = int(inside.sum())
            assert table.counts[b] == count
            if not count:
                assert table.predicted[b].isnan() and table.survived[b].isnan()
                continue
            assert table.predicted[b].item() == pytest.approx(probs[inside].mean().item(), abs=1e-12)
            assert table.survived[b].item() == pytest.approx(outcomes[inside].double().mean().item(), abs=1e-12)
            error += count / 997 * abs(table.predicted[b] - table.survived[b]).item()
        assert bins == 1 or (table.counts == 0).any()
        assert table.counts.sum() == 997
        assert error == pytest.approx(expected_calibration_error(probs, outcomes, bins), abs=1e-12)
    # 1 belongs to the last bin, an edge to the bin above it.
    assert reliability(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1, 1, 0]), 2).counts.tolist() == [1, 2]


def test_survival_by_hand():
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    assert survival(logits).dtype == torch.float64
    assert survival(logits)[0].tolist() == pytest.approx(np.cumprod([0.5, sigmoid(2), sigmoid(-1)]), abs=1e-15)
    scaled = survival(logits, torch.tensor([4.0, 0.5, 2.0]))
    assert scaled[0].tolist() == pytest.approx(np.cumprod([0.5, sigmoid(4), sigmoid(-0.5)]), abs=1e-15)
    assert survival(logits[0]).shape == (3,) and survival(torch.zeros(2, 5, 3)).shape == (2, 5, 3)


# fit_sts


def test_the_grid_is_the_reference_one():
    assert STS_GRID == reference.STS_GRID
    assert len(set(STS_GRID)) == 193


@pytest.mark.parametrize("bins", [1, 7, 20])
@pytest.mark.parametrize("count", [1, 2, 7, 100, 5000])
@pytest.mark.parametrize("censored", [False, True])
def test_fit_equals_the_reference(bins, count, censored):
    for seed in range(2 if count > 1000 else 8):
        logits, survived = make_rounds(count, seed)
        if seed % 2:
            # Few distinct values, infinities among them: many temperatures are equally good.
            logits = (logits / 4).round() * 4
            logits[::5, 1], logits[1::5, 2] = float("inf"), -float("inf")
        logits = logits.to((torch.float32, torch.float64, torch.bfloat16)[seed % 3])
        observed = None
        if censored:
            lens = torch.randint(0, 6, (count,), generator=generator_of(100 + seed))
            observed = prefix(lens, 5)
            survived = survived * observed
        ours = fit_sts(logits, survived, bins=bins, observed=observed)
        assert ours.dtype == torch.float32 and ours.shape == (5,)
        assert torch.equal(ours, reference.fit_sts(logits, survived, bins=bins, observed=observed)), seed
        assert torch.equal(ours, fit_sts(logits, survived.bool(), bins=bins, observed=observed))


def test_the_fit_does_not_depend_on_its_chunks(monkeypatch):
    logits, survived = make_rounds(1001, seed=5)
    want = fit_sts(logits, survived)
    assert (want != 1).any()
    for chunk in (1, 7, 600, 1000, 1001, 2000):
        monkeypatch.setattr(calibration, "_ROUNDS_AT_ONCE", chunk)
        assert torch.equal(fit_sts(logits, survived), want)


@pytest.mark.parametrize("fit", [fit_sts, reference.fit_sts])
def test_rounding_does_not_choose_between_equal_errors(fit):
    # A mirrored pair of logits has mean probability 1/2 at every temperature, up to rounding, and one bin sees only means.
    half = torch.randn(100, 1, generator=generator_of(0), dtype=torch.float64)
    logits = torch.cat([half, -half])
    survived = torch.rand(200, 1, generator=generator_of(1)) < 0.3
    for seed in range(20):
        order = torch.randperm(200, generator=generator_of(seed))
        assert fit(logits[order], survived, bins=1).tolist() == [1.0]


@pytest.mark.parametrize("fit", [fit_sts, reference.fit_sts])
def test_the_fit_works_in_fp64(fit):
    """At one logit the temperatures 1 and 2^(1/24) miss the share of survivors equally; 1e-9 beside it one is better."""
    sigmoid = lambda x: torch.tensor(x, dtype=torch.float64).sigmoid().item()  # noqa: E731
    low, high = 0.5, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(middle) + sigmoid(middle / 2 ** (1 / 24)) < 1.5 else (low, middle)
    survived = torch.tensor([[1], [1], [1], [0]])
    for logit, temperature in ((low - 1e-9, 1.0), (low + 1e-9, 2 ** (1 / 24))):
        logits = torch.full((4, 1), logit, dtype=torch.float64)
        assert fit(logits, survived, bins=1).item() == pytest.approx(temperature, rel=1e-6)


@pytest.mark.parametrize("fit", [fit_sts, reference.fit_sts])
def test_the_smaller_of_two_temperatures_equally_near_to_one(fit):
    """A pair +-x, outcomes 1 and 0, in three bins. From T = 2^(64/24) on both are in the middle bin, where the pair's
    errors cancel; below they are in different bins, and err by exp(-x / T) each, which is 1e-12 from 2^(-64/24) down."""
    x, m = 4.375, 64
    error = lambda t: expected_calibration_error(  # noqa: E731
        torch.tensor([x / t, -x / t], dtype=torch.float64).sigmoid(), torch.tensor([1, 0]), bins=3
    )
    equal = [t for t in STS_GRID if error(t) <= 1e-12]
    assert {equal[0], equal[1]} == {2.0 ** (-m / 24), 2.0 ** (m / 24)} and min(equal) < equal[0]
    fitted = fit(torch.tensor([[x], [-x]]), torch.tensor([[1], [0]]), bins=3)
    assert fitted.tolist() == [pytest.approx(2.0 ** (-m / 24), rel=1e-7)]


def test_distorted_confidences_are_recalibrated_on_held_out_rounds():
    temperatures = fit_sts(*make_rounds(20000, seed=0))
    held_out = make_rounds(20000, seed=1)
    raw, fitted = errors(*held_out), errors(*held_out, temperatures)
    honest = errors(*held_out, torch.tensor(TRUE_TEMPERATURES))
    assert raw[0] > 0.1 and sum(raw) > 0.2  # the paper reports 0.03 to 0.08 before
    # About 1 % after, which is the sampling noise that the temperatures that made the data have too.
    assert max(fitted) < 0.012 and max(honest) < 0.012
    assert all(0.85 < t / true < 1.18 for t, true in zip(temperatures.tolist(), TRUE_TEMPERATURES, strict=True))


# Rounds of which only a prefix was verified


def cut_by_confidence(logits):
    """Lengths as a scheduler chooses them: up to the first draft whose raw survival is low, sometimes fewer."""
    confident = prefix_length(survival(logits) > 0.25)
    budget = torch.randint(0, 6, confident.shape, generator=generator_of(7))
    return torch.minimum(confident, budget)


def cut_at_random(logits):
    return torch.randint(0, 6, logits.shape[:1], generator=generator_of(8))


def prefix_length(flags):
    return flags.long().cumprod(1).sum(1)


def excess_on_held_out_rounds(temperatures, cut):
    """By how much the worst position's ECE, over the rounds that verify it, exceeds that of the true temperatures."""
    logits, survived = make_rounds(60000, seed=3)
    there = prefix(cut(logits), 5)
    ours, honest = (
        [expected_calibration_error(c[there[:, k], k], survived[there[:, k], k]) for k in range(5)]
        for c in (survival(logits, temperatures), survival(logits, torch.tensor(TRUE_TEMPERATURES)))
    )
    return max(a - b for a, b in zip(ours, honest, strict=True))


# Largest excess of fits to 60000 rounds, about 6000 of them whole: 0.0055 over six seeds and both ways to cut. The wrong
# ways to read short rounds: 0.11 and more.
EXCESS = 0.01


@pytest.mark.parametrize("cut", [cut_at_random, cut_by_confidence])
def test_short_rounds_do_not_bias_the_fit(cut):
    logits, survived = make_rounds(60000, seed=2)
    lens = cut(logits)
    verified = prefix(lens, 5)
    assert 0.05 < verified[:, 4].double().mean() < 0.2, "the cut must leave some rounds whole, and few"
    known = survived * verified
    assert excess_on_held_out_rounds(fit_sts(logits, known, observed=verified), cut) < EXCESS
    # The tempting way: keep the short rounds that were rejected, as their later drafts "did not survive" either, and
    # drop the accepted ones.
    rejected = (known.sum(1) < lens)[:, None]
    assert excess_on_held_out_rounds(fit_sts(logits, known, observed=verified | rejected), cut) > 10 * EXCESS
    # Every draft that was not verified taken as rejected.
    assert excess_on_held_out_rounds(fit_sts(logits, known), cut) > 10 * EXCESS


def test_what_was_not_verified_is_not_looked_at():
    logits, survived = make_rounds(500, seed=4)
    lens = cut_at_random(logits)
    observed = prefix(lens, 5)
    want = fit_sts(logits, survived, observed=observed)
    garbage = logits.masked_fill(~observed, float("nan")), survived.masked_fill(~observed, 7)
    assert torch.equal(fit_sts(*garbage, observed=observed), want)
    # All of it verified is the same as not saying so; none of a position verified leaves it alone, and only it.
    assert torch.equal(fit_sts(logits, survived, observed=torch.ones_like(observed)), fit_sts(logits, survived))
    short = fit_sts(logits, survived, observed=prefix(lens.clamp(max=3), 5))
    assert short[3:].tolist() == [1.0, 1.0] and torch.equal(short[:3], want[:3]) and (short[:3] != 1).all()
    assert fit_sts(logits, survived, observed=torch.zeros_like(observed)).tolist() == [1.0] * 5


# The diagram


def curves():
    logits, survived = make_rounds(2000, seed=12)
    logits = logits.double()
    honest = torch.tensor(TRUE_TEMPERATURES)
    return {
        f"{name}, draft {k + 1}": (survival(logits, temperatures)[:, k], survived[:, k])
        for k, (name, temperatures) in itertools.product((0, 3), (("raw", None), ("scaled", honest)))
    }


def test_png(tmp_path):
    image_of = pytest.importorskip("matplotlib.image").imread
    path = tmp_path / "a.png"
    plot_reliability(curves(), path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content.rstrip(b"\0").endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    image = image_of(path)  # decodes every pixel
    assert image.shape[:2] == (height, width) and width > 400 and height > 400
    pixels = image[..., :3].mean(-1)
    assert 0.02 < (pixels < 0.9).mean() < 0.5 and (pixels > 0.99).mean() > 0.3, "blank, or no white left"
    plot_reliability(curves(), str(tmp_path / "b.PNG"))
    assert (tmp_path / "b.PNG").read_bytes() == content, "the same data gives the same file"
    plot_reliability(dict(list(curves().items())[:1]), tmp_path / "c.png")
    assert not np.array_equal(image_of(tmp_path / "c.png"), image)


def test_svg(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        plot_reliability(curves(), tmp_path / name)
    root = xml.etree.ElementTree.parse(tmp_path / "a.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and sum(1 for _ in root.iter()) > 100
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes(), "no date, no random ids"


def test_what_the_diagram_shows(tmp_path, monkeypatch):
    figures = []
    figure_module = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, *a, **k: figures.append(self))
    data = curves()
    plot_reliability(data, tmp_path / "a.png", bins=10)
    above, below = figures[0].axes
    lines = [line for line in above.lines if line.get_label() in {t.get_text() for t in above.get_legend().get_texts()}]
    # Black and white tells them apart.
    styles = {(line.get_marker(), line.get_linestyle(), str(line._dash_pattern)) for line in lines}
    assert len(lines) == len(styles) == 4 and "None" not in {line.get_marker() for line in lines}
    assert len({bars[0].get_hatch() for bars in below.containers}) == 4
    for (label, pair), line, bars in zip(data.items(), lines, below.containers, strict=True):
        assert line.get_label() == f"{label} (ECE {100 * expected_calibration_error(*pair, 10):.2f} %)"
        table = reliability(*pair, 10)
        full = table.counts > 0
        assert list(line.get_xdata()) == table.predicted[full].tolist()
        assert list(line.get_ydata()) == table.survived[full].tolist()
        assert [bar.get_height() for bar in bars] == table.counts.tolist() and sum(table.counts) == 2000
        for bar, left, right in zip(bars, table.edges[:-1], table.edges[1:], strict=True):
            assert left <= bar.get_x() and bar.get_x() + bar.get_width() <= right + 1e-9
    many = {str(i): next(iter(data.values())) for i in range(35)}
    plot_reliability(many, tmp_path / "a.png")
    looks = {(line.get_marker(), str(line._dash_pattern)) for line in figures[1].axes[0].lines[1:]}
    assert len(looks) == 35


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"dspark_kernels\[plots\]"):
        plot_reliability(curves(), tmp_path / "a.png")


# Refusals

HALF, ONE = torch.tensor([0.5]), torch.tensor([1])
INTS = torch.zeros(2, dtype=torch.int32)


def online():
    return OnlineCalibration(3, 4, "cpu")


@pytest.mark.parametrize(
    "error, names, call",
    [
        (TypeError, "probs", lambda: expected_calibration_error([0.5], ONE)),
        (TypeError, "outcomes", lambda: brier(HALF, 1)),
        (ValueError, "outcomes", lambda: expected_calibration_error(HALF, torch.tensor([1, 0]))),
        (ValueError, "outcomes", lambda: brier(HALF, HALF)),
        (ValueError, "probs", lambda: auc(torch.tensor([]), torch.tensor([]))),
        (ValueError, "probs", lambda: reliability(torch.tensor([1.5]), ONE)),
        (ValueError, "probs", lambda: brier(torch.tensor([float("nan")]), ONE)),
        (ValueError, "probs", lambda: auc(torch.tensor([-0.1]), ONE)),
        (ValueError, "bins", lambda: auc(HALF, ONE, bins=0)),
        (TypeError, "bins", lambda: expected_calibration_error(HALF, ONE, bins=2.0)),
        (ValueError, "bins", lambda: reliability(HALF, ONE, 0)),
        (TypeError, "logits", lambda: survival(torch.zeros(3, dtype=torch.int64))),
        (ValueError, "logits", lambda: survival(torch.tensor(0.0))),
        (ValueError, "temperatures", lambda: survival(torch.zeros(3), torch.ones(2))),
        (ValueError, "temperatures", lambda: survival(torch.zeros(2), torch.tensor([1.0, 0.0]))),
        (ValueError, "temperatures", lambda: survival(torch.zeros(2), torch.tensor([1.0, float("nan")]))),
        (ValueError, "logits", lambda: fit_sts(torch.zeros(3), torch.zeros(3))),
        (ValueError, "logits", lambda: fit_sts(torch.zeros(0, 2), torch.zeros(0, 2))),
        (ValueError, "logits", lambda: fit_sts(torch.zeros(2, 0), torch.zeros(2, 0))),
        (ValueError, "logits", lambda: fit_sts(torch.full((1, 2), float("nan")), torch.zeros(1, 2))),
        (TypeError, "logits", lambda: fit_sts(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2))),
        (ValueError, "survived", lambda: fit_sts(torch.zeros(3, 2), torch.zeros(3, 3))),
        (ValueError, "survived", lambda: fit_sts(torch.zeros(1, 2), torch.tensor([[0, 1]]))),
        (ValueError, "survived", lambda: fit_sts(torch.zeros(1, 2), torch.tensor([[2, 1]]))),
        (ValueError, "bins", lambda: fit_sts(torch.zeros(1, 2), torch.zeros(1, 2), bins=0)),
        (TypeError, "observed", lambda: fit_sts(torch.zeros(1, 2), torch.zeros(1, 2), observed=torch.ones(1, 2))),
        (ValueError, "observed", lambda: fit_sts(torch.zeros(1, 2), torch.zeros(1, 2), observed=torch.tensor([True]))),
        (
            ValueError,
            "observed",
            lambda: fit_sts(torch.zeros(1, 2), torch.zeros(1, 2), observed=torch.tensor([[False, True]])),
        ),
        (TypeError, "drafts", lambda: OnlineCalibration(3.0, 4, "cpu")),
        (ValueError, "drafts", lambda: OnlineCalibration(0, 4, "cpu")),
        (ValueError, "window", lambda: OnlineCalibration(3, 0, "cpu")),
        (ValueError, "temperatures", lambda: OnlineCalibration(3, 4, "cpu", torch.ones(2))),
        (TypeError, "draft_lens", lambda: online().update(torch.zeros(2, 3), [1, 1], INTS)),
        (TypeError, "draft_lens", lambda: online().update(torch.zeros(2, 3), torch.zeros(2), INTS)),
        (ValueError, "num_accepted", lambda: online().update(torch.zeros(2, 3), INTS, INTS[:1])),
        (TypeError, "state_indices", lambda: online().update(torch.zeros(2, 3), INTS, INTS, torch.zeros(2))),
        (ValueError, "state_indices", lambda: online().update(torch.zeros(2, 3), INTS, INTS, INTS[:1])),
        (ValueError, "confidence_logits", lambda: online().update(torch.zeros(2, 4), INTS, INTS)),
        (ValueError, "confidence_logits", lambda: online().update(torch.zeros(3, 3), INTS, INTS)),
        (ValueError, "confidence_logits", lambda: online().update(torch.zeros(0, 3), INTS, INTS, INTS)),
        (TypeError, "confidence_logits", lambda: online().update(torch.zeros(2, 3).double(), INTS, INTS)),
        (ValueError, "confidence_logits", lambda: online().update(torch.zeros(2, 3, device="meta"), INTS, INTS)),
        (ValueError, "bins", lambda: online().fit(bins=0)),
        (ValueError, "min_rounds", lambda: online().fit(min_rounds=0)),
        (TypeError, "sts_temperatures", lambda: online().apply(torch.ones(3).double())),
        (ValueError, "sts_temperatures", lambda: online().apply(torch.ones(4))),
        (TypeError, "curves", lambda: plot_reliability([(HALF, ONE)], "a.png")),
        (ValueError, "curves", lambda: plot_reliability({}, "a.png")),
        (ValueError, "path", lambda: plot_reliability({"a": (HALF, ONE)}, "a.pdf")),
    ],
)
def test_refused_input(error, names, call):
    with pytest.raises(error, match=f"^{names}: "):
        call()
