"""The stages of a recipe as a Kubeflow pipeline: one component each, around the command line.

    prepare -> data -> sft -> collect -> reward -> policy -> evaluate -> report

Stages that the recipe has switched off are left out. Components exchange paths and hashes: the
artifacts lie in the run folder, on a volume that every task mounts. A component takes its key from
`prepare` and the state of the stage before it; both decide whether its task is cached.

The source of the functions named `…_component` is what kfp writes into the YAML and runs in a
process of its own: their imports stand inside, and this file does without postponed annotations,
which kfp's decorator does not read.
"""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from amenable.artifacts import write_text
from amenable.config.kfp import KfpConfig
from amenable.config.load import load_recipe, to_toml
from amenable.config.recipe import Recipe
from amenable.errors import UsageError
from amenable.pipeline.kfp_tasks import stages_of

try:
    import yaml
    from kfp import compiler, kubernetes
    from kfp import components as components
    from kfp import dsl as dsl
    from kfp.dsl import HTML, Artifact, Metrics, Output
    from kfp.dsl.types.type_utils import InconsistentTypeException as InconsistentTypeException
except ImportError as error:
    raise UsageError(
        f'Kubeflow Pipelines is not installed ({error}); run: pip install "amenable[kfp]"'
    ) from error

MODEL_STAGES = ("sft", "collect", "reward", "policy", "evaluate")
"""Those that load a model: they get the GPUs."""


def prepare_component(recipe: str, run_folder: str, stages: list[str]) -> NamedTuple(
    "Keys",
    [
        ("data", str),
        ("sft", str),
        ("collect", str),
        ("reward", str),
        ("policy", str),
        ("evaluate", str),
        ("report", str),
    ],
):
    """Puts the recipe into the run folder and gives each stage its key."""
    from collections import namedtuple

    from amenable.pipeline.kfp_tasks import prepare

    keys = prepare(recipe, run_folder, stages)
    return namedtuple("Keys", keys)(**keys)


def stage_component(stage: str, run_folder: str, key: str, upstream: str) -> str:
    """Runs one stage by `amenable run --only`."""
    from amenable.pipeline.kfp_tasks import run_stage

    return run_stage(stage, run_folder, key)


def report_component(
    stage: str,
    run_folder: str,
    key: str,
    upstream: str,
    report: Output[HTML],
    summary: Output[Artifact],
    metrics: Output[Metrics],
) -> str:
    """Runs the last stage and hands out what the run has come to."""
    from amenable.pipeline.kfp_tasks import results, run_stage

    state = run_stage(stage, run_folder, key)
    for name, value in results(run_folder, report.path, summary.path, metrics.path).items():
        metrics.log_metric(name, value)
    return state


def recipe_pipeline(recipe: Recipe) -> Any:
    """The pipeline of a recipe; its parameters are the recipe's text and the run folder."""
    config, stages = recipe.kfp, stages_of(recipe)
    folder = f"{config.mount}/{recipe.name}"

    def run(recipe: str, run_folder: str = folder) -> None:
        prepare = component(prepare_component, "prepare", config)
        prepared = prepare(recipe=recipe, run_folder=run_folder, stages=stages)
        add_stages(prepared, run_folder, config, stages)

    described = f"Amenable: {', '.join(stages)}"
    return dsl.pipeline(name=pipeline_name(recipe.name), description=described)(run)


def add_stages(prepared: Any, run_folder: Any, config: KfpConfig, stages: list[str]) -> Any:
    """Adds a task for each stage, one after the other, and returns the last one.

    Args:
        prepared: the task that gives each stage its key.
        run_folder: a pipeline's parameter, or a task's output.
        config: what the tasks get.
        stages: names, in order.
    """
    configure(prepared, config, with_model=False, caching=False)
    last, upstream = prepared, ""
    for stage in stages:
        function = report_component if stage == "report" else stage_component
        last = component(function, stage, config)(
            stage=stage, run_folder=run_folder, key=prepared.outputs[stage], upstream=upstream
        )
        configure(last, config, with_model=stage in MODEL_STAGES, caching=config.caching)
        upstream = last.outputs["Output"]
    return last


def component(function: Callable[..., Any], name: str, config: KfpConfig) -> Any:
    """The function as a component of that name; nothing is installed when it runs."""
    made = dsl.component(function, base_image=config.image, install_kfp_package=False)
    made.name = made.component_spec.name = name
    return made


def configure(task: Any, config: KfpConfig, *, with_model: bool, caching: bool) -> None:
    """Gives the task its volume, resources, retries and caching."""
    task.set_caching_options(caching)
    if config.retries:
        task.set_retry(config.retries)
    if config.volume:
        kubernetes.mount_pvc(task, pvc_name=config.volume, mount_path=config.mount)
    if with_model and config.gpus:
        task.set_accelerator_type(config.gpu_type).set_accelerator_limit(config.gpus)
    if with_model and config.memory:
        task.set_memory_limit(config.memory)
    if with_model and config.cpu:
        task.set_cpu_limit(config.cpu)


def pipeline_name(name: str) -> str:
    """The run's name as Kubeflow has names: a-z, 0-9 and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"


def load(path: Path, settings: list[str]) -> tuple[str, Recipe]:
    """A recipe's text and the recipe; with settings the text has every value written out.

    Raises:
        RecipeError: it is wrong.
    """
    recipe = load_recipe(path, settings)
    return (to_toml(recipe) if settings else path.read_text(encoding="utf-8")), recipe


def compile_to(text: str, recipe: Recipe, path: Path) -> None:
    """Writes the pipeline of a recipe as YAML; the same recipe gives the same bytes.

    Args:
        text: the recipe as TOML, which becomes the default of the pipeline's parameter. (kfp
            itself breaks the file where a default has several lines.)
        recipe: the same, loaded.
        path: ends in .yaml or .yml.

    Raises:
        UsageError: the name ends otherwise.
        StorageError: it cannot be written.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{path}: a compiled pipeline is a .yaml file; name one")
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(recipe_pipeline(recipe), str(compiled))
        pipeline, *platforms = yaml.safe_load_all(compiled.read_text(encoding="utf-8"))
    parameter = pipeline["root"]["inputDefinitions"]["parameters"]["recipe"]
    parameter |= {"defaultValue": text, "isOptional": True}
    write_text(path, yaml.dump_all([pipeline, *platforms], Dumper=_Dumper, allow_unicode=True))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Texts of several lines as such."""


def _text(dumper: Any, text: str) -> Any:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
