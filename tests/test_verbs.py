"""Verbs of other tools are answered with ours, at once."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qtune import verbs
from qtune.cli import app
from qtune.recipe.schema import Output
from qtune.run import folder
from qtune.verbs import ELSEWHERE


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("verb", "ours"),
    [
        ("train", "qtune run"),
        ("merge", "qtune export"),
        ("evaluate", "qtune eval"),
        ("Finetune", "qtune run"),
        ("trian", "qtune run"),
    ],
)
def test_a_verb_of_another_tool_is_answered_with_ours(verb: str, ours: str) -> None:
    assert f"no such verb; here that is: {ours}" in said(verb, "recipe.toml")


def test_a_mistyped_verb_is_answered_with_the_nearest_and_any_other_with_all() -> None:
    assert "no such verb; did you mean 'export'?" in said("exprot")
    assert "no such verb; the verbs: init, run, export" in said("xyzzy")


def test_every_answer_is_a_verb_or_an_option_that_there_is() -> None:
    group = typer.main.get_command(app)
    for answer in ELSEWHERE.values():
        verb, *options = answer.split()
        if verb.startswith("--"):
            continue
        command = group.commands[verb]
        known = {name for option in command.params for name in option.opts}
        assert {option for option in options if option.startswith("--")} <= known, answer
        assert verb not in ELSEWHERE


def test_the_folder_of_runs_that_verbs_begin_with_is_the_recipes_default() -> None:
    assert verbs.RUNS == folder.RUNS == Path(Output.model_fields["directory"].default)
