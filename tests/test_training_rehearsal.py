"""A rehearsal does everything once and leaves nothing: bit for bit the same run, and failures before the first step."""

import json
import os
import re
import socket
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import WriteRecipe
from peft import PeftModel
from test_training_train import ADAPTERS, assert_same_run, records
from transformers.models.llama.modeling_llama import LlamaModel

from qtune.adapter.state import STATE_FILE
from qtune.check import check
from qtune.errors import Interrupted, TrainingError
from qtune.model.checkpointed import checkpoint_all, switched_layers
from qtune.preflight import best_states, examine
from qtune.recipe.file import load_recipe
from qtune.run.folder import RunDir
from qtune.sizes import size_text
from qtune.training import rehearsal, train
from qtune.training.arguments import OPTIMIZERS
from qtune.training.rehearsal import heaviest, is_worth_it
from qtune.training.trainer import QloraTrainer

STEPS = "steps = 5\nbatch_size = 4\nmicro_batch_size = 2\nlearning_rate = 1e-2\ncheckpoint_every = 2\neval_every = 2\n"
SHORT = STEPS.replace("steps = 5", "steps = 3")
"""With a checkpoint and an evaluation in the middle."""


def run(recipe: Path, *changes: str) -> RunDir:
    return train.run(load_recipe(recipe, changes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_a_run_is_bit_for_bit_the_same_with_and_without_a_rehearsal(
    write_recipe: WriteRecipe, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(adapter=ADAPTERS[kind], training=SHORT)
    without = run(recipe, "output.name=without", "training.rehearse=false")
    assert "rehearsed" not in capsys.readouterr().err
    rehearsed = run(recipe, "output.name=rehearsed", "training.rehearse=true")
    assert "rehearsed in" in capsys.readouterr().err
    assert_same_run(rehearsed, without)
    assert not list(rehearsed.path.rglob("*rehearsal*"))


@pytest.mark.slow
def test_dropout_draws_the_same_numbers_after_a_rehearsal(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(adapter='kind = "lora"\nrank = 4\ndropout = 0.5', training=SHORT)
    assert_same_run(run(recipe, "training.rehearse=true"), run(recipe, "training.rehearse=false"))


@pytest.mark.slow
def test_the_state_is_put_back_also_where_the_rehearsal_fails(
    write_recipe: WriteRecipe, monkeypatch, tmp_path: Path
) -> None:
    seen: list[bool] = []

    def failing(trainer, model, rows, optimizer_name):
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
    recipe = write_recipe(training=STEPS + "rehearse = true\nkeep_checkpoints = 3")
    needed = examine(load_recipe(recipe)).disk
    assert needed is not None
    free = needed.least_bytes  # one checkpoint and the adapter: less is refused before
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: usage(2**40, 2**40, free))
    said = rf"{re.escape(size_text(free))} are free, and 3 checkpoints of .* lower training\.keep_checkpoints"
    with pytest.raises(TrainingError, match=said):
        run(recipe)
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
        prepared = SimpleNamespace(train=range(100))
        inputs = SimpleNamespace(recipe=recipe, prepared=prepared)
        rehearsal._require_disk(100, best_states(recipe) * 50, inputs, RunDir(tmp_path))

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
    with pytest.raises(TrainingError, match=r"No space left on device; .*\nno step was saved yet, so it starts over"):
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


DEAD = 999_999_999


def as_of_a_dead_process(folder: Path) -> Path:
    """A folder by the name that a process which was killed would have left behind, with something in it."""
    left = folder.with_name(folder.name.replace(f"partial-{os.getpid()}-", f"partial-{DEAD}-"))
    assert left != folder
    left.mkdir()
    (left / STATE_FILE).touch()
    return left


@pytest.mark.slow
def test_what_a_killed_rehearsal_leaves_is_removed(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, left = rehearsal.save_trained_state, list[Path]()

    def save_trained_state(model: PeftModel, folder: Path) -> None:
        original(model, folder)
        left.append(as_of_a_dead_process(folder))
        left.extend(as_of_a_dead_process(one) for one in folder.parents if one.name.startswith(".qtune-"))

    monkeypatch.setattr(rehearsal, "save_trained_state", save_trained_state)
    recipe = write_recipe(training=STEPS + "rehearse = true")
    finished = run(recipe)
    (rehearsed,) = left
    assert rehearsed.parent == finished.checkpoints
    assert not rehearsed.exists()
    left.clear()
    check(load_recipe(recipe), rehearsed=True)
    assert [path for path in left if path.exists()] == left[1:] == [left[1]]
    stays = left[1].with_name(left[1].name.replace(socket.gethostname(), "another-computer"))
    stays.mkdir()
    check(load_recipe(recipe))
    assert not left[1].exists()
    assert stays.exists()


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


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["true", "1", "false"])
def test_the_rehearsed_step_is_the_runs(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, layers) -> None:
    """In its type, and with the layers that are computed twice."""
    seen = []
    original = LlamaModel.forward

    def forward(self, *arguments, **options):
        if self.training and torch.is_grad_enabled() and len(self.layers) == 2:  # the device's own check has one
            switches = tuple(layer.gradient_checkpointing for layer in self.layers)
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), switches))
        return original(self, *arguments, **options)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    run(
        write_recipe(
            training="steps = 1\nbatch_size = 2\nmicro_batch_size = 2\nrehearse = true\n"
            f"gradient_checkpointing = {layers}",
            quantization='compute_dtype = "bfloat16"\nminimum_share = 0.0',
        )
    )
    rehearsed, trained = seen[-2:]  # before them the device may have been looked at
    assert rehearsed == trained
    assert trained[:2] == (True, torch.bfloat16)
    assert trained[2] == {"true": (True, True), "1": (True, False), "false": (False, False)}[layers]


@pytest.mark.slow
def test_layers_that_a_rehearsal_computed_twice_for_want_of_memory_are_as_before_afterwards(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, after = rehearsal._step, []

    def step(trainer, model, *arguments):
        checkpoint_all(model)
        return original(trainer, model, *arguments)

    def train_nothing(self, *arguments, **options):
        after.extend(layer.gradient_checkpointing for layer in switched_layers(self.model))
        raise Interrupted("seen")

    monkeypatch.setattr(rehearsal, "_step", step)
    monkeypatch.setattr(QloraTrainer, "train", train_nothing)
    inputs = "steps = 1\nbatch_size = 2\ngradient_checkpointing = false\nrehearse = true"
    with pytest.raises(Interrupted):
        run(write_recipe(training=inputs))
    assert after == [False, False]


def test_a_scaled_losss_gradients_are_unscaled_and_an_infinite_one_changes_nothing() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    layer = torch.nn.Linear(3, 1, bias=False)
    scaler.scale(layer(torch.tensor([[1.0, 2.0, 3.0]])).sum()).backward()
    layer.weight.grad[0, 2] = float("inf")
    rehearsal._unscale(layer, scaler)
    assert layer.weight.grad.tolist() == [[1.0, 2.0, 0.0]]


def test_a_tensor_that_is_no_number_reads_back_as_itself() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert rehearsal._is_same(nan, nan.clone())
    assert rehearsal._is_same(torch.tensor(1.0), torch.tensor(1.0))
    assert not rehearsal._is_same(nan, torch.tensor([float("nan"), 2.0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paged-adamw", "paged-adamw-8bit"])
def test_a_rehearsal_leaves_no_paged_memory_behind(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """bitsandbytes gives none back; the run's own optimizer is the paged one."""
    made = []
    original = QloraTrainer.create_optimizer

    def create(self, *arguments):
        made.append(self.args.optim)
        if len(made) == 2:
            raise Interrupted("seen")
        return original(self, *arguments)

    monkeypatch.setattr(QloraTrainer, "create_optimizer", create)
    with pytest.raises(Interrupted):
        run(write_recipe(training=f'steps = 1\nbatch_size = 2\noptimizer = "{name}"\nrehearse = true'))
    assert made == [OPTIMIZERS["adamw-8bit"], OPTIMIZERS[name]]
