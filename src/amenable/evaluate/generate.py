"""Completions of one system for many prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amenable.artifacts import Progress
from amenable.data.schemas import Completion, Prompt
from amenable.rollout.types import Request, Rollout, Sampling

if TYPE_CHECKING:
    from amenable.config.recipe import Recipe
    from amenable.data.render import Renderer
    from amenable.rollout.types import Engine

_AT_ONCE = 256  # prompts


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


class Completer:
    """A model that is loaded once and completes prompts as it was trained to.

    Args:
        source: a model folder or hub id.
        recipe: of the run that the model belongs to, or the defaults.

    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(self, source: Path | str, recipe: Recipe) -> None:
        from amenable.data.render import Renderer
        from amenable.models.load import eos_ids, load_causal_lm, load_tokenizer, resolve_dtype
        from amenable.rollout.transformers_engine import TransformersEngine

        tokenizer = load_tokenizer(source)
        ends = eos_ids(source, tokenizer)
        self._renderer = Renderer.from_recipe(recipe, tokenizer, ends)
        dtype = resolve_dtype(recipe.model.dtype)
        self._engine = TransformersEngine(
            load_causal_lm(source, dtype),
            eos_ids=ends,
            pad_id=self._renderer.pad_id,
            dtype=dtype,
            batch_size=recipe.evaluate.batch_size,
        )

    def complete(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int
    ) -> Iterator[dict[str, Any]]:
        """Yields one row a prompt: id, input_text, completion, tokens, ended.

        Args:
            prompts: what to complete.
            sampling: temperature 0 decodes greedily.
            seed: of the noise.
        """
        with Progress().track(len(prompts), "generate") as tracker:
            for start in range(0, len(prompts), _AT_ONCE):
                some = prompts[start : start + _AT_ONCE]
                requests = [
                    Request(tuple(self._renderer.prompt_ids(prompt)), (seed, 0, prompt.id, 0))
                    for prompt in some
                ]
                rollouts = self._engine.generate(requests, sampling, lambda n: tracker.advance(n))
                for prompt, rollout in zip(some, rollouts, strict=True):
                    yield {
                        "id": prompt.id,
                        "input_text": prompt.text,
                        "completion": self._renderer.completion_text(rollout.completion_ids),
                        "tokens": len(rollout.completion_ids),
                        "ended": rollout.ended,
                    }
