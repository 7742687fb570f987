"""What the rows of a run are like: statistics, content, and what the tokenizer makes of them.

Looked at once the splits are written, before a weight is loaded; shown on the report's page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amenable.config.data import DataConfig
from amenable.data.content.report import content_report
from amenable.data.content.statistics import Item, Part, data_statistics, prompt_of
from amenable.data.row_file import (
    RowFile,
    open_demonstrations,
    open_preferences,
    open_prompts,
)
from amenable.data.schemas import Prompt
from amenable.data.tokens.report import token_report
from amenable.errors import DataError

if TYPE_CHECKING:
    from amenable.data.render import Renderer

Json = dict[str, Any]

_OPEN: dict[str, Callable[[Path], Sequence[Any]]] = {
    "demonstrations": open_demonstrations,
    "preferences": open_preferences,
    "prompts": open_prompts,
}


def quality(
    folder: Path,
    splits: Sequence[str],
    config: DataConfig,
    open_renderer: Callable[[], Renderer] | None,
) -> Json:
    """`statistics`, `content` and `tokens` of the splits, as far as the recipe wants them.

    Args:
        folder: where the splits lie.
        splits: names of those that have rows, without `.jsonl`.
        config: what is looked at.
        open_renderer: opens the base model's tokenizer; None where there is none to be had.
    """
    files = {name: _OPEN[name.split(".")[0]](folder / f"{name}.jsonl") for name in splits}
    parts = {name: _part(rows) for name, rows in files.items()}
    found: Json = {"statistics": data_statistics(parts)}
    if config.content_checks:
        found["content"] = content_report(parts)
    if config.token_checks and open_renderer is not None:
        found["tokens"] = token_report(
            open_renderer(),
            prompts=_prompts(files),
            demonstrations=_of(files, "demonstrations"),
            preferences=_of(files, "preferences"),
        )
    return found


def warnings(found: Json) -> Iterator[str]:
    """One sentence for each warning, with the sets that it is about."""
    for section in ("content", "tokens"):
        for finding in found.get(section, {}).get("findings", ()):
            if finding["level"] == "warning":
                yield f"{', '.join(finding['sets'])}: {finding['text']}"


def refuse(found: Json) -> None:
    """Ends a run that could not train.

    Args:
        found: what `quality` returned.

    Raises:
        DataError: training would certainly fail: a template refuses a row, nothing is left of
            completions, no completion ends.
    """
    for finding in found.get("tokens", {}).get("findings", ()):
        if finding["level"] == "error":
            raise DataError(
                f"{finding['text']} {finding['means']} {finding['try']} "
                "(data.token_checks = false leaves this check out)"
            )


def _part(rows: RowFile[Item] | Sequence[Item]) -> Part:
    return lambda: ((prompt_of(row).id, row) for row in rows)


def _of(files: dict[str, Sequence[Any]], kind: str) -> Iterator[Any]:
    """The rows of all splits of a kind."""
    return (row for name, rows in files.items() if name.split(".")[0] == kind for row in rows)


def _prompts(files: dict[str, Sequence[Any]]) -> Iterator[Prompt]:
    """The prompts of all splits, those that are both trained on and collected for once."""
    collected = {prompt.id for prompt in files.get("prompts.collect", ())}
    for name, rows in files.items():
        if name.split(".")[0] == "prompts":
            yield from (row for row in rows if name != "prompts.train" or row.id not in collected)
