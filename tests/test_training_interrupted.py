"""What a run leaves where something comes in between: a signal, a full disk, a kill, two reasons to save at once."""

import errno
import itertools
import os
import shlex
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import WriteRecipe
from ctrl_c import CTRL_C
from test_training_train import Killed, latest_run, run
from transformers import TrainerControl, TrainerState

from qtune import manifest
from qtune.adapter.state import STATE_FILE
from qtune.errors import Failure, Interrupted, RunError, TrainingError
from qtune.recipe.file import Origin, load_recipe
from qtune.run.checkpoints import complete_checkpoints
from qtune.run.folder import RunDir
from qtune.run.identity import saved_by
from qtune.run.metrics import NoteRecord, read_metrics
from qtune.training import build, callbacks, ran_out, train
from qtune.training import trainer as training_trainer
from qtune.training.callbacks import Metrics, OptimizerPhase, StopOnSignal, after_divergence
from qtune.training.checkpoints import remove_incomplete_checkpoints
from qtune.training.trainer import QloraTrainer

STEPS = "batch_size = 2\nlearning_rate = 1e-2\nkeep_checkpoints = 9\n"


def damaged(run_dir: RunDir) -> list[str]:
    return [path.name for path in run_dir.checkpoints.iterdir() if path.name.startswith("damaged")]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_signal_that_writes_a_note_while_a_record_is_written_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file, lambda record: None, SimpleNamespace())  # type: ignore[arg-type]
    original, pressed = callbacks.append_metric, []

    def append(target: Path, record: NoteRecord) -> None:
        if moment == "after":
            original(target, record)
        if not pressed:
            pressed.append(True)
            metrics.note("stopping")
        if moment == "before":
            original(target, record)

    monkeypatch.setattr(callbacks, "append_metric", append)
    metrics.note("a record")
    assert sorted(one.message for one in read_metrics(file)) == ["a record", "stopping"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("step", "stops", "decided"),
    [
        (5, False, (False, True, True)),  # the signal came after `on_step_end`, and nothing is saved of the step yet
        (5, True, (False, False, True)),  # it came before, and the step is saved
        (9, True, (True, True, True)),  # the last step: the run is done, and ends like any other
    ],
)
def test_at_the_end_of_an_epoch_a_stop_saves_what_is_owed_an_evaluation(
    step: int, stops: bool, decided: tuple[bool, bool, bool]
) -> None:
    stop, state = StopOnSignal(lambda: None), TrainerState(global_step=step, max_steps=9)
    control = TrainerControl(should_evaluate=True, should_save=True, should_training_stop=stops)
    stop.requested = True
    stop.on_epoch_end(None, state, control)  # type: ignore[arg-type]
    assert (control.should_evaluate, control.should_save, control.should_training_stop) == decided


def test_a_record_that_could_not_be_written_waits_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file, lambda record: None, SimpleNamespace())  # type: ignore[arg-type]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "append_metric", full)
        metrics.note("first")
        metrics.note("second")
    metrics.note("third")
    assert [one.message for one in read_metrics(file)] == ["first", "second", "third"]  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_step_with_two_reasons_to_be_saved_is_saved_once(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.training.callbacks.time.monotonic", itertools.count(step=1000).__next__)
    finished = run(write_recipe(training=f'{STEPS}epochs = 1\ncheckpoint_every = "epoch"\ncheckpoint_minutes = 0.01'))
    last = complete_checkpoints(finished.checkpoints)[-1]
    assert manifest.fault(last) is None
    assert damaged(finished) == []


def test_a_checkpoint_that_cannot_be_moved_aside_is_not_removed(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "kept").touch()
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(training_trainer, "make_room", refused)
    recipe = write_recipe(training=f"{STEPS}steps = 1\ncheckpoint_every = 1")
    with pytest.raises(TrainingError, match="the checkpoint of step 1 could not be written"):
        run(recipe)
    assert (latest_run(recipe).checkpoints / "checkpoint-1" / "kept").is_file()


@pytest.mark.slow
def test_a_save_that_was_killed_before_its_manifest_is_removed_and_a_lost_manifest_is_not(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training_trainer.seal

    def killed(folder: Path, step: int, **more: object) -> None:
        if step == 3:
            raise Killed
        original(folder, step, **more)

    recipe = write_recipe(training=f"{STEPS}steps = 4\ncheckpoint_every = 1")
    with monkeypatch.context() as patch:
        patch.setattr(training_trainer, "seal", killed)
        with pytest.raises(Killed):
            run(recipe)
    stopped = latest_run(recipe)
    first, _, third = (stopped.checkpoints / f"checkpoint-{step}" for step in (1, 2, 3))
    assert (third / STATE_FILE).is_file()
    (first / manifest.NAME).unlink()
    remove_incomplete_checkpoints(stopped.checkpoints)
    assert not third.exists()
    assert first.is_dir()
    train.resume(stopped)
    assert damaged(stopped) == []
    assert not list(stopped.checkpoints.rglob(".*"))


DEAD, ALIVE = 999_999_999, os.getpid()


def leave(run_dir: RunDir) -> tuple[set[Path], set[Path]]:
    """What killed processes leave of an adapter, a record and a kept state; and what is to stay beside it."""
    (run_dir.checkpoints / "best-1").mkdir(parents=True, exist_ok=True)
    half = run_dir.path / f".adapter.partial-{DEAD}-2a5811"
    half.mkdir()
    (half / "adapter_model.safetensors").write_text("half")
    left = {
        half,
        run_dir.path / f".lock.json.partial-{DEAD}-d8ccc9",
        run_dir.checkpoints / "best-1" / f".{STATE_FILE}.partial-{DEAD}-000000",
    }
    stays = {
        run_dir.path / f".report.html.partial-{ALIVE}-d8ccc9",
        run_dir.path / ".notes.partial-mine",
        run_dir.path.parent / f".other.partial-{DEAD}-d8ccc9",
    }
    for file in (left | stays) - {half}:
        file.write_text("half")
    return left, stays


def test_who_resumes_clears_what_killed_processes_have_left_in_the_folder_and_only_that(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = QloraTrainer.compute_loss

    def compute_loss(self: QloraTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 1:
            raise Killed
        return original(self, *args, **kwargs)

    recipe = write_recipe(training=f"{STEPS}steps = 2\ncheckpoint_every = 1")
    monkeypatch.setattr(QloraTrainer, "compute_loss", compute_loss)
    with pytest.raises(Killed):
        run(recipe)
    stopped = latest_run(recipe)
    left, stays = leave(stopped)
    with pytest.raises(Killed):  # it is cleared at once, not at the end
        train.resume(stopped)
    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in stays)


def test_the_end_of_a_run_clears_what_killed_processes_have_left_meanwhile(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, marks = train.make_trainer, list[tuple[set[Path], set[Path]]]()

    def make_trainer(inputs: object, run_dir: RunDir, *args: object, **kwargs: object) -> object:
        marks.append(leave(run_dir))
        return original(inputs, run_dir, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "make_trainer", make_trainer)
    run(write_recipe(training=f"{STEPS}steps = 1"))
    ((left, stays),) = marks
    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in stays)


@pytest.mark.slow
def test_a_repair_that_was_stopped_is_not_done(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = run(write_recipe(training=f"{STEPS}steps = 4\ncheckpoint_every = 1"))
    (finished.adapter / "adapter_model.safetensors").write_bytes(b"")
    for step in (3, 4):
        shutil.rmtree(finished.checkpoints / f"checkpoint-{step}")
    monkeypatch.setattr(OptimizerPhase, "on_pre_optimizer_step", lambda *_, **__: CTRL_C.press())
    with pytest.raises(Interrupted, match="stopped at step 3 of 4, which is saved"):
        train.resume(finished)


def test_an_adapter_that_nothing_can_start_from_is_not_offered_as_a_start(write_recipe: WriteRecipe) -> None:
    finished = run(write_recipe(training=f"{STEPS}steps = 1"))
    (finished.adapter / STATE_FILE).unlink()
    manifest.seal(finished.adapter, by=saved_by(finished.path))
    with pytest.raises(RunError, match=r"has ended; there is nothing to resume$"):
        train.resume(finished)


@pytest.mark.parametrize("every_row", [True, False])
def test_a_validation_loss_that_is_none_before_any_step_is_not_the_rates_fault(tmp_path: Path, every_row: bool) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", lambda record: None, SimpleNamespace())  # type: ignore[arg-type]
    metrics.take_rows([float("nan"), float("nan") if every_row else 1.0], [1, 1])
    with pytest.raises(TrainingError, match=r"the validation loss is nan .* \(quantization\.compute_dtype\)") as caught:
        metrics._require_finite_evaluation(0, float("nan"))
    assert "diverged" not in str(caught.value)
    assert "training.learning_rate" not in str(caught.value)


def test_memory_that_ran_out_on_a_full_disk_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    @contextmanager
    def quiet(*_: object):
        yield None

    report = SimpleNamespace(to_json=dict)
    monkeypatch.setattr(ran_out, "write_memory", full)
    monkeypatch.setattr(ran_out, "first_report", lambda *_: report)
    monkeypatch.setattr(ran_out, "with_offers", lambda *_: report)
    monkeypatch.setattr(ran_out, "longest_of", lambda *_: None)
    monkeypatch.setattr(ran_out.console, "progress", quiet)
    recipe, plan = (
        SimpleNamespace(data=None),
        SimpleNamespace(device=SimpleNamespace(kind="cpu"), keep_dequantized=False),
    )
    inputs = SimpleNamespace(recipe=recipe, plan=plan, prepared=None)
    assert ran_out.explained(Failure.__new__(Failure), inputs, RunDir(tmp_path)) is report  # type: ignore[arg-type]
    assert "memory.json was not written: No space left on device" in capsys.readouterr().err


def test_before_the_first_save_a_stopped_run_is_said_to_start_over_and_not_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    said = train._stopped_at_once(RunDir(tmp_path / "run"))
    assert said.endswith(
        f"it starts over at the first one, in the same folder, with: qtune run --resume {tmp_path / 'run'}"
    )
    assert "begin again" not in said


def test_a_run_that_is_stopped_after_its_adapter_was_saved_is_said_to_have_ended(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while memory.json is written: `--resume` would refuse the run."""

    def ctrl_c(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ran_out, "write_memory", ctrl_c)
        with pytest.raises(Interrupted, match="has ended, and is saved; its report: qtune report") as caught:
            run(recipe := write_recipe(training="steps = 1\nbatch_size = 2\n"))
    assert "--resume" not in str(caught.value)
    run_dir = latest_run(recipe)
    assert run_dir.is_finished
    (run_dir.adapter / "adapter_config.json").write_text("{")
    assert "--resume" in train._way_on(run_dir)  # damaged: it is made again from the last checkpoint


def test_the_step_that_is_said_to_be_saved_is_one_that_a_run_can_go_on_from(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    for step in (13, 16):
        checkpoint = run_dir.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trained_state.safetensors").write_text("weights")
        manifest.seal(checkpoint, step)
    assert train._way_on(run_dir).startswith("step 16 is saved, and what came after it is not\n")
    (run_dir.checkpoints / "checkpoint-16" / "trained_state.safetensors").write_text("w")
    assert train._way_on(run_dir).startswith("step 13 is saved, and what came after it is not\n")


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (Origin("rule", "faster here"), "as this run began (faster here)"),
        (Origin("recipe", "tiny.toml:3"), "as the recipe says"),
        (Origin("--set"), "as --set says"),
    ],
)
def test_a_dtype_that_a_run_began_with_is_not_said_to_be_the_recipes(
    write_recipe: WriteRecipe, origin: Origin, said: str
) -> None:
    resolved = load_recipe(write_recipe(quantization='compute_dtype = "bfloat16"'))
    path = ("quantization", "compute_dtype")
    resolved = replace(resolved, origins={**resolved.origins, path: origin})
    plan = SimpleNamespace(reasons={}, compute_dtype="bfloat16")
    assert build._why_computed_in(SimpleNamespace(resolved=resolved, plan=plan)) == said  # type: ignore[arg-type]
    plan = SimpleNamespace(reasons={path: "faster on this card"}, compute_dtype="bfloat16")
    said_at_first = build._why_computed_in(SimpleNamespace(resolved=resolved, plan=plan))  # type: ignore[arg-type]
    assert said_at_first == "faster on this card"


def test_a_command_in_a_message_can_be_pasted_where_a_path_has_a_space(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "my runs" / "first one")
    run_dir.path.mkdir(parents=True)
    run_dir.write_text(
        run_dir.resolved_file,
        '[model]\nbase = "a/b"\n[data]\ntrain = "rows.jsonl"\n[training]\nlearning_rate = 1e-2\n',
    )
    with pytest.raises(RunError) as caught:
        run_dir.finished_adapter()
    said = [
        str(caught.value),
        train._way_on(run_dir),
        after_divergence([run_dir.checkpoints / "checkpoint-2"]).removesuffix(" --set training.learning_rate=0.003"),
    ]
    for text in said:
        assert shlex.split(text.rpartition(": ")[2]) == ["qtune", "run", "--resume", str(run_dir.path)]


@pytest.mark.parametrize("logs", ["log_every = 1", "log_every = 100"], ids=["seen by a record", "seen by a checkpoint"])
@pytest.mark.parametrize("is_moved", [True, False], ids=["moved", "removed"])
@pytest.mark.slow
def test_a_run_whose_folder_vanishes_ends_in_a_sentence_and_makes_no_other(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: str, is_moved: bool
) -> None:
    recipe = write_recipe(training=f"{STEPS}steps = 4\ncheckpoint_every = 1\n{logs}")
    elsewhere = tmp_path / "elsewhere"

    def vanish(_: object, __: object, state: TrainerState, ___: object, **____: object) -> None:
        if state.global_step == 2:
            folder = latest_run(recipe).path
            folder.rename(elsewhere) if is_moved else shutil.rmtree(folder)

    with monkeypatch.context() as patch:
        patch.setattr(OptimizerPhase, "on_pre_optimizer_step", vanish)
        with pytest.raises(TrainingError) as caught:
            run(recipe)
    said = str(caught.value)
    assert str(tmp_path / "runs" / "tiny") in said
    assert "is no longer there" in said
    assert list((tmp_path / "runs").iterdir()) == [], "a folder without a recipe is no run"
    if is_moved:  # what was saved until then goes on where it is now
        assert [path.name for path in complete_checkpoints(elsewhere / "checkpoints")] == [
            "checkpoint-1",
            "checkpoint-2",
        ]
        assert train.resume(RunDir.open(elsewhere)).is_finished
