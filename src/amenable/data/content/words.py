"""The words of texts as 32-bit hashes, and runs of words as 64-bit hashes: no text is kept.

The hash of a run of words w_i … w_j is Σ w_k B^(k - i) modulo 2^64, so that one cumulated sum gives
that of every run, however long (Karp and Rabin 1987, with an odd base in place of a prime modulus).
Equal hashes count as equal runs: two different ones agree with a chance of about 1 in 2^64.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Words = npt.NDArray[np.uint32]
Integers = npt.NDArray[np.int64]

BASE = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2^64; chosen here."""

REMEMBERED, REMEMBERED_LENGTH = 2**16, 32
"""Most words whose hash is remembered, and their most characters: about 10 MB."""

AT_ONCE = 1000
"""Texts whose runs are hashed at a time."""

# One word, or one letter of a script that sets no spaces between words.
_SPACELESS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
_TO_SPACE = {code: " " for code in range(128) if not re.match(r"\w", chr(code))}


def words_in(text: str) -> list[str]:
    """Words of a text in their order, case and punctuation apart."""
    if text.isascii():  # the same words, ten times faster
        return text.lower().translate(_TO_SPACE).split()
    return _WORDS.findall(text.casefold())


def word_hash(word: str) -> int:
    """32-bit hash of one of `words_in`."""
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


class _Remembered(dict[str, int]):
    """Hashes of words; begins anew when it is full."""

    def __missing__(self, word: str) -> int:
        found = word_hash(word)
        if len(word) <= REMEMBERED_LENGTH:
            if len(self) >= REMEMBERED:
                self.clear()
            self[word] = found
        return found


_hash_of = _Remembered().__getitem__


def word_hashes(text: str) -> Words:
    """[w] hashes of the text's words in their order."""
    words = words_in(text)
    return np.fromiter(map(_hash_of, words), np.uint32, len(words))


@dataclass(frozen=True, slots=True)
class HashedTexts:
    """The words of n texts, one after the other."""

    words: Words
    """[w]"""

    starts: Integers
    """[n + 1] where each text begins, and where the last one ends."""

    sums: Keys = field(repr=False)
    """[w + 1] Σ w_k B^k of the words before each."""

    inverses: Keys = field(repr=False)
    """[w] B^-k."""

    @classmethod
    def of(cls, texts: Sequence[Words]) -> HashedTexts:
        """Of texts given as the hashes of their words."""
        starts = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) for text in texts], out=starts[1:])
        words = np.concatenate(texts) if len(texts) else np.zeros(0, np.uint32)
        sums = np.zeros(len(words) + 1, np.uint64)
        np.cumsum(words * _powers(BASE, len(words)), out=sums[1:])
        return cls(words, starts, sums, _powers(pow(BASE, -1, 2**64), len(words)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def text(self, number: int) -> Words:
        """[w] the words of one text."""
        return self.words[self.starts[number] : self.starts[number + 1]]

    def runs(self, length: int) -> Keys:
        """[w - length + 1] hashes of all runs of `length` words, also those across texts."""
        count = max(0, len(self.words) - length + 1)
        return (self.sums[length : length + count] - self.sums[:count]) * self.inverses[:count]

    def run(self, start: int, end: int) -> int:
        """Hash of the words from `start` up to `end`; 0 for none."""
        if start >= end:
            return 0
        difference = int(self.sums[end]) - int(self.sums[start])
        return difference * int(self.inverses[start]) % 2**64

    def text_of(self, positions: Integers) -> Integers:
        """[n] number of the text that each word stands in."""
        return np.searchsorted(self.starts, positions, side="right") - 1


def _powers(base: int, count: int) -> Keys:
    """[count] powers of the base from 0 on, modulo 2^64."""
    found = np.full(count, base, np.uint64)
    found[:1] = 1
    return np.cumprod(found, dtype=np.uint64)


def ascending(numbers: Keys) -> Keys:
    """The distinct numbers: `np.unique`, which takes twice as long by way of a hash table."""
    ordered = np.sort(numbers)
    found: Keys = ordered[np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)]]
    return found


def shingles(texts: Sequence[Words], length: int) -> list[Words]:
    """Of each text the ascending distinct 32-bit hashes of its runs of `length` words.

    Of the whole text, if it is shorter; none of an empty one.
    """
    found: list[Words] = []
    for first in range(0, len(texts), AT_ONCE):
        hashed = HashedTexts.of(texts[first : first + AT_ONCE])
        numbers = np.arange(len(hashed))
        lengths = np.diff(hashed.starts)
        short = np.flatnonzero((lengths > 0) & (lengths < length))
        runs = hashed.runs(length)
        text_of = np.repeat(numbers, lengths)
        inside = text_of[: len(runs)] == text_of[length - 1 :]
        wholes = [hashed.run(int(hashed.starts[n]), int(hashed.starts[n + 1])) for n in short]
        runs = np.r_[runs[inside], np.array(wholes, np.uint64)] >> np.uint64(32)
        owners = np.r_[text_of[: len(inside)][inside], short].astype(np.uint64)
        both = ascending((owners << np.uint64(32)) | runs)
        ends = np.searchsorted(both, (numbers[1:].astype(np.uint64)) << np.uint64(32))
        found += np.split(both.astype(np.uint32), ends)
    return found
