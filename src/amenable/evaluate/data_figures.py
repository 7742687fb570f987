"""Length histograms of the data section: in tokens with the recipe's limits, in words by kind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from amenable.evaluate.curves import number as shown
from amenable.evaluate.histograms import Histogram, histogram_chart
from amenable.evaluate.lenient import Json, number, table, whole
from amenable.evaluate.report_data import Figure

KINDS = ("demonstrations", "preferences", "prompts")

ANSWERS = {"demonstrations": "answers", "preferences": "candidates", "prompts": "answers"}

GUIDES = {
    "prompts": "Prompts that the policy is trained on should lie where those of the preferences "
    "lie: the reward model judges best what it has seen.",
    "answers": "Chosen and rejected should lie over each other. Chosen further to the right: a "
    "reward model can be right by counting words.",
}

_WHOLE_BINS = 400
"""A histogram of more bins than this is not drawn: it is none of ours."""


def histogram(found: object) -> Histogram | None:
    """A histogram as the reports write it: `edges` (the last bin open) or `width`, and `counts`."""
    json = table(found)
    counts, edges, width = json.get("counts"), json.get("edges"), whole(json.get("width"))
    if not isinstance(counts, list) or not 0 < len(counts) <= _WHOLE_BINS:
        return None
    sizes = tuple(whole(count) for count in counts)
    if isinstance(edges, list):
        lower = tuple(whole(edge) for edge in edges)
        ascends = all(a < b for a, b in pairwise(lower))
        return Histogram(lower, sizes) if ascends and len(lower) == len(sizes) else None
    if not width:
        return None
    lower = tuple(k * width for k in range(len(sizes)))
    return Histogram(lower, sizes, len(sizes) * width)


# In tokens -----------------------------------------------------------------------------------


def token_figures(report: Json) -> list[Figure]:
    """Prompts and answers of each kind in tokens, the limit marked, and what it cuts in words."""
    found = []
    for kind in KINDS:
        facts = table(report, "tokens", "kinds", kind)
        for part, name in (("prompt", "prompts"), ("completion", ANSWERS[kind])):
            title = kind if kind == name else f"{kind}, {name}"
            figure = _token_figure(title, table(facts, part))
            if figure:
                found.append(figure)
    return found


def _token_figure(title: str, lengths: Json) -> Figure | None:
    bins = histogram(lengths.get("histogram"))
    if bins is None or not bins.total:
        return None
    limit = whole(lengths.get("limit")) or None
    ends = [number(lengths.get("p99")) or 0.0, float(limit or 0)]
    nonempty = max(k for k, count in enumerate(bins.counts) if count)
    # A few very long texts would press all others into the first bins.
    bins = bins.between(0, min(nonempty, bins.bin_of(max(ends) + 1)))
    here = " ".join([_percentiles(lengths), _cut(lengths, limit)]).strip()
    svg = histogram_chart(
        f"Lengths of {title}", [(title, bins)], x_label="tokens", spoken=here, limit=limit
    )
    return Figure(title, svg, "", here)


def _percentiles(lengths: Json) -> str:
    known = [number(lengths.get(key)) for key in ("p50", "p90", "p99", "max")]
    if None in known:
        return ""
    middle, most, nearly, longest = (shown(value or 0.0) for value in known)
    return f"Median {middle}, 90\u00a0% up to {most}, 99\u00a0% up to {nearly}, longest {longest}."


def _cut(lengths: Json, limit: int | None) -> str:
    """What the limit takes, as a sentence."""
    if limit is None:
        return ""
    cut, total = table(lengths, "cut"), whole(lengths.get("count"))
    count = whole(cut.get("count"))
    if not count:
        return f"None is cut at {limit}."
    share = 100 * count / max(1, total)
    tokens = 100 * (number(cut.get("tokens_share")) or 0.0)
    return (
        f"{count} of {total} ({share:.1f}\u00a0%) are cut at {limit} and lose "
        f"{whole(cut.get('tokens'))} tokens, {tokens:.1f}\u00a0% of all."
    )


# In words ------------------------------------------------------------------------------------


def word_figures(report: Json) -> list[Figure]:
    """Prompts of every kind over each other, and answers with chosen over rejected."""
    origin = report.get("prompts_from")
    # Prompts that were taken from another kind would be drawn twice.
    twice = {"demonstrations": "demonstrations", "preferences": "prompts"}.get(str(origin))
    prompts = [
        (kind, _summed(report, kind, ("prompt",)))
        for kind in ("prompts", "preferences", "demonstrations")
        if kind != twice
    ]
    answers = [
        ("chosen", _summed(report, "preferences", ("chosen",))),
        ("rejected", _summed(report, "preferences", ("rejected",))),
        ("demonstrations", _summed(report, "demonstrations", ("output", "output_text"))),
    ]
    found = [_word_figure("prompts", prompts), _word_figure("answers", answers)]
    return [figure for figure in found if figure]


def _summed(report: Json, kind: str, names: Sequence[str]) -> Histogram | None:
    """Words of one text of a kind, over all splits; None where they are not known."""
    total: Histogram | None = None
    for split, statistics in table(report, "statistics").items():
        words = table(statistics, "words") if split.partition(".")[0] == kind else {}
        for name in names:
            one = histogram(table(words, name).get("histogram"))
            if one is None:
                continue
            if total is not None and total.edges != one.edges:
                return None
            total = one if total is None else total + one
    return total


def _word_figure(title: str, given: Sequence[tuple[str, Histogram | None]]) -> Figure | None:
    series = [(name, bins) for name, bins in given if bins is not None and bins.total]
    if not series or len({bins.edges for _, bins in series}) > 1:
        return None
    filled = [k for _, bins in series for k, count in enumerate(bins.counts) if count]
    series = [(name, bins.between(min(filled), max(filled))) for name, bins in series]
    spoken = "; ".join(
        f"{name}: {bins.total} texts, {_at_most(bins, 0.5)}, {_at_most(bins, 0.9)}"
        for name, bins in series
    )
    svg = histogram_chart(
        f"Lengths of {title} by kind of row", series, x_label="words", spoken=spoken
    )
    return Figure(title, svg, "", GUIDES[title] if len(series) > 1 else "")


def _at_most(bins: Histogram, share: float) -> str:
    """The bin in which a share of all texts is reached, counted from the shortest."""
    seen = 0
    for k, count in enumerate(bins.counts):
        seen += count
        if seen >= share * bins.total:
            return f"{100 * share:.0f} % reached at {bins.range_of(k)} words"
    return ""


# Strengths -----------------------------------------------------------------------------------


def strength_figure(report: Json) -> Figure | None:
    """How sure choices were, over all splits of preferences; None where no row says it."""
    counts = [0] * 9
    for statistics in table(report, "statistics").values():
        for key, count in table(statistics, "strengths").items():
            if key.isdecimal() and 1 <= int(key) <= 9:
                counts[int(key) - 1] += whole(count)
    if not any(counts):
        return None
    bins = Histogram(tuple(range(1, 10)), tuple(counts), 10)
    spoken = ", ".join(f"{k}: {count}" for k, count in enumerate(counts, 1))
    svg = histogram_chart(
        "Strengths of choices", [("rows", bins)], x_label="strength", spoken=spoken, discrete=True
    )
    here = (
        f"{sum(counts)} rows say how sure the choice was: 1 candidate_0 much better, 5 a tie, "
        "9 candidate_1 much better. All at the ends: the scale was used as a plain choice."
    )
    return Figure("strengths", svg, "", here)
