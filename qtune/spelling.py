"""What a mistyped word was meant to be."""

import difflib
from collections.abc import Iterable
from pathlib import Path

LIKENESS = 0.5
"""Share of letters that two words must have in common, in order, for one to be offered for the other."""

FILES_LIKENESS = 0.75
"""The same of file names: train and test, which are both there, are no slip of each other."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "", *, most: int = 1) -> str:
    """ "did you mean 'rank'?" with up to `most` known words, the nearest first; `otherwise` where none is near."""
    near = _near(word, known, most)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise


def nearest(word: str, known: Iterable[str], likeness: float = LIKENESS) -> str | None:
    """The known word that is nearest; None where none is near."""
    return next(iter(_near(word, known, 1, likeness)), None)


def meant_file(name: str, folder: Path = Path(), *, but: str = "") -> str:
    """ "; did you mean 'data/mails.jsonl'?" for a path from `folder` that leads to nothing, by what is beside it; empty
    where nothing there has a name like it. Endings are not compared, for all files of rows have
    the same few; of files that differ by it alone the one with the nearest is meant.

    but: an ending that cannot be meant, as a recipe's where a model is named.
    """
    try:
        path = Path(name).expanduser()
        beside: dict[str, list[str]] = {}
        for one in sorted((folder / path).parent.iterdir()):
            if not but or one.suffix != but:
                beside.setdefault(one.name.partition(".")[0], []).append(one.name)
    # No folder, one that may not be read, too long a name, a home that nobody has.
    except (OSError, ValueError, RuntimeError):
        return ""
    near = nearest(path.name.partition(".")[0], filter(None, beside), FILES_LIKENESS)
    if not near:
        return ""
    meant = nearest(path.name, beside[near]) or beside[near][0]
    return f"; did you mean {str(Path(name).with_name(meant))!r}?"


BEGINNING = 4
"""Letters of a word that many others would not begin with: whoever wrote no more meant one of those that do."""


def _near(word: str, known: Iterable[str], most: int, likeness: float = LIKENESS) -> list[str]:
    words = [*known]
    alike = difflib.get_close_matches(word, words, n=most, cutoff=likeness)
    begun = [one for one in words if one.startswith(word)] if len(word) >= BEGINNING else []
    return alike or begun[:most]
