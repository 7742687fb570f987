"""Systems Side-by-Side: what they answer, what judges say of all pairs of them, and the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amenable.artifacts import Progress, write_json, write_jsonl
from amenable.config.load import recipe_beside
from amenable.data.reading.readers import read_prompts
from amenable.errors import StageError, UsageError
from amenable.evaluate.generate import Completer
from amenable.evaluate.judged import MOST_INVALID, games, judged
from amenable.evaluate.ranking import rank
from amenable.evaluate.statistics import text_diversity
from amenable.evaluate.systems import System, gather, model_source, read_completions
from amenable.judges.asking import Look, Pair, ask_both_orders
from amenable.judges.store import ReplyStore
from amenable.rollout.types import Sampling

if TYPE_CHECKING:
    from amenable.data.schemas import Prompt
    from amenable.evaluate.judge_audit import Row as Audited
    from amenable.judges import Judge

Json = dict[str, Any]
Ready = Mapping[str, Mapping[str, tuple["Prompt", str]]]


@dataclass(frozen=True)
class Answers:
    """What the systems wrote."""

    rows: list[tuple[Prompt, dict[str, str]]]
    """Each prompt with every system's completion."""
    diversity: dict[str, dict[str, float]]
    """Of the models at temperature 1: greedy answers hide that a model says one thing."""


@dataclass(frozen=True)
class Options:
    """What the analysis needs beside the replies."""

    seed: int
    price: tuple[float, float]
    """Of a million tokens to and from a service."""
    audits: Mapping[str, Sequence[Audited]]
    """Audited rows by judge, of those who were audited."""


@dataclass(frozen=True)
class Compared:
    """What judges said of the systems."""

    result: Json
    """`comparisons`, `rankings`, `unanswered` and `diversity`, as docs/compare.md has them."""
    looks: list[Json]
    """A row for each reply."""


def read_inputs(
    systems: Sequence[System], files: Sequence[str]
) -> tuple[list[Prompt] | None, Ready]:
    """Prompts and ready completions: what can be wrong with them is told before a model is loaded.

    Raises:
        UsageError: a model has no prompts to answer.
        DataError: a row is wrong, or a file lacks a prompt.
    """
    models = [system for system in systems if not system.is_file]
    if models and not files:
        raise UsageError(f"{models[0].name} has nothing to answer; name prompts with --prompts")
    asked = read_prompts(files) if files else None
    ready = {s.name: read_completions(s.source) for s in systems if s.is_file}
    if ready:
        list(gather([system for system in systems if system.is_file], asked, {}, ready))
    return asked, ready


def answer(
    systems: Sequence[System],
    asked: Sequence[Prompt] | None,
    ready: Ready,
    *,
    diversity: int,
    seed: int,
) -> Answers:
    """Every system's completion of every prompt; a model is loaded once, one at a time.

    Args:
        systems: models and files.
        asked: the prompts; None: those of the first file.
        ready: completions of the files, as `read_inputs` gives them.
        diversity: prompts that models also answer at temperature 1.
        seed: of the noise.

    Raises:
        ModelError: a model cannot be loaded.
    """
    greedy: dict[str, dict[str, str]] = {}
    diverse: dict[str, dict[str, float]] = {}
    for system in systems:
        if not system.is_file:
            greedy[system.name], sampled = _of_model(system, asked or [], diversity, seed)
            if sampled:
                diverse[system.name] = text_diversity(sampled)
    return Answers(list(gather(systems, asked, greedy, ready)), diverse)


def judge_all(
    judges: Sequence[Judge], systems: Sequence[str], answers: Answers, out: Path, options: Options
) -> Compared:
    """All pairs of systems by all judges, and with three systems or more their ranking.

    Args:
        judges: with different names; each is asked about all pairs at once.
        systems: names of at least two.
        answers: of these.
        out: the folder where replies are kept as they arrive.
        options: of the analysis.

    Raises:
        StageError: a judge gave no reply at all about two of the systems.
        DataError: it gave no valid verdict about them.
    """
    played = list(combinations(systems, 2))
    pairs = [
        Pair(prompt, texts[a], texts[b], (a, b))
        for a, b in played
        for prompt, texts in answers.rows
    ]
    comparisons, rankings, rows = [], {}, []
    unanswered: Counter[str] = Counter()
    with closing(ReplyStore(out / "replies.sqlite")) as store:
        for judge in judges:
            with Progress().track(2 * len(pairs), f"compare: {judge.name}") as tracker:
                asked = ask_both_orders(judge, pairs, store, tracker.advance)
            unanswered.update(asked.unanswered)
            rows += [_row(judge.name, look) for look in asked.looks]
            calls = Counter(pair.systems for pair in asked.put)
            by_systems = {own: [k for k in asked.looks if k.pair.systems == own] for own in played}
            for (a, b), looks in by_systems.items():
                audited = options.audits.get(judge.name)
                found = judged(a, b, judge.name, looks, seed=options.seed, audited=audited)
                comparisons.append(found | _spent(looks, calls[a, b], options.price))
            if len(systems) > 2:
                all_games = [games(*own, looks) for own, looks in by_systems.items()]
                rankings[judge.name] = rank(list(chain(*all_games))).rows()
    result = {"comparisons": comparisons, "rankings": rankings, "unanswered": dict(unanswered)}
    return Compared(result | {"diversity": answers.diversity}, rows)


def write_completions(out: Path, answers: Answers) -> None:
    """Write what the systems wrote to `completions.jsonl`.

    Raises:
        StorageError: the disk is full or not writable.
    """
    write_jsonl(
        out / "completions.jsonl",
        (
            {"id": prompt.id, "input_text": prompt.text, "completions": texts}
            for prompt, texts in answers.rows
        ),
    )


def write_results(out: Path, compared: Compared) -> None:
    """Write what the judges said: `looks.jsonl`, `comparison.json`.

    Raises:
        StorageError: the disk is full or not writable.
    """
    write_jsonl(out / "looks.jsonl", compared.looks)
    write_json(out / "comparison.json", compared.result)


def check_replies(result: Json, out: Path) -> None:
    """Returns when the result can be trusted.

    Raises:
        StageError: questions went without a reply, or too many replies without a verdict.
    """
    if result["unanswered"]:
        raise StageError(
            f"{sum(result['unanswered'].values())} questions went without a reply "
            f"({next(iter(result['unanswered']))}); the same command again asks them alone"
        )
    for row in result["comparisons"]:
        if row["invalid"] > MOST_INVALID:
            raise StageError(
                f"{row['judge']} gave no verdict in {row['invalid']:.1%} of its replies, more than "
                f"{MOST_INVALID:.0%}; read them in {out / 'looks.jsonl'}, and change --template"
            )


def _of_model(
    system: System, prompts: Sequence[Prompt], sampled: int, seed: int
) -> tuple[dict[str, str], list[str]]:
    """Its greedy completions by prompt id, and those of the first prompts at temperature 1."""
    source = model_source(system.source)
    recipe = recipe_beside(source)
    model = Completer(source, recipe)
    greedy, free = (
        Sampling(max_new_tokens=recipe.data.max_completion_tokens, temperature=temperature)
        for temperature in (0.0, 1.0)
    )
    answers = {row["id"]: row["completion"] for row in model.complete(prompts, greedy, seed)}
    some = prompts[:sampled]
    return answers, [row["completion"] for row in model.complete(some, free, seed)] if some else []


def _row(judge: str, look: Look) -> Json:
    a, b = look.pair.systems
    return {
        "judge": judge,
        "a": a,
        "b": b,
        "id": look.pair.prompt.id,
        "first": look.first,
        "verdict": str(look.reply.verdict),
        "confidence": look.reply.confidence,
        "reply": look.reply.text,
    }


def _spent(looks: Sequence[Look], calls: int, price: tuple[float, float]) -> Json:
    """Tokens and money of all replies, and how many questions were put now."""
    read = sum(look.reply.prompt_tokens for look in looks)
    written = sum(look.reply.completion_tokens for look in looks)
    return {
        "calls": calls,
        "prompt_tokens": read,
        "completion_tokens": written,
        "cost": (read * price[0] + written * price[1]) / 1e6,
    }
