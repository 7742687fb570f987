"""Do the exported folders of a finished run give its numbers with plain transformers?

    python benchmarks/reload.py runs/demo [--rows 100]

Greedy completions of `models/tuned` at batch size 1 against the recorded ones, and raw scores of
`models/reward` in float32, less its `reward_offset`, against the recorded ones. Prompts are
rendered by the run's recipe; everything else is transformers alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from amenable.artifacts import read_jsonl
from amenable.config.load import load_recipe
from amenable.data.readers import read_prompts
from amenable.data.render import Renderer
from amenable.models.build import best_device
from amenable.models.load import eos_ids, resolve_dtype


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
    _compare_scores(options.run, tokenizer, renderer, pairs)


@torch.no_grad()
def _compare_scores(run: Path, tokenizer, renderer, pairs) -> None:  # type: ignore[no-untyped-def]
    model = AutoModelForSequenceClassification.from_pretrained(
        run / "models" / "reward", dtype=torch.float32
    )
    worst = 0.0
    for prompt, row in pairs:
        if not row["ended"]["tuned"]:
            continue  # the recorded tokens have no end; its text alone does not tell them
        text = tokenizer(row["completions"]["tuned"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*renderer.prompt_ids(prompt), *text, tokenizer.eos_token_id]])
        score = float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])
        recorded = row["scores"]["reward_model"]["tuned"]
        worst = max(worst, abs(score - model.config.reward_offset - recorded))
    print(f"reward: largest difference of a score {worst:.2e}")


if __name__ == "__main__":
    main()
