"""Cheap checks of a base model before any weight is loaded: JSON and file sizes only, no torch."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

from amenable.errors import ModelError

SUPPORTED_MODEL_TYPES = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "gpt2",
    }
)
"""`model_type` in config.json of the architectures that every stage is tested with."""

TRANSPOSED = frozenset({"gpt2"})
"""Of these, layers that are no `nn.Linear`."""

_LM_SUFFIXES = ("ForCausalLM", "LMHeadModel")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SUPPORTED = "Llama, Mistral, Qwen, Gemma, GPT-NeoX or GPT-2"


def check_base(source: str | Path) -> None:
    """Raises unless `source` can be a base model; reads no weights.

    A folder is checked for config.json, a supported architecture, whole safetensors files and a
    tokenizer. Of a hub id, only the configuration is fetched and checked.

    Raises:
        ModelError: names the folder, what is missing or unsupported, and a remedy.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        check_config(_folder_config(folder), str(folder))
        _check_weights(folder)
        _check_tokenizer(folder)
    elif folder.exists():
        raise ModelError(f"{folder} is a file; give the folder that holds config.json")
    else:
        check_config(_hub_config(str(source)), str(source))


def check_config(config: dict[str, Any], where: str) -> None:
    """Raises unless a parsed config.json describes a plain causal language model we support.

    Raises:
        ModelError: another architecture, another head, or quantised weights.
    """
    kind = config.get("model_type")
    if kind not in SUPPORTED_MODEL_TYPES:
        raise ModelError(
            f"{where}: model_type {kind!r} is not supported; "
            f"choose a model of the {_SUPPORTED} architecture"
        )
    architectures = config.get("architectures") or []
    if architectures and not any(name.endswith(_LM_SUFFIXES) for name in architectures):
        raise ModelError(
            f"{where}: holds {', '.join(architectures)}, not a language model; "
            "a base model needs its language-model head"
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"{where}: the weights are quantised and cannot be trained; "
            "use the unquantised original or save a de-quantised copy"
        )


def check_quantiser(kind: str) -> None:
    """Raises unless the package that `model.quantise` needs is installed.

    Raises:
        ModelError: names the extra that installs it.
    """
    if kind != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f'model.quantise: "{kind}" needs the package bitsandbytes, which is not installed; '
            'pip install "amenable[quantised]", or set model.quantise = "none"'
        )


def check_quantisable(source: str | Path) -> None:
    """Raises unless the layers of a base model that `check_base` passed can be quantised.

    Raises:
        ModelError: names the model and a remedy.
    """
    folder = Path(source).expanduser()
    config = _folder_config(folder) if folder.is_dir() else _hub_config(str(source))
    if config.get("model_type") in TRANSPOSED:
        raise ModelError(
            f"{source}: a base of type {config['model_type']!r} keeps its weights transposed and "
            'cannot be quantised; set model.quantise = "none", or take another model.base'
        )


def _folder_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no config.json; {_remedy_without_config(folder)}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable ({error}); copy the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object; copy the model again")
    return config


def _remedy_without_config(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return "this is an adapter: give the base model, or a folder with the merged weights"
    if any(folder.glob("*.gguf")):
        return "this is a GGUF file: convert it to a Hugging Face folder first"
    return "give a Hugging Face model folder, a built-in name or a hub id"


def _check_weights(folder: Path) -> None:
    files = _weight_files(folder)
    if not files:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        raise ModelError(
            f"{folder}: no safetensors weights; "
            + (
                "pickled weights are never loaded: save the model again with safe_serialization"
                if pickled
                else "copy or download the model again"
            )
        )
    for file in files:
        _check_whole(file)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        return [single] if single.exists() else []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: not readable ({error}); copy the model again") from error
    return [folder / name for name in names]


def _check_whole(file: Path) -> None:
    """Compares the file's length with what its safetensors header announces."""
    try:
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            actual = file.stat().st_size
            header = json.loads(stream.read(header_bytes)) if header_bytes < actual else {}
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
    except FileNotFoundError as error:
        raise ModelError(f"{file}: a weight file is missing; copy the model again") from error
    except (OSError, ValueError, KeyError, AttributeError, struct.error) as error:
        raise ModelError(f"{file}: not a safetensors file ({error}); copy it again") from error
    expected = 8 + header_bytes + max(ends, default=0)
    if actual != expected:
        raise ModelError(f"{file}: {actual} bytes instead of {expected}; copy the file again")


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{folder}: no tokenizer ({', '.join(_TOKENIZER_FILES)}); "
            "save the model's tokenizer into the same folder"
        )


def _hub_config(name: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: neither a folder here nor a model that the hub answers for "
            f"({_first_line(error)}); check the name and the network, or give a local folder"
        ) from error
    if not config:
        raise ModelError(f"{name}: no such folder and no such model on the hub; check the name")
    return dict(config)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
