"""What a run's tokenizer makes of its rows: lengths, cuts, ends, boundaries and what is wrong.

It looks at rows on the real tokenizer before a run spends hours on them. No weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from amenable.data.content.findings import EXAMPLES, clip, percent
from amenable.data.render import Renderer
from amenable.data.schemas import Demonstration, Preference, Prompt
from amenable.data.tokens.checks import (
    CHECKS,
    Json,
    changed_messages,
    differing_tokens,
    finding,
    ids_where,
    shared_ending,
    special_pattern,
    special_tokens_in,
)
from amenable.data.tokens.figures import (
    boundary_figures,
    end_figures,
    length_figures,
    pair_figures,
    same_tokens,
)
from amenable.data.tokens.rows import (
    AnyRow,
    RefusedRow,
    TokenizedRow,
    completions_of,
    draw,
    prompt_of,
    tokenize_rows,
)
from amenable.data.tokens.template_checks import adds_bos, tokenizer_facts, tokenizer_findings

LIMIT = 2000
"""Rows of each kind that are looked at by default."""

_LEVELS = ("error", "warning", "note")
_SHOWN = 60


def token_report(
    renderer: Renderer,
    *,
    prompts: Iterable[Prompt] = (),
    demonstrations: Iterable[Demonstration] = (),
    preferences: Iterable[Preference] = (),
    limit: int = LIMIT,
) -> Json:
    """Lengths, cuts, ends and boundaries of rows in tokens, and what is wrong with them.

    Args:
        renderer: of the run; its limits are the ones reported on.
        prompts: rows without an answer.
        demonstrations: rows with one.
        preferences: pairs.
        limit: rows of each kind that are tokenized, drawn by the hash of their ids; the others are
            counted only. Rows may be streamed: no more than this many are held.

    Returns:
        `tokenizer` (special tokens), `limits`, `kinds` (by kind: `rows` looked at, `of` all, and
        their figures), `findings`, errors first, and `clean`: names of checks that found nothing,
        none where no row could be looked at. Lengths are in tokens, shares in [0, 1].

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be 1 or more, not {limit}")
    kinds: Json = {}
    findings = tokenizer_findings(renderer)
    if not any(found["name"] == "eos_missing" for found in findings):
        given: dict[str, Iterable[AnyRow]] = {
            "prompts": prompts,
            "demonstrations": demonstrations,
            "preferences": preferences,
        }
        for kind, rows in given.items():
            drawn, count = draw(rows, limit)
            if drawn:
                facts, found = _kind_report(renderer, kind, drawn, count)
                kinds[kind] = {"rows": len(drawn), "of": count, **facts}
                findings += found
    names = {found["name"] for found in findings}
    return {
        "tokenizer": tokenizer_facts(renderer),
        "limits": {
            "max_prompt_tokens": renderer.max_prompt_tokens,
            "max_completion_tokens": renderer.max_completion_tokens,
        },
        "kinds": kinds,
        "findings": sorted(findings, key=lambda found: _LEVELS.index(found["level"])),
        "clean": [name for name in CHECKS if kinds and name not in names],
    }


def _kind_report(
    renderer: Renderer, kind: str, drawn: Sequence[AnyRow], of: int
) -> tuple[Json, list[Json]]:
    """Figures and findings of the rows of one kind, drawn from `of` rows."""
    rows, refused = tokenize_rows(renderer, drawn)
    facts: Json = {}
    if rows:
        facts["prompt"] = length_figures(
            [(r.id, len(r.whole), len(r.kept) if not r.fault else len(r.whole)) for r in rows],
            renderer.max_prompt_tokens,
        )
    if any(row.completions for row in rows):
        facts["completion"] = length_figures(
            [(r.id, len(t.whole), len(t.kept)) for r in rows for t in r.completions],
            renderer.max_completion_tokens,
        )
        facts["ended"] = end_figures(renderer, rows)
        facts["boundary"] = boundary_figures(renderer, rows)
    if kind == "preferences":
        facts["pairs"] = pair_figures(rows)

    found: list[Json] = []
    texts = {prompt_of(row).id: prompt_of(row).text for row in drawn}

    def tell(name: str, ids: Sequence[str], **values: object) -> None:
        if ids:
            rows_of = [(i, texts[i]) for i in ids]
            seen = len(drawn)
            found.append(finding(name, kind, rows_of, seen, drawn=seen < of, **values))

    _tell_faults(tell, rows, refused)
    _tell_cuts(tell, renderer, rows, facts)
    _tell_texts(tell, renderer, rows, facts)
    return facts, found


Tell = Callable[..., None]


def _tell_faults(tell: Tell, rows: Sequence[TokenizedRow], refused: Sequence[RefusedRow]) -> None:
    """Rows that would stop a run."""
    if refused:
        tell("template_refuses", [row.id for row in refused], detail=refused[0].message)
    faulty = [row for row in rows if row.fault]
    if faulty:
        tell("prompt_does_not_fit", [row.id for row in faulty], detail=faulty[0].fault)
    tell(
        "completion_cut_to_nothing",
        ids_where(rows, lambda r: not all(t.kept for t in r.completions)),
    )


def _tell_cuts(tell: Tell, renderer: Renderer, rows: Sequence[TokenizedRow], facts: Json) -> None:
    """What the limits take away."""
    answered = [row for row in rows if row.completions]
    if answered and not facts["ended"]["count"]:
        pairs = isinstance(answered[0].row, Preference)
        name = "eos_never_in_pairs" if pairs else "eos_never_trained"
        tell(name, [row.id for row in answered])
    cut = [row for row in rows if not row.fault and row.kept != row.whole]
    for part, name, ids in (
        ("prompt", "prompt_cut", [row.id for row in cut]),
        ("completion", "completion_cut", ids_where(rows, _has_cut_completion)),
    ):
        if ids:
            lengths = facts[part]
            suggested = lengths["limit_for_1_percent"]
            tell(
                name,
                ids,
                limit=lengths["limit"],
                tokens=lengths["cut"]["tokens"],
                suggested=suggested,
            )
    texts = {row.id: str(renderer.tokenizer.decode(row.kept)) for row in cut}
    ending = shared_ending([prompt_of(row.row).text for row in rows])
    if ending:
        lost = ids_where(
            cut,
            lambda r: (
                prompt_of(r.row).text.rstrip().endswith(ending)
                and _after(prompt_of(r.row).text, r.prompt_text, ending) not in texts[r.id]
            ),
        )
        tell("cut_loses_ending", lost, detail=repr(clip(ending, _SHOWN)))
    tell("cut_loses_marker", ids_where(cut, lambda r: _loses_marker(renderer, r, texts[r.id])))
    equal = [r for r in rows if len(r.completions) == 2 and same_tokens(r, "kept")]
    tell("pairs_equal_once_cut", ids_where(equal, lambda r: not same_tokens(r, "whole")))
    tell("pairs_equal_in_tokens", ids_where(equal, lambda r: same_tokens(r, "whole")))


def _tell_texts(tell: Tell, renderer: Renderer, rows: Sequence[TokenizedRow], facts: Json) -> None:
    """What tokenizer and template do to the texts."""
    tokenizer = renderer.tokenizer
    eos = renderer.eos_ids
    tell(
        "eos_inside_completion",
        ids_where(rows, lambda r: any(not eos.isdisjoint(t.whole[:-1]) for t in r.completions)),
    )
    pattern = special_pattern(renderer)
    special = {
        row.id: spelt
        for row in rows
        if pattern and (spelt := special_tokens_in(renderer, pattern, _texts(row)))
    }
    names = dict.fromkeys(name for found in special.values() for name in found)
    tell("special_token_in_text", list(special), detail=_list(map(repr, names)))
    boundary = facts.get("boundary")
    if boundary and boundary["examples"]:
        first = boundary["examples"][0]
        differing = ids_where(rows, lambda r: any(differing_tokens(r, t) for t in r.completions))
        tell(
            "boundary_differs",
            differing,
            detail=f"{first['together']} in place of {first['apart']}",
        )
    bos = tokenizer.bos_token_id
    if bos is not None:
        name = repr(tokenizer.bos_token)
        tell("bos_doubled", ids_where(rows, lambda r: r.whole[:2] == [bos, bos]), detail=name)
        if adds_bos(renderer):
            tell("bos_missing", ids_where(rows, lambda r: r.whole[:1] != [bos]), detail=name)
    changed = {row.id: changed_messages(renderer, row) for row in rows}
    for index, check in enumerate(("message_dropped", "white_space_changed")):
        hit = {row: pair[index] for row, pair in changed.items() if pair[index]}
        if hit:
            message = next(iter(hit.values()))[0]
            tell(check, list(hit), detail=f"{message.speaker} {clip(message.content, _SHOWN)!r}")
    unk = tokenizer.unk_token_id
    if unk is not None:
        unknown = [row for row in rows if row.id not in special and unk in _whole_ids(row)]
        if unknown:
            ids = [i for row in rows for i in _whole_ids(row)]
            share = ids.count(unk) / len(ids)
            detail = f"{percent(share)} of all tokens are {tokenizer.unk_token!r}"
            tell("unknown_tokens", [row.id for row in unknown], detail=detail)
    lossy = {
        row.id: pair for row in rows if row.id not in special and (pair := _lossy(renderer, row))
    }
    if lossy:
        before, after = next(iter(lossy.values()))
        tell("round_trip_differs", list(lossy), detail=f"{before!r} comes back as {after!r}")


def _has_cut_completion(row: TokenizedRow) -> bool:
    return any(text.kept != text.whole for text in row.completions)


def _whole_ids(row: TokenizedRow) -> list[int]:
    return [*row.whole, *(i for text in row.completions for i in text.whole[:-1])]


def _texts(row: TokenizedRow) -> list[str]:
    return [*(message.content for message in prompt_of(row.row).messages), *completions_of(row.row)]


def _after(text: str, rendered: str, ending: str) -> str:
    """The ending of a user text with a little of what the template writes behind it."""
    behind = rendered.rpartition(text.rstrip())[2]
    return ending + behind[:20]


def _loses_marker(renderer: Renderer, row: TokenizedRow, kept: str) -> bool:
    """Whether instruction or the template's end are gone from a cut prompt."""
    tail = row.prompt_text.rpartition(prompt_of(row.row).text.strip())[2].strip()
    whole = str(renderer.tokenizer.decode(row.whole)).strip()
    ended = whole.endswith(tail) and not kept.strip().endswith(tail)
    return ended or (renderer.instruction in whole and renderer.instruction not in kept)


def _lossy(renderer: Renderer, row: TokenizedRow) -> tuple[str, str] | None:
    """The first text that does not come back, around the first difference; None: all do."""
    wanted = prompt_of(row.row).text.strip()
    if wanted in row.prompt_text:
        decoded = str(renderer.tokenizer.decode(row.whole))
        if wanted not in decoded:
            start = max(0, decoded.find(wanted[:12]))
            return _around(wanted, decoded[start:])
    for text in row.completions:
        decoded = renderer.completion_text(text.whole)
        if decoded != text.text.strip():
            return _around(text.text.strip(), decoded)
    return None


def _around(wanted: str, found: str) -> tuple[str, str]:
    same = next(
        (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
        min(len(wanted), len(found)),
    )
    start = max(0, same - 10)
    return wanted[start : same + 20], found[start : same + 20]


def _list(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:EXAMPLES]) + (", …" if len(shown) > EXAMPLES else "")
