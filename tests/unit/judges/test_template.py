from __future__ import annotations

from pathlib import Path

import pytest

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.errors import UsageError
from amenable.judges import Question, Verdict
from amenable.judges.template import load_template, read_verdict, template_names


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Because.\nVerdict: A", Verdict.FIRST),
        ("**Verdict:** B", Verdict.SECOND),
        ("verdict - both bad", Verdict.BOTH_BAD),
        ("Verdict: Both-bad.", Verdict.BOTH_BAD),
        ("VERDICT: TIE", Verdict.TIE),
        ("Verdict: A at first, but then.\nVerdict: B", Verdict.SECOND),
        ("Verdict: 2", Verdict.SECOND),
        ("Verdict: Answer", Verdict.INVALID),
        ("A is better", Verdict.INVALID),
        ("", Verdict.INVALID),
    ],
)
def test_verdicts(text: str, verdict: Verdict) -> None:
    assert read_verdict(text) is verdict


def test_templates_that_come_with_amenable() -> None:
    assert template_names() == ["answer-1", "help-1", "summary-1"]
    prompt = Prompt(messages=(Message(Speaker.USER, "TEXT"),), id="p", group="")
    for name in template_names():
        template = load_template(name)
        system, user = template.messages(Question(prompt, "ONE {{prompt}}", "TWO"))
        assert system["role"] == "system"
        assert user["content"].count("TEXT") == 1, "a text is never read as a place"
        assert user["content"].index("ONE") < user["content"].index("TWO")
        assert "Verdict: both bad" in user["content"]
        assert template.short_prompt(Question(prompt, "ONE", "TWO")).text.endswith("A or B.")
        assert len(template.sha256) == 64


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("system = ''", "user: must be a text"),
        ("system = ''\nuser = '{{prompt}}'\nshort = ''", r"user: lacks \{\{first\}\}, \{\{second"),
        ("system = ", "not a readable template"),
    ],
)
def test_a_broken_template_is_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=told):
        load_template(str(path))


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(UsageError, match="summary-1"):
        load_template("sumary")
