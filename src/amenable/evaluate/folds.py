"""Cross-validation of a reward on pairs: folds that keep a group together, and honest intervals.

Each row is held out exactly once; what was predicted for it is pooled over the folds. Rows of one
group (a prompt, a document) stand in one fold and count as one draw in the intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

from amenable.data.splits import rank_bits
from amenable.errors import DataError
from amenable.evaluate.statistics import Floats, Interval, effective_trials, wilson


def group_folds(groups: Sequence[str], folds: int, seed: int) -> npt.NDArray[np.int64]:
    """[n] fold of each row, from 0; the rows of a group share one.

    Groups are dealt out from the largest to the smallest, each to the fold with the fewest rows;
    the seed orders groups of equal size. Folds of few large groups come out as even as they can.

    Args:
        groups: [n] name of each row's group.
        folds: how many, at least 2.
        seed: of the order among groups of equal size.

    Raises:
        DataError: fewer than two folds, or fewer groups than folds.
    """
    sizes = Counter(groups)
    if not 2 <= folds <= len(sizes):
        raise DataError(
            f"{folds} folds of {len(sizes)} groups; take at least 2 folds and at most one a group"
        )
    filled = [0] * folds
    fold_of: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], rank_bits(name, seed), name)):
        fold_of[name] = min(range(folds), key=lambda fold: (filled[fold], fold))
        filled[fold_of[name]] += sizes[name]
    return np.array([fold_of[name] for name in groups], dtype=np.int64)


def half_step(margins: npt.ArrayLike) -> Floats:
    """[n] 1 where the margin is positive (the chosen side won), 0 where negative, one half at 0.

    Raises:
        DataError: a margin is not finite.
    """
    values = np.asarray(margins, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError("a held-out margin is not finite; the reward model did not train")
    return 0.5 + 0.5 * np.sign(values)


def clustered_interval(correct: npt.ArrayLike, groups: Sequence[object]) -> Interval:
    """95 % interval of a mean of scores in [0, 1] whose rows are drawn in groups.

    Wilson's with the effective number of trials, as `statistics.win_rate_interval`, but with the
    quantile of Student's t at G - 1 degrees for G groups: with 17 documents, 2.12 in place of 1.96.
    It tells how the mean would vary with other groups, not with other training runs.

    Measured coverage, 2,000 simulations a cell, accuracies 0.5 and 0.7 that scatter over groups
    with a standard deviation of 0.15 to 0.17: 94.1 to 94.8 % with 17 and 21 groups of 6 to 30 rows
    (with the normal quantile 91.7 to 93.5 %), 94.8 and 95.2 % with 72 groups of 1 to 10 rows. The
    tests repeat it with fewer.

    Args:
        correct: [n] in [0, 1].
        groups: [n] label of each row's group; at least two different.

    Raises:
        DataError: fewer than two groups; scores empty, not finite or out of range.

    Source: Cameron and Miller 2015, section VI (few clusters: t with G - 1 degrees).
    """
    count = len(set(groups))
    if count < 2:
        raise DataError("an interval over groups needs at least two; give rows of other prompts")
    trials = effective_trials(correct, groups)
    level = 2 * float(ndtr(stdtrit(count - 1, 0.975))) - 1
    mean = float(np.asarray(correct, dtype=np.float64).mean())
    return wilson(min(mean, 1.0) * trials, trials, level)


def paired_difference(
    correct: npt.ArrayLike, baseline: npt.ArrayLike, groups: Sequence[object]
) -> tuple[float, Interval]:
    """Accuracy minus a baseline's on the same rows, and its 95 % interval over groups.

    The differences d in [-1, 1] go through `clustered_interval` as (1 + d)/2: rows on which both
    are right or both wrong carry no difference and make the interval narrower. Measured coverage in
    the same simulations, beside a baseline of 0.5: 93.5 to 95.2 %.

    Args:
        correct: [n] in [0, 1].
        baseline: [n] in [0, 1], of the same rows.
        groups: [n] label of each row's group.

    Raises:
        DataError: as `clustered_interval`.
    """
    halved = (1 + np.asarray(correct, dtype=np.float64) - np.asarray(baseline)) / 2
    found = clustered_interval(halved, groups)
    return float(2 * halved.mean() - 1), Interval(2 * found.low - 1, 2 * found.high - 1)


def held_out_accuracy(margins: npt.ArrayLike, groups: Sequence[object]) -> dict[str, Any]:
    """`accuracy`, `accuracy_ci95`, `rows` and `clusters` of pooled held-out margins.

    Args:
        margins: [n] score of the chosen minus score of the rejected, of the fold's own model.
        groups: [n] label of each row's group.

    Raises:
        DataError: as `half_step` and `clustered_interval`.
    """
    correct = half_step(margins)
    return {
        "rows": int(correct.size),
        "clusters": len(set(groups)),
        "accuracy": float(correct.mean()),
        "accuracy_ci95": clustered_interval(correct, groups).as_list(),
    }
