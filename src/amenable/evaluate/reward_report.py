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
from amenable.evaluate.both_orders import holm
from amenable.evaluate.judged import parts
from amenable.evaluate.statistics import Floats

ABOUT_EQUAL = 0.1
"""Most that the longer candidate of a length-matched pair has more words, as a share of its own."""

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
        one half; intervals are clustered by prompt; p values are of the sign test against a coin,
        each prompt (`group`) by the mean of its pairs, `p_holm` for all slices together. `ece`,
        `brier` and `log_loss` are those of sigmoid(margin) as it stands, `temperature` is what
        would calibrate it best.
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
        **_by_length(pairs, values),
        "slices": _slices(pairs, values),
        **_baselines(learnable, pairs, seed),
        **_calibration(values, seed),
        "length_correlation": _length_correlation(pairs, values),
    }


def _half_step(differences: Floats) -> Floats:
    """[n] 1 where positive, 0 where negative, one half at 0."""
    return 0.5 + 0.5 * np.sign(differences)


def _accuracy(pairs: Sequence[Preference], margins: Floats) -> dict[str, Any]:
    """Accuracy, its interval over prompts, and accuracy by the size of the margin."""
    correct, prompts = _half_step(margins), _prompts(pairs)
    order = np.argsort(np.abs(margins), kind="stable")
    bins = [p for p in np.array_split(order, min(10, max(1, len(pairs) // 20))) if p.size]
    return {
        "accuracy": float(correct.mean()),
        "accuracy_ci95": statistics.win_rate_interval(correct, prompts).as_list(),
        "accuracy_p_value": _against_a_coin(correct, prompts),
        "by_margin": [
            {
                "margin_low": float(np.abs(margins[p]).min()),
                "margin_high": float(np.abs(margins[p]).max()),
                "accuracy": float(correct[p].mean()),
                "n": int(p.size),
            }
            for p in bins
        ],
    }


def _prompts(pairs: Sequence[Preference]) -> list[str]:
    return [pair.prompt.group for pair in pairs]


def _against_a_coin(correct: Floats, prompts: Sequence[str]) -> float:
    """Two-sided p of the exact sign test: prompts of which more than half of the pairs are right.

    Exact under a coin whatever the pairs of a prompt have in common.
    """
    surplus: dict[str, float] = dict.fromkeys(prompts, 0.0)
    for prompt, right in zip(prompts, correct.tolist(), strict=True):
        surplus[prompt] += right - 0.5
    signs = np.sign(list(surplus.values()))
    return statistics.sign_test_p(int((signs > 0).sum()), int((signs < 0).sum()))


def _by_length(pairs: Sequence[Preference], margins: Floats) -> dict[str, Any]:
    """Accuracy that length alone cannot give: at about equal length, and with both ways alike.

    `length_balanced_accuracy` is the mean of that where the longer candidate is the better one and
    of that where the shorter is; any rule on which is longer scores one half. A figure is null
    where it has no pairs.
    """
    correct, prompts = _half_step(margins), np.array(_prompts(pairs), dtype=object)
    words = np.array([[len(p.chosen.split()), len(p.rejected.split())] for p in pairs])
    alike = np.abs(words[:, 0] - words[:, 1]) <= ABOUT_EQUAL * words.max(1)
    longer = np.array([_longer(pair) for pair in pairs])
    matched, longer_better, shorter_better = (
        _estimate(correct[member], list(prompts[member]))
        for member in (alike, longer > 0, longer < 0)
    )
    uneven = longer != 0
    ways = [str(sign) for sign in longer[uneven]]
    balanced: tuple[float | None, list[float] | None] = None, None
    if len(set(ways)) == 2:
        interval = statistics.balanced_interval(correct[uneven], ways, groups=list(prompts[uneven]))
        balanced = statistics.balanced_win_rate(correct[uneven], ways), interval.as_list()
    return {
        "length_matched_pairs": int(alike.sum()),
        "length_matched_accuracy": matched[0],
        "length_matched_ci95": matched[1],
        "longer_better_pairs": int((longer > 0).sum()),
        "longer_better_accuracy": longer_better[0],
        "longer_better_ci95": longer_better[1],
        "shorter_better_pairs": int((longer < 0).sum()),
        "shorter_better_accuracy": shorter_better[0],
        "shorter_better_ci95": shorter_better[1],
        "length_balanced_accuracy": balanced[0],
        "length_balanced_ci95": balanced[1],
    }


def _estimate(correct: Floats, prompts: Sequence[str]) -> tuple[float | None, list[float] | None]:
    """Accuracy and its interval over prompts; None without pairs."""
    if not correct.size:
        return None, None
    return float(correct.mean()), statistics.win_rate_interval(correct, prompts).as_list()


def _slices(pairs: Sequence[Preference], margins: Floats) -> list[dict[str, Any]]:
    """Accuracy in quarters by the prompt's length and by the rows' tags."""
    correct, prompts = _half_step(margins), np.array(_prompts(pairs), dtype=object)
    found: list[dict[str, Any]] = []
    for name, member in parts([pair.prompt for pair in pairs]).items():
        own, groups = correct[member], list(prompts[member])
        accuracy, interval = _estimate(own, groups)
        found.append(
            {
                "slice": name,
                "pairs": int(own.size),
                "prompts": len(set(groups)),
                "accuracy": accuracy,
                "accuracy_ci95": interval,
                "p_value": _against_a_coin(own, groups),
            }
        )
    for row, p in zip(found, holm([row["p_value"] for row in found]), strict=True):
        row["p_holm"] = p
    return found


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
