"""The pages say what the code does: keys, metrics, files, commands, links and tests that exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer

import amenable
from amenable.cli.main import app
from amenable.config.kfp import KfpConfig
from amenable.config.load import load_recipe, recipe_keys
from amenable.pipeline.summary import COMPARISON, SECTIONS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "amenable"
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
METRICS = (DOCS / "metrics.md").read_text(encoding="utf-8")

WRITERS = {
    "sft": ("train/sft.py", "train/loop.py"),
    "reward": ("train/reward.py", "train/loop.py"),
    "policy": (
        "train/on_policy.py",
        "train/experience.py",
        "train/scoring.py",
        "train/passes.py",
        "train/ppo.py",
        "train/policy_gradient.py",
        "train/online_preference.py",
        "train/best_of_n.py",
        "train/off_policy.py",
    ),
}
"""Which modules write the metrics of a stage."""

KNOWN = {
    "sft": {"loss", "eval_loss", "learning_rate", "grad_norm"},
    "reward": {"rank_loss", "eval_accuracy", "margin", "learning_rate"},
    "policy": {"reward", "kl_loss", "gold", "objective", "value_loss", "ratio_max", "passes"},
}
"""Some that `written_metrics` must find, one of each way to write them."""

RESULTS = {
    "summary.json": (
        ("pipeline/summary.py", "summary", "_stage"),
        ("data/stage.py", "summary"),
        ("train/sft.py", "run"),
        ("rollout/collect.py", "run"),
        ("train/reward.py", "run"),
        ("evaluate/reward_report.py", "reward_report", "_accuracy", "_baselines", "_calibration"),
        ("evaluate/reward_report.py", "_by_length", "_slices"),
        ("train/on_policy.py", "summary"),
        ("train/off_policy.py", "run"),
        ("train/tuned_samples.py", "sample_tuned"),
        ("evaluate/side_by_side.py", "compare", "_counts"),
    ),
    "headroom.json": (("train/headroom.py", "report_headroom"),),
    "diversity.json": (("evaluate/stage.py", "_answers"),),
    "completions.jsonl": (("evaluate/stage.py", "_rows"),),
    "data/report.json": (
        ("data/stage.py", "summary", "report", "_describe", "_met"),
        ("data/quality.py", "quality"),
    ),
    "policy": (
        ("train/experience.py", "sample_rows"),
        ("train/scoring.py", "judge"),
        ("train/tuned_samples.py", "_rows"),
    ),
}
"""Heading of docs/metrics.md -> functions whose dictionaries it describes."""

TEXTS = {"prompt"}
"""Among the names of texts whose lengths data/report.json tells: no key of the report itself."""


def recipe_page() -> ModuleType:
    return script("build_recipe_page.py")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", DOCS / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def blocks(page: Path, language: str = r"\w*") -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def section(text: str, heading: str) -> str:
    """What stands under a level-two heading."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    assert found, f"no heading {heading!r}"
    return found[1]


# Recipe ---------------------------------------------------------------------------------------


def test_recipe_page_is_up_to_date() -> None:
    page = (DOCS / "recipe.md").read_text(encoding="utf-8")
    assert page == recipe_page().page(), "run: python docs/build_recipe_page.py"


def test_health_page_is_up_to_date() -> None:
    page = (DOCS / "health.md").read_text(encoding="utf-8")
    assert page == script("build_health_page.py").page(page), (
        "run: python docs/build_health_page.py"
    )


def test_scaling_page_is_up_to_date() -> None:
    pytest.importorskip("torch")
    page = (DOCS / "scaling.md").read_text(encoding="utf-8")
    assert page == script("build_scaling_page.py").page(page), (
        "run: python docs/build_scaling_page.py"
    )


def test_recipe_page_has_every_key_in_its_section() -> None:
    page = (DOCS / "recipe.md").read_text(encoding="utf-8")
    for key in recipe_keys():
        place, _, name = key.key.rpartition(".")
        title = f"[[{place[:-2]}]]" if place.endswith("[]") else f"[{place}]"
        text = section(page, title if place else "Top level")
        assert f"| `{name}` |" in text, key.key
        assert " ".join(key.help.split()).replace("|", "\\|") in text, key.key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_pages_load(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(page, "toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(text, encoding="utf-8")
        load_recipe(path)


def test_keys_that_pages_name_exist() -> None:
    """Backquoted `section.key` and `--set section.key=` in any page."""
    known = {key.key for key in recipe_keys()}
    known |= {key.rsplit(".", 1)[0] for key in known if "." in key}
    sections = "model|data|sft|collect|reward|policy|evaluate"
    named = rf"(?:`|--set )((?:{sections})(?:\.[a-z_]+)+)(?=[`= ])"
    for page in PAGES:
        for key in re.findall(named, page.read_text(encoding="utf-8")):
            assert key in known, f"{page.name} names {key}"


# Metrics --------------------------------------------------------------------------------------


def dict_keys(node: ast.AST) -> Iterator[str]:
    """Texts that are keys of dictionaries in the node, functions inside it left out."""
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, ast.FunctionDef | ast.Lambda):
            yield from dict_keys(inner)
    if isinstance(node, ast.Dict):
        for key in node.keys:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value


def parse(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"))


def written_metrics(tree: ast.Module) -> set[str]:
    """Names of the figures that a training module hands to its log.

    They are the keys of dictionaries in functions that return `Metrics` and in lambdas given as
    `evaluate=`, the names given to `totals.add` and to `metrics[...] =`, and keywords of `.write`.
    """
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(returns=ast.Name(id="Metrics")):
                found |= set(dict_keys(node))
            case ast.keyword(arg="evaluate", value=ast.Lambda() as function):
                found |= set(dict_keys(function))
            case ast.Call(
                func=ast.Attribute(attr="add", value=ast.Name(id="totals")),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found.add(name)
            case ast.Assign(
                targets=[
                    ast.Subscript(
                        value=ast.Name(id="metrics") | ast.Attribute(attr="_metrics"),
                        slice=ast.Constant(value=str(name)),
                    )
                ]
            ):
                found.add(name)
            case ast.Call(func=ast.Attribute(attr="write"), keywords=keywords):
                found |= {word.arg for word in keywords if word.arg is not None}
    return found


@pytest.mark.parametrize("stage", WRITERS)
def test_every_metric_is_defined_and_no_other(stage: str) -> None:
    written = set().union(*(written_metrics(parse(name)) for name in WRITERS[stage]))
    assert KNOWN[stage] <= written, "written_metrics overlooks a way to write"
    rows = re.findall(rf"^\| `{stage}/(\w+)` \| [^|]+ \| [^|]{{20,}} \|$", METRICS, flags=re.M)
    assert len(rows) == len(set(rows))
    assert set(rows) == written


def test_metrics_of_the_reading_guide_exist() -> None:
    for name in ("reward/rank_loss", "policy/kl_loss", "policy/reward"):
        assert f"| `{name}` |" in METRICS
        assert f"| `{name.split('/')[1]}` (" in section(METRICS, "How to read the curves")


def result_keys(name: str, *functions: str) -> set[str]:
    nodes = [n for n in ast.walk(parse(name)) if isinstance(n, ast.FunctionDef)]
    chosen = [node for node in nodes if node.name in functions]
    assert {node.name for node in chosen} == set(functions), f"{name} has other functions now"
    return {key for node in chosen for key in dict_keys(node)}


@pytest.mark.parametrize("heading", RESULTS)
def test_every_key_of_a_result_is_described(heading: str) -> None:
    text = section(METRICS, heading)
    wanted = set().union(*(result_keys(*source) for source in RESULTS[heading]))
    assert len(wanted) >= 3
    assert sorted(key for key in wanted - TEXTS if f"`{key}`" not in text) == []


def test_every_key_of_the_contract_is_described() -> None:
    text = section(METRICS, "summary.json")
    keys = {key for keys in SECTIONS.values() for key in keys} | set(COMPARISON) | set(SECTIONS)
    assert sorted(key for key in keys if f"`{key}`" not in text) == []


# The package ----------------------------------------------------------------------------------


def readme_tree() -> set[str]:
    """Paths in the README's tree, relative to the package; every line has a description."""
    (tree,) = [text for text in blocks(ROOT / "README.md") if text.startswith("src/amenable/")]
    folders, found = [""], set()
    for line in tree.splitlines()[1:]:
        match = re.fullmatch(r"( +)(\S+)(?: +(\S.+))?", line)
        assert match, f"no file with a description: {line!r}"
        depth, name = len(match[1]) // 2 - 1, match[2]
        if name.endswith("/"):
            folders[depth + 1 :] = [folders[depth] + name]
            continue
        assert match[3], f"no description: {line!r}"
        path = folders[depth] + name
        assert path not in found, f"{path} is named twice"
        found.add(path)
    return found


def test_readme_tree_names_exactly_the_files() -> None:
    ignored = {"__pycache__"}
    files = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and ignored.isdisjoint(path.parts)
    }
    assert readme_tree() == {name for name in files if not name.endswith("/__init__.py")}


def test_image_is_built_of_the_tested_versions() -> None:
    """Dockerfile, Makefile and recipe name one image, one torch and one kfp."""
    dockerfile, makefile = ((ROOT / name).read_text() for name in ("Dockerfile", "Makefile"))
    assert KfpConfig().image == f"amenable:{amenable.__version__}"
    assert set(re.findall(r"amenable:[\d.]+", dockerfile)) == {KfpConfig().image}
    assert f"IMAGE ?= {KfpConfig().image}\n" in makefile
    for name in ("TORCH", "KFP"):
        (version,) = re.findall(rf"^{name} \?= (\S+==\S+)$", makefile, flags=re.M)
        assert f"ARG {name}={version}\n" in dockerfile
        assert f'"${name}"' in dockerfile
    assert dockerfile.rindex("USER amenable") > dockerfile.rindex("RUN ")


# Commands, links, tests -----------------------------------------------------------------------


def commands() -> dict[str, set[str]]:
    """Every command line that exists -> its options."""
    root = typer.main.get_command(app)
    found: dict[str, set[str]] = {}

    def collect(command: object, words: str) -> None:
        options = {name for param in command.params for name in param.opts}  # type: ignore[attr-defined]
        found[words] = options | {"--help", "--debug", "--version"}
        for name, inner in getattr(command, "commands", {}).items():
            collect(inner, f"{words} {name}")

    collect(root, "amenable")
    return found


def quoted_commands(page: Path, program: str) -> list[str]:
    """Command lines of a program in code spans and fenced blocks, comments cut off."""
    text = page.read_text(encoding="utf-8")
    spans = re.findall(rf"`({program} [^`\n]+)`", prose(page))
    lines = re.findall(rf"^(?:.*/)?({program} .+)$", "\n".join(blocks(page)), flags=re.M)
    assert program in text or not (spans or lines)
    return [line.split(" #")[0].strip() for line in (*spans, *lines)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    known = commands()
    for line in quoted_commands(page, "amenable"):
        for name in line.replace("|", " ").split()[1:2]:
            assert f"amenable {name}" in known, f"{page.name}: {line}"
        words = " ".join(line.split()[:3])
        command = words if words in known else " ".join(line.split()[:2])
        for option in re.findall(r"(?<!\S)--[a-z-]+", line):
            assert option in known[command], f"{page.name}: {line}"


def test_readme_names_every_command() -> None:
    groups = ("amenable", "amenable data", "amenable models", "amenable lab", "amenable kfp")
    leaves = [name for name in commands() if name not in groups]
    assert len(leaves) >= 6
    assert [name for name in leaves if f"`{name}" not in README] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {"demo", "test", "install"} <= targets
    for line in quoted_commands(page, "make"):
        assert line.split()[1] in targets, f"{page.name}: {line}"


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def links(page: Path) -> list[str]:
    return [
        target
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))
        if not target.startswith(("http://", "https://"))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def test_index_leads_to_every_page() -> None:
    linked = {(DOCS / target.partition("#")[0]).resolve() for target in links(DOCS / "index.md")}
    assert set(DOCS.rglob("*.md")) - {DOCS / "index.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_and_sources_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        source = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in source, f"{page.name} names {path}::{name}"
    folders = "config|data|models|rollout|losses|train|evaluate|pipeline|cli"
    for path, name in re.findall(rf"`((?:{folders})/\w+\.py)(?::(\w+))?`", text):
        source = (PACKAGE / path).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in source, f"{page.name} names {path}:{name}"


def test_ppo_page_has_all_details_in_order() -> None:
    text = section((DOCS / "algorithms" / "ppo.md").read_text(encoding="utf-8"), "The 39 details")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.M)
    assert [int(row[0]) for row in rows] == list(range(1, 40))
    for row in rows:
        assert "::test_" in row[4] or "not yet" in row[4] or row[3].strip() == "–", row[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_is_left_open(page: Path) -> None:
    assert re.findall(r"@@FIGURE:[^@]*@@", page.read_text(encoding="utf-8")) == []
