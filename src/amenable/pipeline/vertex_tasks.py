"""What happens inside the tasks of the pipelines that take Google Cloud's parameters; no kfp."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from amenable.artifacts import RunFolder, read_json, read_jsonl, write_json, write_jsonl
from amenable.config.load import load_recipe, to_toml
from amenable.config.recipe import Recipe
from amenable.data.formats.gcpc import prediction_row
from amenable.errors import AmenableError, UsageError
from amenable.pipeline.kfp_tasks import amenable, prepare, say, task
from amenable.pipeline.preflight import silence_libraries
from amenable.pipeline.vertex_parameters import (
    REWARD_EVALUATION_ROWS,
    SETTINGS_VARIABLE,
    JudgeSettings,
    Settings,
    evaluation_kind,
    inference_recipe,
    large_model,
    not_honoured,
    prompts_alone,
    recipe_of,
    records,
    rlhf_recipe,
    run_name,
    settings_of,
)

Json = dict[str, Any]

RUNS_VARIABLE = "AMENABLE_RUNS"
"""Environment variable with the folder of the run folders; without it they lie in `kfp.mount`."""

RLHF_STAGES = ("data", "reward", "policy", "evaluate", "report")
SHOWN_ROWS, SHOWN_CHARACTERS = 5, 160
"""Of the Side-by-Side table, in the log."""


def runs_root(settings: str) -> Path:
    """The folder of the run folders: here `PipelineJob` names it, on a cluster the volume is it."""
    return Path(os.environ.get(RUNS_VARIABLE) or read_back(settings).kfp.mount)


def run_folder(values: Mapping[str, Any], settings: str, kind: str) -> Path:
    """The run folder of these parameters."""
    return runs_root(settings) / run_name(values, kind)


# RLHF -----------------------------------------------------------------------------------------


def prepare_rlhf(values: Mapping[str, Any], settings: str, kind: str = "rlhf") -> Json:
    """Puts the recipe of the parameters into its run folder and says what is not honoured.

    Args:
        values: of all parameters of `rlhf_pipeline`.
        settings: the settings file, as JSON.
        kind: of the pipeline, for the name of its run.

    Returns:
        A key for each stage; `run_folder`, where the other tasks find what they need.
    """
    with task("prepare"):
        folder = run_folder(values, settings, kind)
        recipe = rlhf_recipe(values, read_back(settings), kind)
        for line in not_honoured(values):
            say(f"not honoured: {line}")
        say(f"run folder: {folder}")
    keys = prepare(to_toml(recipe), str(folder), RLHF_STAGES)
    return {**{stage: keys[stage] for stage in RLHF_STAGES}, "run_folder": str(folder)}


def finish_rlhf(run_folder: str, state: str, dataset: str) -> Json:
    """What the reference does after tuning, and the Side-by-Side table of the course.

    Args:
        run_folder: of the finished run.
        state: of its last stage.
        dataset: `eval_dataset`; empty: none.

    Returns:
        `model_resource_name` and `endpoint_resource_name`, empty as for every model that Vertex
        does not deploy; `tuned_model`, `side_by_side` and `predictions`, paths or empty.
    """
    folder = RunFolder(Path(run_folder))
    out = folder.root / "vertex"
    with task("results"):
        silence_libraries()
        recipe = load_recipe(folder.recipe_path)
        tuned, predictions = folder.models / "tuned", ""
        match evaluation_kind(dataset):
            case "prompts":
                predictions = str(out / "predictions.jsonl")
                _unless_made(
                    out / "predictions.jsonl",
                    [state, *_contents(dataset)],
                    lambda path: _infer(tuned, recipe, dataset, path, 0.0),
                )
                say(f"predictions: {predictions}")
            case "preferences":
                _unless_made(
                    out / "reward_evaluation.json",
                    [state, *_contents(dataset)],
                    lambda path: _evaluate_reward(folder, dataset, path),
                )
                say(f"reward model on eval_dataset: {_figures(out / 'reward_evaluation.json')}")
        table = _side_by_side(folder, recipe, out / "side_by_side.jsonl")
        say(f"tuned model: {tuned}")
    return {
        "model_resource_name": "",
        "endpoint_resource_name": "",
        "tuned_model": str(tuned),
        "side_by_side": str(table),
        "predictions": predictions,
    }


def _side_by_side(folder: RunFolder, recipe: Recipe, out: Path) -> Path:
    """The course's table: prompt, base model's and tuned model's answer; tells the first rows."""
    found = [
        {
            "prompt": _asked(recipe, row["input_text"]),
            "base_model": row["completions"]["base"],
            "tuned_model": row["completions"]["tuned"],
        }
        for row in read_jsonl(folder.stage_path("evaluate") / "completions.jsonl")
    ]
    write_jsonl(out, found)
    for row in found[:SHOWN_ROWS]:
        for column, text in row.items():
            say(f"  {column:<12} {_shortened(text)}")
    say(f"side by side, {len(found)} prompts: {out}")
    return out


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= SHOWN_CHARACTERS else f"{words[: SHOWN_CHARACTERS - 1]}…"


def _evaluate_reward(folder: RunFolder, dataset: str, out: Path) -> None:
    """Accuracy and cross entropy of the reward model on people's choices, ties left out."""
    from amenable.data.reading.readers import read_preferences
    from amenable.data.schemas import Choice
    from amenable.judges.opening import open_judge
    from amenable.judges.types import Question, Reply

    rows = [row for row in read_preferences([dataset]) if row.choice is not Choice.TIE]
    rows = rows[:REWARD_EVALUATION_ROWS]
    judge = open_judge(str(folder.models / "reward"), "", None, {}, out.parent)
    replies: dict[int, Reply] = {}
    judge.ask(
        [Question(row.prompt, row.candidate_0, row.candidate_1) for row in rows],
        replies.__setitem__,
    )
    of_chosen = []
    for number, row in enumerate(rows):
        first = replies[number].confidence
        assert first is not None
        of_chosen.append(first if row.choice is Choice.FIRST else 1 - first)
    figures = {
        "rows": len(rows),
        "accuracy": sum((p > 0.5) + 0.5 * (p == 0.5) for p in of_chosen) / len(rows),
        "cross_entropy": -sum(math.log(max(p, sys.float_info.min)) for p in of_chosen) / len(rows),
    }
    write_json(out, figures)


def _figures(path: Path) -> str:
    found = read_json(path)
    return (
        f"accuracy {found['accuracy']:.3f}, cross entropy {found['cross_entropy']:.3f} nats,"
        f" {found['rows']} rows ({path})"
    )


# Bulk inference -------------------------------------------------------------------------------


def infer(values: Mapping[str, Any], settings: str) -> str:
    """Completes every prompt; returns the path of the rows, which have the reference's shape.

    Args:
        values: of all parameters of `infer_pipeline`.
        settings: the settings file, as JSON.
    """
    with task("infer"):
        out = run_folder(values, settings, "infer") / "predictions.jsonl"
        silence_libraries()
        recipe = inference_recipe(values, read_back(settings))
        for line in not_honoured(values):
            say(f"not honoured: {line}")
        model = values["model_checkpoint"] or recipe.model.base
        temperature = float(values["sampling_strategy"] == "temperature_sampling")
        _infer(model, recipe, values["prompt_dataset"], out, temperature)
        say(f"predictions: {out}")
    return str(out)


def _infer(model: Path | str, recipe: Recipe, dataset: str, out: Path, temperature: float) -> None:
    """Writes a row a prompt, in the reference's shape."""
    from amenable.data.reading.readers import read_prompts

    instruction = recipe.data.instruction
    rows = _complete(model, recipe, read_prompts([dataset]), temperature)
    write_jsonl(
        out, [prediction_row(instruction, row["input_text"], row["completion"]) for row in rows]
    )


def _complete(
    model: Path | str, recipe: Recipe, prompts: Sequence[Any], temperature: float
) -> list[Json]:
    from amenable.evaluate.generate import Completer
    from amenable.evaluate.systems import model_source
    from amenable.rollout.types import Sampling

    sampling = Sampling(max_new_tokens=recipe.data.max_completion_tokens, temperature=temperature)
    completer = Completer(model_source(str(model)), recipe)
    return list(completer.complete(prompts, sampling, recipe.seed))


# AI feedback ----------------------------------------------------------------------------------


def ai_preferences(values: Mapping[str, Any], settings: str) -> str:
    """Two models answer, a judge chooses; returns the path of the preferences.

    Args:
        values: of all parameters of `rlaif_pipeline`.
        settings: the settings file, as JSON.
    """
    with task("ai-preferences"):
        out = run_folder(values, settings, "rlaif") / "vertex" / "preferences.jsonl"
        silence_libraries()
        chosen = read_back(settings)
        template = _template(values["task_type"], chosen.judge, "task_type")
        answers = {
            side: _answers(values, chosen, f"large_model_{side}_reference") for side in ("a", "b")
        }
        rows = list(_choices(answers["a"], answers["b"], chosen.judge, template, out.parent))
        if not rows:
            raise UsageError(
                f"the judge {chosen.judge.source} decided for neither answer to any prompt, in both"
                " orders: there is nothing to learn from; ask another judge, or other models"
            )
        write_jsonl(out, rows)
        say(f"{len(rows)} of {len(answers['a'])} pairs decided alike in both orders: {out}")
    return str(out)


def _answers(values: Mapping[str, Any], settings: Settings, parameter: str) -> list[Json]:
    from amenable.data.reading.readers import read_prompts

    large_model(values[parameter], settings, parameter)  # the error names the parameter
    asked = {
        **values,
        "large_model_reference": values[parameter],
        "prompt_dataset": values["preference_prompt_dataset"],
    }
    recipe = inference_recipe(asked, settings)
    temperature = float(values["sampling_strategy"] == "temperature_sampling")
    prompts = read_prompts([values["preference_prompt_dataset"]])
    return [
        {"prompt": prompt, "text": row["completion"]}
        for prompt, row in zip(
            prompts, _complete(recipe.model.base, recipe, prompts, temperature), strict=True
        )
    ]


def _choices(
    of_a: Sequence[Json], of_b: Sequence[Json], judge: JudgeSettings, template: str, out: Path
) -> Iterator[Json]:
    """Rows of the pairs on which the judge's two orders agree."""
    from amenable.evaluate.both_orders import Orders
    from amenable.judges.asking import Pair, ask_both_orders
    from amenable.judges.opening import open_judge
    from amenable.judges.store import ReplyStore
    from amenable.judges.template import load_template

    pairs = [Pair(a["prompt"], a["text"], b["text"]) for a, b in zip(of_a, of_b, strict=True)]
    opened = open_judge(
        judge.source, judge.model, load_template(template), {"token_env": judge.token_env}, out
    )
    out.mkdir(parents=True, exist_ok=True)
    with closing(ReplyStore(out / "replies.sqlite")) as store:
        orders = Orders.of(ask_both_orders(opened, pairs, store).looks)
    scores = dict(zip(orders.prompts, orders.scores.tolist(), strict=True))
    for pair in pairs:
        if scores.get(pair.prompt.id) in (0.0, 1.0):
            yield {
                "input_text": pair.prompt.text,
                "candidate_0": pair.a,
                "candidate_1": pair.b,
                "choice": int(scores[pair.prompt.id]),
            }


# AutoSxS --------------------------------------------------------------------------------------


def autosxs(values: Mapping[str, Any], settings: str) -> Json:
    """Judges two columns of answers, or models' answers, by `amenable compare` and `audit`.

    Args:
        values: of all parameters of `autosxs_pipeline`.
        settings: the settings file, as JSON.

    Returns:
        `evaluation_count`, the path of the judgments, and the win rates.
    """
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    with task("autosxs"):
        folder = runs_root(settings) / f"autosxs-{digest}"
        chosen = read_back(settings)
        template = _template(values["task"].split("@")[0], chosen.judge, "task")
        for line in _autosxs_not_honoured(values):
            say(f"not honoured: {line}")
        rows = list(records([path.strip() for path in values["evaluation_dataset"].split(",")]))
        cases = _cases(rows, values, chosen)
        people = list(_people(cases, rows, values["human_preference_column"]))
        for side in ("a", "b"):
            write_jsonl(
                folder / f"model_{side}.jsonl",
                [
                    {"id": c["id"], "input_text": c["prompt"], "completion": c[f"response_{side}"]}
                    for c in cases
                ],
            )
        asked = _judge_options(chosen.judge, template)
        models = [f"{side}={folder / f'model_{side}.jsonl'}" for side in ("a", "b")]
        amenable("compare", *models, *asked, "--out", str(folder))
        (compared,) = read_json(folder / "comparison.json")["comparisons"]
        metrics = {
            "autosxs_model_a_win_rate": 1 - compared["win_rate"],
            "autosxs_model_b_win_rate": compared["win_rate"],
        }
        if people:
            metrics |= _alignment(people, asked, folder)
        judgments = folder / "judgments.jsonl"
        write_jsonl(judgments, _judgments(cases, folder))
        write_json(folder / "metrics.json", metrics)
        for name, value in metrics.items():
            say(f"{name} {'not defined' if value is None else f'{value:.3f}'}")
        say(f"judgments: {judgments}; page: {folder / 'comparison.html'}")
    return {
        "model_a_evaluation_resource_name": "",
        "model_b_evaluation_resource_name": "",
        "evaluation_count": len(cases),
        "evaluation_dataset_path": values["evaluation_dataset"],
        "judgments": str(judgments),
        "model_a_win_rate": metrics["autosxs_model_a_win_rate"],
        "model_b_win_rate": metrics["autosxs_model_b_win_rate"],
    }


def _cases(rows: Sequence[Json], values: Mapping[str, Any], settings: Settings) -> list[Json]:
    """What the judge is shown of every row."""
    found = []
    for row in rows:
        asked = {
            name: _filled(row, values["autorater_prompt_parameters"].get(name, {}), name)
            for name in ("inference_instruction", "inference_context")
        }
        named = {name: _column(row, name, "id_columns") for name in values["id_columns"]}
        found.append(
            {
                "named": named,
                "id": "/".join(map(str, named.values())),
                "prompt": "\n\n".join(text for text in asked.values() if text),
                **asked,
            }
        )
    for side in ("a", "b"):
        model, column = values[f"model_{side}"], values[f"response_column_{side}"]
        if model:
            texts = _responses(rows, found, values, settings, side)
        elif column:
            texts = [str(_column(row, column, f"response_column_{side}")) for row in rows]
        else:
            raise UsageError(
                f"model_{side} and response_column_{side}: both are empty; name a model, or the"
                " column of its ready responses"
            )
        for case, text in zip(found, texts, strict=True):
            case[f"response_{side}"] = text
    return found


def _responses(
    rows: Sequence[Json],
    cases: Sequence[Json],
    values: Mapping[str, Any],
    settings: Settings,
    side: str,
) -> list[str]:
    """A model's own answers, greedily unless its parameters say otherwise."""
    from amenable.data.schemas import Message, Prompt, Speaker

    model = large_model(values[f"model_{side}"], settings, f"model_{side}")
    shown = values[f"model_{side}_prompt_parameters"].get("prompt")
    told = values[f"model_{side}_parameters"]
    prompts = []
    for row, case in zip(rows, cases, strict=True):
        text = _filled(row, shown, "prompt") if shown else case["prompt"]
        messages = (Message(Speaker.USER, text),)
        prompts.append(Prompt(messages=messages, id=case["id"], group=case["id"]))
    keys = {"model.base": model.base, "model.chat_template": model.chat, **prompts_alone(["-"])}
    if "maxOutputTokens" in told:
        keys["data.max_completion_tokens"] = int(float(told["maxOutputTokens"]))
    recipe = recipe_of(keys, settings)
    found = _complete(model.base, recipe, prompts, float(told.get("temperature", 0)))
    return [row["completion"] for row in found]


def _people(cases: Sequence[Json], rows: Sequence[Json], column: str) -> Iterator[Json]:
    """People's choices as preferences; an empty response is no candidate, and left out.

    Raises:
        UsageError: a choice is neither A nor B, or there is no such column.
    """
    choices = {"A": 0, "B": 1}
    for case, row in zip(cases, rows, strict=True) if column else ():
        said = str(_column(row, column, "human_preference_column"))
        if said not in choices:
            raise UsageError(
                f"human_preference_column {column!r}: {case['id']} has {said!r}; expected A or B"
            )
        if case["response_a"].strip() and case["response_b"].strip():
            yield {
                "id": case["id"],
                "input_text": case["prompt"],
                "candidate_0": case["response_a"],
                "candidate_1": case["response_b"],
                "choice": choices[said],
            }


def _alignment(people: Sequence[Json], asked: Sequence[str], folder: Path) -> Json:
    """How far the judge agrees with people; replies of the comparison are not asked for again."""
    write_jsonl(folder / "people.jsonl", people)
    amenable("audit", str(folder / "people.jsonl"), *asked, "--out", str(folder))
    found = read_json(folder / "audit.json")
    share = sum(row["choice"] for row in people) / len(people)
    return {
        "human_preference_model_a_win_rate": 1 - share,
        "human_preference_model_b_win_rate": share,
        **{name: found[name] for name in ("accuracy", "precision", "recall", "f1")},
        "cohens_kappa": found["kappa"],
    }


def _judgments(cases: Sequence[Json], folder: Path) -> Iterator[Json]:
    """A row a case: what the judge said of it in both orders together."""
    looks: dict[str, list[Json]] = {}
    for look in read_jsonl(folder / "looks.jsonl"):
        looks.setdefault(str(look["id"]), []).append(look)
    shown = ("inference_instruction", "inference_context", "response_a", "response_b")
    for case in cases:
        own = looks.get(case["id"], [])
        choice, confidence = _choice(own)
        yield {
            **case["named"],
            **{name: case[name] for name in shown},
            "choice": choice,
            "confidence": confidence,
            "explanation": "\n".join(look["reply"] for look in own),
        }


def _choice(looks: Sequence[Json]) -> tuple[str, float | None]:
    """A, B, tie or Error, and the mean probability of what was chosen.

    A judge that tells no probability is taken to be certain of each verdict.
    """
    verdicts = {"first": 1.0, "second": 0.0, "tie": 0.5, "both-bad": 0.5}
    valid = [look for look in looks if look["verdict"] in verdicts]
    if not valid:
        return "Error", None
    for_b, sure = 0.0, 0.0
    for look in valid:
        first = verdicts[look["verdict"]]
        told = first if look["confidence"] is None else look["confidence"]
        for_b += (first if look["first"] == "b" else 1 - first) / len(valid)
        sure += (told if look["first"] == "b" else 1 - told) / len(valid)
    if for_b == 0.5:
        return "tie", max(sure, 1 - sure)
    return ("B", sure) if for_b > 0.5 else ("A", 1 - sure)


def _autosxs_not_honoured(values: Mapping[str, Any]) -> Iterator[str]:
    yield from not_honoured({**values, "accelerator_type": "CPU"})
    if values["judgments_format"] != "jsonl":
        yield f"judgments_format {values['judgments_format']}: judgments are JSON Lines"
    if values["bigquery_destination_prefix"]:
        yield "bigquery_destination_prefix: nothing is written to BigQuery"
    if values["experimental_args"]:
        yield "experimental_args: undocumented, and left out"
    yield "the judge is yours, asked in both orders; Google's autorater is closed"


def _filled(row: Json, how: Mapping[str, str], parameter: str) -> str:
    """A text of a row: a column, or a template with {{ column }} in it."""
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    if "column" in how:
        return str(_column(row, how["column"], parameter))
    template = how.get("template", "")
    try:
        found = SandboxedEnvironment(undefined=StrictUndefined).from_string(template)
        return found.render(default_instruction="", **row)
    except TemplateError as error:
        raise UsageError(f"{parameter}: template {template!r}: {error}") from error


def _column(row: Json, column: str, parameter: str) -> Any:
    if column not in row:
        raise UsageError(
            f"{parameter}: no column {column!r} in evaluation_dataset; a row has {', '.join(row)}"
        )
    return row[column]


def _template(name: str, judge: JudgeSettings, parameter: str) -> str:
    """The judge's template for a task.

    Raises:
        UsageError: nobody judges, or there is no such task.
    """
    tasks = {"summarization": "summary-1", "question_answering": "answer-1"}
    if name not in tasks:
        raise UsageError(f"{parameter}: no task {name!r}; there are {', '.join(tasks)}")
    if not judge.source:
        raise UsageError(
            "nobody judges: Google's autorater is closed; name a judge in the file that"
            f" {SETTINGS_VARIABLE} names: [judge], source = a service's URL, a model or a function"
        )
    return judge.template or tasks[name]


def _judge_options(judge: JudgeSettings, template: str) -> list[str]:
    options = ["--judge", judge.source, "--template", template]
    options += ["--judge-model", judge.model] if judge.model else []
    return options + (["--token-env", judge.token_env] if judge.token_env else [])


def read_back(settings: str) -> Settings:
    """The settings file, from the JSON that a pipeline carries.

    Raises:
        RecipeError: a key or value is wrong.
    """
    return settings_of(json.loads(settings), SETTINGS_VARIABLE)


def _asked(recipe: Recipe, text: str) -> str:
    return f"{recipe.data.instruction}\n\n{text}" if recipe.data.instruction else text


def _contents(dataset: str) -> Iterator[str]:
    """What changes when the files do."""
    from amenable.data.reading.sources import find_sources, state_of

    for source in find_sources([dataset]):
        if source.local is None:
            yield state_of(source)
        else:
            with source.local.open("rb") as file:
                yield hashlib.file_digest(file, "sha256").hexdigest()


def _unless_made(out: Path, of: Sequence[str], make: Callable[[Path], None]) -> None:
    """Makes a file, unless it was made of the same before."""
    mark = out.with_name(f"{out.name}.of")
    with suppress(AmenableError):
        if out.exists() and read_json(mark) == list(of):
            return
    make(out)
    write_json(mark, list(of))
