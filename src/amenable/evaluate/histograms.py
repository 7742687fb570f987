"""Histograms as server-made SVG, in the manner of `curves`: equally wide bins, a limit marked.

Bins that grow (0, 1, 2, 3, 4, 6, 8, …) are drawn as wide as each other, which is close to a
logarithmic axis; the axis names their edges. Heights are shares, so that sets of unequal size can
be laid over each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup, escape

from amenable.evaluate import curves
from amenable.evaluate.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes

TICKS = 6
"""About how many edges are named; more run into each other on a phone."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of whole numbers, such as lengths in tokens, in bins.

    Attributes:
        edges: [b] lower edge of each bin, ascending; a bin holds the numbers up to, not with, the
            next edge.
        counts: [b] numbers in each bin.
        end: upper edge of the last bin; None: it is open.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    end: int | None = None

    @property
    def total(self) -> int:
        """All counts together."""
        return sum(self.counts)

    def __add__(self, other: Histogram) -> Histogram:
        """The counts of both, which must have the same edges.

        Raises:
            ValueError: the edges differ.
        """
        if (self.edges, self.end) != (other.edges, other.end):
            raise ValueError("histograms of different edges cannot be added")
        summed = zip(self.counts, other.counts, strict=True)
        return replace(self, counts=tuple(a + b for a, b in summed))

    def between(self, first: int, last: int) -> Histogram:
        """Bins `first` to `last`, counted from 0; what lies above is put into the last of them.

        Bins below `first` are left out and should be empty.
        """
        if last >= len(self.edges) - 1:
            return replace(self, edges=self.edges[first:], counts=self.counts[first:])
        counts = (*self.counts[first:last], sum(self.counts[last:]))
        above = any(self.counts[last + 1 :])
        end = None if above else self.edges[last + 1]
        return Histogram(self.edges[first : last + 1], counts, end)

    def bin_of(self, value: float) -> int:
        """Number of the bin that holds a value, or of the nearest one."""
        found = int(np.searchsorted(self.edges, value, side="right")) - 1
        return min(max(0, found), len(self.edges) - 1)

    def range_of(self, bin_: int) -> str:
        """A bin in words: `4`, `4 to 5`, `1024 or more`."""
        low = self.edges[bin_]
        if bin_ == len(self.edges) - 1 and self.end is None:
            return f"{low} or more"
        high = (*self.edges, self.end)[bin_ + 1] or low + 1
        return f"{low}" if high == low + 1 else f"{low} to {high - 1}"


def histogram_chart(
    title: str,
    series: Sequence[tuple[str, Histogram]],
    *,
    x_label: str,
    y_label: str = "share, %",
    spoken: str = "",
    limit: int | None = None,
    discrete: bool = False,
) -> Markup:
    """One histogram as bars, two or three as outlines; an empty string where there is no count.

    Args:
        title: read out by screen readers.
        series: name and histogram; all of the same edges.
        x_label: the unit, under the axis and in the tooltip.
        y_label: above the axis.
        spoken: the figures in words, read out after the title.
        limit: marked by a line; bars to its right have another colour.
        discrete: each bin is one value: it is named under its middle, not at its edge.
    """
    shown = [(name, one) for name, one in series if one.total]
    if not shown:
        return Markup("")
    bins = shown[0][1]
    shares = [[100 * count / one.total for count in one.counts] for _, one in shown]
    axes = Axes(0.0, float(len(bins.edges)), 0.0, 1.08 * max(map(max, shares)))
    at = None if limit is None else _position(bins, limit + 1)  # the limit itself is not cut
    parts = [_frame(axes, bins, x_label, y_label, discrete)]
    if len(shown) == 1:
        parts.append(_bars(axes, shares[0], at))
    else:
        parts += [_outline(axes, values, k) for k, values in enumerate(shares)]
    if at is not None:
        parts.append(_limit_mark(axes, at, f"limit {limit}"))
    names = [name for name, _ in shown]
    hover = escape(_hover(axes, shown, shares, x_label))
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(f"{title}. {spoken}".strip())}" data-hover="{hover}">'
        f"{''.join(parts)}{_legend(names)}</svg>"
    )


def _position(bins: Histogram, value: float) -> float:
    """Where a value stands, in bins from the left; len(bins) where it lies beyond the last edge."""
    edges = [*bins.edges, bins.end if bins.end is not None else 2 * bins.edges[-1] + 1]
    return float(np.interp(value, edges, np.arange(len(edges))))


def _text(style: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _frame(axes: Axes, bins: Histogram, x_label: str, y_label: str, discrete: bool) -> str:
    """Grid lines, named edges and axis titles."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in curves.ticks(axes.y_low, axes.y_high, 4):
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(_text("tick", LEFT - 8, y + 4, curves.number(value), "end"))
    every = 1 if discrete else max(1, round(len(bins.edges) / TICKS))
    for k in range(0, len(bins.edges), every):
        x = axes.x(k + 0.5 if discrete else k)
        parts.append(_text("tick", x, bottom + 18, curves.number(bins.edges[k]), "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(_text("label", right, HEIGHT - 6, x_label, "end"))
    parts.append(_text("label", 4, 14, y_label, "start"))
    return "".join(parts)


def _bars(axes: Axes, shares: Sequence[float], limit: float | None) -> str:
    """Bars; the bin that a limit goes through is coloured in two parts."""
    cut = len(shares) if limit is None else limit
    kept = [(k, min(k + 1.0, cut), share) for k, share in enumerate(shares) if k < cut]
    lost = [(max(float(k), cut), k + 1.0, share) for k, share in enumerate(shares) if k + 1 > cut]
    return "".join(
        f'<g class="{style}">{"".join(_bar(axes, *one) for one in bars if one[2])}</g>'
        for style, bars in (("s1", kept), ("s2", lost))
        if bars
    )


def _bar(axes: Axes, left: float, right: float, share: float) -> str:
    x, y = axes.x(left), axes.y(share)
    # One pixel is left between whole bins.
    width = max(0.5, round(axes.x(right) - x - (1 if right == int(right) else 0), 1))
    height = max(0.5, round(axes.y(0) - y, 1))
    return f'<rect class="bar" x="{x}" y="{y}" width="{width}" height="{height}"/>'


def _outline(axes: Axes, shares: Sequence[float], position: int) -> str:
    """The histogram's upper edge, the first one filled as well."""
    steps = "".join(f"V{axes.y(share)}H{axes.x(k + 1)}" for k, share in enumerate(shares))
    path = f"M{axes.x(0)} {axes.y(0)}{steps}V{axes.y(0)}"
    fill = f'<path class="band" d="{path}Z"/>' if position == 0 else ""
    return f'<g class="s{position + 1}">{fill}<path class="line" d="{path}"/></g>'


def _limit_mark(axes: Axes, at: float, text: str) -> str:
    """A line at the limit with its name on the side that has room."""
    x, beyond = axes.x(at), at >= axes.x_high
    line = "" if beyond else f'<path class="limit" d="M{x} {TOP - 8}V{HEIGHT - BOTTOM}"/>'
    if at > 0.6 * axes.x_high:
        return line + _text("limitname", x - 5, TOP, f"{text} →" if beyond else text, "end")
    return line + _text("limitname", x + 5, TOP, text, "start")


def _legend(names: Sequence[str]) -> str:
    """Names at the top right; none for a single histogram."""
    if len(names) < 2:
        return ""
    parts, x = [], float(WIDTH - RIGHT)
    for position in reversed(range(len(names))):
        parts.append(_text("label", x, 14, names[position], "end"))
        x = round(x - 8.6 * len(names[position]) - 8, 1)  # wide enough for a phone's larger type
        parts.append(f'<path class="line s{position + 1}" d="M{x - 14} 10H{x}"/>')
        x -= 26
    return "".join(parts)


def _hover(
    axes: Axes,
    shown: Sequence[tuple[str, Histogram]],
    shares: Sequence[Sequence[float]],
    x_label: str,
) -> str:
    """What the page's script shows at the pointer, in the form of `curves`."""
    bins = shown[0][1]
    points = [
        [
            axes.x(k + 0.5),
            f"{bins.range_of(k)} {x_label}",
            [
                [position + 1, axes.y(values[k]), f"{name} {one.counts[k]} ({values[k]:.1f} %)"]
                for position, ((name, one), values) in enumerate(zip(shown, shares, strict=True))
            ],
        ]
        for k in range(len(bins.edges))
    ]
    return json.dumps(points, separators=(",", ":"), ensure_ascii=False)
