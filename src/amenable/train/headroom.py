"""What there is to gain before training: the annotator's score of the best of n samples.

The best are chosen by the annotator, which no policy beats, and by the reward model, as PPO will.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from amenable.artifacts import write_json
from amenable.data.collate import PromptGroup
from amenable.data.row_file import open_prompts
from amenable.evaluate.overoptimization import best_of_n, best_of_n_kl
from amenable.evaluate.statistics import Floats
from amenable.rollout.types import Request, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from amenable.artifacts import StageContext
    from amenable.data.annotator import SimulatedAnnotator
    from amenable.data.render import Renderer
    from amenable.rollout.types import Engine


def report_headroom(
    ctx: StageContext,
    engine: Engine,
    renderer: Renderer,
    annotator: SimulatedAnnotator,
    proxy: Callable[[Sequence[PromptGroup]], Tensor] | None = None,
) -> dict[str, Any]:
    """Write `stages/policy/headroom.json` and say it: greedy, sampled and best-of-n mean scores.

    Samples are drawn at the temperature of the policy's roll-outs.

    Args:
        ctx: the policy stage.
        engine: on the model that the policy starts from.
        renderer: of the run.
        annotator: whose noise-free score counts.
        proxy: the reward model's scores of all completions, in the order of the groups; with it
            `by_reward_model` is added: for n = 1, 2, 4, … mean score, by the reward model and by
            the annotator, of the best of n by the reward model.
    """
    config, data = ctx.recipe.evaluate, ctx.recipe.data
    prompts = open_prompts(ctx.folder.data / "prompts.train.jsonl")[: config.best_of_prompts]
    ids = [tuple(renderer.prompt_ids(prompt)) for prompt in prompts]

    def sampled(samples: int, temperature: float) -> list[PromptGroup]:
        requests = [
            Request(ids[i], (ctx.recipe.seed, "headroom", prompt.id, k))
            for i, prompt in enumerate(prompts)
            for k in range(samples)
        ]
        sampling = Sampling(max_new_tokens=data.max_completion_tokens, temperature=temperature)
        drawn = [rollout.completion_ids for rollout in engine.generate(requests, sampling)]
        return [
            PromptGroup(own, drawn[i * samples : (i + 1) * samples]) for i, own in enumerate(ids)
        ]

    def scores(groups: Sequence[PromptGroup]) -> Floats:
        return np.array(
            [
                [annotator.score(prompt, renderer.completion_text(c)) for c in group.completions]
                for prompt, group in zip(prompts, groups, strict=True)
            ]
        )

    temperature = ctx.recipe.policy.temperature
    greedy, drawn = scores(sampled(1, 0.0)), sampled(config.best_of, temperature)
    gold = scores(drawn)
    found: dict[str, Any] = {
        "prompts": len(prompts),
        "best_of": config.best_of,
        "temperature": temperature,
        "sft_greedy": float(greedy.mean()),
        "sft_sampled": float(gold.mean()),
        "best_of_n": float(gold.max(1).mean()),
    }
    if proxy is not None:
        found["by_reward_model"] = _best_by(proxy(drawn).double().numpy().reshape(gold.shape), gold)
    write_json(ctx.out / "headroom.json", found)
    ctx.progress.say(
        f"policy: annotator's score before training, {len(prompts)} prompts: "
        f"greedy {found['sft_greedy']:.3f}, sampled {found['sft_sampled']:.3f}, "
        f"best of {config.best_of} {found['best_of_n']:.3f}"
    )
    return found


def _best_by(proxy: Floats, gold: Floats) -> list[dict[str, float]]:
    """Of n = 1, 2, 4, … up to the samples of a prompt: what choosing by the proxy comes to."""
    most = gold.shape[1]
    return [
        {
            "n": n,
            "kl": best_of_n_kl(n),
            "proxy": best_of_n(proxy, proxy, n),
            "gold": best_of_n(proxy, gold, n),
        }
        for n in (1 << power for power in range(most.bit_length()))
    ]
