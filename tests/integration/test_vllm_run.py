"""Roll-outs by vLLM itself: what it says of its tokens, and a whole policy stage.

The models are small Llamas with heads of 32 numbers, the smallest that vLLM takes on a CPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from amenable.artifacts import read_json, read_jsonl
from amenable.config.load import load_recipe
from amenable.data.collate import PromptGroup, collate
from amenable.models.build import Foundation
from amenable.models.roles import Role
from amenable.rollout.copies import Copy, open_copy
from amenable.rollout.types import Engine, Request, Rollout, Sampling

ROOT = Path(__file__).parents[2]
TEMPERATURE = 0.7
SAMPLING = Sampling(max_new_tokens=12, temperature=TEMPERATURE)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make test-vllm"
    ),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own, of many kinds
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with tied embeddings and the tiny tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from amenable.models.tiny import VOCAB_SIZE, tiny_tokenizer

    out = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)  # answers that differ in probability
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


class World:
    """A policy and the copy of it that vLLM holds."""

    def __init__(self, base: Path, *settings: str) -> None:
        words = [f"model.base={base}", "data.task=docstrings", "collect.annotator=simulated"]
        words += ["data.max_prompt_tokens=64", "policy.engine=vllm", "policy.vllm.cache_gb=0.1"]
        recipe = load_recipe(None, [*words, "model.dtype=fp32", *settings])
        self.foundation = Foundation.open(recipe)
        self.policy: Role = self.foundation.role("policy")
        self.copy: Copy = open_copy(self.foundation, self.policy)
        self.copy.sync()

    def sample(
        self, sampling: Sampling = SAMPLING, name: str = "a", engine: Engine | None = None
    ) -> list[Rollout]:
        """Two completions of each of four prompts."""
        engine = engine or self.copy.engine(self.foundation.renderer)
        prompts = [tuple(range(5 + n, 25 + 3 * n)) for n in range(4)]
        keys = [(n, k) for n in range(len(prompts)) for k in (0, 1)]
        return engine.generate([Request(prompts[n], (0, name, n, k)) for n, k in keys], sampling)

    def gap(self, rollouts: list[Rollout]) -> float:
        """Largest difference from the trainer's log-probabilities, nats."""
        groups = [PromptGroup(r.prompt_ids, [r.completion_ids]) for r in rollouts]
        batch = collate(groups, self.foundation.renderer.pad_id)
        with torch.no_grad():
            wanted = self.policy.logprobs(batch, temperature=TEMPERATURE).logprobs[batch.mask]
        said = torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs])
        return float((wanted - said).abs().max())


@pytest.fixture(scope="module", params=[True, False], ids=["adapter", "every weight"])
def world(request: pytest.FixtureRequest, base: Path) -> World:
    return World(base, f"model.lora.enabled={str(request.param).lower()}")


def test_it_says_what_the_trainer_says_before_and_after_a_step(world: World) -> None:
    """Every weight moves, the embedding that is the output head among them."""
    before = world.sample()
    assert world.gap(before) < 1e-3
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in world.policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    assert world.gap(before) > 0.1, "the policy has moved"
    assert world.gap(world.sample()) > 0.1, "it is told when to follow"
    world.copy.sync()
    after = world.sample()
    assert world.gap(after) < 1e-3
    assert [r.completion_ids for r in after] != [r.completion_ids for r in before]


def test_the_key_alone_decides_what_is_drawn(world: World) -> None:
    first, again, other = world.sample(), world.sample(), world.sample(name="b")
    assert first == again
    assert first != other
    assert len({rollout.completion_ids for rollout in first}) == len(first)
    greedy = world.sample(Sampling(max_new_tokens=5, temperature=0.0))
    assert [r.completion_ids for r in greedy[::2]] == [r.completion_ids for r in greedy[1::2]]
    assert not greedy[0].logprobs


def test_completions_end_at_an_end_token_and_keep_it(world: World) -> None:
    """A token that the first completion has in its middle is made an end."""
    whole = world.sample()
    end = whole[0].completion_ids[4]
    engine = world.copy.engine(world.foundation.renderer)
    engine._eos_ids = frozenset([end])  # type: ignore[attr-defined]
    found = world.sample(engine=engine)
    for rollout, longer in zip(found, whole, strict=True):
        ids = longer.completion_ids
        place = ids.index(end) + 1 if end in ids else len(ids)
        assert rollout.completion_ids == ids[:place]
        assert rollout.ended == (end in ids)
        assert len(rollout.logprobs) == place
    assert found[0].ended
    assert not all(rollout.ended for rollout in found)


def run(out: Path, base: Path, *words: str) -> Any:
    command = [sys.executable, "-m", "amenable", "run", "examples/tiny.toml", "--out", str(out)]
    settings = [f"model.base={base}", "policy.engine=vllm", "policy.vllm.cache_gb=0.1", *words]
    done = subprocess.run(
        [*command, *(f"--set={own}" for own in settings)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_a_whole_run_twice(tmp_path: Path, base: Path) -> None:
    """The gate holds it against the trainer; the same seed samples the same."""
    found = []
    for name in ("one", "two"):
        done = run(tmp_path / name, base, "policy.learning_rate=0.01")
        assert "numerics gate: 14 checks hold" in done.stdout + done.stderr
        stage = tmp_path / name / "stages" / "policy"
        gate = read_json(stage / "gate.json")["checks"]["roll-out"]["figures"]
        assert any("engine against trainer" in figure["quantity"] for figure in gate)
        rows = [*read_jsonl(stage / "metrics.jsonl")]
        assert len(rows) == 4
        assert all(0 < row["policy/engine_gap"] < 1e-3 for row in rows)
        assert rows[-1]["policy/kl_loss"] > 0.01, "the policy moves"
        found.append([(row["policy/reward"], row["policy/kl_loss"]) for row in rows])
    assert found[0] == found[1]
