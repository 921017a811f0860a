"""Every error has a message for the user and an exit code for the shell."""

import pytest

from qtune import errors
from qtune.errors import InputError, Interrupted, Problem, QtuneError, RecipeError, WorkError


def test_problems_are_lines_with_their_place() -> None:
    error = RecipeError([Problem("recipe.toml:3", "adapter.rank = 0: must be greater than 0"), Problem("", "no place")])
    assert str(error) == "recipe.toml:3: adapter.rank = 0: must be greater than 0\nno place"
    assert InputError(Problem("x", "y")).problems == (Problem("x", "y"),)


def family(error: type[QtuneError]) -> list[type[QtuneError]]:
    return [error, *(found for child in error.__subclasses__() for found in family(child))]


@pytest.mark.parametrize("error", family(QtuneError))
def test_exit_codes_follow_the_tree_that_the_module_draws(error: type[QtuneError]) -> None:
    expected = 2 if issubclass(error, InputError) else 130 if issubclass(error, Interrupted) else 1
    assert error.exit_code == expected
    assert error is QtuneError or error.__name__ in (errors.__doc__ or "")
    assert issubclass(error, (InputError, WorkError, Interrupted)) or error is QtuneError
