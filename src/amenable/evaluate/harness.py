"""EleutherAI's lm-evaluation-harness: its tasks, opened before a weight is read, and their scores.

The harness builds the prompts, asks the model and scores the answers; what it says of each
document is kept, so that two systems can be compared document by document.
"""

from __future__ import annotations

import difflib
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amenable.errors import DataError, StageError, UsageError
from amenable.models.quiet import without_bars
from amenable.progress import Progress, Tracker

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from amenable.evaluate.paired import Aggregate

_FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class Scores:
    """What one system got in one metric of one task, document by document."""

    task: str
    metric: str
    filter: str
    """How answers were read before they were scored; `none` for most tasks."""

    higher_is_better: bool | None
    """None: the task does not say."""

    aggregate: Aggregate | None
    """From the documents' values to the metric; None: their mean."""

    documents: Mapping[int, Any]
    """The harness's value of each document, by its number in the task's data."""

    hashes: Mapping[int, str] = field(repr=False)
    """Of the documents, so that only the same ones are compared."""


@dataclass(frozen=True)
class Group:
    """A metric over several tasks, such as that of MMLU."""

    name: str
    metric: str
    filters: tuple[str, ...] | None
    """None: all that its tasks have."""

    weight_by_size: bool
    """Every document counts alike; else every task."""

    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data are there."""

    leaves: Mapping[str, Any]
    """Every single task by name."""

    nodes: Mapping[str, Any] = field(repr=False)
    """The harness's groups by name."""

    groups: tuple[Group, ...]
    """Figures over several tasks."""


@dataclass(frozen=True)
class Settings:
    """How a model is asked."""

    limit: int | None = None
    """The first so many documents of each task; None takes all."""

    few_shot: int | None = None
    """Examples in the prompt; None takes the task's own number."""

    chat_template: bool = False
    """Ask as a user of a chat; else the prompt stands alone, as in most published figures."""

    batch_size: int = 8
    """Texts in a forward pass."""


def harness_version() -> str:
    """The version of the installed harness.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
        from lm_eval.models import huggingface  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f'the lm-evaluation-harness is not installed ({error}); pip install "amenable[lm-eval]"'
        ) from error
    return version("lm_eval")


def open_tasks(names: Sequence[str]) -> Tasks:
    """Opens tasks of the harness by name, and task files, with their data.

    Relative paths in a task file are taken from its own folder.

    Args:
        names: of tasks, groups or tags; what ends in .yaml or .yml is a task file.

    Raises:
        UsageError: an unknown name, or a task that cannot be run here.
        DataError: a task file is wrong, or data cannot be had.
    """
    import logging

    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [name for name in names if name.endswith(_FILES)]
    for file in files:
        if not Path(file).is_file():
            raise DataError("no such task file", path=file)
    manager = TaskManager(include_defaults=len(files) < len(names))
    leaves: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        found = _open(manager, name)
        if twice := sorted(leaves.keys() & found["tasks"].keys()):
            raise UsageError(f"--tasks: {twice[0]!r} is named twice; name each task once")
        leaves |= found["tasks"]
        groups |= found["groups"]
    for name, task in leaves.items():
        _check_can_run(name, task)
    return Tasks(leaves, groups, tuple(_groups(groups)))


def _open(manager: Any, name: str) -> dict[str, Any]:
    """`tasks` and `groups` of one name or file."""
    is_file = name.endswith(_FILES)
    if not is_file and name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"--tasks: the harness has no task {name!r}; {hint}`lm-eval ls tasks` lists all; "
            "a task file ends in .yaml"
        )
    shown, place = name, Path(name).resolve()
    try:
        with ExitStack() as stack:
            stack.enter_context(_without_data_bars())
            if is_file:
                stack.enter_context(chdir(place.parent))
                name = _registered(manager, place)
            found: dict[str, Any] = manager.load([name])
            return found
    except ImportError as error:
        raise UsageError(
            f"--tasks: {shown} needs the package {error.name or error}, which is not installed; "
            f"pip install {error.name or 'it'}"
        ) from error
    except Exception as error:  # the harness, datasets and the hub raise what they like
        raise _cannot_open(shown, is_file, error) from error


def _registered(manager: Any, file: Path) -> str:
    """The name of a task file's task or group, which the manager then knows.

    By its path alone the harness would open a task, but no group.
    """
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    own: dict[str, Any] = {}
    TaskIndex.process_cfg(load_yaml(file, resolve_func=False), file, own)
    manager.task_index.update(own)
    return next(iter(own))


def _cannot_open(name: str, is_file: bool, error: Exception) -> DataError:
    causes = list(_causes(error))
    kind, told = type(error).__name__, _first_line(error)
    if any(isinstance(cause, ConnectionError) or _of_the_hub(cause) for cause in causes):
        return DataError(
            f"task {name}: the Hugging Face hub does not give its data ({kind}: {told}); open it "
            "once where there is a network, after which it stays in the hub's cache (HF_HOME), or "
            "give a task file with local data"
        )
    if is_file:
        missing = any(isinstance(cause, FileNotFoundError) for cause in causes)
        hint = "; paths are taken from the task file's folder" if missing else ""
        return DataError(f"no task that the harness can open ({kind}: {told}){hint}", path=name)
    return DataError(f"task {name}: could not be opened ({kind}: {told})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_the_hub(error: BaseException) -> bool:
    """Whether `datasets` or a client below it says that the hub has no answer."""
    return type(error).__module__.startswith(("huggingface_hub", "httpx", "requests")) or (
        type(error).__name__ == "DatasetNotFoundError"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _check_can_run(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(
            f"--tasks: {name} runs code that the model writes, which is not done here; run it with "
            "lm-eval itself, in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"--tasks: {name} asks about pictures or sounds; choose a task of texts")


def _groups(groups: Mapping[str, Any]) -> Iterator[Group]:
    for name, group in groups.items():
        for rule in group.aggregate_metric_list or ():
            yield Group(
                name,
                rule.metric,
                None if rule.filter_list is None else tuple(rule.filter_list),
                rule.weight_by_size,
                tuple(task.task_name for task in group.get_all_tasks()),
            )


def measure(
    name: str,
    source: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    settings: Settings,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[Scores], list[dict[str, Any]]]:
    """Asks a model every task.

    Args:
        name: what the system is called, for the progress bar.
        source: the model's folder or hub id.
        tokenizer: its own, with a pad token.
        tasks: what is asked.
        settings: how.
        dtype: of the weights.
        device: where they go.

    Returns:
        Its scores, and what was asked: one row a task with `task`, `version`, `data`,
        `few_shot`, `documents` and `of`, the number that the task has.

    Raises:
        ModelError: the model cannot be loaded.
        StageError: the harness fails.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    from amenable.models.load import load_causal_lm

    model = load_causal_lm(source, dtype, device=device, pad_token_id=tokenizer.pad_token_id)
    asked = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=settings.batch_size,
        max_batch_size=settings.batch_size,
        softmax_dtype="float32",  # sums of bfloat16 log-probabilities make ties of what is none
    )
    with _counted(asked, tasks, name), without_bars(swallow_stderr=True):
        try:
            _set_examples(tasks, settings.few_shot)
            results = evaluate(
                asked,
                {"tasks": tasks.leaves, "groups": tasks.nodes},
                limit=settings.limit,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=True,
                log_samples=True,
                bootstrap_iters=0,
            )
        except Exception as error:  # tasks are others' code
            raise StageError(
                f"{name}: the harness failed ({type(error).__name__}: {_first_line(error)}); see "
                "what the same command prints under --debug, and leave out the task that fails"
            ) from error
    del asked, model
    gc.collect()
    aggregates = {name: task.aggregation() for name, task in tasks.leaves.items()}
    return scores_of(results, aggregates), tasks_of(results)


def _set_examples(tasks: Tasks, number: int | None) -> None:
    """Examples in the prompts, and the seeds, as the harness's own command sets them."""
    import random

    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002 - what tasks draw from
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks.leaves.values():
        own = task.get_config("num_fewshot")
        if number is not None and own != 0:
            task.set_config(key="num_fewshot", value=number)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def scores_of(
    results: Mapping[str, Any], aggregates: Mapping[str, Mapping[str, Aggregate]]
) -> list[Scores]:
    """The scores in what the harness returns, in the order of its tasks.

    Args:
        results: with `samples`.
        aggregates: by task and metric, the harness's own; a metric without one is a mean.
    """
    found = []
    for task, samples in results["samples"].items():
        better = results["higher_is_better"].get(task, {})
        values: dict[tuple[str, str], dict[int, Any]] = {}
        hashes = {sample["doc_id"]: sample["doc_hash"] for sample in samples}
        for sample in samples:
            for metric in sample["metrics"]:
                own = values.setdefault((metric, sample["filter"]), {})
                own[sample["doc_id"]] = sample[metric]
        for (metric, name), documents in values.items():
            aggregate = aggregates.get(task, {}).get(metric)
            is_mean = getattr(aggregate, "__name__", "mean") == "mean"
            found.append(
                Scores(
                    task=task,
                    metric=metric,
                    filter=name,
                    higher_is_better=better.get(metric),
                    aggregate=None if is_mean else aggregate,
                    documents=documents,
                    hashes=hashes,
                )
            )
    return found


def tasks_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was asked: one row a task of what the harness returns."""
    return [
        {
            "task": task,
            "version": results["versions"].get(task),
            "data": results["configs"][task].get("dataset_path"),
            "few_shot": results["n-shot"].get(task),
            "documents": len({sample["doc_id"] for sample in samples}),
            "of": results["n-samples"][task]["original"],
        }
        for task, samples in results["samples"].items()
    ]


@contextmanager
def _without_data_bars() -> Iterator[None]:
    """Switches the bars of `datasets` off inside the block."""
    from datasets.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with without_bars():
            yield
    finally:
        if were_on:
            logging.enable_progress_bar()


@contextmanager
def _counted(model: Any, tasks: Tasks, name: str) -> Iterator[None]:
    """Shows each answer as it comes, on the stderr of now, by the harness's hook for its cache."""
    with ExitStack() as stack:
        model.set_cache_hook(_Counter(tasks, name, Progress(stream=sys.stderr), stack))
        yield


class _Counter:
    """Stands where the harness's cache of answers would: told of each one."""

    def __init__(self, tasks: Tasks, name: str, progress: Progress, stack: ExitStack):
        self._tasks, self._name, self._progress, self._stack = tasks, name, progress, stack
        self._tracker: Tracker | None = None

    def add_partial(self, attr: str, req: object, res: object) -> None:
        """Counts one answer; the requests are all there when the first one comes."""
        if self._tracker is None:
            total = sum(
                one.repeats for task in self._tasks.leaves.values() for one in task.instances
            )
            track = self._progress.track(total, f"benchmark: {self._name}")
            self._tracker = self._stack.enter_context(track)
        self._tracker.advance()
