"""A picture as a list of shapes, and its pen: SVG, which needs no library and opens everywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from qtune.errors import InputError, Problem

INK, DIM, FAINT, PAPER = "#1b1f24", "#5b6570", "#d9dee4", "#ffffff"
OF_PAGE = {INK: "var(--ink)", DIM: "var(--dim)", FAINT: "var(--faint)", PAPER: "var(--paper)"}
"""What the page that a drawing stands in calls its own, which are others in the dark (`report.style`)."""

CHARACTER = 0.6
"""Width of a character of a sans-serif font, as a share of its size; a little more than the mean of DejaVu Sans."""

TILE = 8.0
"""Pixels after which a hatch repeats; doubled ("//") it is twice as dense."""

_TILES = {
    "/": "M0 8L8 0M-2 2L2 -2M6 10L10 6",
    "\\": "M0 0L8 8M-2 6L2 10M6 -2L10 2",
    "|": "M4 0V8",
    "-": "M0 4H8",
    "+": "M4 0V8M0 4H8",
    "x": "M0 0L8 8M0 8L8 0",
    ".": "M4 2.8A1.2 1.2 0 1 0 4.01 2.8Z",
    "o": "M4 1.6A2.4 2.4 0 1 0 4.01 1.6Z",
}
"""Each mark of a hatch as a path in a tile of 8 x 8."""


@dataclass(frozen=True)
class Look:
    """How an area is filled: told apart by the hatch or by the lightness of the fill, whatever became of its colour."""

    fill: str
    hatch: str = ""
    """A key of `_TILES`, or one twice for a denser hatch."""

    @property
    def luminance(self) -> float:
        """Lightness of the fill in greys, 0 (black) to 1 (white): Rec. 709 on the stored values, as printers do it."""
        red, green, blue = (int(self.fill[at : at + 2], 16) / 255 for at in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    @property
    def ink(self) -> str:
        """Colour of the hatch: what stands out from the fill."""
        return PAPER if self.luminance < 0.5 else INK


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: Sequence[tuple[float, float]]
    look: Look
    name: str = ""


@dataclass(frozen=True)
class Box:
    """A rectangle; without a look it is paper, under words that stand on a hatch."""

    x: float
    y: float
    width: float
    height: float
    look: Look = Look(PAPER)
    framed: bool = False


@dataclass(frozen=True)
class Line:
    """A straight line."""

    x1: float
    y1: float
    x2: float
    y2: float
    ink: str = DIM
    dash: Literal["solid", "dashed", "dotted"] = "solid"
    width: float = 1.0


@dataclass(frozen=True)
class Words:
    """A text; `y` is its base line."""

    x: float
    y: float
    text: str
    size: float = 12.0
    anchor: Literal["start", "middle", "end"] = "start"
    ink: str = INK
    bold: bool = False

    @property
    def width(self) -> float:
        """About how wide it is drawn."""
        return len(self.text) * self.size * CHARACTER


Shape = Area | Box | Line | Words


@dataclass(frozen=True)
class Drawing:
    """Shapes on paper, in pixels from the upper left corner; later ones lie on earlier ones."""

    width: int
    height: int
    title: str
    shapes: Sequence[Shape]


_DASHES = {"solid": None, "dashed": "6 4", "dotted": "2 3"}


def svg(drawing: Drawing, *, alone: bool = True) -> str:
    """The drawing as one SVG element: no script, no font, no style sheet.

    alone: as a file of its own; inside HTML an SVG needs no namespace, and has the page's paper and ink.
    """
    own: dict[str, str] = {} if alone else OF_PAGE
    hatched = [shape.look for shape in drawing.shapes if isinstance(shape, (Area, Box)) and shape.look.hatch]
    # An id is the same for the same look wherever it is drawn, so that pictures can share a page.
    ids = {look: f"hatch-{look.fill[1:]}-{look.hatch.encode().hex()}" for look in hatched}
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    size = f'viewBox="0 0 {drawing.width} {drawing.height}" width="{drawing.width}" height="{drawing.height}"'
    return "\n".join(
        [
            f'<svg{namespace} {size} role="img" font-family="sans-serif">',
            f"<title>{escape(drawing.title)}</title>",
            f"<defs>{''.join(_pattern(look, name) for look, name in ids.items())}</defs>",
            *([f'<rect width="{drawing.width}" height="{drawing.height}" style="fill:{PAPER}"/>'] if alone else []),
            *(_svg_shape(shape, ids, own) for shape in drawing.shapes),
            "</svg>\n",
        ]
    )


def _pattern(look: Look, name: str) -> str:
    scale = 1 / len(look.hatch)
    inside = look.ink if look.hatch[0] == "." else "none"
    return (
        f'<pattern id="{name}" width="{TILE * scale:g}" height="{TILE * scale:g}" patternUnits="userSpaceOnUse">'
        f'<rect width="{TILE:g}" height="{TILE:g}" style="fill:{look.fill}"/>'
        f'<path d="{_TILES[look.hatch[0]]}" transform="scale({scale:g})" '
        f'style="fill:{inside};stroke:{look.ink};stroke-width:{1 / scale**0.5:g}"/>'
        "</pattern>"
    )


def _svg_shape(shape: Shape, ids: dict[Look, str], own: dict[str, str]) -> str:
    """Colours stand in style attributes: the style sheet of a page changes none but those that it has for `own`."""
    ink = own.get(INK, INK)

    def fill(look: Look) -> str:
        return f"fill:url(#{ids[look]})" if look.hatch else f"fill:{own.get(look.fill, look.fill)}"

    match shape:
        case Area():
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
            told = f"<title>{escape(shape.name)}</title>"
            return (
                f'<polygon points="{points}" style="{fill(shape.look)};stroke:{ink};stroke-width:0.5">{told}</polygon>'
            )
        case Box():
            place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"'
            frame = f"stroke:{ink};stroke-width:0.6" if shape.framed else "stroke:none"
            return f'<rect {place} style="{fill(shape.look)};{frame}"/>'
        case Line():
            place = f'x1="{shape.x1:.1f}" y1="{shape.y1:.1f}" x2="{shape.x2:.1f}" y2="{shape.y2:.1f}"'
            dash = f";stroke-dasharray:{_DASHES[shape.dash]}" if _DASHES[shape.dash] else ""
            return f'<line {place} style="stroke:{own.get(shape.ink, shape.ink)};stroke-width:{shape.width:g}{dash}"/>'
        case Words():
            font = f"font-size:{shape.size:g}px{';font-weight:bold' if shape.bold else ''}"
            return (
                f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}" '
                f'style="{font};fill:{own.get(shape.ink, shape.ink)}">{escape(shape.text)}</text>'
            )


def require_writable(file: Path, option: str, what: str = "picture", suffix: str = ".svg") -> None:
    """Says before hours of work that a picture, or a page, could not be written in the end.

    Raises:
        InputError: the file's name does not end in `suffix`, or there is no such folder.
    """
    if file.suffix.lower() != suffix:
        raise InputError(Problem(option, f"{file}: a {what}'s name ends in {suffix}"))
    if not file.absolute().parent.is_dir():
        raise InputError(Problem(option, f"{file}: there is no folder {file.parent}"))
