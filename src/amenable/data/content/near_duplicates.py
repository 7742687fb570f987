"""Near duplicates of prompts: MinHash finds candidate pairs, exact Jaccard similarity decides.

A text is the set of its runs of SHINGLE words, case and punctuation apart. Two texts are near
duplicates where |A ∩ B| / |A ∪ B| >= THRESHOLD. One word changed in the middle of n costs three
runs, (n - 5) / (n + 1): it counts as a near duplicate from 29 words on; in shorter prompts only
case, punctuation or the first or last words may differ. Paraphrases are not found.

Source: Broder 1997, "On the resemblance and containment of documents".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from amenable.data.content.words import BASE, Words

Integers = npt.NDArray[np.int64]

SHINGLE = 3
"""Words a run; chosen here: five would ask prompts of 46 words for one changed word."""

THRESHOLD = 0.8
"""Jaccard similarity of near duplicates, as in Lee et al. 2022, arXiv:2107.06499, section 4.2."""

BANDS, BAND_ROWS = 21, 6
"""126 of 128 hashes in 21 bands of 6: a pair of similarity s becomes a candidate with probability
1 - (1 - s^6)^21: 0.998 at 0.8, 0.28 at 0.5."""

HASHES = 128
SEED = 20
MAX_COMPARED = 50
"""Representatives of a bucket that a text is compared with: keeps boilerplate from costing n²."""

AT_ONCE = 1000
"""Texts whose signatures are made at a time: they pass through lists of Python's numbers."""


def jaccard(a: Words, b: Words) -> float:
    """Shared over all elements of two ascending distinct arrays, in [0, 1]; 1 if both are empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 1.0


def are_near(a: Words, b: Words) -> bool:
    """Whether two shingled texts are near duplicates."""
    if min(len(a), len(b)) < THRESHOLD * max(len(a), len(b)):
        return False
    return jaccard(a, b) >= THRESHOLD


def near_clusters(texts: Sequence[Words]) -> Integers:
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


def _signatures(texts: Sequence[Words]) -> npt.NDArray[np.uint32]:
    """[n, HASHES] MinHash signatures."""
    from rensa import RMinHash

    found = np.empty((len(texts), HASHES), np.uint32)
    for first in range(0, len(texts), AT_ONCE):
        part = texts[first : first + AT_ONCE]
        flat = np.concatenate(part).astype(np.uint64)
        offsets = np.concatenate([[0], np.cumsum([len(text) for text in part])]).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, HASHES, SEED)
        found[first : first + AT_ONCE] = matrix.to_rows()
    return found


def _buckets(columns: npt.NDArray[np.uint32]) -> Iterable[Integers]:
    """Groups of two or more rows that are equal in all columns."""
    whole = np.zeros(len(columns), np.uint64)
    for column in columns.T:  # modulo 2^64: one sort in place of one a column
        whole = (whole ^ column) * np.uint64(BASE)
    order = np.argsort(whole, kind="stable")
    ordered = whole[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True])
    for number in np.flatnonzero(np.diff(starts) > 1):
        yield order[starts[number] : starts[number + 1]]


def _link(bucket: Sequence[int], texts: Sequence[Words], parent: list[int]) -> None:
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
