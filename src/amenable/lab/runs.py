"""A cell's run: model folder, data rows and recipe in a run folder, then the policy stage itself.

Nothing of the algorithms is repeated here: the lab calls the function that `amenable run` calls.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amenable.algorithms import ALGORITHMS
from amenable.artifacts import MetricsLog, RunFolder, StageContext, write_jsonl
from amenable.config.load import load_recipe
from amenable.lab.problems import REWARD, Problem, present
from amenable.progress import Deadline, Progress

if TYPE_CHECKING:
    from amenable.lab.optima import World

COMMON: dict[str, Any] = {
    "model.dtype": "fp32",
    "model.lora.enabled": False,
    "reward.enabled": False,
    "policy.reward": REWARD,
    "policy.gate": False,
    "policy.checkpoint_every": 10**6,
    "policy.micro_batch_tokens": 10**6,
    "policy.final_learning_rate_fraction": 0.0,
    "policy.missing_eos_penalty": 0.0,
    "policy.epochs": 1,
    "policy.minibatches": 1,
    "policy.clip_range": 1.0,
    "policy.max_approx_kl": 1e6,
    "policy.max_grad_norm": 1e3,
}
"""Every run: whole model, no clip that binds, no charge for completions that were cut off."""


def make_context(
    world: World,
    base: Path,
    root: Path,
    seed: int,
    settings: Mapping[str, Any],
    pairs: Iterable[Mapping[str, Any]] = (),
) -> StageContext:
    """A run folder with the problem's prompts, or with preferences, and the recipe.

    Args:
        world: problem and rewards.
        base: the reference's model folder.
        root: the run folder.
        seed: of the recipe.
        settings: dotted recipe keys over `COMMON`.
        pairs: preferences to learn from; none: prompts.
    """
    problem = world.problem
    ignored = ALGORITHMS[str(settings.get("policy.algorithm", "ppo"))].ignores
    values = {
        **{k: v for k, v in COMMON.items() if k.removeprefix("policy.") not in ignored},
        **settings,
        "seed": seed,
        "model.base": str(base),
        "data.max_prompt_tokens": 8,
        "data.max_completion_tokens": problem.max_tokens,
    }
    rows = list(pairs)
    values |= {"data.preferences" if rows else "data.prompts": ["enumerated"]}
    recipe = load_recipe(None, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    folder = RunFolder(root)
    if rows:
        write_jsonl(folder.data / "preferences.train.jsonl", rows)
        write_jsonl(folder.data / "preferences.validation.jsonl", rows[:2])
    else:
        write_jsonl(folder.data / "prompts.train.jsonl", prompt_rows(problem, copies=1))
    return StageContext(
        recipe=recipe,
        folder=folder,
        stage="policy",
        log=MetricsLog("policy", folder.stage("policy"), tensorboard=False),
        progress=Progress(stream=io.StringIO(), quiet=True),
        deadline=Deadline(None),
    )


def prompt_rows(problem: Problem, copies: int = 64) -> list[dict[str, str]]:
    """Rows of the problem's prompts, in turn.

    With one copy an update that wants more rows has every prompt equally often.
    """
    return [
        {"id": f"{prompt}{copy}", "group": prompt, "input_text": prompt}
        for copy in range(copies)
        for prompt in problem.prompts
    ]


def train(world: World, ctx: StageContext) -> Path:
    """Runs the policy stage; the folder of the tuned model."""
    from amenable.lab.prefix_table import register
    from amenable.train.registry import run_policy

    register()
    present(world.problem, world.rewards)
    with _cache_in(ctx.folder.root / "cache"):
        run_policy(ctx)
    return ctx.folder.models / "tuned"


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Keeps tokens of the lab's rows out of the user's model cache."""
    before = os.environ.get("AMENABLE_HOME")
    os.environ["AMENABLE_HOME"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["AMENABLE_HOME"]
        else:
            os.environ["AMENABLE_HOME"] = before
