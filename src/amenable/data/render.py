"""Prompts and completions to token ids. The only place where a chat template is applied."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from amenable.config.data import DataConfig
    from amenable.config.recipe import Recipe

_PLAIN_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Renderer:
    """Turns typed prompts and texts into the ids that every stage uses.

    A prompt ends exactly where the completion begins; a completion ends with the
    end-of-sequence token, so that stopping is trained.

    Args:
        tokenizer: of the base model.
        eos_ids: every token that ends a completion; `tokenizer.eos_token_id` is appended.
        instruction: text put before the last user message, with an empty line between.
        system_message: system turn of the chat template; empty leaves the template's default.
        max_prompt_tokens: prompts are cut to this many tokens, at the end of the user's text.
        max_completion_tokens: completions are cut to this many tokens, end of sequence included.
        chat_template: use the tokenizer's template where it has one.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    instruction: str = ""
    system_message: str = ""
    max_prompt_tokens: int = 512
    max_completion_tokens: int = 64
    chat_template: bool = True

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id in self.eos_ids:
            raise ModelError(
                f"pad token {self.tokenizer.pad_token_id} is also an end-of-sequence token; "
                "stopping could not be trained. Load the tokenizer with models.load.load_tokenizer."
            )

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int]
    ) -> Renderer:
        """The renderer that all stages of a run share."""
        data: DataConfig = recipe.data
        return cls(
            tokenizer=tokenizer,
            eos_ids=frozenset(eos_ids),
            instruction=data.instruction,
            system_message=data.system_message,
            max_prompt_tokens=data.max_prompt_tokens,
            max_completion_tokens=data.max_completion_tokens,
            chat_template=recipe.model.chat_template,
        )

    @property
    def pad_id(self) -> int:
        """Id used to fill rows; never an end-of-sequence id."""
        return int(self.tokenizer.pad_token_id)

    @property
    def templated(self) -> bool:
        """Whether the tokenizer's chat template is used; else prompts are plain text."""
        return self.chat_template and bool(self.tokenizer.chat_template)

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """The beginning-of-sequence token, where a plain prompt needs one.

        That is where the tokenizer itself puts it before text, as those of Llama and Gemma do; a
        chat template writes its own.
        """
        bos = self.tokenizer.bos_token_id
        if self.templated or bos is None:
            return ()
        return (int(bos),) if list(self.tokenizer("a")["input_ids"])[:1] == [bos] else ()

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of the rendered prompt, at most `max_prompt_tokens`.

        Raises:
            DataError: the template refuses the prompt, or alone does not fit.
        """
        return self.fit_prompt(prompt, self.whole_prompt_ids(prompt))

    def whole_prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of the rendered prompt before any cut, however many.

        Raises:
            DataError: the template refuses the prompt.
        """
        return [*self.prefix_ids, *self._ids(self.prompt_text(prompt))]

    def fit_prompt(self, prompt: Prompt, whole: list[int]) -> list[int]:
        """`prompt_ids` of a prompt whose `whole_prompt_ids` are known.

        Raises:
            DataError: the template alone does not fit.
        """
        ids = whole
        excess = len(ids) - self.max_prompt_tokens
        text_ids = self._ids(prompt.text) if excess > 0 else []
        while excess > 0:
            if excess >= len(text_ids):
                raise DataError(
                    f"prompt {prompt.id!r} has {len(ids)} tokens without its text, "
                    f"more than max_prompt_tokens = {self.max_prompt_tokens}; raise it "
                    "or shorten instruction, system message or history"
                )
            text_ids = text_ids[: len(text_ids) - excess]
            shortened = str(self.tokenizer.decode(text_ids)).rstrip()
            ids = [*self.prefix_ids, *self._ids(self._render(prompt, shortened))]
            excess = len(ids) - self.max_prompt_tokens
        return ids

    def is_cut(self, prompt: Prompt) -> bool:
        """Whether the prompt is too long to be rendered whole."""
        return len(self.whole_prompt_ids(prompt)) > self.max_prompt_tokens

    def prompt_text(self, prompt: Prompt) -> str:
        """The rendered prompt before any cut, as text: what `whole_prompt_ids` tokenizes.

        Raises:
            DataError: the template refuses the prompt.
        """
        return self._render(prompt, prompt.text)

    def completion_ids(self, text: str) -> list[int]:
        """Ids of a completion followed by end of sequence, cut to `max_completion_tokens`.

        A text that is too long loses its end *and* its end-of-sequence token: a cut
        completion must not look finished.
        """
        return self.whole_completion_ids(text)[: self.max_completion_tokens]

    def whole_completion_ids(self, text: str) -> list[int]:
        """Ids of a completion before any cut, end of sequence included."""
        return [*self._ids(self.completion_source(text)), int(self.tokenizer.eos_token_id)]

    def completion_source(self, text: str) -> str:
        """The text that is tokenized for a completion: plain prompts are continued by a blank."""
        return text if self.templated else " " + text.lstrip()

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in one call (faster than one by one) and with no token added."""
        return [list(ids) for ids in self._tokenize(list(texts))] if texts else []

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of rendered prompts, `prefix_ids` before each."""
        return [[*self.prefix_ids, *ids] for ids in self.encode_all(texts)]

    def completion_text(self, ids: Sequence[int]) -> str:
        """The text of completion ids, without special tokens and outer white space."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenize(text))

    def _tokenize(self, text: str | list[str]) -> Any:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, prompt: Prompt, last_text: str) -> str:
        messages = self.messages(prompt, last_text)
        if self.templated:
            return self._apply_template(prompt, messages)
        if len(messages) == 1:
            return messages[0].content + _PLAIN_SEPARATOR
        names = {Speaker.USER: "User: ", Speaker.ASSISTANT: "Assistant: ", Speaker.SYSTEM: ""}
        turns = [names[m.speaker] + m.content for m in messages]
        return _PLAIN_SEPARATOR.join([*turns, "Assistant:"])

    def _apply_template(self, prompt: Prompt, messages: list[Message]) -> str:
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                [{"role": str(m.speaker), "content": m.content} for m in messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            speakers = ", ".join(m.speaker for m in messages)
            raise DataError(
                f"the tokenizer's chat template refuses prompt {prompt.id!r} "
                f"(turns: {speakers}): {error}; change the row's turns, leave out the system "
                "message, or set model.chat_template = false"
            ) from error
        return str(rendered)

    def messages(self, prompt: Prompt, last_text: str | None = None) -> list[Message]:
        """The turns that are rendered, instruction and system message put in.

        Args:
            prompt: the row's prompt.
            last_text: stands in for the last user text; default: the prompt's own.
        """
        last_text = prompt.text if last_text is None else last_text
        text = f"{self.instruction}\n\n{last_text}" if self.instruction else last_text
        messages = [*prompt.messages[:-1], Message(Speaker.USER, text)]
        if self.system_message and messages[0].speaker is not Speaker.SYSTEM:
            messages.insert(0, Message(Speaker.SYSTEM, self.system_message))
        return messages
