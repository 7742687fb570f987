"""What goes into a roll-out engine and what comes out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from amenable.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Args:
        max_new_tokens: longest completion, its end-of-sequence token included.
        temperature: 0 is greedy.
        top_p: keep the most probable tokens up to this mass; 1 keeps all.
        top_k: keep this many tokens; 0 keeps all.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0:
            raise RecipeError("max_new_tokens must be >= 1, temperature and top_k >= 0")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p must lie in (0, 1], not {self.top_p}")

    def check_trainable(self) -> None:
        """Refuse settings under which the sampler is not the policy that is differentiated.

        Raises:
            RecipeError: top-p, top-k or temperature 0.
        """
        if self.top_p < 1 or self.top_k or self.temperature == 0:
            raise RecipeError(
                "training roll-outs must be pure samples: set top_p = 1, top_k = 0 and "
                "temperature > 0; otherwise the behaviour policy is not the one that is "
                "differentiated"
            )


@dataclass(frozen=True, slots=True)
class Request:
    """One completion that is wanted.

    Args:
        prompt_ids: rendered prompt. Requests with equal ids share its encoding.
        key: names the noise: (seed, step, prompt, sample), never a place in a batch.
    """

    prompt_ids: tuple[int, ...]
    key: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion.

    Args:
        prompt_ids: what it continues.
        completion_ids: sampled tokens; the last one is an end-of-sequence token if `ended`.
        ended: the model stopped by itself within `max_new_tokens`.
        logprobs: nats of each token, at the temperature, as the engine says; empty where the engine
            computes as the trainer does.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    ended: bool
    logprobs: tuple[float, ...] = ()


class Engine(Protocol):
    """Anything that completes prompts."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """Roll-outs in the order of the requests; `on_progress` hears how many have finished."""
        ...


def uniform_noise(key: tuple[int | str, ...], count: int) -> NDArray[np.float64]:
    """[count] uniform numbers in [0, 1) that depend on the key alone.

    The same (seed, step, prompt, sample) draws the same numbers in every batch and process.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    words = np.frombuffer(digest[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words)).random(count)
