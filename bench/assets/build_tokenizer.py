"""Merges of the byte-pair encoding: again and again the pair of neighbours that is most frequent inside words becomes one token.

The words are those of `tokenizer.Tokenizer`; among equally frequent pairs the one of the lowest ids goes first. Source of the
method: Sennrich et al., arXiv 1508.07909.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable

import numpy as np

from .tokenizer import END_OF_TEXT, FIRST_MERGE, WORDS, Tokenizer


def learn(texts: Iterable[str], merges: int, progress: Callable[[int], None] = lambda done: None) -> list[tuple[int, int]]:
    """Up to so many merges, fewer where every word is one token."""
    counts = collections.Counter(word for text in texts for word in WORDS.findall(text.encode()))
    words = [(list(word), count) for word, count in counts.items() if len(word) > 1]
    pairs: collections.Counter = collections.Counter()
    where: dict[tuple[int, int], set[int]] = collections.defaultdict(set)  # words that have, or had, the pair
    for index, (tokens, count) in enumerate(words):
        for pair in itertools.pairwise(tokens):
            pairs[pair] += count
            where[pair].add(index)
    found: list[tuple[int, int]] = []
    while len(found) < merges and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] <= 0:
            break
        token = FIRST_MERGE + len(found)
        found.append(best)
        for index in where.pop(best):
            tokens, count = words[index]
            for pair in itertools.pairwise(tokens):
                pairs[pair] -= count
            tokens = _merged(tokens, best, token)
            words[index] = tokens, count
            for pair in itertools.pairwise(tokens):
                pairs[pair] += count
                where[pair].add(index)
        del pairs[best]
        progress(len(found))
    return found


def _merged(tokens: list[int], pair: tuple[int, int], token: int) -> list[int]:
    out, i = [], 0
    while i < len(tokens):
        if i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair:
            out.append(token)
            i += 2
        else:
            out.append(tokens[i])
            i += 1
    return out


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """All texts in one row, an end of text after each; uint16."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text)
        ids.append(END_OF_TEXT)
    return np.array(ids, np.uint16)
