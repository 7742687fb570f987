"""What each of two ranks does in `test_sharding`: `python sharding_worker.py BASE OUT`.

Three steps of a sharded model with a scalar head, of which two come back from a checkpoint.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from amenable.artifacts import write_json, writes_left_out
from amenable.config.model import LoraConfig, ModelConfig
from amenable.config.recipe import Recipe
from amenable.data.collate import PromptGroup
from amenable.models.build import Foundation
from amenable.models.export import export_policy
from amenable.models.heads import ScalarHead
from amenable.models.roles import Role
from amenable.ranks import group
from amenable.ranks.launch import join, seat
from amenable.ranks.sharding import is_sharded, own_part, whole
from amenable.rollout.transformers_engine import RolloutCopy
from amenable.train.checkpoints import load_checkpoint, save_checkpoint
from amenable.train.loop import Optimizer
from amenable.train.sft import sft_gradient

GROUPS = [PromptGroup([3 + n, 5, 9], [[7 + n, 11, 2][: 1 + n % 3]]) for n in range(5)]
RATE = 1e-3


def role_of(base: Path, shard: str) -> tuple[Foundation, Role]:
    model = ModelConfig(base=str(base), dtype="fp32", shard=shard, lora=LoraConfig(enabled=False))
    foundation = Foundation.open(Recipe(model=model))
    return foundation, foundation.role("sft", head=ScalarHead(64, seed=1))


def steps(role: Role, optimizer: Optimizer, count: int) -> list[float]:
    """Losses; the head gets a gradient of its own, on every rank a part."""
    losses = []
    for _ in range(count):
        losses.append(sft_gradient(role, GROUPS, 0, 8)["loss"])
        (role.scalar_head.weight.sum() / group.size()).backward()
        optimizer.step(RATE)
    return losses


def work(base: Path, out: Path, shard: str) -> dict[str, Any]:
    """What the test looks at; a checkpoint after two steps and an export after three in `out`."""
    foundation, role = role_of(base, shard)
    optimizer = Optimizer(role.trainable_parameters())
    losses = steps(role, optimizer, 2)
    state = {"weights": role.state(), "optimizer": optimizer.state()}
    save_checkpoint(out / "checkpoint", state, {})
    losses += steps(role, optimizer, 1)
    export_policy(role.model, foundation.tokenizer, out / "model")
    moments = optimizer.state()
    copy = RolloutCopy(role)
    copied = dict(copy.sync().named_parameters())
    return {
        "losses": losses,
        "held": {name: own_part(p).numel() for name, p in role.plain.named_parameters()},
        "whole": {name: p.numel() for name, p in role.plain.named_parameters()},
        "sharded": sum(is_sharded(p) for p in role.trainable_parameters()),
        "moments": sum(own_part(m).numel() for key, m in moments.items() if key.endswith("avg")),
        "copied": all(
            torch.equal(whole(p.detach()), copied[name])
            for name, p in role.plain.named_parameters()
        ),
    }


def resumed(base: Path, out: Path, shard: str) -> list[float]:
    """The loss of the third step, from the checkpoint after the second."""
    _, role = role_of(base, shard)
    optimizer = Optimizer(role.trainable_parameters())
    group.gathered(None)  # rank 0 has written
    saved = load_checkpoint(out / "checkpoint", print)
    assert saved is not None
    role.load_state(saved[0]["weights"])
    optimizer.load_state(saved[0]["optimizer"])
    return steps(role, optimizer, 2)[:2]


def main() -> None:
    base, out = Path(sys.argv[1]), Path(sys.argv[2])
    own = seat()
    assert own is not None
    join(own, timeout_s=60)
    with writes_left_out(out) if own.rank else nullcontext():
        found = work(base, out / "two", "fsdp2")
        found["resumed"] = resumed(base, out / "two", "fsdp2")
        found["of one"] = resumed(base, out / "one", "fsdp2")
    write_json(out / f"rank-{own.rank}.json", found)


if __name__ == "__main__":
    main()
