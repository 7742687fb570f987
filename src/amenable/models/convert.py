"""Turns a downloaded model into the folder that every stage starts from; torch comes in lazily."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from amenable.errors import ModelError
from amenable.models.quiet import without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from amenable.models.pull import BuiltIn


def convert(folder: Path, gguf_file: str | None, model: BuiltIn, out: Path) -> None:
    """Saves the model in `folder` as a bfloat16 safetensors folder, ready to train.

    Pad becomes a token of its own, quantisation settings are cleared, the configurations agree
    with the tokenizer.

    Raises:
        ModelError: the model does not load, or what loaded does not read English.
    """
    import torch

    loaded, tokenizer = _load_source(folder, gguf_file)
    _repair_tokenizer(tokenizer, model, split_digits=gguf_file is not None)
    _repair_model(loaded, tokenizer)
    _check_sense(loaded, tokenizer)
    loaded.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers wraps nn.Module.to
    with without_bars():
        loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _load_source(
    folder: Path, gguf_file: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    try:
        with without_bars(swallow_stderr=gguf_file is not None):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except ImportError as error:
        raise ModelError(f"cannot read GGUF files ({error}); run `pip install gguf`") from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"transformers cannot load the download ({error}); pull again") from error
    return model, tokenizer


def _repair_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: BuiltIn, *, split_digits: bool
) -> None:
    """Own pad token, known length, and the digit splitting that GGUF reading loses.

    SmolLM2 was trained with every digit split off before the byte-level step (llama.cpp's
    pre-tokenizer "smollm" does the same); transformers' GGUF reader leaves that out, so that
    blanks before a number would become other tokens.
    """
    if split_digits:
        from tokenizers import pre_tokenizers

        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend: Any = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.pad_token = model.pad_token
    tokenizer.model_max_length = model.max_length
    if not tokenizer.chat_template:
        raise ModelError(f"{model.hub}: the download has no chat template; pull again")


def _repair_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import GenerationConfig

    for field in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, field):
            delattr(model.config, field)
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    settings: Any = model
    settings.hf_quantizer, settings.is_quantized = None, False
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(ids)
    model.config.name_or_path = ""
    model.generation_config = GenerationConfig(**ids)


def _check_sense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses weights that were read wrongly (permuted heads, shifted vocabulary)."""
    import torch

    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer("The capital of France is Paris.<|im_end|>", add_special_tokens=False)
    ids = torch.tensor([prompt + answer["input_ids"]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.inference_mode():
        loss = float(model(input_ids=ids, labels=labels).loss)
    if not loss < 1.0 or prompt[:2] != [1, 4093]:
        raise ModelError(
            f"the converted model does not read English (loss {loss:.2f} nats a token on a plain "
            "fact); this version of transformers or gguf reads the file wrongly: install the "
            "versions of constraints.txt"
        )
