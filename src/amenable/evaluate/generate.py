"""Completions of one system for many prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amenable.data.schemas import Completion, Prompt
from amenable.rollout.types import Request, Rollout, Sampling

if TYPE_CHECKING:
    from amenable.data.render import Renderer
    from amenable.rollout.types import Engine


@dataclass(frozen=True)
class Answer:
    """A completion with the tokens that it was sampled as."""

    completion: Completion
    rollout: Rollout


def generate(
    engine: Engine,
    renderer: Renderer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """One answer a prompt, in order. The noise depends on seed and prompt, not on the system.

    Args:
        engine: on the system's model.
        renderer: of the run.
        prompts: what to answer.
        sampling: temperature 0 decodes greedily.
        seed: of the noise.
        on_progress: hears how many answers have finished since the last call.
    """
    requests = [
        Request(tuple(renderer.prompt_ids(prompt)), (seed, "generate", prompt.id, 0))
        for prompt in prompts
    ]
    rollouts = engine.generate(requests, sampling, on_progress=on_progress)
    return [
        Answer(
            Completion(
                prompt=prompt,
                text=renderer.completion_text(rollout.completion_ids),
                tokens=len(rollout.completion_ids),
                ended=rollout.ended,
            ),
            rollout,
        )
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]
