"""Byte-level byte-pair encoding of the embedded models: 256 bytes, two special tokens, then one token per merge.

Text is cut into words (letters with the space before them, digits, runs of other signs, a line break with its indentation); inside
a word the earliest merge is applied first. Source of the method: Sennrich et al., arXiv 1508.07909.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence

WORDS = re.compile(rb" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\r?\n[ \t]*|[ \t]+|\s")
END_OF_TEXT, MASK = 256, 257
FIRST_MERGE = 258


class Tokenizer:
    """merges: pairs of token ids; the i-th makes token 258 + i."""

    def __init__(self, merges: Iterable[Sequence[int]]):
        self._merged: dict[tuple[int, int], int] = {}
        self._bytes = [bytes([value]) for value in range(256)] + [b"<eot>", b"<mask>"]
        for left, right in merges:
            self._merged[left, right] = len(self._bytes)
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self._word = functools.lru_cache(maxsize=1 << 16)(self._encode_word)

    @property
    def vocab(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return [token for word in WORDS.findall(text.encode()) for token in self._word(word)]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become replacement characters."""
        return b"".join(self._bytes[token] for token in token_ids).decode("utf-8", "replace")

    def _encode_word(self, word: bytes) -> tuple[int, ...]:
        tokens = list(word)
        while len(tokens) > 1:
            pairs = [self._merged.get(pair) for pair in itertools.pairwise(tokens)]
            first = min((token for token in pairs if token is not None), default=None)
            if first is None:
                break
            joined, i = [], 0
            while i < len(tokens):
                if i < len(pairs) and pairs[i] == first:
                    joined.append(first)
                    i += 2
                else:
                    joined.append(tokens[i])
                    i += 1
            tokens = joined
        return tuple(tokens)
