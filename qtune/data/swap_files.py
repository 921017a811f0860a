"""What `qtune swap` reads and writes: names, told before a library is loaded."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qtune.data.files import data_files
from qtune.data.swapped import Incoming, usual_words
from qtune.errors import Problem, RecipeError
from qtune.recipe.file import Resolved
from qtune.recipe.schema import Data, HubSource

HUB = "hub:"
MADE_BY = "made by qtune swap"
"""In the comment behind the training rows of a recipe."""


@dataclass(frozen=True)
class Files:
    """What is written, beside each other."""

    recipe: Path

    @property
    def rows(self) -> Path:
        """The training rows and their copies."""
        return self.recipe.with_suffix(".rows.jsonl")

    @property
    def unchanged(self) -> Path:
        """The training rows in which there is nothing to exchange."""
        return self.recipe.with_suffix(".unchanged.jsonl")

    @property
    def held_out(self) -> Path:
        """The rows that a share of the training rows was, of which nothing is copied."""
        return self.recipe.with_suffix(".held-out.jsonl")


@dataclass(frozen=True)
class GivenWords:
    """The words of a text."""

    file: Path
    words: Incoming


def require_swappable(resolved: Resolved, recipe: Path, *, force: bool) -> None:
    """Refuses a name under which something would be replaced, and with `force` what the new rows are made of; and
    rows that are copies already, or would lose their weights.

    Raises:
        RecipeError: it is so.
    """
    files, own = Files(recipe), Files(resolved.file)
    _refuse_swapped(resolved, own)
    _refuse_weights(resolved.recipe.data)
    there = [file for file in (files.recipe, files.rows, files.unchanged, files.held_out) if file.exists()]
    read = {file.resolve() for file in (resolved.file, *_files_of(resolved))}
    if sources := [str(file) for file in there if file.resolve() in read]:
        said = "is what the new rows would be made of; choose another --output"
        raise RecipeError(Problem(", ".join(sources), said))
    if folders := [str(file) for file in there if file.is_dir()]:
        said = "is a folder, and a file of this name is to be written; choose another --output"
        raise RecipeError(Problem(", ".join(folders), said))
    if there and not force:
        said = f"{'is' if len(there) == 1 else 'are'} there already; choose another --output, or replace with --force"
        raise RecipeError(Problem(", ".join(map(str, there)), said))


def files_made_before(recipe: Path) -> set[Path]:
    """The files of rows that the swap has written whose recipe is there, as that says; none where it is another's."""
    try:
        text = recipe.read_text(encoding="utf-8")
        data = tomllib.loads(text).get("data", {})
    except (OSError, ValueError):  # TOML's errors, and those of UTF-8, are among the latter
        return set()
    if f"# {MADE_BY}" not in text or not isinstance(data, dict):
        return set()
    files, train = Files(recipe), data.get("train")
    sources = [*(train if isinstance(train, list) else [train]), data.get("validation")]
    named = [source.get("path") if isinstance(source, dict) else source for source in sources]
    return {file for file in (files.rows, files.unchanged, files.held_out) if file.name in named}


def words_of_text(file: Path) -> GivenWords:
    """The words of a text.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        found = usual_words([file.read_text(encoding="utf-8-sig")])
    except OSError as error:
        raise RecipeError(Problem(f"--words {file}", f"cannot be read: {error.strerror}")) from error
    except UnicodeDecodeError as error:
        raise RecipeError(Problem(f"--words {file}", f"is not UTF-8 text (byte {error.start})")) from error
    return GivenWords(file, Incoming(found))


def _refuse_swapped(resolved: Resolved, own: Files) -> None:
    """Rows that were swapped already are copies; their copies would not be of the rows that somebody has written."""
    if own.rows.resolve() in {file.resolve() for file in _named_files(resolved, "train")}:
        said = "has copies of its rows already; name the recipe that it was made from, with --copies for more of them"
        raise RecipeError(Problem(str(resolved.file), said))


def _refuse_weights(data: Data) -> None:
    sources = data.train if isinstance(data.train, tuple) else (data.train,)
    if any(not isinstance(source, str) and source.weight != 1 for source in sources):
        raise RecipeError(
            Problem("data.train", "has sources with weights, which one file of all their rows would lose; remove them")
        )


def _files_of(resolved: Resolved) -> Iterator[Path]:
    """Every file of rows that the recipe names."""
    for split in ("train", "validation", "test"):
        yield from _named_files(resolved, split)


def _named_files(resolved: Resolved, split: str) -> Iterator[Path]:
    given = getattr(resolved.recipe.data, split)
    if given is not None and not isinstance(given, float):
        for source in given if isinstance(given, tuple) else (given,):
            path = source if isinstance(source, str) else HUB if isinstance(source, HubSource) else source.path
            if not path.startswith(HUB):
                yield from (file.path for file in data_files(path, resolved.folder, split))
