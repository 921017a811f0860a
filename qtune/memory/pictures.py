"""The timeline of one step as SVG: what is alive over time, stacked, readable in black and white."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtune.memory.predict import Prediction

GIB = 2**30
WIDTH, HEIGHT, LEFT, TOP, LEGEND = 960, 420, 64, 28, 250

# Alternating light and dark greys with a blue cast: neighbours differ without color, and a line parts them.
FILLS = ("#1f2a44", "#c9d3e6", "#4a5d85", "#e8edf6", "#7388b3", "#a9b8d6", "#2f4068", "#dbe2f0", "#5f75a3", "#93a6cb")


def timeline_svg(prediction: Prediction, title: str) -> str:
    """A stacked area of live bytes by category, phases marked, the peak named. Self-contained: no script, no font."""
    curves = {name: values for name, values in prediction.timeline.items() if any(values)}
    points = len(next(iter(curves.values())))
    top = max(sum(column) for column in zip(*curves.values(), strict=True)) * 1.05
    plot_width, plot_height = WIDTH - LEFT - LEGEND, HEIGHT - 2 * TOP

    def x(point: float) -> float:
        return LEFT + plot_width * point / max(1, points - 1)

    def y(value: float) -> float:
        return TOP + plot_height * (1 - value / top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"',
        ' font-size="12">',
        f'<title>{escape(title)}</title><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    below = [0] * points
    for place, (name, values) in enumerate(curves.items()):
        above = [low + value for low, value in zip(below, values, strict=True)]
        edge = [f"{x(p):.1f},{y(v):.1f}" for p, v in enumerate(above)]
        floor = [f"{x(p):.1f},{y(v):.1f}" for p, v in reversed(list(enumerate(below)))]
        fill = FILLS[place % len(FILLS)]
        parts.append(f'<polygon points="{" ".join(edge + floor)}" fill="{fill}" stroke="white" stroke-width="0.5"/>')
        row = HEIGHT - TOP - 18 * place
        parts.append(
            f'<rect x="{WIDTH - LEGEND + 16}" y="{row - 11}" width="12" height="12" fill="{fill}" stroke="#888"/>'
        )
        parts.append(f'<text x="{WIDTH - LEGEND + 34}" y="{row}">{escape(name)}, {max(values) / GIB:.2f} GiB</text>')
        below = above
    for point, phase in prediction.phases:
        column = f'x1="{x(point):.1f}" x2="{x(point):.1f}"'
        parts.append(f'<line {column} y1="{TOP}" y2="{HEIGHT - TOP}" stroke="#444" stroke-dasharray="3 3"/>')
        parts.append(f'<text x="{x(point) + 3:.1f}" y="{HEIGHT - 10}">{escape(phase)}</text>')
    peak = prediction.peak.bytes
    parts.append(f'<line x1="{LEFT}" x2="{LEFT + plot_width}" y1="{y(peak):.1f}" y2="{y(peak):.1f}" stroke="black"/>')
    parts.append(
        f'<text x="{LEFT + 4}" y="{y(peak) - 4:.1f}">peak {peak / GIB:.2f} GiB, {escape(prediction.peak.phase)}</text>'
    )
    for quarter in range(5):
        value = top * quarter / 4
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value / GIB:.1f}</text>')
    parts.append(f'<text x="12" y="{TOP + 4}">GiB</text></svg>')
    return "\n".join(parts) + "\n"
