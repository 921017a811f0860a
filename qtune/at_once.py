"""What a recipe and the names of its files decide alone, told before a library is loaded for it."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import ParamSpec, TypeVar

from qtune.adapter.from_run import earlier_adapter
from qtune.control_characters import visible
from qtune.data.files import DataFile, data_files, refuse_unstreamable
from qtune.data.formats import unknown_name
from qtune.errors import DataError, InputError, ModelError, Problem
from qtune.model.builtin import unknown_builtin
from qtune.recipe.file import Resolved
from qtune.recipe.schema import LONGEST_NAME, Data, FileSource, HubSource, Recipe
from qtune.run.folder import require_writable

HUB = "hub:"
SPLITS = ("train", "validation", "test")

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass
class Asked:
    """Asks one question after the other, and keeps those refusals that would have ended the questions."""

    refusals: list[InputError] = field(default_factory=list)

    def of(
        self, question: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result | None:
        """The answer; None where the question was refused."""
        try:
            return question(*args, **kwargs)
        except InputError as error:
            self.refusals.append(error)
            return None


def together(refusals: Sequence[InputError]) -> InputError:
    """Several errors as one with all of their problems, of their kind where they are of one; one alone as it is."""
    first, *others = refusals
    if not others:
        return first
    kind = type(first) if len({type(error) for error in refusals}) == 1 else InputError
    return kind(dict.fromkeys(problem for error in refusals for problem in error.problems))


def require_at_once(resolved: Resolved) -> None:
    """Lets no recipe through that a run would refuse for what is known of it without reading a row or a model.

    Raises:
        InputError: everything of that kind, at once.
    """
    recipe, asked = resolved.recipe, Asked()
    asked.of(require_name, resolved.run_name)
    asked.of(require_base, recipe)
    asked.of(require_trackers, recipe)
    asked.of(require_writable, Path(recipe.output.directory))
    asked.of(earlier_adapter, recipe)
    asked.of(require_row_files, recipe.data, resolved.folder)
    if asked.refusals:
        raise together(asked.refusals)


def require_name(name: str) -> None:
    """A recipe's file may be called what no run can be called."""
    if visible(name) != name or "\n" in name or "\t" in name or len(os.fsencode(name)) > LONGEST_NAME:
        message = f"the recipe's file name is no name for a run's folder (at most {LONGEST_NAME} bytes of plain text)"
        raise InputError(Problem("output.name", f"{message}; give one with --set output.name=NAME"))


def require_base(recipe: Recipe) -> None:
    """A built-in model is one that there is.

    Raises:
        ModelError: it is not.
    """
    if (wrong := unknown_builtin(recipe.model.base)) is not None:
        raise ModelError(Problem("model.base", f"{recipe.model.base}: {wrong}"))


def require_trackers(recipe: Recipe) -> None:
    """transformers would only say it after the model is loaded."""
    missing = [name for name in recipe.training.trackers if find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise InputError(Problem("training.trackers", f"not installed: {names}; pip install {names}, or remove it"))


def require_row_files(data: Data, folder: Path) -> None:
    """The files that [data] names are of kinds that hold rows, and may be streamed where they are to be; what rows are
    renamed to is known.

    Raises:
        DataError: with everything that is not so.
    """
    problems: list[Problem] = []
    files: list[DataFile] = []
    for split in SPLITS:
        for source in _sources(getattr(data, split)):
            problems += _unknown_names({**data.columns, **getattr(source, "columns", {})})
            name = source if isinstance(source, str) else getattr(source, "path", HUB)
            if name.startswith(HUB):
                continue
            try:
                found = data_files(name, folder, split)
            except DataError as error:
                problems += error.problems
                continue
            files += found if split == "train" else []
    if data.streaming is True:
        try:
            refuse_unstreamable(files)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(dict.fromkeys(problems))


def _sources(given: object) -> Iterator[str | FileSource | HubSource]:
    """Those that a key of [data] names; a share of the training rows is none."""
    for source in given if isinstance(given, tuple) else (given,):
        if isinstance(source, (str, FileSource, HubSource)):
            yield source


def _unknown_names(columns: dict[str, str]) -> list[Problem]:
    return [Problem(f"data.columns.{ours}", wrong) for ours in columns if (wrong := unknown_name(ours)) is not None]
