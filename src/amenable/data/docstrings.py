"""The built-in task: from the explanation in a Python docstring to its one-line summary.

The pairs are harvested at run time from the source of the standard library and of the packages that
come with Amenable's own dependencies: real text by people, nothing to download. Source is parsed,
never imported. The result depends on what is installed (`harvest_fingerprint`), and on nothing
else: not on the machine, the order of files on disk, or a seed.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from inspect import cleandoc
from pathlib import Path

from amenable.data.schemas import Demonstration, Message, Prompt, Speaker
from amenable.errors import DataError

SUMMARY_WORDS = (4, 14)
"""Fewest and most words of a summary."""

EXPLANATION_WORDS = 12
"""Fewest words of an explanation; the most is an argument of `harvest`."""


@dataclass(frozen=True, slots=True)
class Package:
    """One place to harvest. `distribution` empty: the standard library."""

    module: str
    distribution: str
    licence: str
    skip: tuple[str, ...] = ()


PACKAGES = (
    Package("python", "", "PSF-2.0", ("site-packages", "dist-packages", "idlelib", "turtledemo")),
    Package("accelerate", "accelerate", "Apache-2.0"),
    Package("anyio", "anyio", "MIT"),
    Package("fontTools", "fonttools", "MIT"),
    Package("huggingface_hub", "huggingface_hub", "Apache-2.0"),
    Package("jinja2", "Jinja2", "BSD-3-Clause"),
    Package("matplotlib", "matplotlib", "Matplotlib"),
    Package("mpl_toolkits", "matplotlib", "Matplotlib"),
    Package("networkx", "networkx", "BSD-3-Clause"),
    Package("numpy", "numpy", "BSD-3-Clause"),
    Package("peft", "peft", "Apache-2.0"),
    Package("rich", "rich", "MIT"),
    Package("scipy", "scipy", "BSD-3-Clause"),
    Package("sympy", "sympy", "BSD-3-Clause"),
    Package("tensorboard", "tensorboard", "Apache-2.0"),
    Package("torch", "torch", "BSD-3-Clause", ("_dynamo", "_functorch", "_inductor", "_native")),
    Package("transformers", "transformers", "Apache-2.0", ("models",)),
    Package("werkzeug", "Werkzeug", "BSD-3-Clause"),
)
"""What is harvested, in this order; one that is not installed is left out.

A literal table and not "everything installed": a test tool more or less in the environment must not
change the task. `transformers.models` is boilerplate repeated in hundreds of modules, which would
leak across any split; the skipped parts of torch are its compiler's inner notes.
"""

_SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "testing",
        "_vendor",
        "vendor",
        "vendored",
        "_vendored",
        "extern",
        "externals",
    }
    | {"_extern", "__pycache__", "examples", "benchmarks", "docs"}
)

_CANDIDATE = re.compile(
    r'"""\\?\s*[A-Z`:*\[](?:\S+[ \t]+){3,20}\S+\.[ \t]*\n'  # one sentence
    r"[ \t]*\n[ \t]+(?!\w+:?\s*\n)[A-Z`:*\[]"  # an empty line, more text than a heading
)
"""A file without this is not parsed: most are not."""

_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`(?:[^`<]*<)?[~!]?([^`<>]+)>?`")
_MARKDOWN_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")
_BRACKETED_NAME = re.compile(r"\[`[~!]?([^`\]]+)`\]")
_CITATION = re.compile(r"\s*\[[^\]\s]+\]_")
_HYPERLINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([A-Za-z][\w ]*)\*{1,2}(?![\w*])")
_QUOTES = re.compile(r"`+([^`]*?)(?:`+_{0,2}|(?<=\w)')")

_MARKED_UP = re.compile(r"[-*+•#>|@$\\{\[:]|\.\. |\d+[.)] |\(?[a-z0-9]\) |[=~^_]{3}")
"""How a line of a list, table, directive, field, doctest or heading begins."""

_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9_ ,;:.'\"()/!?%&-]*\Z")
_CODE = re.compile(
    r"https?:|\w\(\w+,|::|\.\.|[,;:]\.|(?<!\w)\.\w| [-/.,;:] |--|\w_\b|\(\s|\s\)|\s\(\)"
)
_UNWANTED = re.compile(
    r"(?:deprecated|todo|fixme|xxx|see|note|warning|copyright|licen[sc]ed?|internal|same as|alias"
    r"|example|usage|adapted from|not implemented|this is a placeholder)\b",
    re.IGNORECASE,
)


def harvest(max_words: int) -> list[Demonstration]:
    """Explanations and their one-line summaries, from every row of `PACKAGES` that is installed.

    A pair is kept when the summary is one capitalised sentence of 4 to 14 words and the plain prose
    below it, up to the first list, section, example or code, has 12 to `max_words` words.
    Cross-reference marks and back-quotes are removed. Of pairs with the same summary or the same
    explanation (case, numbers and acronyms apart) the first is kept; one whose explanation contains
    its summary is dropped.

    Args:
        max_words: longest explanation, in words; whole paragraphs are taken while they fit.

    Returns:
        Pairs in the order of `PACKAGES` and of file names. `id` is `package:module:object`, `group`
        the module; `prompt.meta` holds `package` and `licence`.

    Raises:
        DataError: `max_words` leaves no room for an explanation, or nothing was found.
    """
    if max_words < EXPLANATION_WORDS:
        raise DataError(
            f"max_words = {max_words} leaves no room: an explanation has {EXPLANATION_WORDS} words "
            f"or more; set data.max_words to at least {EXPLANATION_WORDS} (60 is the default)"
        )
    seen: set[str] = set()
    pairs: list[Demonstration] = []
    for package, root in installed_packages():
        for pair in _package_pairs(package, root, max_words):
            keys = {_key(pair.prompt.text), _key(pair.output_text)}
            if seen.isdisjoint(keys):
                seen |= keys
                pairs.append(pair)
    if not pairs:
        raise DataError(
            "no docstrings found: neither the standard library nor any known package is here as "
            'source; reinstall Amenable with its dependencies, or use data.task = "files"'
        )
    return pairs


def harvest_fingerprint() -> dict[str, str]:
    """Name and version of all that `harvest` reads here; where they are equal, it is as well."""
    return {package.module: _version(package) for package, _ in installed_packages()}


def installed_packages() -> list[tuple[Package, Path]]:
    """The rows of `PACKAGES` that are installed here, each with the folder of its source."""
    found = ((package, _root(package)) for package in PACKAGES)
    return [(package, root) for package, root in found if root is not None]


def docstring_pair(docstring: str, max_words: int) -> tuple[str, str] | None:
    """Explanation and summary from one docstring, or None where it has no such pair.

    Args:
        docstring: as written in the source, indentation included.
        max_words: longest explanation, in words.
    """
    paragraphs = re.split(r"\n[ \t]*\n", cleandoc(docstring))
    summary = _plain(paragraphs[0])
    if "\n" in paragraphs[0] or not _is_summary(summary):
        return None
    explanation = _explanation(paragraphs[1:], max_words)
    if explanation is None or summary.casefold() in explanation.casefold():
        return None
    return explanation, summary


def _key(text: str) -> str:
    """What makes two texts the same: "Wait on 2 CUDA streams." is "wait on an XPU streams"."""
    return " ".join(re.sub(r"[\W\d_]+|\b(?:an?|[A-Z]{2,})\b", " ", text).casefold().split())


def _package_pairs(package: Package, root: Path, max_words: int) -> Iterator[Demonstration]:
    for path in _source_files(root, package.skip):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        module = module.removesuffix("__init__").removesuffix(".")
        if package.distribution:
            module = f"{package.module}.{module}".removesuffix(".")
        for name, docstring in _docstrings(path):
            pair = docstring_pair(docstring, max_words)
            if pair is not None:
                yield _demonstration(package, module, name, *pair)


def _demonstration(
    package: Package, module: str, name: str, explanation: str, summary: str
) -> Demonstration:
    group = f"{package.module}:{module}"
    prompt = Prompt(
        messages=(Message(Speaker.USER, explanation),),
        id=f"{group}:{name}",
        group=group,
        meta={"package": package.module, "licence": package.licence},
    )
    return Demonstration(prompt=prompt, output_text=summary)


def _source_files(root: Path, skip: tuple[str, ...]) -> list[Path]:
    """Python files below `root` in the order of their names, tests and vendored copies left out."""
    unwanted = _SKIPPED_FOLDERS | set(skip)
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if unwanted.isdisjoint(path.relative_to(root).parts[:-1])
    ]


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of public classes and functions; none where it does not parse."""
    try:
        source = path.read_text(encoding="utf-8")
        if not _CANDIDATE.search(source):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    yield from _named_docstrings(tree, "")


def _named_docstrings(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    used: Counter[str] = Counter()
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        used[child.name] += 1
        again = f"#{used[child.name]}" if used[child.name] > 1 else ""
        if child.name.startswith("_") and not child.name.endswith("__"):
            continue
        docstring = ast.get_docstring(child, clean=False)
        if docstring:
            yield f"{prefix}{child.name}{again}", docstring
        if isinstance(child, ast.ClassDef):
            yield from _named_docstrings(child, f"{prefix}{child.name}{again}.")


def _plain(text: str) -> str:
    """One line of text without cross-reference marks, citations, emphasis and back-quotes."""
    text = " ".join(text.split())
    for pattern, replacement in (
        (_ROLE, r"\1"),
        (_HYPERLINK, r"\1"),
        (_CITATION, ""),
        (_BRACKETED_NAME, r"\1"),
        (_MARKDOWN_LINK, r"\1"),
        (_QUOTES, r"\1"),
        (_EMPHASIS, r"\1"),
    ):
        text = pattern.sub(replacement, text)
    return text


def _is_summary(text: str) -> bool:
    words = len(text.split())
    return (
        SUMMARY_WORDS[0] <= words <= SUMMARY_WORDS[1]
        and text.endswith(".")
        and not text.endswith("..")
        and _is_prose(text)
    )


def _is_prose(text: str) -> bool:
    """Whether it is plain ASCII sentences: no code, formula, address, notice or bare reference."""
    return bool(_SENTENCE.match(text)) and not _CODE.search(text) and not _UNWANTED.match(text)


def _explanation(paragraphs: list[str], max_words: int) -> str | None:
    """The paragraphs up to the first that is not prose, as many as fit; None if too few words."""
    taken: list[str] = []
    for paragraph in paragraphs:
        text = _plain(paragraph)
        if (
            _has_markup(paragraph)
            or not _is_prose(text)
            or not text.endswith((".", "!", "?", ".)"))
        ):
            break
        if len(" ".join([*taken, text]).split()) > max_words:
            break
        taken.append(text)
    explanation = " ".join(taken)
    return explanation if len(explanation.split()) >= EXPLANATION_WORDS else None


def _has_markup(paragraph: str) -> bool:
    return any(line[:1].isspace() or _MARKED_UP.match(line) for line in paragraph.splitlines())


def _root(package: Package) -> Path | None:
    """Folder of the package's source, found without importing it; None if it is not here."""
    if not package.distribution:
        root = Path(sysconfig.get_path("stdlib"))
        return root if root.is_dir() else None
    spec = util.find_spec(package.module)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _version(package: Package) -> str:
    if not package.distribution:
        return ".".join(str(part) for part in sys.version_info[:3])
    try:
        return metadata.version(package.distribution)
    except metadata.PackageNotFoundError:
        return "unknown"
