"""The corpus that the models are built from, and its tokenizer."""

import itertools

import numpy as np
import pytest

from bench.assets import build_corpus, build_tokenizer
from bench.assets.tokenizer import FIRST_MERGE, WORDS, Tokenizer


@pytest.fixture(scope="module")
def corpus():
    return build_corpus.read(packages=12)


def test_held_out_packages_share_no_longer_line_with_the_training_text(corpus):
    held_out = corpus.facts["held_out"]
    assert all(held_out[domain] for domain in build_corpus.DOMAINS)
    known = {line.strip() for texts in corpus.training.values() for text in texts for line in text.splitlines()}
    for domain, texts in corpus.held_out.items():
        lines = [line.strip() for text in texts for line in text.splitlines()]
        assert lines and not [line for line in lines if len(line) >= build_corpus.LONG_LINE and line in known], domain
    # Docstrings are held out with the sources that they stand in.
    assert set(held_out["code"]) <= set(held_out["docs"])
    assert not set(held_out["code"]) & {name for name in held_out["docs"] if name.startswith("topic ")}


def test_shared_lines_cut_held_out_text():
    line = "a line that is long enough to be known\n"
    piece = "something new\n" * 20
    assert build_corpus._unknown(piece + line + "short\n" + line + piece, {line.strip()}) == [piece, piece]
    assert build_corpus._unknown(piece + "short\n" + piece, {"short"}) == [piece + "short\n" + piece]


def test_the_hash_tells_corpora_apart(corpus):
    again = build_corpus.digest(corpus.training, corpus.held_out)
    assert again == corpus.facts["sha256"]
    moved = {domain: list(texts) for domain, texts in corpus.training.items()}
    moved["code"][0] = moved["code"][0][:-1] + "#"
    assert build_corpus.digest(moved, corpus.held_out) != again
    assert build_corpus.digest(corpus.held_out, corpus.training) != again


def test_merges_are_the_most_frequent_pairs():
    texts = ["the cat sat on the mat, the bat", "that that", "aaaa aaab"]
    words = [list(word) for text in texts for word in WORDS.findall(text.encode())]
    expected = []
    for token in range(FIRST_MERGE, FIRST_MERGE + 12):  # in the words of the method, all counted anew every time
        counts = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        expected.append(best)
        words = [build_tokenizer._merged(word, best, token) for word in words]
    assert build_tokenizer.learn(texts, 12) == expected
    assert Tokenizer(expected).decode(Tokenizer(expected).encode(texts[0])) == texts[0]
    ids = build_tokenizer.encode(Tokenizer(expected), texts)
    assert ids.dtype == np.uint16 and list(ids).count(256) == len(texts)
