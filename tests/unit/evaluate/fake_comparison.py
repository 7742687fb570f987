"""What `amenable compare` would have left in a folder, without a model or a judge, from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from amenable.artifacts import write_json, write_jsonl
from amenable.data.schemas import Message, Prompt, Speaker
from amenable.evaluate.judged import games, judged
from amenable.evaluate.ranking import rank
from amenable.judges.asking import IDENTICAL, Look, Pair
from amenable.judges.types import Reply, Verdict

_WORDS = (  # noqa: SIM905 - a text is easier to read than a list
    "the letter says that payment is due on the first of each month and asks for a reply before "
    "winter while the council has not agreed who should mend the old bridge near our mill"
).split()


def _text(rng: np.random.Generator, low: int, high: int) -> str:
    text = " ".join(rng.choice(_WORDS, size=int(rng.integers(low, high))))
    return text[0].upper() + text[1:] + "."


def _verdict(rng: np.random.Generator, lead: float) -> Verdict:
    """Of a look at two answers of which the first is better by `lead`."""
    draw = rng.random()
    if draw < 0.02:
        return Verdict.INVALID
    if draw < 0.04:
        return Verdict.BOTH_BAD
    felt = lead + 0.15 + rng.normal(0, 0.5)  # it likes the first place
    return Verdict.TIE if abs(felt) < 0.2 else Verdict.FIRST if felt > 0 else Verdict.SECOND


def _looks(rng: np.random.Generator, pair: Pair, lead: float, reply: int) -> list[Look]:
    """Both orders; `lead` is that of b."""
    if pair.a == pair.b:
        return [Look(pair, swapped, IDENTICAL) for swapped in (False, True)]
    found = []
    for swapped in (False, True):
        verdict = _verdict(rng, lead if swapped else -lead)
        confidence = float(rng.uniform(0.5, 1)) if rng.random() < 0.5 else None
        text = f"{_text(rng, reply // 2, reply)}\nVerdict: {verdict}"
        found.append(Look(pair, swapped, Reply(verdict, text, confidence, 200, 40)))
    return found


def build(
    folder: Path,
    *,
    prompts: int = 60,
    systems: Sequence[str] = ("base", "tuned"),
    judges: Sequence[str] = ("gpt-4.1",),
    reply: int = 30,
    seed: int = 0,
    **changed: Any,
) -> dict[str, Any]:
    """Writes the three files and returns what is in `comparison.json`; later systems are better.

    Args:
        folder: where to.
        prompts: how many.
        systems: names.
        judges: names.
        reply: most words of a reply.
        seed: of everything.
        changed: keys of `comparison.json` to be other than they would be.
    """
    rng = np.random.default_rng(seed)
    asked = [
        Prompt(
            messages=(Message(Speaker.USER, _text(rng, 20, 70)),),
            id=f"letter-{n}",
            group="",
            meta={"tags": ["short" if n % 3 else "long"]},
        )
        for n in range(prompts)
    ]
    texts = [{name: _text(rng, 8, 14 + 4 * k) for k, name in enumerate(systems)} for _ in asked]
    for own in texts[::9]:
        own[systems[1]] = own[systems[0]]
    comparisons, rankings, rows = [], {}, []
    for judge in judges:
        played = []
        for a, b in combinations(systems, 2):
            lead = 0.35 * (systems.index(b) - systems.index(a))
            looks = [
                look
                for prompt, own in zip(asked, texts, strict=True)
                for look in _looks(rng, Pair(prompt, own[a], own[b]), lead, reply)
            ]
            spent = {
                "calls": 7,
                "prompt_tokens": 200 * prompts,
                "completion_tokens": 4000,
                "cost": 0.25,
            }
            comparisons.append(judged(a, b, judge, looks, seed=0, bootstrap_samples=40) | spent)
            played += games(a, b, looks)
            rows += [_row(judge, a, b, look) for look in looks]
        if len(systems) > 2:
            rankings[judge] = rank(played).rows()
    figures = {"distinct_1": 0.41, "distinct_2": 0.83, "distinct_3": 0.96, "duplicates": 0.03125}
    result = {
        "comparisons": comparisons,
        "rankings": rankings,
        "unanswered": {},
        "diversity": dict.fromkeys(systems, figures),
        **changed,
    }
    write_json(folder / "comparison.json", result)
    write_jsonl(folder / "looks.jsonl", rows)
    write_jsonl(
        folder / "completions.jsonl",
        (
            {"id": prompt.id, "input_text": prompt.text, "completions": own}
            for prompt, own in zip(asked, texts, strict=True)
        ),
    )
    return result


def _row(judge: str, a: str, b: str, look: Look) -> dict[str, Any]:
    return {
        "judge": judge,
        "a": a,
        "b": b,
        "id": look.pair.prompt.id,
        "first": b if look.swapped else a,
        "verdict": str(look.reply.verdict),
        "confidence": look.reply.confidence,
        "reply": look.reply.text,
    }
