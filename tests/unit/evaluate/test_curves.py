from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from markupsafe import Markup

from amenable.evaluate import curves
from amenable.evaluate.curves import Series

T = np.arange(60)
NOISE = np.random.default_rng(0).normal(0, 0.03, 60)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (1 - np.exp(-T / 8) + NOISE, "rose, then levelled off"),
        (np.exp(-T / 8) + NOISE, "fell, then levelled off"),
        (T / 60 + NOISE, "rose and was still rising at the end"),
        (-T / 60 + NOISE, "fell and was still falling at the end"),
        (np.sin(T / 60 * 3) + NOISE, "rose, then turned back"),
        (NOISE, "flat"),
        (T[:6], "too short to read"),
        (np.full(60, 0.05), "flat"),
    ],
)
def test_trend_names_the_shape(values: np.ndarray, words: str) -> None:
    assert curves.trend(values.tolist()) == words


def test_first_and_last_fifth_by_hand() -> None:
    """Ten values, two a fifth: (0 + 2) / 2, (6 + 8) / 2; variance 2 each, error sqrt(2/2 + 2/2)."""
    ends = curves.first_and_last_fifth([0, 2, 5, 5, 5, 5, 5, 5, 6, 8])
    assert ends == pytest.approx((1.0, 7.0, math.sqrt(2)))


def test_moving_average_leaves_gaps_out() -> None:
    assert curves.moving_average([1.0, math.nan, 3.0], 3).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 7, [-2, 0, 2, 4, 6]),
        (0, 60, [0, 20, 40, 60]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert curves.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.05, "−0.05"),
        (1234.4, "1234"),
        (0.1 + 0.2, "0.3"),
        (1e-5, "1e−05"),
        (math.nan, "–"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert curves.number(value) == text


def test_a_long_series_is_thinned_and_keeps_its_ends() -> None:
    shown = curves.thin(Series("x", list(range(5000)), list(range(5000)), list(range(5000))))
    assert len(shown.x) <= curves.MAX_POINTS + 1
    assert (shown.x[0], shown.x[-1]) == (0, 4999)


def test_chart_is_well_formed_escaped_and_carries_its_values() -> None:
    hostile = '<script>"&'
    svg = curves.line_chart(
        hostile, [Series(hostile, [0, 1, 2], [1, math.nan, 3])], x_label=hostile
    )
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert "<script" not in svg
    columns = json.loads(root.attrib["data-hover"])
    assert [c[1] for c in columns] == [f"{hostile} 0", f"{hostile} 2"]
    assert root.find(".//path[@class='line']").attrib["d"].count("M") == 2  # type: ignore[union-attr]


def test_a_chart_of_nothing_is_empty() -> None:
    assert curves.line_chart("x", [Series("x", [0], [math.nan])], x_label="step") == Markup("")
    assert curves.line_chart("x", [], x_label="step") == Markup("")


def test_a_chart_of_one_point_or_a_constant_can_be_drawn() -> None:
    for y in ([0.0], [5.0]):
        ElementTree.fromstring(curves.line_chart("x", [Series("x", [3], y)], x_label="step"))


def test_marks_put_the_middle_in_the_middle_and_clip_what_is_outside() -> None:
    root = ElementTree.fromstring(curves.interval_mark(0.5, [-1, 2], label="a & b"))
    assert root.attrib["aria-label"] == "a & b"
    assert float(root.find("circle").attrib["cx"]) == 150  # type: ignore[union-attr]
    whisker = root.find("path[@class='whisker']").attrib["d"]  # type: ignore[union-attr]
    assert whisker.startswith("M4.0 14H296.0")
    bar = ElementTree.fromstring(curves.bar(0.25, [0.2, 0.3], reference=0.5, muted=True))
    assert float(bar.find("rect").attrib["width"]) == 73  # type: ignore[union-attr]


def test_steps_have_whole_ticks() -> None:
    svg = curves.line_chart("x", [Series("x", [1, 2, 3], [1.0, 5.0, 1.0])], x_label="step")
    middle = [
        e.text for e in ElementTree.fromstring(svg).iter("text") if e.get("text-anchor") == "middle"
    ]
    assert middle == ["1", "2", "3"]


def test_root_kl_puts_negative_estimates_at_zero() -> None:
    assert curves.root_kl([-0.1, 0.0, 4.0]).tolist() == [0.0, 0.0, 2.0]
