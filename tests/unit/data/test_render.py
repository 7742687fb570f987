from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from amenable.data.render import Renderer
from amenable.data.schemas import Message, Prompt, Speaker
from amenable.errors import DataError, ModelError
from amenable.models.tiny import tiny_tokenizer

EOS = 2
TEXT = "The rain came in the morning and stayed until the evening."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


def renderer(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Renderer:
    return Renderer(tokenizer, frozenset({EOS}), **settings)


def prompt(text: str = TEXT, *before: tuple[Speaker, str]) -> Prompt:
    turns = (*(Message(*turn) for turn in before), Message(Speaker.USER, text))
    return Prompt(messages=turns, id="p", group="p")


def test_prompt_is_the_template_and_ends_where_the_answer_begins(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = renderer(tokenizer).prompt_ids(prompt("Why?"))
    expected = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == expected
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (2, 1), "marks must be single tokens"


def test_prompt_and_completion_are_the_whole_conversation(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """What is trained equals what the template makes of the answered conversation."""
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "It is wet."}],
        tokenize=False,
    )
    ours = renderer(tokenizer)
    ids = ours.prompt_ids(prompt()) + ours.completion_ids("It is wet.")
    assert tokenizer.decode(ids) + "\n" == whole


def test_instruction_stands_before_the_last_user_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ours = renderer(tokenizer, instruction="Summarize.")
    turns = ((Speaker.USER, "Hello"), (Speaker.ASSISTANT, "Hi"))
    assert tokenizer.decode(ours.prompt_ids(prompt("Why?", *turns))) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
        "<|im_start|>user\nSummarize.\n\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_system_message_goes_first_unless_the_row_has_its_own(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ours = renderer(tokenizer, system_message="Be brief.")
    text = tokenizer.decode(ours.prompt_ids(prompt("Why?")))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?")
    own = tokenizer.decode(ours.prompt_ids(prompt("Why?", (Speaker.SYSTEM, "Be long."))))
    assert own.startswith("<|im_start|>system\nBe long.")
    assert "Be brief" not in own


@pytest.mark.parametrize("limit", range(20, 34))
def test_cut_takes_the_end_of_the_users_text_and_keeps_the_template(
    tokenizer: PreTrainedTokenizerBase, limit: int
) -> None:
    ours = renderer(tokenizer, instruction="Go.", max_prompt_tokens=limit)
    long = prompt(TEXT * 5)
    ids = ours.prompt_ids(long)
    head, tail = "<|im_start|>user\nGo.\n\n", "<|im_end|>\n<|im_start|>assistant\n"
    text = tokenizer.decode(ids)
    assert limit - 3 <= len(ids) <= limit
    assert text.startswith(head)
    assert text.endswith(tail)
    kept = text.removeprefix(head).removesuffix(tail)
    assert kept
    assert (TEXT * 5).startswith(kept)
    assert ours.is_cut(long)
    assert not renderer(tokenizer, max_prompt_tokens=500).is_cut(long)


def test_cut_keeps_a_text_whose_tokens_are_parts_of_characters(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ours = renderer(tokenizer, max_prompt_tokens=24)
    assert len(ours.prompt_ids(prompt("語" * 40))) <= 24


def test_a_template_that_does_not_fit_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    ours = renderer(tokenizer, instruction=TEXT, max_prompt_tokens=16)
    with pytest.raises(DataError, match="more than max_prompt_tokens = 16; raise it or shorten"):
        ours.prompt_ids(prompt("Why?"))


def test_whole_ids_are_those_of_a_renderer_without_limits(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for chat in (True, False):
        cut = renderer(tokenizer, chat_template=chat, max_prompt_tokens=30, max_completion_tokens=4)
        free = renderer(tokenizer, chat_template=chat, max_prompt_tokens=999)
        long = prompt(TEXT * 3)
        assert cut.whole_prompt_ids(long) == free.prompt_ids(long) != cut.prompt_ids(long)
        assert tokenizer.decode(cut.whole_prompt_ids(long)) == cut.prompt_text(long)
        assert cut.whole_completion_ids(TEXT) == free.completion_ids(TEXT)
        assert cut.whole_completion_ids(TEXT)[:4] == cut.completion_ids(TEXT)
        source = cut.completion_source(TEXT)
        assert cut.encode_all([source, ""]) == [free.completion_ids(TEXT)[:-1], []]
    assert renderer(tokenizer).encode_all([]) == []


def test_a_template_that_refuses_a_prompt_names_it(tokenizer: PreTrainedTokenizerBase) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(
        DataError, match=r"refuses prompt 'p' \(turns: user\): turns must alternate; change"
    ):
        renderer(strict).prompt_ids(prompt())


def test_completion_ends_with_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = renderer(tokenizer).completion_ids("Yes.")
    assert ids[-1] == EOS
    assert EOS not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == "Yes."
    assert renderer(tokenizer).completion_ids("") == [EOS]


def test_a_cut_completion_has_no_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = renderer(tokenizer).completion_ids("Yes, it can be done.")
    length = len(whole)
    exact = renderer(tokenizer, max_completion_tokens=length)
    assert exact.completion_ids("Yes, it can be done.") == whole
    cut = renderer(tokenizer, max_completion_tokens=length - 1)
    assert cut.completion_ids("Yes, it can be done.") == whole[:-1]


def test_completion_text_undoes_completion_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    for chat in (True, False):
        ours = renderer(tokenizer, chat_template=chat)
        assert ours.completion_text(ours.completion_ids("Add 2, then 3.")) == "Add 2, then 3."


def test_plain_text_where_there_is_no_template(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for ours in (renderer(bare), renderer(tokenizer, chat_template=False)):
        assert tokenizer.decode(ours.prompt_ids(prompt("Why?"))) == "Why?\n\n"
        assert tokenizer.decode(ours.completion_ids("So.")) == " So.<|im_end|>"
        talk = prompt("Why?", (Speaker.SYSTEM, "Be kind."), (Speaker.ASSISTANT, "Hi"))
        assert tokenizer.decode(ours.prompt_ids(talk)) == (
            "Be kind.\n\nAssistant: Hi\n\nUser: Why?\n\nAssistant:"
        )


def test_pad_that_ends_a_sequence_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ModelError, match="also an end-of-sequence token; stopping could not be"):
        Renderer(tokenizer, frozenset({EOS, int(tokenizer.pad_token_id)}))


def test_a_plain_prompt_begins_as_the_tokenizer_begins_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """As those of Llama and Gemma: BOS once, also where the prompt is cut; never in a template."""
    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(tokenizer)
    with_bos.add_special_tokens({"bos_token": "<s>"})
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    plain = renderer(with_bos, chat_template=False, max_prompt_tokens=12)
    assert plain.prompt_ids(prompt("Why?")) == with_bos("Why?\n\n")["input_ids"]
    cut = plain.prompt_ids(prompt(TEXT * 3))
    assert len(cut) <= 12
    assert (cut[0], cut.count(bos)) == (bos, 1)
    assert renderer(with_bos).prompt_ids(prompt("Why?")).count(bos) == 0
    assert renderer(tokenizer, chat_template=False).prefix_ids == ()
