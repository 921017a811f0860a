"""The best state by validation loss is kept, taken where it is better by more than noise, and ends a run in time."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import WriteRecipe
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from qtune.adapter.state import STATE_FILE
from qtune.errors import RecipeError
from qtune.memory.measured.meter import Meter
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import Training
from qtune.run.folder import RunDir
from qtune.run.metrics import EvalRecord, NoteRecord, adapter_step, append_metric, forget_after, read_metrics
from qtune.run.resumption import begin_branch
from qtune.run.summary import summary_of
from qtune.screens.run import summary_text
from qtune.training import train
from qtune.training.best import KeepBest, choice, kept_states
from qtune.training.callbacks import Metrics
from qtune.verdicts.facts import read_facts

# A rate at which the tiny model soon learns its few rows by heart; no state depends on how many steps are to come.
FAST = 'batch_size = 4\nmicro_batch_size = 4\nlearning_rate = 0.05\nschedule = "constant"\nwarmup = 0\neval_every = 1'


def looked(step: int, loss: float, spread: float = 0.01) -> EvalRecord:
    """An evaluation of eight rows whose losses lie around its mean in the same order each time."""
    rows = tuple(loss + spread * (row - 3.5) for row in range(8))
    return EvalRecord(step, 9, step / 9, float(step), loss, 0.5, rows, (10,) * 8)


def noisy(step: int, loss: float) -> EvalRecord:
    """An evaluation that is worse on every other row."""
    rows = tuple(loss + (0.9 if (row + step) % 2 else -0.9) for row in range(8))
    return EvalRecord(step, 9, step / 9, float(step), loss, 0.5, rows, (10,) * 8)


def test_the_best_is_taken_where_the_last_is_worse_by_more_than_noise() -> None:
    step, said = choice([looked(3, 2.0), looked(6, 1.0), looked(9, 1.5)], [6], "best-beyond-noise", 9)
    assert step == 6
    assert said is not None
    assert said.startswith(
        "the adapter is that of step 6, better than the last by more than noise: validation loss 1.0"
    )
    assert ", lower by 0.5000 (95 % interval for 2 comparisons 0.5000 to 0.5000); training.result" in said


def test_within_noise_the_last_is_taken_and_said() -> None:
    step, said = choice([noisy(3, 2.0), noisy(6, 1.0), noisy(9, 1.05)], [6], "best-beyond-noise", 9)
    assert step is None
    assert said is not None
    assert 'which may be noise; with training.result = "best" a run takes the best' in said


@pytest.mark.parametrize(("result", "step"), [("best", 6), ("last", None)])
def test_the_recipe_may_say_which(result: str, step: int | None) -> None:
    assert choice([noisy(6, 1.0), noisy(9, 1.05)], [6], result, 9)[0] == step


def seen_in_part(step: int, of_all: float, of_unseen: float) -> EvalRecord:
    """An evaluation of ten rows, two of which training saw."""
    return replace(looked(step, of_unseen), loss=of_all, left_out=2)


def test_states_are_compared_by_the_rows_that_training_has_not_seen() -> None:
    """Over all rows the last is the best: those that it saw are learned by heart."""
    records = [seen_in_part(3, 1.6, 1.5), seen_in_part(6, 1.5, 1.0), seen_in_part(9, 1.4, 2.0)]
    step, said = choice(records, [6], "best-beyond-noise", 9)
    assert step == 6
    assert "validation loss 1.0000 at step 6, 2.0000 at step 9, lower by 1.0000" in str(said)


def test_what_is_kept_and_when_a_run_ends_is_decided_by_the_rows_that_training_has_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", lambda record: None, Meter(torch.device("cpu")))
    metrics.seen = [True] + [False] * 5
    keeper = KeepBest(tmp_path, Training(patience=1), lambda *_: None, judged=metrics.judged)
    kept: list[int] = []
    monkeypatch.setattr(keeper, "_keep", lambda model, step: kept.append(step))
    for step, seen, unseen in ((3, 2.0, 1.0), (6, 0.0, 1.1)):
        state, losses = TrainerState(global_step=step, max_steps=9), [seen, *[unseen] * 5]
        measured = {"eval_loss": sum(losses) / 6, "eval_accuracy": 0.5}
        metrics.take_rows([10 * loss for loss in losses], [10] * 6)
        metrics.on_log(None, state, TrainerControl(), logs=measured)  # type: ignore[arg-type]
        keeper.on_evaluate(None, state, TrainerControl(), metrics=measured, model=None)  # type: ignore[arg-type]
    assert (kept, keeper.kept_loss, keeper.stopped_early) == ([3], 1.0, True)
    again = KeepBest(tmp_path, Training(patience=1), lambda *_: None, read_metrics(metrics.file))
    assert (again.best_loss, again.stopped_early) == (1.0, True)


def test_there_is_no_choice_where_the_last_is_the_best_or_nothing_was_kept() -> None:
    assert choice([looked(3, 2.0), looked(9, 1.0)], [9], "best-beyond-noise", 9) == (None, None)
    assert choice([], [], "best-beyond-noise", 9) == (None, None)
    # What a run begins with is no result, and a loss that is no number is none.
    assert choice([looked(0, 1.0), looked(9, 2.0)], [0], "best", 9) == (None, None)
    assert choice([looked(3, 1.0), looked(9, math.nan)], [3], "best-beyond-noise", 9)[0] is None


def test_a_better_state_that_is_lost_is_said() -> None:
    step, said = choice([looked(3, 1.0), looked(9, 2.0)], [], "best-beyond-noise", 9)
    assert step is None
    assert str(said).startswith(
        "the adapter is the last, for the state of step 3, which was better, is no longer there"
    )
    # The next best one that is there is taken.
    step, said = choice([looked(3, 1.5), looked(6, 1.0), looked(9, 2.0)], [3], "best-beyond-noise", 9)
    assert step == 3
    assert "for the state of step 6, which was better, is no longer there" in str(said)
    # What would not have been taken is no loss.
    assert "which may be noise" in str(choice([noisy(6, 1.0), noisy(9, 1.05)], [], "best-beyond-noise", 9)[1])


class Weights(torch.nn.Module):
    """What has the name of a trained model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))


@pytest.mark.parametrize("way", ["a flipped bit", "another step's"])
def test_a_kept_state_that_has_changed_is_said_and_is_no_result(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunDir(tmp_path).checkpoints
    before = [looked(3, 1.0), looked(6, 1.5), looked(9, 2.0)]
    keeper = KeepBest(folder, Training(result="best"), lambda *_: None)
    state, metrics = TrainerState(global_step=3, max_steps=9), {"eval_loss": 1.0}
    keeper.on_evaluate(None, state, TrainerControl(), metrics=metrics, model=Weights())  # type: ignore[arg-type]
    kept = folder / "best-3"
    assert kept_states(folder) == [kept]
    if way == "a flipped bit":
        content = bytearray((kept / STATE_FILE).read_bytes())
        content[-1] ^= 1
        (kept / STATE_FILE).write_bytes(content)
    else:
        kept = kept.rename(folder / "best-6")
    keeper = KeepBest(folder, Training(result="best"), lambda *_: None, before)
    assert f"{kept} is not what was kept: " in capsys.readouterr().err
    said = keeper.take(Weights(), before, 9)  # type: ignore[arg-type]
    assert keeper.chosen is None
    assert str(said).startswith(
        "the adapter is the last, for the state of step 3, which was better, is no longer there"
    )


def test_without_the_state_of_the_best_the_next_best_is_kept(tmp_path: Path, monkeypatch) -> None:
    keeper = KeepBest(tmp_path, Training(), lambda *_: None, [looked(3, 1.0)])
    kept: list[int] = []
    monkeypatch.setattr(keeper, "_keep", lambda model, step: kept.append(step))
    for step, loss in ((6, 1.5), (9, 2.0), (12, 1.2)):
        state, metrics = TrainerState(global_step=step, max_steps=20), {"eval_loss": loss}
        keeper.on_evaluate(None, state, TrainerControl(), metrics=metrics, model=None)  # type: ignore[arg-type]
    assert kept == [6, 12]
    assert (keeper.best_loss, keeper.since) == (1.0, 3)


def test_a_branch_takes_the_kept_states_of_its_steps_along(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "mine")
    for name in ("checkpoint-6", "best-3", "best-8", "initial"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / STATE_FILE).touch()
    run.resolved_file.touch()
    branch = begin_branch(run, run.checkpoints / "checkpoint-6")
    assert {path.name for path in branch.checkpoints.iterdir()} == {"checkpoint-6", "best-3", "initial"}
    assert [path.name for path in kept_states(branch.checkpoints)] == ["best-3"]


def test_steps_after_the_last_evaluation_are_not_called_worse() -> None:
    step, said = choice([looked(3, 2.0), looked(6, 1.0)], [6], "best-beyond-noise", 9)
    assert step is None
    assert said is not None


@pytest.mark.parametrize("losses", [((10, 0.5), (20, 0.9)), ((10, 0.9), (20, 0.5))])
def test_what_nobody_has_measured_is_not_thrown_away_for_what_is_better_than_an_earlier_step(
    losses: tuple[tuple[int, float], ...],
) -> None:
    """A run that goes on with eval_every = "never"."""
    looks = [looked(*one) for one in losses]
    step, said = choice(looks, [10, 20], "best-beyond-noise", 1000)
    assert step is None
    assert said is not None
    assert said.startswith(
        "the adapter is the last, of step 1,000: nothing was measured behind step 20; with training."
    )
    assert choice(looks, [10, 20], "best", 1000)[0] == min(losses, key=lambda one: one[1])[0]


def recipe_of(write_recipe: WriteRecipe, training: str) -> Path:
    """A recipe that sets seven of the fixture's rows aside."""
    file = write_recipe(training=f"{FAST}\n{training}")
    file.write_text(file.read_text().replace("validation = 0.1", "validation = 0.3"))
    return file


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / STATE_FILE)


def evaluations(run: RunDir) -> list[EvalRecord]:
    return [one for one in read_metrics(run.metrics_file) if isinstance(one, EvalRecord)]


@pytest.mark.slow
def test_the_adapter_is_bit_for_bit_the_one_of_the_best_step(write_recipe: WriteRecipe) -> None:
    finished = train.run(load_recipe(recipe_of(write_recipe, 'steps = 12\nresult = "best"')))
    best = min(evaluations(finished), key=lambda one: one.loss)
    assert best.step < 12  # else there was nothing to choose
    shorter = train.run(load_recipe(recipe_of(write_recipe, f'steps = {best.step}\nresult = "last"')))
    taken, expected = state_of(finished.adapter), state_of(shorter.adapter)
    assert taken.keys() == expected.keys()
    assert all(torch.equal(taken[name], expected[name]) for name in taken)
    assert [path.name for path in kept_states(finished.checkpoints)] == [f"best-{best.step}"]
    assert adapter_step(read_metrics(finished.metrics_file)) == best.step
    assert read_facts(finished).adapter_step == best.step
    assert f"the adapter is the state of step {best.step}" in summary_text(summary_of(finished))
    # An adapter that was damaged is made again, and is the same one.
    (finished.adapter / "adapter_config.json").unlink()
    again = state_of(train.resume(finished).adapter)
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    notes = [one.message for one in read_metrics(finished.metrics_file) if isinstance(one, NoteRecord)]
    assert any(f"the adapter is that of step {best.step}, the best" in note for note in notes)


@pytest.mark.slow
def test_patience_ends_a_run_that_finds_nothing_better(write_recipe: WriteRecipe) -> None:
    recipe = recipe_of(write_recipe, 'steps = 40\npatience = 2\nresult = "best"')
    finished = train.run(load_recipe(recipe))
    assert finished.is_finished
    found = evaluations(finished)
    best = min(found, key=lambda one: one.loss)
    assert found[-1].step == best.step + 2 < 40
    notes = [one.message for one in read_metrics(finished.metrics_file) if isinstance(one, NoteRecord)]
    stop = f"stopped at step {best.step + 2}: 2 evaluations in a row found no lower loss than {best.loss:.4f}"
    assert stop in notes
    assert summary_of(finished).steps_taken == f"{best.step + 2} of 40 steps"


@pytest.mark.slow
def test_the_validation_loss_before_the_first_step_is_that_of_the_base(write_recipe: WriteRecipe) -> None:
    training = "steps = 1\nbatch_size = 2\nlearning_rate = 1e-5\neval_every = 1\nevaluate_first = true"
    finished = train.run(load_recipe(write_recipe(training=training)))
    before, after = evaluations(finished)
    assert (before.step, after.step) == (0, 1)
    # LoRA begins as the base, and one small step changes next to nothing.
    assert before.loss == pytest.approx(after.loss, rel=1e-3)
    assert before.loss == pytest.approx(math.log(320), rel=0.2)  # a random model of 320 tokens


def test_a_run_that_goes_on_knows_its_best_and_forgets_states_of_steps_to_come(tmp_path: Path) -> None:
    for step in (3, 8):
        (tmp_path / f"best-{step}").mkdir()
        (tmp_path / f"best-{step}" / STATE_FILE).touch()
    keeper = KeepBest(tmp_path, Training(patience=3), lambda *_: None, [looked(3, 1.0), looked(6, 2.0)])
    assert [path.name for path in kept_states(tmp_path)] == ["best-3"]
    assert (keeper.best_loss, keeper.since, keeper.stopped_early) == (1.0, 1, False)
    # Patience that had ended the run before it was saved has ended it.
    ended = [looked(1, 1.0), looked(2, 2.0), looked(3, 2.0), looked(4, 2.0)]
    assert KeepBest(tmp_path, Training(patience=3), lambda *_: None, ended).stopped_early


@pytest.mark.parametrize(
    ("training", "key"),
    [
        ("patience = 2", "training.patience"),
        ('result = "best"', "training.result"),
        ("evaluate_first = true", "training.evaluate_first"),
    ],
)
def test_what_needs_validation_rows_is_refused_without(write_recipe: WriteRecipe, training: str, key: str) -> None:
    recipe = write_recipe(training=training)
    recipe.write_text(recipe.read_text().replace("validation = 0.1", "validation = 0"))
    with pytest.raises(RecipeError, match=rf"{key} = .*: needs (a validation loss|validation rows)"):
        load_recipe(recipe)


@pytest.mark.slow
def test_a_run_without_validation_rows_ends_as_before(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(training="steps = 2\nbatch_size = 2")
    recipe.write_text(recipe.read_text().replace("validation = 0.1", "validation = 0"))
    finished = train.run(load_recipe(recipe))
    assert finished.is_finished
    notes = [one.message for one in read_metrics(finished.metrics_file) if isinstance(one, NoteRecord)]
    assert not any("the adapter is" in note for note in notes)


def test_what_a_run_was_to_end_with_is_forgotten_where_it_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for record in (looked(3, 1.0), NoteRecord("stopped"), NoteRecord("the adapter is that of step 3", 1.0, 3)):
        append_metric(file, record)
    assert adapter_step(read_metrics(file)) == 3
    forget_after(file, 3)
    assert read_metrics(file) == (looked(3, 1.0), NoteRecord("stopped"))
