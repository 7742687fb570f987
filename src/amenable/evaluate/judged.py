"""Two systems by a judge that has seen every pair in both orders: who wins, and who says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from amenable.evaluate.both_orders import Orders, judge_bias, slices
from amenable.evaluate.judge_audit import Row as Audited
from amenable.evaluate.judge_audit import corrected_win_rate
from amenable.evaluate.ranking import Game
from amenable.evaluate.side_by_side import compare_scores
from amenable.evaluate.statistics import Floats
from amenable.judges.types import Verdict

if TYPE_CHECKING:
    from amenable.data.schemas import Prompt
    from amenable.judges.asking import Look

MOST_INVALID = 0.05
"""Share of replies without a verdict above which a comparison is not to be trusted."""

_QUARTERS = ("shortest", "second", "third", "longest")
_FEWEST = 10  # prompts of a slice that is shown


def judged(
    name_a: str,
    name_b: str,
    judge: str,
    looks: Sequence[Look],
    *,
    seed: int,
    bootstrap_samples: int = 2000,
    audited: Sequence[Audited] | None = None,
) -> dict[str, Any]:
    """What the looks at the answers of systems a and b say; plain numbers, ready for JSON.

    Beside what `side_by_side.compare` returns: `verdicts` (how often each was said), `invalid`
    (share of replies), `left_out` (prompts without a valid verdict in each order), `bias` of the
    judge and `slices` of the prompts. With `audited` rows of the judge also `corrected_win_rate`,
    that people would give, and its interval; null where the judge is no better than chance.

    Raises:
        DataError: no prompt has a valid verdict in both orders.
    """
    orders = Orders.of(looks)
    pairs = {look.pair.prompt.id: look.pair for look in looks}
    words_a, words_b = (
        {name: float(len(text.split())) for name, text in texts.items()}
        for texts in (
            {name: pair.a for name, pair in pairs.items()},
            {name: pair.b for name, pair in pairs.items()},
        )
    )
    said = Counter(look.reply.verdict for look in looks)
    found = compare_scores(
        name_a,
        name_b,
        judge,
        orders.scores,
        [words_a[name] for name in orders.prompts],
        [words_b[name] for name in orders.prompts],
        seed=seed,
        bootstrap_samples=bootstrap_samples,
    )
    prompts = [pairs[name].prompt for name in orders.prompts]
    return {
        **found,
        "verdicts": {str(verdict): said[verdict] for verdict in Verdict},
        "invalid": said[Verdict.INVALID] / len(looks),
        "left_out": len(orders.left_out),
        "bias": judge_bias(orders, words_a, words_b),
        "slices": slices(orders.scores, parts(prompts)),
        **_corrected(orders.scores, audited),
    }


def _corrected(scores: Floats, audited: Sequence[Audited] | None) -> dict[str, Any]:
    if audited is None:
        return {}
    found = corrected_win_rate(scores, audited)
    if found is None:
        return {"corrected_win_rate": None, "corrected_ci95": None}
    value, interval = found
    return {"corrected_win_rate": value, "corrected_ci95": [interval.low, interval.high]}


def games(name_a: str, name_b: str, looks: Sequence[Look]) -> list[Game]:
    """The same looks as games of a ranking, one a prompt."""
    orders = Orders.of(looks)
    return [
        Game(prompt, name_a, name_b, score)
        for prompt, score in zip(orders.prompts, orders.scores.tolist(), strict=True)
    ]


def parts(prompts: Sequence[Prompt]) -> Mapping[str, Any]:
    """[n] membership by slice: quarters by the prompt's words, and the rows' own `tag` or `tags`.

    A prompt that comes several times counts once and lies in one quarter. Slices of fewer than ten
    prompts are left out.
    """
    number = {turns: n for n, turns in enumerate(dict.fromkeys(p.messages for p in prompts))}
    of = np.array([number[prompt.messages] for prompt in prompts], dtype=int)
    words = np.array([len(turns[-1].content.split()) for turns in number])
    quarter = np.empty(len(words), dtype=int)
    quarter[np.argsort(words, kind="stable")] = np.arange(len(words)) * 4 // max(1, len(words))
    found = {f"prompt length: {name}": quarter[of] == n for n, name in enumerate(_QUARTERS)}
    tags = [_tags(prompt) for prompt in prompts]
    for tag in sorted({tag for own in tags for tag in own}):
        found[f"tag: {tag}"] = np.array([tag in own for own in tags])
    return {name: member for name, member in found.items() if len(set(of[member])) >= _FEWEST}


def _tags(prompt: Prompt) -> list[str]:
    own = prompt.meta.get("tags", prompt.meta.get("tag"))
    return [str(tag) for tag in own] if isinstance(own, list) else [str(own)] if own else []
