"""realm_fast.report.charts: values land where they belong, whatever the values are."""

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_fast.report.charts import (
    BOX,
    Bar,
    Change,
    Mark,
    Scale,
    Series,
    bar_chart,
    before_after,
    line_chart,
    show_tick,
    smooth,
    thin,
    ticks,
    wilson_interval,
)
from realm_fast.report.markup import number

NAN, INF = math.nan, math.inf


def chart(xs, ys, **options):
    return line_chart([Series("a", xs, ys)], title="T", unit="u", **options)


def paths(html, cls):
    return re.findall(rf'<path d="([^"]*)" class="{cls} s1">', html)


def coordinates(d):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", d)]


def test_points_land_where_the_axes_say():
    html = chart([0, 50, 100], [0.0, 5.0, 10.0])
    assert coordinates(paths(html, "points")[0]) == [(0, BOX), (BOX / 2, BOX / 2), (BOX, 0)]
    ticks_at = re.findall(r'class="ytick" style="bottom:([\d.]+)%">([^<]+)<', html)
    assert {text: float(at) for at, text in ticks_at}.items() >= {"0": 0.0, "10": 100.0}.items()
    steps = {
        text: float(at) for at, text in re.findall(r'class="xtick" style="left:([\d.]+)%">([^<]+)<', html)
    }
    assert steps["0"] == 0
    assert steps["100"] == 100


def test_a_single_point_is_a_dot_in_the_middle():
    html = chart([7], [3.0])
    (d,) = paths(html, "line lone")
    assert d.endswith("h0")
    assert coordinates(d)[0] == (500, 500)


@pytest.mark.parametrize("ys", [[], [None], [NAN, INF, None]])
def test_no_values_are_said_to_be_none(ys):
    html = chart(list(range(len(ys))), ys)
    assert "Nothing was recorded." in html
    assert "<svg" not in html


def test_a_missing_value_is_a_gap():
    html = chart([0, 1, 2, 3, 4], [1.0, 2.0, NAN, 4.0, 5.0], from_zero=True)
    (line,) = paths(html, "line")
    assert line.count("M") == 2
    assert len(coordinates(paths(html, "points")[0])) == 4
    assert "nan" not in html.lower().replace("nans", "")


@pytest.mark.parametrize(
    "ys",
    [[1e-300, 1e300], [-1e308, 1e308], [0.0, 0.0], [5e-324, 1.0], [1e308, 1.0000001e308], [-3.0, 1e-9, 4e7], [1e-12, 2e-12, 0.0]],
)  # fmt: skip
def test_huge_and_tiny_ranges_stay_in_the_box(ys):
    html = chart(list(range(len(ys))), ys)
    for x, y in coordinates("".join(re.findall(r'<path d="(M[^"]*)" class="(?:line|points)', html))):
        assert -0.01 <= x <= BOX + 0.01
        assert -0.01 <= y <= BOX + 0.01
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"data-hover=\"[^\"]*\"", "", html))


def test_a_logarithmic_axis_is_chosen_for_three_orders_of_magnitude():
    scale = Scale.fit([0.01, 1000.0])
    assert scale.log
    assert [scale.at(v) for v in (0.01, 10 ** (0.5), 1000.0)] == pytest.approx([0, 0.5, 1])
    assert not Scale.fit([1.0, 999.0]).log
    assert not Scale.fit([0.0, 1e9]).log
    assert "(log scale upwards)" in chart([0, 1], [1e-3, 1e3])


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12))
@settings(max_examples=200, deadline=None)
def test_ticks_are_round_and_cover_the_range(low, span):
    high = low + span
    if not high > low or span < abs(low) * 1e-9:
        return
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 9
    assert found == sorted(found)
    step = found[1] - found[0]
    assert found[0] <= low + step * 1e-6
    assert found[-1] >= high - step * 1e-6
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-2


def test_neighbouring_ticks_read_differently():
    for values in ([0.0, 1.0], [1000.0, 1003.0], [0.001, 0.0017], [1e-7, 2e-7], [-5e10, 5e10]):
        scale = Scale.fit(values)
        shown = [show_tick(t, scale, number) for t in scale.ticks]
        assert len(set(shown)) == len(shown)


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_smoothing_stays_within_the_values_and_keeps_gaps(ys):
    points = list(enumerate(ys))
    smoothed = smooth(points)
    present = [y for y in ys if y is not None]
    assert [y is None for _, y in smoothed] == [y is None for y in ys]
    for _, y in smoothed:
        if y is not None:
            slack = 1e-9 * max(1.0, *map(abs, present))
            assert min(present) - slack <= y <= max(present) + slack


def test_smoothing_is_the_weighted_average_it_says_it_is():
    ys = [3.0, -1.0, None, 4.0, 10.0]
    smoothed = smooth(list(enumerate(ys)), half_life=2)
    for i, y in enumerate(ys):
        if y is None:
            continue
        weights = [0.5 ** (abs(i - j) / 2) * (v is not None) for j, v in enumerate(ys)]
        expected = sum(w * (v or 0) for w, v in zip(weights, ys)) / sum(weights)
        assert smoothed[i][1] == pytest.approx(expected)


def test_a_straight_line_is_smoothed_to_itself_away_from_its_ends():
    points = [(x, 2.0 * x) for x in range(401)]
    smoothed = dict(smooth(points))
    assert smoothed[200] == pytest.approx(400.0, abs=1e-3)


def test_thinning_keeps_ends_and_extremes():
    points = [(x, math.sin(x / 50)) for x in range(20_000)]
    points[12_345] = (12_345, 9.0)
    points[777] = (777, None)
    thinned = thin(points, 600)
    assert len(thinned) <= 700
    assert thinned[0] == points[0]
    assert thinned[-1] == points[-1]
    assert (12_345, 9.0) in thinned
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)
    assert set(thinned) <= set(points)
    assert thin(points[:600], 600) == points[:600]


def test_marks_outside_the_axis_are_left_out():
    html = chart([10, 20], [1.0, 2.0], marks=[Mark(15, "in"), Mark(99, "out")])
    assert html.count('class="mark"') == 1
    assert "<title>in</title>" in html


def test_the_hover_data_are_the_points():
    (hover,) = re.findall(r'data-hover="([^"]*)"', chart([1, 2, 3], [0.5, None, 1.5]))
    data = json.loads(hover.replace("&quot;", '"'))
    assert [p[:2] for p in data["series"][0]["points"]] == [[1, 0.5], [3, 1.5]]


def test_before_and_after_on_one_scale():
    html = before_after(
        [Change("k", 10.0, 40.0, (5.0, 20.0), None), Change("j", None, 30.0)], title="T", unit="%"
    )
    left = dict(re.findall(r'class="(dot \w+)" style="left:([\d.]+)%" title="(?:10.0|40.0)%"', html))
    assert float(left["dot after"]) == pytest.approx(4 * float(left["dot before"]))
    assert html.count('class="link"') == 1
    assert "n/a → 30.0%" in html
    assert "Nothing was recorded." in before_after([Change("k", None, NAN)], title="T", unit="%")


def test_bars_are_in_proportion():
    html = bar_chart(
        [Bar("a", 10.0, "10"), Bar("b", 5.0, "5"), Bar("c", None, "n/a"), Bar("d", NAN, "n/a")],
        title="T",
        unit="u",
    )
    assert re.findall(r"width:([\d.]+)%", html) == ["100.00", "50.00", "0.00", "0.00"]
    assert "Nothing was recorded." in bar_chart([], title="T", unit="u")


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    [
        (50.0, 100, 40.383, 59.617),
        (0.0, 10, 0.0, 27.753),
        (100.0, 10, 72.247, 100.0),
        (1.2, 3610, 0.891, 1.609),
    ],
)
def test_wilson_interval_against_known_values(share, n, low, high):
    assert wilson_interval(share, n) == pytest.approx((low, high), abs=0.01)


def test_no_trials_say_nothing():
    assert wilson_interval(0.0, 0) == (0.0, 100.0)
