from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from amenable.errors import ModelError
from amenable.models.export import export_policy, export_reward, load_reward_head
from amenable.models.heads import ScalarHead
from amenable.models.load import load_causal_lm

from .conftest import build

IDS = torch.tensor([[5, 9, 300, 41, 17, 2], [8, 260, 2, 0, 0, 0], [77, 12, 13, 2, 0, 0]])
MASK = (IDS != 0).long()
LAST = torch.tensor([5, 2, 3])


def with_adapters(model: PreTrainedModel, *names: str) -> PeftModel:
    """Adapters with nonzero B, each its own."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    wrapped = PeftModel(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return wrapped.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK).logits.float()[MASK.bool()]


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        return plain.base_model(IDS, attention_mask=MASK).last_hidden_state.float()


def load_plain(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_merged_folder_and_adapter_give_the_live_logits(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    base_folder = tmp_path / "base"
    build(family).save_pretrained(base_folder)
    live = with_adapters(build(family), "reference", "policy")
    live.set_adapter("reference")
    before = {key: tensor.clone() for key, tensor in live.state_dict().items()}
    export_policy(live, tokenizer, tmp_path / "out", "policy", base=str(base_folder))

    after = live.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert live.active_adapter == "reference"
    reference = logits(live)
    live.set_adapter("policy")
    expected = logits(live)
    assert (expected - reference).abs().max() > 0.1, "the two adapters must differ"
    merged = load_plain(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected, atol=2e-4, rtol=1e-4)

    settings = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base_folder)
    fresh = AutoModelForCausalLM.from_pretrained(base_folder)
    again = PeftModel.from_pretrained(fresh, tmp_path / "out/adapter").eval()
    assert torch.equal(logits(again), expected)


def test_merging_adds_scale_times_b_a_by_hand(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rank 4, alpha 8: scale 2. Expected weight: W + 2 B A, rounded once to bfloat16."""
    base = build("Llama").to(torch.bfloat16)
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    live = with_adapters(base, "policy")
    layer = live.get_base_model().model.layers[0].self_attn.q_proj
    a = layer.lora_A["policy"].weight.float()
    b = layer.lora_B["policy"].weight.float()
    expected = (weight.float() + 2.0 * (b @ a)).to(torch.bfloat16)
    export_policy(live, tokenizer, tmp_path / "out", "policy")
    merged = load_plain(tmp_path / "out", dtype="auto")
    assert merged.dtype is torch.bfloat16
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, expected)


def test_plain_model_is_saved_whole_with_ids_and_without_sampling_habits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build("Llama")
    model.generation_config.update(eos_token_id=[2, 9], repetition_penalty=1.3)
    export_policy(model, tokenizer, tmp_path / "out")
    loaded = load_causal_lm(tmp_path / "out", torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert not (tmp_path / "out/adapter").exists()
    assert loaded.generation_config.eos_token_id == [2, 9]
    assert loaded.generation_config.pad_token_id == 0
    assert loaded.generation_config.repetition_penalty in {None, 1.0}
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template
    assert again.pad_token_id == 0


def test_base_weights_alone_of_an_adapted_model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    export_policy(with_adapters(build("Llama"), "a"), tokenizer, tmp_path / "out", None)
    assert torch.equal(logits(load_plain(tmp_path / "out")), logits(build("Llama")))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_plain_classifier_gives_our_raw_score(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    live = with_adapters(build(family), "reward")
    head = ScalarHead(32, seed=5)
    ours = head(hidden(live)[torch.arange(3), LAST])
    export_reward(live, head, tokenizer, tmp_path / "out", "reward", 1.25, reward_temperature=1.5)
    classifier = load_plain(tmp_path / "out", AutoModelForSequenceClassification)
    with torch.no_grad():
        plain = classifier(IDS, attention_mask=MASK).logits[:, 0]
        left = torch.tensor([[0, 0, 0, 8, 260, 2]])  # left padding is found too
        shifted = classifier(
            left, attention_mask=(left != 0).long(), position_ids=torch.tensor([[0, 0, 0, 0, 1, 2]])
        ).logits[0, 0]
    assert ours.std() > 0.01
    torch.testing.assert_close(plain, ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shifted, ours[1], atol=1e-3, rtol=1e-3)
    assert classifier.config.num_labels == 1
    assert classifier.config.reward_offset == 1.25
    assert classifier.config.reward_temperature == 1.5
    assert classifier.config.pad_token_id == 0
    read, offset = load_reward_head(tmp_path / "out")
    assert torch.equal(read.weight, head.weight)
    assert offset == 1.25
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()


def test_head_stays_float32_in_a_bfloat16_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A head rounded to bfloat16 would move the float32 score by more than 1e-3."""
    model = build("Llama").to(torch.bfloat16)
    head = ScalarHead(32, seed=5)
    export_reward(model, head, tokenizer, tmp_path / "out")
    classifier = load_plain(
        tmp_path / "out", AutoModelForSequenceClassification, dtype=torch.float32
    )
    assert torch.equal(classifier.score.weight, head.weight)
    export_policy(model, tokenizer, tmp_path / "trunk")
    trunk = load_causal_lm(tmp_path / "trunk", torch.float32)
    ours = head(hidden(trunk)[torch.arange(3), LAST])
    with torch.no_grad():
        plain = classifier(IDS, attention_mask=MASK).logits[:, 0]
    torch.testing.assert_close(plain, ours, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_unknown_adapter_bad_head_and_pad_that_ends_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build("Llama")
    with pytest.raises(ModelError, match="no adapter 'x'; it has none"):
        export_policy(model, tokenizer, tmp_path / "out", "x")
    with pytest.raises(ModelError, match=r"linear, \[1, 32\] and without bias"):
        export_reward(model, nn.Linear(32, 1), tokenizer, tmp_path / "out")
    model.generation_config.eos_token_id = [2, 0]
    with pytest.raises(ModelError, match="pad token 0 is missing or ends a sequence"):
        export_policy(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_the_old_folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export_policy(build("Llama"), tokenizer, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_policy(build("Qwen2"), tokenizer, out)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_folder_that_is_no_reward_model_is_refused(model_folder: Path) -> None:
    with pytest.raises(ModelError, match="not a reward model"):
        load_reward_head(model_folder)
