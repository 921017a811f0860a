"""Several seeds in one command: a run for each, named after it, and how far apart they end."""

import json
import math
import re
import shlex
import tomllib
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from conftest import WriteRecipe
from typer.testing import CliRunner

from qtune.cli import app
from qtune.errors import Interrupted, OutOfMemory, TrainingError
from qtune.run.folder import RunDir
from qtune.run.summary import summary_of
from qtune.training.trainer import QloraTrainer

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.slow
def test_each_seed_has_its_run_and_the_spread_is_of_their_last_losses(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(adapter='kind = "ia3"', training="steps = 2\nbatch_size = 2\nseed = 7")
    result = CliRunner().invoke(app, ["run", str(recipe), "--seeds", "2"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    folders = [recipe.parent / "runs" / f"tiny-seed{seed}" for seed in (7, 8)]
    assert result.stdout.split() == [str(folder) for folder in folders]
    values = [tomllib.loads((folder / "resolved.toml").read_text())["training"]["seed"] for folder in folders]
    assert values == [7, 8]
    shares = [json.loads((folder / "lock.json").read_text()) for folder in folders]
    assert shares[0]["training_rows_blake2b"] == shares[1]["training_rows_blake2b"], "the same rows are set aside"
    losses = [summary_of(RunDir(folder)).validation[-1].loss for folder in folders]
    assert (
        f"validation loss: mean {mean(losses):.4f}, standard deviation over seeds {stdev(losses):.4f}" in result.stderr
    )
    for folder, loss in zip(folders, losses, strict=True):
        assert re.search(
            rf"^  {folder.name}: training loss [0-9.]+, validation loss {loss:.4f}$", result.stderr, re.MULTILINE
        )
    assert f"qtune compare {folders[0]} {folders[1]}" in result.stderr


def test_a_seed_that_is_too_large_is_said_before_the_first_run(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(training=f"steps = 2\nseed = {2**32 - 1}")
    result = CliRunner().invoke(app, ["run", str(recipe), "--seeds", "2"])
    assert result.exit_code != 0
    assert "training.seed" in str(result.exception)
    assert not (recipe.parent / "runs").exists()


@pytest.mark.slow
def test_seeds_that_were_stopped_are_named_with_the_commands_for_all_that_is_left(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(adapter='kind = "ia3"', training="steps = 3\nbatch_size = 2\nseed = 7")
    runs = recipe.parent / "runs"

    def stops_in_the_second(trainer: QloraTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = step(trainer, *args, **kwargs)
        if "tiny-seed8" in trainer.args.output_dir and trainer.state.global_step == 1:
            raise KeyboardInterrupt
        return loss

    step = QloraTrainer.training_step
    monkeypatch.setattr(QloraTrainer, "training_step", stops_in_the_second)
    words = [
        "run",
        str(recipe),
        "--seeds",
        "4",
        "--set",
        "training.log_every=1",
        "--allow",
        "unused-input",
        "--hash-weights",
    ]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, Interrupted)
    *_, of_stopped, heading, third, fourth = str(result.exception).splitlines()
    assert of_stopped.endswith(f"with: qtune run --resume {runs / 'tiny-seed8'}")
    assert heading == "the 2 seeds that were not begun:"
    assert {third.partition(" --allow ")[2], fourth.partition(" --allow ")[2]} == {"unused-input --hash-weights"}
    for seed, command in ((9, third), (10, fourth)):
        again = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
        assert again.exit_code == 0, again.output
        assert again.stdout.split() == [str(runs / f"tiny-seed{seed}")]
        values = tomllib.loads((runs / f"tiny-seed{seed}" / "resolved.toml").read_text())
        assert (values["training"]["seed"], values["training"]["log_every"]) == (seed, 1)
    rows = {json.loads((run / "lock.json").read_text())["training_rows_blake2b"] for run in runs.glob("*")}
    assert len(rows) == 1, "all are measured on the same rows"
    asked = CliRunner().invoke(app, ["run", "--resume", str(recipe)])
    assert f"to go on with one that has not ended: qtune run --resume {runs / 'tiny-seed8'}" in str(asked.exception)


@pytest.mark.slow
def test_a_seed_that_diverges_is_told_and_the_others_are_trained(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(adapter='kind = "ia3"', training="steps = 2\nbatch_size = 2\nseed = 7")

    def diverges_in_the_second(trainer: QloraTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = step(trainer, *args, **kwargs)
        return loss * math.nan if "tiny-seed8" in trainer.args.output_dir else loss

    step = QloraTrainer.training_step
    monkeypatch.setattr(QloraTrainer, "training_step", diverges_in_the_second)
    result = CliRunner().invoke(app, ["run", str(recipe), "--seeds", "3"])
    assert isinstance(result.exception, TrainingError)
    assert str(result.exception) == "of 3 seeds 2 came to their end; not seed 8, as said above"
    assert "error: seed 8: the loss is nan at step" in result.stderr, result.stderr
    folders = [recipe.parent / "runs" / f"tiny-seed{seed}" for seed in (7, 9)]
    assert result.stdout.split() == [str(folder) for folder in folders]
    assert "2 runs that differ by their seed alone:" in result.stderr
    assert f"qtune compare {folders[0]} {folders[1]}" in result.stderr


@pytest.mark.slow
def test_an_error_that_ends_all_seeds_leaves_the_commands_for_those_not_begun(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(adapter='kind = "ia3"', training="steps = 2\nbatch_size = 2\nseed = 7")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OutOfMemory("one row of 9 tokens does not fit")

    monkeypatch.setattr("qtune.training.train.run", full)
    result = CliRunner().invoke(app, ["run", str(recipe), "--seeds", "3"])
    assert isinstance(result.exception, OutOfMemory)
    heading, *commands = result.stderr.splitlines()[-3:]
    assert heading == "the 2 seeds that were not begun:"
    assert all(f"--set output.name=tiny-seed{seed}" in one for seed, one in zip((8, 9), commands, strict=True))


def test_seeds_are_for_new_runs(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(tmp_path), "--resume", "--seeds", "2"])
    assert result.exit_code == 2
    assert "--seeds makes new runs" in result.stderr.replace("\n", " ")
