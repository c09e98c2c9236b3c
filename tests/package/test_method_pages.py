"""The round on each page of a method decodes: its greedy text is that of the target alone, and sampled drafts are accepted."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dspark_kernels as dk

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("method-*.md"))
REQUESTS, DRAFTS, VOCAB, RANK, HIDDEN = 3, 3, 40, 4, 8


def round_of(page: Path):
    (code,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    names: dict = {}
    exec(compile(code, str(page), "exec"), names)  # the page's own code, as a reader would run it
    return names["decoding_round"]


def models():
    """(what a page's round asks of a drafter, the target's logits after each token [V, V])."""
    torch.manual_seed(0)
    table = 3 * torch.randn(VOCAB, VOCAB)
    w1, w2 = torch.randn(VOCAB, RANK), torch.randn(VOCAB, RANK)
    guess = table + 0.3 * torch.randn(VOCAB, VOCAB)  # a drafter that is right more often than not

    def backbone(anchors, positions):
        first = guess[anchors]
        later = guess[first.argmax(-1)]
        return torch.stack([first, later, guess[later.argmax(-1)]], 1), torch.randn(REQUESTS, DRAFTS, HIDDEN)

    def lookup(anchors, positions):
        first = guess[anchors].argmax(-1)
        found = torch.stack([first, guess[first].argmax(-1), torch.full_like(first, -1)], 1)
        found[0] = -1
        return found

    drafter = SimpleNamespace(
        backbone=backbone,
        layer=lambda tokens, positions: guess[tokens],
        model=lambda tokens, positions: guess[tokens],
        lookup=lookup,
        head=dk.MarkovHead(w1, 0.01 * w2),
        confidence=dk.ConfidenceHead(0.1 * torch.randn(HIDDEN + RANK)),
        cost=dk.CostTable.from_curve([1, 16], [1e-3, 1.1e-3]),
        lengths=torch.full((REQUESTS,), DRAFTS, dtype=torch.int32),
        num_drafts=DRAFTS,
        vocab_size=VOCAB,
    )
    return drafter, table


def test_there_is_a_page_for_every_method():
    assert [page.stem for page in PAGES] == [f"method-{name}" for name in ("block", "draft-model", "dspark", "lookup", "mtp")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_round_of_a_page_decodes(page, sampled):
    drafter, table = models()
    decoding_round = round_of(page)
    anchors, positions = torch.tensor([1, 7, 30]), torch.tensor([4, 0, 9])
    temperature = torch.full((REQUESTS,), 0.5 if sampled else 0.0)
    sampling = dk.SamplingTensors(temperature, torch.arange(REQUESTS))
    texts = [[] for _ in range(REQUESTS)]
    for _ in range(3):
        before = positions.clone()
        step = decoding_round(drafter, lambda layout: table[layout.token_ids], sampling, anchors, positions)
        assert torch.equal(positions - before, step.num_emitted.long())
        for text, count, row in zip(texts, step.num_emitted.tolist(), step.tokens.tolist(), strict=True):
            text += row[:count]
    assert sum(map(len, texts)) > 3 * REQUESTS, "no draft was accepted"
    if not sampled:
        for text, token in zip(texts, (1, 7, 30), strict=True):
            for have in text:
                token = int(table[token].argmax())
                assert have == token
