"""What a mistyped word was meant to be."""

import difflib
from collections.abc import Iterable

LIKENESS = 0.5
"""Share of letters that two words must have in common, in order, for one to be offered for the other."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "", *, most: int = 1) -> str:
    """ "did you mean 'rank'?" with up to `most` known words, the nearest first; `otherwise` where none is near."""
    near = _near(word, known, most)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise


def nearest(word: str, known: Iterable[str], likeness: float = LIKENESS) -> str | None:
    """The known word that is nearest; None where none is near."""
    return next(iter(_near(word, known, 1, likeness)), None)


def _near(word: str, known: Iterable[str], most: int, likeness: float = LIKENESS) -> list[str]:
    return difflib.get_close_matches(word, [*known], n=most, cutoff=likeness)
