"""Memory of each stage by part, and the files that it leaves.

A stage has phases (training, roll-out, export, …); its peak is the largest sum of one. On a CPU
what a stage has freed stays with the process (`pipeline.process`), so that a later stage never
shows less than an earlier one. Weights that are read in the precision of their file stay mapped
from it, and go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from amenable.config.needs import learns_from_preferences, trains_reward
from amenable.config.recipe import Recipe
from amenable.plan.hardware import Hardware
from amenable.plan.rows import Lengths, Rows
from amenable.plan.shape import ModelShape
from amenable.plan.trace import trunk_activations
from amenable.plan.work import Supervised, grouped, has_critic, longest_micro_batch
from amenable.rollout.lean_llama import MOST_WEIGHTS

_FRAGMENTS = {"cpu": 1.45, "cuda": 1.1}
"""What the allocator takes for activations, relative to what is alive (docs/plan.md)."""
_PROCESS = {"cpu": 0.5e9, "cuda": 0.6e9}
"""Libraries, tokenizer, data; on a card its context."""
_LATER = 0.05e9  # libraries that only some stages import
_DECODED_TOGETHER = 128
_READ_TOGETHER = {"cpu": 2048, "cuda": 16384}  # tokens of prompts
_LEAVING = 0.45  # of the cache: what stays is copied when sequences leave
_KERNELS = {"training": (64, 10e6), "sampling": (8, 2e6)}
"""oneDNN compiles bfloat16 products for each size that it meets and keeps them: rows between two
sizes, and bytes of all products of that size (docs/plan.md)."""
_FLOAT, _MOMENTS = 4, 8  # bytes of a trained weight, and of Adam's two moments
_DECODE_COPIES = 5  # float32 rows of the vocabulary: logits, scaled, softmax, its sums, kept ones
_PROJECTED = {"cpu": 256, "cuda": 2048}  # positions whose logits exist at a time
_LOGIT_COPIES = 2
_CHUNK, _CHUNK_COPIES = 1024, 3  # where the projection is trained: all logits, and these on top

Parts = dict[str, float]
"""Bytes by part."""


@dataclass(frozen=True)
class StageMemory:
    """The phase of a stage that takes most."""

    stage: str
    phase: str
    parts: Parts
    unscaled: float = 0.0
    """Bytes of the training phase that do not grow with the micro-batch; 0: it does not train."""
    phases: Parts = field(default_factory=dict)
    """Bytes of every phase."""

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Phase:
    name: str
    parts: Parts
    mapped: float = 0.0
    """Bytes of weights that are a file's pages."""

    @property
    def own(self) -> float:
        return sum(self.parts.values()) - self.mapped


@dataclass(frozen=True)
class MicroBatch:
    """The largest one of a stage."""

    rows: int
    width: int
    predicted: int
    """Completion tokens whose log-probabilities are wanted; 0 with a scalar head."""

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.rows * self.width


@dataclass(frozen=True)
class Budget:
    """Bytes of the roles and passes of one recipe on one machine.

    Args:
        recipe: adapters, precision, batches.
        shape: of the model.
        rows: of the data.
        machine: where.
        process: bytes that the process takes before a model is loaded; 0: the usual.
    """

    recipe: Recipe
    shape: ModelShape
    rows: Rows
    machine: Hardware
    process: float = 0.0

    def stages(self, names: Sequence[str]) -> list[StageMemory]:
        """The peak of each stage, in the order in which one process runs them."""
        kept, found = 0.0, []
        compiled = dict.fromkeys(_KERNELS, 0.0)
        for name in names:
            phases = self._phases(name)
            for kind, size in self._kernels(name).items():
                compiled[kind] = max(compiled[kind], size)
            for phase in phases:
                phase.parts["compiled kernels"] = sum(compiled.values())
                if self.machine.kind == "cpu" and kept > phase.own:
                    phase.parts["kept from before"] = kept - phase.own
            top = max(phases, key=lambda phase: sum(phase.parts.values()))
            kept = max(phase.own for phase in phases)
            parts = {part: size for part, size in top.parts.items() if size}
            training = [p.own - p.parts["activations"] for p in phases if p.name == "training"]
            totals = {phase.name: sum(phase.parts.values()) for phase in phases}
            found.append(StageMemory(name, top.name, parts, sum(training), totals))
        return found

    def _kernels(self, stage: str) -> dict[str, float]:
        """Bytes of the products that a stage has compiled, by kind."""
        if self.machine.kind != "cpu" or self.dtype is not torch.bfloat16:
            return {}
        batch = self.largest(stage)
        rows = {
            "training": batch.tokens if batch else 0,
            "sampling": {
                "collect": _DECODED_TOGETHER,
                "policy": _DECODED_TOGETHER,
                "evaluate": self.recipe.evaluate.batch_size,
            }.get(stage, 0),
        }
        return {
            kind: size * math.ceil(rows[kind] / between)
            for kind, (between, size) in _KERNELS.items()
        }

    def largest(self, stage: str) -> MicroBatch | None:
        """The micro-batch of a stage that trains."""
        lengths, policy = self.rows.lengths, self.recipe.policy
        if stage == "policy" and not learns_from_preferences(self.recipe):
            each = max(1, round(policy.prompts_per_update / policy.minibatches))
            return _laid_out(grouped(self.recipe, self.rows), policy.micro_batch_tokens, each)
        learners: dict[str, tuple[Supervised, str]] = {
            "sft": (self.recipe.sft, "demonstrations"),
            "reward": (self.recipe.reward, "preferences"),
            "policy": (policy.preference, "preferences"),
        }
        if stage not in learners or learners[stage][1] not in lengths:
            return None
        config, kind = learners[stage]
        found = _laid_out(lengths[kind], config.micro_batch_tokens, config.batch_size)
        return MicroBatch(found.rows, found.width, 0) if stage == "reward" else found

    def activations(self, stage: str) -> float:
        """Bytes of the stage's largest training pass."""
        batch = self.largest(stage)
        if batch is None:
            return 0.0
        trunk = self._per_token.training * batch.tokens
        return _FRAGMENTS[self.machine.kind] * trunk + self._logits(batch.predicted)

    def _logits(self, predicted: int) -> float:
        """Bytes of the logits of so many positions, of which few exist at a time."""
        rows = _LOGIT_COPIES * min(predicted, _PROJECTED[self.machine.kind])
        return rows * self.shape.vocabulary * _FLOAT

    @cached_property
    def dtype(self) -> torch.dtype:
        """Compute precision."""
        return self.machine.dtype(self.recipe.model.dtype)

    @property
    def lora(self) -> bool:
        """Adapters on a frozen base; else every role has float32 weights of its own."""
        return self.recipe.model.lora.enabled

    @property
    def trained(self) -> int:
        """Weights that one role trains."""
        rank = self.recipe.model.lora.rank
        return self.shape.adapter(rank) if self.lora else self.shape.parameters

    @property
    def quantised(self) -> bool:
        """The frozen base's linear layers are."""
        return self.lora and self.recipe.model.quantise != "none"

    @property
    def base(self) -> float:
        """Bytes of the weights as they are kept."""
        if not self.lora:
            return self.shape.parameters * _FLOAT
        return self.shape.frozen(self.dtype.itemsize, self.recipe.model.quantise)

    @property
    def export(self) -> float:
        """Bytes of a model folder's weights."""
        return self.shape.parameters * self.dtype.itemsize

    def disk(self, names: Sequence[str]) -> dict[str, float]:
        """Bytes of each stage's checkpoints, as many as stay, and of its export.

        Another one is written aside before the oldest goes.
        """
        adapter = self.trained * _FLOAT if self.lora else 0
        critic = self._critic
        checkpoints = {
            "sft": self.trained * (2 * _FLOAT + _MOMENTS),
            "reward": self.trained * (2 * _FLOAT + _MOMENTS),
            "policy": self.trained * (_FLOAT + _MOMENTS) * (1 + critic),
        }
        if learns_from_preferences(self.recipe):
            checkpoints["policy"] = checkpoints["sft"]
        exported = {"sft": "models/sft", "reward": "models/reward", "policy": "models/tuned"}
        found = {}
        for name in names:
            if name in exported:
                stay = self.recipe.checkpoint.keep_last
                found[f"stages/{name}/checkpoints"] = float(checkpoints[name] * stay)
                weights = self.shape.trunk if name == "reward" else self.shape.parameters
                found[exported[name]] = weights * self.dtype.itemsize + adapter
        return found

    @cached_property
    def _per_token(self) -> _PerToken:
        """The trunk's activations, traced once and taken to grow with the tokens."""
        batches = [self.largest(stage) for stage in ("sft", "reward", "policy")]
        batch = max((b for b in batches if b is not None), key=lambda b: b.tokens)
        lora = self.recipe.model.lora
        found = trunk_activations(
            self.shape.config,
            batch.rows,
            batch.width,
            self.dtype,
            lora,
            packed=self.machine.kind == "cpu",
        )
        return _PerToken(found.training / batch.tokens, found.forward / batch.tokens)

    @property
    def _critic(self) -> bool:
        return has_critic(self.recipe)

    def phases(self, stage: str) -> dict[str, Parts]:
        """Bytes by part of every phase of a stage."""
        return {phase.name: phase.parts for phase in self._phases(stage)}

    def _phases(self, stage: str) -> list[_Phase]:
        phases: dict[str, Callable[[], list[_Phase]]] = {
            "sft": lambda: self._supervised("sft"),
            "collect": lambda: [self._sampling(_DECODED_TOGETHER, 2)],
            "reward": lambda: self._supervised("reward"),
            "policy": self._off_policy if learns_from_preferences(self.recipe) else self._on_policy,
            "evaluate": lambda: [self._sampling(self.recipe.evaluate.batch_size, 1)],
        }
        return phases[stage]() if stage in phases else [_Phase("rows", self._start())]

    def _start(self) -> Parts:
        known = self.process and self.process + _LATER
        return {"process": known or _PROCESS[self.machine.kind]}

    def _roles(self, adapters: int, trunks: int, copies: int = 0, frozen: int = 0) -> Parts:
        """One shared base with adapters, and copies of it; or as many whole trunks, some frozen."""
        if not self.lora:
            narrower = self.shape.linear * (_FLOAT - self.dtype.itemsize)
            return {**self._start(), "weights": trunks * self.base - frozen * narrower}
        return {
            **self._start(),
            "weights": self.base,
            "layer written out": self.shape.largest * self.dtype.itemsize * self.quantised,
            "roll-out copy": copies * self.base,
            "adapters": adapters * self.trained * _FLOAT,
        }

    def _training(self, roles: Parts, stage: str, copies: int, trained: int = 1) -> Parts:
        """With gradients of one role, the moments of all that learn, and copies of weights."""
        return {
            **roles,
            "gradients": self.trained * _FLOAT,
            "Adam's moments": trained * self.trained * _MOMENTS,
            "copies of trained weights": copies * self.trained * _FLOAT,
            "activations": self.activations(stage),
        }

    def _checkpoint(self, roles: Parts, copies: int, trained: int = 1) -> _Phase:
        parts = {
            "Adam's moments": trained * self.trained * _MOMENTS,
            "copies of trained weights": copies * self.trained * _FLOAT,
        }
        return _Phase("checkpoint", {**roles, **parts})

    def _exporting(self, roles: Parts) -> _Phase:
        """Merged layers, in main memory; the file is written from them and from the base.

        Of a quantised base the whole model is read again, and merged.
        """
        held = self.lora and self.machine.kind == "cpu"
        count = self.shape.parameters if self.quantised else self.shape.linear
        merged = count * self.dtype.itemsize if held else 0
        return _Phase("export", {**roles, "merged weights": merged})

    def _decoding(self, sequences: int, samples: int, merged: bool = True) -> Parts:
        """Cache and next-token distributions; the samples of a prompt share its part.

        Args:
            sequences: decoded together.
            samples: of a prompt.
            merged: the weights are a plain model's, which are laid out anew on a CPU.
        """
        longest = max(row[0] for row in self.rows.lengths["prompts"])
        cached = sequences * (longest / samples + self.recipe.data.max_completion_tokens)
        cache = cached * self.shape.kv_numbers() * self.dtype.itemsize
        read = min(_READ_TOGETHER[self.machine.kind], sequences / samples * longest)
        small = self.machine.kind == "cpu" and self.shape.parameters <= MOST_WEIGHTS
        return {
            "weights laid out for decoding": self.export * (small and merged),
            "key-value cache": cache,
            "prefill, or copies of the cache": max(
                _FRAGMENTS[self.machine.kind] * read * self._per_token.forward, _LEAVING * cache
            ),
            "logits": _DECODE_COPIES * sequences * self.shape.vocabulary * _FLOAT,
        }

    def _sampling(self, sequences: int, samples: int) -> _Phase:
        """A model alone, read from its folder; a role's own is written in the compute precision."""
        mapped = self.export if self.machine.kind == "cpu" else 0.0
        parts = {**self._start(), "weights": self.export, **self._decoding(sequences, samples)}
        return _Phase("sampling", parts, mapped)

    def _supervised(self, stage: str) -> list[_Phase]:
        roles = self._roles(1, 1)
        kept = {**roles, "copies of trained weights": self.trained * _FLOAT}
        return [
            _Phase("training", self._training(roles, stage, 1)),
            self._checkpoint(roles, 2),
            self._exporting(kept),
        ]

    def _on_policy(self) -> list[_Phase]:
        policy, own = self.recipe.policy, trains_reward(self.recipe)
        reference = bool(self.rows["demonstrations.train"]) and self.recipe.sft.enabled
        others = own + self._critic
        trained = 1 + self._critic
        served = policy.engine == "vllm"
        copies = int(policy.merged_rollouts and not self.quantised and not served)
        roles = self._roles(1 + reference + others, 2 + others, copies, frozen=1 + own)
        if served:
            roles |= {"vLLM's weights": self.export, "vLLM's cache": policy.vllm.cache_gb * 1e9}

        def decoding(sequences: int, samples: int) -> Parts:
            return {} if served else self._decoding(sequences, samples, copies > 0)

        if self.rows["prompts.validation"]:
            roles["best checkpoint"] = self.trained * _FLOAT
        held = {**roles, "Adam's moments": trained * self.trained * _MOMENTS}
        episodes = policy.prompts_per_update * policy.samples_per_prompt
        batch = self.largest("policy")
        assert batch is not None
        look = self._per_token.forward * batch.tokens + self._logits(batch.predicted)
        samples = min(episodes, _DECODED_TOGETHER), policy.samples_per_prompt
        asked = min(self.rows["prompts.validation"], _DECODED_TOGETHER)
        return [
            _Phase("roll-out", held | decoding(*samples)),
            *([_Phase("choice of a checkpoint", held | decoding(asked, 1))] if asked else []),
            _Phase("scoring", {**held, "activations": look}),
            _Phase("training", self._training(roles, "policy", 0, trained)),
            self._checkpoint(roles, trained, trained),
            self._exporting(held),
        ]

    def _off_policy(self) -> list[_Phase]:
        reference = bool(self.rows["demonstrations.train"]) and self.recipe.sft.enabled
        copies = int(self.recipe.policy.merged_rollouts and not self.quantised)
        roles = self._roles(1 + reference, 1)
        sampling = self._roles(1 + reference, 2, copies, frozen=1)
        return [
            _Phase("training", self._training(roles, "policy", 1)),
            self._checkpoint(roles, 2),
            self._exporting(roles),
            _Phase("samples", sampling | self._decoding(_DECODED_TOGETHER // 2, 1, copies > 0)),
        ]


@dataclass(frozen=True)
class _PerToken:
    training: float
    forward: float


def _laid_out(rows: Sequence[Lengths], budget: int, batch: int) -> MicroBatch:
    count, width = longest_micro_batch(rows, budget, batch)
    answers = [sum(row[1:]) for row in rows]
    return MicroBatch(count, width, round(count * sum(answers) / len(answers)))
