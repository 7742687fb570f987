"""What training stages share: optimizer steps, schedules, checkpoints, and the supervised loop.

The loop knows no algorithm. Losses arrive unreduced and are reduced here, over the real
entries of the *whole* batch, so that accumulating 8 × 1 equals 1 × 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from amenable.artifacts import atomic_dir, read_json, write_json
from amenable.data.collate import seeded_epochs
from amenable.errors import NumericsError

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.models.roles import Role

Metrics = dict[str, float]

_MOST_UNDONE = 3  # steps one after the other; then training has broken down


def learning_rate(
    step: int, steps: int, peak: float, warmup_fraction: float = 0.0, final_fraction: float = 0.0
) -> float:
    """Linear warm-up to `peak`, then linear decay towards `final_fraction` of it.

    The fraction would be reached one step after the last, so that no step is without effect.

    Args:
        step: from 0.
        steps: how many there will be.
        peak: highest rate.
        warmup_fraction: share of the steps that rise.
        final_fraction: share of the peak that the step after the last would have.
    """
    warmup = round(steps * warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return peak * (final_fraction + (1 - final_fraction) * left)


class Optimizer:
    """AdamW over a role's parameters with gradient clipping.

    A step whose gradient is not finite is left out and counted, so that weights and moments stay
    as they were.

    Args:
        parameters: float32.
        eps: Adam's; 1e-5 in reinforcement learning (peers' practice).
        weight_decay: decoupled.
        max_grad_norm: global norm that gradients are scaled down to.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        self._parameters = list(parameters)
        self._max_grad_norm = max_grad_norm
        self._undone_in_a_row = 0
        self.undone = 0
        """Steps left out, as their gradient was not finite."""
        self._adam = torch.optim.AdamW(
            self._parameters,
            lr=0.0,
            betas=(0.9, 0.999),
            eps=eps,
            weight_decay=weight_decay,
            fused=True,  # one pass over weights, gradients and moments
        )

    def step(self, rate: float) -> float:
        """Apply the gathered gradients with learning rate `rate`; return their norm, unclipped.

        Where the norm is not finite, weights and moments are left as they were.

        Raises:
            NumericsError: the norm was not finite three times in a row.
        """
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        if not math.isfinite(norm):
            self._undo(norm)
            return norm
        self._undone_in_a_row = 0
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def _undo(self, norm: float) -> None:
        self._adam.zero_grad(set_to_none=True)
        self.undone += 1
        self._undone_in_a_row += 1
        if self._undone_in_a_row == _MOST_UNDONE:
            raise NumericsError(
                f"the gradient norm was {norm} in {_MOST_UNDONE} steps in a row: the loss is not "
                "finite. Lower the learning rate, or set model.dtype = 'fp32'"
            )

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts, flat, and how many steps were left out."""
        moments = {
            f"{index}.{key}": value
            for index, entry in self._adam.state_dict()["state"].items()
            for key, value in entry.items()
        }
        return moments | {"undone": torch.tensor([self.undone, self._undone_in_a_row])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Undo `state`."""
        self.undone, self._undone_in_a_row = state["undone"].tolist()
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name == "undone":
                continue
            index, key = name.split(".", 1)
            entries.setdefault(int(index), {})[key] = value
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": entries, "param_groups": groups})


def add_gradient(
    values: Tensor,
    mask: Tensor | None,
    denominator: float,
    blame: Callable[[int], None] | None = None,
) -> float:
    """Backpropagate the sum of real values over a denominator of the whole batch.

    Args:
        values: [N] or [N, C] unreduced losses of one micro-batch.
        mask: True where a value counts; None counts all.
        denominator: number of real values in the whole batch.
        blame: hears the number of each row whose loss is not finite.

    Returns:
        This micro-batch's part of the mean loss.
    """
    total = (values if mask is None else values[mask]).sum() / denominator
    total.backward()
    loss = float(total.detach())
    if blame is not None and not math.isfinite(loss):
        broken = ~values.detach().isfinite()
        broken = broken if mask is None else broken & mask
        for row in broken.view(len(broken), -1).any(1).nonzero()[:, 0].tolist():
            blame(row)
    return loss


def save_checkpoint(
    path: Path, tensors: dict[str, dict[str, Tensor]], numbers: dict[str, Any]
) -> None:
    """Write named groups of tensors and a JSON object, whole or not at all."""
    with atomic_dir(path) as folder:
        for name, group in tensors.items():
            save_file({k: v.contiguous() for k, v in group.items()}, folder / f"{name}.safetensors")
        write_json(folder / "numbers.json", {"tensors": sorted(tensors), **numbers})


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """What `save_checkpoint` wrote, or None if there is none."""
    if not (path / "numbers.json").is_file():
        return None
    numbers: dict[str, Any] = read_json(path / "numbers.json")
    return {name: load_file(path / f"{name}.safetensors") for name in numbers["tensors"]}, numbers


class SupervisedConfig(Protocol):
    """The settings that supervised stages share."""

    @property
    def epochs(self) -> float:
        """Passes over the rows."""
        ...

    @property
    def max_steps(self) -> int:
        """Most optimizer steps; 0: as many as `epochs` asks."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows of an optimizer step."""
        ...

    @property
    def learning_rate(self) -> float:
        """Peak rate."""
        ...

    @property
    def warmup_fraction(self) -> float:
        """Share of the steps in which the rate rises."""
        ...

    @property
    def max_grad_norm(self) -> float:
        """Global norm that gradients are scaled down to."""
        ...

    @property
    def weight_decay(self) -> float:
        """Decoupled, of AdamW."""
        ...

    @property
    def evaluations(self) -> int:
        """How often the validation rows are measured."""
        ...


@dataclass(frozen=True)
class SupervisedResult:
    """What a supervised stage did."""

    steps: int
    loss_first: float | None
    loss_last: float | None


def planned_batches(rows: int, config: SupervisedConfig, seed: int) -> list[list[int]]:
    """The row numbers of each optimizer step of `train_supervised`, in order."""
    order = list(seeded_epochs(rows, config.epochs, seed))
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    return batches[: config.max_steps or None]


def train_supervised(
    ctx: StageContext,
    config: SupervisedConfig,
    role: Role,
    *,
    rows: int,
    gradient: Callable[[Sequence[int]], Metrics],
    evaluate: Callable[[], Metrics],
    loss_name: str,
) -> SupervisedResult:
    """Train a role on rows in seeded order and leave it with the weights of its best evaluation.

    Resumes from the stage's checkpoint, with the same bits as an uninterrupted run: order and
    rates depend on seed and step alone.

    Args:
        ctx: the stage.
        config: shared supervised settings.
        role: what is trained.
        rows: number of training rows.
        gradient: adds the gradient of a batch of row numbers; returns its metrics.
        evaluate: metrics of the validation rows; `eval_` + `loss_name` chooses the best.
        loss_name: name of the loss among the metrics.
    """
    batches = planned_batches(rows, config, ctx.recipe.seed)
    steps = len(batches)
    ctx.progress.say(
        f"{ctx.stage}: {rows} rows × {config.epochs:g} passes, {steps} steps of "
        f"{min(config.batch_size, rows)} rows"
    )
    marks = {max(1, round(steps * (i + 1) / config.evaluations)) for i in range(config.evaluations)}
    optimizer = Optimizer(
        role.trainable_parameters(),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    progress = _SupervisedProgress(ctx, role, optimizer, loss_name)
    with ctx.progress.track(steps, ctx.stage) as bar:
        bar.advance(progress.step)
        for step in range(progress.step, steps):
            rate = learning_rate(step, steps, config.learning_rate, config.warmup_fraction)
            metrics = gradient(batches[step])
            norm = optimizer.step(rate)
            undone = float(optimizer.undone)
            ctx.log.write(
                step + 1, **metrics, learning_rate=rate, grad_norm=norm, undone_steps=undone
            )
            bar.advance(1, loss=metrics[loss_name])
            if math.isfinite(metrics[loss_name]):
                progress.losses.append(metrics[loss_name])
            stop = ctx.deadline.exceeded()
            if step + 1 in marks or stop:
                progress.mark(step + 1, evaluate())
            if stop:
                ctx.progress.say(f"{ctx.stage}: time is up after {step + 1} of {steps} steps")
                break
    return progress.finish()


class _SupervisedProgress:
    """Losses so far and the best weights, on disk at every evaluation."""

    def __init__(self, ctx: StageContext, role: Role, optimizer: Optimizer, loss_name: str) -> None:
        self._ctx, self._role, self._optimizer = ctx, role, optimizer
        self._watched = f"eval_{loss_name}"
        self._path = ctx.out / "checkpoints" / "last"
        self._best: dict[str, Tensor] | None = None
        self._best_loss = math.inf
        self.step = 0
        self.losses: list[float] = []
        saved = load_checkpoint(self._path)
        if saved is not None:
            tensors, numbers = saved
            role.load_state(tensors["weights"])
            optimizer.load_state(tensors["optimizer"])
            best = numbers["best_loss"]  # null: no evaluation was finite
            self._best, self._best_loss = tensors["best"], math.inf if best is None else best
            self.step, self.losses = numbers["step"], numbers["losses"]
            ctx.progress.say(f"{ctx.stage}: resumed after step {self.step}")
        ctx.log.truncate(self.step)

    def mark(self, step: int, metrics: Metrics) -> None:
        """Record an evaluation; keep the weights if it is the best so far."""
        self._ctx.log.write(step, **metrics)
        weights = self._role.state()
        loss = metrics[self._watched] if math.isfinite(metrics[self._watched]) else math.inf
        if loss < self._best_loss or self._best is None:
            self._best, self._best_loss = weights, loss
        self.step = step
        save_checkpoint(
            self._path,
            {"weights": weights, "best": self._best, "optimizer": self._optimizer.state()},
            {"step": step, "best_loss": self._best_loss, "losses": self.losses},
        )
        self._ctx.publish()

    def finish(self) -> SupervisedResult:
        """Leave the best weights in the role."""
        if self._best is not None:
            self._role.load_state(self._best)
        first = self.losses[: max(1, len(self.losses) // 10)]
        last = self.losses[-len(first) :] if first else []
        return SupervisedResult(
            steps=self.step,
            loss_first=sum(first) / len(first) if first else None,
            loss_last=sum(last) / len(last) if last else None,
        )
