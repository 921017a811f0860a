# ruff: noqa: E501
"""Numbers that are none, at every measurement: blamed on the base, the rows or the rate, and never a finished run."""

import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import WriteRecipe
from safetensors.torch import load_file, save_file
from test_training_train import loss_becomes_nan, records
from torch import nn

from qtune.check import check
from qtune.data.batches import StepSampler, rows_of_step
from qtune.errors import ModelError, RunError, TrainingError
from qtune.manifest import skipped_until
from qtune.recipe.file import load_recipe
from qtune.run.checkpoints import complete_checkpoints
from qtune.run.folder import RunDir
from qtune.run.metrics import TrainRecord
from qtune.training import callbacks, train
from qtune.training.callbacks import Metrics, PeakRate
from qtune.training.outcome import Losses, require_gradients, rise_of
from qtune.training.outliers import LEAST, WINDOW, Outliers
from qtune.training.proof import prove
from qtune.training.trainer import QloraTrainer

SHORT = "steps = 6\nbatch_size = 2\nlearning_rate = 1e-2\ncheckpoint_every = 1"


def run(recipe: Path, *changes: str) -> RunDir:
    return train.run(load_recipe(recipe, changes))


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "quantization",
    ['kind = "none"', "minimum_share = 0.0", 'kind = "int8"\nminimum_share = 0.0'],
    ids=["none", "nf4", "int8"],
)
@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_base_with_a_weight_that_is_no_number_gets_the_blame(
    write_recipe: WriteRecipe, tiny_model: Path, tmp_path: Path, name: str, quantization: str, value: float
) -> None:
    recipe = write_recipe(training=SHORT, quantization=quantization)
    copied = tmp_path / "damaged"
    copied.mkdir()
    for file in tiny_model.iterdir():
        if file.is_file():
            (copied / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copied / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError,
        match=rf"damaged/model\.safetensors: 1 of the .* numbers of {name} are not finite, the first {value} at ",
    ):
        run(recipe, f"model.base={copied}")


@pytest.mark.slow
def test_a_loss_that_is_no_number_names_its_rows_and_the_way_on_works(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, rows_file: Path
) -> None:
    recipe = write_recipe(training=SHORT)
    with monkeypatch.context() as patch:
        loss_becomes_nan(patch, step=3)
        with pytest.raises(TrainingError, match="the loss is nan at step 3: training has diverged") as caught:
            run(recipe)
    stopped = RunDir(rows_file.parent / "runs" / "tiny")
    (note,) = [one["message"] for one in records(stopped, "note") if "the loss is nan" in one["message"]]
    assert note.startswith("the loss is nan at step 3, with rows ")
    assert note.count(rows_file.name) == 2
    command = str(caught.value).rpartition("with: ")[2]
    assert command == f"qtune run --resume {stopped.path} --set training.learning_rate=0.003"
    before = {file: file.read_bytes() for file in stopped.path.rglob("*") if file.is_file()}
    branch = train.resume(stopped, ["training.learning_rate=1e-3"])
    assert branch.path == stopped.path.with_name("tiny-2")
    assert branch.is_finished
    assert [record["step"] for record in records(branch, "train")] == [1, 2, 3, 4, 5, 6]
    rates = [record["learning_rate"] for record in records(branch, "train")]
    assert rates[:2] == [record["learning_rate"] for record in records(stopped, "train")][:2]
    assert all(0 < rate <= 1e-3 for rate in rates[2:])
    assert before == {file: file.read_bytes() for file in stopped.path.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_a_branch_goes_on_as_a_run_of_that_rate_would_from_the_same_state(write_recipe: WriteRecipe) -> None:
    """Its schedule is the recipe's with the other peak: the rate of each later step is that of a run that began so."""
    recipe = write_recipe(training=SHORT)
    whole = run(recipe, "training.learning_rate=1e-3", "output.name=whole")
    stopped = run(recipe, "output.name=first")
    for file in (stopped.adapter / "adapter_config.json",):
        file.unlink()
    branch = train.resume(stopped, ["training.learning_rate=1e-3"])
    assert len(records(branch, "train")) == 6
    last = complete_checkpoints(branch.checkpoints)[-1]
    assert last.name == "checkpoint-6"
    assert len(records(whole, "train")) == 6


@pytest.mark.slow
def test_without_a_checkpoint_there_is_nothing_to_go_on_from(
    write_recipe: WriteRecipe, monkeypatch, tmp_path: Path
) -> None:
    loss_becomes_nan(monkeypatch, step=2)
    with pytest.raises(TrainingError, match=r"and begin again$"):
        run(write_recipe(training=SHORT.replace("checkpoint_every = 1", "checkpoint_every = 5")))
    with pytest.raises(RunError, match="has no checkpoint to go on from; begin again with: qtune run"):
        train.resume(RunDir(tmp_path / "runs" / "tiny"), ["training.learning_rate=1e-3"])


@pytest.mark.slow
def test_a_first_loss_that_is_no_number_is_not_the_rates_fault(write_recipe: WriteRecipe, monkeypatch) -> None:
    loss_becomes_nan(monkeypatch, step=1)
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 1, before any weight was changed: .* Look at rows"
    ):
        run(write_recipe(training=SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("all_rows", [True, False])
def test_a_validation_loss_that_is_no_number_ends_the_run(
    write_recipe: WriteRecipe, monkeypatch, all_rows: bool
) -> None:
    original = QloraTrainer._sums

    def sums(self, batch):
        total, rows = original(self, batch)
        if self.state.global_step >= 4 and (all_rows or not getattr(self, "seen", False)):
            self.seen = True
            return total * math.nan, [(math.nan, scored) for _, scored in rows]
        return total, rows

    monkeypatch.setattr(QloraTrainer, "_sums", sums)
    recipe = write_recipe(training=SHORT + "\neval_every = 2\nmicro_batch_size = 1", data="").read_text()
    file = write_recipe(training=SHORT + "\neval_every = 2\nmicro_batch_size = 1")
    file.write_text(recipe.replace("validation = 0.1", "validation = 0.3"))
    blamed = "training has diverged" if all_rows else "validation rows 1 of "
    with pytest.raises(TrainingError, match=f"the validation loss is nan after step 4: {blamed}"):
        run(file)
    assert not RunDir(file.parent / "runs" / "tiny").is_finished


@pytest.mark.slow
def test_gradients_that_are_zero_to_the_end_are_no_finished_run(write_recipe: WriteRecipe, monkeypatch) -> None:
    original = QloraTrainer.compute_loss
    monkeypatch.setattr(QloraTrainer, "compute_loss", lambda self, *args, **kwargs: original(self, *args, **kwargs) * 0)
    monkeypatch.setattr(callbacks, "ZERO_GRADIENTS", 4)
    with pytest.raises(TrainingError, match="nothing was trained: the gradient was zero in the last 4 logged steps"):
        run(write_recipe(training=SHORT + "\nweight_decay = 0.1"))
    with pytest.raises(TrainingError, match="nothing was trained: the gradient was zero in all of 3 logged steps"):
        run(write_recipe(training="steps = 3\nbatch_size = 2\nweight_decay = 0.1"), "output.name=short")


def scaled(file: Path) -> Metrics:
    return Metrics(file, lambda record: None, SimpleNamespace(phases={}), scales_loss=True)  # type: ignore[arg-type]


def logged(metrics: Metrics, step: int, norm: float) -> None:
    state = SimpleNamespace(global_step=step, max_steps=300, epoch=0.1)
    speed = {"tokens_per_second": 1.0, "step_seconds": 1.0}
    metrics.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": norm, "learning_rate": 1e-4, **speed})  # type: ignore[arg-type]


OVERFLOWING = (
    r"^the gradients overflow float16 in each of the last 40 steps, up to step {}, at every scale .*\"float32\"$"
)


def test_gradients_that_overflow_at_every_scale_of_the_loss_end_a_run(tmp_path: Path) -> None:
    """Each step that is left out halves the scale: from 65536 a gradient that any scale helps is there after twenty."""
    metrics = scaled(tmp_path / "metrics.jsonl")
    for step in range(1, 60):
        metrics.take_norm(torch.tensor(math.nan if step != 20 else 1.0), step)
    with pytest.raises(TrainingError, match=OVERFLOWING.format(60)):
        metrics.take_norm(torch.tensor(math.inf), 60)


def test_a_resumption_goes_on_counting_the_gradients_that_overflow(tmp_path: Path) -> None:
    before = scaled(tmp_path / "metrics.jsonl")
    for step in range(1, 31):
        logged(before, step, math.inf if step > 1 else 1.0)
    after = scaled(tmp_path / "metrics.jsonl")
    for step in range(31, 41):
        after.take_norm(math.inf, step)
    with pytest.raises(TrainingError, match=OVERFLOWING.format(41)):
        after.take_norm(math.inf, 41)


def test_of_a_loss_that_is_not_scaled_no_norm_is_waited_for(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", lambda record: None, SimpleNamespace())  # type: ignore[arg-type]
    for step in range(1, 100):
        metrics.take_norm(torch.full((), math.inf, device="meta"), step)


def test_steps_that_overflow_are_counted_whether_they_are_logged_or_not(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = train._metrics

    def scaling(*args: object) -> Metrics:
        metrics = made(*args)  # type: ignore[arg-type]
        metrics.scales_loss = True
        return metrics

    monkeypatch.setattr(train, "_metrics", scaling)
    monkeypatch.setattr(callbacks, "OVERFLOWS", 4)
    monkeypatch.setattr(QloraTrainer, "_clip_grad_norm", lambda self, model: torch.tensor(math.inf))
    with pytest.raises(TrainingError, match=r"in each of the last 4 steps, up to step 4, at every scale"):
        run(write_recipe(training=SHORT + "\nlog_every = 5"))


@pytest.mark.slow
def test_a_step_that_the_scaling_of_the_loss_leaves_out_ends_neither_a_proof_nor_a_timing(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first scale is too large for many models. accelerate scales on cards alone, so what it leaves is played."""
    original = QloraTrainer._clip_grad_norm

    def clip(self, model):
        return original(self, model) * (1 if self.state.global_step else math.inf)

    monkeypatch.setattr(QloraTrainer, "_clip_grad_norm", clip)
    training = "steps = 3\nbatch_size = 2\ncheckpoint_every = 3"
    recipe = write_recipe(training=training, quantization='minimum_share = 0.0\ncompute_dtype = "float16"')
    done = run(recipe)
    assert [math.isfinite(float(one["gradient_norm"])) for one in records(done, "train")] == [False, True, True]
    assert prove(done).startswith("steps 1 to 3 were repeated: all ")
    assert check(load_recipe(recipe), timed=True).step_seconds is not None


def test_a_short_run_whose_gradients_have_all_overflowed_is_no_finished_one() -> None:
    with pytest.raises(TrainingError, match="the gradients overflow float16 in all of 1 steps, at every scale"):
        require_gradients([record(gradient_norm=math.inf)])
    # Of a step that was not logged nothing is known.
    require_gradients([replace(record(gradient_norm=math.nan), step=5)])


def record(**changes: float) -> TrainRecord:
    values = {"loss": 1.0, "accuracy": 0.5, "learning_rate": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 1.0}
    return TrainRecord(1, 9, 0.1, 1.0, **{**values, **changes}, memory_bytes=1, memory_peak_bytes=1)  # type: ignore[arg-type]


def test_one_gradient_is_enough_to_have_trained() -> None:
    require_gradients([record(gradient_norm=0.0), record(gradient_norm=0.1)])
    require_gradients([])
    with pytest.raises(TrainingError, match="zero in all of 2 logged steps"):
        require_gradients([record(gradient_norm=0.0)] * 2)


def test_six_standard_deviations_above_the_last_steps_stand_out() -> None:
    """Against numpy's mean and sample deviation of the same window."""
    import numpy as np

    generator = np.random.default_rng(7)
    losses = generator.normal(2.0, 0.1, 300)
    outliers = Outliers()
    for number, loss in enumerate(losses):
        last = losses[max(0, number - WINDOW) : number]
        expected = len(last) >= LEAST and (loss - last.mean()) / last.std(ddof=1) > 6
        assert (outliers.add(float(loss), 1.0) is not None) == expected
    last = losses[-WINDOW:]
    border = last.mean() + 6 * last.std(ddof=1)
    assert outliers.found(border - 1e-6, 1.0) is None
    assert "the loss" in str(outliers.found(border + 1e-6, 1.0))
    assert outliers.found(-100.0, 1.0) is None, "a loss that falls is no accident"
    assert outliers.found(math.nan, math.inf) is None, "what is no number is told elsewhere, and not remembered"


def test_before_half_a_window_nothing_stands_out() -> None:
    outliers = Outliers([(1.0 + 0.01 * (n % 3), 1.0) for n in range(LEAST - 1)])
    assert outliers.add(100.0, 100.0) is None


@pytest.mark.slow
@pytest.mark.parametrize("skips", [False, True])
def test_a_step_that_stands_out_is_marked_and_skipped_where_the_recipe_says_so(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], skips: bool
) -> None:
    monkeypatch.setattr("qtune.training.outliers.LEAST", 4)
    original = QloraTrainer.compute_loss
    spiking = lambda self, *a, **k: original(self, *a, **k) * (1e4 if self.state.global_step == 7 else 1)  # noqa: E731
    monkeypatch.setattr(QloraTrainer, "compute_loss", spiking)
    steps = f"steps = 9\nbatch_size = 4\nlearning_rate = 1e-3\ncheckpoint_every = 1\nkeep_checkpoints = 9\nskip_outlier_steps = {str(skips).lower()}"
    done = run(write_recipe(training=steps))
    marked = [one["step"] for one in records(done, "train") if one.get("outlier")]
    assert marked == [8]
    states = [load_file(path / "trained_state.safetensors") for path in complete_checkpoints(done.checkpoints)]
    stood_still = [
        all(torch.equal(before[name], after[name]) for name in before) for before, after in itertools.pairwise(states)
    ]
    assert stood_still == [step == 8 and skips for step in range(2, 10)]
    assert any("stands out" in one["message"] for one in records(done, "note"))
    # Record and checkpoints say it, and go on saying it where the run is resumed.
    assert [one["step"] for one in records(done, "train") if one["skipped"]] == [8] * skips
    shutil.rmtree(done.adapter)
    shutil.rmtree(done.checkpoints / "checkpoint-9")
    train.resume(done)
    said = {path.name: skipped_until(path) for path in complete_checkpoints(done.checkpoints)}
    assert said == {f"checkpoint-{step}": (8,) * (skips and step >= 8) for step in range(1, 10)}
    words = f"resuming {done.path} from step 8" + ", without the skipped update of step 8\n" * skips
    assert words in capsys.readouterr().err


def test_the_rows_of_a_step_are_those_that_the_sampler_gives() -> None:
    lengths = [3, 9, 4, 4, 8, 1, 2]
    sampler = StepSampler(lengths, 3, seed=5)
    given = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        given += [order[at : at + 3] for at in range(0, 7, 3)]
    assert [rows_of_step(lengths, 3, 5, step) for step in range(1, 7)] == given


def test_a_peak_rate_is_put_in_the_place_of_a_checkpoints() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    PeakRate(1e-3).on_train_begin(None, None, None, lr_scheduler=schedule, optimizer=optimizer)  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 3)


@pytest.mark.parametrize(
    ("values", "diverged"), [([6.9, 6.95], False), ([6.8, 7.5], False), ([2.0, 7.0], True), ([6.0, 6.9], True)]
)
def test_a_loss_that_began_with_guessing_has_not_diverged(values: list[float], diverged: bool) -> None:
    said = rise_of(Losses(values), vocabulary=1000)  # guessing gives 6.91
    assert ("Training has diverged" in (said or "")) == diverged


def test_an_evaluation_blames_rows_or_the_model() -> None:
    from qtune.errors import WorkError
    from qtune.tuned.row_losses import require_finite_losses

    require_finite_losses([1.0, 0.0], ["a:1", "a:2"], "base")
    with pytest.raises(WorkError, match="the base model's loss is no number on rows a:2, and is one on the others"):
        require_finite_losses([1.0, math.nan], ["a:1", "a:2"], "base")
    with pytest.raises(WorkError, match="the tuned model's loss is no number on any row: training has diverged"):
        require_finite_losses([math.inf, math.nan], ["a:1", "a:2"], "tuned")
