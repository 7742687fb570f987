"""How far apart two sets of prompts are: a classifier two-sample test on their words.

A logistic regression on which words a prompt has is trained to tell the sets apart and judged on
prompts it has not seen. The area under its ROC curve is the probability that it ranks a random
prompt of the second set above one of the first: 0.5 for the same distribution, 1 for sets that it
always tells apart. It sees words only, case and punctuation apart, not their order or meaning.

Source: Lopez-Paz and Oquab 2017, arXiv:1610.06545 (with the AUC in place of the accuracy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amenable.data.content.words import Words, ascending

Floats = npt.NDArray[np.float64]

DISTANCE_NOTE, DISTANCE_WARNING = 0.7, 0.9
"""AUC from which sets of prompts count as different, and as far apart. Chosen here: two samples of
one source give 0.5, two topics of one kind about 0.7 to 0.9, two tasks above 0.9."""

PROMPTS = 2000
"""Prompts of each set at most: the standard error of an AUC near 0.5 is then 0.009."""

FEWEST = 50
"""Prompts of each set at least; with fewer the standard error exceeds 0.058. Chosen here."""

FOLDS = 5
PENALTY = 1.0
"""Weight of ½|w|² against the summed log loss, scikit-learn's default C = 1."""

VOCABULARY, FEWEST_PROMPTS = 20_000, 3
"""Most words that are looked at, and in how many prompts a word must stand at least."""

WORDS = 8
"""Words of each side that are listed."""


@dataclass(frozen=True, slots=True)
class Separation:
    """How well a classifier tells two sets of prompts apart."""

    auc: float
    error: float
    """Standard error of the AUC of sets that do not differ."""

    prompts: tuple[int, int]
    words: tuple[tuple[int, ...], tuple[int, ...]]
    """Hashes of the words that speak most for the first and for the second set; empty below
    DISTANCE_NOTE."""


def separation(
    first: Sequence[Words], second: Sequence[Words], keys: Sequence[int]
) -> Separation | None:
    """The cross-fitted AUC of a classifier of words; None with fewer than FEWEST of a set.

    Args:
        first: hashes of the words of each prompt of the first set, as they follow each other.
        second: the same of the second set.
        keys: [n] key of each prompt, those of the first set first. Prompts of equal key are in one
            fold, so that a prompt in both sets cannot be learnt by heart.
    """
    if min(len(first), len(second)) < FEWEST:
        return None
    labels = np.repeat([0.0, 1.0], [len(first), len(second)])
    features, vocabulary = _features([*first, *second])
    folds = np.array([key % FOLDS for key in keys])
    aucs, weights = [], []
    for fold in range(FOLDS):
        left_out = folds == fold
        fitted = _fit(features[~left_out], labels[~left_out])
        scores = np.asarray(features[left_out] @ fitted[:-1] + fitted[-1])
        positives = int(labels[left_out].sum())
        pairs = positives * (int(left_out.sum()) - positives)
        if pairs:
            aucs.append(auc(scores, labels[left_out]))
            weights.append(pairs)
    m, n = len(first), len(second)
    found = float(np.average(aucs, weights=weights)) if aucs else 0.5
    is_told = found >= DISTANCE_NOTE
    return Separation(
        auc=found,
        error=float(np.sqrt((m + n + 1) / (12 * m * n))),
        prompts=(m, n),
        words=_telling(_fit(features, labels)[:-1], vocabulary) if is_told else ((), ()),
    )


def auc(scores: Floats, labels: Floats) -> float:
    """Probability that a positive scores above a negative, ties counted as half.

    Args:
        scores: [n] real numbers.
        labels: [n] 1 for a positive, 0 for a negative; both must occur.

    Source: Mann and Whitney 1947.
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = labels.sum()
    negatives = len(labels) - positives
    above = ranks[labels == 1].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def _features(texts: Sequence[Words]) -> tuple[Any, Words]:
    """Which words each text has, however many times, and the [V] words, ascending.

    Returns:
        [n, V] sparse rows of unit length, and the VOCABULARY words that stand in most texts, of
        those in FEWEST_PROMPTS or more.
    """
    from scipy.sparse import csr_array

    lengths = [len(text) for text in texts]
    numbers = np.repeat(np.arange(len(texts), dtype=np.uint64), lengths)
    # One number for text and word: sorting them makes each word of a text single.
    both = ascending((numbers << np.uint64(32)) | np.concatenate(texts))
    rows, words = (both >> np.uint64(32)).astype(np.int64), both.astype(np.uint32)
    distinct, counts = np.unique(words, return_counts=True)
    order = np.lexsort((distinct, -counts))[:VOCABULARY]
    vocabulary = np.sort(distinct[order[counts[order] >= FEWEST_PROMPTS]])
    kept = np.isin(words, vocabulary)
    rows, columns = rows[kept], np.searchsorted(vocabulary, words[kept])
    sizes = np.bincount(rows, minlength=len(texts))
    values = np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shape = (len(texts), max(1, len(vocabulary)))
    return csr_array((values, columns.astype(np.int32), starts), shape=shape), vocabulary


def _fit(features: Any, labels: Floats) -> Floats:
    """[V + 1] weights and, last, the intercept of a penalised logistic regression."""
    from scipy.optimize import minimize

    signs = 2 * labels - 1

    def loss(parameters: Floats) -> tuple[float, Floats]:
        weights = parameters[:-1]
        margins = signs * (features @ weights + parameters[-1])
        residuals = -signs * np.exp(-np.logaddexp(0, margins))
        gradient = np.append(features.T @ residuals + PENALTY * weights, residuals.sum())
        total = np.logaddexp(0, -margins).sum() + PENALTY / 2 * weights @ weights
        return float(total), gradient

    found = minimize(
        loss,
        np.zeros(features.shape[1] + 1),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 200, "ftol": 1e-6},  # of the loss: the AUC has two digits
    )
    return np.asarray(found.x, np.float64)


def _telling(weights: Floats, vocabulary: Words) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Words of the most negative and of the most positive weights."""
    order = np.argsort(weights[: len(vocabulary)], kind="stable")
    return (
        tuple(int(vocabulary[n]) for n in order[:WORDS] if weights[n] < 0),
        tuple(int(vocabulary[n]) for n in order[::-1][:WORDS] if weights[n] > 0),
    )
