"""A rehearsal does everything once and leaves nothing: bit for bit the same run, and failures before the first step."""

import json
import re
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import WriteRecipe
from test_training_train import ADAPTERS, assert_same_run, records

from qtune.check import check
from qtune.errors import TrainingError
from qtune.preflight import best_states
from qtune.recipe.file import load_recipe
from qtune.run.folder import RunDir
from qtune.training import rehearsal, train
from qtune.training.rehearsal import heaviest, is_worth_it
from qtune.training.trainer import QloraTrainer

STEPS = "steps = 5\nbatch_size = 4\nmicro_batch_size = 2\nlearning_rate = 1e-2\ncheckpoint_every = 2\neval_every = 2\n"


def run(recipe: Path, *changes: str) -> RunDir:
    return train.run(load_recipe(recipe, changes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_a_run_is_bit_for_bit_the_same_with_and_without_a_rehearsal(
    write_recipe: WriteRecipe, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(adapter=ADAPTERS[kind], training=STEPS)
    without = run(recipe, "output.name=without", "training.rehearse=false")
    assert "rehearsed" not in capsys.readouterr().err
    rehearsed = run(recipe, "output.name=rehearsed", "training.rehearse=true")
    assert "rehearsed in" in capsys.readouterr().err
    assert_same_run(rehearsed, without)
    assert not list(rehearsed.path.rglob("*rehearsal*"))


@pytest.mark.slow
def test_dropout_draws_the_same_numbers_after_a_rehearsal(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(adapter='kind = "lora"\nrank = 4\ndropout = 0.5', training=STEPS)
    assert_same_run(run(recipe, "training.rehearse=true"), run(recipe, "training.rehearse=false"))


@pytest.mark.slow
def test_the_state_is_put_back_also_where_the_rehearsal_fails(
    write_recipe: WriteRecipe, monkeypatch, tmp_path: Path
) -> None:
    seen: list[bool] = []

    def failing(trainer, model, rows):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
        torch.rand(3)
        raise TrainingError("on purpose")

    original = rehearsal._undone

    class Watched:
        def __init__(self, trainer, model):
            self.inner, self.model = original(trainer, model), model

        def __enter__(self):
            self.before = {name: one.clone() for name, one in rehearsal.trained_state(self.model).items()}
            self.numbers = torch.get_rng_state()
            return self.inner.__enter__()

        def __exit__(self, *error):
            ended = self.inner.__exit__(*error)
            now = rehearsal.trained_state(self.model)
            seen.append(all(torch.equal(self.before[name], now[name]) for name in now))
            seen.append(torch.equal(self.numbers, torch.get_rng_state()))
            return ended

    monkeypatch.setattr(rehearsal, "_step", failing)
    monkeypatch.setattr(rehearsal, "_undone", Watched)
    with pytest.raises(TrainingError, match="on purpose"):
        run(write_recipe(training=STEPS + "rehearse = true"))
    assert seen == [True, True]


@pytest.mark.slow
def test_a_disk_that_will_not_hold_the_checkpoints_is_said_before_the_first_step(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: usage(2**40, 2**40, 1000))
    with pytest.raises(
        TrainingError, match=r"1000 B are free, and 3 checkpoints of .* lower training\.keep_checkpoints"
    ):
        run(write_recipe(training=STEPS + "rehearse = true\nkeep_checkpoints = 3"))
    stopped = RunDir(tmp_path / "runs" / "tiny")
    assert not stopped.metrics_file.exists() or not records(stopped, "train")


def test_the_states_of_the_best_evaluations_take_disk_too(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: usage(2**40, 2**40, 399))

    def asked(result: str) -> None:
        """A checkpoint of 100 bytes is kept, and its trained state has 50."""
        recipe = load_recipe(write_recipe(training=f'result = "{result}"\nkeep_checkpoints = 1')).recipe
        rehearsal._require_disk(100, best_states(recipe) * 50, SimpleNamespace(recipe=recipe), RunDir(tmp_path))

    asked("last")
    with pytest.raises(TrainingError, match=re.escape("the best states (100 B) and the adapter take 400 B")):
        asked("best")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["_step", "_evaluate", "_save", "_answer"])
def test_whatever_fails_in_the_rehearsal_fails_before_the_first_step(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    def fails(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rehearsal, stage, fails)
    with pytest.raises(TrainingError, match=r"No space left on device; .*\nnothing was saved yet; begin again with"):
        run(write_recipe(training=STEPS + "rehearse = true"))
    assert not RunDir(tmp_path / "runs" / "tiny").metrics_file.exists()


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_the_rehearsal_is_not_the_rates_fault(
    write_recipe: WriteRecipe, monkeypatch
) -> None:
    original = QloraTrainer.compute_loss
    monkeypatch.setattr(QloraTrainer, "compute_loss", lambda self, *a, **k: original(self, *a, **k) * float("nan"))
    with pytest.raises(TrainingError, match="the loss of the heaviest batch is nan before any weight was changed"):
        run(write_recipe(training=STEPS + "rehearse = true"))


@pytest.mark.slow
def test_check_rehearses_and_leaves_no_folder(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe(training=STEPS)
    before = sorted(tmp_path.rglob("*"))
    found = check(load_recipe(recipe), rehearsed=True)
    assert found.rehearsal is not None
    assert found.rehearsal.validated
    assert found.rehearsal.checkpoint_bytes > 0
    assert json.loads(found.to_json())["rehearsal"]["rows"] == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert check(load_recipe(recipe)).rehearsal is None


def test_the_heaviest_micro_batch_has_the_most_positions_of_the_epoch(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """Against a walk over the sampler's own order."""
    from qtune.data.batches import StepSampler
    from qtune.training.inputs import gather

    inputs = gather(load_recipe(write_recipe(training=STEPS)))
    lengths, order = inputs.prepared.lengths, list(StepSampler(inputs.prepared.lengths, 4, 42))
    costs = {
        tuple(order[at : at + 2]): len(order[at : at + 2]) * max(lengths[order[at : at + 2]])
        for at in range(0, len(order), 2)
    }
    found = tuple(heaviest(lengths, 2, inputs))
    assert costs[found] == max(costs.values())
    assert not is_worth_it(inputs), "five steps"
    assert is_worth_it(gather(load_recipe(write_recipe(training="steps = 50"))))
