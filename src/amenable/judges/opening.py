"""Opens the judge that a word names, on a command line or in a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amenable.judges.types import Judge

_LONGEST_PROMPT = 4096  # tokens that a reward model reads at most
_ROOM = 128  # tokens that are kept for an answer where it reads few


def open_judge(
    source: str,
    model: str,
    template: Any,
    settings: Mapping[str, Any],
    out: Path,
    key: str = "--judge",
) -> Judge:
    """What a word names: a service, a model, a function or people.

    Args:
        source: the word.
        model: the service's name of one.
        template: of a judge that reads.
        settings: of a service.
        out: where the people's sheet lies.
        key: for messages: the option, or the key of a recipe.

    Raises:
        UsageError: it cannot judge.
        ModelError: it cannot be loaded.
    """
    from amenable.config.rewards import broken_url, kind_of
    from amenable.errors import UsageError
    from amenable.judges.chat import ChatJudge

    if source in ("people", "human"):
        from amenable.judges.people import SheetJudge

        return SheetJudge(out / "sheet.csv")
    match kind_of(source):
        case "http":
            if broken := broken_url(source):
                raise UsageError(f"{key}: {broken.removeprefix('source: ')}")
            if not model:
                raise UsageError(f"{key}-model: name the model that the service shall ask")
            return ChatJudge(source, model, template, **settings)
        case "function":
            from amenable.judges.scores import ScoreJudge
            from amenable.rollout.rewards.functions import FunctionReward

            return ScoreJudge(source.rpartition(":")[2], FunctionReward(source, key))
        case "rule" | "own":
            raise UsageError(f"{key}: {source!r} cannot judge; write a function that scores")
    return _model_judge(source, template, key)


def open_judges(
    sources: Sequence[str], model: str, template: Any, settings: Mapping[str, Any], out: Path
) -> list[Judge]:
    """Several judges of different names, as `open_judge` opens each.

    Raises:
        UsageError: one of them cannot judge, or two have the same name.
        ModelError: one cannot be loaded.
    """
    from amenable.errors import UsageError

    found = [open_judge(source, model, template, settings, out) for source in sources]
    if len({judge.name for judge in found}) < len(found):
        raise UsageError("two judges have the same name; compare by one of them at a time")
    return found


def _model_judge(source: str, template: Any, key: str) -> Judge:
    """A reward model, or a language model that is asked for a label."""
    from amenable.config.load import recipe_beside
    from amenable.judges.local import LocalJudge
    from amenable.judges.scores import ScoreJudge
    from amenable.models.build import best_device
    from amenable.models.pull import resolve_base
    from amenable.rollout.rewards.models import FolderReward

    if not _is_classifier(Path(source) / "config.json"):
        return LocalJudge(resolve_base(source), template, Path(source).name)
    data = recipe_beside(Path(source)).data
    reward = FolderReward(
        source,
        instruction=data.instruction,
        system_message=data.system_message,
        max_prompt_tokens=_LONGEST_PROMPT,
        max_completion_tokens=_ROOM,
        key=key,
        device=best_device(),
    )
    name, stored = Path(source).name, reward.temperature
    remark = (
        f"{name}: no reward_temperature is stored with it, so that its confidence is that of T = 1"
        if stored is None
        else f"{name}: its confidence is that of T = {stored:.4g}, which is stored with it"
    )
    return ScoreJudge(name, reward, 1.0 if stored is None else stored, remark)


def _is_classifier(config: Path) -> bool:
    """Whether a model folder holds a reward model; whatever else is wrong is told on loading it."""
    try:
        kinds = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError):
        return False
    return any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
