"""What the over-optimisation lab found, as plain text and as a picture (SVG, made here)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from amenable.evaluate.overoptimization import fit_gold
from amenable.lab.overoptimization import Checkpoint, SeedResult

MOST_REGRET = 0.10
"""Share of the possible gain that the choice by gold may give away."""

_WAYS = {
    "gold": "by gold on other prompts",
    "second": "by a second reward model",
    "last": "the last one",
}


def passed(results: Sequence[SeedResult]) -> bool:
    """Whether gold falls in the end, and the choice by gold keeps the gain, on 4 of 5 seeds."""
    enough = math.ceil(0.8 * len(results))
    falls = sum(result.falls for result in results)
    kept = sum(result.regret["gold"] <= MOST_REGRET for result in results)
    return min(falls, kept) >= enough


def table(results: Sequence[SeedResult]) -> str:
    """A line for each seed, the choices below."""
    head = ("seed", "pairs right", "gold: start", "best", "last", "proxy: start", "last")
    lines = [[*head, "final KL", "turns at √KL", "gold falls"]]
    for result in results:
        rows = result.checkpoints
        turn = result.turning_point
        lines.append(
            [
                str(result.seed),
                f"{result.proxy_accuracy:.3f}",
                f"{rows[0].gold:.2f}",
                f"{max(row.gold for row in rows):.2f}",
                f"{rows[-1].gold:.2f}",
                f"{0.0:.2f}",
                f"{_proxy(rows, rows[-1]):.2f}",
                f"{rows[-1].kl:.1f}",
                "-" if turn is None else f"{turn:.2f}",
                "yes" if result.falls else "NO",
            ]
        )
    choices = [["checkpoint chosen", *(f"seed {result.seed}" for result in results)]]
    for way, words in _WAYS.items():
        told = [f"{r.chosen[way]} ({100 * r.regret[way]:.0f} %)" for r in results]
        choices.append([words, *told])
    seconds = sum(result.wall_s for result in results)
    kept = sum(result.regret["gold"] <= MOST_REGRET for result in results)
    return "\n".join(
        [
            *_aligned(lines),
            "",
            "After how many updates, and the share of the possible gain in gold given away:",
            *_aligned(choices),
            "",
            f"gold falls on {sum(r.falls for r in results)} of {len(results)} seeds; the choice by "
            f"gold gives away at most {100 * MOST_REGRET:.0f} % on {kept}; {seconds:.0f} s of work",
        ]
    )


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _proxy(rows: Sequence[Checkpoint], row: Checkpoint) -> float:
    """Over the start's, in gold's units: the log-odds of a choice are twice those."""
    from amenable.lab.letter_world import SHARPNESS

    return (row.proxy - rows[0].proxy) / SHARPNESS


# The picture ---------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _GAP = 300, 230, 16
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 34, 34
_PROXY, _GOLD, _BEST = "#1b6ca8", "#b3541e", "#3a7d44"


def picture(results: Sequence[SeedResult]) -> str:
    """A panel a seed: proxy and gold of the policy, its fitted curve, and gold of best of n."""
    columns = min(3, len(results))
    rows = math.ceil(len(results) / columns)
    width = columns * (_WIDTH + _GAP) + _GAP
    height = rows * (_HEIGHT + _GAP) + 3 * _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _legend(),
    ]
    for number, result in enumerate(results):
        x = _GAP + number % columns * (_WIDTH + _GAP)
        y = 3 * _GAP + number // columns * (_HEIGHT + _GAP)
        parts.append(f'<g transform="translate({x} {y})">{_panel(result)}</g>')
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> str:
    said = (
        (_PROXY, "proxy"),
        (_GOLD, "gold, its fitted curve, and the checkpoint chosen by gold on other prompts"),
        (_BEST, "gold of best of n"),
    )
    parts, x = [], _GAP + _LEFT
    for colour, words in said:
        parts.append(f'<line x1="{x}" x2="{x + 18}" y1="22" y2="22" stroke="{colour}"')
        parts.append(' stroke-width="3"/>')
        parts.append(f'<text x="{x + 24}" y="26">{escape(words)}</text>')
        x += 24 + round(6.4 * len(words)) + 24
    return "".join(parts)


def _panel(result: SeedResult) -> str:
    rows = result.checkpoints
    d = [math.sqrt(max(0.0, row.kl)) for row in rows]
    proxy = [_proxy(rows, row) for row in rows]
    gold = [row.gold for row in rows]
    others = [(math.sqrt(row["kl"]), row["gold"]) for row in result.best_of_n]
    top = max(*proxy, *gold, *(y for _, y in others)) * 1.08
    low = min(0.0, *gold) - 0.1
    wide = max(d) * 1.02 or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / wide * (_WIDTH - _LEFT - _RIGHT)
        up = _HEIGHT - _BOTTOM - (y - low) / (top - low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(up, 1)

    def dots(points: Sequence[tuple[float, float]], colour: str) -> str:
        return "".join(
            '<circle cx="{}" cy="{}" r="2.4" fill="{}"/>'.format(*at(*point), colour)
            for point in points
        )

    def line(points: Sequence[tuple[float, float]], colour: str, dash: str = "") -> str:
        path = " ".join("{},{}".format(*at(*point)) for point in points)
        return (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-dasharray="{dash}"/>'
        )

    parts = [_frame(low, top, wide, at), f'<text x="{_LEFT}" y="14">seed {result.seed}</text>']
    parts += [dots(list(zip(d, proxy, strict=True)), _PROXY)]
    parts += [dots(list(zip(d, gold, strict=True)), _GOLD)]
    parts += [line(others, _BEST, "4 3"), dots(others, _BEST)]
    fitted = fit_gold(d, gold)
    if fitted is not None:
        steps = [wide * step / 60 for step in range(61)]
        parts.append(line([(x, fitted.at(x)) for x in steps if low < fitted.at(x) < top], _GOLD))
    chosen = next(row for row in rows if row.updates == result.chosen["gold"])
    x, y = at(math.sqrt(max(0.0, chosen.kl)), chosen.gold)
    parts.append(f'<circle cx="{x}" cy="{y}" r="7" fill="none" stroke="{_GOLD}" stroke-width="2"/>')
    return "".join(parts)


def _frame(low: float, top: float, wide: float, at: object) -> str:
    from amenable.evaluate.curves import number, ticks

    place = at
    assert callable(place)
    parts = []
    for value in ticks(low, top, 4):
        x, y = place(0.0, value)
        right = _WIDTH - _RIGHT
        parts.append(f'<line x1="{x}" x2="{right}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{number(value)}</text>')
    for value in ticks(0.0, wide, 5):
        x, _ = place(value, low)
        y = _HEIGHT - _BOTTOM + 16
        parts.append(f'<text x="{x}" y="{y}" text-anchor="middle">{number(value)}</text>')
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 2}" text-anchor="end">√KL, √nats</text>'
    )
    return "".join(parts)
