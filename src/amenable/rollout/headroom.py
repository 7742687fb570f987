"""Is there anything to gain? The annotator's score of the SFT model and of its best samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amenable.artifacts import write_json
from amenable.data.row_file import open_prompts
from amenable.rollout.types import Request, Sampling

if TYPE_CHECKING:
    from amenable.artifacts import StageContext
    from amenable.data.annotator import SimulatedAnnotator
    from amenable.data.render import Renderer
    from amenable.rollout.types import Engine


def report_headroom(
    ctx: StageContext, engine: Engine, renderer: Renderer, annotator: SimulatedAnnotator
) -> dict[str, Any]:
    """Write `stages/policy/headroom.json` and say it: greedy, sampled and best-of-n mean scores.

    Samples are drawn at the temperature of the policy's roll-outs.

    Args:
        ctx: the policy stage.
        engine: on the model that the policy starts from.
        renderer: of the run.
        annotator: whose noise-free score counts.
    """
    config, data = ctx.recipe.evaluate, ctx.recipe.data
    prompts = open_prompts(ctx.folder.data / "prompts.train.jsonl")[: config.best_of_prompts]
    ids = [tuple(renderer.prompt_ids(prompt)) for prompt in prompts]

    def scores(samples: int, temperature: float) -> list[list[float]]:
        requests = [
            Request(ids[i], (ctx.recipe.seed, "headroom", prompt.id, k))
            for i, prompt in enumerate(prompts)
            for k in range(samples)
        ]
        sampling = Sampling(max_new_tokens=data.max_completion_tokens, temperature=temperature)
        texts = [
            renderer.completion_text(r.completion_ids) for r in engine.generate(requests, sampling)
        ]
        return [
            [annotator.score(prompt, text) for text in texts[i * samples : (i + 1) * samples]]
            for i, prompt in enumerate(prompts)
        ]

    temperature = ctx.recipe.policy.temperature
    greedy, sampled = scores(1, 0.0), scores(config.best_of, temperature)
    count = len(prompts)
    found = {
        "prompts": count,
        "best_of": config.best_of,
        "temperature": temperature,
        "sft_greedy": sum(row[0] for row in greedy) / count,
        "sft_sampled": sum(map(sum, sampled)) / (count * config.best_of),
        "best_of_n": sum(map(max, sampled)) / count,
    }
    write_json(ctx.out / "headroom.json", found)
    ctx.progress.say(
        f"policy: annotator's score before training, {count} prompts: "
        f"greedy {found['sft_greedy']:.3f}, sampled {found['sft_sampled']:.3f}, "
        f"best of {config.best_of} {found['best_of_n']:.3f}"
    )
    return found
