"""Reward models of another architecture and tokenizer than the policy's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.errors import ModelError
from amenable.rollout.rewards import Failed, FolderReward

from .samples import PROMPTS, TEXTS, prompt, write_bert, write_gpt2

LIMITS = {"max_prompt_tokens": 64, "max_completion_tokens": 32}
LONG = " ".join(["wet"] * 60)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


def plain(folder: Path, **inputs: list[int]) -> float:
    """The logit of one text, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        given = {key: torch.tensor([ids]) for key, ids in inputs.items()}
        return float(model(**given).logits[0, 0])


def judged(folder: Path, prompts: Any = PROMPTS, texts: Any = TEXTS, **options: Any) -> list[Any]:
    return FolderReward(str(folder), **{**LIMITS, **options}).judge(prompts, texts)


def test_decoder_reads_the_texts_in_its_own_tokens(gpt2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    expected = [
        plain(
            gpt2,
            input_ids=[
                *tokenizer(f"{p.text}\n\n")["input_ids"],
                *tokenizer(f" {t}")["input_ids"],
                0,
            ],
        )
        for p, t in zip(PROMPTS, TEXTS, strict=True)
    ]
    found = judged(gpt2)
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.05, "the texts must be told apart"


def test_encoder_reads_a_pair_of_texts(bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    expected = [plain(bert, **tokenizer(p.text, t)) for p, t in zip(PROMPTS, TEXTS, strict=True)]
    assert len(set(tokenizer("a", "b")["token_type_ids"])) == 2
    found = judged(bert)
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.05, "the texts must be told apart"


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_micro_batches_change_no_score(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    texts = [*TEXTS, LONG, "a"]
    prompts = [*PROMPTS, PROMPTS[0], prompt(LONG)]
    alone = [judged(folder, [p], [t])[0] for p, t in zip(prompts, texts, strict=True)]
    for budget in (1, 60, 10_000):
        found = judged(folder, prompts, texts, micro_batch_tokens=budget)
        assert found == pytest.approx(alone, abs=2e-4)


def test_no_forward_pass_is_larger_than_the_budget(gpt2: Path) -> None:
    reward = FolderReward(str(gpt2), **LIMITS, micro_batch_tokens=200)
    shapes: list[tuple[int, ...]] = []
    reward._model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    reward.judge(PROMPTS * 8, [*TEXTS * 7, LONG, LONG, "x", "y"])
    assert len(shapes) > 3
    assert sum(rows for rows, _ in shapes) == 32
    assert all(rows * width <= 200 or rows == 1 for rows, width in shapes)


def test_offset_is_subtracted(gpt2: Path, tmp_path: Path) -> None:
    for file in gpt2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"reward_offset": 0.75}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = [score - 0.75 for score in judged(gpt2)]
    assert judged(tmp_path) == pytest.approx(expected, abs=1e-5)


def test_temperature_is_read_from_its_folder(gpt2: Path, tmp_path: Path) -> None:
    assert FolderReward(str(gpt2), **LIMITS).temperature is None
    for file in gpt2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    plain = json.loads((tmp_path / "config.json").read_text())
    for value in (1.75, 2):
        (tmp_path / "config.json").write_text(json.dumps({**plain, "reward_temperature": value}))
        assert FolderReward(str(tmp_path), **LIMITS).temperature == value
    for value in (0, -1.0, "warm", True):
        (tmp_path / "config.json").write_text(json.dumps({**plain, "reward_temperature": value}))
        with pytest.raises(ModelError, match="write a number above 0"):
            FolderReward(str(tmp_path), **LIMITS)


def test_completion_that_it_cannot_read_whole_fails_and_is_not_cut(gpt2: Path) -> None:
    found = judged(gpt2, PROMPTS, ["Yes.", "wet " * 400, "It", "No"])
    assert isinstance(found[1], Failed)
    assert "tokens are more than the 256 that it can read" in found[1].reason
    assert [isinstance(verdict, float) for verdict in found] == [True, False, True, True]


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_long_prompt_is_cut_and_leaves_room(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    (score,) = judged(folder, [prompt("rain " * 500)], ["Yes."], max_prompt_tokens=4096)
    assert isinstance(score, float)
    cut, cut_too = judged(folder, [prompt("rain " * 64), prompt("rain " * 99)], ["Yes."] * 2)
    assert cut == pytest.approx(cut_too, abs=1e-5)


def test_prompt_that_does_not_fit_its_template_fails_with_the_reason(gpt2: Path) -> None:
    turns = (Message(Speaker.USER, LONG), Message(Speaker.ASSISTANT, LONG))
    long = Prompt(messages=(*turns, Message(Speaker.USER, "So?")), id="p7", group="g")
    found = judged(gpt2, [long, PROMPTS[0]], ["Yes.", "Yes."])
    assert isinstance(found[0], Failed)
    assert "prompt 'p7' has" in found[0].reason
    assert isinstance(found[1], float)


def test_instruction_is_read_before_the_prompt(gpt2: Path) -> None:
    asked = [prompt(f"Be kind.\n\n{p.text}") for p in PROMPTS]
    assert judged(gpt2, instruction="Be kind.") == pytest.approx(judged(gpt2, asked), abs=1e-5)


def test_score_that_is_not_finite_fails(gpt2: Path) -> None:
    reward = FolderReward(str(gpt2), **LIMITS)
    reward._model.score.weight.data.fill_(float("nan"))
    assert reward.judge(PROMPTS[:1], TEXTS[:1]) == [Failed("gave nan")]


def test_positions_too_few_for_any_prompt(gpt2: Path) -> None:
    with pytest.raises(ModelError, match="reads 256 tokens, which leaves no room for a prompt"):
        FolderReward(str(gpt2), max_prompt_tokens=64, max_completion_tokens=255)


def test_a_folder_that_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no reward model that loads as a sequence classifier"):
        FolderReward(str(tmp_path), **LIMITS)


def test_a_base_model_without_a_head_is_refused(tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"has no weights for score.weight, which would be random"):
        FolderReward(str(tiny), **LIMITS, key="policy.rewards[0].source")


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path, tiny: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="gives 3 numbers a text; a reward model gives one"):
        FolderReward(str(tmp_path), **LIMITS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scores_on_a_gpu_are_those_of_the_cpu(gpt2: Path) -> None:
    found = judged(gpt2, device=torch.device("cuda"))
    assert found == pytest.approx(judged(gpt2), abs=1e-3)
