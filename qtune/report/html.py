"""HTML that cannot be forgotten to be escaped: whatever is not `Html` is text, and text is escaped."""

import html
from collections.abc import Iterable

from qtune.control_characters import visible

VOID = ("meta", "br", "circle", "line", "path", "polyline", "rect")
"""Elements that this report uses without children."""


class Html(str):
    """A piece of HTML. Made by `element` and `joined`, and of `drawing.svg`; what comes from a run is a plain str."""

    __slots__ = ()


def element(name: str, *children: str, **attributes: str | float | None) -> Html:
    """An element with its children and attributes; plain texts are escaped.

    An underscore in an attribute's name is a hyphen, one at its end is dropped (class_). None leaves an attribute out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{written}>" if name in ("meta", "br") else f"<{name}{written}/>")
    return Html(f"<{name}{written}>{joined(children)}</{name}>")


def joined(children: Iterable[str]) -> Html:
    """The children one after the other; plain texts are escaped."""
    return Html("".join(child if isinstance(child, Html) else _text(child) for child in children))


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, figures: Iterable[int] = (), class_: str = "") -> Html:
    """A table; `figures` are the columns (by index) that hold numbers. The cells of one with a class know the name of
    their column, for the style sheet may put them below each other."""
    right, columns = set(figures), list(head)
    cells = [
        element(
            "tr",
            *(
                element(
                    "td",
                    cell,
                    class_="figure" if at in right else None,
                    data_column=(columns[at] or None) if class_ else None,
                )
                for at, cell in enumerate(row)
            ),
        )
        for row in rows
    ]
    names = [element("th", name, class_="figure" if at in right else None) for at, name in enumerate(columns)]
    drawn = element("table", element("thead", element("tr", *names)), element("tbody", *cells), class_=class_ or None)
    return element("div", drawn, class_="wide")


def details(summary: str, *children: str) -> Html:
    """Something that opens on a click."""
    return element("details", element("summary", summary), *children)


def _text(text: str) -> str:
    """Text as HTML shows it; what HTML has no character for, or would obey, is its escape."""
    return html.escape(visible(text))


def _number(value: str | float) -> str:
    """A coordinate with as many digits as can be seen."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
