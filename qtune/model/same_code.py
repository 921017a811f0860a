"""Whether two functions are the same code: transformers writes one block anew for each family that has it."""

import inspect
from collections.abc import Callable
from typing import Any


def computes_the_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two Python functions run the same instructions with the same names and constants.

    A family that computes anything else has other code, and is not taken for what it is not. Docstrings do not count.
    """
    return _what_runs(one) == _what_runs(other)


def _what_runs(function: Callable[..., Any]) -> tuple[Any, ...] | None:
    plain: Any = inspect.unwrap(function)
    code = getattr(plain, "__code__", None)
    if code is None:
        return None
    constants = tuple(value for value in code.co_consts if value != plain.__doc__)
    return code.co_code, code.co_names, constants, code.co_argcount, code.co_freevars
