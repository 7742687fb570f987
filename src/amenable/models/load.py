"""Loads models and tokenizers safely: safetensors only, no remote code, dropout off, pad ≠ EOS."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from amenable.errors import ModelError
from amenable.models.check import check_base, check_config
from amenable.models.quiet import without_bars

__all__ = [
    "check_base",
    "eos_ids",
    "load_causal_lm",
    "load_reward_trunk",
    "load_tokenizer",
    "master_dtype",
    "resolve_dtype",
    "set_dropout_to_zero",
]

NEW_PAD_TOKEN = "<|pad|>"
_PAD_NAMES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|endoftext|>",
    "<unk>",
)
_SPARE_NAME = re.compile(r"reserved|unused|extra|fim_pad|vision_pad", re.IGNORECASE)


Source = str | Path


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model folder or hub id, with a pad token that ends nothing.

    The pad token is the first of these that is no end-of-sequence token, not the beginning-of-
    sequence token, not part of the chat template and has a row in the embedding matrix:

    1. the tokenizer's own pad token;
    2. a token with one of the usual names (`<pad>`, `<|endoftext|>`, `<unk>`, …);
    3. a reserved or unused special token;
    4. a new token `<|pad|>`, where the embedding matrix has a spare row for it;
    5. the token of byte 0xFF, which no text contains (GPT-2 has nothing else).

    The embedding matrix is never resized.

    Raises:
        ModelError: no tokenizer, only a slow one, or none of the five.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), **_safe_options(source))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{source}: no tokenizer could be loaded ({_first_line(error)}); "
            "a model folder needs tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"{source}: has no fast tokenizer; save one as tokenizer.json")
    config = _config_of(source)
    choose_pad_token(tokenizer, eos_ids(_settings_of(source, config), tokenizer), config.vocab_size)
    return tokenizer


def choose_pad_token(
    tokenizer: PreTrainedTokenizerBase, eos: frozenset[int], embedding_rows: int
) -> None:
    """Sets the pad token by the rule of `load_tokenizer`.

    Args:
        tokenizer: changed in place.
        eos: every id that ends a sequence.
        embedding_rows: rows of the model's embedding matrix.

    Raises:
        ModelError: no id can serve.
    """
    vocabulary = tokenizer.get_vocab()
    template = str(tokenizer.chat_template or "")

    def can_pad(token: object) -> bool:
        number = vocabulary.get(str(token)) if token is not None else None
        return (
            number is not None
            and number not in eos
            and number != tokenizer.bos_token_id
            and number < embedding_rows
        )

    if can_pad(tokenizer.pad_token):
        return
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    candidates = [
        *_PAD_NAMES,
        *sorted(t for t in special if _SPARE_NAME.search(t)),
        _spare_row(vocabulary, embedding_rows),
        _impossible_byte(vocabulary),
    ]
    for token in candidates:
        if token == NEW_PAD_TOKEN and token not in vocabulary:
            if _spare_row(vocabulary, embedding_rows):
                tokenizer.add_special_tokens({"pad_token": NEW_PAD_TOKEN})
                return
        elif token and can_pad(token) and token not in template:
            tokenizer.pad_token = token
            return
    raise ModelError(
        "the tokenizer has no token that could be used as pad: its pad token ends a sequence, "
        "it has no unused special token and the embedding matrix has no spare row; "
        f"add a token {NEW_PAD_TOKEN!r}, resize the embeddings, save both and use that folder"
    )


def _spare_row(vocabulary: dict[str, int], embedding_rows: int) -> str | None:
    """The new pad token where an embedding row is free for the next id, else None."""
    return NEW_PAD_TOKEN if max(vocabulary.values()) + 1 < embedding_rows else None


def _impossible_byte(vocabulary: dict[str, int]) -> str | None:
    """The token of byte 0xFF, which never occurs in UTF-8, as this vocabulary writes it.

    Byte-fallback vocabularies write <0xFF>; byte-level ones, which write a blank as Ġ, write ÿ.
    """
    if "<0xFF>" in vocabulary:
        return "<0xFF>"
    return "ÿ" if "Ġ" in vocabulary else None


def eos_ids(
    model: PreTrainedModel | GenerationConfig | PreTrainedConfig | Source,
    tokenizer: PreTrainedTokenizerBase,
) -> frozenset[int]:
    """Every id that ends a sequence: the generation config's (one or a list) and the tokenizer's.

    Args:
        model: a model, its generation config, its config, its folder or its hub id.
        tokenizer: its end-of-sequence token is added.

    Raises:
        ModelError: there is none.
    """
    settings: Any = model
    if isinstance(model, str | Path):
        settings = _settings_of(model, _config_of(model))
    elif isinstance(model, torch.nn.Module):
        settings = model.generation_config or model.config
    found = {*_as_ids(settings.eos_token_id), *_as_ids(tokenizer.eos_token_id)}
    if not found:
        raise ModelError(
            "neither generation_config.json nor the tokenizer names an end-of-sequence token; "
            "set eos_token_id in generation_config.json"
        )
    return frozenset(found)


def load_causal_lm(
    source: Source,
    dtype: torch.dtype | None,
    *,
    device: str | torch.device = "cpu",
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """The causal language model in `source`, in evaluation mode, with every dropout at zero.

    Args:
        source: a Hugging Face folder or a hub id; weights must be safetensors.
        dtype: of the weights; None: that of the file.
        device: where they go.
        pad_token_id: the tokenizer's, written into the model's configurations.

    Raises:
        ModelError: unsupported, incomplete or damaged; says what and what to do.
    """
    if Path(source).expanduser().is_dir():
        check_base(source)
    config = _config_of(source)
    check_config(config.to_dict(), str(source))
    set_dropout_to_zero(config)
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    model, report = _read_weights(source, config, dtype)
    _check_filled(source, report)
    if pad_token_id is not None and model.generation_config is not None:
        model.generation_config.pad_token_id = pad_token_id
    torch.nn.Module.to(model, device)  # transformers' own `to` has lost its signature
    model.eval()
    return model


def load_reward_trunk(
    folder: Path, dtype: torch.dtype, *, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The model in a folder that `export_reward` wrote, for roles that read its hidden states.

    Its own score layer is left out of training: a role brings a scalar head of its own.

    Raises:
        ModelError: incomplete or damaged.
    """
    config = _config_of(folder)
    set_dropout_to_zero(config)
    model, report = _read_weights(folder, config, dtype, AutoModelForSequenceClassification)
    _check_filled(folder, report)
    cast(torch.nn.Module, model.score).requires_grad_(False)
    torch.nn.Module.to(model, device)
    model.eval()
    return model


def _check_filled(source: Source, report: dict[str, Any]) -> None:
    unfilled = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if unfilled:
        raise ModelError(
            f"{source}: the weights do not fill the model (missing or of another shape: "
            f"{', '.join(unfilled[:3])}{', …' if len(unfilled) > 3 else ''}) and would be random; "
            "copy or convert the model again"
        )


def _read_weights(
    source: Source,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    auto: Any = AutoModelForCausalLM,  # Any: annotations leave out output_loading_info's pair
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        with without_bars():
            model, report = auto.from_pretrained(
                str(source),
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
                **_safe_options(source),
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{source}: the weights could not be loaded ({_first_line(error)}); "
            "a base model needs safetensors weights that fit its config.json"
        ) from error
    return model, report


def set_dropout_to_zero(config: PreTrainedConfig) -> None:
    """Sets every dropout rate in the configuration to 0, under whatever name it has."""
    for name, value in config.to_dict().items():
        if re.search(r"dropout|pdrop", name) and isinstance(value, float | int):
            setattr(config, name, 0.0)


def resolve_dtype(name: str, device: str | torch.device = "cpu") -> torch.dtype:
    """The compute precision that `model.dtype` means on this device.

    `bf16`, `fp32` and `fp64` are taken at their word. `auto` is bfloat16 on a CUDA device that has
    it; on a CPU with bfloat16 matrix units (AMX), and on AMD's with AVX-512 bfloat16, where it is
    several times faster; float32 elsewhere: on Intel's without AMX bfloat16 is the slower one. The
    choice depends on the machine alone, never on a timing, so that a resumed run makes it again.

    Raises:
        ModelError: another name.
    """
    named = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    if name in named:
        return named[name]
    if name != "auto":
        raise ModelError(f"model.dtype {name!r} is unknown; use auto, bf16, fp32 or fp64")
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if kind == "cpu" and _multiplies_bfloat16() else torch.float32


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """What trained weights are kept in for a compute precision: float32, or float64 for it."""
    return torch.promote_types(dtype, torch.float32)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32's (docs/log.md)."""
    able = torch.cpu.get_capabilities()
    full_rate = able.get("avx512_bf16", False) and "AMD" in str(able.get("cpu_name", ""))
    return bool(able.get("amx_bf16", False) or full_rate)


def _safe_options(source: Source) -> dict[str, Any]:
    return {
        "trust_remote_code": False,
        "local_files_only": Path(source).expanduser().is_dir(),
    }


def _config_of(source: Source) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(source), **_safe_options(source))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{source}: no model configuration ({_first_line(error)}); "
            "give a Hugging Face folder, a built-in name or a hub id that can be reached"
        ) from error
    return config


def _settings_of(source: Source, config: PreTrainedConfig) -> GenerationConfig | PreTrainedConfig:
    """The generation config saved with the model, or its config where there is none."""
    try:
        return GenerationConfig.from_pretrained(str(source), **_safe_options(source))
    except (OSError, ValueError):
        return config


def _as_ids(value: int | Iterable[int] | None) -> Iterable[int]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else tuple(int(one) for one in value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
