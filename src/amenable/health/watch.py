"""Feeds the rules: row by row while a stage runs, or all rows of a log at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from amenable.errors import StageError
from amenable.health.rules import RULES, Finding, History, Rule

if TYPE_CHECKING:
    from amenable.config.health import HealthConfig


class Unhealthy(StageError):
    """A rule of `health.stop_on` has spoken."""


class Watch:
    """The rules of one stage. Each speaks at most once.

    Args:
        stage: whose rows will come.
        rules: to be asked.
        off: ids of rules that are not asked.
    """

    def __init__(
        self, stage: str, rules: Iterable[Rule] = RULES, off: Collection[str] = ()
    ) -> None:
        self._stage = stage
        self._rules = [rule for rule in rules if stage in rule.stages and rule.id not in off]
        self._history = History()
        self.findings: list[Finding] = []

    def see(self, step: int, figures: Mapping[str, float | None]) -> list[Finding]:
        """What is found with one more row.

        Args:
            step: of the row.
            figures: by their names without the stage's prefix; None or NaN: not a number.
        """
        self._history.add(figures)
        said = {finding.rule for finding in self.findings}
        new = [
            Finding(rule.id, self._stage, step, rule.level, rule.message(seen))
            for rule in self._rules
            if rule.id not in said and (seen := rule.saw(self._history))
        ]
        self.findings += new
        return new


def check_rows(stage: str, rows: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """All that the rules say of a finished log.

    Args:
        stage: `sft`, `reward` or `policy`.
        rows: as in metrics.jsonl, with or without the stage's prefix.
    """
    watch = Watch(stage)
    for number, row in enumerate(rows):
        figures = {
            key.removeprefix(f"{stage}/"): value
            for key, value in row.items()
            if key not in ("step", "wall_s") and (value is None or isinstance(value, int | float))
        }
        step = row.get("step")
        watch.see(int(step) if isinstance(step, int | float) else number, figures)
    return watch.findings


class OnlineWatch:
    """Hears a stage's log: says what is found, and ends the stage where the recipe wants that.

    Args:
        stage: whose log it is.
        config: rules that stop, rules that are off.
        say: takes a line for the user.
    """

    def __init__(self, stage: str, config: HealthConfig, say: Callable[[str], None]) -> None:
        self._stage, self._config, self._say = stage, config, say
        self._watch = Watch(stage, off=config.off)

    def begin(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Read what was said before a resume, without a word."""
        self._watch = Watch(self._stage, off=self._config.off)
        for step, figures in rows:
            self._watch.see(step, figures)

    def see(self, step: int, figures: Mapping[str, float]) -> None:
        """One more row.

        Raises:
            Unhealthy: a rule that stops has spoken.
        """
        for finding in self._watch.see(step, figures):
            self._say(f"{self._stage}: {finding.level} {finding.rule}: {finding.message}")
            if self._stops(finding):
                raise Unhealthy(
                    f"{finding.rule} at step {step} (health.stop_on): {finding.message} Without "
                    "it in health.stop_on the stage goes on from its last checkpoint; any other "
                    "change of its keys starts it afresh"
                )

    def _stops(self, finding: Finding) -> bool:
        wanted = self._config.stop_on
        return finding.rule in wanted or ("errors" in wanted and finding.level == "error")

    @property
    def findings(self) -> list[Finding]:
        """All that was found."""
        return self._watch.findings

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of `health` in summary.json."""
        return [asdict(finding) for finding in self._watch.findings]
