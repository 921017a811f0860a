"""Every error has a message for the user and an exit code for the shell."""

import ast
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import qtune
from qtune import errors
from qtune.adapter import attach
from qtune.errors import (
    InputError,
    Interrupted,
    ModelError,
    Problem,
    QtuneError,
    RecipeError,
    SaidElsewhere,
    WorkError,
    first_line,
)
from qtune.memory.tracing.bare_model import bare_model
from qtune.recipe.schema import Lora


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
    assert issubclass(error, (InputError, WorkError, Interrupted, SaidElsewhere)) or error is QtuneError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  \n after blank lines "), "after blank lines"),
        (ValueError(), "ValueError"),
        (RuntimeError("\n"), "RuntimeError"),
    ],
)
def test_the_first_line_of_an_error_is_always_something(error: Exception, said: str) -> None:
    assert first_line(error) == said


def test_a_library_that_fails_without_a_word_does_not_hide_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    network = bare_model(LlamaConfig(vocab_size=64, **sizes), torch.float32, None, "eager")
    monkeypatch.setattr(attach, "get_peft_model", fails)
    with pytest.raises(ModelError, match=r"lora adapter: ValueError$"):
        attach.attach_adapter(network, Lora(), None)


def test_nobody_takes_the_first_line_of_an_error_in_another_way() -> None:
    """`str(error)` is cut into lines in one place; elsewhere an error without text would end in an IndexError."""
    found = []
    for file in Path(qtune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_cut = isinstance(node, ast.Attribute) and node.attr in ("splitlines", "partition", "split")
            text = ast.unparse(node.value) if is_cut and isinstance(node, ast.Attribute) else ""
            if text.startswith(("str(error)", "str(failure)", "str(exception)")) and file.name != "errors.py":
                found.append(f"{file.name}:{node.lineno}")
    assert found == []
