from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from amenable.errors import ModelError
from amenable.models.load import (
    check_base,
    choose_pad_token,
    eos_ids,
    load_causal_lm,
    load_tokenizer,
    resolve_dtype,
)
from amenable.models.tiny import tiny_tokenizer

from .conftest import build


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_loads_every_family_as_saved(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, torch.float32)
    ids = torch.tensor([[5, 9, 300, 2]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training
    rates = [v for k, v in loaded.config.to_dict().items() if "drop" in k and v is not None]
    assert all(rate == 0.0 for rate in rates)


def test_dtype_and_pad_id_are_set(model_folder: Path) -> None:
    model = load_causal_lm(model_folder, torch.bfloat16, pad_token_id=3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 3


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not readable"),
        (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
        (lambda f: edit_json(f / "config.json", model_type="bert"), "'bert' is not supported"),
        (
            lambda f: edit_json(
                f / "config.json", architectures=["LlamaForSequenceClassification"]
            ),
            "not a language model",
        ),
        (
            lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
            "quantised",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "no safetensors weights"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "pickled weights are never loaded",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-10]
            ),
            "bytes instead of",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "not a safetensors file"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
            ),
            "a weight file is missing",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused_before_weights_are_read(
    model_folder: Path, damage: object, says: str
) -> None:
    damage(model_folder)  # type: ignore[operator]
    with pytest.raises(ModelError, match=says) as caught:
        check_base(model_folder)
    assert str(model_folder) in str(caught.value)
    with pytest.raises(ModelError, match=says):
        load_causal_lm(model_folder, torch.float32)


def test_remedies_name_what_the_folder_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="this is an adapter"):
        check_base(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="GGUF"):
        check_base(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        check_base(tmp_path / "m.gguf")


def test_weights_that_do_not_fill_the_model_are_refused(model_folder: Path) -> None:
    edit_json(model_folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"do not fill the model .*layers\.2"):
        load_causal_lm(model_folder, torch.float32)


def test_eos_ids_is_the_union_of_list_and_tokenizer(
    model_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert eos_ids(GenerationConfig(eos_token_id=[7, 9]), tokenizer) == {2, 7, 9}
    assert eos_ids(GenerationConfig(eos_token_id=7), tokenizer) == {2, 7}
    assert eos_ids(GenerationConfig(), tokenizer) == {2}
    edit_json(model_folder / "generation_config.json", eos_token_id=[2, 1])
    assert eos_ids(model_folder, tokenizer) == {1, 2}
    assert eos_ids(load_causal_lm(model_folder, torch.float32), tokenizer) == {1, 2}
    (model_folder / "generation_config.json").unlink()
    edit_json(model_folder / "config.json", eos_token_id=5)
    assert eos_ids(str(model_folder), tokenizer) == {2, 5}


def test_no_eos_at_all_is_refused() -> None:
    silent = tiny_tokenizer()
    silent.eos_token = None
    with pytest.raises(ModelError, match="names an end-of-sequence token"):
        eos_ids(GenerationConfig(), silent)


def test_own_pad_token_is_kept(model_folder: Path) -> None:
    assert load_tokenizer(model_folder).pad_token == "<pad>"


def test_pad_that_ends_a_sequence_is_replaced_in_the_loaded_folder(model_folder: Path) -> None:
    """As published for SmolLM2: pad = eos = <|im_end|>; the free <pad> is found by its name."""
    edit_json(model_folder / "tokenizer_config.json", pad_token="<|im_end|>")
    assert load_tokenizer(model_folder).pad_token_id == 0


def make_tokenizer(specials: list[str], size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level vocabulary whose pad and eos are both `<|im_end|>`, as in many chat models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|im_start|>", "<|im_end|>", *specials]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the cat and the hat and the bat " * 3], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", *specials],
    )
    made.chat_template = "{{ '<|im_start|>' }}"
    return made


@pytest.mark.parametrize(
    ("specials", "eos", "spare_rows", "expected"),
    [
        (["<|endoftext|>", "<unk>"], {1}, 0, "<|endoftext|>"),
        (["<|endoftext|>", "<unk>"], {1, 2}, 0, "<unk>"),
        (["<|endoftext|>", "<|fim_pad|>"], {1, 2}, 0, "<|fim_pad|>"),
        (["<|reserved_1|>", "<|reserved_0|>"], {1}, 0, "<|reserved_0|>"),
        ([], {1}, 4, "<|pad|>"),
        ([], {1}, 0, "ÿ"),
    ],
)
def test_pad_rule_in_order(
    specials: list[str], eos: set[int], spare_rows: int, expected: str
) -> None:
    made = make_tokenizer(specials)
    rows = max(made.get_vocab().values()) + 1 + spare_rows
    choose_pad_token(made, frozenset(eos), rows)
    assert made.pad_token == expected
    assert made.pad_token_id < rows
    assert made.pad_token_id not in eos
    assert len(made) <= rows


def test_byte_ff_is_never_produced_by_text() -> None:
    """UTF-8 has no byte 0xFF, so a pad that stands for it cannot be mistaken for text."""
    made = make_tokenizer([])
    choose_pad_token(made, frozenset({1}), len(made))
    for text in ("ÿ", "\udcff".encode("utf-8", "replace").decode(), "all the ÿ and é, 世 😀"):
        assert made.pad_token_id not in made(text)["input_ids"]


def test_pad_without_a_free_token_is_an_error_with_a_remedy() -> None:
    made = make_tokenizer([])
    everything = frozenset(made.get_vocab().values())
    with pytest.raises(ModelError, match=r"no token that could be used as pad.*resize"):
        choose_pad_token(made, everything, len(made))


def test_a_folder_without_tokenizer_is_refused(model_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_folder / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        load_tokenizer(model_folder)


def test_named_precisions_and_unknown_name() -> None:
    assert resolve_dtype("bf16", "cpu") is torch.bfloat16
    assert resolve_dtype("fp32", "cpu") is torch.float32
    assert resolve_dtype("auto", "meta") is torch.float32
    with pytest.raises(ModelError, match="use auto, bf16, fp32 or fp64"):
        resolve_dtype("fp16", "cpu")


@pytest.mark.parametrize(
    ("able", "wanted"),
    [
        ({"amx_bf16": True, "cpu_name": "Intel(R) Xeon(R) Processor"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R) Processor"}, torch.float32),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_is_bf16_on_a_cpu_that_multiplies_it_faster(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, object], wanted: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert resolve_dtype("auto", "cpu") is wanted
