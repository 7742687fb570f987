"""Near duplicates of prompts: MinHash finds candidate pairs, exact Jaccard similarity decides.

A text is the set of its runs of SHINGLE words, case and punctuation apart. Two texts are near
duplicates where |A ∩ B| / |A ∪ B| >= THRESHOLD. One word changed in the middle of n costs three
runs, (n - 5) / (n + 1): it counts as a near duplicate from 29 words on; in shorter prompts only
case, punctuation or the first or last words may differ. Paraphrases are not found.

Source: Broder 1997, "On the resemblance and containment of documents".
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]

SHINGLE = 3
"""Words a run; chosen here: five would ask prompts of 46 words for one changed word."""

THRESHOLD = 0.8
"""Jaccard similarity of near duplicates, as in Lee et al. 2022, arXiv:2107.06499, section 4.2."""

MAX_WORDS = 2000
"""Words of a text that are compared; bounds the memory of the sample."""

BANDS, BAND_ROWS = 21, 6
"""126 of 128 hashes in 21 bands of 6: a pair of similarity s becomes a candidate with probability
1 - (1 - s^6)^21: 0.998 at 0.8, 0.28 at 0.5."""

HASHES = 128
SEED = 20
MAX_COMPARED = 50
"""Representatives of a bucket that a text is compared with: keeps boilerplate from costing n²."""

# One word, or one letter of a script that sets no spaces between words.
_SPACELESS = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")


def word_hashes(text: str, most: int = MAX_WORDS) -> Keys:
    """[w] 32-bit hashes of the text's words, case and punctuation apart, in their order."""
    words = _WORDS.findall(text.casefold())[:most]
    return np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))


def runs(words: Keys, length: int) -> Keys:
    """[w - length + 1] 64-bit hashes of the runs of `length` words, in their order.

    Empty for fewer words than that.
    """
    count = len(words) - length + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    mixed = np.zeros(count, np.uint64)
    for offset in range(length):  # arithmetic is modulo 2^64 throughout
        mixed = (mixed ^ words[offset : offset + count]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def shingles(words: Keys) -> Keys:
    """[k] ascending distinct hashes of the runs of words; of the whole text, if it is shorter.

    Args:
        words: [w] as `word_hashes` gives them.
    """
    return np.unique(runs(words, min(SHINGLE, max(1, len(words)))))


def jaccard(a: Keys, b: Keys) -> float:
    """Shared over all elements of two ascending distinct arrays, in [0, 1]; 1 if both are empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 1.0


def are_near(a: Keys, b: Keys) -> bool:
    """Whether two shingled texts are near duplicates."""
    if min(len(a), len(b)) < THRESHOLD * max(len(a), len(b)):
        return False
    return jaccard(a, b) >= THRESHOLD


@dataclass(slots=True)
class Sampled:
    """One text of a sample."""

    key: int
    place: str
    text: str
    """Its beginning, for examples."""

    shingles: Keys

    words: Keys
    """Hashes of its words in their order, of held-out prompts; else empty."""


@dataclass(slots=True)
class HashSample:
    """The texts of smallest key: a sample that depends on the texts alone, not on their order.

    Keys are hashes of the texts, so equal texts count once. It holds at most twice `size` texts
    while rows pass.
    """

    size: int
    limit: int = 2**64
    """Keys from here on cannot be in the sample any more."""

    kept: dict[int, Any] = field(default_factory=dict)

    def wants(self, key: int) -> bool:
        """Whether a text of this key is to be added."""
        return key < self.limit and key not in self.kept

    def add(self, key: int, payload: object) -> None:
        """Adds what is kept of the text."""
        self.kept[key] = payload
        if len(self.kept) >= 2 * self.size:
            self._cut()

    def _cut(self) -> None:
        kept = sorted(self.kept)[: self.size]
        self.kept = {key: self.kept[key] for key in kept}
        if len(kept) == self.size:
            self.limit = kept[-1]

    def payloads(self) -> list[Any]:
        """What was kept of the `size` texts of smallest key, ascending."""
        return [self.kept[key] for key in sorted(self.kept)[: self.size]]


def near_clusters(texts: Sequence[Keys]) -> Integers:
    """[n] number of each text's cluster; texts are linked by verified pairs, or through others.

    Empty texts stay alone.

    Args:
        texts: n ascending arrays of distinct shingles.
    """
    parent = list(range(len(texts)))
    filled = [number for number, text in enumerate(texts) if len(text)]
    if len(filled) > 1:
        signatures = _signatures([texts[number] for number in filled])
        for band in range(BANDS):
            columns = signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS]
            for bucket in _buckets(columns):
                _link([filled[int(number)] for number in bucket], texts, parent)
    return np.array([_root(parent, number) for number in range(len(texts))], np.int64)


def _signatures(texts: Sequence[Keys]) -> npt.NDArray[np.uint32]:
    """[n, HASHES] MinHash signatures."""
    from rensa import RMinHash

    flat = np.concatenate(texts)
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, HASHES, SEED)
    return np.array(matrix.to_rows(), np.uint32)


def _buckets(columns: npt.NDArray[np.uint32]) -> Iterable[Integers]:
    """Groups of two or more rows that are equal in all columns."""
    order = np.lexsort(columns.T)
    ordered = columns[order]
    starts = np.flatnonzero(np.r_[True, (ordered[1:] != ordered[:-1]).any(1), True])
    for number in np.flatnonzero(np.diff(starts) > 1):
        yield np.sort(order[starts[number] : starts[number + 1]])


def _link(bucket: Sequence[int], texts: Sequence[Keys], parent: list[int]) -> None:
    """Joins the verified pairs of one bucket."""
    representatives: list[int] = []
    for number in bucket:
        roots = {_root(parent, other) for other in representatives}
        if _root(parent, number) in roots:
            continue
        for other in representatives:
            if are_near(texts[number], texts[other]):
                parent[_root(parent, number)] = _root(parent, other)
                break
        else:
            if len(representatives) < MAX_COMPARED:
                representatives.append(number)


def _root(parent: list[int], number: int) -> int:
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = parent[number]
    return number
