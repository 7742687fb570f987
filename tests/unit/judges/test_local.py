from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.judges import Question, Reply, Verdict
from amenable.judges.local import LocalJudge
from amenable.judges.template import load_template

TEMPLATE = load_template("summary-1")


def question(n: int) -> Question:
    prompt = Prompt(messages=(Message(Speaker.USER, f"Text {n}." * n),), id=f"p{n}", group="")
    return Question(prompt, f"one {n}", f"two {n}")


def test_verdict_is_the_likelier_label(lively: Path) -> None:
    """Against the whole logits of plain transformers, one question at a time."""
    from transformers import AutoModelForCausalLM

    judge = LocalJudge(lively, TEMPLATE, "lively", precision="fp32")
    questions = [question(n) for n in range(1, 7)]
    replies: dict[int, Reply] = {}
    assert judge.ask(questions, replies.__setitem__) == []
    assert sorted(replies) == list(range(6))
    plain = AutoModelForCausalLM.from_pretrained(lively, dtype=torch.float32)
    (first,), (second,) = judge._labels
    for n, asked in enumerate(questions):
        ids = judge._renderer.prompt_ids(TEMPLATE.short_prompt(asked))
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0, -1].double()
        wanted = Verdict.FIRST if logits[first] > logits[second] else Verdict.SECOND
        assert replies[n].verdict is wanted
        confidence = float((logits[first] - logits[second]).sigmoid())
        assert replies[n].confidence == pytest.approx(confidence, abs=1e-4)


def test_another_model_in_the_same_folder_is_another_judge(tiny: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    before = LocalJudge(folder, TEMPLATE, "m").identity
    assert before == LocalJudge(folder, TEMPLATE, "m").identity
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert before != LocalJudge(folder, TEMPLATE, "m").identity
    assert before != LocalJudge(tiny, load_template("help-1"), "m").identity
