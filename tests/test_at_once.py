"""What a recipe and the names of its files decide alone is refused before a library is loaded for it."""

from pathlib import Path

import pytest
from test_run_listing import made
from typer.testing import CliRunner

from qtune.cli import app
from qtune.errors import InputError
from qtune.preflight import examine
from qtune.recipe.file import load_recipe

ROW = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With rows of several kinds; nothing heavy may be loaded for what is asked in it."""
    monkeypatch.setattr("qtune.commands.shared.import_libraries", lambda _: pytest.fail("libraries were loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROW)
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "rows.xlsx").write_bytes(b"PK\x03\x04")
    (tmp_path / "rows.parquet.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "page.jsonl").write_text("<!doctype html>")
    (tmp_path / "split").mkdir()
    for name in ("test.jsonl", "validation.jsonl"):
        (tmp_path / "split" / name).write_text(ROW)
    return tmp_path


def recipe_of(folder: Path, data: str, more: str = "") -> Path:
    file = folder / "r.toml"
    file.write_text(f'[model]\nbase = "builtin:smollm2-135m-instruct"\n[data]\n{data}\n{more}')
    return file


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize(
    ("data", "told"),
    [
        ('train = "rows.csv"\nstreaming = true', "streaming = true: rows.csv: only JSON lines and Parquet"),
        ('train = ["rows.jsonl", "*.csv"]\nstreaming = true', "streaming = true: rows.csv: only JSON lines and"),
        ('train = "rows.xlsx"', "rows.xlsx: a file of unknown kind"),
        ('train = "rows.parquet.gz"', "rows.parquet.gz: .parquet files are compressed inside"),
        ('train = "page.jsonl"', "page.jsonl: is a web page"),
        ('train = "nothing*.jsonl"', "nothing*.jsonl: no such file"),
        ('train = "split"', "has a test and a validation split and no train split"),
        ('train = "rows.jsonl"\ncolumns = { qestion = "prompt" }', "data.columns.qestion: no shape of rows"),
        ('train = [{ path = "rows.jsonl", columns = { qestion = "a" } }]', "data.columns.qestion: no shape of rows"),
        ('train = "rows.jsonl"\nchat_template = "nowhere/t.jinja"', "data.chat_template"),
        ('train = "rows.jsonl"\nchat_template = "t.jinja"', "data.chat_template"),
        ('train = "rows.jsonl"\n[training]\ntrackers = ["wandb"]', "not installed: wandb"),
        ('train = "rows.jsonl"\n[output]\ndirectory = "rows.csv/runs"', "rows.csv/runs cannot be written"),
    ],
)
def test_what_rows_and_keys_alone_tell_is_refused_at_once(verb: str, data: str, told: str, folder: Path) -> None:
    done = CliRunner().invoke(app, [verb, str(recipe_of(folder, data))])
    assert isinstance(done.exception, InputError)
    assert told in str(done.exception)


def test_everything_of_that_kind_is_said_together(folder: Path) -> None:
    recipe = recipe_of(folder, 'train = ["rows.xlsx", "rows.csv"]\nstreaming = true\ncolumns = { qestion = "a" }')
    (told,) = [str(CliRunner().invoke(app, ["run", str(recipe)]).exception)]
    assert told.count("\n") == 2
    assert ["rows.xlsx" in told, "rows.csv" in told, "qestion" in told] == [True] * 3


def test_a_run_to_start_from_that_is_of_another_base_is_refused_at_once(folder: Path) -> None:
    earlier = made(folder, "earlier")
    (earlier.adapter / "adapter_config.json").parent.mkdir()
    (earlier.adapter / "adapter_config.json").write_text("{}")
    recipe = recipe_of(folder, 'train = "rows.jsonl"', f'[adapter]\nstart_from = "{earlier.path}"\n')
    done = CliRunner().invoke(app, ["run", str(recipe)])
    assert isinstance(done.exception, InputError), done.output


def test_a_run_refuses_the_same_in_the_same_words_where_nobody_has_asked_at_once(folder: Path) -> None:
    for data in ('train = "rows.csv"\nstreaming = true', 'train = "rows.xlsx"'):
        recipe = recipe_of(folder, data)
        early = CliRunner().invoke(app, ["run", str(recipe)]).exception
        with pytest.raises(InputError) as late:
            examine(load_recipe(recipe)).require()
        assert str(late.value) == str(early)


def test_a_run_that_was_killed_has_nothing_to_show_which_profile_says_at_once(folder: Path) -> None:
    run = made(folder, "killed")
    done = CliRunner().invoke(app, ["profile", str(run.path)])
    assert isinstance(done.exception, InputError)
    assert "memory.json: has no measurement: the run did not reach its end" in str(done.exception)


@pytest.mark.parametrize("verb", ["check", "run", "fit", "profile"])
def test_a_built_in_model_that_there_is_not_is_refused_at_once(verb: str, folder: Path) -> None:
    recipe = recipe_of(folder, 'train = "rows.jsonl"')
    recipe.write_text(recipe.read_text().replace("smollm2-135m-instruct", "smollm3"))
    done = CliRunner().invoke(app, [verb, str(recipe)])
    told = "model.base: builtin:smollm3: no such built-in model; there is builtin:smollm2-135m-instruct"
    assert isinstance(done.exception, InputError)
    assert told in str(done.exception)


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("verb", ["init", "fit", "swap"])
def test_a_folder_is_no_place_for_a_file_whatever_force_says(verb: str, force: list[str], folder: Path) -> None:
    recipe = recipe_of(folder, 'train = "rows.jsonl"')
    asked = ["--base", "builtin:smollm2-135m-instruct", "--data", "rows.jsonl"] if verb == "init" else [str(recipe)]
    done = CliRunner().invoke(app, [verb, *asked, "--output", "split", *force], env={"COLUMNS": "200"})
    assert done.exit_code != 0
    assert "split is a folder" in f"{done.exception} {done.stderr}".replace(":", "")
    assert sorted(path.name for path in (folder / "split").iterdir()) == ["test.jsonl", "validation.jsonl"]
