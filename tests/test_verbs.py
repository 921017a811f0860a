"""Verbs of other tools are answered with ours, at once."""

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qtune import verbs
from qtune.cli import app
from qtune.errors import InputError
from qtune.export.output import run_around
from qtune.recipe.file import leaves
from qtune.recipe.parse import parse_recipe
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
        ("ls", "qtune list"),
        ("show", "qtune report"),
        ("upload", "qtune export --push-to-hub"),
    ],
)
def test_a_verb_of_another_tool_is_answered_with_ours(verb: str, ours: str) -> None:
    assert f"no such verb; here that is: {ours}" in said(verb, "recipe.toml")


@pytest.mark.parametrize(
    ("verb", "how"),
    [
        ("serve", "qtune export"),
        ("quantise", "--gguf q8_0"),
        ("stop", "Ctrl-C"),
        ("rm", "its folder"),
        ("login", "hf auth"),
    ],
)
def test_a_verb_for_which_there_is_none_is_answered_with_how_it_is_done(verb: str, how: str) -> None:
    assert how in said(verb, "recipe.toml").partition("no such verb; ")[2]


def test_a_mistyped_verb_is_answered_with_the_nearest_and_any_other_with_all() -> None:
    assert "no such verb; did you mean 'export'?" in said("exprot")
    assert "no such verb; the verbs: init, check, doctor" in said("xyzzy")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["quickstart"], "it is a recipe, for: qtune run quickstart"),
        (["own.toml", "--set", "training.epochs=1"], "it is a recipe, for: qtune run own.toml --set training.epochs=1"),
        (["quickstrat"], "did you mean: qtune run quickstart"),
        (["own.tml"], "the verbs: init, check"),
        (["own2.toml"], "no such file either; did you mean 'own.toml'?"),
        (["rows.jsonl"], "it has rows; a recipe for them: qtune init --base MODEL --data rows.jsonl"),
        (["runs/one"], "it is a run, for: qtune eval runs/one, qtune chat runs/one"),
        (["one"], "it is a run, for: qtune eval runs/one"),
        (["runs/two"], "no such file either"),
        (["runs"], "here that is: qtune list"),
    ],
)
def test_a_file_or_a_run_where_a_verb_is_wanted_is_answered_with_the_verbs_for_it(
    words: list[str], answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text('[model]\nbase = "org/base"\n')
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "resolved.toml").touch()
    assert f"no such verb; {answer}" in said(*words)


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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("export runs/x --gguf", "qtune export --gguf: its value is missing: f16, bf16 or q8_0, as --gguf f16"),
        ("export runs/x --gguf --force", "qtune export --gguf: its value is missing: f16, bf16 or q8_0, as --gguf f16"),
        ("export --gguf .", "qtune export --gguf: its value is missing: f16, bf16 or q8_0, as --gguf f16"),
        ("export runs/x --gguf q8", "qtune export --gguf q8: must be f16, bf16 or q8_0, as --gguf q8_0"),
        ("export runs/x --dtype bf16", "qtune export --dtype bf16: must be float16 or bfloat16, as --dtype bfloat16"),
        ("export runs/x --base", "qtune export --base: its value is missing: dequantized or original, as --base deq"),
        ("fit x.toml --max len", "qtune fit --max len: must be length or batch, as --max length"),
        ("fit x.toml --allow len", "--allow len: only length can be allowed, as --allow length"),
    ],
)
def test_an_option_with_choices_names_them_with_an_example(words: str, told: str) -> None:
    assert told in said(*words.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "run quickstart --epochs=3",
            "qtune run --epochs: no such option; the recipe has it as a key: --set training.epochs=3",
        ),
        ("run quickstart --learning-rate 3e-4", "the recipe has it as a key: --set training.learning_rate=3e-4"),
        (
            "check x.toml --lr 3e-4",
            "--lr: no such option; the recipe has it as a key: --set training.learning_rate=VALUE",
        ),
        # Theirs counts micro-batches, ours rows: its value would be wrong.
        ("run x.toml --gradient-accumulation-steps 4", "a key: --set training.micro_batch_size=VALUE"),
        ("run quickstart --Epochs=3", "as a key: --set training.epochs=3"),
        ("run quickstart --training.epochs 3", "as a key: --set training.epochs=3"),
        ("run quickstart --epochs=", "as a key: --set training.epochs=VALUE"),
        # What follows is no value of a key that is true or false.
        ("run --dora quickstart", "as a key: --set adapter.dora=true"),
        ("run --epochs .", "as a key: --set training.epochs=VALUE"),
        ("chat runs/x --epochs 3", "qtune chat --epochs: no such option; "),
    ],
)
def test_an_option_that_is_a_key_of_the_recipe_is_answered_with_it(words: str, told: str) -> None:
    """--epochs was taken for --processes."""
    assert told in said(*words.split())


def test_a_run_that_is_to_be_verified_is_answered_with_its_export(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "did you mean" not in said("export", str(tmp_path), "--verify-only")
    (tmp_path / "resolved.toml").touch()
    meant = f"qtune export {tmp_path} --verify-only {tmp_path / 'model'}"
    for words in (
        [str(tmp_path), "--verify-only"],
        [str(tmp_path / "model"), "--verify-only"],
        [str(tmp_path), "--gguf", "q8_0", "--verify-only"],  # which do not go together
    ):
        assert said("export", *words).endswith(f"; did you mean: {meant}")
    with pytest.raises(
        InputError, match=re.escape(f"is a run, and not what was exported of it; verify that with: {meant}")
    ):
        run_around(tmp_path)


def test_an_option_of_another_verb_is_answered_with_the_key_that_it_is_elsewhere() -> None:
    command = typer.main.get_command(app)
    known = {name for verb in command.commands.values() for option in verb.params for name in option.opts}
    assert set(verbs.BELONGING) <= known
    keys = {
        ".".join(map(str, key)) for key, _ in leaves(parse_recipe({"model": {"base": "x"}, "data": {"train": "y"}}))
    }
    assert {key for key in verbs.BELONGING.values() if key is not None} <= keys


def test_every_option_of_a_closed_list_says_one_of_it_where_its_value_is_missing() -> None:
    for verb, command in typer.main.get_command(app).commands.items():
        for option in command.params:
            is_closed = option.metavar in ("KIND", "NAME", "FINDING", "KEY", "WHAT") or option.name in ("gguf", "dtype")
            if is_closed and option.name != "source":
                name = option.opts[0]
                assert f"{name} " in said(verb, *(["x"] if verb != "init" else []), name).partition("missing:")[2], name


def test_the_folder_of_runs_that_verbs_begin_with_is_the_recipes_default() -> None:
    assert verbs.RUNS == folder.RUNS == Path(Output.model_fields["directory"].default)
