"""Saves trained models as folders that plain transformers and peft load.

    sft/, tuned/   config.json model.safetensors tokenizer…    merged weights, AutoModelForCausalLM
    reward/        the same with a one-number head             AutoModelForSequenceClassification
                   head.safetensors                            the head alone, float32
                   head_members.safetensors                    the heads of an ensemble
    each           adapter/                                    peft format, where LoRA was used

The live model is only read: merging is W + scale · B A on copies. Folders appear whole or not
at all.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from amenable.artifacts import atomic_dir, is_left_out, write_json
from amenable.errors import ModelError
from amenable.models.adapters import merged_weights
from amenable.models.heads import HeadEnsemble, ScalarHead
from amenable.models.load import eos_ids, load_causal_lm
from amenable.models.quantised import is_quantised
from amenable.models.quiet import without_bars
from amenable.ranks.sharding import is_sharded_model, whole_ones

ADAPTER_FOLDER = "adapter"
HEAD_FILE = "head.safetensors"
MEMBERS_FILE = "head_members.safetensors"

State = dict[str, Tensor]


def export_policy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    adapter: str | None = None,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a causal language model with the adapter merged in, and the adapter beside it.

    Args:
        model: a plain model, or a PeftModel with named adapters; not changed.
        tokenizer: saved along; its pad token must not end a sequence.
        out: the folder to write or replace.
        adapter: which adapter to merge; None: the bare weights.
        base: what adapter_config.json names as its base model; default: where `model` came from.
        dtype: of the saved weights; default: the model's.

    Raises:
        ModelError: unknown adapter, or pad among the end-of-sequence tokens.
        StorageError: the folder cannot be written.
    """
    if is_left_out(out):
        return _taken_part(model, out)
    plain = _plain(model, adapter)
    eos = _checked_eos(plain, tokenizer)
    state = _cast(merged_state(model, adapter), dtype or plain.dtype)
    with atomic_dir(out) as folder:
        skeleton = _skeleton(AutoModelForCausalLM, plain.config, dtype or plain.dtype)
        _set_ids(skeleton.config, tokenizer, eos)
        skeleton.generation_config = _generation_config(plain, tokenizer, eos)
        _save(skeleton, state, tokenizer, folder)
        if adapter is not None:
            save_adapter(cast(PeftModel, model), adapter, folder / ADAPTER_FOLDER, base)
    return out


def export_reward(
    model: PreTrainedModel | PeftModel,
    head: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    adapter: str | None = None,
    reward_offset: float = 0.0,
    *,
    reward_temperature: float | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a sequence classifier with one label, whose logit is the raw score.

    The raw score is `head` on the last real token's final hidden state; transformers finds that
    token by the pad id. Subtract `config.reward_offset` for the centred score. The head's weight
    is kept in float32 whatever the trunk's precision, so that loading in float32 is exact.

    Args:
        model: a causal language model, plain or with named adapters; its LM head is left out.
        head: a linear scalar head without bias; `head.weight` is [1, d]. Of an ensemble the mean
            is exported, and its members beside it.
        tokenizer: saved along; its pad token must not end a sequence.
        out: the folder to write or replace.
        adapter: which adapter to merge; None: the bare weights.
        reward_offset: mean raw score of the answers on which the reward is centred.
        reward_temperature: T that makes sigmoid(score difference / T) the probability of the
            higher score's answer being the better one; None: not known.
        base: what adapter_config.json names as its base model.
        dtype: of the saved trunk; default: the model's.

    Raises:
        ModelError: unknown adapter, pad among the end-of-sequence tokens, or an architecture
            for which transformers has no such class.
        StorageError: the folder cannot be written.
    """
    if is_left_out(out):
        return _taken_part(model, out)
    plain = _plain(model, adapter)
    eos = _checked_eos(plain, tokenizer)
    weight = _head_weight(head, plain)
    prefix = plain.base_model_prefix + "."
    trunk = {key: t for key, t in merged_state(model, adapter).items() if key.startswith(prefix)}
    state = _cast(trunk, dtype or plain.dtype) | {"score.weight": weight}
    with atomic_dir(out) as folder:
        config = copy.deepcopy(plain.config)
        config.num_labels = 1
        config.update({"reward_offset": float(reward_offset), "problem_type": "regression"})
        if reward_temperature is not None:
            config.update({"reward_temperature": float(reward_temperature)})
        skeleton = _skeleton(AutoModelForSequenceClassification, config, dtype or plain.dtype)
        _set_ids(skeleton.config, tokenizer, eos)
        _save(skeleton, state, tokenizer, folder)
        save_file({"weight": weight}, folder / HEAD_FILE)
        if isinstance(head, HeadEnsemble):
            members = head.weight.detach().float().cpu().contiguous()
            save_file({"weight": members}, folder / MEMBERS_FILE)
        if adapter is not None:
            save_adapter(cast(PeftModel, model), adapter, folder / ADAPTER_FOLDER, base)
    return out


def _taken_part(model: PreTrainedModel | PeftModel, out: Path) -> Path:
    """Of a rank that does not write: it gives its part of sharded weights."""
    if is_sharded_model(model):
        whole_ones(model.state_dict().items(), keep=False)
    return out


def load_reward_head(folder: Path) -> tuple[ScalarHead, float]:
    """The head, or the ensemble of heads, and the offset of an exported reward model.

    Returns:
        (float32 head or heads, offset to subtract from its score).

    Raises:
        ModelError: the folder is no exported reward model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        members = folder / MEMBERS_FILE
        weight = load_file(members if members.is_file() else folder / HEAD_FILE)["weight"]
        offset = float(config["reward_offset"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: not a reward model written by the reward stage ({error}); "
            "give its models/reward folder"
        ) from error
    kind = HeadEnsemble if len(weight) > 1 else ScalarHead
    return kind.from_weight(weight), offset


def merged_state(model: PreTrainedModel | PeftModel, adapter: str | None) -> State:
    """The plain model's state dict with one adapter merged; everything else is shared, not copied.

    Merged weights are on the CPU. Keys are those of the model before peft wrapped it; tied weights
    stay tied. A quantised base's weights are read again where it came from: what quantisation
    rounded off is in the result, though the adapter was trained without it.

    Raises:
        ModelError: the model has no such adapter, or a quantised base's folder has gone.
    """
    plain = _plain(model, adapter)
    whole = plain
    if is_quantised(plain):
        whole = load_causal_lm(str(plain.config.name_or_path), plain.dtype)
    state = {
        key.replace(".base_layer.", "."): tensor.detach()
        for key, tensor in whole_ones(whole.state_dict().items(), keep=True).items()
        if not _is_adapter_key(key)
    }
    if adapter is not None:
        with torch.no_grad():
            for name, weight in merged_weights(cast(PeftModel, model), adapter, state):
                state[f"{name}.weight"] = weight.detach().cpu()  # a card holds one at a time
    return state


def save_adapter(model: PeftModel, adapter: str, folder: Path, base: str | None = None) -> None:
    """Writes one named adapter in peft's own format, as the folder's only adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    # Without the explicit False peft asks the hub whether the base's vocabulary has changed.
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: PeftConfig = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    if isinstance(config, LoraConfig) and isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # same file in every run
    config.task_type = "CAUSAL_LM"
    config.base_model_name_or_path = base or _plain(model, adapter).config.name_or_path or None
    config.save_pretrained(str(folder))


def _plain(model: PreTrainedModel | PeftModel, adapter: str | None) -> PreTrainedModel:
    """The transformers model inside, after a check that it has the adapter."""
    known = list(model.peft_config) if isinstance(model, PeftModel) else []
    if adapter is not None and adapter not in known:
        raise ModelError(f"the model has no adapter {adapter!r}; it has {known or 'none'}")
    if isinstance(model, PeftModel):
        return cast(PreTrainedModel, model.get_base_model())
    return model


def _is_adapter_key(key: str) -> bool:
    return ".lora_" in key or ".modules_to_save." in key


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> State:
    """Floating tensors in `dtype` on the CPU; tensors that share memory go on sharing it."""
    done: dict[tuple[int, torch.Size], Tensor] = {}
    result = {}
    for key, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape)
        if identity not in done:
            done[identity] = tensor.to("cpu", dtype if tensor.is_floating_point() else None)
        result[key] = done[identity]
    return result


def _skeleton(auto: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A weightless model of the class that will be loaded again, to save a state dict through."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(copy.deepcopy(config), dtype=dtype)
    except ValueError as error:
        raise ModelError(
            f"transformers has no {auto.__name__} for {config.model_type!r}; "
            "choose a base model of another architecture"
        ) from error
    return model


def _save(
    skeleton: PreTrainedModel, state: State, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    with without_bars():
        skeleton.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    _drop_origin(folder / "config.json")


def _drop_origin(path: Path) -> None:
    """Removes the path of the base from a configuration: it is no business of the reader."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    write_json(path, config)


def _checked_eos(plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = sorted(eos_ids(plain, tokenizer))
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in eos:
        raise ModelError(
            f"pad token {tokenizer.pad_token_id} is missing or ends a sequence ({eos}); "
            "load the tokenizer with amenable.models.load.load_tokenizer"
        )
    return eos


def _set_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, eos: list[int]) -> None:
    config.update(
        {
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": eos if len(eos) > 1 else eos[0],
            "use_cache": True,
        }
    )


def _generation_config(
    plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: list[int]
) -> GenerationConfig:
    """Stop and pad ids only: the base's sampling habits are not this model's.

    A base's repetition penalty or temperature would silently change greedy completions.
    """
    bos = plain.generation_config.bos_token_id if plain.generation_config is not None else None
    return GenerationConfig(
        bos_token_id=bos,
        eos_token_id=eos if len(eos) > 1 else eos[0],
        pad_token_id=tokenizer.pad_token_id,
    )


def _head_weight(head: nn.Module, plain: PreTrainedModel) -> Tensor:
    weight = head.mean_weight if isinstance(head, ScalarHead) else cast(Tensor, head.weight)
    weight = weight.detach().float().cpu().contiguous()
    size = plain.config.get_text_config().hidden_size
    if weight.shape != (1, size) or getattr(head, "bias", None) is not None:
        raise ModelError(
            f"a reward head must be linear, [1, {size}] and without bias; got {list(weight.shape)}"
        )
    return weight
