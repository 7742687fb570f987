from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from amenable.artifacts import RunFolder
from amenable.evaluate import pages, report, report_data

Build = Callable[..., Path]


class Page(HTMLParser):
    """Tags, figures, and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._skip = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skip = tag in ("script", "style")
        if tag == "data":
            self.figures.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._skip = False

    def handle_data(self, data: str) -> None:
        if self._skip:
            return
        self.text += data
        if self.tags and self.tags[-1][0] == "data" and self.figures[-1][1] == "":
            self.figures[-1] = (self.figures[-1][0], data)


def render(root: Path) -> tuple[str, Page]:
    report.render(RunFolder(root))
    html = (root / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture
def finished(tmp_path: Path, build_run: Build) -> Path:
    return build_run(tmp_path / "demo", prompts=40)


def test_every_figure_equals_the_summary(finished: Path) -> None:
    _, page = render(finished)
    summary = json.loads((finished / "summary.json").read_text())
    assert len(page.figures) > 80
    for attributes, text in page.figures:
        value: Any = summary
        for part in str(attributes["data-key"]).split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        assert float(str(attributes["value"])) == value
        shown = text.replace("−", "-").replace("\u202f", "").replace("\u00a0", " ")
        style = attributes["data-style"]
        if style in ("percent", "bare", "points"):
            assert float(shown.split()[0]) == pytest.approx(100 * value, abs=0.0501)
        elif style in ("number", "fixed", "integer", "gb"):
            assert float(shown.split()[0]) == pytest.approx(value, rel=5e-3, abs=5.01e-4)


def test_page_shows_every_section(finished: Path) -> None:
    _, page = render(finished)
    headings = (
        "Health",
        "Policy",
        "Reward model",
        "Supervised fine-tuning",
        "Samples",
        "Run",
        "Provenance",
    )
    for heading in (
        *headings,
        "rank_loss",
        "kl_loss",
        "calibration",
        "Headroom",
        "distinct-2",
        "Recipe",
    ):
        assert heading in page.text


def test_reward_model_by_length_and_slice(finished: Path, fake_run: ModuleType) -> None:
    html, page = render(finished)
    for words in (
        "reward model, equal lengths (61 pairs)",
        "reward model, longer and shorter winners alike",
        "the shorter one is better",
        "prompt length: longest",
        "Best of n samples by the reward model",
    ):
        assert words in page.text
    shown = {str(attributes["data-key"]): text for attributes, text in page.figures}
    assert shown["reward.length_balanced_accuracy"] == "76.2"
    assert shown["reward.slices.4.accuracy_ci95.1"] == "87.0"
    assert shown["reward.slices.0.p_holm"] == "0.002"
    assert shown["reward.accuracy_p_value"] == "<\u00a00.001"
    assert "<script>alert" not in html, "tags are text"
    assert fake_run.HOSTILE in fake_run.SLICES[4]


def test_a_run_of_before_these_figures_has_a_page(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    old = ("pairs_", "ties_", "accuracy_ci95", "longest", "shortest", "bag", "ece", "temperature")
    kept = (*old, "brier", "log_loss", "length_correlation", "by_margin", "calibration")
    reward = {k: v for k, v in summary["reward"].items() if k == "accuracy" or k.startswith(kept)}
    assert "slices" not in reward
    assert "accuracy_p_value" not in reward
    (finished / "summary.json").write_text(json.dumps(summary | {"reward": reward}))
    headroom = finished / "stages/policy/headroom.json"
    found = json.loads(headroom.read_text())
    del found["by_reward_model"]
    headroom.write_text(json.dumps(found))
    text = render(finished)[1].text
    assert "the longer one wins" in text
    assert "Where it is right" not in text
    assert "Best of n samples by" not in text


def test_page_says_that_the_annotator_is_simulated(tmp_path: Path, build_run: Build) -> None:
    simulated = render(build_run(tmp_path / "a", prompts=10))[1].text
    assert "The annotator is a simulation" in simulated
    assert "picks the other one in 10% of its choices" in simulated
    people = render(build_run(tmp_path / "b", prompts=10, annotator="none"))[1].text
    assert "simulat" not in people


def test_page_is_self_contained_and_small(tmp_path: Path, build_run: Build) -> None:
    html, page = render(build_run(tmp_path / "demo", prompts=400))
    assert len(html.encode()) < 2_000_000
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "img")
        assert "style" not in attributes
        for name in ("src", "href"):
            target = attributes.get(name) or ""
            assert not target or target.startswith(("#", "data:"))
    assert not re.search(r"\son\w+=", re.sub(r">[^<]*<", "><", html))


def test_policy_vouches_for_the_inline_parts_and_nothing_else(finished: Path) -> None:
    html, page = render(finished)
    policy = next(
        a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert body is not None
        digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_model_text_stays_text(finished: Path, fake_run: ModuleType) -> None:
    html, page = render(finished)
    assert "<script>alert" not in html
    assert "onerror=alert(1)&gt;" in html
    assert "\u202e" not in html
    assert "⟨U+202E⟩gnp.exe⟨U+001B⟩[31m" in page.text
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert fake_run.HOSTILE.startswith("<script>")


def test_templates_never_trust_text() -> None:
    for path in pages.TEMPLATES.glob("*.html"):
        assert "|safe" not in path.read_text(encoding="utf-8").replace(" ", ""), path.name


@pytest.mark.parametrize(
    ("until", "words"), [("policy", "policy"), ("reward", "policy"), ("sft", "policy")]
)
def test_a_partial_run_has_a_page(tmp_path: Path, build_run: Build, until: str, words: str) -> None:
    """The fake run has curves of all stages: one without a status counts as running."""
    _, page = render(build_run(tmp_path / "run", until=until))
    assert f"{words} stage" in " ".join(page.text.split())
    assert "no comparison of models yet" in page.text


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    _, page = render(tmp_path)
    assert "Not complete" in page.text


def test_a_torn_folder_has_a_page(finished: Path) -> None:
    (finished / "summary.json").write_text('{"evaluate": [')
    (finished / "recipe.toml").write_text("= broken")
    with (finished / "stages/policy/metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "policy/rew')
    render(finished)


def test_a_failed_stage_says_why(tmp_path: Path, build_run: Build) -> None:
    root = build_run(tmp_path / "run", until="policy")
    state = {"status": "failed", "error": "loss is not finite at update 7 <b>"}
    (root / "stages/policy/state.json").write_text(json.dumps(state))
    html, page = render(root)
    assert "The policy stage failed" in " ".join(page.text.split())
    assert "loss is not finite at update 7 &lt;b&gt;" in html


def test_a_running_stage_offers_to_reload(tmp_path: Path, build_run: Build) -> None:
    root = build_run(tmp_path / "run", until="policy")
    (root / "stages/policy/state.json").write_text('{"status": "running"}')
    assert 'id="reload"' in render(root)[0]


def _entry(a: str, judge: str, low: float, high: float) -> dict[str, Any]:
    return {
        "a": a,
        "b": "tuned",
        "judge": judge,
        "win_rate": (low + high) / 2,
        "win_rate_ci95": [low, high],
    }


@pytest.mark.parametrize(
    ("low", "high", "verdict", "words"),
    [
        (0.52, 0.6, "better", "wholly above 50"),
        (0.4, 0.48, "worse", "wholly below 50"),
        (0.48, 0.57, "unclear", "not significant"),
    ],
)
def test_headline_reads_the_interval(
    finished: Path, low: float, high: float, verdict: str, words: str
) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    summary["evaluate"] = [
        _entry("base", "annotator", 0.8, 0.9),
        _entry("sft", "reward_model", 0.9, 0.95),
        _entry("sft", "annotator", low, high),
    ]
    (finished / "summary.json").write_text(json.dumps(summary))
    assert report_data.verdict(summary["evaluate"][2]) == verdict
    lead = report_data.headline(report_data.comparisons(report_data.read_run(RunFolder(finished))))
    assert [c["index"] for c in lead] == [2, 0]
    _, page = render(finished)
    assert words in page.text


def test_same_run_same_bytes(finished: Path) -> None:
    assert render(finished)[0] == render(finished)[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tab\tand\nline", "tab\tand\nline"),
        ("\x00\x1b", "⟨U+0000⟩⟨U+001B⟩"),
        ("\u200b\u2066\ufeff\u2028", "⟨U+200B⟩⟨U+2066⟩⟨U+FEFF⟩⟨U+2028⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("naïve 日本 👩‍💻", "naïve 日本 👩‍💻"),
    ],
)
def test_hidden_characters_are_spelled_out(text: str, shown: str) -> None:
    assert pages.visible(text) == shown


def test_clip_loses_nothing_below_the_limit() -> None:
    text = "word " * 300
    head, rest, left_out = pages.clip(text, 100)
    assert head + rest == text
    assert len(head) <= 100
    assert left_out == 0
    assert pages.clip("x" * 5000, 100)[2] == 1000
    assert pages.clip("short", 100) == ("short", "", 0)


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (None, "percent", "–"),
        (0.6171, "percent", "61.7\u00a0%"),
        (-0.05, "number", "−0.05"),
        (3840, "integer", "3\u202f840"),
        (4.25, "duration", "4.2\u00a0s"),
        (511.3, "duration", "8\u00a0min 31\u00a0s"),
        (7500, "duration", "2\u00a0h 05\u00a0min"),
        (0.0002, "p", "<\u00a00.001"),
        (0.0211, "p", "0.021"),
        ("text\x07", "number", "text⟨U+0007⟩"),
    ],
)
def test_values_are_shown_in_words(value: object, style: str, text: str) -> None:
    assert pages.show(value, style) == text


def test_lookup_of_what_is_not_there_is_none() -> None:
    assert pages.lookup({"a": [{"b": 1}]}, "a.0.b") == 1
    for key in ("a.1.b", "a.x", "c", "a.0.b.d"):
        assert pages.lookup({"a": [{"b": 1}]}, key) is None


def test_model_cards(finished: Path) -> None:
    shutil.rmtree(finished / "models/sft")
    paths = report.write_model_cards(RunFolder(finished))
    assert [path.parent.name for path in paths] == ["reward", "tuned"]
    reward, tuned = (path.read_text(encoding="utf-8") for path in paths)
    for card in (reward, tuned):
        assert card.startswith('---\nbase_model: "HuggingFaceTB/SmolLM2-135M-Instruct"\n')
        assert "The annotator of this run is a simulation" in card
    summary = json.loads((finished / "summary.json").read_text())
    assert f"{100 * summary['evaluate'][2]['win_rate']:.1f}\u00a0%" in tuned
    assert "AutoModelForCausalLM" in tuned
    assert f"{100 * summary['reward']['accuracy']:.1f}\u00a0%" in reward
    assert "AutoModelForSequenceClassification" in reward
    assert "reward_offset" in reward


def test_model_card_says_that_the_base_was_quantised(finished: Path) -> None:
    said = "It was trained on the base in nf4, and is merged into the base's original weights."
    for recipe, found in (("", False), ('model.quantise = "nf4"\n', True)):
        (finished / "recipe.toml").write_text(recipe, encoding="utf-8")
        report.write_model_cards(RunFolder(finished))
        text = (finished / "models/tuned/README.md").read_text(encoding="utf-8")
        assert (said in text) == found


def test_model_card_of_a_run_without_figures(tmp_path: Path) -> None:
    (tmp_path / "models/sft").mkdir(parents=True)
    (path,) = report.write_model_cards(RunFolder(tmp_path))
    assert "supervised fine-tuned model" in path.read_text(encoding="utf-8")


def test_hostile_names_cannot_break_the_card(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    summary["name"] = "a|b\n# c <script>"
    (finished / "summary.json").write_text(json.dumps(summary))
    report.write_model_cards(RunFolder(finished))
    text = (finished / "models/tuned/README.md").read_text(encoding="utf-8")
    assert "# a\\|b \\# c \\<script\\>: policy" in text
