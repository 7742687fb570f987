"""The reward model's audit on held-out pairs: accuracy beside simple baselines, and calibration.

A reward model that does not beat "the longer one wins" or a bag of words has learnt nothing that
would justify training a policy on it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit
from scipy.stats import spearmanr

from amenable.data.schemas import Choice, Preference
from amenable.errors import DataError
from amenable.evaluate import statistics
from amenable.evaluate.statistics import Floats

PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""L2 penalties among which cross-validation on the training pairs chooses for the bag of words."""


def reward_report(
    train: Sequence[Preference], test: Sequence[Preference], margins: npt.ArrayLike, seed: int
) -> dict[str, Any]:
    """The `reward` section of `summary.json` that comes from held-out pairs.

    Args:
        train: the pairs the reward model was trained on; the bag of words learns from them.
        test: held-out pairs. Ties are counted in `ties_eval` and otherwise left out.
        margins: [len(test)] score of `chosen` minus score of `rejected`, in logits.
        seed: of the folds of the baseline and of the null band of the calibration error.

    Returns:
        Plain numbers, ready for JSON. Accuracies count a margin (or length difference) of 0 as
        one half; `accuracy_ci95` is clustered by prompt. `ece`, `brier` and `log_loss` are those of
        sigmoid(margin) as it stands, `temperature` is what would calibrate it best.
        `length_correlation` is Spearman's between score and length differences (words).

    Raises:
        DataError: margins of another length or not finite, or no pair that is not a tie.
    """
    values = np.asarray(margins, dtype=np.float64)
    if values.shape != (len(test),) or not np.isfinite(values).all():
        raise DataError(
            f"the reward report needs one finite margin for each of {len(test)} held-out pairs"
        )
    decided = [pair.choice is not Choice.TIE for pair in test]
    pairs = [pair for pair, keep in zip(test, decided, strict=True) if keep]
    values = values[np.asarray(decided, dtype=bool)]
    if not pairs:
        raise DataError("no held-out pair has a winner; add preference rows whose choice is 0 or 1")
    learnable = [pair for pair in train if pair.choice is not Choice.TIE]
    return {
        "pairs_train": len(learnable),
        "pairs_eval": len(pairs),
        "ties_eval": len(test) - len(pairs),
        **_accuracy(pairs, values),
        **_baselines(learnable, pairs, seed),
        **_calibration(values, seed),
        "length_correlation": _length_correlation(pairs, values),
    }


def _half_step(differences: Floats) -> Floats:
    """[n] 1 where positive, 0 where negative, one half at 0."""
    return 0.5 + 0.5 * np.sign(differences)


def _accuracy(pairs: Sequence[Preference], margins: Floats) -> dict[str, Any]:
    """Accuracy, its interval over prompts, and accuracy by the size of the margin."""
    correct = _half_step(margins)
    interval = statistics.win_rate_interval(correct, [pair.prompt.group for pair in pairs])
    order = np.argsort(np.abs(margins), kind="stable")
    parts = [p for p in np.array_split(order, min(10, max(1, len(pairs) // 20))) if p.size]
    return {
        "accuracy": float(correct.mean()),
        "accuracy_ci95": interval.as_list(),
        "by_margin": [
            {
                "margin_low": float(np.abs(margins[p]).min()),
                "margin_high": float(np.abs(margins[p]).max()),
                "accuracy": float(correct[p].mean()),
                "n": int(p.size),
            }
            for p in parts
        ],
    }


def _calibration(margins: Floats, seed: int) -> dict[str, Any]:
    """How far sigmoid(margin) can be read as a probability."""
    confidence = expit(np.abs(margins))
    correct = _half_step(margins)
    return {
        "ece": statistics.expected_calibration_error(confidence, correct),
        "ece_null95": statistics.calibration_error_null(confidence, seed=seed),
        "temperature": statistics.fit_temperature(margins),
        "brier": statistics.brier(expit(margins), np.ones_like(margins)),
        "log_loss": statistics.log_loss(margins),
        "calibration": [asdict(b) for b in statistics.calibration_bins(confidence, correct)],
    }


def _baselines(
    train: Sequence[Preference], test: Sequence[Preference], seed: int
) -> dict[str, float | None]:
    """Accuracy of rules that read no meaning; the bag of words is null without training pairs."""
    longer = np.array([_longer(pair) for pair in test], dtype=np.float64)
    longest = float(_half_step(longer).mean())
    words = bag_of_words_accuracy(train, test, seed) if train else None
    return {
        "longest_wins_accuracy": longest,
        "shortest_wins_accuracy": 1 - longest,
        "bag_of_words_accuracy": words,
    }


def _longer(pair: Preference) -> int:
    """1 if the chosen text is longer, -1 if the rejected, 0 if neither (words, then characters)."""
    chosen = (len(pair.chosen.split()), len(pair.chosen))
    rejected = (len(pair.rejected.split()), len(pair.rejected))
    return (chosen > rejected) - (chosen < rejected)


def _length_correlation(pairs: Sequence[Preference], margins: Floats) -> float | None:
    """Spearman's correlation of score and length differences, free of the order of the candidates.

    Each pair enters in both directions, (d, l) and (-d, -l). Null if all lengths or margins agree.
    """
    lengths = np.array(
        [len(p.chosen.split()) - len(p.rejected.split()) for p in pairs], dtype=np.float64
    )
    if not lengths.any() or not margins.any():
        return None
    found = spearmanr(np.append(margins, -margins), np.append(lengths, -lengths))
    return float(found.statistic)


# The bag-of-words baseline -------------------------------------------------------------------


def bag_of_words_accuracy(
    train: Sequence[Preference], test: Sequence[Preference], seed: int
) -> float:
    """Held-out accuracy of an L2 logistic regression on word-count and length differences.

    Learns from `train` only: the vocabulary (words of at least two training candidates), the
    penalty (five-fold cross-validation by prompt) and the weights. A margin of 0 is one half.
    """
    vocabulary = _vocabulary(train)
    features = _differences(train, vocabulary)
    penalty = _choose_penalty(features, [pair.prompt.group for pair in train], seed)
    weights = _fit(features, penalty)
    return float(_half_step(_differences(test, vocabulary) @ weights).mean())


def _words(text: str) -> Counter[str]:
    """Casefolded words with their counts."""
    return Counter(re.findall(r"\w+", text.casefold()))


def _vocabulary(pairs: Sequence[Preference]) -> dict[str, int]:
    """Column of each word that at least two candidates use."""
    documents: Counter[str] = Counter()
    for pair in pairs:
        documents.update(_words(pair.candidate_0).keys())
        documents.update(_words(pair.candidate_1).keys())
    shared = sorted(word for word, count in documents.items() if count > 1)
    return {word: column for column, word in enumerate(shared)}


def _differences(pairs: Sequence[Preference], vocabulary: dict[str, int]) -> csr_matrix:
    """[n, V + 1] counts in chosen minus rejected; the last column is all words over 10."""
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for row, pair in enumerate(pairs):
        counts = _words(pair.chosen)
        counts.subtract(_words(pair.rejected))
        found = [
            (vocabulary[word], float(n)) for word, n in counts.items() if n and word in vocabulary
        ]
        found.append((len(vocabulary), counts.total() / 10))
        rows += [row] * len(found)
        columns += [column for column, _ in found]
        values += [value for _, value in found]
    return csr_matrix((values, (rows, columns)), shape=(len(pairs), len(vocabulary) + 1))


def _fit(features: csr_matrix, penalty: float) -> Floats:
    """[V + 1] weights that minimise mean log(1 + exp(-x·w)) + penalty/2 |w|² (no intercept)."""

    def objective(w: Floats) -> tuple[float, Floats]:
        margins = features @ w
        loss = np.logaddexp(0.0, -margins).mean() + penalty / 2 * (w @ w)
        slope = features.T @ -expit(-margins) / features.shape[0] + penalty * w
        return float(loss), slope

    found = minimize(objective, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B")
    return np.asarray(found.x, dtype=np.float64)


def _choose_penalty(features: csr_matrix, groups: Sequence[str], seed: int) -> float:
    """The penalty with the smallest cross-validated loss; prompts stay within one fold."""
    names = sorted(set(groups))
    if len(names) < 5:
        return PENALTIES[-1]
    fold_of = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % 5, strict=True))
    folds = np.array([fold_of[group] for group in groups])

    def held_out_loss(penalty: float) -> float:
        losses = [
            np.logaddexp(0.0, -(features[folds == k] @ _fit(features[folds != k], penalty))).sum()
            for k in range(5)
        ]
        return float(sum(losses))

    return min(PENALTIES, key=held_out_loss)
