"""bench.pruning: which tiles of W2 no draft can come from."""

import csv

import torch

from bench.pruning import shares as pruning
from bench.shared import paths


def test_no_best_id_is_in_a_tile_that_could_be_skipped():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(200, 300, generator=generator) * 2
    latents, w2 = torch.randn(200, 4, generator=generator), torch.randn(300, 4, generator=generator) * 0.3
    skipped = pruning.skippable(base, latents, w2)
    best = (base + latents @ w2.T).argmax(1)
    assert skipped.shape == (200, 5) and skipped.any() and not skipped.all(1).any()
    assert not skipped[torch.arange(200), best // pruning.TILE].any()


def test_bounds_by_hand():
    """A row of W2 of length 2 along a latent of length 3 can add 6, and no more."""
    base = torch.zeros(3, 128)
    base[:, 0] = torch.tensor([5.0, 6.0, 7.0])
    w2 = torch.zeros(128, 2)
    w2[70] = torch.tensor([2.0, 0.0])
    latents = torch.tensor([[0.0, 3.0]] * 3)  # at right angles to that row: no bias anywhere
    assert pruning.skippable(base, latents, w2).tolist() == [[False, False], [False, False], [False, True]]


def test_a_tile_is_read_if_any_request_needs_it(monkeypatch):
    monkeypatch.setattr(pruning, "BATCHES", (1, 2, 8))
    skipped = torch.tensor([[True, False], [True, True], [True, False], [False, True]])
    rows = pruning.shares("x", skipped)
    assert [row["requests"] for row in rows] == [1, 2]
    assert rows[0]["share_skipped"] == "0.6250" and float(rows[1]["share_skipped"]) <= 0.625


def test_the_committed_report_has_every_case():
    with (paths.RESULTS / "pruning.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {row["logits"] for row in rows}
    assert len(names) == 3 + len(pruning.SYNTHETIC) and all(0 <= float(row["share_skipped"]) <= 1 for row in rows)
    spread, peak, bias = pruning.SYNTHETIC[-1]
    again = pruning.shares(f"synthetic, spread {spread:g}, peak {peak:g}, bias {bias:g}", pruning.synthetic(spread, peak, bias))
    committed = [row for row in rows if row["logits"] == again[0]["logits"]]
    assert [int(row["requests"]) for row in committed] == [row["requests"] for row in again]
    for old, new in zip(committed, again, strict=True):  # a share at a bound may turn by the rounding of a matrix product
        assert abs(float(old["share_skipped"]) - float(new["share_skipped"])) < 0.001
