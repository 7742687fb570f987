"""Runs every check on the run's own models, and refuses to train where one fails."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amenable.data.collate import PromptGroup
from amenable.data.schemas import Prompt
from amenable.errors import NumericsError, RecipeError
from amenable.models.roles import Role
from amenable.rollout.transformers_engine import RolloutCopy, TransformersEngine
from amenable.rollout.types import Engine, Request, Rollout, Sampling
from amenable.train.gate import standing
from amenable.train.gate.findings import CHECKS, Finding, count, refusal, report
from amenable.train.gate.heads import Heads
from amenable.train.gate.passes import (
    Plain,
    Rows,
    one_by_one,
    pairs,
    picked,
    sampler,
    trainer_logprobs,
)
from amenable.train.gate.probe import left_as_found, probed
from amenable.train.gate.weights import merged_faults
from amenable.train.passes import EXACT

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.rollout.copies import Copy
    from amenable.train.policy_roles import PolicyRoles

FP32 = 1e-4  # nats a token at temperature 1 and above, and per unit of a head's spread
TIMES_NOISE = 1.5  # in bf16: of what plain transformers has on the same rows
TIMES_DECODING_NOISE = 2.0  # the sampler's attention is of another kind than plain decoding's

_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}
_PROMPTS = 4
_SAMPLES = 2
_NEW_TOKENS = 8
_AMONG = 64  # first prompts of the run, of which short ones are taken
_PROMPT_TOKENS = 48  # longer ones lose their middle
_SHORTER = 5  # tokens, at least, that each prompt is shorter than the next


def run_gate(
    ctx: StageContext,
    roles: PolicyRoles,
    engine: TransformersEngine,
    prompts: Sequence[Prompt],
    *,
    copy: RolloutCopy,
    critic: Role | None = None,
    served: Copy | None = None,
) -> dict[str, Any]:
    """Every check's figures; weights, gradients and random states are left as they were.

    Args:
        ctx: the policy stage.
        roles: who takes part, before the first update.
        engine: samples with the weights of `copy`.
        prompts: of training; a few short ones are used.
        copy: refreshed here, and left with the policy's present weights.
        critic: the role whose values are learnt, if there is one.
        served: the copy that another engine samples with in training, if there is one.

    Returns:
        `checks` (by name: `holds`, `skipped`, `figures`), `noise`, `rows`, `dtype`, `seconds`.

    Raises:
        NumericsError: a check fails that `policy.gate_skip` does not name; tells all that do.
        RecipeError: `policy.gate_skip` names no check.
    """
    started = time.perf_counter()
    skipped = _skipped(ctx)
    gate = _Gate(ctx, roles, engine, copy, critic, served)
    with left_as_found(standing.modules_of(gate.everybody, engine).values()), torch.no_grad():
        gate.run(prompts)
    seconds = time.perf_counter() - started
    failed = [f for f in gate.findings if not f.holds and f.check not in skipped]
    if failed:
        raise NumericsError(refusal(failed))
    more = {**gate.more, "seconds": round(seconds, 3)}
    ctx.progress.say(_line(gate.findings, skipped, seconds))
    return report(gate.findings, skipped, more)


def _skipped(ctx: StageContext) -> frozenset[str]:
    names = frozenset(ctx.recipe.policy.gate_skip)
    unknown = sorted(names - set(CHECKS))
    if unknown:
        raise RecipeError(
            f"policy.gate_skip names no check of the gate: {', '.join(unknown)}; "
            f"the checks are {', '.join(CHECKS)}"
        )
    return names


def _line(findings: Sequence[Finding], skipped: frozenset[str], seconds: float) -> str:
    names = {finding.check for finding in findings}
    parts = [f"policy: numerics gate: {len(names - skipped)} checks hold in {seconds:.1f} s"]
    if skipped:
        over = {f.check for f in findings if not f.holds and f.check in skipped}
        parts.append(
            "not held to: "
            + ", ".join(f"{name} (fails)" if name in over else name for name in sorted(skipped))
        )
    return "; ".join(parts)


@dataclass(frozen=True)
class _Ruler:
    """How far apart two paths may be.

    In fp32 and fp64 the largest difference counts and the bound is fixed. In bf16 a single token's
    difference says little: the root mean square over the tokens counts, against a multiple of what
    plain transformers has: between rows alone, padded on the left, and by another attention.
    """

    exact: bool
    fixed: float
    noise: float = 0.0
    times: float = TIMES_NOISE

    @property
    def bound(self) -> float:
        return self.fixed if self.exact else max(self.fixed, self.times * self.noise)

    def distance(self, one: Tensor, other: Tensor) -> float:
        gap = (one - other).float().abs()
        return float(gap.max() if self.exact else gap.square().mean().sqrt())

    def widened(self, *noise: float) -> _Ruler:
        """The same with the largest of these as noise."""
        return replace(self, noise=max(self.noise, *noise))


class _Gate:
    def __init__(
        self,
        ctx: StageContext,
        roles: PolicyRoles,
        engine: TransformersEngine,
        copy: RolloutCopy,
        critic: Role | None,
        served: Copy | None,
    ) -> None:
        self._ctx, self._roles, self._engine, self._copy = ctx, roles, engine, copy
        self._served = served
        self._pad = roles.foundation.renderer.pad_id
        self._heads = Heads.of(roles.reward_role, critic, self._pad)
        self._temperature = ctx.recipe.policy.temperature
        dtype = roles.foundation.dtype
        exact = dtype is not torch.bfloat16
        self._ruler = _Ruler(exact, FP32 / min(1.0, self._temperature))
        self.findings: list[Finding] = []
        self.more: dict[str, Any] = {"dtype": _NAMES[dtype], "noise": {}}

    @property
    def everybody(self) -> list[Role]:
        """Every role."""
        return [self._roles.policy, self._roles.reference, *self._heads.roles.values()]

    def run(self, prompts: Sequence[Prompt]) -> None:
        """All checks; passes over tokens only where weights and special tokens allow them."""
        prompt_ids = self._prompt_ids(prompts)
        if not self._standing(prompt_ids):
            return
        with probed(self._roles.policy, self._copy, every=self._served is not None):
            rows = self._sample(prompt_ids)
            self._trainer(rows)
            self._rollout(rows)
            if self._served is not None:
                self._serve(self._served, prompt_ids)
            moved = self._still(rows)
            self._read_heads(rows, moved)
            self.findings += standing.gradient(
                self.everybody, self._roles.policy, rows.groups[:1], self._pad
            )
        if self._served is not None:
            self._served.sync()
        self._start(rows, moved)

    def _prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """A few short prompts, cut where needed so that no two are equally long.

        Equally long prompts would never be padded, and faults of padding not seen.
        """
        renderer = self._roles.foundation.renderer
        first = [prompts[index] for index in range(min(_AMONG, len(prompts)))]
        found = {tuple(renderer.prompt_ids(prompt)) for prompt in first}
        ordered = sorted(found, key=lambda ids: (len(ids), ids))[: 4 * _PROMPTS]
        chosen = ordered[:: max(1, len(ordered) // _PROMPTS)][:_PROMPTS]
        limit, cut = _PROMPT_TOKENS, []
        for ids in reversed(chosen):
            if limit < 2:
                break  # what is left could no longer be told apart
            cut.append(_cut(ids, limit))
            limit = len(cut[-1]) - _SHORTER
        return cut[::-1]

    def _standing(self, prompt_ids: list[list[int]]) -> bool:
        """Checks without passes over tokens; False where passes would make no sense."""
        foundation, policy, engine = self._roles.foundation, self._roles.policy, self._engine
        modules = standing.modules_of(self.everybody, engine)
        finite = standing.finite_weights(modules)
        pad = standing.pad_token(foundation, policy, engine)
        self.findings += [
            finite,
            pad,
            standing.eos_tokens(foundation, policy, engine),
            standing.eos_trained(foundation, prompt_ids[0]),
            standing.dropout_off(modules),
        ]
        if finite.holds and pad.holds:
            self.findings.append(standing.eos_recognised(foundation, engine, prompt_ids[0]))
        return finite.holds and pad.holds

    def _drawn(self, engine: Engine, prompt_ids: list[list[int]]) -> tuple[Rows, list[Rollout]]:
        """Completions as the loop draws them."""
        sampling = Sampling(
            max_new_tokens=min(_NEW_TOKENS, self._ctx.recipe.data.max_completion_tokens),
            temperature=self._temperature,
        )
        requests = [
            Request(tuple(ids), (self._ctx.recipe.seed, "gate", index, sample))
            for index, ids in enumerate(prompt_ids)
            for sample in range(_SAMPLES)
        ]
        rollouts = engine.generate(requests, sampling)
        groups = tuple(
            PromptGroup(
                ids, [r.completion_ids for r in rollouts[_SAMPLES * i : _SAMPLES * (i + 1)]]
            )
            for i, ids in enumerate(prompt_ids)
        )
        keys = tuple(request.key for request in requests)
        return Rows(groups, keys, sampling.max_new_tokens, self._pad), rollouts

    def _sample(self, prompt_ids: list[list[int]]) -> Rows:
        """The completions that the checks are made on."""
        rows, _ = self._drawn(self._engine, prompt_ids)
        self.more["rows"] = {
            "prompts": len(rows.groups),
            "prompt_tokens": sum(len(group.prompt_ids) for group in rows.groups),
            "completion_tokens": sum(len(ids) for _, ids in pairs(rows.groups)),
        }
        return rows

    def _serve(self, served: Copy, prompt_ids: list[list[int]]) -> None:
        """What another engine says of the tokens that it draws, against the trainer."""
        served.sync()
        engine = served.engine(self._roles.foundation.renderer)
        rows, rollouts = self._drawn(engine, prompt_ids)
        said = torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs])
        expected = trainer_logprobs(served.role, rows.groups, self._pad, self._temperature)
        ruler = replace(self._ruler, times=TIMES_DECODING_NOISE)
        self._compare("roll-out", "engine against trainer, nats", said, expected, ruler)

    def _trainer(self, rows: Rows) -> None:
        """The learners' log-probabilities: in a group, in a batch, alone, and by transformers."""
        role, pad, temperature = self._roles.policy, self._pad, self._temperature
        own = pairs(rows.own)
        plain = Plain(role, pad)
        logits = plain.logits(own, None)
        expected = picked(logits, own, temperature)
        left = picked(plain.logits(own, "left"), own, temperature)
        self._plain = [expected, left]
        if not self._ruler.exact:
            eager = Plain(role, pad, "eager")
            self._plain.append(picked(eager.logits(own, "right"), own, temperature))
            said = torch.cat(
                [part.gather(1, _column(ids)) for part, (_, ids) in zip(logits, own, strict=True)]
            )
            self._ruler = self._ruler.widened(
                _rounding(said / temperature),
                *(self._ruler.distance(a, b) for a, b in combinations(self._plain, 2)),
            )
            self.more["noise"]["logprobs"] = self._ruler.noise
        self._grouped = trainer_logprobs(role, rows.groups, pad, temperature)
        batched = trainer_logprobs(role, rows.own, pad, temperature)
        alone = one_by_one(role, rows.own, pad, temperature)
        self._compare("temperature", "trainer against plain transformers, nats", alone, expected)
        self._compare("neighbours", "rows in a batch against each alone, nats", batched, alone)
        self._compare("padding", "padding on the right against the left, nats", batched, left)
        self._compare(
            "group", "a shared row against rows alone, nats", self._grouped[rows.is_own], alone
        )
        ends = sorted(self._roles.foundation.renderer.eos_ids)
        within = [end for end in ends if 0 <= end < logits[0].shape[-1]]
        faults = [str(e) for e in within if not all(x[:, e].isfinite().all() for x in logits)]
        self.findings.append(count("eos", "ends that can never be drawn", faults))

    def _rollout(self, rows: Rows) -> None:
        """The sampler against the trainer, its weights, and its draws."""
        role, pad, temperature = self._copy.role, self._pad, self._temperature
        said = sampler(self._engine, rows, temperature)
        own = pairs(rows.own)
        grouped, plain = self._grouped, self._plain
        if role is not self._roles.policy:  # best of n samples from the reference
            grouped = trainer_logprobs(role, rows.groups, pad, temperature)
            plain = [picked(Plain(role, pad).logits(own, "left"), own, temperature)]
        ruler = self._ruler
        if not ruler.exact:  # cached decoding, and weights merged in bf16, are rounded: by what?
            own_model = self._engine.model is role.plain
            copied = Plain(role if own_model else Role(self._engine.model, dtype=role.dtype), pad)
            decoded = picked(copied.decoded(own), own, temperature)
            ruler = replace(ruler, times=TIMES_DECODING_NOISE).widened(
                *(ruler.distance(decoded, other) for other in plain)
            )
            self.more["noise"]["roll-out"] = ruler.noise
        self._compare("roll-out", "sampler against trainer, nats", said.logprobs, grouped, ruler)
        faults = merged_faults(role, self._engine.model)
        self.findings.append(count("roll-out", "layers that are not those of the sampler", faults))
        self.findings.append(
            Finding(
                "temperature",
                "sampled tokens beside the noise that drew them, probability",
                float(said.missed.max()),
                ruler.bound,
            )
        )

    def _still(self, rows: Rows) -> dict[str, Tensor]:
        """What must not move with the policy: reference and heads, on a few rows."""
        few = list(rows.few)
        said = {
            "reference": trainer_logprobs(self._roles.reference, few, self._pad, self._temperature)
        }
        return said | self._heads.read(few)

    def _start(self, rows: Rows, moved: dict[str, Tensor]) -> None:
        """Before the first update: ratio 1, KL 0, and nothing but the policy follows the policy."""
        few, pad, temperature = list(rows.few), self._pad, self._temperature
        policy = self._roles.policy
        old = trainer_logprobs(policy, few, pad, temperature)
        with torch.enable_grad():
            new = trainer_logprobs(policy, few, pad, temperature).detach()
        still = self._still(rows)
        exact = _Ruler(True, EXACT)
        ratio = (new - old).exp()
        self._compare("ratio", "new over old probability, from 1", ratio, ratio * 0 + 1, exact)
        self._compare("ratio", "log-probabilities of two passes, nats", new, old, exact)
        self._compare("reference", "policy against reference", old, still["reference"], exact)
        for name, before in moved.items():
            quantity = f"change of the {name} when only the policy changes"
            self._compare(name, quantity, before, still[name], exact)
        both = torch.cat([old, self._grouped])
        faults = [] if bool(both.isfinite().all()) else ["log-probabilities"]
        self.findings.append(count("finite", "results that are not finite", faults))

    def _read_heads(self, rows: Rows, said: dict[str, Tensor]) -> None:
        """Scores and values in shared rows against plain hidden states of rows alone."""
        few = list(rows.few)
        plain = self._heads.plain(few, None)
        sides = []
        if plain and not self._ruler.exact:
            sides = [self._heads.plain(few, "left"), self._heads.plain(few, "right", "eager")]
        for name in self._heads.roles:
            scale = max(1.0, float(plain[name].square().mean().sqrt()))
            ruler = _Ruler(self._ruler.exact, FP32 * scale)
            if sides:
                ways = combinations([plain[name], *(side[name] for side in sides)], 2)
                gaps = (ruler.distance(one, other) for one, other in ways)
                ruler = ruler.widened(_rounding(plain[name]), *gaps)
                self.more["noise"][name] = ruler.noise
            quantity = f"{name} in shared rows against plain rows alone"
            self._compare(name, quantity, said[name], plain[name], ruler)

    def _compare(
        self, check: str, quantity: str, one: Tensor, other: Tensor, ruler: _Ruler | None = None
    ) -> None:
        ruler = ruler or self._ruler
        self.findings.append(Finding(check, quantity, ruler.distance(one, other), ruler.bound))


def _cut(ids: Sequence[int], size: int) -> list[int]:
    """At most `size` ids: beginning and end, which a template and a completion need."""
    return list(ids) if len(ids) <= size else [*ids[: size - size // 2], *ids[-(size // 2) :]]


def _column(ids: Sequence[int]) -> Tensor:
    return torch.tensor(list(ids))[:, None]


def _rounding(values: Tensor) -> float:
    """Root mean square of what rounding to bf16 adds: no two paths can be held to less."""
    step = torch.finfo(torch.bfloat16).eps * float(values.square().mean().sqrt())
    return step / math.sqrt(12)
