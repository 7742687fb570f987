"""Roll-outs by vLLM, which takes the policy's weights over before each of them.

vLLM runs in this process and on its device. It samples with kernels of its own, so what it says of
its tokens is not to the last bit what the trainer says: it tells each token's log-probability, and
the trainer weighs the difference (`losses.policy.importance_weights`).
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amenable.errors import StageError
from amenable.rollout.types import Request, Rollout, Sampling

if TYPE_CHECKING:
    from amenable.data.render import Renderer
    from amenable.models.build import Foundation
    from amenable.models.roles import Role

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights pass within the process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads stay where they are
    "VLLM_LOGGING_LEVEL": "CRITICAL",  # it would show whole batches; the gate sees what is missed
    "VLLM_NO_USAGE_STATS": "1",
}
_BATCH_TOKENS = 8192
_LEAST_SHARE = 0.05  # of a GPU that must be free for it; its cache has a size of its own


class VllmCopy:
    """The policy's weights in vLLM; used like `transformers_engine.RolloutCopy`.

    Args:
        role: who samples.
        foundation: of the run; its base model gives vLLM the architecture.

    Raises:
        StageError: vLLM refuses the model, or does not get its memory.
    """

    def __init__(self, role: Role, foundation: Foundation) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        recipe, on_cpu = foundation.recipe, foundation.device.type == "cpu"
        self.role = role
        self._room = recipe.data.max_prompt_tokens + recipe.data.max_completion_tokens
        with _explained(), _own_threads():
            from vllm import LLM

            self._llm = LLM(
                foundation.source,
                dtype=str(foundation.dtype).removeprefix("torch."),
                skip_tokenizer_init=True,
                generation_config="vllm",
                max_model_len=self._room,
                kv_cache_memory_bytes=round(recipe.policy.vllm.cache_gb * 1e9),
                gpu_memory_utilization=_LEAST_SHARE,
                logprobs_mode="processed_logprobs",  # at the temperature
                enable_prefix_caching=True,
                enforce_eager=on_cpu,
                enable_chunked_prefill=not on_cpu,  # it cannot take back a draw there
                max_num_batched_tokens=max(_BATCH_TOKENS, self._room),
                use_tqdm_on_load=False,
                seed=recipe.seed,
            )

    def sync(self) -> None:
        """Take over the role's present weights."""
        with torch.no_grad(), _explained():
            weights = role_weights(self.role)  # one merged matrix at a time
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._llm.apply_model(_lay_out_head)
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("its cache of prompts could not be emptied")

    def close(self) -> None:
        """Give weights and cache back."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def engine(self, renderer: Renderer) -> VllmEngine:
        """Samples with these weights."""
        return VllmEngine(self._llm, renderer.eos_ids, self._room)


@contextmanager
def _explained() -> Iterator[None]:
    """Raises StageError: whatever vLLM raises, whose errors are of many kinds."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StageError(f'vLLM failed: {reason}; policy.engine = "own" does without it') from error


@contextmanager
def _own_threads() -> Iterator[None]:
    """Torch's threads are the same afterwards; vLLM sets them, and keeps others from doing it."""
    count, set_count = torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_count
        torch.set_num_threads(count)


def role_weights(role: Role) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the plain model, a role's adapter merged into it."""
    from peft import PeftModel

    from amenable.models.adapters import merged_weights

    merged = set()
    if isinstance(role.model, PeftModel) and role.adapter is not None:
        for module, weight in merged_weights(role.model, role.adapter):
            merged.add(f"{module}.weight")
            yield f"{module}.weight", weight
    for name, parameter in role.plain.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if plain not in merged and ".lora_" not in name:
            yield plain, parameter.detach()


def _lay_out_head(model: Any) -> None:
    """On a CPU vLLM keeps weights laid out anew; of a head that is the embedding it forgets to."""
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    if head is not None and head.weight.device.type == "cpu" and method is not None:
        method.process_weights_after_loading(head)


class VllmEngine:
    """Completes prompts with vLLM.

    Args:
        llm: vLLM's, within this process.
        eos_ids: tokens that end a completion.
        room: most tokens of a prompt and its completion.
    """

    def __init__(self, llm: Any, eos_ids: frozenset[int], room: int) -> None:
        self._llm, self._eos_ids, self._room = llm, eos_ids, room

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """Roll-outs in the order of the requests, with the log-probability of every token.

        Raises:
            StageError: a prompt is longer than vLLM has been given room for, or vLLM fails.
        """
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if longest + sampling.max_new_tokens > self._room:
            raise StageError(
                f"a prompt of {longest} tokens and a completion of {sampling.max_new_tokens} are "
                f"more than the {self._room} that vLLM was given room for "
                "(data.max_prompt_tokens + data.max_completion_tokens); raise "
                'data.max_prompt_tokens, or set policy.engine = "own"'
            )
        with _explained():
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
                [self._parameters(request, sampling) for request in requests],
                use_tqdm=False,
            )
        if on_progress is not None:
            on_progress(len(requests))
        return [
            _rollout(request, output.outputs[0], sampling)
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _parameters(self, request: Request, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        digest = hashlib.sha256(repr(request.key).encode()).digest()
        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=int.from_bytes(digest[:4], "big"),
            stop_token_ids=sorted(self._eos_ids),
            ignore_eos=True,  # of the tokenizer, which it is not given
            logprobs=0,  # of the drawn token alone
            detokenize=False,
        )


def _rollout(request: Request, output: Any, sampling: Sampling) -> Rollout:
    ids = tuple(output.token_ids)
    said = ()
    if sampling.temperature > 0:
        said = tuple(told[token].logprob for token, told in zip(ids, output.logprobs, strict=True))
    return Rollout(request.prompt_ids, ids, output.finish_reason == "stop", said)
