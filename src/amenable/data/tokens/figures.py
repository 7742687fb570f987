"""Figures of tokenized rows: lengths and cuts, ends, boundaries, pairs. Lengths are in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from amenable.data.content.findings import EXAMPLES
from amenable.data.render import Renderer
from amenable.data.schemas import Choice, Preference
from amenable.data.tokens.checks import Json, differing_tokens
from amenable.data.tokens.rows import TokenizedRow

EDGES = (
    *(0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192),
    *(224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 8192),
)
"""Lower edges of the bins of length histograms, in tokens; the last bin is open. Chosen here: four
bins a doubling up to 2048, so that the usual limits are edges and a long tail takes few bins."""

_PIECES = 6


def length_figures(rows: Sequence[tuple[str, int, int]], limit: int) -> Json:
    """Distribution of lengths and what a limit takes.

    Args:
        rows: id, tokens before the cut and tokens after it, of each text; at least one.
        limit: the limit, in tokens.
    """
    whole = sorted(length for _, length, _ in rows)
    cut = [row for row in rows if row[2] < row[1]]
    lost = sum(length - kept for _, length, kept in cut)
    bins, _ = np.histogram(whole, [*EDGES, np.inf])

    def percentile(p: int) -> int:
        return whole[max(0, math.ceil(p / 100 * len(whole)) - 1)]

    return {
        "count": len(whole),
        "tokens": sum(whole),
        **{f"p{p}": percentile(p) for p in (10, 50, 90, 99)},
        "max": whole[-1],
        "histogram": {"edges": list(EDGES), "counts": bins.tolist()},
        "limit": limit,
        "limit_for_1_percent": percentile(99),
        "cut": {
            "count": len(cut),
            "share": len(cut) / len(whole),
            "tokens": lost,
            "tokens_share": lost / max(1, sum(whole)),
            "examples": list(dict.fromkeys(row[0] for row in cut))[:EXAMPLES],
        },
    }


def end_figures(renderer: Renderer, rows: Sequence[TokenizedRow]) -> Json:
    """How many completions end with an end-of-sequence token once cut."""
    texts = [text for row in rows for text in row.completions]
    count = sum(bool(text.kept) and text.kept[-1] in renderer.eos_ids for text in texts)
    return {"count": count, "of": len(texts), "share": count / max(1, len(texts))}


def boundary_figures(renderer: Renderer, rows: Sequence[TokenizedRow]) -> Json:
    """How many completions have other tokens when they are tokenized as one text with the prompt.

    `examples` show the tokens that differ, decoded one by one.
    """
    total = sum(len(row.completions) for row in rows)
    found = [
        (row, differing)
        for row in rows
        for text in row.completions
        if (differing := differing_tokens(row, text))
    ]

    def pieces(ids: Sequence[int]) -> list[str]:
        return [str(renderer.tokenizer.decode([number])) for number in ids[:_PIECES]]

    return {
        "differs": len(found),
        "of": total,
        "share": len(found) / max(1, total),
        "examples": [
            {"id": row.id, "apart": pieces(apart), "together": pieces(together)}
            for row, (apart, together) in found[:EXAMPLES]
        ],
    }


def pair_figures(rows: Sequence[TokenizedRow]) -> Json:
    """What the cut does to pairs: how many become equal, and which side loses its end.

    A pair of which one side is cut tells chosen from rejected by the missing end of sequence.
    """
    pairs = [row for row in rows if len(row.completions) == 2]
    cuts = [tuple(text.kept != text.whole for text in row.completions) for row in pairs]
    chosen = [
        cut if row.row.choice is Choice.FIRST else cut[::-1]
        for row, cut in zip(pairs, cuts, strict=True)
        if isinstance(row.row, Preference) and row.row.choice is not Choice.TIE
    ]
    equal = [row for row in pairs if same_tokens(row, "kept")]
    return {
        "of": len(pairs),
        "equal": len(equal),
        "equal_once_cut": sum(not same_tokens(row, "whole") for row in equal),
        "one_cut": sum(first != second for first, second in cuts),
        "both_cut": sum(first and second for first, second in cuts),
        "only_chosen_cut": sum(first and not second for first, second in chosen),
        "only_rejected_cut": sum(second and not first for first, second in chosen),
    }


def same_tokens(row: TokenizedRow, part: str) -> bool:
    """Whether the candidates of a pair have the same `whole` or `kept` ids."""
    first, second = (getattr(text, part) for text in row.completions)
    return bool(first == second)
