"""The pages as they are read: in Chromium, by keyboard, in the dark, on a telephone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axe_playwright_python", reason="needs the package axe-playwright-python")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from amenable.artifacts import RunFolder
from amenable.evaluate import comparison_page, many_runs, report

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]

Build = Callable[..., Path]
PAGES = ("report", "runs", "comparison")
FIRST_PAGE = "60 of 60 prompts, 1 to 50 of them below"
SECOND_PAGE = "60 of 60 prompts, 51 to 60 of them below"
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory,
    fake_run: Any,
    build_comparison: Callable[..., dict[str, Any]],
) -> dict[str, Path]:
    """One page of each kind."""
    root = tmp_path_factory.mktemp("pages")
    runs = [fake_run.build(root / f"run-{seed}", seed=seed, prompts=12) for seed in (0, 1)]
    run = fake_run.build(root / "run", prompts=60)
    short = fake_run.build(root / "short", prompts=4)
    for folder in (run, short):
        report.render(RunFolder(folder))
    systems, judges = ("base", "tuned", "best"), ("gpt-4.1", "people")
    build_comparison(root, systems=systems, judges=judges)
    build_comparison(root / "short", systems=systems, judges=judges, prompts=12)
    for folder in (root, root / "short"):
        comparison_page.render(folder)
    several = root / "runs.html"
    several.write_text(many_runs.page(runs, many_runs.gather(runs)), encoding="utf-8")
    return {
        "report": run / "report.html",
        "runs": several,
        "comparison": root / "comparison.html",
        "short report": short / "report.html",
        "short comparison": root / "short" / "comparison.html",
    }


@contextmanager
def opened(chromium: Browser, path: Path, **settings: Any) -> Iterator[Page]:
    """The page with no network."""
    context = chromium.new_context(offline=True, **settings)
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.goto(path.as_uri())
    yield page
    context.close()


def found_by_axe(page: Page, rules: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """Rule, impact and place of what axe-core calls serious or critical; all rules or some."""
    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if rules:
        options["runOnly"] = list(rules)
    violations = Axe().run(page, options=options).response["violations"]
    return [
        (rule["id"], rule["impact"], node["html"][:200])
        for rule in violations
        for node in rule["nodes"]
        if rule["impact"] in SERIOUS
    ]


# axe's own script is let in, which the pages' policy forbids
INJECTABLE = {"bypass_csp": True}


@pytest.mark.parametrize("name", ["short report", "runs", "short comparison"])
def test_axe_finds_nothing_serious(chromium: Browser, files: dict[str, Path], name: str) -> None:
    """All rules in the light, and those of contrast in the dark."""
    with opened(chromium, files[name], color_scheme="light", **INJECTABLE) as page:
        page.locator(".prompts > li:nth-child(n + 4)").evaluate_all(  # they are like the others
            "rows => rows.forEach(row => row.remove())"
        )
        page.locator("details.fold, .replies >> nth=0").evaluate_all(
            "folds => folds.forEach(fold => { fold.open = true; })"
        )
        if name != "runs":
            page.get_by_label("mark what differs").check()
        assert found_by_axe(page) == []
        page.emulate_media(color_scheme="dark")
        assert found_by_axe(page, ["color-contrast"]) == []


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("<p style='color: #aaa; background: #fff'>pale</p>", "color-contrast"),
        ("<select><option>a</option></select>", "select-name"),
        (
            "<table role='region' tabindex='0'><tr><td><img src='data:,'></td></tr></table>",
            "image-alt",
        ),
    ],
)
def test_axe_finds_what_is_planted(
    chromium: Browser, files: dict[str, Path], fault: str, rule: str
) -> None:
    with opened(chromium, files["runs"], **INJECTABLE) as page:
        page.locator("main").evaluate("(main, fault) => { main.innerHTML = fault; }", fault)
        assert rule in [found[0] for found in found_by_axe(page)]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_nothing_and_says_nothing(
    chromium: Browser, files: dict[str, Path], name: str
) -> None:
    """Under its own policy: no message in the console, no request but for the page itself."""
    said: list[str] = []
    asked: list[str] = []
    context = chromium.new_context()
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(files[name].as_uri())
    if name != "runs":
        expect(page.locator("#sample-count")).to_have_text(FIRST_PAGE)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [files[name].as_uri()]
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_no_page_is_wider_than_a_small_telephone(
    chromium: Browser, files: dict[str, Path], name: str
) -> None:
    with opened(chromium, files[name], viewport={"width": 320, "height": 640}) as page:
        wide = page.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= 320


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_without_a_script_all_samples_stand_there(
    chromium: Browser, files: dict[str, Path], name: str
) -> None:
    with opened(chromium, files[name], java_script_enabled=False) as page:
        assert page.locator(".prompts > li").count() == 60
        assert page.locator(".prompts > li:visible").count() == 60
        assert page.locator("#sample-tools").is_hidden()


def counted(page: Page, settings: Sequence[Mapping[str, str | int]]) -> list[int]:
    """Prompts that are found after each of these: fields that are set one after the other."""
    script = """settings => settings.map(fields => {
        for (const [name, value] of Object.entries(fields)) {
            const field = document.getElementById(name);
            field.value = value;
            field.dispatchEvent(new Event("input", { bubbles: true }));
        }
        return parseInt(document.getElementById("sample-count").textContent);
    })"""
    return list(page.evaluate(script, list(settings)))


def rows_of(files: dict[str, Path], name: str) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The comparisons that the page is about, and the answers by prompt."""
    folder = files[name].parent
    if name == "comparison":
        found = json.loads((folder / "comparison.json").read_text())["comparisons"]
        lines = (folder / "completions.jsonl").read_text().splitlines()
    else:
        found = json.loads((folder / "summary.json").read_text())["evaluate"]
        lines = (folder / "stages/evaluate/completions.jsonl").read_text().splitlines()
    return found, [json.loads(line)["completions"] for line in lines]


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_filters_count_what_the_figures_count(
    chromium: Browser, files: dict[str, Path], name: str
) -> None:
    """Of every pair and judge, either way round."""
    found, answers = rows_of(files, name)
    systems, judges = list(answers[0]), list(dict.fromkeys(row["judge"] for row in found))
    with opened(chromium, files[name]) as page:
        settings: list[dict[str, str | int]] = []
        expected = []
        for row in found:
            a, b = systems.index(row["a"]), systems.index(row["b"])
            pair: dict[str, str | int] = {"judge": judges.index(row["judge"])}
            for first, second, won, lost in ((a, b, "wins", "losses"), (b, a, "losses", "wins")):
                # a system that is chosen twice makes the other field change
                pair |= {"first": first, "second": second}
                settings += [pair | {"which": w} for w in ("won", "lost", "tied")]
                expected += [row[won], row[lost], row["ties"]]
            settings += [{"which": "same"}]
            expected += [sum(own[row["a"]] == own[row["b"]] for own in answers)]
            if name == "comparison":
                settings += [{"which": "contradicts"}, {"which": "open"}]
                expected += [round(row["bias"]["flips"] * row["prompts"]), row["left_out"]]
        assert counted(page, settings) == expected


ORDERS: dict[str, tuple[str, Callable[[Any], float]]] = {
    "gain": ("margins", lambda found: -found[0][2]),
    "loss": ("margins", lambda found: found[0][2]),
    "long": ("words", lambda found: -found[2]),
    "short": ("words", lambda found: found[2]),
    "longer": ("words", lambda found: found[1] - found[2]),
    "shorter": ("words", lambda found: found[2] - found[1]),
}
"""What each order makes rise, from what a row carries; the report begins with SFT and tuned."""


def test_samples_are_put_in_order(chromium: Browser, files: dict[str, Path]) -> None:
    with opened(chromium, files["report"]) as page:
        for order, (carried, value) in ORDERS.items():
            assert counted(page, [{"order": order}]) == [60]
            rows = page.locator(".prompts > li:not([hidden])").evaluate_all(
                "(rows, name) => rows.map(row => JSON.parse(row.dataset[name]))", carried
            )
            values = [value(row) for row in rows]
            assert len(values) == 50
            assert all(a <= b for a, b in pairwise(values)), order
            assert values[0] < values[-1]


def test_samples_are_found_and_turned_by_keyboard_alone(
    chromium: Browser, files: dict[str, Path]
) -> None:
    with opened(chromium, files["comparison"]) as page:
        first_of_all = page.locator(".prompts > li:visible .id").first.inner_text()
        page.locator("#find").focus()
        page.keyboard.type("LETTER-41")
        assert counted(page, [{}]) == [1]
        page.keyboard.press("Enter")
        for _ in range(4):  # to the filter, past the choice of systems and judge
            page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.id") == "which"
        page.keyboard.type("ties")
        assert counted(page, [{}]) in ([0], [1])
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.id") == "differences"
        page.keyboard.press("Space")
        page.get_by_role("button", name="Reset").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#sample-count")).to_have_text(FIRST_PAGE)
        assert page.locator("del, ins").count() == 0
        page.get_by_role("button", name="Next").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#sample-count")).to_have_text(SECOND_PAGE)
        assert page.evaluate("() => document.activeElement.id") == "sample-found"
        page.get_by_role("button", name="Previous").focus()
        page.keyboard.press("Enter")
        assert page.locator(".prompts > li:visible .id").first.inner_text() == first_of_all
        summary = page.locator(".replies summary").first
        summary.focus()
        page.keyboard.press("Enter")
        expect(page.locator(".looks").first).to_be_visible()


def test_choosing_a_system_twice_swaps_the_two(chromium: Browser, files: dict[str, Path]) -> None:
    with opened(chromium, files["report"]) as page:
        assert page.locator("#which option").nth(1).inner_text() == "tuned won"
        page.locator("#second").select_option("1")
        assert page.locator("#first").input_value() == "2"
        assert page.locator("#which option").nth(1).inner_text() == "SFT won"
        page.get_by_label("only these two").check()
        assert page.locator(".answers > div:visible").count() == 100


LONG = "same words " * 60
DIFFERENCES = [
    ("The old bridge is closed.", "The new bridge is closed.", "old", "new"),
    ("a b c d e", "a x c d", "b e", "x"),
    ("c d e", "a b c d e", "", "a b"),
    ("same", "same", "", ""),
    ("", "all of it", "", ""),  # nothing to compare with
    ("日本の橋", "日本の川", "橋", "川"),
    ("naïve.", "naïve!", ".", "!"),
    (f"{LONG}end of it", f"{LONG}end of all", "it", "all"),
    (f"{LONG}tail", f"head {LONG[:-1]}", "tail", "head"),
    ("a " * 1500 + "b", "c " * 1500, "a " * 1500 + "b", "c " * 1500),  # not searched
    ("x a " * 900, "a " * 1200, "x a " * 899 + "x", "a " * 1199),  # nor this, but for its end
    ("  <b>one</b>\n two", "  <b>one</b>\n\n two", "", ""),
]
"""Two texts, and the words that only the first and only the second has, derived by hand."""


def test_differences_are_marked_word_by_word(
    chromium: Browser, tmp_path: Path, build_comparison: Callable[..., dict[str, Any]]
) -> None:
    build_comparison(tmp_path, prompts=len(DIFFERENCES))
    path = tmp_path / "completions.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row, (a, b, _, _) in zip(rows, DIFFERENCES, strict=True):
        row["completions"] = {"base": a, "tuned": b}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    comparison_page.render(tmp_path)
    with opened(chromium, tmp_path / "comparison.html") as page:
        answers = page.locator(".answers dd")
        before = answers.all_text_contents()
        page.get_by_label("mark what differs").check()
        found = page.locator(".prompts > li").evaluate_all(
            """rows => rows.map(row => ["[data-system='0'] del", "[data-system='1'] ins"].map(
                marks => [...row.querySelectorAll(marks)].map(mark => mark.textContent)))"""
        )
        for (a, _, out, new), marks in zip(DIFFERENCES, found, strict=True):
            assert [" ".join(" ".join(words).split()) for words in marks] == [
                " ".join(out.split()),
                " ".join(new.split()),
            ], a[:40]
            if len(a) < 300:  # a longer one is cut in two, marks and all
                assert all(text == text.strip() for words in marks for text in words)
        assert answers.all_text_contents() == before, "the texts stay"
        page.get_by_label("mark what differs").uncheck()
        assert page.locator("del, ins").count() == 0
        assert answers.all_text_contents() == before


def test_marks_are_seen_without_colour(chromium: Browser, files: dict[str, Path]) -> None:
    with opened(chromium, files["report"]) as page:
        page.get_by_label("mark what differs").check()
        for tag, line in (("del", "line-through"), ("ins", "underline")):
            style = page.locator(tag).first.evaluate(
                "node => getComputedStyle(node).textDecorationLine"
            )
            assert style == line


def test_a_run_in_progress_is_loaded_again_unless_its_reader_is_busy(
    chromium: Browser, tmp_path: Path, build_run: Build
) -> None:
    """Some folds are open from the beginning, which keeps nobody busy."""
    run = build_run(tmp_path / "run", until="policy")
    (run / "stages/policy/state.json").write_text('{"status": "running"}')
    report.render(RunFolder(run))
    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.clock.install()
    page.goto((run / "report.html").as_uri())
    assert page.locator("details[open]").count() > 0
    with page.expect_event("load"):
        page.clock.fast_forward(20_001)
    page.locator("details:not([open]) > summary").first.click()
    loads: list[object] = []
    page.on("load", lambda page: loads.append(page))
    page.clock.fast_forward(20_001)
    page.wait_for_timeout(300)
    assert loads == []
    context.close()
