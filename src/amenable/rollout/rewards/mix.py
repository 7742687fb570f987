"""Several rewards as one: weighted, normalised and told apart; what fails is left out, not 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amenable.config.rewards import RewardPart, kind_of, reward_parts
from amenable.data.schemas import Prompt
from amenable.errors import StageError
from amenable.ranks.group import led
from amenable.rollout.rewards.functions import FunctionReward
from amenable.rollout.rewards.http import HttpReward
from amenable.rollout.rewards.models import FolderReward
from amenable.rollout.rewards.normaliser import Normaliser
from amenable.rollout.rewards.own import OwnReward
from amenable.rollout.rewards.rules import rule_reward
from amenable.rollout.rewards.types import Failed, Judgement, Step, TextReward, Verdict

if TYPE_CHECKING:
    from amenable.config.policy import PolicyConfig

_REASONS_SHOWN = 3


@dataclass(frozen=True)
class WeightedReward:
    """One reward and its part in the sum; one of weight 0 is only watched."""

    name: str
    weight: float
    reward: TextReward
    normaliser: Normaliser


class TextRewards:
    """Everything that scores texts; the run's own reward model, which reads tokens, is not in it.

    Of several ranks the first asks, and tells the others: a service is not asked twice, and all
    learn from the same verdicts.

    Args:
        parts: at least one, with names of their own.
        max_failures: largest share of a batch that may be left out.
    """

    def __init__(self, parts: Sequence[WeightedReward], max_failures: float = 0.5) -> None:
        self._parts = tuple(parts)
        self._max_failures = max_failures
        self.names: tuple[str, ...] = tuple(part.name for part in parts)

    def judge(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        token_ends: Sequence[Sequence[int]] | None = None,
        *,
        all_may_fail: bool = False,
    ) -> Judgement:
        """Scores a roll-out batch of N completions and takes it into the running normalisers.

        Args:
            prompts: [N] what each text completes.
            texts: [N] completions.
            token_ends: [N] of each token of a completion, the number of characters of its text up
                to and including the token. Read only for completions with steps: a step belongs to
                the first token whose end is not before the step's, or else to the last. None: no
                steps are wanted, only their sums.
            all_may_fail: leave it to the caller what to do about failures.

        Raises:
            StageError: rewards failed for a larger share than `max_failures`, or for all, and not
                `all_may_fail`.
        """
        verdicts = led(lambda: [part.reward.judge(prompts, texts) for part in self._parts])
        reasons = _reasons(self._parts, verdicts, len(texts))
        if not all_may_fail:
            self._check(reasons)
        total = torch.zeros(len(texts), dtype=torch.float64)
        raw: dict[str, Tensor] = {}
        for part, given in zip(self._parts, verdicts, strict=True):
            scores = torch.tensor([_sum(verdict) for verdict in given], dtype=torch.float64)
            normalised = part.normaliser.apply(scores)
            raw[part.name] = scores.float()
            if part.weight:
                total += part.weight * normalised
        return Judgement(
            scores=total.float(),
            parts=raw,
            steps=None if token_ends is None else self._steps(verdicts, reasons, token_ends),
            reasons=reasons,
        )

    def scores_of(self, name: str, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """[N] raw scores by one of the rewards, NaN where it failed; no normaliser sees them."""
        (reward,) = [part.reward for part in self._parts if part.name == name]
        return [_sum(verdict) for verdict in led(lambda: reward.judge(prompts, texts))]

    def state(self) -> dict[str, Any]:
        """The running normalisers, by name; JSON-able."""
        return {part.name: part.normaliser.state() for part in self._parts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        for part in self._parts:
            part.normaliser.load_state(state[part.name])

    def _check(self, reasons: Sequence[str]) -> None:
        failed = [reason for reason in reasons if reason]
        if len(failed) < len(reasons) and len(failed) <= self._max_failures * len(reasons):
            return
        common = Counter(failed).most_common(_REASONS_SHOWN)
        shown = "; ".join(f"{reason} ({count} times)" for reason, count in common)
        limit = (
            "which leaves nothing to learn from"
            if len(failed) == len(reasons)
            else f"more than policy.max_reward_failures = {self._max_failures:g} allows"
        )
        raise StageError(
            f"rewards failed for {len(failed)} of {len(reasons)} completions, {limit}. {shown}. "
            "Run again where the fault has passed: the stage goes on from its last checkpoint; a "
            "corrected function or recipe starts the stage afresh"
        )

    def _steps(
        self,
        verdicts: Sequence[Sequence[Verdict]],
        reasons: Sequence[str],
        token_ends: Sequence[Sequence[int]],
    ) -> list[list[Step]] | None:
        rows = [
            (part.weight / part.normaliser.spread, given)
            for part, given in zip(self._parts, verdicts, strict=True)
            if part.weight and any(isinstance(verdict, tuple) for verdict in given)
        ]
        if not rows:
            return None
        placed: list[list[Step]] = []
        for n, reason in enumerate(reasons):
            of_token: dict[int, float] = {}
            for scale, given in rows:
                verdict = given[n]
                if reason or not isinstance(verdict, tuple):
                    continue
                for end, score in verdict:
                    token = _token_at(token_ends[n], end)
                    of_token[token] = of_token.get(token, 0.0) + scale * score
            placed.append(sorted(of_token.items()))
        return placed


def open_rewards(
    policy: PolicyConfig,
    *,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    instruction: str = "",
    system_message: str = "",
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[TextRewards | None, OwnReward | None]:
    """The rewards of a recipe.

    Args:
        policy: `policy.rewards`, or `policy.reward` as the only one, or neither: the run's own.
        max_prompt_tokens: longest prompt that a reward model of another tokenizer reads.
        max_completion_tokens: room that it keeps for a completion.
        instruction: `data.instruction`, which it reads before the prompt.
        system_message: `data.system_message`.
        device: of such models; default: a GPU where there is one.
        dtype: of their weights.

    Returns:
        (all that score texts, if any; the part of the run's own reward model, if it has one)

    Raises:
        RecipeError: a function that does not exist, or a token that is not set.
        ModelError: a reward model that cannot be used.
    """
    texts: list[WeightedReward] = []
    own = None
    for number, part in enumerate(reward_parts(policy)):
        normaliser = Normaliser(part.normalise == "running")
        if part.kind == "own":
            own = OwnReward(part.label, part.weight, normaliser)
            continue
        key = f"policy.rewards[{number}].source" if policy.rewards else "policy.reward"
        reward = _open_text_reward(
            part,
            key,
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
            instruction=instruction,
            system_message=system_message,
            micro_batch_tokens=policy.micro_batch_tokens,
            device=device,
            dtype=dtype,
        )
        texts.append(WeightedReward(part.label, part.weight, reward, normaliser))
    return (TextRewards(texts, policy.max_reward_failures) if texts else None), own


def _open_text_reward(part: RewardPart, key: str, **options: Any) -> TextReward:
    """One reward; `options` are those of `FolderReward`."""
    match kind_of(part.source):
        case "rule":
            return rule_reward(part)
        case "http":
            return HttpReward(part, key)
        case "function":
            return FunctionReward(part.source, key)
    if options.get("device") is None:
        from amenable.models.build import best_device

        options["device"] = best_device()
    return FolderReward(part.source, key=key, **options)


def _reasons(
    parts: Sequence[WeightedReward], verdicts: Sequence[Sequence[Verdict]], count: int
) -> list[str]:
    """[N] why each completion is left out; empty: it is not."""
    found: list[list[str]] = [[] for _ in range(count)]
    for part, given in zip(parts, verdicts, strict=True):
        for n, verdict in enumerate(given):
            if part.weight and isinstance(verdict, Failed):
                found[n].append(f"{part.name}: {verdict.reason}")
    return ["; ".join(reasons) for reasons in found]


def _sum(verdict: Verdict) -> float:
    if isinstance(verdict, Failed):
        return float("nan")
    return sum(score for _, score in verdict) if isinstance(verdict, tuple) else verdict


def _token_at(ends: Sequence[int], place: int) -> int:
    return next((token for token, end in enumerate(ends) if end >= place), len(ends) - 1)
