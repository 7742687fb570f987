"""A reward model with a tokenizer of its own: texts are rendered and encoded anew for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from amenable.config.rewards import is_folder
from amenable.data.collate import micro_batches
from amenable.data.render import Renderer
from amenable.data.schemas import Prompt
from amenable.errors import DataError, ModelError
from amenable.rollout.rewards.types import Failed, Verdict
from amenable.rollout.rewards.verdicts import read_verdict, told

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = dict[str, list[int]]
"""A text as a tokenizer gives it: `input_ids`, and what else the model reads, of equal length."""

_MARKS = 4
"""At most this many tokens stand around a prompt and a completion."""


class FolderReward:
    """A sequence classifier with one label, of any architecture.

    A decoder reads prompt and completion as the policy's own reward model does: rendered by its
    chat template, the completion with end of sequence behind it. An encoder (a tokenizer with
    [CLS] and [SEP]) reads them as its pair of texts. Prompts are cut to `max_prompt_tokens` of its
    own tokens, completions never: one that it cannot read whole has no score. Texts of like length
    share a forward pass. A `reward_offset` in its `config.json` is subtracted; `temperature` is its
    `reward_temperature`, None where there is none.

    Args:
        source: a folder or a hub id; weights must be safetensors.
        max_prompt_tokens: longest prompt.
        max_completion_tokens: room that is kept for a completion where positions are few.
        key: of the recipe, for messages.
        instruction: text put before the prompt, as for the policy.
        system_message: system turn of its chat template.
        micro_batch_tokens: texts × longest text of one forward pass.
        device: where the model goes.
        dtype: of its weights.

    Raises:
        ModelError: it cannot be loaded, its head is not among the weights, it gives other than one
            number a text, or its temperature is no number above 0.
    """

    def __init__(
        self,
        source: str,
        *,
        max_prompt_tokens: int,
        max_completion_tokens: int,
        key: str = "policy.reward",
        instruction: str = "",
        system_message: str = "",
        micro_batch_tokens: int = 2048,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._device = device or torch.device("cpu")
        who = f"{key} = {source!r}"
        source = str(Path(source).expanduser()) if is_folder(source) else source
        self._model = _load_classifier(source, who, dtype).to(self._device)
        self._budget = micro_batch_tokens
        self._offset = float(getattr(self._model.config, "reward_offset", 0.0))
        self.temperature = _temperature(self._model.config, who)
        tokenizer, eos, self._is_pair = _open_tokenizer(source)
        self._longest = _positions(self._model, tokenizer)
        room = self._longest - max_completion_tokens - _MARKS
        if room < 1:
            raise ModelError(
                f"{who} reads {self._longest} tokens, which leaves no room for a "
                f"prompt beside data.max_completion_tokens = {max_completion_tokens}; lower that, "
                "or name another reward model"
            )
        self._renderer = Renderer(
            tokenizer,
            eos,
            instruction=instruction,
            system_message=system_message,
            max_prompt_tokens=min(max_prompt_tokens, room),
        )
        self._model.config.pad_token_id = self._renderer.pad_id

    def judge(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Verdict]:
        """[N] scores; a text that is too long for the model, or scored as NaN, has none."""
        verdicts: list[Verdict] = [Failed("")] * len(texts)
        rows: dict[int, Encoded] = {}
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            row = self._encoded(prompt, text)
            if isinstance(row, Failed):
                verdicts[number] = row
            else:
                rows[number] = row
        numbers = list(rows)
        lengths = [len(rows[number]["input_ids"]) for number in numbers]
        for part in micro_batches(lengths, self._budget):
            chosen = [numbers[i] for i in part]
            scores = self._scores([rows[number] for number in chosen])
            for number, score in zip(chosen, scores, strict=True):
                verdicts[number] = read_verdict(score, texts[number])
        return verdicts

    def _encoded(self, prompt: Prompt, text: str) -> Encoded | Failed:
        try:
            row = self._pair(prompt, text) if self._is_pair else self._turns(prompt, text)
        except DataError as error:
            return Failed(told(error))
        count = len(row["input_ids"])
        if count > self._longest:
            return Failed(f"{count} tokens are more than the {self._longest} that it can read")
        return row

    def _turns(self, prompt: Prompt, text: str) -> Encoded:
        """Prompt and completion one after the other, as a decoder was trained on them."""
        ids = self._renderer.prompt_ids(prompt) + self._renderer.whole_completion_ids(text)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def _pair(self, prompt: Prompt, text: str) -> Encoded:
        """[CLS] prompt [SEP] completion [SEP], as the tokenizer itself joins two texts."""
        first, limit = self._renderer.prompt_text(prompt).rstrip(), self._renderer.max_prompt_tokens
        tokenizer: Any = self._renderer.tokenizer
        given = tokenizer(first, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in given["offset_mapping"]]
        first = first if len(ends) <= limit else first[: ends[limit - 1]]
        return {key: list(values) for key, values in tokenizer(first, text).items()}

    @torch.no_grad()
    def _scores(self, rows: Sequence[Encoded]) -> list[float]:
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self._renderer.pad_id}
        inputs = {
            key: torch.tensor(
                [row[key] + [fill.get(key, 0)] * (width - len(row[key])) for row in rows],
                device=self._device,
            )
            for key in rows[0]
        }
        scores = self._model(**inputs).logits[:, 0].float() - self._offset
        return cast(list[float], scores.tolist())


def _temperature(config: Any, who: str) -> float | None:
    """`reward_temperature`, None where there is none."""
    value = getattr(config, "reward_temperature", None)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if value is not None and not fits:
        raise ModelError(
            f"{who}: reward_temperature in config.json is {value!r}; write a number above 0, or "
            "remove it"
        )
    return None if value is None else float(value)


def _open_tokenizer(source: str) -> tuple[Any, frozenset[int], bool]:
    """Tokenizer, what ends a sequence, and whether it is an encoder's.

    An encoder's has [CLS], [SEP] and a pad of its own.
    """
    from transformers import AutoTokenizer

    from amenable.models.load import eos_ids, load_tokenizer

    try:
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        found = None  # load_tokenizer says what is wrong
    marks = {getattr(found, f"{name}_token_id", None) for name in ("cls", "sep", "pad")}
    if found is not None and found.is_fast and None not in marks and len(marks) == 3:
        return found, frozenset({int(found.sep_token_id)}), True
    tokenizer = load_tokenizer(source)
    return tokenizer, eos_ids(source, tokenizer), False


def _positions(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest text that the model can read, in tokens."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [int(tokenizer.model_max_length)]
    limits += [known] if isinstance(known, int) and known > 0 else []
    return min(limits)


def _load_classifier(source: str, who: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSequenceClassification

    from amenable.models.quiet import without_bars

    try:
        with without_bars():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                source,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{who} is no reward model that loads as a sequence classifier "
            f"({str(error).splitlines()[0]}); give such a folder, a hub id, or module:function"
        ) from error
    if missing := sorted(map(str, report["missing_keys"])):
        raise ModelError(
            f"{who} has no weights for {', '.join(missing[:3])}, which would be random; give the "
            "folder of a trained reward model"
        )
    if model.config.num_labels != 1:
        raise ModelError(
            f"{who} gives {model.config.num_labels} numbers a text; a reward model gives one"
        )
    return model.eval()
