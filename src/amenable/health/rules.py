"""The health rules: what each looks at, when it speaks, what it means and what to try.

A rule sees the rows of one stage up to now and answers with what it saw, or with nothing. Windows
are counted in rows that hold its figure. All thresholds were fixed on other seeds and recipes than
those of the published rates (docs/health.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

import numpy as np

Level = Literal["warning", "error"]


class History:
    """The figures of a stage up to now, without the stage's prefix."""

    def __init__(self) -> None:
        self._rows: list[Mapping[str, float | None]] = []
        self._values: dict[str, list[float]] = {}
        self._together: dict[tuple[str, ...], tuple[int, list[tuple[float, ...]]]] = {}

    def add(self, row: Mapping[str, float | None]) -> None:
        """One more row; None or NaN: not a number."""
        self._rows.append(row)
        for name, value in row.items():
            if value is not None and math.isfinite(value):
                self._values.setdefault(name, []).append(value)

    def values(self, name: str) -> list[float]:
        """All finite values of a figure, in order; not to be changed."""
        return self._values.get(name, [])

    def together(self, *names: str) -> list[tuple[float, ...]]:
        """Those rows in which all of these figures are finite; not to be changed.

        Only rows that are new since the last call are read: rules ask after every step.
        """
        read, found = self._together.get(names, (0, []))
        for row in self._rows[read:]:
            values = [row.get(name) for name in names]
            finite = [value for value in values if value is not None and math.isfinite(value)]
            if len(finite) == len(names):
                found.append(tuple(finite))
        self._together[names] = (len(self._rows), found)
        return found


POLICY = ("policy",)
TRAINING = ("sft", "reward", "policy")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule says, once a stage."""

    rule: str
    stage: str
    step: int
    level: Level
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One check.

    `saw` gets the stage's rows and returns what it saw in words, or an empty text.
    """

    id: str
    stages: tuple[str, ...]
    needs: tuple[str, ...]
    """Figures without which it is silent."""
    formula: str
    means: str
    remedy: str
    source: str
    saw: Callable[[History], str]
    level: Level = "warning"

    def message(self, seen: str) -> str:
        """What it saw, what that usually means, what to try."""
        return f"{seen} {self.means} {self.remedy}"


def _last_all(
    name: str, count: int, holds: Callable[[float], bool], words: str
) -> Callable[[History], str]:
    """The last `count` values all hold."""

    def saw(history: History) -> str:
        values = history.values(name)[-count:]
        if len(values) < count or not all(holds(value) for value in values):
            return ""
        return f"{words}: {_list(values)} in the last {count} rows."

    return saw


def _against_start(
    name: str, count: int, low: float, high: float, words: str
) -> Callable[[History], str]:
    """The last `count` values all lie below `low` or above `high` times the mean of the first 2."""

    def saw(history: History) -> str:
        values = history.values(name)
        if len(values) < 2 + count:
            return ""
        first, last = fmean(values[:2]), values[-count:]
        if first <= 0 or not (max(last) < low * first or min(last) > high * first):
            return ""
        return f"{words}: {_number(first)} at the start, {_list(last)} in the last {count} rows."

    return saw


def _loss_rises(history: History) -> str:
    for name in ("loss", "rank_loss"):
        values = history.values(name)
        if len(values) < 16:
            continue
        first, last = median(values[:8]), median(values[-8:])
        if last > 1.2 * first and min(values[-5:]) > first:
            return f"The training loss rises: {_number(first)} at first, {_number(last)} lately."
    return ""


def _loss_flat(history: History) -> str:
    for name in ("loss", "rank_loss"):
        values, held_out = history.values(name), history.values(f"eval_{name}")
        if len(values) < (24 if len(held_out) > 1 else 64):
            continue
        size = min(32, len(values) // 2)
        first, last = median(values[:size]), median(values[-size:])
        if len(held_out) > 1 and held_out[-1] < 0.999 * held_out[0]:
            continue
        if last >= 0.97 * first:
            beside = f", held out {_number(held_out[-1])}" if held_out else ""
            return (
                f"The training loss does not fall: {_number(first)} over the first {size} steps, "
                f"{_number(last)} over the last {size} of {len(values)}{beside}."
            )
    return ""


def _held_out_rises(history: History) -> str:
    for name in ("eval_loss", "eval_rank_loss"):
        values = history.values(name)
        if len(values) >= 2 and values[-1] > 1.1 * min(values):
            best, now = _number(min(values)), _number(values[-1])
            return f"The held-out loss rises: {best} at best, {now} now."
    return ""


def _by_heart(history: History) -> str:
    held_out = history.values("eval_accuracy")
    trained = history.values("accuracy")[-10:]
    if not held_out or len(trained) < 5 or fmean(trained) - held_out[-1] <= 0.25:
        return ""
    return (
        f"Accuracy on training pairs is {fmean(trained):.2f} lately, on held-out pairs "
        f"{held_out[-1]:.2f}."
    )


def _coin(history: History) -> str:
    held_out, trained = history.values("eval_accuracy"), history.values("accuracy")[-24:]
    if len(held_out) < 2 or max(held_out) > 0.53 or len(trained) < 16 or fmean(trained) > 0.58:
        return ""
    return (
        f"The reward model is a coin: accuracy {fmean(trained):.2f} over the last {len(trained)} "
        f"steps, on held-out pairs never above {max(held_out):.2f}."
    )


def _spike(history: History) -> str:
    for name in ("grad_norm", "critic_grad_norm"):
        before = history.values(name)[-25:-1]
        if len(before) < 8:
            continue
        now = history.values(name)[-1]
        if now > 20 * median(before) and now > 3 * max(before):
            return f"{name} is {_number(now)} where {_number(median(before))} is usual."
    return ""


def _undone(history: History) -> str:
    for name in ("undone_steps", "critic_undone_steps"):
        values = history.values(name)
        if values and values[-1] > 0:
            return f"{values[-1]:.0f} steps so far had no finite gradient and were left out."
    return ""


def _kl_negative(history: History) -> str:
    last = history.together("kl_loss", "kl_se")[-2:]
    if len(last) < 2 or not all(kl < -3 * error < 0 for kl, error in last):
        return ""
    return f"The KL to the reference is below zero twice in a row: {_list([kl for kl, _ in last])}."


def _kl_far(history: History) -> str:
    last = history.together("kl_loss", "completion_tokens")[-3:]
    each = [kl / tokens for kl, tokens in last if tokens]
    if len(each) < 3 or min(each) <= 1.0:
        return ""
    return f"The policy is {_list(each)} nats a token from the reference in the last 3 rows."


def _overoptimised(history: History) -> str:
    pairs = history.together("reward", "gold")
    if len(pairs) < 12 or len(pairs) % max(1, len(pairs) // 50):
        return ""  # every look reads the whole run, so a long one is looked at now and then
    size = max(4, len(pairs) // 5)
    proxy, gold = np.array(pairs).T
    means = np.convolve(gold, np.ones(size) / size, "valid")
    best = int(means[: len(means) - size + 1].argmax())
    top, last = gold[best : best + size], gold[-size:]
    error = math.sqrt((top.var(ddof=1) + last.var(ddof=1)) / size)
    fallen, gain = float(top.mean() - last.mean()), abs(float(top.mean() - gold[:2].mean()))
    then, now = float(proxy[best : best + size].mean()), float(proxy[-size:].mean())
    if fallen <= max(3 * error, 0.1 * gain) or now <= then:
        return ""
    return (
        f"Gold has fallen from {_number(top.mean())} to {_number(last.mean())} while the reward "
        f"rose from {_number(then)} to {_number(now)}."
    )


def _displaced(history: History) -> str:
    chosen, rejected = history.values("chosen_reward")[-8:], history.values("rejected_reward")[-8:]
    nll = history.values("chosen_nll")
    if len(chosen) < 8 or len(rejected) < 8 or len(nll) < 12:
        return ""
    rises = fmean(nll[-4:]) > 1.25 * fmean(nll[:4])
    if not rises or fmean(chosen) >= 0 or fmean(rejected) >= fmean(chosen):
        return ""
    return (
        f"Chosen and rejected completions both become less likely (implicit rewards "
        f"{_number(fmean(chosen))} and {_number(fmean(rejected))}); the chosen ones cost "
        f"{_number(fmean(nll[-4:]))} nats a token, {_number(fmean(nll[:4]))} at first."
    )


def _critic_harms(history: History) -> str:
    values = history.values("explained_variance")
    last = values[-5:]
    if len(values) < 8:
        return ""
    if fmean(last) < -0.5:
        return f"The critic predicts worse than a constant: explained variance {_list(last)}."
    if max(map(abs, last)) < 0.03:
        return f"The critic predicts a constant: explained variance {_list(last)}."
    return ""


def _same_answers(history: History) -> str:
    values = history.values("repeated")
    last = values[-3:]
    if len(values) < 5 or min(last) <= max(0.5, 2 * fmean(values[:2])):
        return ""
    return f"Prompts share their answers: {_list(last)} in the last 3 rows."


def _number(value: float) -> str:
    return f"{value:.3g}"


def _list(values: Sequence[float]) -> str:
    return ", ".join(_number(value) for value in values)


RULES: tuple[Rule, ...] = (
    Rule(
        id="not-finite",
        stages=TRAINING,
        needs=("undone_steps",),
        formula="undone_steps > 0",
        means="Weights or activations overflow.",
        remedy='Lower the learning rate, or set model.dtype = "fp32".',
        source="TRL's trainer: losses that spike to NaN",
        saw=_undone,
        level="error",
    ),
    Rule(
        id="gradient-spike",
        stages=TRAINING,
        needs=("grad_norm",),
        formula="grad_norm > 20 × the median and 3 × the largest of the 8 to 24 rows before",
        means="One batch pulls far more than others: a faulty row, or too high a rate.",
        remedy="Look at the rows of this step; lower learning_rate or max_grad_norm.",
        source="chosen here",
        saw=_spike,
    ),
    Rule(
        id="loss-rises",
        stages=TRAINING,
        needs=("loss|rank_loss",),
        formula="after 16 rows the last 5 exceed the median of the first 8, the last 8 by 20 %",
        means="Training makes it worse: the rate is too high.",
        remedy="Divide learning_rate by 3 to 10, or add warmup_fraction.",
        source="chosen here",
        saw=_loss_rises,
        level="error",
    ),
    Rule(
        id="loss-flat",
        stages=("sft", "reward"),
        needs=("loss|rank_loss",),
        formula="the median of the last half (at most 32 steps) ≥ 0.97 × that of the first, and "
        "held-out loss ≥ 0.999 × its first; 24 steps with two held-out losses, else 64",
        means="Nothing is learnt: the rate is too low, or the rows say nothing new.",
        remedy="Multiply learning_rate by 3 to 10; look at a few rows with `amenable data show`.",
        source="chosen here",
        saw=_loss_flat,
    ),
    Rule(
        id="held-out-rises",
        stages=TRAINING,
        needs=("eval_loss|eval_rank_loss",),
        formula="eval loss > 1.1 × its smallest",
        means="The rows are learnt by heart; the best weights are kept.",
        remedy="Fewer epochs, or more rows.",
        source="chosen here",
        saw=_held_out_rises,
    ),
    Rule(
        id="by-heart",
        stages=("reward", "policy"),
        needs=("accuracy", "eval_accuracy"),
        formula="mean accuracy of the last 10 steps − held-out accuracy > 0.25",
        means="The pairs are learnt by heart.",
        remedy="Fewer epochs, label_smoothing, a lower rate, or more pairs.",
        source="chosen here",
        saw=_by_heart,
    ),
    Rule(
        id="coin",
        stages=("reward",),
        needs=("accuracy", "eval_accuracy"),
        formula="held-out accuracy never above 0.53 in two looks or more, and training accuracy "
        "≤ 0.58 over the last 24 steps",
        means="The choices do not follow from the texts, or the labels are swapped in part.",
        remedy="Check the labels (`amenable data stats` prints agreement), then the rate.",
        source="chosen here",
        saw=_coin,
    ),
    Rule(
        id="kl-negative",
        stages=POLICY,
        needs=("kl_loss", "kl_se"),
        formula="kl_loss < −3 kl_se in 2 rows running",
        means="A KL cannot be negative: what samples is not the policy that is trained.",
        remedy="Remove top_p and top_k, sample at policy.temperature, and update the sampler.",
        source="TRL #1161, #1857: truncated sampling",
        saw=_kl_negative,
        level="error",
    ),
    Rule(
        id="kl-far",
        stages=POLICY,
        needs=("kl_loss", "completion_tokens"),
        formula="kl_loss / completion_tokens > 1 nat a token in 3 rows running",
        means="The policy has left the reference, and the reward model what it knows.",
        remedy="Raise policy.kl.coef, lower the rate, or set policy.stop_at_kl.",
        source="TRL's guide: 0 to 10 nats a sequence",
        saw=_kl_far,
    ),
    Rule(
        id="step-too-far",
        stages=POLICY,
        needs=("approx_kl",),
        formula="approx_kl > 0.05 nats a token in 3 rows running",
        means="An update moves the policy further than its samples can tell about.",
        remedy="Lower policy.learning_rate, or take fewer epochs.",
        source="TRL's early stop; Schulman 2020, k2",
        saw=_last_all("approx_kl", 3, lambda v: v > 0.05, "The passes move the policy far"),
    ),
    Rule(
        id="ratio",
        stages=POLICY,
        needs=("ratio_max",),
        formula="ratio_max > 10 in 3 rows running",
        means="Some tokens are many times as likely as when they were sampled.",
        remedy="Lower policy.learning_rate, or take fewer epochs.",
        source="TRL's PPO: ratio_threshold 10",
        saw=_last_all("ratio_max", 3, lambda v: v > 10, "The largest probability ratio is high"),
    ),
    Rule(
        id="clipped",
        stages=POLICY,
        needs=("clip_fraction",),
        formula="clip_fraction > 0.3 in 4 rows running",
        means="Much of each batch teaches nothing, as it is clipped.",
        remedy="Lower policy.learning_rate, or take fewer epochs or minibatches.",
        source="chosen here",
        saw=_last_all("clip_fraction", 4, lambda v: v > 0.3, "Many tokens are clipped"),
    ),
    Rule(
        id="entropy-collapses",
        stages=POLICY,
        needs=("entropy",),
        formula="entropy < 0.2 × the first 2 rows' in 3 rows running",
        means="The policy says one thing only and explores no more.",
        remedy="Raise policy.kl.coef, lower the rate, or add policy.entropy_coef.",
        source="verl's entropy guide",
        saw=_against_start("entropy", 3, 0.2, math.inf, "Entropy has collapsed"),
    ),
    Rule(
        id="entropy-explodes",
        stages=POLICY,
        needs=("entropy",),
        formula="entropy > 2 × the first 2 rows' in 3 rows running",
        means="The policy forgets its language.",
        remedy="Lower policy.entropy_coef or the rate; raise policy.kl.coef.",
        source="verl's entropy guide",
        saw=_against_start("entropy", 3, 0.0, 2.0, "Entropy has grown"),
    ),
    Rule(
        id="critic-harms",
        stages=POLICY,
        needs=("explained_variance",),
        formula="from the 8th row on, mean of the last 5 < −0.5, or all of them within 0.03 of 0",
        means="Its advantages add noise to the reward, or nothing.",
        remedy="Lower policy.ppo.critic_learning_rate, warm the critic up, or use rloo or grpo.",
        source="0 is the variance of a constant",
        saw=_critic_harms,
    ),
    Rule(
        id="cut-off",
        stages=POLICY,
        needs=("eos_rate",),
        formula="eos_rate < 0.5 in 3 rows running",
        means="Most completions are cut off before they end, so the reward reads halves.",
        remedy="Raise data.max_completion_tokens; check that demonstrations end.",
        source="TRL: clipped_ratio",
        saw=_last_all("eos_rate", 3, lambda v: v < 0.5, "Few completions end themselves"),
    ),
    Rule(
        id="length-drifts",
        stages=POLICY,
        needs=("completion_tokens",),
        formula="completion_tokens < 0.4 or > 2 × the first 2 rows' in 3 rows running",
        means="Length may be what the reward pays for.",
        remedy="Compare at equal length in the report; try reward.length_debias.",
        source="Singhal et al. 2023, arXiv:2310.03716",
        saw=_against_start("completion_tokens", 3, 0.4, 2.0, "Completions change in length"),
    ),
    Rule(
        id="no-spread",
        stages=POLICY,
        needs=("without_spread|reward_se",),
        formula="without_spread > 0.9, or reward_se = 0, in 3 rows running",
        means="All completions of a prompt score alike, so there is nothing to learn.",
        remedy="Use a finer reward, more samples_per_prompt, or a higher temperature.",
        source="TRL: frac_reward_zero_std",
        saw=lambda history: (
            _last_all("without_spread", 3, lambda v: v > 0.9, "Prompts without a spread")(history)
            or _last_all("reward_se", 3, lambda v: v == 0, "The reward does not vary")(history)
        ),
        level="error",
    ),
    Rule(
        id="rewards-fail",
        stages=POLICY,
        needs=("reward_failures",),
        formula="reward_failures > 0.1 in 3 rows running",
        means="A reward answers too seldom, and what fails may not be random.",
        remedy="samples.jsonl tells the reasons; raise timeout_s or retries.",
        source="chosen here",
        saw=_last_all("reward_failures", 3, lambda v: v > 0.1, "Rewards fail"),
    ),
    Rule(
        id="same-answers",
        stages=POLICY,
        needs=("repeated",),
        formula="repeated > 0.5 and 2 × the first 2 rows' in 3 rows running",
        means="Different prompts get the same answer.",
        remedy="Raise policy.kl.coef, lower the rate; read samples.jsonl.",
        source="TRL #204",
        saw=_same_answers,
    ),
    Rule(
        id="over-optimised",
        stages=POLICY,
        needs=("reward", "gold"),
        formula="after 12 rows gold's last fifth lies 3 standard errors and a tenth of its gain "
        "below its best fifth, and the reward higher",
        means="The policy has found what the reward model overrates.",
        remedy="policy.selection keeps the best checkpoint; raise policy.kl.coef, or collect "
        "choices on the policy's own answers.",
        source="Gao et al. 2022, arXiv:2210.10760",
        saw=_overoptimised,
    ),
    Rule(
        id="likelihood-falls",
        stages=("policy",),
        needs=("chosen_reward", "rejected_reward", "chosen_nll"),
        formula="over the last 8 steps rejected < chosen < 0, and chosen_nll 1.25 × the first 4",
        means="The policy unlearns what it was shown, the chosen completions included.",
        remedy="Raise policy.preference.beta, lower the rate, or add policy.preference.sft_coef.",
        source="Razin et al. 2024, arXiv:2410.08847",
        saw=_displaced,
    ),
)
"""In the order in which they are read."""
