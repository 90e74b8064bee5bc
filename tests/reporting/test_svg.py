import re

import pytest

from irlfast.reporting import svg
from irlfast.reporting.svg import Series, histograms, line_chart, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.4722222, "0.4722"),
        (-1.37654, "-1.377"),
        (20.0, "20"),
        (1234.5678, "1235"),
        (99999.0, "99999"),
        (123456.0, "1.23e+05"),
        (0.0006965, "0.0006965"),
        (0.00000123, "1.23e-06"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_points_lie_where_their_numbers_say() -> None:
    chart = line_chart("t", [Series(label="a", points=[(0, 0.0), (10, 10.0)])])
    (points,) = re.findall(r'polyline class="line policy" points="([^"]+)"', chart)
    (x0, y0), (x1, y1) = (tuple(map(float, p.split(","))) for p in points.split())
    assert (x0, x1) == (svg.LEFT, svg.WIDTH - svg.RIGHT)
    height = svg.HEIGHT - svg.TOP - svg.BOTTOM
    assert y0 - y1 == pytest.approx(height / 1.16, abs=0.2)  # 8 % of room above and below
    assert svg.TOP < y1 < y0 < svg.TOP + height


def test_a_flat_curve_is_drawn_flat_and_in_the_middle() -> None:
    chart = line_chart("t", [Series(label="a", points=[(0, 5.0), (1, 5.0 + 1e-9)])])
    (points,) = re.findall(r'points="([^"]+)"', chart)
    ys = {p.split(",")[1] for p in points.split()}
    assert ys == {f"{svg.TOP + (svg.HEIGHT - svg.TOP - svg.BOTTOM) / 2:.1f}"}


def test_one_point_is_a_chart() -> None:
    chart = line_chart("t", [Series(label="a", points=[(3, 1.0)])], level=0.5, level_label="<chance>")
    assert "a, iteration 3: 1" in chart
    assert "&lt;chance&gt;" in chart


def test_iterations_have_whole_ticks() -> None:
    chart = line_chart("t", [Series(label="a", points=[(0, 1.0), (3, 2.0)])])
    ticks = re.findall(rf'y="{svg.HEIGHT - 20}" text-anchor="middle">([^<]+)<', chart)
    assert ticks == ["0", "1", "2", "3"]


def test_histogram_bars_are_shares_of_each_side() -> None:
    chart = histograms("t", [0.0, 0.0, 0.0, 1.0], [1.0, 1.0], (0.0, 1.0))
    assert re.findall(r"<title>([^<]+)</title>", chart) == [
        "policy: 75% between 0 and 0.04167",
        "policy: 25% between 0.9583 and 1",
        "demonstrations: 100% between 0.9583 and 1",
    ]
    heights = {(name, float(h)) for name, h in re.findall(r'class="bar (\w+)"[^>]* height="([\d.]+)"', chart)}
    full = max(h for _, h in heights)
    assert {round(h / full, 2) for _, h in heights} == {0.75, 0.25, 1.0}
