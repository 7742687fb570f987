"""Do the exported folders of a finished run give its numbers with plain transformers?

    python benchmarks/reload.py runs/demo [--rows 100]

Greedy completions of `models/tuned` at batch size 1 against the recorded ones, and raw scores of
`models/reward` on held-out pairs, by the plain classifier and by our own loader in float32.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from amenable.artifacts import read_jsonl
from amenable.config.load import load_recipe
from amenable.config.recipe import Recipe
from amenable.data.reading.readers import read_preferences, read_prompts
from amenable.data.render import Renderer
from amenable.models.build import Foundation, best_device
from amenable.models.export import load_reward_head
from amenable.models.load import eos_ids, resolve_dtype
from amenable.rollout.rewards import score_groups
from amenable.train.reward import preference_group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=100)
    options = parser.parse_args()
    recipe = load_recipe(options.run / "recipe.toml")
    rows = list(read_jsonl(options.run / "stages" / "evaluate" / "completions.jsonl"))
    prompts = read_prompts([options.run / "data" / "prompts.test.jsonl"])
    tuned = options.run / "models" / "tuned"
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    renderer = Renderer.from_recipe(recipe, tokenizer, eos_ids(tuned, tokenizer))
    pairs = list(zip(prompts, rows, strict=True))[: options.rows]
    dtype = resolve_dtype(recipe.model.dtype, best_device())
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=dtype)
    same = 0
    for prompt, row in pairs:
        ids = torch.tensor([renderer.prompt_ids(prompt)])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=recipe.data.max_completion_tokens,
            do_sample=False,
        )
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        same += text == row["completions"]["tuned"]
    print(f"tuned: {same} of {len(pairs)} greedy completions are the recorded ones ({dtype})")
    _compare_scores(options.run, recipe, options.rows)


@torch.no_grad()
def _compare_scores(run: Path, recipe: Recipe, rows: int) -> None:
    """Held-out pairs through the plain classifier and through our own loader, both in float32."""
    recipe = replace(recipe, model=replace(recipe.model, dtype="fp32"))
    foundation = Foundation.open(recipe)
    folder = run / "models" / "reward"
    pairs = read_preferences([run / "data" / "preferences.test.jsonl"])[:rows]
    groups = [preference_group(foundation.renderer, pair) for pair in pairs]
    head, offset = load_reward_head(folder)
    role = foundation.role("reward", folder, head=head, train=False)
    own = score_groups(role, groups, foundation.renderer.pad_id, 1024)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    sequences = [[*group.prompt_ids, *ids] for group in groups for ids in group.completions]
    plain = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])
    worst = float((plain - own).abs().max())
    print(
        f"reward: {len(sequences)} raw scores, largest difference {worst:.2e}; offset {offset:.3f}"
    )


if __name__ == "__main__":
    main()
