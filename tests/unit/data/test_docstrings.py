from __future__ import annotations

import importlib.util
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from amenable.data import docstrings
from amenable.data.docstrings import (
    PACKAGES,
    Package,
    docstring_pair,
    harvest,
    harvest_fingerprint,
    installed_packages,
)
from amenable.data.schemas import Demonstration
from amenable.errors import DataError

SUMMARY = "Return the larger of two numbers."
PROSE = "Both have to be finite, because no order is defined for the others, and of equal ones."
STDLIB = (PACKAGES[0],)


def pair_of(*paragraphs: str, max_words: int = 60) -> tuple[str, str] | None:
    return docstring_pair("\n\n".join(paragraphs), max_words)


def test_a_pair_is_the_prose_and_the_line_above_it() -> None:
    source = f"""{SUMMARY}

        Both have to be finite, because no order is defined
        for the others, and of equal ones.

        The first wins.

        Args:
            a: one number.
    """
    assert docstring_pair(source, 60) == (f"{PROSE} The first wins.", SUMMARY)


def test_whole_paragraphs_are_taken_while_they_fit() -> None:
    assert pair_of(SUMMARY, PROSE, "The first wins.", max_words=20) == (
        f"{PROSE} The first wins.",
        SUMMARY,
    )
    assert pair_of(SUMMARY, PROSE, "The first wins.", max_words=17) == (PROSE, SUMMARY)
    assert pair_of(SUMMARY, PROSE, max_words=16) is None


@pytest.mark.parametrize(
    "stop",
    [
        "Args:\n    a: one.",
        "Parameters\n----------\na : int",
        ":param a: one of them.",
        "- a list item.",
        "1. a numbered item.",
        ">>> larger(1, 2)",
        ".. note:: not prose.",
        "    indented = code(1).",
        "It is used like this:",
        "Deprecated since the last version.",
        "See the other function.",
        "It is max(a, b).",
        "It is a == b.",
        "Details at https://example.org.",
        "a lower-case start.",
        "Naïve characters.",
    ],
)
def test_prose_ends_at_markup_code_and_notices(stop: str) -> None:
    assert pair_of(SUMMARY, PROSE, stop, "The first wins.") == (PROSE, SUMMARY)


@pytest.mark.parametrize(
    "summary",
    [
        "Return it now.",  # 3 words
        "Return " + "very " * 13 + "much.",  # 15 words
        "Return the larger of two numbers",
        "Return the larger of two numbers...",
        "return the larger of two numbers.",
        "Return the larger\nof two numbers.",
        "Deprecated alias of another function.",
        "Return {a} or the other one.",
    ],
)
def test_a_summary_that_is_no_plain_sentence_makes_no_pair(summary: str) -> None:
    assert pair_of(summary, PROSE) is None


def test_too_short_missing_or_revealing_explanations_make_no_pair() -> None:
    assert pair_of(SUMMARY) is None
    assert pair_of(SUMMARY, "The first wins.") is None
    assert pair_of(SUMMARY, f"{PROSE} {SUMMARY.upper().title()}") is None
    assert pair_of("", PROSE) is None


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("a :class:`~torch.Tensor` here", "a torch.Tensor here"),
        ("a :py:func:`the sum <pkg.sum>` here", "a pkg.sum here"),
        ("a ``dict`` or `list` here", "a dict or list here"),
        ("old `quoting' here", "old quoting here"),
        ("the paper [1]_ here", "the paper here"),
        ("the `site <https://x.org>`_ here", "the site here"),
        ("the [`~PeftModel`] here", "the PeftModel here"),
        ("the [guide](https://x.org) here", "the guide here"),
        ("*a* and **b c** here", "a and b c here"),
    ],
)
def test_marks_are_removed(marked: str, plain: str) -> None:
    pair = pair_of(SUMMARY, f"{PROSE} It takes {marked}.")
    assert pair is not None
    assert pair[0] == f"{PROSE} It takes {plain}."


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that must not be imported, as the one source of the harvest."""
    root = tmp_path / "orchard"
    root.mkdir()
    (root / "__init__.py").write_text("raise SystemExit('imported')\n", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    table = (Package("orchard", "orchard-dist", "MIT", ("skipped",)), Package("nowhere", "no", ""))
    monkeypatch.setattr(docstrings, "PACKAGES", table)
    return root


def define(
    name: str, summary: str, explanation: str = PROSE, kind: str = "def", pad: str = ""
) -> str:
    opening = f"{pad}{kind} {name}():" if kind == "def" else f"{pad}class {name}:"
    return f'{opening}\n{pad}    """{summary}\n\n{pad}    {explanation}\n{pad}    """\n\n'


def numbered(number: str) -> tuple[str, str]:
    return f"Return the {number} of all numbers.", f"{PROSE} It takes the {number} first."


def test_harvest_names_pairs_by_package_module_and_object(package: Path) -> None:
    (package / "pick.py").write_text(
        define("first", *numbered("first"))
        + define("_hidden", *numbered("hidden"))
        + define("Basket", *numbered("biggest"), kind="class")
        + define("__len__", *numbered("length"), pad="    ")
        + define("first", *numbered("newest"))
        + "def bare():\n    pass\n",
        "utf-8",
    )
    pairs = harvest(60)
    assert [pair.prompt.id for pair in pairs] == [
        "orchard:orchard.pick:first",
        "orchard:orchard.pick:Basket",
        "orchard:orchard.pick:Basket.__len__",
        "orchard:orchard.pick:first#2",
    ]
    assert {pair.prompt.group for pair in pairs} == {"orchard:orchard.pick"}
    assert pairs[0].prompt.meta == {"package": "orchard", "licence": "MIT"}
    assert (pairs[0].output_text, pairs[0].prompt.text) == numbered("first")
    assert harvest(60) == pairs
    assert "orchard" not in sys.modules


def test_harvest_leaves_out_tests_unparsable_files_and_repeats(package: Path) -> None:
    for folder in ("tests", "skipped", "sub"):
        (package / folder).mkdir()
        (package / folder / "m.py").write_text(define("f", *numbered(folder)), "utf-8")
    (package / "sub" / "__init__.py").write_text(define("g", *numbered("package")), "utf-8")
    (package / "a_broken.py").write_text(define("f", *numbered("broken")) + "def (", "utf-8")
    (package / "b_latin.py").write_bytes(b"# \xe9\n" + define("f", *numbered("x")).encode())
    (package / "z_same.py").write_text(
        define("f", numbered("SUB")[0], numbered("other")[1])  # another summary in capitals only
        + define("g", numbered("other")[0], numbered("sub")[1])  # the same explanation
        + define("h", "Wait for 2 CUDA streams to end.", numbered("2nd stream")[1])
        + define("i", "Wait for 3 XPU streams to end.", numbered("waiting one")[1]),
        "utf-8",
    )
    assert [pair.prompt.id for pair in harvest(60)] == [
        "orchard:orchard.sub:g",
        "orchard:orchard.sub.m:f",
        "orchard:orchard.z_same:f",
        "orchard:orchard.z_same:h",
    ]


def test_harvest_refuses_too_few_words_and_an_empty_house(package: Path) -> None:
    with pytest.raises(DataError, match=r"max_words = 11 leaves no room.*at least 12 \(60 is"):
        harvest(11)
    with pytest.raises(DataError, match=r'no docstrings found.*use data\.task = "files"'):
        harvest(60)


def test_fingerprint_holds_what_is_installed(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert harvest_fingerprint() == {"orchard": "unknown"}
    table = (*STDLIB, Package("pytest", "pytest", "MIT"))
    monkeypatch.setattr(docstrings, "PACKAGES", table)
    assert harvest_fingerprint() == {
        "python": ".".join(map(str, sys.version_info[:3])),
        "pytest": metadata.version("pytest"),
    }


def test_a_standard_library_without_source_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "PACKAGES", STDLIB)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/no/such/folder")
    assert installed_packages() == []


def check_quality(pairs: list[Demonstration], max_words: int) -> None:
    for pair in pairs:
        explanation, summary = pair.prompt.text, pair.output_text
        assert 12 <= len(explanation.split()) <= max_words
        assert 4 <= len(summary.split()) <= 14
        assert (explanation + summary).isascii()
        assert not set("`{}<>=\\\n") & set(explanation + summary)
        assert summary[0].isupper()
        assert summary.endswith(".")
        assert summary.casefold() not in explanation.casefold()
    for texts in ([p.prompt.text for p in pairs], [p.output_text for p in pairs]):
        assert len({text.casefold() for text in texts}) == len(pairs)
    assert len({pair.prompt.id for pair in pairs}) == len(pairs)


def test_harvest_of_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "PACKAGES", STDLIB)
    pairs = harvest(40)
    assert len(pairs) > 300
    check_quality(pairs, 40)
    found = {pair.prompt.id: pair.output_text for pair in pairs}
    assert found["python:shutil:copy2"] == "Copy data and metadata. Return the file's destination."


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the other packages are not installed"
)
def test_harvest_of_the_whole_installation_has_two_thousand_pairs() -> None:
    pairs = harvest(60)
    assert len(pairs) > 2000
    check_quality(pairs, 60)
