"""The reward stage on files of preferences, cross-validated: every row is held out exactly once.

    python benchmarks/reward_folds.py FILE... [--settings NAME,...] [--folds 5] [--json]

Folds are drawn by prompt, and intervals are clustered by prompt (in SummEdits the prompt is the
document). Each setting is trained anew for every fold from the same initial weights, with the
stage's own loop and loss; its held-out margins are pooled over the folds. Beside it, on the same
rows: longest-wins, shortest-wins, and a bag of words trained on the same folds. No checkpoint is
chosen: what is scored are the last weights.

A step shares one encoding of a prompt among up to `--share` of its pairs (the gradient is that of
the pairs one by one); a batch is then as many of these units as hold `batch_size` pairs on average.

Settings:

    stage            the stage's defaults: LoRA, one epoch
    stage-3-epochs   the same for three epochs
    stage-gentle     three epochs at a third of the learning rate
    frozen           no training of the trunk: logistic regression on the base model's states, the
                     last one and the mean over the completion, its penalty chosen within the fold
    frozen-last      on the last state only, which is what the stage's head reads
    frozen-mean      on the mean only

`--log FILE` keeps the margins of each fold as it ends; folds that it holds are not run again, so a
run that was stopped goes on, and settings run one after the other are shown together.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amenable.artifacts import MetricsLog, RunFolder, StageContext, read_jsonl
from amenable.config.recipe import Recipe
from amenable.config.reward import RewardConfig
from amenable.data.collate import PromptGroup, collate
from amenable.data.reading.readers import read_preferences
from amenable.data.render import Renderer
from amenable.data.schemas import Choice, Preference
from amenable.data.splits import rank_bits
from amenable.evaluate import reward_report, statistics
from amenable.evaluate.folds import group_folds, half_step, held_out_accuracy, paired_difference
from amenable.evaluate.statistics import Floats
from amenable.models.build import Foundation
from amenable.models.roles import Role
from amenable.progress import Deadline, Progress
from amenable.train.loop import Metrics, add_gradient, train_supervised
from amenable.train.rank_loss import PLAIN
from amenable.train.reward import reward_role

STAGE = RewardConfig(evaluations=1, micro_batch_tokens=1024)
"""The stage's defaults; with one evaluation, at the end, no checkpoint is chosen.

Smaller micro-batches need less memory; they change no figure beyond rounding.
"""


@dataclass(frozen=True)
class Frozen:
    """A linear model on some of the base model's states: 0 the last, 1 the mean."""

    states: tuple[int, ...]


SETTINGS: dict[str, RewardConfig | Frozen] = {
    "stage": STAGE,
    "stage-3-epochs": replace(STAGE, epochs=3.0),
    "stage-gentle": replace(STAGE, epochs=3.0, learning_rate=STAGE.learning_rate / 3),
    "frozen": Frozen((0, 1)),
    "frozen-last": Frozen((0,)),
    "frozen-mean": Frozen((1,)),
}

BASELINES = ("longest_wins", "shortest_wins", "bag_of_words")


@dataclass(frozen=True)
class Unit:
    """Pairs of one prompt that share its encoding; equal completions stand once."""

    group: PromptGroup
    rows: tuple[int, ...]
    """Numbers of the pairs."""

    places: tuple[tuple[int, int], ...]
    """Of each pair: the completions that were chosen and rejected."""


def units_of(
    renderer: Renderer, pairs: Sequence[Preference], rows: Sequence[int], share: int
) -> list[Unit]:
    """The pairs `rows`, in units of at most `share` pairs of one prompt."""
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        by_prompt[pairs[row].prompt.group].append(row)
    parts = [part[i : i + share] for part in by_prompt.values() for i in range(0, len(part), share)]
    return [_unit(renderer, pairs, part) for part in parts]


def _unit(renderer: Renderer, pairs: Sequence[Preference], rows: Sequence[int]) -> Unit:
    place_of: dict[tuple[int, ...], int] = {}
    places = []
    for row in rows:
        ids = [tuple(renderer.completion_ids(t)) for t in (pairs[row].chosen, pairs[row].rejected)]
        chosen, rejected = (place_of.setdefault(text, len(place_of)) for text in ids)
        places.append((chosen, rejected))
    group = PromptGroup(renderer.prompt_ids(pairs[rows[0]].prompt), list(place_of))
    return Unit(group, tuple(rows), tuple(places))


def passes(
    role: Role, units: Sequence[Unit], pad_id: int, budget: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Of each micro-batch: the numbers of its n pairs, and [n, 2] scores, the chosen first."""
    for part in role.split([unit.group for unit in units], budget):
        scores = role.scores(collate([units[i].group for i in part], pad_id).to(role.device))
        rows: list[int] = []
        places: list[tuple[int, int]] = []
        start = 0
        for unit in (units[i] for i in part):
            rows += unit.rows
            places += [(start + chosen, start + rejected) for chosen, rejected in unit.places]
            start += len(unit.group.completions)
        yield rows, scores[torch.tensor(places, device=scores.device)]


def gradient(
    role: Role, units: Sequence[Unit], pairs: Sequence[Preference], pad_id: int, budget: int
) -> Metrics:
    """Add the gradient of the mean weighted rank loss over the pairs of these units."""
    weight = sum(pairs[row].weight for unit in units for row in unit.rows)
    loss = 0.0
    for rows, scores in passes(role, units, pad_id, budget):
        loss += add_gradient(PLAIN(scores, [pairs[row] for row in rows]), None, weight)
    return {"rank_loss": loss}


@torch.no_grad()
def margins_of(
    role: Role, units: Sequence[Unit], rows: Sequence[int], pad_id: int, budget: int
) -> Floats:
    """[rows] score of the chosen minus score of the rejected."""
    found: dict[int, float] = {}
    for numbers, scores in passes(role, units, pad_id, budget):
        gaps = (scores[:, 0] - scores[:, 1]).double().tolist()
        found.update(zip(numbers, gaps, strict=True))
    return np.array([found[row] for row in rows])


class Trainer:
    """The reward stage's model and loop, for one fold after the other."""

    def __init__(self, recipe: Recipe, share: int) -> None:
        self.recipe, self._share = recipe, share
        self.foundation = Foundation.open(recipe)
        self._bare: Role | None = None
        self._role: Role | None = None
        self._initial: dict[str, Tensor] = {}
        self._features: tuple[Sequence[Preference], Floats] | None = None

    def margins(
        self,
        config: RewardConfig,
        pairs: Sequence[Preference],
        train: Sequence[int],
        test: Sequence[int],
    ) -> Floats:
        """[test] margins of a model trained on the rows `train`."""
        with tempfile.TemporaryDirectory() as folder:
            ctx = self._context(Path(folder), config)
            return self._train(ctx, pairs, train, test)

    def _context(self, folder: Path, config: RewardConfig) -> StageContext:
        return StageContext(
            recipe=replace(self.recipe, reward=config),
            folder=RunFolder(folder),
            stage="reward",
            log=MetricsLog("reward", folder / "stages" / "reward", tensorboard=False),
            progress=Progress(quiet=True),
            deadline=Deadline(),
        )

    def _train(
        self,
        ctx: StageContext,
        pairs: Sequence[Preference],
        train: Sequence[int],
        test: Sequence[int],
    ) -> Floats:
        role = self._fresh(ctx)
        renderer, config = self.foundation.renderer, ctx.recipe.reward
        pad_id, budget = renderer.pad_id, config.micro_batch_tokens
        units = units_of(renderer, pairs, train, self._share)
        held_out = units_of(renderer, pairs, test, self._share)
        margins = np.zeros(0)

        def evaluate() -> Metrics:
            nonlocal margins
            margins = margins_of(role, held_out, test, pad_id, budget)
            return {"eval_rank_loss": statistics.log_loss(margins)}

        size = max(1, round(config.batch_size * len(units) / len(train)))
        train_supervised(
            ctx,
            replace(config, batch_size=size),
            role,
            rows=len(units),
            gradient=lambda chosen: gradient(
                role, [units[i] for i in chosen], pairs, pad_id, budget
            ),
            evaluate=evaluate,
            loss_name="rank_loss",
        )
        return margins

    def _fresh(self, ctx: StageContext) -> Role:
        """The untrained reward model of the stage; the same weights each time."""
        if self._role is None:
            self._role = reward_role(ctx, self.foundation)
            self._initial = self._role.state()
        self._role.load_state(self._initial)
        return self._role

    def features(self, pairs: Sequence[Preference]) -> Floats:
        """[n, 2, d] states of the chosen minus those of the rejected: the last, and the mean.

        Those of the pairs that were given last are kept.
        """
        if self._features is None or self._features[0] is not pairs:
            self._features = (pairs, self._read_features(pairs))
        return self._features[1]

    @torch.no_grad()
    def _read_features(self, pairs: Sequence[Preference]) -> Floats:
        if self._bare is None:
            self._bare = self.foundation.role("base", train=False)
        pad_id = self.foundation.renderer.pad_id
        units = units_of(self.foundation.renderer, pairs, range(len(pairs)), self._share)
        found: list[Floats] = [np.zeros(0)] * len(pairs)
        for unit in units:
            batch = collate([unit.group], pad_id).to(self._bare.device)
            states = self._bare.states(batch)
            parts = states.before.float().split(batch.mask.sum(1).tolist())
            means = torch.stack([part.mean(0) for part in parts])
            both = torch.stack([states.last.float(), means], 1).double().cpu().numpy()
            for row, (chosen, rejected) in zip(unit.rows, unit.places, strict=True):
                found[row] = both[chosen] - both[rejected]
        return np.stack(found)


def linear_margins(
    features: Floats, groups: Sequence[str], train: Sequence[int], test: Sequence[int], seed: int
) -> Floats:
    """[test] margins of a penalised logistic regression, each feature scaled to the training rows.

    Feature vectors have a length near 1, so that the penalties of the bag of words fit them too.
    """
    scale = np.sqrt((features[train] ** 2).mean(0) * features.shape[1]) + 1e-12
    scaled = features / scale
    penalty = reward_report._choose_penalty(scaled[train], [groups[i] for i in train], seed)
    return np.asarray(scaled[test] @ reward_report._fit(scaled[train], penalty))


def word_margins(train: Sequence[Preference], test: Sequence[Preference], seed: int) -> Floats:
    """[test] margins of the report's bag of words."""
    vocabulary = reward_report._vocabulary(train)
    features = reward_report._differences(train, vocabulary)
    penalty = reward_report._choose_penalty(features, [pair.prompt.group for pair in train], seed)
    weights = reward_report._fit(features, penalty)
    return np.asarray(reward_report._differences(test, vocabulary) @ weights)


@dataclass(frozen=True)
class Task:
    """A file's rows and their folds."""

    name: str
    pairs: list[Preference]
    folds: list[list[int]]
    """Numbers of the rows that each fold holds out."""

    @property
    def groups(self) -> list[str]:
        """Cluster of each row."""
        return [pair.prompt.group for pair in self.pairs]

    def training(self, fold: int) -> list[int]:
        """All rows of the other folds."""
        held_out = set(self.folds[fold])
        return [row for row in range(len(self.pairs)) if row not in held_out]

    def pool(self, parts: Sequence[Floats]) -> Floats:
        """[n] what the folds say of their held-out rows, in the order of the rows."""
        order = np.concatenate(self.folds)
        return np.concatenate(parts)[np.argsort(order)]


def open_task(path: Path, folds: int, rows: int, seed: int) -> Task:
    """The decided pairs of a file, or whole prompts of it drawn up to `rows` pairs (0: all)."""
    pairs = [pair for pair in read_preferences([path]) if pair.choice is not Choice.TIE]
    name = path.name.split(".")[0]
    if 0 < rows < len(pairs):
        pairs = sorted(pairs, key=lambda pair: rank_bits(pair.prompt.group, f"{seed} folds"))[:rows]
        name += f" ({rows} rows)"
    found = group_folds([pair.prompt.group for pair in pairs], folds, seed)
    return Task(name, pairs, [np.flatnonzero(found == fold).tolist() for fold in range(folds)])


def baselines(task: Task, seed: int) -> dict[str, Floats]:
    """[n] held-out margins of each baseline."""
    longer = np.array([reward_report._longer(pair) for pair in task.pairs], dtype=np.float64)
    words = [
        word_margins(
            [task.pairs[i] for i in task.training(fold)], [task.pairs[i] for i in rows], seed
        )
        for fold, rows in enumerate(task.folds)
    ]
    return dict(zip(BASELINES, (longer, -longer, task.pool(words)), strict=True))


class Log:
    """Margins of folds that have ended."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self._path, self._key = path, key
        self._rows = list(read_jsonl(path)) if path is not None and path.is_file() else []

    def find(self, **what: Any) -> Floats | None:
        """Margins of a fold, if they are there."""
        wanted = {**self._key, **what}
        for row in self._rows:
            if all(row.get(key) == value for key, value in wanted.items()):
                return np.array(row["margins"])
        return None

    def add(self, margins: Floats, wall_s: float, **what: Any) -> None:
        """Write them down."""
        row = {**self._key, **what, "wall_s": round(wall_s, 1), "margins": margins.tolist()}
        self._rows.append(row)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def setting_margins(name: str, task: Task, log: Log, trainer: Trainer, keep: bool) -> Floats | None:
    """[n] held-out margins of a setting; None where a fold is missing and none may be run."""
    parts = []
    for fold in range(len(task.folds)):
        what = {"file": task.name, "setting": name, "fold": fold, "rows": len(task.pairs)}
        margins = log.find(**what)
        if margins is None and keep:
            return None
        if margins is None:
            start = time.monotonic()
            margins = fold_margins(SETTINGS[name], task, fold, trainer)
            log.add(margins, time.monotonic() - start, **what)
        parts.append(margins)
    return task.pool(parts)


def fold_margins(setting: RewardConfig | Frozen, task: Task, fold: int, trainer: Trainer) -> Floats:
    """Margins of the rows that a fold holds out, of a model trained on the others."""
    train, test = task.training(fold), task.folds[fold]
    if isinstance(setting, RewardConfig):
        return trainer.margins(setting, task.pairs, train, test)
    states = trainer.features(task.pairs)[:, setting.states].reshape(len(task.pairs), -1)
    return linear_margins(states, task.groups, train, test, trainer.recipe.seed)


def result_of(task: Task, base: dict[str, Floats], settings: dict[str, Floats]) -> dict[str, Any]:
    """Figures of a file: each baseline, each setting, and its difference from the best baseline."""
    groups = task.groups
    best = max(base, key=lambda name: float(half_step(base[name]).mean()))
    found: dict[str, Any] = {
        "file": task.name,
        "rows": len(task.pairs),
        "clusters": len(set(groups)),
        "best_baseline": best,
        "baselines": {name: held_out_accuracy(m, groups) for name, m in base.items()},
        "settings": {},
    }
    for name, margins in settings.items():
        gain, interval = paired_difference(half_step(margins), half_step(base[best]), groups)
        found["settings"][name] = {
            **held_out_accuracy(margins, groups),
            "log_loss": statistics.log_loss(margins),
            "difference": gain,
            "difference_ci95": interval.as_list(),
        }
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| file | rows | clusters | model | accuracy | minus best baseline |",
        "| --- | ---: | ---: | --- | --- | --- |",
    ]
    for result in results:
        counts = f"| {result['file']} | {result['rows']} | {result['clusters']} "
        for name, figures in {**result["baselines"], **result["settings"]}.items():
            low, high = figures["accuracy_ci95"]
            gain = "best baseline" if name == result["best_baseline"] else ""
            if "difference" in figures:
                ends = figures["difference_ci95"]
                gain = f"{figures['difference']:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]"
            accuracy = f"{figures['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
            lines.append(f"{counts}| {name.replace('_', ' ')} | {accuracy} | {gain} |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--settings", default="stage,frozen", help="comma-separated names")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--base", default="smollm2-135m", help="base model")
    parser.add_argument("--rows", type=int, default=0, help="draw at most this many rows a file")
    parser.add_argument("--share", type=int, default=8, help="most pairs of one prompt in a unit")
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--max-completion-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of folds, weights and order")
    parser.add_argument("--log", type=Path, help="margins of each fold, JSON Lines")
    parser.add_argument("--logged-only", action="store_true", help="run nothing, show the log")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    names = chosen.settings.split(",")
    if unknown := sorted(set(names) - set(SETTINGS)):
        raise SystemExit(f"unknown settings {unknown}; there are {', '.join(SETTINGS)}")
    recipe = Recipe(seed=chosen.seed)
    recipe = replace(
        recipe,
        model=replace(recipe.model, base=chosen.base),
        data=replace(
            recipe.data,
            max_prompt_tokens=chosen.max_prompt_tokens,
            max_completion_tokens=chosen.max_completion_tokens,
        ),
    )
    key = {name: getattr(chosen, name) for name in ("base", "folds", "seed", "share")}
    key |= {name: getattr(chosen, f"max_{name}") for name in ("prompt_tokens", "completion_tokens")}
    log, trainer, results = Log(chosen.log, key), Trainer(recipe, chosen.share), []
    for path in chosen.files:
        task = open_task(path, chosen.folds, chosen.rows, chosen.seed)
        found = {n: setting_margins(n, task, log, trainer, chosen.logged_only) for n in names}
        ready = {name: margins for name, margins in found.items() if margins is not None}
        results.append(result_of(task, baselines(task, chosen.seed), ready))
    print(json.dumps(results) if chosen.json else table(results))


if __name__ == "__main__":
    main()
