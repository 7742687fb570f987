"""Google Cloud's RLHF pipelines under their own names and parameters, off Vertex.

    from kfp import compiler
    from amenable.pipeline.vertex import PipelineJob, rlhf_pipeline

    compiler.Compiler().compile(rlhf_pipeline, "rlhf_pipeline.yaml")
    PipelineJob(template_path="rlhf_pipeline.yaml", parameter_values={...}).run()

Counterparts of `preview.llm.rlhf_pipeline`, `infer_pipeline`, `rlaif_pipeline` and of
`autosxs_pipeline` of Google Cloud Pipeline Components 2.22. Names, order and defaults of the
parameters are theirs, but for project and location, which default to nothing. What each becomes
here is in docs/vertex.md.

kfp traces a pipeline when it is defined, so that the settings file is read when this module is
imported; a compiled pipeline carries it along.
"""

import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from amenable.errors import UsageError
from amenable.pipeline.kfp import (
    InconsistentTypeException,
    add_stages,
    component,
    components,
    configure,
    dsl,
)
from amenable.pipeline.kfp_local import run_pipeline
from amenable.pipeline.vertex_parameters import SETTINGS_VARIABLE, read_settings
from amenable.pipeline.vertex_tasks import RLHF_STAGES, RUNS_VARIABLE

_SETTINGS = read_settings(os.environ.get(SETTINGS_VARIABLE))
_CARRIED = json.dumps(asdict(_SETTINGS), sort_keys=True)


class RLHFOutputs(NamedTuple):
    """Of `rlhf_pipeline` and `rlaif_pipeline`."""

    model_resource_name: str
    endpoint_resource_name: str
    tuned_model: str
    side_by_side: str
    predictions: str


class InferOutputs(NamedTuple):
    """Of `infer_pipeline`."""

    output_prediction_gcs_path: str


class AutoSxSOutputs(NamedTuple):
    """Of `autosxs_pipeline`."""

    model_a_evaluation_resource_name: str
    model_b_evaluation_resource_name: str
    evaluation_count: int
    evaluation_dataset_path: str
    judgments: str
    model_a_win_rate: float
    model_b_win_rate: float


def prepare_rlhf_component(
    settings: str,
    prompt_dataset: str,
    preference_dataset: str,
    large_model_reference: str,
    model_display_name: str,
    prompt_sequence_length: int,
    target_sequence_length: int,
    reward_model_learning_rate_multiplier: float,
    reinforcement_learning_rate_multiplier: float,
    reward_model_train_steps: int,
    reinforcement_learning_train_steps: int,
    kl_coeff: float,
    instruction: str,
    deploy_model: bool,
    eval_dataset: str,
    project: str,
    accelerator_type: str,
    location: str,
    encryption_spec_key_name: str,
    tensorboard_resource_id: str,
    kind: str,
) -> NamedTuple(
    "Prepared",
    [
        ("data", str),
        ("reward", str),
        ("policy", str),
        ("evaluate", str),
        ("report", str),
        ("run_folder", str),
    ],
):
    """Writes the recipe of the parameters, says what is not honoured, gives each stage its key."""
    values = dict(locals())
    from collections import namedtuple

    from amenable.pipeline.vertex_tasks import prepare_rlhf

    found = prepare_rlhf(values, values.pop("settings"), values.pop("kind"))
    return namedtuple("Prepared", found)(**found)


def finish_rlhf_component(run_folder: str, state: str, eval_dataset: str) -> NamedTuple(
    "Finished",
    [
        ("model_resource_name", str),
        ("endpoint_resource_name", str),
        ("tuned_model", str),
        ("side_by_side", str),
        ("predictions", str),
    ],
):
    """Bulk inference or reward metrics on eval_dataset; the Side-by-Side table."""
    from collections import namedtuple

    from amenable.pipeline.vertex_tasks import finish_rlhf

    found = finish_rlhf(run_folder, state, eval_dataset)
    return namedtuple("Finished", found)(**found)


def infer_component(
    settings: str,
    large_model_reference: str,
    prompt_dataset: str,
    model_checkpoint: str,
    prompt_sequence_length: int,
    target_sequence_length: int,
    sampling_strategy: str,
    instruction: str,
    project: str,
    accelerator_type: str,
    location: str,
    encryption_spec_key_name: str,
) -> str:
    """Completes every prompt."""
    values = dict(locals())
    from amenable.pipeline.vertex_tasks import infer

    return infer(values, values.pop("settings"))


def ai_preferences_component(
    settings: str,
    preference_prompt_dataset: str,
    large_model_reference: str,
    task_type: str,
    model_display_name: str,
    prompt_sequence_length: int,
    target_sequence_length: int,
    large_model_a_reference: str,
    large_model_b_reference: str,
    sampling_strategy: str,
    instruction: str,
    accelerator_type: str,
) -> str:
    """Two models answer every prompt, a judge chooses."""
    values = dict(locals())
    from amenable.pipeline.vertex_tasks import ai_preferences

    return ai_preferences(values, values.pop("settings"))


def autosxs_component(
    settings: str,
    evaluation_dataset: str,
    task: str,
    id_columns: list[str],
    autorater_prompt_parameters: dict[str, dict[str, str]],
    model_a: str,
    model_b: str,
    model_a_prompt_parameters: dict[str, dict[str, str]],
    model_b_prompt_parameters: dict[str, dict[str, str]],
    response_column_a: str,
    response_column_b: str,
    model_a_parameters: dict[str, str],
    model_b_parameters: dict[str, str],
    human_preference_column: str,
    project: str,
    location: str,
    judgments_format: str,
    bigquery_destination_prefix: str,
    experimental_args: dict[str, Any],
    encryption_spec_key_name: str,
) -> NamedTuple(
    "Judged",
    [
        ("model_a_evaluation_resource_name", str),
        ("model_b_evaluation_resource_name", str),
        ("evaluation_count", int),
        ("evaluation_dataset_path", str),
        ("judgments", str),
        ("model_a_win_rate", float),
        ("model_b_win_rate", float),
    ],
):
    """A judge compares two columns of responses, or models' own, in both orders."""
    values = dict(locals())
    from collections import namedtuple

    from amenable.pipeline.vertex_tasks import autosxs

    found = autosxs(values, values.pop("settings"))
    return namedtuple("Judged", found)(**found)


def _rlhf(values: Mapping[str, Any], kind: str) -> RLHFOutputs:
    """The tasks of RLHF with these parameters."""
    config = _SETTINGS.kfp
    prepare = component(prepare_rlhf_component, "prepare", config)
    prepared = prepare(settings=_CARRIED, kind=kind, **values)
    folder = prepared.outputs["run_folder"]
    last = add_stages(prepared, folder, config, list(RLHF_STAGES))
    finish = component(finish_rlhf_component, "results", config)
    finished = finish(
        run_folder=folder, state=last.outputs["Output"], eval_dataset=values["eval_dataset"]
    )
    configure(finished, config, with_model=True, caching=False)
    return RLHFOutputs(**{name: finished.outputs[name] for name in RLHFOutputs._fields})


@dsl.pipeline(name="rlhf-train-template", description="RLHF: reward model, PPO, Side-by-Side.")
def rlhf_pipeline(
    prompt_dataset: str,
    preference_dataset: str,
    large_model_reference: str,
    model_display_name: str = "",
    prompt_sequence_length: int = 512,
    target_sequence_length: int = 64,
    reward_model_learning_rate_multiplier: float = 1.0,
    reinforcement_learning_rate_multiplier: float = 1.0,
    reward_model_train_steps: int = 1000,
    reinforcement_learning_train_steps: int = 1000,
    kl_coeff: float = 0.1,
    instruction: str = "",
    deploy_model: bool = True,
    eval_dataset: str = "",
    project: str = "",
    accelerator_type: str = "GPU",
    location: str = "",
    encryption_spec_key_name: str = "",
    tensorboard_resource_id: str = "",
) -> RLHFOutputs:
    """Reward model on people's preferences, PPO against it, bulk inference, Side-by-Side."""
    return _rlhf(dict(locals()), "rlhf")


@dsl.pipeline(name="infer-eval-template", description="Bulk inference.")
def infer_pipeline(
    large_model_reference: str,
    prompt_dataset: str,
    model_checkpoint: str = "",
    prompt_sequence_length: int = 512,
    target_sequence_length: int = 64,
    sampling_strategy: str = "greedy",
    instruction: str = "",
    project: str = "",
    accelerator_type: str = "GPU",
    location: str = "",
    encryption_spec_key_name: str = "",
) -> InferOutputs:
    """Completions of every prompt by a base model or a tuned one."""
    values = dict(locals())
    task = component(infer_component, "infer", _SETTINGS.kfp)(settings=_CARRIED, **values)
    configure(task, _SETTINGS.kfp, with_model=True, caching=False)
    return InferOutputs(output_prediction_gcs_path=task.output)


@dsl.pipeline(name="rlaif-pipeline", description="RLAIF: a judge chooses, then RLHF.")
def rlaif_pipeline(
    prompt_dataset: str,
    preference_prompt_dataset: str,
    large_model_reference: str,
    task_type: str,
    model_display_name: str = "",
    prompt_sequence_length: int = 512,
    target_sequence_length: int = 64,
    large_model_a_reference: str = "text-bison@001",
    large_model_b_reference: str = "t5-small",
    reward_model_learning_rate_multiplier: float = 1.0,
    reinforcement_learning_rate_multiplier: float = 1.0,
    reward_model_train_steps: int = 1000,
    reinforcement_learning_train_steps: int = 1000,
    kl_coeff: float = 0.1,
    sampling_strategy: str = "temperature_sampling",
    instruction: str = "",
    eval_dataset: str = "",
    project: str = "",
    accelerator_type: str = "GPU",
    location: str = "",
    tensorboard_resource_id: str = "",
) -> RLHFOutputs:
    """Two models answer, a judge chooses in both orders, and RLHF learns from its choices."""
    values = dict(locals())
    own = ("preference_prompt_dataset", "task_type", "sampling_strategy")
    models = ("large_model_a_reference", "large_model_b_reference")
    shared = (
        "large_model_reference",
        "model_display_name",
        "prompt_sequence_length",
        "target_sequence_length",
        "instruction",
        "accelerator_type",
    )
    ask = component(ai_preferences_component, "ai-preferences", _SETTINGS.kfp)
    chosen = ask(settings=_CARRIED, **{name: values[name] for name in (*own, *models, *shared)})
    configure(chosen, _SETTINGS.kfp, with_model=True, caching=False)
    of_rlhf = {name: value for name, value in values.items() if name not in (*own, *models)}
    return _rlhf(
        {
            **of_rlhf,
            "preference_dataset": chosen.output,
            "deploy_model": True,
            "encryption_spec_key_name": "",
        },
        "rlaif",
    )


@dsl.pipeline(name="autosxs-template", description="Side-by-Side by a judge.")
def autosxs_pipeline(
    evaluation_dataset: str,
    task: str,
    id_columns: list[str],
    autorater_prompt_parameters: dict[str, dict[str, str]],
    model_a: str = "",
    model_b: str = "",
    model_a_prompt_parameters: dict[str, dict[str, str]] = {},
    model_b_prompt_parameters: dict[str, dict[str, str]] = {},
    response_column_a: str = "",
    response_column_b: str = "",
    model_a_parameters: dict[str, str] = {},
    model_b_parameters: dict[str, str] = {},
    human_preference_column: str = "",
    project: str = "",
    location: str = "",
    judgments_format: str = "jsonl",
    bigquery_destination_prefix: str = "",
    experimental_args: dict[str, Any] = {},
    encryption_spec_key_name: str = "",
) -> AutoSxSOutputs:
    """Which of two responses a judge prefers, and how far it agrees with people."""
    values = dict(locals())
    judge = component(autosxs_component, "autosxs", _SETTINGS.kfp)
    judged = judge(settings=_CARRIED, **values)
    configure(judged, _SETTINGS.kfp, with_model=True, caching=False)
    return AutoSxSOutputs(**{name: judged.outputs[name] for name in AutoSxSOutputs._fields})


class PipelineJob:
    """Runs a compiled pipeline on this machine; named and called as in Vertex's SDK.

    Args:
        display_name: not used.
        template_path: what `kfp.compiler.Compiler().compile` wrote.
        pipeline_root: the folder of the run folders; empty: AMENABLE_RUNS, else runs/.
        parameter_values: of the pipeline's parameters; None stands for the default.
        enable_caching: leave out the tasks of stages whose results are there; None: yes.
        project: not used.
        location: not used.

    Raises:
        UsageError: there is no such file or parameter, or one without a default is missing.
    """

    def __init__(
        self,
        display_name: str = "",
        template_path: str = "",
        *,
        pipeline_root: str = "",
        parameter_values: Mapping[str, Any] | None = None,
        enable_caching: bool | None = None,
        project: str = "",
        location: str = "",
    ) -> None:
        self.outputs: dict[str, Any] = {}
        """Of the pipeline, once it has run."""
        given = parameter_values or {}
        self._values = {name: value for name, value in given.items() if value is not None}
        self._caching = enable_caching is not False
        self._root = pipeline_root
        if not Path(template_path).is_file():
            raise UsageError(f"template_path: {template_path!r} is no file; compile the pipeline")
        self._pipeline = components.load_component_from_file(template_path)
        self._check_names()
        for name, value in self._values.items():  # kfp takes no 1 for 1.0
            if self._pipeline.component_spec.inputs[name].type == "Float":
                self._values[name] = float(value) if isinstance(value, int) else value

    def run(self) -> None:
        """Runs it; says what it does, and where the results are.

        Raises:
            TaskFailed: a task failed; with its error line and exit code.
        """
        out = sys.stdout

        def say(line: str) -> None:
            out.write(f"{line}\n")
            out.flush()

        is_remote = "://" in self._root
        root = Path(("" if is_remote else self._root) or os.environ.get(RUNS_VARIABLE) or "runs")
        if is_remote:
            say(f"not honoured: pipeline_root {self._root}: run folders are local, below {root}/")
        tasks = root / f"kfp-{self._pipeline.name}"
        with _environment(RUNS_VARIABLE, str(root)):
            try:
                self.outputs = run_pipeline(
                    self._pipeline, self._values, tasks, say, caching=self._caching
                )
            except InconsistentTypeException as error:
                raise UsageError(f"parameter_values: {error}") from error

    def _check_names(self) -> None:
        known = self._pipeline.component_spec.inputs
        for name in self._values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise UsageError(f"parameter_values: no parameter {name!r}; {hint}")
        for name, parameter in known.items():
            if not parameter.optional and name not in self._values:
                raise UsageError(f"parameter_values: {name} is missing, and has no default")


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable, while the block runs."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
