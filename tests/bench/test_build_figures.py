"""Figures of the built models: how they are made, that documents have them, that the shipped weights give them again."""

import pytest
import torch

from bench import assets
from bench.shared import acceptance, systems
from reference.drafters import Autoregressive
from reference.model import Target


def test_tau_and_its_error():
    probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 1.0], [0.25, 1.0]]], dtype=torch.float64)
    found = systems.teacher_forced(probs)
    assert found["tau"] == round(((1.75 + 2.0) / 2 + 1.5) / 2, 4) and found["by_text"] == [1.875, 1.5]
    assert found["error"] == round(abs(1.875 - 1.5) / 2, 4)  # of a mean of two
    assert found["acceptance"] == [0.5, round((0.25 + 0 + 0.25 + 0.25) / 4 / 0.5, 4)]
    assert systems.ratio([6, 2], [2, 2])[0] == 2.0 and systems.ratio([4, 4], [2, 2])[1] == 0.0


def test_calibration_crosses_domains():
    generator = torch.Generator().manual_seed(0)
    rounds = {}
    for domain, sharp in (("calm", 1.0), ("bold", 4.0)):
        truth = torch.randn(4000, 2, generator=generator)
        taken = torch.rand(4000, 2, generator=generator) < truth.sigmoid()
        rounds[domain] = acceptance.Rounds(sharp * truth, taken.int().cumprod(1).sum(1), torch.arange(4000))
    calm, bold = systems.calibration(rounds)
    assert (calm["fitted"], calm["domain"]) == ("calm", "bold")
    # Temperatures of the honest domain change nothing of the bold one; those of the bold one worsen the honest one.
    assert calm["before"] > 0.1 and abs(calm["after"] - calm["before"]) < 0.02
    assert bold["before"] < 0.02 and bold["after"] > 0.05
    assert sum(count for _, _, count in bold["after_bins"]) == 8000


def test_the_readme_has_the_figures_that_were_measured():
    assert systems.in_readme(systems.README.read_text(encoding="utf-8")) == systems.table(systems.load())


def test_figures_are_written_into_the_readme(tmp_path):
    found, path = systems.load(), tmp_path / "README.md"
    path.write_text(f"before\n{systems.BEGIN}old{systems.END}\nafter\n")
    systems.write_readme(found, path)
    assert path.read_text() == f"before\n{systems.BEGIN}{systems.table(found)}{systems.END}\nafter\n"
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match="README: expected"):
        systems.write_readme(found, path)


@pytest.fixture(scope="module")
def shipped():
    target, tokenizer = Target(*assets.weights("target")), assets.tokenizer()
    return target, systems.drafters(target), [tokenizer.encode(text) for text in assets.prompts()[:2]], systems.load()


def test_the_measured_figures_are_those_of_the_shipped_weights(shipped):
    """Two of the prompts again; every figure of the file follows from such rows."""
    target, drafters, prompts, found = shipped
    assert set(found["draft_ms"]) == set(drafters)
    plain = systems.decoded(target, Autoregressive(), prompts, found["new_tokens"], 1.0, 0)
    texts = systems.texts_of(plain, len(prompts[0]), found["new_tokens"])
    for name, drafter in drafters.items():
        have = systems.teacher_forced(systems.accepted(target, drafter, texts, len(prompts[0])))["by_text"]
        row = systems._row(found["teacher_forced"], domain="code", system=name)
        assert have == pytest.approx(row["by_text"][:2], abs=1e-3), name
        assert row["tau"] == pytest.approx(sum(row["by_text"]) / found["prompts"], abs=1e-4)
    for row in found["decoded"]:
        lengths = [length for prompt in row["lengths"] for length in prompt]
        assert len(row["lengths"]) == found["prompts"] and row["tau"] == round(sum(lengths) / len(lengths), 4)


@pytest.mark.parametrize("temperature", systems.TEMPERATURES)
def test_decoding_gives_the_measured_rounds_again(shipped, temperature):
    target, drafters, prompts, found = shipped
    have = systems.decoded(target, drafters["dspark"], prompts[:1], found["new_tokens"], temperature, 0)
    row = systems._row(found["decoded"], domain="code", system="dspark", temperature=temperature)
    assert have[0].acceptance_lengths == row["lengths"][0]


def test_calibration_figures_are_those_of_the_shipped_rounds(shipped):
    have = systems.calibration({name: acceptance.load()[0][name] for name in ("code", "prose")})
    for row in have:
        want = systems._row(shipped[3]["calibration"], fitted=row["fitted"], domain=row["domain"])
        assert row["before"] == pytest.approx(want["before"], abs=1e-4) and row["after"] == pytest.approx(want["after"], abs=1e-4)
