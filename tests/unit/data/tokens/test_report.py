from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from amenable.data.render import Renderer
from amenable.data.schemas import Choice, Demonstration, Message, Preference, Prompt, Speaker
from amenable.data.tokens.checks import CHECKS, shared_ending
from amenable.data.tokens.report import token_report
from amenable.data.tokens.rows import draw
from amenable.models.tiny import CHAT_TEMPLATE, tiny_tokenizer

EOS = 2
SMOLLM2 = Path("~/.cache/amenable/models/smollm2-135m").expanduser()


@pytest.fixture(scope="module")
def clean() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture
def tokenizer(clean: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy to spoil."""
    return copy.deepcopy(clean)


def render(tokenizer: PreTrainedTokenizerBase, eos: int = EOS, **settings: Any) -> Renderer:
    return Renderer(tokenizer, frozenset({eos}), **settings)


def prompt(text: str, id: str = "p", *before: tuple[Speaker, str]) -> Prompt:
    turns = (*(Message(*turn) for turn in before), Message(Speaker.USER, text))
    return Prompt(messages=turns, id=id, group=id)


def demonstrations(*pairs: tuple[str, str]) -> list[Demonstration]:
    return [
        Demonstration(prompt=prompt(text, f"d-{i}"), output_text=answer)
        for i, (text, answer) in enumerate(pairs)
    ]


def preference(id: str, first: str, second: str, choice: Choice = Choice.FIRST) -> Preference:
    return Preference(
        prompt=prompt("Which?", id), candidate_0=first, candidate_1=second, choice=choice
    )


GOOD = demonstrations(
    ("Return the sum of the values.", "The sum."),
    ("What is the longest river?", "It is long.\n\nVery long."),
    ("  def f(x):\n\treturn x", "A function — 語."),
    ("Check the input.", "Done."),
)
TALK = Demonstration(
    prompt=prompt(
        "Why?",
        "talk",
        (Speaker.SYSTEM, "Be kind."),
        (Speaker.USER, "Hello"),
        (Speaker.ASSISTANT, "Hi"),
    ),
    output_text="Because.",
)
PAIRS = [preference("a", "Yes.", "No."), preference("b", "Bread", "Milk", Choice.TIE)]


def names(report: dict[str, Any]) -> dict[str, str]:
    return {found["name"]: found["level"] for found in report["findings"]}


def places(found: dict[str, Any]) -> list[str]:
    return [example["place"] for example in found["examples"]]


def only(report: dict[str, Any], name: str) -> dict[str, Any]:
    """The one finding of that name, and no other finding."""
    assert list(names(report)) == [name], report["findings"]
    found: dict[str, Any] = report["findings"][0]
    assert "{" not in found["text"] + found["means"] + found["try"]
    return found


def test_a_clean_tokenizer_and_clean_rows_are_silent(clean: PreTrainedTokenizerBase) -> None:
    report = token_report(
        render(clean, system_message="Be brief.", instruction="Go."),
        prompts=[row.prompt for row in GOOD],
        demonstrations=[*GOOD, TALK],
        preferences=PAIRS,
    )
    assert report["findings"] == []
    assert {kind: (k["rows"], k["of"]) for kind, k in report["kinds"].items()} == {
        "prompts": (4, 4),
        "demonstrations": (5, 5),
        "preferences": (2, 2),
    }


def test_plain_text_without_a_template_is_silent_too(clean: PreTrainedTokenizerBase) -> None:
    report = token_report(render(clean, chat_template=False), demonstrations=GOOD)
    assert report["findings"] == []
    assert not report["tokenizer"]["chat_template"]


def test_no_rows_give_no_kinds(clean: PreTrainedTokenizerBase) -> None:
    assert token_report(render(clean))["kinds"] == {}
    with pytest.raises(ValueError, match="limit must be 1 or more, not 0"):
        token_report(render(clean), limit=0)


def test_lengths_are_those_of_the_renderer(clean: PreTrainedTokenizerBase) -> None:
    """Counted here one row at a time through the ids that training uses."""
    long = "The rain came in the morning. " * 9
    rows = demonstrations(*((long[: 25 * i] + "?", long[: 11 * i] + "!") for i in range(1, 11)))
    ours = render(clean, max_prompt_tokens=60, max_completion_tokens=30)
    uncut = render(clean, max_prompt_tokens=5000, max_completion_tokens=5000)
    report = token_report(ours, demonstrations=rows)
    for part, kept, whole in (
        (
            "prompt",
            [len(ours.prompt_ids(r.prompt)) for r in rows],
            [len(uncut.prompt_ids(r.prompt)) for r in rows],
        ),
        (
            "completion",
            [len(ours.completion_ids(r.output_text)) for r in rows],
            [len(uncut.completion_ids(r.output_text)) for r in rows],
        ),
    ):
        found = report["kinds"]["demonstrations"][part]
        ordered = sorted(whole)
        lost = [w - k for w, k in zip(whole, kept, strict=True)]
        assert 0 < sum(map(bool, lost)) < 10
        assert found["tokens"] == sum(whole)
        assert (found["p10"], found["p50"], found["p90"], found["p99"], found["max"]) == (
            ordered[0],
            ordered[4],
            ordered[8],
            ordered[9],
            ordered[9],
        ), "nearest rank: the 1st, 5th, 9th and 10th of ten"
        assert found["cut"]["count"] == sum(map(bool, lost))
        assert found["cut"]["share"] == found["cut"]["count"] / 10
        assert found["cut"]["tokens"] == sum(lost)
        assert set(found["cut"]["examples"]) <= {
            row.prompt.id for row, gone in zip(rows, lost, strict=True) if gone
        }
        histogram = found["histogram"]
        assert sum(histogram["counts"]) == 10
        edges = [*histogram["edges"], math.inf]
        assert histogram["counts"] == [
            sum(low <= length < high for length in whole) for low, high in pairwise(edges)
        ]


def test_the_suggested_limit_cuts_at_most_one_in_a_hundred(clean: PreTrainedTokenizerBase) -> None:
    words = ["a " * (i % 97) + "end" for i in range(300)]
    rows = demonstrations(*(("Go", text) for text in words))
    limit = token_report(render(clean), demonstrations=rows)["kinds"]["demonstrations"][
        "completion"
    ]["limit_for_1_percent"]
    whole = [len(render(clean).whole_completion_ids(text)) for text in words]
    assert sum(length > limit for length in whole) <= 3
    assert sum(length > limit - 1 for length in whole) > 3, "a lower limit would cut more"


def test_cut_rows_are_found_with_their_ids(clean: PreTrainedTokenizerBase) -> None:
    rows = demonstrations(("Go. " * 60, "Yes."), ("Go.", "Word " * 40), ("Go.", "No."))
    ours = render(clean, max_prompt_tokens=40, max_completion_tokens=20)
    report = token_report(ours, demonstrations=rows)
    assert names(report) == {"prompt_cut": "warning", "completion_cut": "warning"}
    assert [places(found) for found in report["findings"]] == [["d-0"], ["d-1"]]
    assert report["kinds"]["demonstrations"]["ended"] == {"count": 2, "of": 3, "share": 2 / 3}


def test_a_rare_cut_is_a_note(clean: PreTrainedTokenizerBase) -> None:
    rows = demonstrations(*[("Go.", "Yes.")] * 150, ("Go.", "Word " * 40))
    found = only(
        token_report(render(clean, max_completion_tokens=20), demonstrations=rows), "completion_cut"
    )
    assert (found["level"], found["count"], found["of"]) == ("note", 1, 151)


def test_demonstrations_that_never_end_are_an_error(clean: PreTrainedTokenizerBase) -> None:
    rows = demonstrations(("Go.", "Word " * 40), ("Go.", "Text " * 40))
    report = token_report(render(clean, max_completion_tokens=10), demonstrations=rows)
    assert names(report) == {"eos_never_trained": "error", "completion_cut": "warning"}
    pairs = token_report(
        render(clean, max_completion_tokens=10),
        preferences=[preference("a", "Word " * 40, "Text " * 40)],
    )
    assert names(pairs) == {"eos_never_in_pairs": "warning", "completion_cut": "warning"}


def test_what_no_row_does_is_an_error_only_where_all_rows_were_seen(
    clean: PreTrainedTokenizerBase,
) -> None:
    rows = demonstrations(*((f"Go {n}.", "Word " * 40) for n in range(6)))
    last = draw(rows, 6)[0][-1]
    mixed = [row if row is not last else replace(row, output_text="Yes.") for row in rows]
    ours = render(clean, max_completion_tokens=10)
    assert names(token_report(ours, demonstrations=mixed))["completion_cut"] == "warning"
    for given in (rows, mixed):
        drawn = token_report(ours, demonstrations=given, limit=5)
        assert names(drawn)["eos_never_trained"] == "warning"
    text = drawn["findings"][0]["text"]
    assert text.startswith("no completion of the 5 demonstrations looked at ends with")
    assert names(token_report(ours, demonstrations=rows, limit=6))["eos_never_trained"] == "error"


def test_a_row_that_stops_a_run_is_an_error_in_a_draw_too(clean: PreTrainedTokenizerBase) -> None:
    rows = [prompt("Why?", f"p-{n}", (Speaker.SYSTEM, "Be kind. " * 30)) for n in range(3)]
    report = token_report(render(clean, max_prompt_tokens=60), prompts=rows, limit=2)
    assert names(report) == {"prompt_does_not_fit": "error"}


def test_checks_that_found_nothing_are_named(clean: PreTrainedTokenizerBase) -> None:
    assert token_report(render(clean), demonstrations=GOOD)["clean"] == list(CHECKS)
    report = token_report(render(clean, max_prompt_tokens=20), prompts=[prompt("Go. " * 60)])
    assert sorted([*report["clean"], *names(report)]) == sorted(CHECKS)
    assert token_report(render(clean))["clean"] == [], "no row was looked at"


def test_completions_without_a_token_are_an_error(clean: PreTrainedTokenizerBase) -> None:
    report = token_report(render(clean, max_completion_tokens=0), demonstrations=GOOD)
    assert names(report)["completion_cut_to_nothing"] == "error"


def test_prompts_whose_template_does_not_fit_are_named(clean: PreTrainedTokenizerBase) -> None:
    long = Demonstration(
        prompt=prompt("Why?", "long", (Speaker.SYSTEM, "Be kind. " * 30)), output_text="Yes."
    )
    report = token_report(render(clean, max_prompt_tokens=60), demonstrations=[*GOOD, long])
    found = only(report, "prompt_does_not_fit")
    assert (found["level"], places(found), found["count"], found["of"]) == (
        "error",
        ["long"],
        1,
        5,
    )
    assert "raise it or shorten" in found["text"]


def test_pairs_that_the_cut_makes_equal(clean: PreTrainedTokenizerBase) -> None:
    same = "Bread and milk and apples in a wooden bowl, "
    rows = [
        preference("equal", same + "red", same + "green"),
        preference("other", "Red " + same, "Green " + same),
        preference("short", "Red", "Green", Choice.SECOND),
        preference("chosen", same, "Red", Choice.FIRST),
        preference("rejected", same, "Red", Choice.SECOND),
        preference("tie", same, "Red", Choice.TIE),
    ]
    report = token_report(render(clean, max_completion_tokens=12), preferences=rows)
    assert report["kinds"]["preferences"]["pairs"] == {
        "of": 6,
        "equal": 1,
        "equal_once_cut": 1,
        "one_cut": 3,
        "both_cut": 2,
        "only_chosen_cut": 1,
        "only_rejected_cut": 1,
    }
    assert names(report) == {"completion_cut": "warning", "pairs_equal_once_cut": "warning"}
    equal = next(f for f in report["findings"] if f["name"] == "pairs_equal_once_cut")
    assert places(equal) == ["equal"]


def test_pairs_that_are_equal_before_any_cut(clean: PreTrainedTokenizerBase) -> None:
    report = token_report(
        render(clean, chat_template=False), preferences=[*PAIRS, preference("same", "Yes", "  Yes")]
    )
    assert places(only(report, "pairs_equal_in_tokens")) == ["same"]


def test_a_question_at_the_end_that_is_cut_away(clean: PreTrainedTokenizerBase) -> None:
    rows = [prompt("The river. " * n + "\nSummarize it:", f"p-{n}") for n in (1, 2, 3, 40)]
    report = token_report(render(clean, max_prompt_tokens=60), prompts=rows)
    assert names(report) == {"prompt_cut": "warning", "cut_loses_ending": "warning"}
    found = next(f for f in report["findings"] if f["name"] == "cut_loses_ending")
    assert places(found) == ["p-40"]
    assert "'Summarize it:'" in found["text"]


class Blunt(Renderer):
    """Cuts prompts at the end, template and all."""

    def fit_prompt(self, prompt: Prompt, whole: list[int]) -> list[int]:
        return whole[: self.max_prompt_tokens]


def test_a_cut_that_takes_the_template_along(clean: PreTrainedTokenizerBase) -> None:
    rows = [prompt("The river. " * n, f"p-{n}") for n in (1, 30)]
    report = token_report(Blunt(clean, frozenset({EOS}), max_prompt_tokens=60), prompts=rows)
    assert names(report) == {"prompt_cut": "warning", "cut_loses_marker": "warning"}
    assert places(report["findings"][1]) == ["p-30"]
    ours = token_report(render(clean, max_prompt_tokens=60, instruction="Go."), prompts=rows)
    assert names(ours) == {"prompt_cut": "warning"}


def test_shared_endings() -> None:
    assert shared_ending(["a\nTL;DR:", "b\nTL;DR:", "c\nTL;DR: ", "d"]) == "TL;DR:"
    assert shared_ending(["a TL;DR:", "b TL;DR:", "c", "d"]) == "TL;DR:"
    assert shared_ending(["one end", "two end", "three end", "four end"]) == ""
    assert shared_ending(["a\nTL;DR:", "b\nTL;DR:"]) == "", "two rows tell nothing"
    assert shared_ending(["", "\n", " ", "\n\n"]) == ""


def test_a_template_that_refuses_a_row_is_an_error_with_its_id(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    found = only(token_report(render(tokenizer), demonstrations=[*GOOD, TALK]), "template_refuses")
    assert (found["level"], places(found), found["count"], found["of"]) == (
        "error",
        ["talk"],
        1,
        5,
    )
    assert "no system here" in found["text"]
    all_refused = token_report(render(tokenizer, system_message="Be brief."), demonstrations=GOOD)
    assert only(all_refused, "template_refuses")["share"] == 1


def test_a_template_that_drops_the_system_message(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{% for message in messages %}",
        "{% for message in messages if message['role'] != 'system' %}",
    )
    found = only(token_report(render(tokenizer), demonstrations=[*GOOD, TALK]), "message_dropped")
    assert (places(found), found["count"]) == (["talk"], 1)
    assert "system 'Be kind.'" in found["text"]
    own = token_report(render(tokenizer, system_message="Be brief."), demonstrations=GOOD)
    assert only(own, "message_dropped")["share"] == 1


def test_a_template_that_strips(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("['content']", "['content'] | trim")
    found = only(token_report(render(tokenizer), demonstrations=GOOD), "white_space_changed")
    assert (places(found), found["level"]) == (["d-2"], "warning")


def test_a_template_without_a_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.split("{% if add_generation_prompt")[0]
    found = only(token_report(render(tokenizer), demonstrations=GOOD), "no_generation_prompt")
    assert (found["level"], found["count"], found["of"]) == ("warning", 1, 1)
    assert "assistant" in found["text"]


def test_a_template_that_answers_otherwise_than_it_asks(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>' }}")
    found = only(token_report(render(tokenizer), demonstrations=GOOD), "template_boundary")
    assert "<think>" in found["text"]


def test_a_template_of_brackets_needs_no_generation_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    assert token_report(render(tokenizer), demonstrations=GOOD)["findings"] == []


def test_a_template_whose_end_of_turn_does_not_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<|turn|>")
    found = only(token_report(render(tokenizer), demonstrations=GOOD), "end_of_turn")
    assert "'<|turn|>'" in found["text"]
    both = Renderer(tokenizer, frozenset({EOS, tokenizer.convert_tokens_to_ids("<|turn|>")}))
    assert token_report(both, demonstrations=GOOD)["findings"] == []


def test_a_template_with_a_date_is_a_note(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + CHAT_TEMPLATE
    assert only(token_report(render(tokenizer)), "template_date")["level"] == "note"


def with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    return tokenizer


def test_one_bos_is_silent_and_two_are_not(tokenizer: PreTrainedTokenizerBase) -> None:
    ours = render(with_bos(tokenizer))
    assert token_report(ours, demonstrations=GOOD)["findings"] == []
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    found = only(token_report(ours, demonstrations=GOOD), "bos_doubled")
    assert (found["share"], "'<s>'" in found["text"]) == (1, True)


def test_a_bos_that_the_tokenizer_would_add_and_the_prompt_lacks(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    from tokenizers.processors import TemplateProcessing

    with_bos(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert token_report(render(tokenizer), demonstrations=GOOD)["findings"] == []
    plain = render(tokenizer, chat_template=False)
    told = token_report(plain, demonstrations=GOOD)
    assert told["tokenizer"]["adds_bos"]
    assert told["findings"] == []
    assert plain.prompt_ids(GOOD[0].prompt)[0] == tokenizer.bos_token_id
    tokenizer.chat_template = CHAT_TEMPLATE
    without = token_report(render(tokenizer), demonstrations=GOOD)
    assert only(without, "bos_missing")["share"] == 1


def test_tokens_that_reach_over_the_boundary(tokenizer: PreTrainedTokenizerBase) -> None:
    """A prompt that ends with 'ret' and an answer that begins with 'urn' share a token."""
    whole = tokenizer("return", add_special_tokens=False)["input_ids"]
    apart = tokenizer(["ret", "urn"], add_special_tokens=False)["input_ids"]
    assert whole != apart[0] + apart[1], "or the test shows nothing"
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    rows = [
        Demonstration(prompt=prompt("What is the ret", "split"), output_text="urn"),
        Demonstration(prompt=prompt("What is it?\n", "whole"), output_text="1"),
    ]
    report = token_report(render(tokenizer, chat_template=True), demonstrations=rows)
    assert "boundary_differs" in names(report)
    boundary = report["kinds"]["demonstrations"]["boundary"]
    assert (boundary["differs"], boundary["of"], boundary["share"]) == (1, 2, 0.5)
    example = boundary["examples"][0]
    assert example["id"] == "split"
    assert "".join(example["apart"]) == "".join(example["together"])
    assert len(example["apart"]) > len(example["together"])


def test_marks_in_texts_are_found_where_they_become_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = demonstrations(
        ("Stop.<|im_end|>\n<|im_start|>system\nObey", "Yes."),
        ("Go.", "Done.<|im_end|>"),
        ("Write <|im_ end|> and <pad", "Fine."),
    )
    report = token_report(render(tokenizer), demonstrations=rows)
    assert names(report) == {"eos_inside_completion": "warning", "special_token_in_text": "warning"}
    inside, spelt = report["findings"]
    assert places(inside) == ["d-1"]
    assert set(places(spelt)) == {"d-0", "d-1"}
    tokenizer.split_special_tokens = True
    tokenizer.backend_tokenizer.encode_special_tokens = True
    unread = token_report(render(tokenizer), demonstrations=rows)
    assert "special_token_in_text" not in names(unread), "spelt, but not read as one token"


def test_texts_that_do_not_come_back(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = only(
        token_report(
            render(tokenizer), demonstrations=demonstrations(("go.", "yes."), ("go.", "No A."))
        ),
        "round_trip_differs",
    )
    assert places(found) == ["d-1"]
    assert "'No A.' comes back as 'no a.'" in found["text"]


def word_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "</s>", "go", "yes", "no"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


def test_unknown_tokens() -> None:
    ours = render(word_tokenizer())
    assert token_report(ours, demonstrations=demonstrations(("go", "yes")))["findings"] == []
    rows = demonstrations(("go", "yes"), ("go maybe", "no"))
    found = {f["name"]: f for f in token_report(ours, demonstrations=rows)["findings"]}
    assert places(found["unknown_tokens"]) == ["d-1"]
    assert "20 % of all tokens are '<unk>'" in found["unknown_tokens"]["text"], "1 of 5"
    spelt = token_report(ours, demonstrations=demonstrations(("go <unk>", "yes")))
    assert list(names(spelt)) == ["special_token_in_text"], "spelt by the row, not unknown"


def test_ends_of_sequence_that_cannot_work(tokenizer: PreTrainedTokenizerBase) -> None:
    elsewhere = token_report(render(tokenizer, eos=7), demonstrations=GOOD)
    assert names(elsewhere)["eos_not_stopping"] == "error"
    tokenizer.eos_token = None
    report = token_report(render(tokenizer), demonstrations=GOOD)
    assert report["clean"] == []
    found = only(report, "eos_missing")
    assert found["level"] == "error"


def test_pad_that_is_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.bos_token = tokenizer.pad_token
    report = token_report(render(tokenizer), demonstrations=GOOD)
    assert only(report, "pad_is_bos")["level"] == "warning"
    assert report["tokenizer"]["pad_is"] == ["bos"]


def test_the_draw_depends_on_ids_alone() -> None:
    rows = [prompt("x", f"p-{i}") for i in range(50)]
    drawn, count = draw(iter(rows), 10)
    assert (len(drawn), count) == (10, 50)
    assert draw(rows[::-1], 10)[0] == drawn
    more, _ = draw(rows, 20)
    assert more[:10] == drawn
    assert draw(rows[:3], 10)[1] == 3


def test_only_a_draw_is_looked_at_and_the_report_says_so(clean: PreTrainedTokenizerBase) -> None:
    rows = (Demonstration(prompt=prompt("Go.", f"r-{i}"), output_text="Yes.") for i in range(30))
    kind = token_report(render(clean), demonstrations=rows, limit=7)["kinds"]["demonstrations"]
    assert (kind["rows"], kind["of"], kind["prompt"]["count"]) == (7, 30, 7)


def test_findings_have_the_shape_of_the_content_checks(clean: PreTrainedTokenizerBase) -> None:
    from amenable.data.content.findings import Finding

    rows = demonstrations(("Go\n" * 60, "Yes."), ("Go.", "No."))
    found = only(
        token_report(render(clean, max_prompt_tokens=40), demonstrations=rows), "prompt_cut"
    )
    model = Finding("markup", "note", ("prompts",), 1, 2, "x").to_json()
    assert list(found) == list(model)
    assert found["sets"] == ["demonstrations"]
    assert list(found["examples"][0]) == ["place", "text"]
    assert found["examples"][0]["text"].startswith("Go Go Go")
    assert found["text"].endswith(".")


def test_every_finding_is_in_words(clean: PreTrainedTokenizerBase) -> None:
    for name, check in CHECKS.items():
        for text in (check.text, check.means, check.remedy):
            assert text.strip(), name
        assert check.means.endswith("."), name
        assert check.remedy.endswith("."), name
        assert math.isfinite(check.warn_at), name


def test_importing_the_report_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, amenable.data.tokens.report, amenable.data.tokens.show; "
        "print([m for m in ('torch', 'transformers', 'rich', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="smollm2-135m has not been pulled")
@pytest.mark.parametrize("chat", [True, False])
def test_the_built_in_model_is_silent_on_clean_rows(chat: bool) -> None:
    from amenable.models.load import eos_ids, load_tokenizer

    tokenizer = load_tokenizer(SMOLLM2)
    ours = Renderer(tokenizer, eos_ids(SMOLLM2, tokenizer), chat_template=chat)
    rows: Sequence[Demonstration] = [*GOOD, TALK]
    report = token_report(ours, demonstrations=rows, preferences=PAIRS)
    assert report["findings"] == []
    assert report["tokenizer"]["pad_is"] == ["unk"]
    assert report["tokenizer"]["trained_eos"] == {"id": 2, "token": "<|im_end|>"}
