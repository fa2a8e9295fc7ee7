"""Charts in inline SVG and HTML, without a library: curves over steps, before and after, horizontal bars.

Lines are drawn in a unit box that stretches to the page (strokes keep their width), labels are HTML beside
it, so that a chart reads well on a phone, on paper and in the dark. A missing or non-finite value is a gap.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from realm_fast.report.markup import Markup, number, percent, tag

BOX = 1000  # the side of the unit box in SVG units; two decimals are a hundred-thousandth of a chart
MAX_DRAWN_POINTS = 600  # of a series: more do not fit a screen's columns
Value = float | None


@dataclass(frozen=True)
class Series:
    """One line of a chart: `ys[i]` at `xs[i]`, in the order of xs."""

    label: str
    xs: Sequence[float]
    ys: Sequence[Value]
    color: int = 1  # --c1 … --c4 in report.css
    smooth: bool = True  # faint points and a smoothed line; False: a line through the points


@dataclass(frozen=True)
class Mark:
    """A vertical line at x, named in the hover text and, if there are few, above the chart."""

    x: float
    label: str


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    unit: str,
    x_label: str = "optimizer step",
    marks: Sequence[Mark] = (),
    note: str | Markup | None = None,
    from_zero: bool = False,
    show: Callable[[Value], str] = number,
    wide: bool = False,
) -> Markup:
    """A chart of one or more series over a shared x axis.

    Args:
        series: at least one; each may be empty or hold a single point.
        title, unit: what the y axis is, and what it is counted in.
        x_label: what the x axis is.
        marks: events on the x axis (a refresh).
        note: a sentence under the chart.
        from_zero: the y axis starts at 0.
        show: a value of y as text.
        wide: across the page instead of half of it.
    """
    cleaned = [(s, [(x, _finite(y)) for x, y in zip(s.xs, s.ys)]) for s in series]
    values = [y for _, points in cleaned for _, y in points if y is not None]
    caption = tag(
        "figcaption",
        tag("span", title, cls="chart-title"),
        tag("span", unit, cls="unit"),
        [tag("span", s.label, cls=f"key key-{s.color}") for s in series] if len(series) > 1 else None,
    )
    cls = "chart wide" if wide else "chart"
    if not values:
        return tag("figure", caption, tag("p", "Nothing was recorded.", cls="missing"), cls=cls)
    xs = [x for _, points in cleaned for x, _ in points]
    x_low, x_high = _padded(min(xs), max(xs))
    if 0 < x_low < x_high / 10:  # steps from the start: show the start
        x_low = 0
    scale = Scale.fit(values, from_zero=from_zero)

    def at_x(x: float) -> float:
        return (x - x_low) / (x_high - x_low)

    def path(kind: str, s: Series, points: Sequence[tuple[float, Value]]) -> Markup:
        return _path(kind, s.color, [(at_x(x), None if y is None else scale.at(y)) for x, y in thin(points)])

    lines = []
    for s, points in cleaned:
        if s.smooth and len(points) > 2:
            lines += [path("points", s, points), path("line", s, smooth(points))]
        else:
            lines.append(path("line", s, points))
    in_range = [mark for mark in marks if x_low <= mark.x <= x_high]
    in_steps = all(x == int(x) for x in xs)
    x_ticks = [t for t in ticks(x_low, x_high, 6) if x_low <= t <= x_high and (t == int(t) or not in_steps)]
    grid = [
        tag("path", d=f"M0 {_flip(scale.at(tick))}H{BOX}", cls="grid zero" if tick == 0 else "grid")
        for tick in scale.ticks
    ]
    verticals = [
        tag("path", tag("title", mark.label), d=f"M{_unit(at_x(mark.x))} 0V{BOX}", cls="mark")
        for mark in in_range
    ]
    svg = tag(
        "svg",
        grid,
        verticals,
        lines,
        viewBox=f"0 0 {BOX} {BOX}",
        preserveAspectRatio="none",
        role="img",
        aria_label=_describe(title, unit, cleaned, x_label, show),
    )
    plot = tag(
        "div",
        svg,
        [
            tag(
                "span", show_tick(tick, scale, show), cls="ytick", style=f"bottom:{100 * scale.at(tick):.2f}%"
            )
            for tick in scale.ticks
        ],
        [
            tag("span", number(whole(tick)), cls="xtick", style=f"left:{100 * at_x(tick):.2f}%")
            for tick in x_ticks
        ],
        cls="plot",
        data_hover=json.dumps(
            {
                "x": [x_low, x_high],
                "y": [scale.low, scale.high, scale.log],
                "xLabel": x_label,
                "series": [
                    {
                        "label": s.label,
                        "color": s.color,
                        "points": [
                            [whole(x), float(f"{y:.5g}"), show(y)] for x, y in thin(points) if y is not None
                        ],
                    }
                    for s, points in cleaned
                ],
            },
            separators=(",", ":"),
        ),
    )
    return tag(
        "figure",
        caption,
        plot,
        tag("div", x_label, " (log scale upwards)" if scale.log else None, cls="xlabel"),
        tag("p", note, cls="chart-note") if note else None,
        cls=cls,
    )


@dataclass(frozen=True)
class Scale:
    """Where a value stands between the bottom (0) and the top (1) of a chart."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def fit(cls, values: Sequence[float], *, from_zero: bool = False) -> "Scale":
        low, high = min(values), max(values)
        if low > 0 and high / low > 1000:
            # ends a float can hold: 1e-324 is 0 and 1e309 overflows
            first = max(math.floor(math.log10(low)), -300)
            last = min(math.ceil(math.log10(high)), 308)
            powers = range(first, last + 1, math.ceil((last - first) / 6))
            return cls(10.0**first, max(high, 10.0**last), True, tuple(10.0**power for power in powers))
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        low, high = _padded(low, high)
        marks = ticks(low, high, 5)
        return cls(min(low, marks[0]), max(high, marks[-1]), False, tuple(marks))

    def at(self, value: float) -> float:
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return (math.log10(max(value, self.low)) - low) / (high - low)
        # halves: the difference of two huge numbers of opposite sign would overflow
        return (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers from at or just under `low` to at or just over `high`, about `wanted` of them."""
    span = high / 2 - low / 2
    rough = span / max(wanted - 1, 1) * 2
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough * 0.7), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    found = [i * step for i in range(first, last + 1)]
    return [tick for tick in found if math.isfinite(tick)] or [low, high]


def show_tick(tick: float, scale: Scale, show: Callable[[Value], str]) -> str:
    """As many decimals as tell neighbouring ticks apart, and no more."""
    if show is not number:
        return show(tick)
    if scale.log or len(scale.ticks) < 2:
        return number(tick, 1) if scale.log else number(tick)
    step = abs(scale.ticks[1] - scale.ticks[0])
    if step < 1e-4 or max(abs(t) for t in scale.ticks) >= 1e9:
        return number(tick, 3)
    return f"{tick:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}".replace("-", "−")


def smooth(
    points: Sequence[tuple[float, Value]], half_life: float | None = None
) -> list[tuple[float, Value]]:
    """Moving average with weights that fall off exponentially on both sides, so that it does not lag.

    A missing value has no weight and no average.

    Args:
        half_life: in records; the default is `smoothing_half_life(len(points))`.
    """
    decay = 0.5 ** (1 / (half_life or smoothing_half_life(len(points))))

    def one_sided(values: Sequence[Value]) -> list[tuple[float, float]]:
        total = weight = 0.0
        sums: list[tuple[float, float]] = []
        for y in values:
            total, weight = decay * total + (y or 0.0), decay * weight + (y is not None)
            sums.append((total, weight))
        return sums

    ys = [y for _, y in points]
    averaged: list[tuple[float, Value]] = []
    for (x, y), left, right in zip(points, one_sided(ys), reversed(one_sided(ys[::-1]))):
        if y is None:
            averaged.append((x, None))
        else:  # both sides have counted y itself
            averaged.append((x, (left[0] + right[0] - y) / (left[1] + right[1] - 1)))
    return averaged


def smoothing_half_life(n: int) -> float:
    """A fortieth of the curve, at least one record."""
    return max(1.0, n / 40)


def thin(points: Sequence[tuple[float, Value]], limit: int = MAX_DRAWN_POINTS) -> list[tuple[float, Value]]:
    """At most about `limit` points that keep the first, the last and each stretch's extremes."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept = [points[0]]
    for start in range(0, len(points), size):
        present = [p for p in points[start : start + size] if p[1] is not None]
        if not present:
            kept.append(points[start])
            continue
        extremes = {min(present, key=lambda p: p[1] or 0), max(present, key=lambda p: p[1] or 0)}
        kept += sorted(extremes, key=lambda p: p[0])
    return [*kept, points[-1]]


@dataclass(frozen=True)
class Change:
    """One row of `before_after`: two values on its scale, each with its interval if known."""

    label: str
    before: Value
    after: Value
    before_interval: tuple[float, float] | None = None
    after_interval: tuple[float, float] | None = None

    @classmethod
    def measured(cls, label: str, before: Value, after: Value, n: int | None) -> "Change":
        """Two percentages of n trials each, with their Wilson intervals."""
        intervals = [wilson_interval(v, n) if v is not None and n else None for v in (before, after)]
        return cls(label, before, after, *intervals)


def before_after(
    changes: Sequence[Change],
    *,
    title: str,
    unit: str,
    show: Callable[[Value], str] = percent,
    note: str | None = None,
) -> Markup:
    """A dot plot: a hollow dot before, a filled one after, a line between, the 95% interval behind each."""
    caption = tag(
        "figcaption",
        tag("span", title, cls="chart-title"),
        tag("span", unit, cls="unit"),
        tag("span", "before", cls="key key-before"),
        tag("span", "after", cls="key key-after"),
    )
    numbers = [v for c in changes for v in map(_finite, (c.before, c.after)) if v is not None]
    ends = [end for c in changes for pair in (c.before_interval, c.after_interval) if pair for end in pair]
    if not numbers:
        return tag("figure", caption, tag("p", "Nothing was recorded.", cls="missing"), cls="chart dots")
    scale = Scale.fit([*numbers, *ends, 0.0])

    def left(value: float) -> str:
        return f"{100 * scale.at(value):.2f}%"

    def interval(ends: tuple[float, float] | None, cls: str) -> Markup | None:
        if not ends:
            return None
        width = f"{100 * (scale.at(ends[1]) - scale.at(ends[0])):.2f}%"
        return tag("span", cls=f"interval {cls}", style=f"left:{left(ends[0])};width:{width}")

    def dot(value: Value, cls: str) -> Markup | None:
        value = _finite(value)
        return (
            None
            if value is None
            else tag("span", cls=f"dot {cls}", style=f"left:{left(value)}", title=show(value))
        )

    rows = []
    for c in changes:
        before, after = _finite(c.before), _finite(c.after)
        link = None
        if before is not None and after is not None:
            low, high = sorted((scale.at(before), scale.at(after)))
            link = tag("span", cls="link", style=f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%")
        rows.append(
            tag(
                "div",
                tag("span", c.label, cls="dots-label"),
                tag(
                    "span",
                    [tag("i", style=f"left:{left(tick)}") for tick in scale.ticks],
                    interval(c.before_interval, "before"),
                    interval(c.after_interval, "after"),
                    link,
                    dot(before, "before"),
                    dot(after, "after"),
                    cls="track",
                ),
                tag("span", f"{show(before)} → {show(after)}", cls="dots-value"),
                cls="dots-row",
            )
        )
    axis = tag(
        "div",
        tag("span", cls="dots-label"),
        tag(
            "span",
            [tag("b", show_tick(t, scale, number), style=f"left:{left(t)}") for t in scale.ticks],
            cls="track",
        ),
        tag("span", cls="dots-value"),
        cls="dots-row dots-axis",
        aria_hidden="true",
    )
    return tag(
        "figure", caption, rows, axis, tag("p", note, cls="chart-note") if note else None, cls="chart dots"
    )


@dataclass(frozen=True)
class Bar:
    label: str
    value: Value
    shown: str
    detail: str | None = None


def bar_chart(bars: Sequence[Bar], *, title: str, unit: str, color: int = 1) -> Markup:
    """Horizontal bars from zero, each with its value beside it."""
    top = max((v for bar in bars if (v := _finite(bar.value)) is not None), default=0.0) or 1.0
    rows = [
        tag(
            "div",
            tag("span", bar.label, cls="bar-label"),
            tag(
                "span",
                tag(
                    "span",
                    cls=f"bar bar-{color}",
                    style=f"width:{100 * max(_finite(bar.value) or 0.0, 0) / top:.2f}%",
                ),
                tag("span", bar.shown, cls="bar-value"),
                cls="bar-track",
            ),
            tag("span", bar.detail, cls="bar-detail") if bar.detail else None,
            cls="bar-row",
        )
        for bar in bars
    ]
    caption = tag("figcaption", tag("span", title, cls="chart-title"), tag("span", unit, cls="unit"))
    return tag("figure", caption, rows or tag("p", "Nothing was recorded.", cls="missing"), cls="chart bars")


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share seen in n independent trials, both in percent (Wilson 1927)."""
    if n <= 0:
        return 0.0, 100.0
    p = min(max(share / 100, 0.0), 1.0)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def _finite(value: Value) -> Value:
    return value if value is not None and math.isfinite(value) else None


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty, whatever came."""
    if high > low:
        return low, high
    pad = abs(low) / 10 or 1.0
    return low - pad, high + pad


def whole(x: float) -> float:
    """1.0 as the int 1, so that a step reads as one."""
    return int(x) if abs(x) < 2**53 and x == int(x) else x


def _unit(share: float) -> str:
    return f"{BOX * share:.2f}".rstrip("0").rstrip(".")


def _flip(share: float) -> str:
    return _unit(1 - share)  # SVG's y points down


def _path(kind: str, color: int, points: Sequence[tuple[float, Value]]) -> Markup:
    """Points as a broken line ("line") or as round dots ("points"); a lone point of a line becomes a dot."""
    present: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            present.append([])
        else:
            present[-1].append(f"{_unit(x)} {_flip(y)}")
    runs = [run for run in present if run]
    if kind == "points":
        d = "".join(f"M{place}h0" for run in runs for place in run)
    else:
        d = "".join("M" + "L".join(run) if len(run) > 1 else f"M{run[0]}h0" for run in runs)
        kind += " lone" if all(len(run) == 1 for run in runs) else ""
    return tag("path", d=d, cls=f"{kind} s{color}")


def _describe(
    title: str,
    unit: str,
    cleaned: Sequence[tuple[Series, Sequence[tuple[float, Value]]]],
    x_label: str,
    show: Callable[[Value], str],
) -> str:
    """The chart in a sentence, for who cannot see it."""
    sentences = []
    for s, points in cleaned:
        present = [(x, y) for x, y in points if y is not None]
        if present:
            (x0, y0), (x1, y1) = present[0], present[-1]
            first, last = number(whole(x0)), number(whole(x1))
            sentences.append(f"{s.label}: {show(y0)} at {x_label} {first}, {show(y1)} at {last}.")
    return f"{title} ({unit}). " + " ".join(sentences)
