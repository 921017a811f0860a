"""Series of a run -> line charts and bars in SVG that are read without colour, on paper and on a dark screen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from qtune.report.html import Html, element

Point = tuple[float, float]
Layout = Callable[[float], str]

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
DIGIT = 7.7
"""Width of a digit at the size of the style sheet, in pixels: 12 px DejaVu Sans, the widest of the usual fonts."""
MOST_POINTS = 400
"""More than the chart has room for; a longer series is drawn as means."""


@dataclass(frozen=True)
class Series:
    """A named line; "marked" is dashed with a dot at each point, for measurements that are far apart; "crosses" are
    points alone, which are never drawn as means."""

    name: str
    points: Sequence[Point]
    style: Literal["solid", "dashed", "marked", "crosses"] = "solid"


def line_chart(
    title: str, series: Sequence[Series], layout: Layout, x_name: str = "step", *, percent: bool = False
) -> Html | None:
    """A chart of the series, both axes from 0; None where there is nothing to draw.

    layout: of a value at a point. percent: whether the values are shares, which the axis has in per cent.
    """
    drawn = [replace(one, points=_shown(one)) for one in series]
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return None
    points = [point for one in drawn for point in one.points]
    rows = ticks(0.0, max(y for _, y in points) or 1.0)
    last = max(max(x for x, _ in points), 1.0)
    columns = [value for value in ticks(0.0, last, whole=True) if value <= last]
    frame = _Frame(last, rows[-1])
    parts = [element("title", title)]
    for value, told in zip(rows, axis_texts(rows, percent=percent), strict=True):
        y = frame.y(value)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", told, x=LEFT - 8, y=y + 4, text_anchor="end"))
    for value in columns:
        told, x = f"{value:,.0f}", frame.x(value)
        # Ten thousand at the end of the axis would be cut at the edge of the picture.
        has_room = x + len(told) * DIGIT / 2 < WIDTH
        where, anchor = (x, "middle") if has_room else (WIDTH, "end")
        parts.append(element("text", told, x=where, y=HEIGHT - 20, text_anchor=anchor))
    parts.append(element("text", x_name, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, text_anchor="middle"))
    for one in drawn:
        parts += _drawn(one, frame, layout)
    picture = element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    names = [_key(one) for one in drawn] if len(drawn) > 1 else []
    # Title, legend and picture each take a row of the grid, so that charts beside each other stay on one level.
    caption = element("figcaption", element("b", title), element("div", *names, class_="legend"))
    return element("figure", caption, picture)


def _shown(series: Series) -> list[Point]:
    points = finite(series.points)
    return points if series.style == "crosses" else thinned(points)


def finite(points: Sequence[Point]) -> list[Point]:
    """The points that can be drawn: a loss may be NaN."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: means of neighbours, the last at the last x."""
    size = math.ceil(len(points) / most) or 1
    if size == 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to seven round values (1, 2 or 5 times a power of ten apart) that enclose low and high."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 5)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


MOST_DECIMALS, MOST_PLAIN = 4, 1e6
"""What an axis has room for: beyond these its values are powers of ten."""


def axis_texts(values: Sequence[float], *, percent: bool = False) -> list[str]:
    """The values of an axis (`ticks`), all in one form: with as many decimals each, or all as powers of ten.

    Python's own "g" chooses for each value by itself: "5e-05" below "0.0001".
    """
    scale, unit = (100, "%") if percent else (1, "")
    step = scale * min((high - low for low, high in pairwise(values)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals <= MOST_DECIMALS and scale * max(values) < MOST_PLAIN:
        return [f"{scale * value:,.{decimals if value else 0}f}{unit}" for value in values]
    digits = next((many for many in range(4) if all(math.isclose(float(f"{one:.{many}e}"), one) for one in values)), 4)
    return [f"{scale * value:.{digits}e}{unit}" if value else f"0{unit}" for value in values]


@dataclass(frozen=True)
class _Frame:
    """Data coordinates -> picture coordinates."""

    x_high: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + value / self.x_high * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.y_high * (HEIGHT - TOP - BOTTOM)


def _cross(x: float, y: float, size: float = 4.5) -> Html:
    """A cross, which is told from a dot without colour."""
    arms = f"M{x - size:.1f} {y - size:.1f}L{x + size:.1f} {y + size:.1f}M{x - size:.1f} {y + size:.1f}"
    return element("path", d=f"{arms}L{x + size:.1f} {y - size:.1f}", class_="cross")


def _drawn(series: Series, frame: _Frame, layout: Layout) -> list[Html]:
    if series.style == "crosses":
        return [
            element("g", element("title", f"{series.name}: {layout(y)} at {x:,.0f}"), _cross(frame.x(x), frame.y(y)))
            for x, y in series.points
        ]
    places = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in series.points)
    parts = [element("polyline", points=places, class_=series.style)]
    if series.style == "marked" or len(series.points) == 1:
        for x, y in series.points:
            told = element("title", f"{series.name} {layout(y)} at {x:,.0f}")
            parts.append(element("g", told, element("circle", cx=frame.x(x), cy=frame.y(y), r=3.5), class_="dot"))
    return parts


def _key(series: Series) -> Html:
    """A sample of the line beside its name."""
    if series.style == "crosses":
        sample = [_cross(15, 6)]
    else:
        sample = [element("line", x1=0, x2=30, y1=6, y2=6, class_=series.style)]
    if series.style == "marked":
        sample.append(element("circle", cx=15, cy=6, r=3.5, class_="dot"))
    return element("span", element("svg", *sample, viewBox="0 0 30 12", class_="key", aria_hidden="true"), series.name)


def bar(share: float) -> Html:
    """A horizontal bar of that share of the width."""
    block = element("rect", x=0, y=0, width=max(0.5, 300 * share), height=12)
    return element("svg", block, viewBox="0 0 300 12", preserveAspectRatio="none", aria_hidden="true")
