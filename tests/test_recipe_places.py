"""Faults of a recipe's keys that only rows, model or memory show are told with the line that set the key."""

from pathlib import Path

import pytest
from conftest import run_warm_qtune

from qtune.errors import DataError, InputError, ModelError, Problem, WorkError
from qtune.recipe import places
from qtune.recipe.file import check_recipe

RECIPE = """\
[model]
base = "org/base"
[data]
train = "rows.jsonl"
columns = { question = "sympton", answer = "advice" }
"""


@pytest.fixture(autouse=True)
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_given", [])
    (tmp_path / "rows.jsonl").touch()
    places.is_given(check_recipe(RECIPE, tmp_path / "r.toml", ["training.steps=3"]))


@pytest.mark.parametrize(
    ("place", "located"),
    [
        ("data.columns.question", "{recipe}:5: data.columns.question"),
        ("data.train: rows.jsonl", "{recipe}:4: data.train: rows.jsonl"),
        ("training.steps = 3", "--set: training.steps = 3"),
        ("memory.budget", "memory.budget"),  # nobody has set it
        ("{recipe}:4: data.train", "{recipe}:4: data.train"),  # it is there already
        ("data/train.jsonl:208", "data/train.jsonl:208"),
        ("org/base", '{recipe}:2: model.base = "org/base"'),
        ("org/base-2", "org/base-2"),
        ("--data", "--data"),
    ],
)
@pytest.mark.parametrize("kind", [DataError, ModelError, InputError])
def test_a_key_is_told_with_its_line(kind: type[InputError], place: str, located: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    raised = kind([Problem(place.format(recipe=recipe), "is wrong"), Problem("", "and more")])
    found = places.located(raised)
    assert type(found) is kind
    assert str(found) == f"{located.format(recipe=recipe)}: is wrong\nand more"


def test_other_errors_and_those_without_a_recipe_stay_as_they_are() -> None:
    failed, wrong = WorkError("data.train: no memory"), InputError(Problem("data.train", "is wrong"))
    assert places.located(failed) is failed
    places._given.clear()
    assert places.located(wrong) is wrong


def test_a_command_says_the_line_of_a_column_that_no_row_has(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"symptom": "a", "advice": "b"}\n' * 20)
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.replace("org/base", "builtin:smollm2-135m-instruct"))
    for verb in ("check", "run"):
        ended = run_warm_qtune(verb, recipe)
        assert ended.returncode == 2
        assert f"error: {recipe}:5: data.columns.question: no row of rows.jsonl has a column 'sympton'" in ended.stderr
