"""Side-by-Side: two systems, the same prompts, one judge; who wins, and how sure is that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from amenable.errors import DataError
from amenable.evaluate import statistics


def verdicts(
    scores_a: npt.ArrayLike, scores_b: npt.ArrayLike, identical: Sequence[bool] | None = None
) -> statistics.Floats:
    """[n] 1 where b wins, 0 where a wins, 0.5 where the scores are equal or the texts identical.

    Args:
        scores_a: [n] the judge's score of system a's completion, any scale.
        scores_b: [n] the same of system b.
        identical: [n] True where both systems wrote the same text: a tie whatever the scores.

    Raises:
        DataError: lengths differ, no prompt, or a score is not finite.
    """
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    same = np.zeros(a.shape, dtype=bool) if identical is None else np.asarray(identical, dtype=bool)
    if not (a.ndim == 1 and a.size and a.shape == b.shape == same.shape):
        raise DataError(
            "Side-by-Side needs one score a prompt from both systems, "
            f"got shapes {a.shape} and {b.shape}; score the same prompts with both"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DataError(
            "a judge gave a score that is not finite; check the reward model or reward function"
        )
    return np.where(same, 0.5, 0.5 + 0.5 * np.sign(b - a))


def compare(
    name_a: str,
    name_b: str,
    judge: str,
    scores_a: npt.ArrayLike,
    scores_b: npt.ArrayLike,
    lengths_a: npt.ArrayLike,
    lengths_b: npt.ArrayLike,
    *,
    seed: int,
    bootstrap_samples: int = 2000,
    identical: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """One entry of `summary.json`'s `evaluate` list: system b against system a by one judge.

    Args:
        name_a: first system, e.g. `sft`.
        name_b: second system, e.g. `tuned`; `win_rate` is its.
        judge: who scored, e.g. `annotator` or `reward_model`.
        scores_a: [n] scores of a's completions; only which of two is higher counts.
        scores_b: [n] scores of b's completions.
        lengths_a: [n] lengths of a's completions, in one unit (the stage passes words).
        lengths_b: [n] lengths of b's completions.
        seed: of the bootstrap for the length-controlled interval.
        bootstrap_samples: resamples of the prompts in it.
        identical: [n] True where both wrote the same text; such prompts are ties.

    Returns:
        Plain numbers, ready for JSON. `smallest_detectable` is the distance of the win rate from
        0.5 that these prompts, with this many ties, would have shown with 80 % power.

    Raises:
        DataError: lengths differ, no prompt, or a score is not finite.
    """
    return compare_scores(
        name_a,
        name_b,
        judge,
        verdicts(scores_a, scores_b, identical),
        lengths_a,
        lengths_b,
        seed=seed,
        bootstrap_samples=bootstrap_samples,
    )


def compare_scores(
    name_a: str,
    name_b: str,
    judge: str,
    scores: statistics.Floats,
    lengths_a: npt.ArrayLike,
    lengths_b: npt.ArrayLike,
    *,
    seed: int,
    bootstrap_samples: int = 2000,
) -> dict[str, Any]:
    """`compare` from the prompts' scores, [n] in [0, 1]: above one half b wins, below it loses.

    Raises:
        DataError: lengths differ, or there is no prompt.
    """
    length_a, length_b = np.asarray(lengths_a, dtype=float), np.asarray(lengths_b, dtype=float)
    if not length_a.shape == length_b.shape == scores.shape:
        raise DataError(
            "Side-by-Side needs one length a completion; pass as many lengths as scores"
        )
    controlled = statistics.length_controlled_win_rate(scores, length_a, length_b)
    interval = statistics.length_controlled_interval(
        scores, length_a, length_b, seed=seed, samples=bootstrap_samples
    )
    return {
        "a": name_a,
        "b": name_b,
        "judge": judge,
        **_counts(scores),
        "win_rate": statistics.win_rate(scores),
        "win_rate_ci95": statistics.win_rate_interval(scores).as_list(),
        "length_controlled_win_rate": controlled,
        "length_controlled_ci95": interval.as_list(),
        "mean_length_a": float(length_a.mean()),
        "mean_length_b": float(length_b.mean()),
    }


def _counts(scores: statistics.Floats) -> dict[str, Any]:
    """Wins, ties and losses of b with the sign test and the smallest difference it could show."""
    wins, losses = int((scores > 0.5).sum()), int((scores < 0.5).sum())
    decisive = wins + losses
    detectable = statistics.smallest_detectable_difference(decisive) * decisive / scores.size
    return {
        "prompts": int(scores.size),
        "wins": wins,
        "ties": int(scores.size) - decisive,
        "losses": losses,
        "p_value": statistics.sign_test_p(wins, losses),
        "smallest_detectable": detectable if decisive else 0.5,
    }
