"""Charts as server-made SVG, and a plain reading of a curve's shape. No JavaScript library.

Colours and line styles come from the page's style sheet (classes `s1`, `s2`, …), so that light,
dark and print need no second drawing. Every text is escaped. A chart carries its values in
`data-hover`, which the page's small script shows at the pointer; without it the chart is whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from amenable.evaluate.statistics import Floats

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 30, 44
MAX_POINTS = 240
"""A longer series is thinned to this many points, the last one kept."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Attributes:
        name: legend.
        x: [n] e.g. steps.
        y: [n] values; NaN leaves a gap.
        error: [n] half width of a band around y (a standard error), if any.
        smooth: draw a moving average over the faint raw line.
        dots: mark the points and draw no line between.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    smooth: bool = False
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """Maps values to pixels of the plot area."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """Pixel column of a value."""
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Pixel row of a value."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


# Reading a curve -----------------------------------------------------------------------------


def finite(values: Sequence[float]) -> Floats:
    """The values that are numbers, as float64."""
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


def first_and_last_fifth(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean of the first fifth, of the last fifth, and the standard error of their difference.

    Steps are taken as independent. None with fewer than 10 finite values.
    """
    y = finite(values)
    if y.size < 10:
        return None
    k = max(2, y.size // 5)
    first, last = y[:k], y[-k:]
    error = math.sqrt(first.var(ddof=1) / k + last.var(ddof=1) / k)
    return float(first.mean()), float(last.mean()), error


def trend(values: Sequence[float]) -> str:
    """The curve's shape in words, from the means of its fifths.

    One of: "too short to read", "flat", and "rose"/"fell" with "then levelled off", "and was still
    rising"/"falling at the end", or "then turned back". A change counts when it exceeds two
    standard errors of the difference of two fifths; it still goes on when a line through the last
    two fifths is steeper than its noise and covers a quarter of the change.
    """
    ends = first_and_last_fifth(values)
    if ends is None:
        return "too short to read"
    means = np.array([part.mean() for part in np.array_split(finite(values), 5)])
    up = _turning_direction(means) > 0
    signed = means if up else -means
    noise = 2 * ends[2]
    peak = int(signed.argmax())
    if signed[peak] - signed[0] <= noise:
        return "flat"
    verb, back = ("rose", "rising") if up else ("fell", "falling")
    if signed[peak] - signed[-1] > max(noise, 0.25 * (signed[peak] - signed[0])):
        return f"{verb}, then turned back"
    if _late_rise(values, up) > 0.25 * (signed[-1] - signed[0]):
        return f"{verb} and was still {back} at the end"
    return f"{verb}, then levelled off"


def _late_rise(values: Sequence[float], up: bool) -> float:
    """How far a line through the last two fifths goes the curve's way; 0 within its noise."""
    y = finite(values)[-max(4, 2 * finite(values).size // 5) :] * (1 if up else -1)
    x = np.arange(y.size) - (y.size - 1) / 2
    slope = float(x @ y / (x @ x))
    spread = float(((y - y.mean() - slope * x) ** 2).sum() / (y.size - 2) / (x @ x))
    return slope * (y.size - 1) if slope > 2 * math.sqrt(spread) else 0.0


def _turning_direction(means: Floats) -> float:
    """Positive where the curve moved up most from its start, negative where down."""
    up, down = means.max() - means[0], means[0] - means.min()
    return float(up - down)


def moving_average(values: Sequence[float], window: int) -> Floats:
    """[n] centred mean over `window` values, over fewer at the ends; NaN are left out."""
    y = np.asarray(values, dtype=np.float64)
    half = window // 2
    parts = [finite(y[max(0, i - half) : i + half + 1].tolist()) for i in range(y.size)]
    return np.array([part.mean() if part.size else math.nan for part in parts])


# Parts of a drawing --------------------------------------------------------------------------


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that lie within [low, high]."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short figure for an axis or a tooltip, with a true minus sign."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size != 0 and (size >= 1e5 or size < 1e-3):
        text = f"{value:.2g}"
    else:
        text = f"{value:.0f}" if value == round(value) else f"{value:.3g}"
        text = f"{value:.0f}" if size >= 1000 else text
    return text.replace("-", "−")


def thin(series: Series) -> Series:
    """The series with at most `MAX_POINTS` + 1 points, evenly taken, its last point among them."""
    n = len(series.x)
    if n <= MAX_POINTS:
        return series
    keep = sorted({*np.linspace(0, n - 1, MAX_POINTS).round().astype(int).tolist(), n - 1})
    error = None if series.error is None else [series.error[i] for i in keep]
    x, y = [series.x[i] for i in keep], [series.y[i] for i in keep]
    return Series(series.name, x, y, error, series.smooth, series.dots)


def _padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """The range widened a little, and never empty."""
    margin = (high - low) * share or abs(low) * 0.5 or 1.0
    return low - margin, high + margin


def _axes(
    series: Sequence[Series],
    y_range: tuple[float, float] | None,
    x_range: tuple[float, float] | None,
) -> Axes:
    """Axes that hold every finite point, or the given ranges."""
    xs = np.concatenate([np.asarray(s.x, dtype=np.float64) for s in series])
    ys = np.concatenate([finite(s.y) for s in series])
    x_low, x_high = x_range or (float(xs.min()), float(xs.max()))
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = y_range or _padded(float(ys.min()), float(ys.max()))
    return Axes(x_low, x_high, y_low, y_high)


def _text(style: str, x: float, y: float, text: str, anchor: str) -> str:
    """An escaped text element."""
    return f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _columns(axes: Axes) -> list[float]:
    """Ticks of the x axis; whole numbers only between two whole numbers, which are steps."""
    found = ticks(axes.x_low, axes.x_high, 5)
    whole = axes.x_low == round(axes.x_low) and axes.x_high == round(axes.x_high)
    return [v for v in found if v == round(v)] if whole else found


def _frame(axes: Axes, x_label: str, y_label: str) -> str:
    """Grid lines, tick labels and axis titles."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in ticks(axes.y_low, axes.y_high, 4):
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(_text("tick", LEFT - 8, y + 4, number(value), "end"))
    for value in _columns(axes):
        x = axes.x(value)
        parts.append(_text("tick", x, bottom + 18, number(value), "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(_text("label", right, HEIGHT - 6, x_label, "end"))
    parts.append(_text("label", 4, 14, y_label, "start"))
    return "".join(parts)


def _path(axes: Axes, x: Sequence[float], y: Sequence[float] | Floats) -> str:
    """SVG path data; a NaN lifts the pen."""
    parts, pen_down = [], False
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            parts.append(f"{'L' if pen_down else 'M'}{axes.x(a)} {axes.y(b)}")
        pen_down = math.isfinite(b)
    return "".join(parts)


def _band(axes: Axes, series: Series) -> str:
    """The area of y plus and minus its error."""
    if series.error is None:
        return ""
    points = [
        (x, y, e)
        for x, y, e in zip(series.x, series.y, series.error, strict=True)
        if math.isfinite(y) and math.isfinite(e)
    ]
    upper = [f"{axes.x(x)},{axes.y(min(y + e, axes.y_high))}" for x, y, e in points]
    lower = [f"{axes.x(x)},{axes.y(max(y - e, axes.y_low))}" for x, y, e in reversed(points)]
    return f'<polygon class="band" points="{" ".join(upper + lower)}"/>'


def _draw(axes: Axes, series: Series, position: int) -> str:
    """One series: its band, its raw line or dots, and its moving average."""
    style = f"s{position + 1}"
    if series.dots:
        dots = "".join(
            f'<circle class="dot" cx="{axes.x(x)}" cy="{axes.y(y)}" r="3"/>'
            for x, y in zip(series.x, series.y, strict=True)
            if math.isfinite(y)
        )
        return f'<g class="{style}">{dots}</g>'
    weight = "raw" if series.smooth else "line"
    raw = f'<path class="{weight}" d="{_path(axes, series.x, series.y)}"/>'
    smooth = ""
    if series.smooth:
        average = moving_average(series.y, max(3, len(series.y) // 10))
        smooth = f'<path class="line" d="{_path(axes, series.x, average)}"/>'
    return f'<g class="{style}">{_band(axes, series)}{raw}{smooth}</g>'


def _legend(series: Sequence[Series]) -> str:
    """Names of the series at the top right; none for a single one."""
    if len(series) < 2:
        return ""
    parts, x = [], float(WIDTH - RIGHT)
    for position in reversed(range(len(series))):
        name = series[position].name
        parts.append(_text("label", x, 14, name, "end"))
        x -= 7.0 * len(name) + 12
        parts.append(f'<path class="line s{position + 1}" d="M{x - 14} 10H{x}"/>')
        x -= 30
    return "".join(parts)


def _hover(axes: Axes, series: Sequence[Series], x_label: str) -> str:
    """What the page's script shows at the pointer, as JSON: pixel columns, headings and lines."""
    columns: dict[float, list[Any]] = {}
    for position, one in enumerate(series):
        for x, y in zip(one.x, one.y, strict=True):
            if math.isfinite(y):
                columns.setdefault(x, []).append(
                    [position + 1, axes.y(y), f"{one.name} {number(y)}"]
                )
    points = [[axes.x(x), f"{x_label} {number(x)}", found] for x, found in sorted(columns.items())]
    return json.dumps(points, separators=(",", ":"), ensure_ascii=False)


# Whole charts --------------------------------------------------------------------------------


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str = "",
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
    diagonal: bool = False,
    reference: float | None = None,
) -> Markup:
    """A chart of one to three series, or an empty string where no series has a finite value.

    Args:
        title: read out by screen readers.
        series: lines or dots, the first in the accent colour.
        x_label: under the axis and in the tooltip.
        y_label: above the axis.
        y_range: fixed limits of y, else the data's with a margin.
        x_range: fixed limits of x.
        diagonal: draw y = x.
        reference: draw a horizontal line here.
    """
    shown = [thin(s) for s in series if finite(s.y).size]
    if not shown:
        return Markup("")
    axes = _axes(shown, y_range, x_range)
    marks = _reference_marks(axes, diagonal, reference)
    body = (
        _frame(axes, x_label, y_label)
        + marks
        + "".join(_draw(axes, s, i) for i, s in enumerate(shown))
    )
    hover = escape(_hover(axes, shown, x_label))
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(f"{title}. {_spoken(shown)}")}" data-hover="{hover}">'
        f"{body}{_legend(shown)}</svg>"
    )


def _reference_marks(axes: Axes, diagonal: bool, reference: float | None) -> str:
    """The lines to compare with."""
    parts = []
    if diagonal:
        low, high = max(axes.x_low, axes.y_low), min(axes.x_high, axes.y_high)
        ends = f"M{axes.x(low)} {axes.y(low)}L{axes.x(high)} {axes.y(high)}"
        parts.append(f'<path class="reference" d="{ends}"/>')
    if reference is not None and axes.y_low <= reference <= axes.y_high:
        parts.append(f'<path class="reference" d="M{LEFT} {axes.y(reference)}H{WIDTH - RIGHT}"/>')
    return "".join(parts)


def _spoken(series: Sequence[Series]) -> str:
    """The chart in a sentence for those who do not see it."""
    parts = []
    for one in series:
        y = finite(one.y)
        parts.append(f"{one.name}: {y.size} points from {number(y[0])} to {number(y[-1])}")
    return "; ".join(parts)


def interval_mark(
    value: float,
    interval: Sequence[float] | None,
    *,
    reference: float | None = 0.5,
    domain: tuple[float, float] = (0.0, 1.0),
    label: str = "",
    muted: bool = False,
) -> Markup:
    """One row of a forest plot: a dot, its interval and a reference line.

    Args:
        value: the estimate.
        interval: `[low, high]`, if there is one.
        reference: where nothing differs.
        domain: values at the left and right end.
        label: read out by screen readers.
        muted: grey in place of the accent colour.
    """
    at = _scale(domain)
    parts = [f'<path class="rail" d="M4 14H{_ROW_WIDTH - 4}"/>']
    if reference is not None:
        parts.append(f'<path class="reference" d="M{at(reference)} 2V26"/>')
    if interval is not None:
        low, high = at(interval[0]), at(interval[1])
        parts.append(f'<path class="whisker" d="M{low} 14H{high}M{low} 10V18M{high} 10V18"/>')
    parts.append(f'<circle class="dot" cx="{at(value)}" cy="14" r="5"/>')
    return _row(parts, label, muted)


def bar(
    value: float,
    interval: Sequence[float] | None = None,
    *,
    reference: float | None = None,
    domain: tuple[float, float] = (0.0, 1.0),
    label: str = "",
    muted: bool = False,
) -> Markup:
    """A horizontal bar with an optional interval and reference; arguments as `interval_mark`."""
    at = _scale(domain)
    zero = at(min(max(0.0, domain[0]), domain[1]))
    left, right = min(zero, at(value)), max(zero, at(value))
    width = max(1.0, round(right - left, 1))
    parts = [f'<rect class="bar" x="{left}" y="7" width="{width}" height="14"/>']
    if reference is not None:
        parts.append(f'<path class="reference" d="M{at(reference)} 2V26"/>')
    if interval is not None:
        low, high = at(interval[0]), at(interval[1])
        parts.append(f'<path class="whisker over" d="M{low} 14H{high}M{low} 10V18M{high} 10V18"/>')
    return _row(parts, label, muted)


_ROW_WIDTH = 300


def _scale(domain: tuple[float, float]) -> Callable[[float], float]:
    """The map from a value to its pixel column in a row; the domain's ends hold what is outside."""
    low, span = domain[0], (domain[1] - domain[0]) or 1.0

    def column(value: float) -> float:
        return round(4 + min(1.0, max(0.0, (value - low) / span)) * (_ROW_WIDTH - 8), 1)

    return column


def _row(parts: Sequence[str], label: str, muted: bool) -> Markup:
    """An inline drawing of one row's height."""
    style = "mark muted" if muted else "mark"
    name = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    body = "".join(parts)
    return Markup(f'<svg class="{style}" viewBox="0 0 {_ROW_WIDTH} 28" {name}>{body}</svg>')


def as_floats(values: Sequence[float | None]) -> list[float]:
    """JSON numbers with null as NaN."""
    return [math.nan if v is None else float(v) for v in values]


def root_kl(kl: npt.ArrayLike) -> Floats:
    """[n] square root of the KL, negative estimates at 0: the x axis of over-optimisation plots.

    Source: Gao, Schulman and Hilton 2022, arXiv:2210.10760.
    """
    return np.sqrt(np.clip(np.asarray(kl, dtype=np.float64), 0.0, None))
