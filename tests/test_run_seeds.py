"""Several seeds in one command: a run for each, named after it, and how far apart they end."""

import json
import re
import tomllib
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import WriteRecipe
from typer.testing import CliRunner

from qtune.cli import app
from qtune.run.folder import RunDir
from qtune.run.summary import summary_of

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


def test_seeds_are_for_new_runs(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(tmp_path), "--resume", "--seeds", "2"])
    assert result.exit_code == 2
    assert "--seeds makes new runs" in result.stderr.replace("\n", " ")
