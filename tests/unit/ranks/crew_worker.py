"""What a rank runs in `test_crew`: `python crew_worker.py OUT WHAT`, a run without weights.

WHAT is what one of the ranks does in the stage: `nothing`, `dies:R`, `raises:R`, `waits:R`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from amenable.artifacts import write_json
from amenable.cli import main
from amenable.config.model import ModelConfig
from amenable.config.recipe import Recipe
from amenable.errors import StageError
from amenable.pipeline import local
from amenable.pipeline.stages import Stage


def alone(ctx: Any) -> dict[str, Any]:
    """Rank 0's own: the others must not be here."""
    assert os.environ["RANK"] == "0"
    write_json(ctx.folder.data / "rows.json", [1, 2, 3])
    return {}


def together(ctx: Any) -> dict[str, Any]:
    """Every rank reads what rank 0 wrote, and writes what is left out on all but rank 0."""
    from amenable.artifacts import read_json
    from amenable.ranks import group

    what, _, which = os.environ["WHAT"].partition(":")
    rows = read_json(ctx.folder.data / "rows.json")
    ctx.log.write(0, rank=group.rank())
    write_json(ctx.out / "made.json", {"rank": group.rank()})
    ctx.progress.say(f"rank {group.rank()} speaks")
    ctx.progress.blame(f"row {group.rank()} is broken")
    ended = [ctx.deadline.exceeded(), ctx.deadline.part(0.5).exceeded()]
    for step in range(10**9 if what != "nothing" else 3):
        if step == 2 and which == str(group.rank()):
            if what == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "raises":
                raise StageError("the floor is wet")
            time.sleep(3600)
        group.gathered(step)
    return {
        "rows": len(rows),
        "ranks": group.gathered(group.rank()),
        "ended": ended,
        "faults": [*faults(ctx.folder.root.parent)],
    }


def faults(scratch: Path) -> Iterator[str]:
    """What is said where ranks do not fit together; the last rank is the odd one."""
    from amenable.errors import NumericsError, UsageError
    from amenable.ranks import group
    from amenable.ranks.preflight import check_same, check_shared

    odd = group.rank() == group.size() - 1
    weights = torch.nn.Parameter(torch.tensor([1.0, 1.0 + 1e-7 * odd]))
    for look in (
        lambda: check_same("the version of ", {"torch": "2.13" if odd else "2.12"}),
        lambda: check_shared(scratch / ("elsewhere" if odd else "here"), wait_s=0.5),
        lambda: group.check_replicas([weights], "after step 1"),
    ):
        try:
            look()
        except (UsageError, NumericsError) as error:
            yield str(error)


def stage(name: str, **settings: Any) -> Stage:
    return Stage(
        name=name,
        run=f"{__name__}:{name}",
        config=("seed",),
        time_share=1,
        off=lambda recipe: "",
        **settings,
    )


STAGES = (
    stage("alone", makes=("data/rows.json",)),
    stage("together", needs=("alone",), makes=("stages/together/made.json",), together=True),
)


def run() -> None:
    """As the command line does it."""
    seed = int(os.environ.get("OTHER_SEED", "0"))
    recipe = Recipe(seed=seed, model=ModelConfig(base="tiny"))
    folder = Path(sys.argv[1])
    summary = local.run(recipe, folder, stages=STAGES)
    print(f"rank {os.environ['RANK']} has {summary['stages']['together']['status']}")


if __name__ == "__main__":
    os.environ["WHAT"] = sys.argv[2]
    main.app = lambda **_: run()  # type: ignore[assignment, misc]  # errors as the command tells them
    main.main()
