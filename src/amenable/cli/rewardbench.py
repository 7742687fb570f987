"""`amenable audit` on rows of RewardBench: a reward model's scores, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from amenable.evaluate.rewardbench import Edition, Item
    from amenable.judges.scores import ScoreJudge

_AT_ONCE = 32  # rows that are scored between two looks at the clock


def audit_on_rewardbench(
    judge: ScoreJudge, items: Sequence[Item], edition: Edition, out: Path, as_json: bool
) -> None:
    """Score all answers, write `rewardbench.json` and `rewardbench.jsonl`, and say it.

    Raises:
        DataError: no row is scored.
    """
    import json

    from amenable.artifacts import Progress, write_json, write_jsonl
    from amenable.evaluate.rewardbench import figures
    from amenable.rollout.rewards import Failed

    rows: list[dict[str, Any]] = []
    scores: list[list[float] | None] = []
    with Progress().track(len(items), f"audit: {judge.name}") as tracker:
        for start in range(0, len(items), _AT_ONCE):
            part = items[start : start + _AT_ONCE]
            given = iter(
                judge.scores(
                    [item.prompt for item in part for _ in item.answers],
                    [answer for item in part for answer in item.answers],
                )
            )
            for item in part:
                own = [next(given) for _ in item.answers]
                reasons = [score.reason for score in own if isinstance(score, Failed)]
                known = [None if isinstance(score, Failed) else score for score in own]
                scores.append(None if reasons else [score for score in known if score is not None])
                rows.append(
                    {
                        "id": item.prompt.id,
                        "subset": item.subset,
                        "chosen": known[: len(item.chosen)],
                        "rejected": known[len(item.chosen) :],
                        "reason": reasons[0] if reasons else None,
                    }
                )
            tracker.advance(len(part))
    result = {
        "judge": judge.name,
        "edition": edition,
        "rows": len(items),
        **figures(items, scores, edition),
    }
    write_jsonl(out / "rewardbench.jsonl", rows)
    write_json(out / "rewardbench.json", result)
    reason = next((row["reason"] for row in rows if row["reason"]), "")
    typer.echo(json.dumps(result, indent=2) if as_json else _shown(result, reason, out))


def _shown(result: Mapping[str, Any], reason: str, out: Path) -> str:
    """A table for the terminal, with what it lacks."""
    name = "RewardBench" if result["edition"] == 1 else "RewardBench 2"
    lines = [f"{result['judge']} on {name}, {result['rows']} rows"]
    for row in result["domains"]:
        chance = "" if row["chance"] is None else f"; chance {row['chance']:.3f}"
        lines.append(
            f"{_line(row['domain'], row['score'], row['ci95'])}, {row['rows']} rows{chance}"
        )
    lines.append(_line("mean of them", result["overall"], result["overall_ci95"]))
    if result["missing"]:
        lines.append(f"  Not among the rows, so not in the mean: {', '.join(result['missing'])}.")
    if result["left_out"]:
        lines.append(f"  {result['left_out']} rows have no score and are left out ({reason}).")
    tied = result.get("ties")
    if tied is not None and result["overall_ci95"] is None:
        lines.append(
            "  Ties has rows without their partner (ref:N and tied:N): neither its interval nor "
            "the mean's is known."
        )
    return "\n".join([*lines, f"{out / 'rewardbench.json'}, {out / 'rewardbench.jsonl'}"])


def _line(name: str, value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return f"  {name:<14} not defined"
    known = "" if interval is None else f"  [{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"  {name:<14} {value:6.3f}{known}"
