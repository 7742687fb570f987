"""Runs the stages of a recipe, one after the other, in one run folder.

It does so in this process, or leads those that were started with it (`pipeline.ranks`).

A stage whose fingerprint is unchanged and whose outputs are whole is skipped. A stage that was
killed goes on from its checkpoints if it is still the same stage, and starts afresh if not.
"""

from __future__ import annotations

import errno
import importlib
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amenable.artifacts import (
    Deadline,
    Json,
    MetricsLog,
    Progress,
    RunFolder,
    StageContext,
    StopRequest,
    plain,
    read_json,
    storage_error,
    write_failure,
    write_json,
    write_text,
)
from amenable.config.load import flatten, load_recipe, to_toml
from amenable.config.recipe import Recipe
from amenable.errors import AmenableError, StageError, UsageError
from amenable.health.watch import OnlineWatch
from amenable.pipeline import memory
from amenable.pipeline.fingerprint import (
    FileHashes,
    Ingredients,
    differences,
    fingerprint,
    matching,
    stage_ingredients,
)
from amenable.pipeline.manifest import device, manifest
from amenable.pipeline.mirror import output_folder, place, working_folder
from amenable.pipeline.preflight import (
    base_model,
    check_inputs,
    close_hub,
    forecast_run,
    silence_libraries,
)
from amenable.pipeline.process import keep_freed_memory
from amenable.pipeline.signals import stops_on_signals
from amenable.pipeline.stages import STAGES, Stage
from amenable.pipeline.state import StageState, read_state, write_state
from amenable.pipeline.summary import split_result, summary
from amenable.progress import duration
from amenable.ranks.launch import seat
from amenable.trackers import Trackers

if TYPE_CHECKING:
    from amenable.data.render import Renderer
    from amenable.pipeline.ranks import Crew
    from amenable.plan.forecast import Forecast

_BUDGET_IN_USE = 0.9
_WITH_MODELS = ("sft", "collect", "reward", "policy", "evaluate")
_REASONS_SHOWN = 3
_SECONDS_BETWEEN_REPORTS = 10.0
_SECONDS_BETWEEN_PUBLICATIONS = 60.0


class Interrupted(StageError):
    """A signal stopped the run; it can be resumed.

    Args:
        where: the stage, or between which.
        number: of the signal; the exit code is 128 + it, as shells have it.
    """

    def __init__(self, where: str, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped {where} by {name}; the same command goes on from there")
        self.exit_code = 128 + number


def run(
    recipe: Recipe,
    out_dir: Path | str,
    *,
    only: str | Collection[str] | None = None,
    until: str | None = None,
    max_minutes: float | None = None,
    progress: Progress | None = None,
    stages: Sequence[Stage] = STAGES,
    command: Sequence[str] = (),
) -> Json:
    """Runs what is not done yet and returns the content of summary.json.

    Args:
        recipe: the resolved recipe.
        out_dir: the run folder, made if missing; of a URL a working folder is mirrored there.
        only: run this stage, or these, alone; what they need must be done.
        until: run the stages up to and with this one.
        max_minutes: end well inside this budget, with every artifact.
        progress: what the user sees; None draws on stderr.
        stages: the table; tests pass their own.
        command: the command line, for the manifest; empty takes this process's.

    Raises:
        AmenableError: what was wrong, where, and what to do.
    """
    progress = progress or Progress()
    selected = select(stages, only, until)
    if max_minutes is not None and max_minutes <= 0:
        raise UsageError("--max-minutes: must be above 0")
    deadline = Deadline(None if max_minutes is None else max_minutes * 60 * _BUDGET_IN_USE)
    silence_libraries()
    keep_freed_memory()

    def lead(crew: Crew | None = None) -> Json:
        check_inputs(recipe, [stage.name for stage in selected])
        base = base_model(recipe, progress.say)
        close_hub(recipe, base)
        with output_folder(out_dir, progress.say) as (root, publish):
            folder = RunFolder(root)
            job = _Run(recipe, folder, stages, base, progress, deadline, command, publish, crew)
            with stops_on_signals(job.stop):
                return job.run(selected)

    own = seat()
    if own is None:
        return lead()
    written = place(out_dir)
    shared = RunFolder(written if isinstance(written, Path) else working_folder(written))
    result: Json = importlib.import_module("amenable.pipeline.ranks").run(
        own, recipe, shared, stages, lead, progress.say
    )
    return result


def select(
    stages: Sequence[Stage], only: str | Collection[str] | None, until: str | None
) -> list[Stage]:
    """The stages that --only and --until leave.

    Raises:
        UsageError: no such stage, or both are given.
    """
    names = [stage.name for stage in stages]
    if only and until:
        raise UsageError("--only and --until exclude each other; give one of them")
    alone = [only] if isinstance(only, str) else only or ()
    for flag, name in (*(("--only", name) for name in alone), ("--until", until)):
        if name and name not in names:
            raise UsageError(f"{flag}: no stage {name!r}; the stages are {', '.join(names)}")
    if only:
        return [stage for stage in stages if stage.name in alone]
    return list(stages[: names.index(until) + 1] if until else stages)


class _Run:
    """One invocation on one run folder."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        stages: Sequence[Stage],
        base: Path | str,
        progress: Progress,
        deadline: Deadline,
        command: Sequence[str],
        publish: Callable[[], None],
        crew: Crew | None = None,
    ):
        self.publish = publish
        self.recipe, self.folder, self.stages, self.base = recipe, folder, stages, base
        self.progress, self.deadline, self.crew = progress, deadline, crew
        self.command = list(command or sys.argv)
        self.started = time.monotonic()
        self.next_report = self.next_publication = self.started
        self.hashes = FileHashes(folder.root / ".hashes.json")
        self.states = {stage.name: read_state(folder, stage.name) for stage in stages}
        self.trackers = Trackers(recipe, folder.root, progress.say)
        self.ran: set[str] = set()
        self.report_failed = False
        self.is_forecast = False
        self.forecast: Forecast | None = None
        self.stop = StopRequest()

    def run(self, selected: Sequence[Stage]) -> Json:
        """Runs the selected stages and returns the summary.

        Raises:
            Interrupted: a signal stopped it.
        """
        try:
            return self._run(selected)
        except KeyboardInterrupt as error:
            raise self._interrupted("between two stages") from error

    def _run(self, selected: Sequence[Stage]) -> Json:
        self._save_recipe()
        finished = False
        try:
            for number, stage in enumerate(selected):
                reason = stage.off(self.recipe)
                if reason:
                    self._retire(stage, reason)
                else:
                    self._settle(stage, selected[number:])
            finished = True
        finally:
            self.trackers.finish(finished)
        result = self._finish()
        self.hashes.save()
        return result

    def _interrupted(self, where: str) -> Interrupted:
        return Interrupted(where, self.stop.signal or signal.SIGINT)

    def _save_recipe(self) -> None:
        path, text = self.folder.recipe_path, to_toml(self.recipe)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return
        if path.exists():
            changes = _recipe_changes(path, self.recipe)
            self.progress.say(
                f"{self.folder.root} holds a run of another recipe ({changes});"
                " the stages that this touches run again"
            )
        write_text(path, text)

    def _retire(self, stage: Stage, reason: str) -> None:
        """Removes what a stage left that the recipe no longer wants: later stages would use it."""
        if self.states[stage.name] is not None:
            self._clear(stage)
            self.ran.add(stage.name)
        self.progress.say(f"{stage.name}: off ({reason})")

    def _settle(self, stage: Stage, rest: Sequence[Stage]) -> None:
        """Skips, resumes or runs the stage."""
        self._check_needs(stage)
        ingredients = self._ingredients(stage)
        state = self.states[stage.name]
        reason = self._why_run(stage, state, ingredients)
        if not reason:
            self.progress.say(f"{stage.name}: unchanged, skipped")
            return
        if self._can_resume(stage, state, ingredients):
            self.progress.say(f"{stage.name}: had not finished; its last checkpoint is looked for")
        else:
            self._clear(stage)
            self.progress.say(f"{stage.name}: {reason}")
        self._execute(stage, ingredients, self._share(rest))

    def _check_needs(self, stage: Stage) -> None:
        """Refuses to build on what is missing, and says so when it is out of date."""
        for needed in self._needed(stage):
            state = self.states[needed.name]
            if state is None or not state.done:
                raise StageError(
                    f"{stage.name}: needs stage {needed.name}, which has not finished in"
                    f" {self.folder.root}; run the same command with --until {needed.name} first"
                )
            if not self._is_fresh(needed):
                self.progress.say(
                    f"{stage.name}: warning: stage {needed.name} was made with other settings,"
                    " inputs or code; run without --only to bring it up to date"
                )

    def _needed(self, stage: Stage) -> list[Stage]:
        return [
            other
            for other in self.stages
            if other.name in stage.needs and not other.off(self.recipe)
        ]

    def _ingredients(self, stage: Stage) -> Ingredients:
        artifacts: dict[str, str] = {}
        for needed in self._needed(stage):
            state = self.states[needed.name]
            artifacts |= state.outputs if state else {}
        return stage_ingredients(stage, self.recipe, self.base, artifacts, self.hashes)

    def _is_fresh(self, stage: Stage) -> bool:
        """True when the stage is done with exactly what this recipe asks for."""
        state = self.states[stage.name]
        if state is None or not state.done or stage.off(self.recipe):
            return False
        if any(self.states[needed.name] is None for needed in self._needed(stage)):
            return False
        return state.fingerprint == fingerprint(self._ingredients(stage))

    def _why_run(self, stage: Stage, state: StageState | None, ingredients: Ingredients) -> str:
        """Why the stage must run; empty when it is done."""
        if state is None:
            return "starts"
        if state.fingerprint != fingerprint(ingredients):
            changed = differences(state.ingredients, ingredients)
            return f"runs again (changed: {_some(changed)})"
        if not state.done:
            return "starts afresh, the last attempt did not finish"
        if state.shortened and self.deadline.remaining_s() == math.inf:
            return "runs again, a time budget had cut it short"
        damaged = [path for path in state.outputs if not self._is_intact(path, state)]
        return f"runs again (missing or altered: {_some(damaged)})" if damaged else ""

    def _is_intact(self, path: str, state: StageState) -> bool:
        try:
            return self.hashes.digest(self.folder.root / path) == state.outputs[path]
        except OSError:
            return False

    def _can_resume(self, stage: Stage, state: StageState | None, ingredients: Ingredients) -> bool:
        """True when an unfinished attempt at the very same stage left checkpoints."""
        if state is None or state.fingerprint != fingerprint(ingredients):
            return False
        checkpoints = self.folder.stage_path(stage.name) / "checkpoints"
        unfinished = not state.done or state.shortened
        return unfinished and any(checkpoints.glob("[!.]*"))

    def _clear(self, stage: Stage) -> None:
        """Removes the artifacts that the stage had recorded, then its folder."""
        state = self.states[stage.name]
        path = self.folder.stage_path(stage.name)
        try:
            if state is not None:
                self._remove_artifacts(stage, state)
            if path.exists():
                shutil.rmtree(path)
        except OSError as error:
            raise storage_error(path, error) from error
        self.states[stage.name] = None

    def _remove_artifacts(self, stage: Stage, state: StageState) -> None:
        for output in state.outputs:
            (self.folder.root / output).unlink(missing_ok=True)
        for pattern in stage.makes:  # a model folder without its weights is no model
            path = self.folder.root / pattern
            if pattern.startswith("models/") and path.is_dir():
                shutil.rmtree(path)

    def _share(self, rest: Sequence[Stage]) -> float | None:
        """Seconds for the first of `rest`: its share of what is left of the budget."""
        left_s = self.deadline.remaining_s()
        if left_s == math.inf:
            return None
        shares = [stage.time_share for stage in rest if not stage.off(self.recipe)]
        return left_s * shares[0] / sum(shares)

    def _execute(self, stage: Stage, ingredients: Ingredients, seconds: float | None) -> None:
        """Runs the stage; its state is the last thing that is written."""
        if stage.name in _WITH_MODELS and not self.is_forecast:
            self.is_forecast = True
            self.forecast = forecast_run(self.recipe, self.folder.data, self.progress.say)
        state = StageState(
            fingerprint=fingerprint(ingredients), status="running", ingredients=ingredients
        )
        self._record(stage, state)
        start = time.monotonic()
        memory.start_peak()
        together = self.crew if stage.together else None
        deadline = Deadline(seconds) if together is None else together.deadline(seconds)
        watch = OnlineWatch(stage.name, self.recipe.health, self.progress.say)
        with self._told_errors(stage, state, watch):
            result = self._call(stage, state.fingerprint, deadline, watch, seconds)
            outputs = self._outputs(stage)
        section, told = split_result(plain(result))
        state = replace(
            state,
            status="done",
            wall_s=round(time.monotonic() - start, 2),
            peak_rss_gb=memory.peak_gb(),
            summary=section,
            health=watch.rows + told,
            outputs=outputs,
            shortened=deadline.cut,
        )
        self._record(stage, state)
        self.ran.add(stage.name)
        used = f"{duration(state.wall_s or 0)}, {state.peak_rss_gb:.1f} GB"
        self.progress.say(f"{stage.name}: done in {used}")
        self._write_results()

    def _call(
        self,
        stage: Stage,
        made: str,
        deadline: Deadline,
        watch: OnlineWatch,
        seconds: float | None,
    ) -> Any:
        crew = self.crew if stage.together else None
        observer = self.trackers.of(stage.name, then=watch, made=made)
        log = MetricsLog(stage.name, self.folder.stage(stage.name), observer=observer)
        context = StageContext(
            recipe=self.recipe,
            folder=self.folder,
            stage=stage.name,
            log=log,
            progress=self.progress,
            deadline=deadline,
            stop=self.stop if crew is None else crew.stop(self.stop),
            refresh_report=self._refresh_report_now_and_then,
            publish=self.publish,
            open_renderer=self._open_renderer,
        )
        try:
            if crew is None:
                return stage.load()(context)
            with crew.explained():
                crew.start(stage, seconds)
                return stage.load()(context)
        finally:
            log.close()

    def _open_renderer(self) -> Renderer:
        build = importlib.import_module("amenable.models.build")
        renderer: Renderer = build.Foundation.open(self.recipe).renderer
        return renderer

    def _record(self, stage: Stage, state: StageState) -> None:
        self.folder.stage(stage.name)
        write_state(self.folder, stage.name, state)
        self.states[stage.name] = state
        self.publish()

    def _outputs(self, stage: Stage) -> dict[str, str]:
        """Hashes of what the stage made, without what a later stage that is on will make."""
        root = self.folder.root
        for pattern in stage.makes:
            if not any(root.glob(pattern)):
                raise StageError(f"{stage.name}: ended without {root / pattern}")
        found: dict[str, str] = {}
        for pattern in (*stage.makes, *stage.may_make):
            for path in sorted(root.glob(pattern)):
                found |= self.hashes.tree(path, path.relative_to(root).as_posix())
        left_out = {self.folder.state_path(stage.name).relative_to(root).as_posix()}
        left_out |= self._made_later(stage, found)
        return {path: digest for path, digest in found.items() if path not in left_out}

    def _made_later(self, stage: Stage, paths: Mapping[str, str]) -> set[str]:
        later = self.stages[self.stages.index(stage) + 1 :]
        on = [other for other in later if not other.off(self.recipe)]
        return {path for other in on for path, _ in matching(paths, other.makes)}

    @contextmanager
    def _told_errors(self, stage: Stage, state: StageState, watch: OnlineWatch) -> Iterator[None]:
        """Records a failure and turns it into a message with a remedy."""
        try:
            yield
        except KeyboardInterrupt as error:
            raise self._interrupted(f"in stage {stage.name}") from error
        except Exception as error:
            told = _told(error, stage, self.folder)
            with suppress(AmenableError):
                said = str(told or error)
                failed = replace(state, status="failed", error=said, health=watch.rows)
                self._record(stage, failed)
                self._write_results()
            if told is None or told is error:
                raise
            raise told from error

    def _write_results(self) -> Json:
        """Rewrites summary.json, manifest.json and the report."""
        fresh = {
            stage.name: state
            for stage in self.stages
            if (state := self.states[stage.name]) is not None and self._is_fresh(stage)
        }
        result = summary(
            self.recipe,
            self.stages,
            fresh,
            {stage.name: self._status(stage, stage.name in fresh) for stage in self.stages},
            device=device() or self._last("device"),
            wall_s=self._wall_s(fresh),
        )
        write_json(self.folder.summary_path, result)
        content = manifest(fresh, self.recipe.seed, self.base, self.command)
        content["forecast"] = self._forecast_and_measured(content["stages"])
        write_json(self.folder.manifest_path, content)
        return result

    def _forecast_and_measured(self, stages: Json) -> Json | None:
        """The forecast beside what was measured; that of an earlier invocation if none was made."""
        if self.forecast is not None:
            compare = importlib.import_module("amenable.plan.forecast").comparison
            compared: Json = compare(self.forecast, stages)
            return compared
        with suppress(AmenableError):
            last: Json | None = read_json(self.folder.manifest_path).get("forecast")
            return last
        return None

    def _status(self, stage: Stage, is_fresh: bool) -> str:
        state = self.states[stage.name]
        if stage.off(self.recipe):
            return "off"
        if state is None:
            return "pending"
        if not state.done:
            return state.status
        if not is_fresh:
            return "outdated"
        return "shortened" if state.shortened else "done"

    def _wall_s(self, fresh: dict[str, StageState]) -> float:
        """Seconds of this invocation, and of the stages that earlier ones had done."""
        earlier = sum(state.wall_s or 0.0 for name, state in fresh.items() if name not in self.ran)
        return earlier + time.monotonic() - self.started

    def _finish(self) -> Json:
        """The summary; it is left as it stands when nothing ran."""
        if not self.ran and self.folder.summary_path.exists():
            with suppress(AmenableError):
                last: Json = read_json(self.folder.summary_path)
                return last
        return self._write_results()

    def _last(self, key: str) -> Any:
        with suppress(AmenableError):
            return read_json(self.folder.summary_path).get(key)
        return None

    def _refresh_report_now_and_then(self) -> None:
        """Stages may ask after every step; drawing the page takes longer than a short step."""
        if time.monotonic() >= self.next_report:
            self._refresh_report()
            self.next_report = time.monotonic() + _SECONDS_BETWEEN_REPORTS
            if time.monotonic() >= self.next_publication:
                self.publish()
                self.next_publication = time.monotonic() + _SECONDS_BETWEEN_PUBLICATIONS

    def _refresh_report(self) -> None:
        try:
            self._write_results()
            importlib.import_module("amenable.evaluate.report").render(self.folder)
        except Exception as error:
            if not self.report_failed:
                self.progress.say(f"report.html could not be refreshed: {error}")
            self.report_failed = True


def _told(error: Exception, stage: Stage, folder: RunFolder) -> AmenableError | None:
    """The error as the user should read it; None for one that is a defect of ours."""
    if isinstance(error, AmenableError):
        return error
    refused = write_failure(error)
    if refused is not None and refused.errno is not None and _is_write_problem(refused):
        return storage_error(folder.stage_path(stage.name), refused)
    if _is_out_of_memory(error):
        return StageError(
            f"{stage.name}: out of memory; lower {stage.name}.micro_batch_tokens, the batch size"
            " or data.max_prompt_tokens, or take a smaller base model"
        )
    return None


def _is_write_problem(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_REASONS_SHOWN])
    more = len(names) - _REASONS_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _recipe_changes(path: Path, recipe: Recipe) -> str:
    """What differs between the recipe saved at `path` and this one."""
    try:
        old = flatten(load_recipe(path))
    except AmenableError:
        return "which can no longer be read"
    new = flatten(recipe)
    changed = [f"{key}: {old[key]!r} → {new[key]!r}" for key in new if old[key] != new[key]]
    return _some(changed)
