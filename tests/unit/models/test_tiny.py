from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from amenable.models.check import check_base
from amenable.models.tiny import build_tiny


def test_same_bytes_whatever_the_global_seed(tmp_path: Path) -> None:
    first = build_tiny(tmp_path / "a")
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = build_tiny(tmp_path / "b")
    assert torch.equal(before, torch.get_rng_state())
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_folder_is_a_base_model_that_plain_transformers_loads(tmp_path: Path) -> None:
    path = build_tiny(tmp_path / "tiny")
    check_base(path)
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == 106_816
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 2, 512)
    assert model.generation_config.pad_token_id == 0
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("text", ["", "Return the sum.", "  é \n\n\t世界 \x00 1234", "a" * 300])
def test_any_text_reads_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_uses_single_ids_for_its_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    assert ids[0] == 1
    assert ids.count(1) == 2
    assert ids.count(2) == 1
    assert tokenizer.decode(ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
