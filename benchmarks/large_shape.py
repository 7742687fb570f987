"""PPO with LoRA in four roles on a Llama-2-7B-shaped model with random weights: time and memory.

    .venv/bin/python benchmarks/large_shape.py [--updates 2] [--layers 32] [--out FOLDER]

The policy stage itself, with its recipe, on a base whose weights are made directly in bfloat16:
policy, reference, reward model and critic are adapters and heads on that one base. An update is
4 episodes of 64 + 16 tokens and one pass. The numerics gate is off, as it passes dozens of times
over a model that knows nothing. The tokenizer has 32,000 tokens, trained on this Python's own
source. Prints a line of JSON: seconds of each update, peak resident memory, and the forecast of
`amenable plan` for each phase of the same recipe; the stage is left before checkpoint and export.
`--layers` cuts the model, to try the script.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import resource
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from amenable.artifacts import MetricsLog, RunFolder, StageContext, write_jsonl
from amenable.config.load import load_recipe
from amenable.models import build
from amenable.models.adapters import add_adapter
from amenable.models.export import ADAPTER_FOLDER, HEAD_FILE, save_adapter
from amenable.models.load import load_tokenizer
from amenable.pipeline.process import keep_freed_memory
from amenable.plan.forecast import renderer
from amenable.plan.hardware import hardware
from amenable.plan.memory import Budget
from amenable.plan.rows import rows_of
from amenable.plan.shape import shape_of
from amenable.progress import Deadline, Progress
from amenable.train.registry import run_policy

PROMPT_TOKENS, NEW_TOKENS, EPISODES = 64, 16, 4
SETTINGS: dict[str, Any] = {
    "model.dtype": "bf16",
    "data.max_prompt_tokens": PROMPT_TOKENS,
    "data.max_completion_tokens": NEW_TOKENS,
    "sft.enabled": False,
    "policy.algorithm": "ppo",
    "policy.prompts_per_update": EPISODES,
    "policy.samples_per_prompt": 1,
    "policy.epochs": 1,
    "policy.minibatches": 1,
    "policy.gate": False,
    "policy.merged_rollouts": False,
    "policy.checkpoint_every": 1000,
    "checkpoint.every_minutes": 0,
    "policy.max_approx_kl": 1e9,
    "evaluate.best_of": 0,
}


class Enough(Exception):
    """The last update is done."""


class Clock(MetricsLog):
    """The stage's log, which takes the time of every update and ends the stage after the last."""

    def __init__(self, folder: Path, updates: int) -> None:
        super().__init__("policy", folder, tensorboard=False)
        self.ends: list[float] = []
        self.figures: list[dict[str, float]] = []
        self._updates = updates

    def write(self, step: int, **figures: float) -> None:
        """Log an update.

        Raises:
            Enough: it was the last.
        """
        super().write(step, **figures)
        self.ends.append(time.monotonic())
        self.figures.append(figures)
        if len(self.ends) == self._updates:
            raise Enough


def llama_2_7b(layers: int) -> LlamaConfig:
    """The configuration of Llama 2 7B, or of its first layers."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def write_folder(folder: Path, config: LlamaConfig) -> None:
    """Configuration and tokenizer; the file of weights is empty, they are made in memory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    backend.train([str(source) for source in sources], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({}, folder / "model.safetensors")


def random_weights(config: LlamaConfig) -> PreTrainedModel:
    """A model whose matrices repeat one normal draw of a million, standard deviation 0.02."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rotary = model.model.rotary_emb
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(rotary)(config=config)
    draw = torch.randn(1_048_573, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for parameter in model.parameters():
        flat = parameter.data.flatten()
        if parameter.dim() == 1:
            flat.fill_(1.0)
            continue
        for start in range(0, len(flat), len(draw)):
            part = flat[start : start + len(draw)]
            part.copy_(draw[: len(part)])
    return model.eval()


def write_reward(folder: Path, config: LlamaConfig, recipe: Any) -> None:
    """An adapter that changes nothing yet, and a random head, as the reward stage leaves them."""
    with torch.device("meta"):
        meta: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model: Any = add_adapter(meta.requires_grad_(False), "reward", recipe.model.lora, seed=0)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.requires_grad:
                fresh = torch.zeros(parameter.shape)
                module._parameters[name] = nn.Parameter(
                    fresh if "lora_B" in name else fresh.normal_(0, 0.01)
                )
    folder.mkdir(parents=True)
    save_adapter(model, "reward", folder / ADAPTER_FOLDER, "base")
    head = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(1))
    save_file({"weight": head / (config.hidden_size + 1) ** 0.5}, folder / HEAD_FILE)
    (folder / "config.json").write_text(json.dumps({"reward_offset": 0.0}), encoding="utf-8")


def write_prompts(path: Path, tokenizer: Any, count: int) -> None:
    """Prompts that fill `PROMPT_TOKENS` when they are cut."""
    words = itertools.cycle(sorted(token for token in tokenizer.get_vocab() if token.isalpha()))
    rows = [
        {"id": f"p{n}", "group": f"p{n}", "input_text": " ".join(itertools.islice(words, 200))}
        for n in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(Path(options.out or temporary), options)


def measure(root: Path, options: argparse.Namespace) -> None:
    """One stage, left after the last update."""
    config, base, run = llama_2_7b(options.layers), root / "base", RunFolder(root / "run")
    base.mkdir(parents=True)
    write_folder(base, config)
    prompts = run.data / "prompts.train.jsonl"
    settings = SETTINGS | {
        "model.base": str(base),
        "data.preferences": str(prompts),
        "data.prompts": str(prompts),
        "policy.updates": options.updates + 1,
    }
    recipe = load_recipe(None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    write_prompts(prompts, load_tokenizer(base), EPISODES * options.updates)
    write_reward(run.models / "reward", config, recipe)
    # the stage reads its base from a folder; 13 GB of random numbers need not be written first
    build.load_causal_lm = lambda *_, **__: random_weights(config)  # type: ignore[assignment]
    clock = Clock(run.stage("policy"), options.updates)
    ctx = StageContext(
        recipe=recipe,
        folder=run,
        stage="policy",
        log=clock,
        progress=Progress(quiet=True),
        deadline=Deadline(None),
    )
    began = time.monotonic()
    with contextlib.suppress(Enough):
        run_policy(ctx)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    shape = shape_of(config, "llama-2-7b's shape")
    rows = rows_of(recipe, renderer(recipe), run.data)
    forecast = Budget(recipe, shape, rows, hardware()).stages(["policy"])[0]  # no stage before it
    ends = [began, *clock.ends]
    report = {
        "parameters": shape.parameters,
        "threads": torch.get_num_threads(),
        "seconds": [round(b - a, 1) for a, b in itertools.pairwise(ends)],
        "peak_gb": round(peak, 2),
        "forecast_gb": {k: round(v / 1e9, 2) for k, v in forecast.phases.items()},
        "completion_tokens": [figures["completion_tokens"] for figures in clock.figures],
        "grad_norm": [figures["grad_norm"] for figures in clock.figures],
        "critic_grad_norm": [figures["critic_grad_norm"] for figures in clock.figures],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    keep_freed_memory()  # as `amenable run` does
    main()
