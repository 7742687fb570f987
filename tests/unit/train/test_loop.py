from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.conftest import said
from tests.unit.disks import small_disk
from torch import Tensor, nn

from amenable.artifacts import StageContext, read_jsonl
from amenable.errors import NumericsError, StorageError
from amenable.train import loop
from amenable.train.checkpoints import Checkpoints, load_checkpoint, save_checkpoint
from amenable.train.loop import (
    Optimizer,
    add_gradient,
    learning_rate,
    train_supervised,
)

MakeContext = Callable[..., StageContext]


def test_learning_rate_by_hand() -> None:
    """Ten steps, two of them warm-up: 1/3 and 2/3 of the peak, then 8/8, 7/8, ... 1/8."""
    rates = [learning_rate(step, 10, 2.4, warmup_fraction=0.2) for step in range(10)]
    assert rates == pytest.approx([0.8, 1.6, 2.4, 2.1, 1.8, 1.5, 1.2, 0.9, 0.6, 0.3])


def test_learning_rate_falls_to_a_fraction() -> None:
    """With 0.1 left: 0.1 + 0.9 times 4/4, 3/4, 2/4, 1/4."""
    rates = [learning_rate(step, 4, 1.0, final_fraction=0.1) for step in range(4)]
    assert rates == pytest.approx([1.0, 0.775, 0.55, 0.325])
    assert learning_rate(4, 4, 1.0, final_fraction=0.1) == pytest.approx(0.1)


def parameters(*values: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([value])) for value in values]


def give_gradients(weights: Sequence[nn.Parameter], *values: float) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.grad = torch.tensor([value])


def test_first_step_of_adam_by_hand() -> None:
    """Bias-corrected moments of one step are g and g^2: each weight moves by rate · sign(g)."""
    weights = parameters(1.0, 2.0, 3.0)
    optimizer = Optimizer(weights, max_grad_norm=100.0)
    give_gradients(weights, 3.0, -4.0, 12.0)
    assert optimizer.step(0.1) == pytest.approx(13.0)
    assert [weight.item() for weight in weights] == pytest.approx([0.9, 2.1, 2.9])
    assert [weight.grad for weight in weights] == [None] * 3


def test_clipping_scales_the_gradient_and_reports_its_norm_before() -> None:
    """Norm 5 is scaled down to 1; Adam's first moment then holds a tenth of (0.6, 0.8)."""
    weights = parameters(0.0, 0.0)
    optimizer = Optimizer(weights, max_grad_norm=1.0)
    give_gradients(weights, 3.0, 4.0)
    assert optimizer.step(0.1) == pytest.approx(5.0)
    state = optimizer.state()
    moments = [state[f"{i}.exp_avg"].item() for i in (0, 1)]
    assert moments == pytest.approx([0.06, 0.08], abs=1e-6)


def test_weight_decay_is_decoupled() -> None:
    """Weight 2 with rate 0.1 and decay 0.5 shrinks by 0.1 · 0.5 · 2 = 0.1; Adam adds -0.1."""
    weights = parameters(2.0)
    optimizer = Optimizer(weights, weight_decay=0.5)
    give_gradients(weights, 0.3)
    optimizer.step(0.1)
    assert weights[0].item() == pytest.approx(1.8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_left_out_and_counted(bad: float) -> None:
    weights = parameters(1.0, 2.0)
    optimizer = Optimizer(weights)
    give_gradients(weights, 0.5, bad)
    assert not math.isfinite(optimizer.step(0.1))
    assert optimizer.undone == 1
    assert [weight.item() for weight in weights] == [1.0, 2.0]
    assert [weight.grad for weight in weights] == [None, None]
    give_gradients(weights, 1.0, 1.0)
    optimizer.step(0.1)
    assert [weight.item() for weight in weights] == pytest.approx([0.9, 1.9])
    assert optimizer.undone == 1


def test_three_steps_in_a_row_that_are_not_finite_end_the_stage() -> None:
    weights = parameters(1.0)
    optimizer = Optimizer(weights)
    for given in (math.nan, math.nan, 1.0, math.nan, math.nan):
        give_gradients(weights, given)
        optimizer.step(0.1)
    other = Optimizer(weights)
    other.load_state(optimizer.state())
    assert other.undone == 4
    for last in (optimizer, other):
        give_gradients(weights, math.nan)
        with pytest.raises(NumericsError, match=r"nan in 3 steps in a row.*Lower the learning"):
            last.step(0.1)


def test_rows_whose_loss_is_not_finite_are_named() -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    losses = weight * torch.tensor([[1.0, 2.0], [1.0, math.nan], [math.inf, 1.0]])
    blamed: list[int] = []
    add_gradient(losses, mask, 5, blamed.append)
    assert blamed == [2], "what the mask hides is nobody's fault"


def test_optimizer_goes_on_from_its_state_bit_for_bit(tmp_path: Path) -> None:
    def steps(optimizer: Optimizer, weights: list[nn.Parameter], numbers: range) -> None:
        for number in numbers:
            give_gradients(weights, math.sin(number), math.cos(number))
            optimizer.step(0.01 * (number + 1))

    whole = parameters(1.0, 2.0)
    steps(Optimizer(whole, eps=1e-5), whole, range(6))
    first = parameters(1.0, 2.0)
    optimizer = Optimizer(first, eps=1e-5)
    steps(optimizer, first, range(3))
    save_checkpoint(tmp_path / "c", {"optimizer": optimizer.state()}, {})
    saved = load_checkpoint(tmp_path / "c", print)
    assert saved is not None
    second = parameters(*(weight.item() for weight in first))
    resumed = Optimizer(second, eps=1e-5)
    resumed.load_state(saved[0]["optimizer"])
    steps(resumed, second, range(3, 6))
    assert [weight.item() for weight in second] == [weight.item() for weight in whole]


def test_add_gradient_divides_by_the_whole_batch() -> None:
    """Real entries 1 and 3 of squared weights, batch of 8: sum 10 / 8, gradients 2 w / 8."""
    weights = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0]]))
    mask = torch.tensor([[True, False, True]])
    assert add_gradient(weights.square(), mask, 8) == pytest.approx(10 / 8)
    assert weights.grad is not None
    assert weights.grad.tolist() == [[0.25, 0.0, 0.75]]
    assert add_gradient(weights.square(), None, 7) == pytest.approx(2.0)


# --- the supervised loop -----------------------------------------------------------------------


class PointRole:
    """A role of one weight, pulled to each row's target."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.zeros(1))

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [self.weight]

    def state(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach().clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.weight.data.copy_(state["weight"])


@dataclasses.dataclass
class Toy:
    """A supervised stage whose evaluations are scripted."""

    ctx: StageContext
    role: PointRole = dataclasses.field(default_factory=PointRole)
    seen: list[int] = dataclasses.field(default_factory=list)
    scripted: Iterator[float] | None = None
    at_evaluation: list[float] = dataclasses.field(default_factory=list)

    def gradient(self, rows: Sequence[int]) -> dict[str, float]:
        self.seen += rows
        targets = torch.tensor([0.1 * row - 3.0 for row in rows])
        return {"loss": add_gradient((self.role.weight - targets).square(), None, len(rows))}

    def evaluate(self) -> dict[str, float]:
        self.at_evaluation.append(self.role.weight.item())
        loss = next(self.scripted) if self.scripted else abs(self.role.weight.item() + 2.0)
        return {"eval_loss": loss}

    def rows(self) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in row.items() if key != "wall_s"}
            for row in read_jsonl(self.ctx.log.metrics_path)
        ]

    def run(self) -> loop.SupervisedResult:
        role: Any = self.role
        return train_supervised(
            self.ctx,
            self.ctx.recipe.sft,
            role,
            rows=10,
            gradient=self.gradient,
            evaluate=self.evaluate,
            loss_name="loss",
        )


def toy(
    make_context: MakeContext,
    root: Path,
    stop_after: int | None = None,
    *,
    every_minutes: float = 0.0,
    **sft: Any,
) -> Toy:
    settings = {"batch_size": 2, "epochs": 2.0, "evaluations": 5, "learning_rate": 0.1, **sft}
    changes = {f"sft__{key}": value for key, value in settings.items()}
    changes["checkpoint__every_minutes"] = every_minutes
    return Toy(make_context("sft", root=root, stop_after=stop_after, **changes))


def test_every_row_is_seen_once_a_pass(make_context: MakeContext, tmp_path: Path) -> None:
    found = toy(make_context, tmp_path)
    result = found.run()
    assert result.steps == 10
    assert sorted(found.seen[:10]) == sorted(found.seen[10:]) == list(range(10))
    assert found.seen[:10] != found.seen[10:]
    rows = [row for row in read_jsonl(found.ctx.log.metrics_path) if "sft/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 11))
    losses = [row["sft/loss"] for row in rows]
    assert (result.loss_first, result.loss_last) == (losses[0], losses[-1])
    assert len(found.at_evaluation) == 5


def test_max_steps_ends_early(make_context: MakeContext, tmp_path: Path) -> None:
    found = toy(make_context, tmp_path, max_steps=3, evaluations=1)
    assert found.run().steps == 3
    assert len(found.seen) == 6
    assert len(found.at_evaluation) == 1


def test_the_best_evaluation_is_kept(make_context: MakeContext, tmp_path: Path) -> None:
    found = toy(make_context, tmp_path)
    found.scripted = iter([5.0, 2.0, 1.0, 3.0, 4.0])
    found.run()
    assert len(set(found.at_evaluation)) == 5
    assert found.role.weight.item() == found.at_evaluation[2]


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_context: MakeContext, tmp_path: Path, stop: int
) -> None:
    whole = toy(make_context, tmp_path / "whole", evaluations=10)
    expected = whole.run()
    part = toy(make_context, tmp_path / "part", stop_after=stop, evaluations=10)
    assert part.run().steps == stop
    rest = toy(make_context, tmp_path / "part", evaluations=10)
    assert rest.run() == expected
    assert part.seen + rest.seen == whole.seen
    assert rest.role.weight.item() == whole.role.weight.item()
    assert rest.rows() == whole.rows()


def test_the_best_is_remembered_over_an_interruption(
    make_context: MakeContext, tmp_path: Path
) -> None:
    part = toy(make_context, tmp_path, stop_after=4)
    part.scripted = iter([2.0, 1.0])
    part.run()
    best = part.at_evaluation[1]
    rest = toy(make_context, tmp_path)
    rest.scripted = iter([3.0, 3.0, 3.0])
    rest.run()
    assert rest.role.weight.item() == best


@dataclasses.dataclass
class Disturbed(Toy):
    """A toy to which something happens in a step."""

    at_step: int = 0
    happens: Callable[[], None] = lambda: None

    def gradient(self, rows: Sequence[int]) -> dict[str, float]:
        if len(self.seen) // 2 + 1 == self.at_step:
            self.happens()
        return super().gradient(rows)


def die() -> None:
    raise RuntimeError("killed")


@pytest.mark.parametrize("step", [1, 2, 5, 10], ids="step-{}".format)
def test_a_stop_saves_after_its_step_and_loses_nothing(
    make_context: MakeContext, tmp_path: Path, step: int
) -> None:
    """Every second step has an evaluation: the run that goes on makes up for it."""
    whole = toy(make_context, tmp_path / "whole")
    expected = whole.run()
    ctx = toy(make_context, tmp_path / "part").ctx
    part = Disturbed(ctx, at_step=step, happens=lambda: ctx.stop.ask(15))
    with pytest.raises(KeyboardInterrupt):
        part.run()
    assert len(part.seen) == 2 * step
    assert Checkpoints(ctx).step == step
    rest = toy(make_context, tmp_path / "part")
    assert rest.run() == expected
    assert part.seen + rest.seen == whole.seen
    assert part.at_evaluation + rest.at_evaluation == whole.at_evaluation
    assert rest.rows() == whole.rows()
    assert rest.role.weight.item() == whole.role.weight.item()


def test_the_clock_writes_checkpoints_between_evaluations(
    make_context: MakeContext, tmp_path: Path
) -> None:
    """With an interval of nearly nothing a kill in step 8 loses that step alone."""
    whole = toy(make_context, tmp_path / "whole", evaluations=1)
    expected = whole.run()
    assert [path.name for path in (whole.ctx.out / "checkpoints").iterdir()] == ["step-000010"]
    ctx = toy(make_context, tmp_path / "part", evaluations=1, every_minutes=1e-9).ctx
    part = Disturbed(ctx, at_step=8, happens=die)
    with pytest.raises(RuntimeError, match="killed"):
        part.run()
    rest = toy(make_context, tmp_path / "part", evaluations=1)
    assert rest.run() == expected
    assert "sft: step 7 of 10 restored: optimizer, weights, losses, logs\n" in said(rest.ctx)
    assert len(rest.seen) == 6
    assert rest.rows() == whole.rows()
    assert rest.role.weight.item() == whole.role.weight.item()


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    make_context: MakeContext, tmp_path: Path
) -> None:
    whole = toy(make_context, tmp_path / "whole")
    expected = whole.run()
    part = toy(make_context, tmp_path / "part", stop_after=6)
    part.run()
    file = part.ctx.out / "checkpoints" / "step-000006" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    rest = toy(make_context, tmp_path / "part")
    assert rest.run() == expected
    assert "step-000006 is damaged and is not used" in said(rest.ctx)
    assert "sft: step 4 of 10 restored: best, optimizer, weights, losses, logs\n" in said(rest.ctx)
    assert rest.rows() == whole.rows()
    assert rest.role.weight.item() == whole.role.weight.item()


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    make_context: MakeContext, tmp_path: Path
) -> None:
    """A file that grows in step 5 leaves too little for the checkpoint of step 6."""
    whole = toy(make_context, tmp_path / "whole")
    expected = whole.run()
    with small_disk(tmp_path / "small", "256k") as disk:
        root, other = disk.path / "run", disk.path / "other"

        def fill() -> None:
            free = shutil.disk_usage(disk.path).free
            other.write_bytes(bytes(free - 8192))

        ctx = toy(make_context, root).ctx
        part = Disturbed(ctx, at_step=5, happens=fill)
        said = r"cannot write .*step-000006: the disk is full; free some space and run again"
        with pytest.raises(StorageError, match=said):
            part.run()
        assert Checkpoints(ctx).step == 4
        assert sorted(path.name for path in (ctx.out / "checkpoints").iterdir()) == [
            "step-000002",
            "step-000004",
        ]
        other.unlink()
        rest = toy(make_context, root)
        assert rest.run() == expected
        assert rest.rows() == whole.rows()
        assert rest.role.weight.item() == whole.role.weight.item()


def test_a_disk_that_becomes_read_only_leaves_the_last_checkpoint(
    make_context: MakeContext, tmp_path: Path
) -> None:
    whole = toy(make_context, tmp_path / "whole")
    expected = whole.run()
    with small_disk(tmp_path / "small", "1m") as disk:
        root = disk.path / "run"
        ctx = toy(make_context, root).ctx
        part = Disturbed(ctx, at_step=5, happens=lambda: disk.remount("ro"))
        said = r"cannot write .*metrics.jsonl: the file system is read-only; choose another folder"
        with pytest.raises(StorageError, match=said):
            part.run()
        assert Checkpoints(ctx).step == 4
        disk.remount("rw")
        rest = toy(make_context, root)
        assert rest.run() == expected
        assert rest.rows() == whole.rows()
        assert rest.role.weight.item() == whole.role.weight.item()


@pytest.mark.parametrize("jump_s", [1e9, -1e9], ids=["forwards", "backwards"])
def test_a_clock_that_jumps_changes_nothing(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    whole = toy(make_context, tmp_path / "whole", every_minutes=1.0)
    expected = whole.run()
    real = time.time
    ctx = toy(make_context, tmp_path / "part", every_minutes=1.0).ctx

    def jump() -> None:
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)

    jumping = Disturbed(ctx, at_step=5, happens=jump)
    assert jumping.run() == expected
    assert jumping.rows() == whole.rows()
    seconds = [row["wall_s"] for row in read_jsonl(ctx.log.metrics_path)]
    assert seconds == sorted(seconds)
    assert 0 <= seconds[0] <= seconds[-1] < 60
    kept = [
        sorted(path.name for path in (x.out / "checkpoints").iterdir()) for x in (ctx, whole.ctx)
    ]
    assert kept[0] == kept[1], "the interval is measured on another clock"


def test_where_nothing_is_left_to_train_it_says_so(
    make_context: MakeContext, tmp_path: Path
) -> None:
    whole = toy(make_context, tmp_path)
    expected = whole.run()
    again = toy(make_context, tmp_path)
    assert again.run() == expected
    assert (again.seen, again.at_evaluation) == ([], [])
    assert "step 10 of 10 restored" in said(again.ctx)
    assert said(again.ctx).splitlines()[-2].endswith("; nothing is left to train")
    assert again.role.weight.item() == whole.role.weight.item()
