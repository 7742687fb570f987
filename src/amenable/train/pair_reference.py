"""Pairs to learn from, and their log-probabilities under the frozen start of the policy.

A row's are computed once, before the first step, in the micro-batch in which the row is first
trained on: policy and reference then agree to the last bit at the start. They are kept in the
stage's folder, so that a resumed run has the same bits, and the reference's weights can go. Under a
time budget they may take a quarter of the stage's time; the rest is computed when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amenable.data.collate import (
    GroupBatch,
    PromptGroup,
    collate,
)
from amenable.data.render import Renderer
from amenable.data.row_file import RowFile, open_preferences
from amenable.data.schemas import Choice, Preference
from amenable.data.tokens.cache import TokenCache
from amenable.errors import DataError
from amenable.losses.likelihood import sequence_logprobs
from amenable.models.build import Foundation
from amenable.models.pull import cache_home
from amenable.ranks import group as ranks
from amenable.train.checkpoints import load_checkpoint, save_checkpoint
from amenable.train.loop import planned_batches

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.models.roles import Role

Batches = Sequence[Sequence[int]]

_SHARE = 0.25  # of the time left, for the reference before the first step


class _Chosen(Sequence[PromptGroup]):
    """Some of the groups of a file, by their places."""

    def __init__(self, groups: Sequence[PromptGroup], places: Sequence[int]) -> None:
        self._groups, self._places = groups, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> PromptGroup:  # type: ignore[override]  # no slices
        return self._groups[self._places[index]]


@dataclass(frozen=True)
class PairRows:
    """The pairs of a split that an algorithm learns from; texts stay on disk."""

    groups: Sequence[PromptGroup]
    """Prompt, chosen and rejected completion of each."""

    weights: Sequence[float]
    """Of each pair's loss."""

    tied: Sequence[bool]
    """True where neither was preferred."""

    left_out: int = 0
    """Ties of the split that the algorithm has no use for."""

    file: RowFile[Preference] | None = field(default=None, repr=False)
    places: Sequence[int] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.weights)

    def row_id(self, index: int) -> str:
        """Of the pair's prompt in the file."""
        return "" if self.file is None else self.file[self.places[index]].prompt.id


def open_pairs(ctx: StageContext, renderer: Renderer, split: str, *, ties: bool) -> PairRows:
    """The pairs of `data/preferences.SPLIT.jsonl`.

    Args:
        ctx: the stage.
        renderer: of the run.
        split: `train` or `validation`.
        ties: keep them.

    Raises:
        DataError: there is no such file, or no pair is left.
    """
    path = ctx.folder.data / f"preferences.{split}.jsonl"
    file = open_preferences(path)
    groups = TokenCache(cache_home() / "tokens", renderer, ctx.progress.say).preferences(file)
    figures = [(row.weight, row.choice is Choice.TIE) for row in file]
    places = [place for place, (_, tied) in enumerate(figures) if ties or not tied]
    if not places:
        algorithm = ctx.recipe.policy.algorithm
        raise DataError(
            f"every pair is a tie, and {algorithm} learns from none; give pairs with a winner, or "
            'set policy.algorithm = "dpo"',
            path=path,
        )
    return PairRows(
        groups=_Chosen(groups, places),
        weights=[figures[place][0] for place in places],
        tied=[figures[place][1] for place in places],
        left_out=len(figures) - len(places),
        file=file,
        places=places,
    )


@dataclass(frozen=True)
class PairReference:
    """Sequence log-probabilities under the frozen start, in nats; zeros where none is wanted."""

    train: Tensor
    """[rows, 2] of chosen and rejected; NaN for rows that no step has seen yet."""

    validation: Tensor
    """[rows, 2]"""

    mismatched: Mapping[tuple[int, ...], Tensor] = field(default_factory=dict)
    """By the rows of a batch: [rows, 2] of each next pair's completions behind a pair's prompt."""

    mismatched_validation: Tensor | None = None
    """[rows, 2] the same of the validation pairs."""

    measure: Callable[[Sequence[PromptGroup]], Tensor] | None = field(default=None, repr=False)
    """[groups, 2] of rows that were not measured before the first step."""

    def complete(self, rows: Sequence[int], groups: Sequence[PromptGroup]) -> None:
        """Fills in what is missing of a batch, given with its groups."""
        places = torch.tensor(list(rows))
        missing = self.train[places].isnan().any(1)
        if self.measure is not None and bool(missing.any()):
            self.train[places[missing]] = self.measure(groups)[missing]

    def behind_other_prompts(
        self, rows: Sequence[int], groups: Sequence[PromptGroup]
    ) -> Tensor | None:
        """[rows, 2] of the mismatched completions of a batch; None where it has one pair."""
        found = self.mismatched.get(tuple(rows))
        if found is None and self.measure is not None and len(rows) > 1:
            return self.measure(mismatched(groups))
        return found


def start_folder(ctx: StageContext) -> Path | None:
    """Where policy and reference start: the SFT model, or None for the base."""
    sft = ctx.folder.models / "sft"
    return sft if sft.is_dir() else None


class FrozenStart:
    """The weights that the policy starts from, as a role that nothing trains."""

    def __init__(self, ctx: StageContext, foundation: Foundation) -> None:
        self._folder, self._foundation = start_folder(ctx), foundation
        self._shared: Role | None = None

    def role(self) -> Role:
        """With LoRA always the same; with full fine-tuning loaded anew, for the caller to drop."""
        if self._shared is not None:
            return self._shared
        role = self._foundation.role("reference", self._folder, train=False)
        if self._foundation.recipe.model.lora.enabled:
            self._shared = role
        return role


def mismatched(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """Each prompt with the next pair's completions, the last with the first's; none for one pair.

    Pairs of the same prompt may stand side by side; they are taken as they come.
    """
    if len(groups) < 2:
        return []
    following = [*groups[1:], groups[0]]
    return [
        PromptGroup(own.prompt_ids, other.completions)
        for own, other in zip(groups, following, strict=True)
    ]


def pair_logprobs(role: Role, batch: GroupBatch) -> Tensor:
    """[n, 2] sequence log-probabilities at temperature 1 of a batch of pairs."""
    return sequence_logprobs(role.logprobs(batch).logprobs, batch.mask).view(-1, 2)


def open_reference(
    ctx: StageContext,
    start: FrozenStart,
    pad_id: int,
    data: Mapping[str, PairRows],
    *,
    wanted: bool,
    mismatched_too: bool,
) -> PairReference:
    """The log-probabilities, from the stage's folder or computed now.

    Args:
        ctx: the stage.
        start: the frozen start.
        pad_id: of the tokenizer.
        data: `train` and `validation`.
        wanted: the algorithm compares with a reference; else all are 0.
        mismatched_too: it needs those of mismatched completions as well.
    """
    train, validation = data["train"], data["validation"]
    if not wanted:
        return PairReference(torch.zeros(len(train), 2), torch.zeros(len(validation), 2))
    batches = planned_batches(len(train), ctx.recipe.policy.preference, ctx.recipe.seed)
    path = ctx.out / "checkpoints" / "reference"
    saved = load_checkpoint(path, ctx.progress.say)
    if saved is None:
        found = _measure(ctx, start.role(), pad_id, data, batches, mismatched_too)
        save_checkpoint(path, {"logprobs": found}, {})
    else:
        found = saved[0]["logprobs"]
    own = found["mismatched"].split([len(batch) for batch in batches]) if mismatched_too else []
    keyed = zip(batches, own, strict=mismatched_too)
    measured = {tuple(batch): part for batch, part in keyed if not bool(part.isnan().any())}
    return PairReference(
        train=found["train"],
        validation=found["validation"],
        mismatched={batch: part for batch, part in measured.items() if len(batch) > 1},
        mismatched_validation=found.get("mismatched_validation"),
        measure=_Late(start, pad_id, ctx.recipe.policy.preference.micro_batch_tokens),
    )


class _Late:
    """Measures what there was no time for before the first step."""

    def __init__(self, start: FrozenStart, pad_id: int, budget: int) -> None:
        self._start, self._pad_id, self._budget = start, pad_id, budget
        self._role: Role | None = None

    def __call__(self, groups: Sequence[PromptGroup]) -> Tensor:
        self._role = self._role or self._start.role()
        return all_logprobs(self._role, groups, self._pad_id, self._budget)


@torch.no_grad()
def all_logprobs(role: Role, groups: Sequence[PromptGroup], pad_id: int, budget: int) -> Tensor:
    """[groups, 2] `pair_logprobs` of any number of pairs, on the CPU."""
    found = torch.zeros(len(groups), 2, dtype=role.wide)
    for part, counts in role.turns(role.split(groups, budget)):
        batch = collate([groups[i] for i in part], pad_id).to(role.device)
        logprobs = pair_logprobs(role, batch).cpu()
        if counts:
            found[part] = logprobs
    ranks.add_up([found])
    return found


def _measure(
    ctx: StageContext,
    role: Role,
    pad_id: int,
    data: Mapping[str, PairRows],
    batches: Batches,
    mismatched_too: bool,
) -> dict[str, Tensor]:
    budget = ctx.recipe.policy.preference.micro_batch_tokens
    time_left = ctx.deadline.part(_SHARE)

    def logprobs(groups: Sequence[PromptGroup]) -> Tensor:
        return all_logprobs(role, groups, pad_id, budget)

    train, validation = data["train"], data["validation"]
    found = {
        "train": torch.full((len(train), 2), torch.nan, dtype=role.wide),
        "validation": logprobs(list(validation.groups)),
    }
    elsewhere: list[Tensor] = []
    with ctx.progress.track(len(batches), "policy: reference") as bar:
        for batch in batches:
            if time_left.exceeded():
                ctx.progress.say("policy: the rest of the reference is computed along the way")
                break
            groups = [train.groups[row] for row in batch]
            unseen = found["train"][batch].isnan().any(1)
            if unseen.any():
                rows = torch.tensor(batch)[unseen]
                found["train"][rows] = logprobs(groups)[unseen]
            if mismatched_too:
                others = mismatched(groups)
                elsewhere.append(logprobs(others) if others else torch.zeros(len(batch), 2))
            bar.advance(1)
    if mismatched_too:
        missing = sum(map(len, batches)) - sum(map(len, elsewhere))
        unknown = torch.full((missing, 2), torch.nan, dtype=role.wide)
        found["mismatched"] = torch.cat([*elsewhere, unknown])
        others = mismatched(list(validation.groups))
        if others:
            found["mismatched_validation"] = logprobs(others)
    return found
