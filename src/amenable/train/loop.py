"""What training stages share: optimizer steps, schedules, and the supervised loop.

The loop knows no algorithm. Losses arrive unreduced and are reduced here, over the real
entries of the *whole* batch, so that accumulating 8 × 1 equals 1 × 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from amenable.data.collate import seeded_epochs
from amenable.errors import NumericsError
from amenable.ranks import group as ranks
from amenable.ranks.sharding import is_sharded, laid_out_as, own_part
from amenable.train.checkpoints import Checkpoints, restored

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.models.roles import Role

Metrics = dict[str, float]

_CLIP_EPS = 1e-6  # as torch.nn.utils has it
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
        parameters: float32, or float64.
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
        self._steps = 0
        self.undone = 0
        """Steps left out, as their gradient was not finite."""
        sharded = [p for p in self._parameters if is_sharded(p)]
        plain = [p for p in self._parameters if not is_sharded(p)]
        if [*map(id, sharded), *map(id, plain)] != [*map(id, self._parameters)]:
            raise ValueError("sharded parameters come first")
        self._adam = torch.optim.AdamW(
            [{"params": own} for own in (sharded, plain) if own],  # one kernel cannot take both
            lr=0.0,
            betas=(0.9, 0.999),
            eps=eps,
            weight_decay=weight_decay,
            fused=True,  # one pass over weights, gradients and moments
        )

    def step(self, rate: float) -> float:
        """Apply the gathered gradients with learning rate `rate`; return their norm, unclipped.

        Of several ranks each takes the same step, on the sum of their gradients; whether their
        weights are still the same is looked at after the 1st, 2nd, 4th, … step of a process.
        Where the norm is not finite, weights and moments are left as they were.

        Raises:
            NumericsError: the norm was not finite three times in a row, or the weights of a rank
                are no longer those of the others.
        """
        ranks.sum_gradients(self._parameters)
        norm = clip_gradients(self._parameters, self._max_grad_norm)
        if not math.isfinite(norm):
            self._undo(norm)
            return norm
        self._undone_in_a_row = 0
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._steps += 1
        if self._steps.bit_count() == 1:
            ranks.check_replicas(self._parameters, f"after step {self._steps}")
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
        for number, parameter in enumerate(self._parameters):
            for key, value in entries.get(number, {}).items():
                if value.shape == parameter.shape:
                    entries[number][key] = laid_out_as(value, parameter)
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": entries, "param_groups": groups})


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> float:
    """Scale gradients down to a global norm, in place; returns what it was.

    Args:
        parameters: whole, or sharded and called by all ranks.
        most: norm allowed.
    """
    known = [p for p in parameters if p.grad is not None]
    sharded = [own_part(cast(Tensor, p.grad)) for p in known if is_sharded(p)]
    if not sharded:
        return float(nn.utils.clip_grad_norm_(known, most))
    plain = [cast(Tensor, p.grad) for p in known if not is_sharded(p)]
    square = torch.zeros((), dtype=torch.float64, device=sharded[0].device)
    for part in sharded:
        square += part.double().square().sum()
    ranks.add_up([square], "gradients")
    norm = float((square + sum(grad.double().square().sum() for grad in plain)).sqrt())
    for grad in (*sharded, *plain):
        grad.mul_(min(1.0, most / (norm + _CLIP_EPS)))
    return norm


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
    checkpoints: Checkpoints | None = None,
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
        checkpoints: of the stage, where they are open already.

    Raises:
        KeyboardInterrupt: `ctx.stop` was asked; a checkpoint of the last step is written.
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
    checkpoints = checkpoints or Checkpoints(ctx)
    progress = _SupervisedProgress(ctx, role, optimizer, loss_name, checkpoints)
    progress.resume(steps)
    with ctx.stop.held_up(), ctx.progress.track(steps, ctx.stage, progress.step) as bar:
        if progress.step in marks and not progress.evaluated:
            progress.evaluate(evaluate())
        for step in range(progress.step, steps):
            rate = learning_rate(step, steps, config.learning_rate, config.warmup_fraction)
            metrics = gradient(batches[step])
            norm = optimizer.step(rate)
            undone = float(optimizer.undone)
            ctx.log.write(
                step + 1, **metrics, learning_rate=rate, grad_norm=norm, undone_steps=undone
            )
            progress.count(metrics[loss_name])
            bar.advance(1, loss=metrics[loss_name])
            if ctx.stop.asked:
                progress.save()
                ctx.stop.obey()
            stop = ctx.deadline.exceeded()
            if step + 1 in marks or stop:
                progress.evaluate(evaluate())
            elif checkpoints.due():
                progress.save()
            if stop:
                ctx.progress.say(f"{ctx.stage}: time is up after {step + 1} of {steps} steps")
                break
    return progress.finish()


class _SupervisedProgress:
    """Losses so far and the best weights, as checkpoints hold them."""

    def __init__(
        self,
        ctx: StageContext,
        role: Role,
        optimizer: Optimizer,
        loss_name: str,
        checkpoints: Checkpoints,
    ) -> None:
        self._ctx, self._role, self._optimizer = ctx, role, optimizer
        self._watched, self._checkpoints = f"eval_{loss_name}", checkpoints
        self._best: dict[str, Tensor] | None = None
        self._best_loss = math.inf
        self.step = 0
        self.evaluated = True
        """Whether the evaluation of this step, if it has one, is done."""
        self._losses: list[float] = []

    def resume(self, steps: int) -> None:
        """Go on from the last checkpoint, and say of which step of how many it is."""
        saved = self._checkpoints.read()
        if saved is not None:
            tensors, numbers = saved
            self._role.load_state(tensors["weights"])
            self._optimizer.load_state(tensors["optimizer"])
            best = numbers["best_loss"]  # null: no evaluation was finite
            self._best, self._best_loss = tensors.get("best"), math.inf if best is None else best
            self.step, self._losses = numbers["step"], numbers["losses"]
            self.evaluated = numbers["evaluated"]
            where = f"{self._ctx.stage}: step {self.step} of {steps}"
            self._ctx.progress.say(restored(where, tensors, "losses, logs", self.step == steps))
        self._ctx.log.truncate(self.step)

    def count(self, loss: float) -> None:
        """One more step."""
        self.step, self.evaluated = self.step + 1, False
        if math.isfinite(loss):
            self._losses.append(loss)

    def evaluate(self, metrics: Metrics) -> None:
        """Record an evaluation; keep the weights if it is the best so far."""
        self._ctx.log.write(self.step, **metrics)
        loss = metrics[self._watched] if math.isfinite(metrics[self._watched]) else math.inf
        if loss < self._best_loss or self._best is None:
            self._best, self._best_loss = self._role.state(), loss
        self.evaluated = True
        self.save()

    def save(self) -> None:
        """Write a checkpoint."""
        tensors = {"weights": self._role.state(), "optimizer": self._optimizer.state()}
        if self._best is not None:
            tensors["best"] = self._best
        self._checkpoints.write(
            self.step,
            tensors,
            {
                "step": self.step,
                "evaluated": self.evaluated,
                "best_loss": self._best_loss,
                "losses": self._losses,
            },
        )

    def finish(self) -> SupervisedResult:
        """Leave the best weights in the role."""
        if self._best is not None:
            self._role.load_state(self._best)
        first = self._losses[: max(1, len(self._losses) // 10)]
        last = self._losses[-len(first) :] if first else []
        return SupervisedResult(
            steps=self.step,
            loss_first=sum(first) / len(first) if first else None,
            loss_last=sum(last) / len(last) if last else None,
        )
