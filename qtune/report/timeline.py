"""The timeline of one training step: what is alive over time, stacked, each category told by hatch, grey and label."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qtune.memory.tracing import categories
from qtune.report.charts import axis_texts, ticks
from qtune.report.drawing import (
    CHARACTER,
    DIM,
    FAINT,
    INK,
    PAPER,
    Area,
    Box,
    Drawing,
    Line,
    Look,
    Shape,
    Words,
    svg,
)
from qtune.sizes import GIB, MIB, size_text
from qtune.whole import write_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from qtune.memory.predict import Prediction

WIDTH, HEIGHT = 1032, 460
LEFT, TOP, BOTTOM = 74, 66, 58
LEGEND = 384
"""Width of the column of names and figures."""
ROW = 20
HEADROOM = 1.12
"""Height of the axis over the peak, so that the peak's label has room."""
LABEL = 11.0
"""Size of the labels inside the areas."""

LOOKS = {category.name: Look(category.fill, category.hatch) for category in categories.CATEGORIES}


@dataclass(frozen=True)
class Timeline:
    """What a picture is drawn of."""

    curves: Mapping[str, Sequence[int]]
    """Live bytes by category, each as long as the others."""
    phases: Sequence[tuple[int, str]]
    """(first point, phase)."""
    at_peak: Mapping[str, int]
    """Bytes by category at the highest moment."""
    where: str
    """The highest moment in words."""

    @property
    def points(self) -> int:
        """Length of the curves."""
        return len(next(iter(self.curves.values())))

    @classmethod
    def of(cls, prediction: Prediction) -> Timeline:
        """The curves of a prediction."""
        return cls.from_json(asdict(prediction))

    @classmethod
    def from_json(cls, prediction: Mapping[str, Any]) -> Timeline:
        """The curves of a prediction as it stands in memory.json.

        That a model is larger while it is loaded is no part of a step.
        """
        moments = [moment for phase, moment in prediction["by_phase"].items() if phase != "load"]
        highest = max(moments, key=lambda moment: int(moment["bytes"]))
        where = f"{highest['phase']}, {highest['module'] or 'outside the model'}"
        return cls(
            prediction["timeline"], [(first, phase) for first, phase in prediction["phases"]], highest["alive"], where
        )


def write_timeline(prediction: Prediction, title: str, file: Path) -> None:
    """Writes the picture of a prediction as an SVG file."""
    write_text(file, svg(timeline_drawing(Timeline.of(prediction), title)))


def timeline_drawing(timeline: Timeline, title: str) -> Drawing:
    """The stacked areas with the phases below, the peak named, and a column of names with their figures."""
    curves = {name: values for name, values in timeline.curves.items() if any(values)}
    totals = [sum(column) for column in zip(*curves.values(), strict=True)]
    frame = _Frame(timeline.points, HEADROOM * max(totals))
    shapes: list[Shape] = [Words(14, 26, title, 15, bold=True)]
    shapes += _grid(frame)
    below = [0.0] * timeline.points
    labels: list[Shape] = []
    for name, values in curves.items():
        above = [low + value for low, value in zip(below, values, strict=True)]
        lower, upper = ([frame.y(value) for value in line] for line in (below, above))
        outline = [(frame.x(at), y) for at, y in enumerate(upper)]
        floor = [(frame.x(at), y) for at, y in reversed(list(enumerate(lower)))]
        shapes.append(Area([*outline, *floor], look_of(name), f"{name}: at most {size_text(max(values))}"))
        labels += _label(name, frame, lower, upper)
        below = above
    shapes += _phases(timeline, frame)
    shapes += labels
    shapes += _peak(timeline, totals, frame)
    shapes += _legend(timeline, curves)
    return Drawing(WIDTH, HEIGHT, title, shapes)


def look_of(category: str) -> Look:
    """How a category is drawn; one that this version does not know is drawn as "other"."""
    return LOOKS.get(category, LOOKS[categories.OTHER])


@dataclass(frozen=True)
class _Frame:
    """Points and bytes -> pixels."""

    points: int
    top: float

    def x(self, point: float) -> float:
        return LEFT + (WIDTH - LEFT - LEGEND) * point / max(1, self.points - 1)

    def y(self, value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / self.top)

    @property
    def right(self) -> float:
        return self.x(self.points - 1)


def _grid(frame: _Frame) -> Iterator[Shape]:
    """Levels at round numbers of one unit."""
    unit, word = (GIB, "GiB") if frame.top >= GIB else (MIB, "MiB")
    rows = ticks(0.0, frame.top / unit)
    for value, told in zip(rows, axis_texts(rows), strict=True):
        if value * unit <= frame.top:
            y = frame.y(value * unit)
            yield Line(LEFT, y, frame.right, y, FAINT)
            yield Words(LEFT - 8, y + 4, f"{told} {word}" if value else "0", anchor="end", ink=DIM)


def _label(name: str, frame: _Frame, lower: list[float], upper: list[float]) -> Iterator[Shape]:
    """The category's name inside its own area, where that is thickest; nothing where it has no room anywhere."""
    width, height = len(name) * LABEL * CHARACTER + 8, LABEL + 5
    step = frame.x(1) - frame.x(0)
    columns = math.ceil(width / step) + 1
    rooms = [
        min(lower[first : first + columns]) - max(upper[first : first + columns])
        for first in range(len(lower) - columns + 1)
    ]
    if max(rooms) < height:
        return
    # Of the places that are nearly as good as the best, the one nearest to the middle: labels stand below each other.
    good = [first for first, room in enumerate(rooms) if room >= max(height, 0.85 * max(rooms))]
    place = min(good, key=lambda first: abs(first + columns / 2 - len(lower) / 2))
    middle = (frame.x(place) + frame.x(place + columns - 1)) / 2
    level = (min(lower[place : place + columns]) + max(upper[place : place + columns])) / 2
    yield Box(middle - width / 2, level - height / 2, width, height)
    yield Words(middle, level + LABEL * 0.36, name, LABEL, "middle")


def _phases(timeline: Timeline, frame: _Frame) -> Iterator[Shape]:
    ends = [first for first, _ in timeline.phases[1:]] + [timeline.points - 1]
    foot = HEIGHT - BOTTOM
    yield Line(LEFT, foot, frame.right, foot, INK)
    for (first, phase), end in zip(timeline.phases, ends, strict=True):
        if first:
            x = frame.x(first)
            yield Line(x, TOP - 12, x, foot, PAPER, width=2.5)  # under the dashes: they must be seen on dark areas
            yield Line(x, TOP - 12, x, foot + 22, INK, "dashed")
        yield Words((frame.x(first) + frame.x(end)) / 2, foot + 17, phase, anchor="middle", bold=True)
    middle = (LEFT + frame.right) / 2
    yield Words(middle, foot + 40, "allocation by allocation; short phases are drawn wider", 11, "middle", DIM)


def _peak(timeline: Timeline, totals: list[int], frame: _Frame) -> Iterator[Shape]:
    point = max(range(len(totals)), key=totals.__getitem__)
    x, y = frame.x(point), frame.y(totals[point])
    yield Line(LEFT, y, frame.right, y, INK, "dotted")
    yield Line(x, y - 8, x, y + 8, INK, width=2.5)
    # To the side of the mark that has room.
    is_left = x - LEFT < (frame.right - LEFT) / 2
    side = x + 7 if is_left else x - 7
    label = Words(
        side, y - 5, f"peak {size_text(sum(timeline.at_peak.values()))}", 12, "start" if is_left else "end", bold=True
    )
    yield Box(side if is_left else side - label.width, y - 16, label.width, 14)
    yield label
    yield Words(14, 46, f"highest in {timeline.where}", 12, ink=DIM)


def _legend(timeline: Timeline, curves: Mapping[str, Sequence[int]]) -> Iterator[Shape]:
    """Names from the top of the stack down, with their bytes at the peak and their most at any time."""
    left, peak, most = WIDTH - LEGEND + 18, WIDTH - 96, WIDTH - 14
    y = TOP
    yield Words(peak, y, "at the peak", 11, "end", DIM)
    yield Words(most, y, "at most", 11, "end", DIM)
    for name, values in reversed(list(curves.items())):
        y += ROW
        at_peak = timeline.at_peak.get(name, 0)
        yield Box(left, y - 11, 22, 14, look_of(name), framed=True)
        yield Words(left + 30, y, name)
        yield Words(peak, y, size_text(at_peak) if at_peak else "–", anchor="end")
        yield Words(most, y, size_text(max(values)), anchor="end", ink=DIM)
    y += ROW + 4
    yield Line(left, y - 16, most, y - 16, INK)
    yield Words(left + 30, y, "together", bold=True)
    yield Words(peak, y, size_text(sum(timeline.at_peak.values())), anchor="end", bold=True)
