"""What is found wrong with a key of a recipe after it was read -> the same with the file and line that set it.

Reading tells that by itself (`recipe.file`); whoever meets the rows, the model or the memory later knows the key alone.
"""

import re

from qtune.errors import InputError, Problem, QtuneError
from qtune.recipe.file import Resolved
from qtune.recipe.schema import Recipe
from qtune.recipe.text import show_value

_KEY = re.compile(rf"({'|'.join(Recipe.model_fields)})\.(\w+)")
_given: list[Resolved] = []


def is_given(resolved: Resolved) -> Resolved:
    """Notes the recipe that the command is about."""
    _given[:] = [resolved]
    return resolved


def located(error: QtuneError) -> QtuneError:
    """The error with the places of the keys that its problems name: "recipe.toml:7: data.columns.question"; a problem
    that names the base, as who loads it does, is one of model.base."""
    if not _given or not isinstance(error, InputError):
        return error
    problems = tuple(_located(problem, _given[0]) for problem in error.problems)
    return error if problems == error.problems else type(error)(problems).with_traceback(error.__traceback__)


def _located(problem: Problem, resolved: Resolved) -> Problem:
    if problem.place == resolved.recipe.model.base:
        problem = Problem(f"model.base = {show_value(problem.place)}", problem.message)
    found = _KEY.match(problem.place)
    origin = resolved.origins.get((found[1], found[2])) if found is not None else None
    if origin is None or origin.source not in ("recipe", "--set"):
        return problem
    line = origin.reason.rpartition(":")[2]
    where = f"{resolved.file}:{line}" if origin.source == "recipe" else origin.source
    return Problem(f"{where}: {problem.place}", problem.message)
