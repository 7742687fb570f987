"""The lab's results as a table of plain text and as a picture (SVG, made here)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from amenable.lab.rows import Row

_FIGURES = ("kl_to_target", "objective_gap", "gradient_p_value")


def verdict(rows: Sequence[Row]) -> bool:
    """Whether every row passed and every control failed."""
    return all(row.as_it_should for row in rows)


def table(rows: Sequence[Row]) -> str:
    """One line for each setting and problem: the worst of its seeds; then the controls."""
    lines = []
    for check in dict.fromkeys(row.check for row in rows):
        own = [row for row in rows if row.check == check and not row.control]
        controls = [row for row in rows if row.check == check and row.control]
        if own:
            lines += [f"{check}: worst of the seeds", *_aligned(own), ""]
        if controls:
            lines += [f"{check}: controls, which must fail", *_aligned(controls), ""]
    wrong = sum(not row.as_it_should for row in rows)
    seconds = sum(row.wall_s for row in rows)
    return "\n".join(
        [*lines, f"{len(rows) - wrong} of {len(rows)} as they should, {seconds:.0f} s of work"]
    )


def _aligned(rows: Sequence[Row]) -> list[str]:
    shown = [figure for figure in _FIGURES if any(getattr(row, figure) is not None for row in rows)]
    far = any(row.distance_from_pi_star is not None for row in rows)
    head = ["algorithm", "setting", "problem", "beta", "target", *shown]
    head += ["target to pi*"] if far else []
    body = []
    for cell in _cells(rows):
        worst = worst_of(cell)
        line = [worst.algorithm, worst.setting, worst.problem, f"{worst.beta:g}"]
        line += [worst.target or "-", *(_number(getattr(worst, figure)) for figure in shown)]
        line += [_number(worst.distance_from_pi_star)] if far else []
        held = sum(row.as_it_should for row in cell)
        body.append([*line, f"{_word(worst)} {held}/{len(cell)}", worst.note])
    full = [[*head, "seeds", ""], *body]
    widths = [max(len(line[column]) for line in full) for column in range(len(full[0]))]
    return [
        "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
        for line in full
    ]


def _word(row: Row) -> str:
    if row.control:
        return "caught" if row.as_it_should else "MISSED"
    return "ok" if row.passed else "FAILED"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    return f"{value:.2g}" if value and abs(value) < 0.001 else f"{value:.4f}"


def _cells(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed alone, in the order of their first."""
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.algorithm, row.setting, row.problem), []).append(row)
    return list(cells.values())


def worst_of(rows: Sequence[Row]) -> Row:
    """The row that is furthest from what it should be."""
    return min(rows, key=lambda row: (row.as_it_should, -(row.kl_to_target or 0.0)))


# The picture ---------------------------------------------------------------------------------

_WIDTH, _LEFT, _RIGHT, _TOP, _STEP = 860, 330, 40, 62, 19
_LOW, _HIGH = 1e-6, 10.0
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4fa0", "#8a6d1d")


def picture(rows: Sequence[Row], bound: float) -> str:
    """SVG: a dot for each cell's KL to its target, on a logarithmic axis, with the bound.

    Args:
        rows: those without a KL are left out.
        bound: nats; drawn as a line.
    """
    measured = [row for row in rows if row.kl_to_target is not None]
    lines = list(dict.fromkeys((row.control, row.algorithm, row.setting) for row in measured))
    problems = list(dict.fromkeys(row.problem for row in measured))
    height = _TOP + _STEP * len(lines) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(10, 20, "KL of the trained policy to its target, in nats", bold=True),
        *_legend(problems),
        *_axis(height - 30, bound),
    ]
    for index, (control, algorithm, setting) in enumerate(lines):
        y = _TOP + _STEP * index + 8
        label = f"{algorithm}: {setting}" + (" (must fail)" if control else "")
        parts.append(_text(10, y + 4, label))
        parts += [
            _dot(row, y, _COLOURS[problems.index(row.problem) % len(_COLOURS)])
            for row in measured
            if (row.control, row.algorithm, row.setting) == (control, algorithm, setting)
        ]
    return "\n".join([*parts, "</svg>", ""])


def _x(value: float) -> float:
    share = math.log(max(_LOW, min(_HIGH, value)) / _LOW) / math.log(_HIGH / _LOW)
    return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)


def _text(x: float, y: float, text: str, *, bold: bool = False, colour: str = "#222") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{colour}"{weight}>{escape(text)}</text>'


def _legend(problems: Sequence[str]) -> list[str]:
    parts, x = [], float(_LEFT)
    for index, problem in enumerate(problems):
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(f'<circle cx="{x}" cy="36" r="4" fill="{colour}"/>')
        parts.append(_text(x + 8, 40, problem))
        x += 30 + 7 * len(problem)
    return parts


def _axis(bottom: float, bound: float) -> list[str]:
    parts = []
    for power in range(round(math.log10(_LOW)), round(math.log10(_HIGH)) + 1):
        x = _x(10.0**power)
        parts.append(f'<path d="M{x} {_TOP - 8}V{bottom}" stroke="#ddd"/>')
        parts.append(_text(x - 12, bottom + 16, f"1e{power}", colour="#666"))
    x = _x(bound)
    parts.append(f'<path d="M{x} {_TOP - 8}V{bottom}" stroke="#b00" stroke-dasharray="4 3"/>')
    return [*parts, _text(x + 4, bottom - 4, f"bound {bound:g}", colour="#b00")]


def _dot(row: Row, y: float, colour: str) -> str:
    value = row.kl_to_target or 0.0
    title = f"{row.algorithm}, {row.setting}, {row.problem}, seed {row.seed}: {value:.2g} nats"
    return (
        f'<circle cx="{_x(value)}" cy="{y}" r="4" fill="{colour}" fill-opacity="0.7">'
        f"<title>{escape(title)}</title></circle>"
    )
