from __future__ import annotations

import copy
import io
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from amenable.data.collate import PromptGroup, collate
from amenable.data.render import Renderer
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker
from amenable.data.tokens.rows import AnyRow
from amenable.data.tokens.show import first_of_each_kind, rows_as_json, show_html, show_rows
from amenable.data.tokens.shown import PART, shown_row, visible
from amenable.errors import DataError
from amenable.models.tiny import tiny_tokenizer
from amenable.train.reward import preference_group
from amenable.train.sft import demonstration_group

EOS = 2
SMOLLM2 = Path("~/.cache/amenable/models/smollm2-135m").expanduser()
LONG = "The rain came in the morning and stayed until the evening. "


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


def render(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Renderer:
    return Renderer(tokenizer, frozenset({EOS}), **settings)


def prompt(text: str, id: str = "p", *before: tuple[Speaker, str]) -> Prompt:
    turns = (*(Message(*turn) for turn in before), Message(Speaker.USER, text))
    return Prompt(messages=turns, id=id, group=id)


PROMPT = prompt("Why?\n\tTell me.", "asked", (Speaker.SYSTEM, "Be kind."))
SHORT = Demonstration(prompt=prompt("Why?", "short"), output_text="Because:\n  it is 語 🙂.")
CUT = Demonstration(prompt=prompt(LONG * 4, "cut"), output_text=LONG * 2)
FIRST = Preference(
    prompt=prompt("Which?", "pair"), candidate_0="This one.", candidate_1=LONG, choice=Choice.FIRST
)
SECOND = FIRST.swap()
TIE = Preference(
    prompt=prompt("Which?", "tie"), candidate_0="A", candidate_1="B", choice=Choice.TIE
)
ROWS: list[AnyRow] = [PROMPT, SHORT, CUT, FIRST, SECOND, TIE]


def groups(renderer: Renderer, row: AnyRow) -> PromptGroup:
    """What the stages themselves train on."""
    if isinstance(row, Demonstration):
        return demonstration_group(renderer, row)
    assert isinstance(row, Preference)
    return preference_group(renderer, row)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("limits", [(500, 500), (40, 12)])
@pytest.mark.parametrize("row", [SHORT, CUT, FIRST, SECOND, TIE], ids=lambda row: row.prompt.id)
def test_what_is_shown_is_what_is_trained(
    tokenizer: PreTrainedTokenizerBase, row: AnyRow, limits: tuple[int, int], chat: bool
) -> None:
    """Each sequence against its row of the batch that the stage's own group makes."""
    ours = render(
        tokenizer, max_prompt_tokens=limits[0], max_completion_tokens=limits[1], chat_template=chat
    )
    group = groups(ours, row)
    sequences = rows_as_json(ours, [row])[0]["sequences"]
    if isinstance(row, Preference) and row.choice is Choice.SECOND:
        sequences = sequences[::-1]  # groups have the chosen one first
    assert len(sequences) == len(group.completions)
    for sequence, completion in zip(sequences, group.completions, strict=True):
        batch = collate([PromptGroup(group.prompt_ids, [completion])], ours.pad_id)
        assert sequence["ids"] == batch.input_ids[0].tolist()
        counted = [i for i, counts in zip(sequence["ids"], sequence["mask"], strict=True) if counts]
        assert counted == batch.targets[0][batch.mask[0]].tolist()
        predicted_from = [at - 1 for at, counts in enumerate(sequence["mask"]) if counts]
        assert predicted_from == batch.sources[0][batch.mask[0]].tolist()


def test_tokens_are_the_text_piece_by_piece(tokenizer: PreTrainedTokenizerBase) -> None:
    ours = render(tokenizer)
    for row in rows_as_json(ours, ROWS):
        for sequence in row["sequences"]:
            text = "".join(token for token in sequence["tokens"] if token != PART)
            assert text == tokenizer.decode(sequence["ids"])
            assert len(sequence["tokens"]) == len(sequence["ids"]) == len(sequence["mask"])


def test_a_prompt_alone_carries_no_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    (row,) = rows_as_json(render(tokenizer), [PROMPT])
    (sequence,) = row["sequences"]
    assert (row["kind"], row["id"], sequence["completion"]) == ("prompt", "asked", None)
    assert sequence["ids"] == render(tokenizer).prompt_ids(PROMPT)
    assert not any(sequence["mask"])


@pytest.mark.parametrize("limit", range(24, 60, 5))
def test_cut_tokens_are_those_that_the_limits_take(
    tokenizer: PreTrainedTokenizerBase, limit: int
) -> None:
    ours = render(tokenizer, instruction="Go.", max_prompt_tokens=limit, max_completion_tokens=10)
    shown = shown_row(ours, CUT)
    assert shown.prompt.ids == ours.prompt_ids(CUT.prompt)
    text = "".join(token.text for token in shown.prompt.tokens if token.cut)
    assert text.strip()
    assert text.strip() in LONG * 4
    kept = "".join(token.text for token in shown.prompt.tokens if not token.cut)
    assert kept.endswith("<|im_end|>\n<|im_start|>assistant\n")
    (completion,) = shown.completions
    assert completion.ids == ours.completion_ids(CUT.output_text)
    assert completion.ids + completion.cut == ours.whole_completion_ids(CUT.output_text)
    assert completion.cut[-1] == EOS


@pytest.mark.parametrize("limit", range(20, 32))
def test_a_cut_inside_a_character_shows_the_tokens_that_training_sees(
    tokenizer: PreTrainedTokenizerBase, limit: int
) -> None:
    ours = render(tokenizer, max_prompt_tokens=limit)
    row = prompt("語" * 40)
    shown = shown_row(ours, row)
    assert shown.prompt.ids == ours.prompt_ids(row)
    assert shown.prompt.cut


def test_added_words_are_not_special(tokenizer: PreTrainedTokenizerBase) -> None:
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<note>"])
    (completion,) = shown_row(
        render(more), Demonstration(prompt=prompt("Why?"), output_text="<note>")
    ).completions
    assert [(token.text, token.special) for token in completion.tokens] == [
        ("<note>", False),
        ("<|im_end|>", True),
    ]


def test_the_choice_is_named_at_the_candidate(tokenizer: PreTrainedTokenizerBase) -> None:
    def notes(row: Preference) -> list[tuple[str, str]]:
        return [(part.title, part.note) for part in shown_row(render(tokenizer), row).completions]

    assert notes(FIRST) == [("candidate_0", "chosen"), ("candidate_1", "rejected")]
    assert notes(SECOND) == [("candidate_0", "rejected"), ("candidate_1", "chosen")]
    assert notes(TIE) == [("candidate_0", "tie"), ("candidate_1", "tie")]


def printed(renderer: Renderer, rows: list[AnyRow], **settings: Any) -> str:
    console = Console(file=io.StringIO(), width=80, **settings)
    show_rows(renderer, rows, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_output_marks_loss_special_and_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    text = printed(render(tokenizer), [SHORT])
    assert "\x1b" not in text
    assert re.search(r"«<\|im_start\|>»\|.*\|«<\|im_end\|>»", text.replace("\n  ", ""))
    assert "prompt  " in text
    assert "no loss" in text
    body = text.split("output_text")[1].replace("\n  ", "")
    assert re.search(r"\{B.*🙂\|\.\|«<\|im_end\|>»\}", body)
    assert body.replace("|", "").count("Because:↵") == 1
    assert "[-" not in body
    cut = printed(render(tokenizer, max_completion_tokens=5), [SHORT]).split("output_text")[1]
    assert re.search(r"\}\[-.*«<\|im_end\|>»-\]", cut.replace("\n  ", ""))
    assert "5 tokens · loss · " in cut


@pytest.mark.parametrize("settings", [{"no_color": True, "force_terminal": True}, {}])
def test_without_colour_there_are_brackets(
    tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> None:
    text = printed(render(tokenizer), [FIRST], **settings)
    assert "candidate_0 · chosen" in re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "{a|b} loss" in re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_colour_terminal_underlines_loss_and_strikes_cut_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = printed(
        render(tokenizer, max_completion_tokens=4),
        [SHORT],
        force_terminal=True,
        color_system="standard",
        no_color=False,
    )
    codes = {tuple(code.split(";")) for code in re.findall(r"\x1b\[([0-9;]+)m", text)}
    assert any("4" in code for code in codes), "underline"
    assert any("9" in code for code in codes), "strike"
    assert any("7" in code for code in codes), "reverse"


def test_lines_break_between_tokens_at_the_width(tokenizer: PreTrainedTokenizerBase) -> None:
    text = printed(render(tokenizer), [CUT])
    assert max(map(len, text.splitlines())) <= 82, "the legend and every line of tokens"


def test_white_space_and_what_could_steer_a_terminal_are_visible() -> None:
    assert visible("a b\tc\r\n") == "a·b→c␍↵"
    assert visible("\x1b[31m\u200b\u202e\x07") == "<U+001B>[31m<U+200B><U+202E><U+0007>"
    assert visible("語🙂é") == "語🙂é"


def test_a_hostile_row_cannot_steer_terminal_or_page(tokenizer: PreTrainedTokenizerBase) -> None:
    row = Demonstration(
        prompt=prompt("\x1b[2J<script>alert(1)</script>", "x\x1b[2J[bold]<b>"),
        output_text="[red]not markup[/red]",
    )
    text = printed(render(tokenizer), [row])
    assert "\x1b" not in text
    assert "[bold]" in text
    page = show_html(render(tokenizer), [row])
    assert "\x1b" not in page
    assert "<script" not in page
    assert "<b>" not in page


def spans(page: str) -> list[tuple[set[str], str]]:
    """Classes and text of every token of the rows."""
    body = page.split("</ul>")[1]
    found = re.findall(r'<span class="(t[^"]*)" title="id \d+">(.*?)</span>', body, re.DOTALL)
    return [(set(names.split()), unescape(re.sub("<[^>]+>", "", text))) for names, text in found]


def test_the_page_has_every_token_once_with_its_sort(tokenizer: PreTrainedTokenizerBase) -> None:
    ours = render(tokenizer, max_prompt_tokens=40, max_completion_tokens=12)
    page = show_html(ours, ROWS)
    expected = []
    for row in ROWS:
        shown = shown_row(ours, row)
        for part in (shown.prompt, *shown.completions):
            for token in part.tokens:
                sorts = {"loss"} if part.loss and not token.cut else set()
                sorts |= {"special"} if token.special else set()
                sorts |= {"cut"} if token.cut else set()
                expected.append((sorts, visible(token.text)))
    assert [(names - {"t", "b"}, text) for names, text in spans(page)] == expected


def test_the_page_needs_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    page = show_html(render(tokenizer), ROWS, title="a < b")
    assert "<title>a &lt; b</title>" in page
    assert "prefers-color-scheme: dark" in page
    for outside in ("http", "src=", "<script", "<link", "url("):
        assert outside not in page
    assert page.count("<section>") == page.count("</section>") == len(ROWS)


def test_a_row_that_cannot_be_rendered_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    ours = render(tokenizer, instruction=LONG, max_prompt_tokens=16)
    with pytest.raises(DataError, match="prompt 'short' has"):
        rows_as_json(ours, [SHORT])


def test_the_first_rows_of_each_kind() -> None:
    rows = [SHORT, PROMPT, FIRST, CUT, SECOND, SHORT, TIE, CUT]
    assert first_of_each_kind(rows, 2) == [SHORT, CUT, PROMPT, FIRST, SECOND]
    assert first_of_each_kind([]) == []


def test_a_tokenizer_that_writes_blanks_before_words_shows_them() -> None:
    """SentencePiece drops a leading blank when a token is decoded alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "</s>", "▁go", "▁on", "▁yes"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    row = Demonstration(prompt=prompt("go", "s"), output_text="yes go on")
    (completion,) = shown_row(render(spaced), row).completions
    assert [token.text for token in completion.tokens[:3]] == [" yes", " go", " on"]


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="smollm2-135m has not been pulled")
def test_the_built_in_model_shows_what_it_trains_on() -> None:
    from amenable.models.load import eos_ids, load_tokenizer

    real = load_tokenizer(SMOLLM2)
    ours = Renderer(real, eos_ids(SMOLLM2, real), max_prompt_tokens=60, max_completion_tokens=12)
    for row in (SHORT, CUT, FIRST):
        group = groups(ours, row)
        found = rows_as_json(ours, [row])[0]["sequences"]
        assert [s["ids"] for s in found] == [[*group.prompt_ids, *c] for c in group.completions]
        for sequence in found:
            text = "".join(token for token in sequence["tokens"] if token != PART)
            assert text == real.decode(sequence["ids"])
