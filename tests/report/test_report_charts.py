"""Charts: values land where the axes say, odd values are left out, texts are escaped."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from archipel.report import media, svg
from archipel.report.samples import entropy
from archipel.report.training import foreign, thin


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.1234, "0.123"),
        (1234.5, "1,234"),
        (-0.5, "−0.5"),
        (2e-5, "2 × 10⁻⁵"),
        (1.13e6, "1.13 M"),
        (2.1e14, "2.1 × 10¹⁴"),
        (math.nan, "–"),
        (100.0, "100"),
        (0.0004, "0.0004"),
        (9.999, "10"),
    ],
)
def test_numbers_are_short_and_readable(value: float, text: str) -> None:
    assert svg.number(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (0.31, 0.34), (1e-7, 3e-7), (0, 123456), (5, 5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = svg.nice_ticks(low, high)
    assert 1 <= len(ticks) <= 8 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_a_line_lies_where_its_axes_say() -> None:
    text = str(svg.line_chart([svg.Series("a", [0, 5, 10], [0, 1, 2])], "a line", "x", "y", zero=True))
    points = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', text)[1].split()]  # type: ignore[index]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x0, y0) == (svg.LEFT, svg.HEIGHT - svg.BOTTOM) and (x2, y2) == (svg.WIDTH - svg.RIGHT, svg.TOP)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    series = svg.Series("a", [1, 2, 3, 0], [math.nan, math.inf, 0.5, 0.5])
    assert series.points(log_x=True, log_y=True) == [(3.0, 0.5)]
    assert svg.line_chart([svg.Series("a", [1], [math.nan])], "a", "x", "y") == ""
    assert "<circle" in svg.line_chart([series], "a", "x", "y", log_x=True, log_y=True)
    assert "nan" not in svg.line_chart([svg.Series("flat", [1, 2], [0, 0])], "a", "x", "y", log_y=False)


def test_log_axes_have_ticks_over_one_and_many_decades() -> None:
    for low, high in ((0.31, 0.34), (0.02, 3), (1e-3, 1e6)):
        axis = svg.Axis([low, high], 0, 100, log=True)
        assert axis(low) == 0 and axis(high) == 100 and axis.ticks()


def test_every_text_of_a_chart_is_escaped() -> None:
    bad = "<b>&\"'"
    charts = [
        svg.line_chart([svg.Series(bad, [0, 1], [0, 1])], bad, bad, bad),
        svg.stacked_area([0, 1], [[0.5, 0.5]], [bad], bad, bad),
        svg.stacked_area([0], [[0.5]], [bad], bad, bad),
        svg.bar_chart([bad], [(bad, "arch", [0.5])], bad),
        svg.interval_chart([(bad, 0.1, 0.0, 0.2, "arch")], bad, bad),
        svg.heat_map([[1.0]], [bad], [bad], bad, bad, bad),
        svg.trace([[0.5, 0.5]], bad),
    ]
    for chart in charts:
        assert "<b>" not in chart and "&lt;b&gt;" in chart and 'role="img"' in chart


def test_stacked_shares_reach_the_top() -> None:
    text = str(svg.stacked_area([1, 2], [[0.25, 0.5], [0.75, 0.5]], ["a", "b"], "w", "x"))
    last = re.findall(r'points="([^"]+)"', text)[-1].split()
    assert last[0].endswith(f",{svg.TOP}") and last[1].endswith(f",{svg.TOP}")


def test_intervals_without_bounds_and_bars_without_values_are_drawn() -> None:
    assert "span" not in svg.interval_chart([("a", 0.1, None, None, "arch")], "l", "x")
    assert "NaN" not in svg.bar_chart(["a", "b"], [("g", "arch", [math.nan])], "l")
    assert svg.bar_chart([], [], "l") == "" and svg.interval_chart([], "l", "x") == ""


def test_long_curves_become_short_and_keep_their_end() -> None:
    x, y = thin(list(range(100_000)), [1.0] * 100_000)
    assert len(x) <= 160 and x[-1] == 99_999 and set(y) == {1.0}


def test_entropy_is_that_of_the_closed_form() -> None:
    weights = np.array([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(entropy(weights), [0, math.log(4), math.log(2)], atol=1e-9)


def test_an_expert_is_isolated_by_its_own_names_only() -> None:
    assert foreign("1", ["shards/1/train.safetensors", "experts/1/model.safetensors", "run.toml"]) == []
    assert foreign("1", ["shards/10/card.json", "experts/0/card.json", "router/card.json"]) == [
        "shards/10/card.json",
        "experts/0/card.json",
        "router/card.json",
    ]


def test_clips_of_one_frame_and_large_clips_become_pictures() -> None:
    assert media.clip_uri(np.zeros((1, 8, 8, 3), np.uint8), 4.0).startswith("data:image/webp;base64,")
    import base64
    import io

    from PIL import Image

    with Image.open(
        io.BytesIO(base64.b64decode(media.clip_uri(np.zeros((2, 300, 200, 3), np.uint8), 8.0).partition(",")[2]))
    ) as image:
        assert image.size == (107, 160)
    for wrong in (np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32)):
        with pytest.raises(ValueError, match="a clip is uint8"):
            media.clip_uri(wrong, 4.0)
