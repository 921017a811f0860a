"""The verdicts at the top of the page: three tiles that are read in a second, and the others as lines below them."""

from collections.abc import Sequence

from qtune.report.html import Html, element
from qtune.verdicts.verdict import MARKS, QUESTIONS, Verdict

TILES = ("learned", "fits", "export")
"""The questions with a tile: what was wanted, what it cost, what it is good for."""


def answers(found: Sequence[Verdict]) -> list[Html]:
    """All verdicts, tiles first."""
    tiles = [_tile(one) for question in TILES for one in found if one.question == question]
    lines = [_line(one) for one in found if one.question not in TILES]
    return [element("div", *tiles, class_="verdicts"), element("div", *lines, class_="others")]


def _tile(one: Verdict) -> Html:
    parts = [
        element("p", QUESTIONS[one.question], class_="question"),
        element("p", f"{MARKS[one.standing]} {one.answer}", class_="answer"),
        element("p", _sentence(one), class_="said"),
    ]
    if one.command is not None:
        parts.append(element("p", f"→ {one.command}", class_="next"))
    return element("div", *parts, class_=f"verdict {one.standing}")


def _line(one: Verdict) -> Html:
    parts = [
        element("span", f"{QUESTIONS[one.question]} ", class_="question"),
        element("span", f"{MARKS[one.standing]} {one.answer}", class_="answer"),
        f": {one.sentence}. ",
    ]
    if one.command is not None:
        parts.append(element("span", f"→ {one.command}", class_="next"))
    return element("p", *parts, class_=one.standing)


def _sentence(one: Verdict) -> str:
    """With a capital, unless it begins with a name, as a folder's: "model: …"."""
    is_name = one.sentence.partition(" ")[0].endswith(":")
    return f"{one.sentence if is_name else one.sentence[:1].upper() + one.sentence[1:]}."
