"""How often the health rules speak: of planted faults, and of healthy runs.

A fault is a setting that nobody should choose, or code that is broken while the stage runs. It is
caught when a rule that knows it speaks before half of the stage is over. A healthy run is a whole
chain of stages; any rule that speaks in it is a false alarm.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amenable.health.watch import OnlineWatch
from amenable.lab.letter_world import LetterWorld
from amenable.lab.rows import on_one_thread

if TYPE_CHECKING:
    from amenable.health.rules import Finding

ALGORITHMS = ("ppo", "grpo", "rloo", "dpo")
"""Of the healthy runs, in turn."""

_HERE = "amenable.lab.health"
_SIZES = {"test": 32, "selection": 32, "pairs": 900, "train": 1024, "shown": 600}
_LENGTH_SCALE = 12.0
_SHARPNESS = 6.0
_SFT = {
    "sft.batch_size": 16,
    "sft.epochs": 2.0,
    "sft.learning_rate": 1e-3,
    "sft.evaluations": 6,
    "sft.micro_batch_tokens": 8192,
}
_REWARD = {
    "reward.batch_size": 16,
    "reward.epochs": 2.0,
    "reward.learning_rate": 5e-4,
    "reward.evaluations": 6,
}
_POLICY = {
    "policy.updates": 24,
    "policy.learning_rate": 3e-4,
    "policy.kl.coef": 0.5,
    "data.max_completion_tokens": 12,
    "policy.checkpoint_every": 100,
    "policy.selection.by": "last",
}
_DPO = {
    "policy.algorithm": "dpo",
    "policy.preference.batch_size": 16,
    "policy.preference.epochs": 1.0,
    "policy.preference.learning_rate": 3e-5,
    "policy.preference.evaluations": 4,
    "policy.preference.micro_batch_tokens": 8192,
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that is wrong with one stage."""

    name: str
    stage: str
    rules: tuple[str, ...]
    """Any of these that speaks has caught it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    rewards: str = ""
    """In place of the run's own reward."""
    broken: Callable[[], AbstractContextManager[None]] = nullcontext
    """What is broken in the code while the stage runs."""
    labels: str = ""
    """What is done to the choices: "shuffled", or "few"."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the rules said of one fault or one healthy run."""

    name: str
    seed: int
    caught_by: str
    """The first rule to speak, of a fault only those that know it."""
    at: float | None
    """Share of the stage's rows that had been written by then."""
    others: tuple[str, ...]
    """What else was said."""
    wall_s: float

    @property
    def caught(self) -> bool:
        """Before half of the stage."""
        return self.at is not None and self.at < 0.5


def _sampler_stands_still() -> AbstractContextManager[None]:
    """Roll-outs come from the weights that the stage began with."""
    from copy import deepcopy

    from amenable.lab.recording import replaced
    from amenable.rollout.transformers_engine import RolloutCopy

    make = RolloutCopy.__init__

    def init(self: RolloutCopy, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        self.model = deepcopy(self.model)
        self._merged = True  # the engine then asks the copy, which nothing updates

    return replaced(RolloutCopy, "__init__", init)


def one_for_all(prompts: Sequence[str], completions: Sequence[str], rows: Any) -> list[float]:
    """A reward that tells nothing apart."""
    return [1.0] * len(prompts)


def longer(prompts: Sequence[str], completions: Sequence[str], rows: Any) -> list[float]:
    """A reward that pays for length."""
    return [float(len(text)) for text in completions]


def shorter(prompts: Sequence[str], completions: Sequence[str], rows: Any) -> list[float]:
    """A reward that pays for saying nothing."""
    return [-float(len(text)) for text in completions]


def same_text(prompts: Sequence[str], completions: Sequence[str], rows: Any) -> list[float]:
    """A reward for one text, whatever the prompt."""
    return [sum(a == b for a, b in zip(text, "abab", strict=False)) for text in completions]


def seldom(prompts: Sequence[str], completions: Sequence[str], rows: Any) -> list[float | None]:
    """A reward that fails for a third of the completions."""
    return [None if number % 3 == 0 else float("a" in t) for number, t in enumerate(completions)]


FAULTS: tuple[Fault, ...] = (
    Fault(
        name="sft: rate a thousand times too high",
        stage="sft",
        rules=("loss-rises", "not-finite", "gradient-spike"),
        settings={"sft.learning_rate": 1.0},
    ),
    Fault(
        name="sft: rate a million times too low",
        stage="sft",
        rules=("loss-flat",),
        settings={"sft.learning_rate": 1e-9},
    ),
    Fault(name="reward: choices shuffled", stage="reward", rules=("coin",), labels="shuffled"),
    Fault(
        name="reward: few pairs, many passes",
        stage="reward",
        rules=("by-heart", "held-out-rises"),
        settings={"reward.epochs": 40.0, "reward.learning_rate": 2e-3, "reward.evaluations": 12},
        labels="few",
    ),
    Fault(
        name="policy: rate a hundred times too high",
        stage="policy",
        rules=("step-too-far", "ratio", "kl-far", "not-finite", "entropy-collapses"),
        settings={"policy.learning_rate": 3e-2},
    ),
    Fault(
        name="policy: the sampler keeps old weights",
        stage="policy",
        rules=("kl-negative",),
        broken=_sampler_stands_still,
    ),
    Fault(
        name="policy: the reward is the same for all",
        stage="policy",
        rules=("no-spread",),
        rewards=f"{_HERE}:one_for_all",
    ),
    Fault(
        name="policy: the reward pays for length",
        stage="policy",
        rules=("length-drifts", "cut-off"),
        rewards=f"{_HERE}:longer",
        settings={"policy.kl.coef": 0.01, "policy.learning_rate": 1e-3},
    ),
    Fault(
        name="policy: the reward pays for silence",
        stage="policy",
        rules=("length-drifts",),
        rewards=f"{_HERE}:shorter",
        settings={"policy.kl.coef": 0.01, "policy.learning_rate": 1e-3},
    ),
    Fault(
        name="policy: completions are cut off",
        stage="policy",
        rules=("cut-off",),
        settings={"data.max_completion_tokens": 2},
    ),
    Fault(
        name="policy: no KL penalty, one text pays",
        stage="policy",
        rules=("same-answers", "entropy-collapses", "kl-far"),
        rewards=f"{_HERE}:same_text",
        settings={"policy.kl.coef": 0.0, "policy.learning_rate": 5e-3},
    ),
    Fault(
        name="policy: the critic's rate is too high",
        stage="policy",
        rules=("critic-harms",),
        settings={"policy.ppo.critic_learning_rate": 1.0, "policy.ppo.value_clip_range": 1e3},
    ),
    Fault(
        name="policy: the reward fails for a third",
        stage="policy",
        rules=("rewards-fail",),
        rewards=f"{_HERE}:seldom",
    ),
    Fault(
        name="policy: forty passes over each batch",
        stage="policy",
        rules=("clipped", "ratio", "step-too-far"),
        settings={
            "policy.epochs": 40,
            "policy.max_approx_kl": 1e6,
            "policy.learning_rate": 2e-3,
            "policy.updates": 12,
        },
    ),
    Fault(
        name="policy: tuned too long on a poor proxy",
        stage="policy",
        rules=("over-optimised", "kl-far"),
        settings={
            "policy.updates": 64,
            "policy.learning_rate": 1e-3,
            "policy.kl.coef": 0.005,
            "policy.selection.by": "gold",
        },
        labels="few",
    ),
    Fault(
        name="dpo: rate a thousand times too high",
        stage="policy",
        rules=("likelihood-falls", "loss-rises", "not-finite", "by-heart", "held-out-rises"),
        settings={**_DPO, "policy.preference.learning_rate": 3e-2},
    ),
)
"""Each is planted into an otherwise healthy chain."""


def run_fault(number: int, seed: int) -> Outcome:
    """One fault, after healthy stages before it."""
    fault = FAULTS[number]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        chain = _Chain(Path(folder), seed, fault)
        chain.run(until=fault.stage)
    spoke = [finding for finding in chain.findings if finding.stage == fault.stage]
    known = [finding for finding in spoke if finding.rule in fault.rules]
    first = known[0] if known else None
    return Outcome(
        name=fault.name,
        seed=seed,
        caught_by=first.rule if first else "",
        at=chain.share_of(first) if first else None,
        others=tuple(finding.rule for finding in spoke if finding.rule not in fault.rules),
        wall_s=time.monotonic() - start,
    )


def run_healthy(number: int, seed: int) -> Outcome:
    """All stages, with one of `ALGORITHMS`."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        chain = _Chain(Path(folder), seed, None, ALGORITHMS[number % len(ALGORITHMS)])
        chain.run(until="policy")
    spoke = [f"{finding.stage}: {finding.rule}" for finding in chain.findings]
    return Outcome(
        name=f"healthy, {ALGORITHMS[number % len(ALGORITHMS)]}",
        seed=seed,
        caught_by=spoke[0] if spoke else "",
        at=chain.share_of(chain.findings[0]) if spoke else None,
        others=tuple(spoke[1:]),
        wall_s=time.monotonic() - start,
    )


def run(healthy: int, seed: int, workers: int) -> Iterator[tuple[str, Outcome]]:
    """("fault" or "healthy", outcome) as each ends.

    Args:
        healthy: how many such runs.
        seed: of the first; the others follow.
        workers: processes of one thread each.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=on_one_thread) as pool:
        jobs = {
            pool.submit(run_fault, number, seed + number): "fault" for number in range(len(FAULTS))
        }
        jobs |= {
            pool.submit(run_healthy, number, seed + 100 + number): "healthy"
            for number in range(healthy)
        }
        for done in as_completed(jobs):
            yield jobs[done], done.result()


class _Chain:
    """The stages of one run in a world of letters, each under the eyes of the rules."""

    def __init__(self, root: Path, seed: int, fault: Fault | None, algorithm: str = "ppo") -> None:
        from amenable.pipeline.preflight import silence_libraries

        silence_libraries()
        self._fault, self._algorithm = fault, algorithm
        self._world = LetterWorld(seed, root, _SIZES, _LENGTH_SCALE)
        self._write(seed)
        self.findings: list[Finding] = []
        self._rows: dict[str, list[int]] = {}

    def run(self, until: str) -> None:
        """Stages up to this one."""
        from amenable.train import reward, sft
        from amenable.train.registry import run_policy

        for stage, function in (("sft", sft.run), ("reward", reward.run), ("policy", run_policy)):
            own = self._fault is not None and self._fault.stage == stage
            self._stage(stage, function, own)
            if stage == until:
                return

    def share_of(self, finding: Finding) -> float:
        """How much of the stage had been written when it spoke."""
        steps = self._rows[finding.stage]
        return (steps.index(finding.step) + 1) / len(steps)

    def _stage(self, stage: str, function: Callable[..., Any], has_fault: bool) -> None:
        from amenable.config.health import HealthConfig
        from amenable.errors import AmenableError

        settings: dict[str, Any] = {"policy.algorithm": self._algorithm, **_SFT, **_REWARD}
        settings |= _DPO if self._algorithm == "dpo" else _POLICY
        rewards = ""
        broken: Callable[[], AbstractContextManager[None]] = nullcontext
        if has_fault and self._fault is not None:
            if self._fault.settings.get("policy.algorithm") == "dpo":
                settings = {**_SFT, **_REWARD}
            settings |= self._fault.settings
            rewards, broken = self._fault.rewards, self._fault.broken
        watch = OnlineWatch(stage, HealthConfig(), lambda line: None)
        context = self._world.context("run", stage, settings, watch, rewards)
        try:
            with broken():
                function(context)
        except AmenableError:  # some faults end the stage by themselves
            pass
        self.findings += watch.findings
        self._rows[stage] = sorted({int(row["step"]) for row in context.log.rows()})

    def _write(self, seed: int) -> None:
        world = self._world
        shown = world.prompts["shown"]
        drawn = world.sample_base(shown, 32)
        pairs = world.choices(_SHARPNESS)
        shown_rows = [
            {**row, "output_text": text}
            for number, row in enumerate(shown)
            if (text := _demonstration(drawn.texts[32 * number : 32 * number + 32]))
        ]
        labels = self._fault.labels if self._fault is not None else ""
        if labels == "shuffled":
            coin = np.random.default_rng(seed)
            pairs = [{**row, "choice": int(coin.integers(2))} for row in pairs]
        train = pairs[260:320] if labels == "few" else pairs[260:]
        world.write(
            "run",
            {
                "demonstrations.train": shown_rows[60:],
                "demonstrations.validation": shown_rows[:60],
                "preferences.train": train,
                "preferences.validation": pairs[:200],
                "preferences.test": pairs[200:260],
                "prompts.train": world.prompts["train"],
                "prompts.validation": world.prompts["selection"],
            },
        )


def _demonstration(texts: Sequence[str]) -> str:
    """What is shown: a short sample with the first letter in it; empty where there is none."""
    return next((text for text in texts if "a" in text and len(text) < 6), "")


def false_alarm_interval(alarms: int, runs: int) -> tuple[float, float]:
    """95 % interval of the share of healthy runs in which a rule speaks (Wilson)."""
    from amenable.evaluate.statistics import wilson

    found = wilson(alarms, runs)
    return found.low, found.high


def table(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """A line for each fault, then the healthy runs."""
    faults = [outcome for kind, outcome in outcomes if kind == "fault"]
    healthy = [outcome for kind, outcome in outcomes if kind == "healthy"]
    order = {fault.name: place for place, fault in enumerate(FAULTS)}
    faults.sort(key=lambda outcome: order[outcome.name])
    lines = [
        f"{'caught' if o.caught else 'MISSED'}  {o.name:46} "
        f"{o.caught_by or '-':18} {'-' if o.at is None else f'{100 * o.at:.0f} %':>5}"
        for o in faults
    ]
    alarms = [outcome for outcome in healthy if outcome.caught_by]
    bounds = false_alarm_interval(len(alarms), max(1, len(healthy)))
    said = [f"  {o.name}, seed {o.seed}: {', '.join([o.caught_by, *o.others])}" for o in alarms]
    caught = sum(outcome.caught for outcome in faults)
    return "\n".join(
        [
            "        fault                                          first rule         after",
            *lines,
            f"{caught} of {len(faults)} faults caught before half of their stage",
            "",
            f"{len(alarms)} of {len(healthy)} healthy runs with a false alarm "
            f"({100 * len(alarms) / max(1, len(healthy)):.0f} %, 95 % interval "
            f"{100 * bounds[0]:.0f} to {100 * bounds[1]:.0f} %)",
            *said,
        ]
    )


def passed(outcomes: Sequence[tuple[str, Outcome]]) -> bool:
    """All faults but one are caught, and at most one healthy run in twenty has an alarm."""
    missed = sum(kind == "fault" and not outcome.caught for kind, outcome in outcomes)
    healthy = [outcome for kind, outcome in outcomes if kind == "healthy"]
    alarms = sum(bool(outcome.caught_by) for outcome in healthy)
    return missed <= 1 and alarms <= len(healthy) / 20
