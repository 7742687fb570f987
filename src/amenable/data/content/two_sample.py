"""How far apart two sets of prompts are: a classifier two-sample test on their words.

A logistic regression on which words a prompt has is trained to tell the sets apart and judged on
prompts it has not seen. The area under its ROC curve is the probability that it ranks a random
prompt of the second set above one of the first: 0.5 for the same distribution, 1 for sets that it
always tells apart. It sees words only, not their order or meaning.

Source: Lopez-Paz and Oquab 2017, arXiv:1610.06545 (with the AUC in place of the accuracy).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Json = dict[str, Any]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

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

_WORD = re.compile(r"[^\W_]+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Separation:
    """How well a classifier tells two sets of prompts apart."""

    auc: float
    error: float
    """Standard error of the AUC of sets that do not differ."""

    prompts: tuple[int, int]
    words: tuple[tuple[str, ...], tuple[str, ...]]
    """Words that speak most for the first and for the second set."""


def words_of(text: str) -> frozenset[str]:
    """Casefolded words and marks of the text, each once."""
    return frozenset(_WORD.findall(text.casefold()))


def separation(
    first: Sequence[frozenset[str]],
    second: Sequence[frozenset[str]],
    keys: Sequence[int],
) -> Separation | None:
    """The cross-fitted AUC of a classifier of words; None with fewer than FEWEST of a set.

    Args:
        first: words of each prompt of the first set.
        second: words of each prompt of the second set.
        keys: [n] key of each prompt, those of the first set first. Prompts of equal key are in one
            fold, so that a prompt in both sets cannot be learnt by heart.
    """
    if min(len(first), len(second)) < FEWEST:
        return None
    texts = [*first, *second]
    labels = np.repeat([0.0, 1.0], [len(first), len(second)])
    vocabulary = _vocabulary(texts)
    features = _features(texts, vocabulary)
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
    return Separation(
        auc=float(np.average(aucs, weights=weights)) if aucs else 0.5,
        error=float(np.sqrt((m + n + 1) / (12 * m * n))),
        prompts=(m, n),
        words=_telling(_fit(features, labels)[:-1], vocabulary),
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


def _vocabulary(texts: Sequence[frozenset[str]]) -> dict[str, int]:
    """Number of each word that stands in FEWEST_PROMPTS or more, most common first."""
    counts = Counter(word for text in texts for word in text)
    common = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:VOCABULARY]
    return {
        word: number
        for number, (word, count) in enumerate(common)
        if count >= FEWEST_PROMPTS  # counts descend, so that numbers have no gap
    }


def _features(texts: Sequence[frozenset[str]], vocabulary: dict[str, int]) -> Any:
    """[n, V] sparse rows of unit length: which words a text has, however many."""
    from scipy.sparse import csr_array

    columns = [sorted(vocabulary[word] for word in text if word in vocabulary) for text in texts]
    sizes = np.array([len(row) for row in columns])
    values = np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes)
    indices = np.array([column for row in columns for column in row], np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return csr_array((values, indices, starts), shape=(len(texts), max(1, len(vocabulary))))


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
        options={"maxiter": 200},
    )
    return np.asarray(found.x, np.float64)


def _telling(
    weights: Floats, vocabulary: dict[str, int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words of the most negative and of the most positive weights."""
    words = list(vocabulary)
    order = np.argsort(weights[: len(words)], kind="stable")
    return (
        tuple(words[n] for n in order[:WORDS] if weights[n] < 0),
        tuple(words[n] for n in order[::-1][:WORDS] if weights[n] > 0),
    )
