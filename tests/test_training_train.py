"""Training: what a run leaves behind, that only the effective batch counts, and that a stopped run goes on exactly."""

import functools
import itertools
import json
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    EVERYTHING,
    WriteRecipe,
    recipe_for,
    rows_in,
    run_warm_qtune,
    short_answers,
    warm_qtune_process,
)
from ctrl_c import CTRL_C
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qtune import cli
from qtune.adapter.state import STATE_FILE
from qtune.device.cards import card_named
from qtune.device.rates import data_sheet_rates
from qtune.errors import GateError, InputError, Interrupted, RecipeError, RunError, TrainingError
from qtune.export.export import Options, export_run
from qtune.memory.measured.meter import Meter
from qtune.memory.profile import trace_run
from qtune.recipe.file import Origin, load_recipe
from qtune.run.checkpoints import complete_checkpoints
from qtune.run.folder import RunDir
from qtune.run.lock import read_lock
from qtune.run.memory import read_memory
from qtune.run.metrics import EvalRecord, read_metrics
from qtune.run.resolved import read_values
from qtune.run.resumption import resumed_recipe
from qtune.run.summary import Losses
from qtune.timing.forecast import StepModel, TimeForecast
from qtune.timing.price import Cost, Duration
from qtune.training import proof, train
from qtune.training.callbacks import Metrics, OptimizerPhase
from qtune.training.inputs import gather, seen_validation
from qtune.training.outcome import rise_of
from qtune.training.schedule import schedule_of
from qtune.training.trainer import QloraTrainer
from qtune.tuned.chat import open_session
from qtune.tuned.evaluate import evaluate

ADAPTERS = {
    "lora": 'kind = "lora"\nrank = 4\ndropout = 0.1',
    "p-tuning-mlp": 'kind = "p-tuning"\nvirtual_tokens = 4\nencoder_hidden_size = 32',
    "p-tuning-lstm": (
        'kind = "p-tuning"\nvirtual_tokens = 4\nencoder = "lstm"\nencoder_hidden_size = 32\nencoder_dropout = 0.1'
    ),
    "prompt-tuning": 'kind = "prompt-tuning"\nvirtual_tokens = 4',
    "prompt-tuning-residual": 'kind = "prompt-tuning"\nvirtual_tokens = 4\nresidual = true\ninitialization = "rows"',
    "p-tuning-residual": 'kind = "p-tuning"\nvirtual_tokens = 4\nresidual = true\nvector_rate = 5.0',
    "prefix-tuning": 'kind = "prefix-tuning"\nvirtual_tokens = 4\nprojection = true\nencoder_hidden_size = 32',
    "prefix-tuning-text": 'kind = "prefix-tuning"\nvirtual_tokens = 4\ninitialization = "text"\ntext = "Be brief."',
    "ia3": 'kind = "ia3"',
}

# 20 rows: five steps in each of two epochs, each step of two micro-batches, a checkpoint in the middle of either epoch.
TWO_EPOCHS = "epochs = 2\nbatch_size = 4\nmicro_batch_size = 2\nlearning_rate = 1e-2\ncheckpoint_every = 3"


class Killed(BaseException):
    """Ends a run where it stands: nothing in qtune may catch it, as nothing can catch SIGKILL."""


def run(recipe: Path, *changes: str, allow: tuple[str, ...] = ()) -> RunDir:
    return train.run(load_recipe(recipe, changes), allow)


@pytest.fixture(scope="module")
def unbroken(
    tiny_model: Path, own_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], RunDir]:
    """A function that gives the run of `TWO_EPOCHS` with an adapter, in a dtype, that nothing broke off. However often
    it saves, it learns the same."""
    rows = rows_in(tmp_path_factory.mktemp("unbroken"))

    @functools.cache
    def trained(kind: str, dtype: str) -> RunDir:
        quantization = f'minimum_share = 0.0\ncompute_dtype = "{dtype}"'
        recipe = recipe_for(tiny_model, rows, adapter=ADAPTERS[kind], training=TWO_EPOCHS, quantization=quantization)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QTUNE_CACHE", str(own_cache))
            short_answers(patch)
            return run(recipe, f"output.name={kind}-{dtype}")

    return trained


def latest_run(recipe: Path) -> RunDir:
    return RunDir.open(max((recipe.parent / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns))


def records(run_dir: RunDir, kind: str) -> list[dict]:
    found = [json.loads(line) for line in run_dir.metrics_file.read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def course(run_dir: RunDir) -> list[tuple]:
    """Everything that a run measured and that does not depend on the clock or the process."""
    kept = ("kind", "step", "epoch", "loss", "accuracy", "learning_rate", "gradient_norm")
    found = [json.loads(line) for line in run_dir.metrics_file.read_text().splitlines()]
    return [tuple(record.get(key) for key in kept) for record in found if record["kind"] != "note"]


def final_state(run_dir: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run_dir.adapter / STATE_FILE)


def assert_same_run(broken: RunDir, unbroken: RunDir) -> None:
    assert course(broken) == course(unbroken)
    for file in (STATE_FILE, "adapter_model.safetensors"):
        ours, theirs = load_file(broken.adapter / file), load_file(unbroken.adapter / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def kill_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Kills between the micro-batches of optimizer step `step`."""
    original, calls = QloraTrainer.compute_loss, []

    def compute_loss(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if calls.count(step - 1) == 2:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(QloraTrainer, "compute_loss", compute_loss)


# --- what a run leaves behind --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_a_folder_that_can_be_read_without_qtune(write_recipe: WriteRecipe, tiny_model: Path) -> None:
    recipe = write_recipe(training=TWO_EPOCHS)
    finished = run(recipe)

    assert finished.path == recipe.parent / "runs" / "tiny"
    assert {file.name for file in finished.path.iterdir()} == {
        "recipe.toml",
        "resolved.toml",
        "lock.json",
        "metrics.jsonl",
        "memory.json",
        "rows.json",
        "checkpoints",
        "adapter",
    }
    assert finished.recipe_file.read_text() == recipe.read_text()
    # Of the checkpoints after steps 3, 6, 9 and the last one, two are kept.
    assert [folder.name for folder in complete_checkpoints(finished.checkpoints)] == ["checkpoint-9", "checkpoint-10"]
    saved = {file.name for file in (finished.checkpoints / "checkpoint-10").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "manifest.json"} <= saved
    assert not saved & {"README.md", "training_args.bin"}, "a checkpoint is no model to publish, and has no pickles"
    assert [record["step"] for record in records(finished, "train")] == list(range(1, 11))
    assert [record["step"] for record in records(finished, "eval")] == [5, 10]
    losses = [record["loss"] for record in records(finished, "train")]
    assert losses[-1] < losses[0]
    lock = json.loads(finished.lock_file.read_text())
    assert lock["seed"] == 42
    assert lock["packages"]["torch"] == torch.__version__
    assert set(json.loads(finished.memory_file.read_text())["measured"]["phases"]) >= {
        "load",
        "forward",
        "backward",
        "optimizer",
        "eval",
        "save",
    }
    # Plain peft loads the adapter; it changes what the model says.
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(3, 20).unsqueeze(0)
    before = base(ids).logits
    assert not torch.allclose(PeftModel.from_pretrained(base, str(finished.adapter))(ids).logits, before, atol=1e-3)


CARD = """\
---
library_name: peft
tags:
- qtune
---
# A LoRA adapter for {base}

- trained by qtune on 20 examples, in the run `tiny`
- base: `{base}`, held in NF4 with double quantization, computed in float32
- every value of the run: `resolved.toml` in the run's folder, which is the one above this one

Commands for that folder:

```sh
qtune chat .                     # talk to it
qtune export . --adapter-only    # the adapter for others, with the lines of Python that load it as it was trained
qtune export .                   # a model that needs no adapter, compared with this one
```

`adapter_config.json` and `adapter_model.safetensors` are what peft loads.
"""


@pytest.mark.slow
def test_the_card_of_a_runs_adapter_says_what_it_is_and_its_commands_hold_where_it_says(
    write_recipe: WriteRecipe, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = run(write_recipe(), "training.steps=1")
    card = (finished.adapter / "README.md").read_text()
    assert card == CARD.format(base=tiny_model.name)
    monkeypatch.chdir(finished.adapter.parent)
    exports = re.findall(r"^qtune (export .*?) *#", card, re.MULTILINE)
    assert len(exports) == 2
    for command in exports:
        done = CliRunner().invoke(cli.app, command.split())
        assert done.exit_code == 0, done.output
    left = [
        file
        for file in finished.path.rglob("*")
        if file.suffix in (".md", ".json", ".toml") and "information needed" in file.read_text().lower()
    ]
    assert left == [], "what a library left to be filled in"


@pytest.mark.slow
def test_a_second_run_gets_a_name_of_its_own_and_the_same_result(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(training=TWO_EPOCHS + "\ncheckpoint_every = 'epoch'".replace("checkpoint_every", "# "))
    first, second = run(recipe, "training.steps=2"), run(recipe, "training.steps=2")
    assert (first.path.name, second.path.name) == ("tiny", "tiny-2")
    assert_same_run(second, first)


@pytest.mark.slow
def test_resolved_toml_repeats_the_run(write_recipe: WriteRecipe) -> None:
    first = run(write_recipe(training=TWO_EPOCHS), "training.steps=2", "training.seed=7")
    again = run(first.resolved_file, "output.name=again")
    assert_same_run(again, first)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_follows_its_schedule(write_recipe: WriteRecipe, schedule: str) -> None:
    training = f'steps = 5\nbatch_size = 1\nlearning_rate = 1e-2\nwarmup = 0.4\nschedule = "{schedule}"'
    rates = [record["learning_rate"] for record in records(run(write_recipe(training=training)), "train")]
    falling = {
        "cosine": [1e-2, 0.75e-2, 0.25e-2],  # 1e-2 * (1 + cos(pi * k / 3)) / 2
        "linear": [1e-2, 2e-2 / 3, 1e-2 / 3],
        "constant": [1e-2, 1e-2, 1e-2],
    }
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, *falling[schedule]])


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_no_step_is_taken_at_rate_0_and_none_above_the_peak(schedule: str, warmup: float, steps: int) -> None:
    factors = [schedule_of(schedule, warmup, steps)(step) for step in range(steps)]
    assert min(factors) > 0
    assert max(factors) == 1.0
    peak = factors.index(1.0)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.mark.slow
def test_a_run_of_one_step_trains_something(write_recipe: WriteRecipe) -> None:
    finished = run(write_recipe(training="steps = 1\nbatch_size = 4\nlearning_rate = 1e-2"))
    (record,) = records(finished, "train")
    assert record["learning_rate"] == 1e-2
    assert any(tensor.any() for name, tensor in final_state(finished).items() if "lora_B" in name)


def test_a_run_that_trains_nothing_fails_and_says_so(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    recipe = write_recipe(training="steps = 2\nbatch_size = 4")
    with pytest.raises(TrainingError, match=r"nothing was trained: every weight of the adapter is what it was"):
        run(recipe)
    assert not latest_run(recipe).is_finished


@pytest.mark.slow
def test_a_loss_that_ends_above_its_start_is_said(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = QloraTrainer.compute_loss
    rising = lambda self, *args, **kwargs: real(self, *args, **kwargs) * (1 + self.state.global_step / 20)  # noqa: E731
    monkeypatch.setattr(QloraTrainer, "compute_loss", rising)
    finished = run(write_recipe(training="steps = 10\nbatch_size = 4\nmicro_batch_size = 4"))
    notes = [record["message"] for record in records(finished, "note")]
    losses = [record["loss"] for record in records(finished, "train")]
    assert losses[-1] > losses[0]
    start, end = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert any(note.startswith(f"the loss ended above its start: {start:#.3g} -> {end:#.3g}") for note in notes)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([2.0, 1.0], None),
        ([2.0], None),
        ([], None),
        ([2.0, 3.0], None),  # too early to tell
        ([2.0] * 5 + [3.0] * 5, "2.00 -> 3.00; a lower training.learning_rate or more steps may help"),
        ([2.0, 3.0, 1.0, 2.5, 2.0, 2.1, 2.4, 2.2, 2.0, 2.6], None),  # no more than noise
        ([1.2, 5.0, 6.0, 5.5, 4.0, 3.0, 2.0, 2.0, 1.5, 2.5], "first logged step: 1.20 -> 2.20, and 5.00 in between"),
        ([2.0, 7.0], "2.00 -> 7.00; guessing among all 1,000 tokens gives 6.91. Training has diverged"),
        # One easy batch at the start of a long run is not its start.
        ([0.1, *[2.0] * 19, *[0.9] * 20], None),
    ],
)
def test_the_start_and_end_of_a_loss_are_means_of_a_tenth(values: list[float], words: str | None) -> None:
    rise = rise_of(Losses(values), vocabulary=1000)
    assert rise is None if words is None else rise is not None and words in rise


@pytest.mark.slow
def test_weight_decay_and_clipping_reach_the_optimizer(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def watch(self, args, state, control, **kwargs):
        seen["groups"] = kwargs["optimizer"].param_groups
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        seen["norm"] = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))

    monkeypatch.setattr(OptimizerPhase, "on_pre_optimizer_step", watch)
    run(write_recipe(training="steps = 1\nweight_decay = 0.25\nmax_gradient_norm = 0.125"))
    assert {group["weight_decay"] for group in seen["groups"] if group["params"]} == {0.25}
    assert seen["norm"] == pytest.approx(0.125, rel=1e-3)


@pytest.mark.slow
def test_the_saved_prompt_is_the_encoders_without_its_dropout(write_recipe: WriteRecipe, tiny_model: Path) -> None:
    adapter = ADAPTERS["p-tuning-lstm"].replace("encoder_dropout = 0.1", "encoder_dropout = 0.9")
    finished = run(write_recipe(adapter=adapter, training="steps = 2\nbatch_size = 2"))
    state = final_state(finished)
    config = PeftConfig.from_pretrained(finished.adapter)
    config.inference_mode = False  # in which peft builds no encoder
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).eval()
    encoder = model.prompt_encoder["default"]
    encoder.load_state_dict({name.partition("default.")[2]: tensor for name, tensor in state.items()})
    saved = load_file(finished.adapter / "adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(saved, encoder(model.prompt_tokens["default"].unsqueeze(0))[0].detach())


# --- the effective batch -------------------------------------------------------------------------------------------


def first_gradient(recipe: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> tuple[float, dict]:
    """Loss and gradients of the first step."""
    gradients: dict[str, torch.Tensor] = {}

    def keep(self, args, state, control, **kwargs):
        named = kwargs["model"].named_parameters()
        gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    with monkeypatch.context() as patch:
        patch.setattr(OptimizerPhase, "on_pre_optimizer_step", keep)
        finished = run(recipe, *changes)
    return records(finished, "train")[0]["loss"], gradients


# (of the loss, of the norm of a gradient's difference): rounding of sums in another order.
ROUNDING = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 5e-2)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", ["lora", "p-tuning-mlp"])
def test_the_gradient_of_a_batch_does_not_depend_on_its_micro_batches(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    adapter = ADAPTERS[kind].replace("dropout = 0.1", "dropout = 0.0")
    quantization = f'minimum_share = 0.0\ncompute_dtype = "{dtype}"'
    training = "steps = 1\nbatch_size = 8\nmax_gradient_norm = 1e9"
    recipe = write_recipe(adapter=adapter, training=training, quantization=quantization)
    whole = first_gradient(recipe, monkeypatch, "training.micro_batch_size=8")
    assert whole[1]
    of_loss, of_gradient = ROUNDING[dtype]
    for size in (4, 1):
        loss, gradients = first_gradient(recipe, monkeypatch, f"training.micro_batch_size={size}")
        assert loss == pytest.approx(whole[0], rel=of_loss)
        for name, gradient in whole[1].items():
            assert (gradients[name] - gradient).norm() <= of_gradient * gradient.norm() + 1e-7, name


def memory_for(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """More rows at once than `rows` raise what CUDA raises; returns the sizes that were tried."""
    original, tried = QloraTrainer.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        tried.append(len(inputs["input_ids"]))
        loss = original(self, model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    monkeypatch.setattr(QloraTrainer, "compute_loss", compute_loss)
    return tried


@pytest.mark.slow
def test_a_micro_batch_that_does_not_fit_is_split_and_nothing_else_changes(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 2\nbatch_size = 8\nmicro_batch_size = 4\nlearning_rate = 1e-2")
    roomy = run(recipe)
    tried = memory_for(monkeypatch, rows=1)
    narrow = run(recipe)

    # In the first step 4, without kept weights too, then 2, do not fit; from then on there are single rows and nothing
    # is tried twice.
    assert tried == [4, 4, 2] + [1] * 16
    assert [record["loss"] for record in records(narrow, "train")] == pytest.approx(
        [record["loss"] for record in records(roomy, "train")], rel=1e-4
    )
    assert [record["accuracy"] for record in records(narrow, "train")][1:] == pytest.approx(
        [record["accuracy"] for record in records(roomy, "train")][1:]
    )
    for name, tensor in final_state(roomy).items():
        torch.testing.assert_close(final_state(narrow)[name], tensor, rtol=1e-2, atol=1e-4, msg=name)
    notes = [record["message"] for record in records(narrow, "note")]
    assert [note for note in notes if note.startswith("out of memory")] == [
        "out of memory: micro-batches are now split into 4; the batch stays the same"
    ]


@pytest.mark.slow
def test_memory_that_ends_in_the_middle_of_a_step_loses_no_micro_batch(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 1\nbatch_size = 8\nmicro_batch_size = 4\nmax_gradient_norm = 1e9")
    loss, gradients = first_gradient(recipe, monkeypatch)
    original, calls = QloraTrainer.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(QloraTrainer, "compute_loss", compute_loss)
    split_loss, split_gradients = first_gradient(recipe, monkeypatch, "memory.keep_dequantized=false")
    assert calls == [4, 4, 2, 2, 2, 2]
    assert split_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(split_gradients[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "p-tuning-mlp", "prompt-tuning", "ia3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_trained_evaluated_exported_and_talked_to_in_either_dtype(
    write_recipe: WriteRecipe, kind: str, dtype: str
) -> None:
    quantization = f'minimum_share = 0.0\ncompute_dtype = "{dtype}"'
    recipe = write_recipe(adapter=ADAPTERS[kind], training=TWO_EPOCHS, quantization=quantization)
    finished = run(recipe)
    evaluation = evaluate(finished, max_new_tokens=4)
    assert evaluation.tuned.loss < evaluation.base.loss
    # Training measured the same rows in the same precision.
    last = records(finished, "eval")[-1]["loss"]
    assert evaluation.tuned.loss == pytest.approx(last, rel=1e-4 if dtype == "float32" else 1e-2)
    proof = json.loads((export_run(finished, Options()) / "verify.json").read_text())
    assert (proof["verified"], proof["compute_dtype"]) == (True, dtype)
    said: list[str] = []
    session = open_session(str(finished.path))
    session.max_new_tokens = 8
    session.ask("What is 3 and 4", said.append)


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_split_and_measures_the_same(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 2\nbatch_size = 4\neval_every = 1", data="").read_text()
    file = write_recipe()
    file.write_text(recipe.replace("validation = 0.1", "validation = 0.3"))
    roomy = run(file)
    original, tried = Meter.scored, []

    def scored(self: Meter, count: int) -> None:
        original(self, count)
        if self.phase == "eval":
            tried.append(self.batch.rows)
            if self.batch.rows > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Meter, "scored", scored)
    narrow = run(file, "memory.keep_dequantized=false")
    rows = len(records(narrow, "eval")) * 7  # 0.3 of 22
    assert tried == [4, 2] + [1] * rows
    notes = [record["message"] for record in records(narrow, "note")]
    assert [note for note in notes if note.startswith("out of memory")] == [
        "out of memory: batches of the evaluation are now split into 2",
        "out of memory: batches of the evaluation are now split into 4",
    ]
    for one, other in zip(records(narrow, "eval"), records(roomy, "eval"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["accuracy"] == other["accuracy"]
        assert one["group_tokens"] == other["group_tokens"]
        assert one["group_losses"] == pytest.approx(other["group_losses"], rel=1e-3)
        losses = zip(one["group_losses"], one["group_tokens"], strict=True)
        assert sum(loss * tokens for loss, tokens in losses) / sum(one["group_tokens"]) == pytest.approx(one["loss"])
        assert len(one["group_tokens"]) == 7
    for name, tensor in final_state(roomy).items():
        assert torch.equal(final_state(narrow)[name], tensor), name  # what training draws next is the same


# --- what must not go wrong silently -------------------------------------------------------------------------------


def loss_becomes_nan(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = QloraTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == step - 1 else loss

    monkeypatch.setattr(QloraTrainer, "compute_loss", compute_loss)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(training="steps = 6\nbatch_size = 2\nlearning_rate = 1e-2\ncheckpoint_every = 1")
    loss_becomes_nan(monkeypatch, step=3)
    with pytest.raises(TrainingError) as caught:
        run(recipe)
    assert str(caught.value) == (
        "the loss is nan at step 3: training has diverged. Lower training.learning_rate or raise training.warmup, "
        f"and begin again; {latest_run(recipe).checkpoints / 'checkpoint-2'} was saved before\n"
        f"a new run goes on from there at a third of the rate with: qtune run --resume {latest_run(recipe).path} "
        "--set training.learning_rate=0.003"
    )
    stopped = latest_run(recipe)
    assert not stopped.is_finished
    assert complete_checkpoints(stopped.checkpoints)[-1].name == "checkpoint-2"
    for line in stopped.metrics_file.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_weights_that_are_no_numbers_are_never_saved(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 9\nbatch_size = 2\ncheckpoint_every = 1\nlog_every = 9")
    loss_becomes_nan(monkeypatch, step=3)
    with pytest.raises(
        TrainingError, match=r"^a trained weight is not a finite number at step 3: training has diverged\. Lower"
    ):
        run(recipe)
    last = complete_checkpoints(latest_run(recipe).checkpoints)[-1]
    assert last.name == "checkpoint-2"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(last / STATE_FILE).values())


def test_what_the_gate_finds_stops_a_run_before_it_has_a_folder(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe()
    rows = recipe.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace("It is 1.", "It is <|im_end|> 1."))
    with pytest.raises(GateError, match="control-token"):
        run(recipe)
    assert not (recipe.parent / "runs").exists()


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(training='trackers = ["mlflow", "trackio"]')
    with pytest.raises(InputError) as error:
        run(recipe)
    assert str(error.value) == (
        "training.trackers: not installed: mlflow trackio; pip install mlflow trackio, or remove it"
    )
    assert not (recipe.parent / "runs").exists()


@pytest.mark.slow
def test_a_profile_of_a_run_keeps_what_the_usual_ways_would_take(write_recipe: WriteRecipe) -> None:
    run_dir = run(write_recipe(training="steps = 2"))
    found = trace_run(run_dir)
    kept = json.loads(run_dir.memory_file.read_text())
    assert kept["measured"] == found.measured
    assert kept["traced"]["by_phase"]["forward"]["bytes"] == found.prediction.by_phase["forward"].bytes
    assert [way["name"] for way in kept["ways"]] == [baseline.name for baseline in found.baselines]
    assert kept["ways"][0]["name"] == "full fine-tuning, fp32"
    assert all(way["peak_bytes"] > 0 and way["how"].startswith("traced: ") for way in kept["ways"])


@pytest.mark.slow
def test_a_finding_that_was_waived_stays_waived_when_the_run_goes_on(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 4\nbatch_size = 2\ncheckpoint_every = 2")
    rows = recipe.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace("What is 1 ", "What is <|im_end|> 1 "))
    with monkeypatch.context() as patch:
        kill_in_step(patch, 3)
        with pytest.raises(Killed):
            # micro_batch_size 1: two micro-batches in each step
            run(recipe, "training.micro_batch_size=1", allow=("control-token", "answer-changed", "label-text"))
    assert train.resume(latest_run(recipe)).is_finished


@pytest.mark.slow
def test_who_decided_what_stays_known_when_a_run_goes_on_with_a_waiver(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 4\nbatch_size = 2\nmicro_batch_size = 1\ncheckpoint_every = 2")
    stopped = stopped_run(recipe, monkeypatch, 3)
    before = {value.path: value for value in read_values(stopped)}
    line = recipe.read_text().splitlines().index("steps = 4") + 1
    assert before["training", "steps"].origin == Origin("recipe", f"tiny.toml:{line}")
    train.resume(stopped, allow=("too-long",))
    after = {value.path: value for value in read_values(stopped)}
    assert after.pop(("data", "allow")).origin == Origin("--allow")
    before.pop(("data", "allow"))
    assert after == before


@pytest.mark.slow
def test_a_value_that_is_set_to_what_it_is_keeps_its_origin(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 4\nbatch_size = 2\nmicro_batch_size = 1\ncheckpoint_every = 2")
    stopped = stopped_run(recipe, monkeypatch, 3)
    before = {value.path: value.origin for value in read_values(stopped)}
    train.resume(stopped, ["training.micro_batch_size=1", "training.log_every=2"])
    after = {value.path: value.origin for value in read_values(stopped)}
    assert after == before | {("training", "log_every"): Origin("--set", "on resuming")}


@pytest.mark.slow
def test_validation_rows_that_an_earlier_run_or_this_one_trains_on_are_noted_and_left_out(
    write_recipe: WriteRecipe,
) -> None:
    recipe = write_recipe(training="steps = 1\nbatch_size = 2\nevaluate_first = true\nsample_answers = 0")
    lines = (recipe.parent / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, chosen in (("first", lines[:4]), ("own", lines[4:8]), ("held", lines[2:14]), ("few", lines[4:9])):
        (recipe.parent / f"{name}.jsonl").write_text("".join(chosen))
    held = str(recipe.parent / "held.jsonl")
    first = run(
        recipe,
        f"data.train={recipe.parent / 'first.jsonl'}",
        "data.validation=0.0",
        "training.evaluate_first=false",
        "output.name=first",
    )
    own = f"data.train={recipe.parent / 'own.jsonl'}"
    alone = run(recipe, own, f"data.validation={held}", "output.name=alone")
    after = run(recipe, own, f"data.validation={held}", f"adapter.start_from={first.path}", "output.name=after")
    few = run(recipe, own, f"data.validation={recipe.parent / 'few.jsonl'}", "output.name=few")
    noted = [
        [
            (one.left_out, len(one.group_tokens), one.are_seen)
            for one in read_metrics(of.metrics_file)
            if isinstance(one, EvalRecord)
        ]
        for of in (alone, after, few)
    ]
    assert noted == [[(4, 8, False)] * 2, [(6, 6, False)] * 2, [(0, 5, True)] * 2]
    (first.path / "resolved.toml").unlink()
    lost = load_recipe(recipe, [own, f"data.validation={held}"])
    resolved = replace(
        lost,
        recipe=lost.recipe.model_copy(
            update={"adapter": lost.recipe.adapter.model_copy(update={"start_from": str(first.path)})}
        ),
    )
    flags = seen_validation(replace(gather(lost), resolved=resolved))
    assert (flags.count(True), flags.count(None)) == (4, 8)


@pytest.mark.slow
def test_a_run_that_goes_on_says_what_is_left_and_not_what_the_whole_took(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(training="steps = 4\nbatch_size = 2\nmicro_batch_size = 1\ncheckpoint_every = 1")
    model = StepModel(8, 8, Cost(), Cost(), Cost(), data_sheet_rates(card_named("H100")))
    whole = TimeForecast("measured", "a clock", model, Duration(20.0, 0.0, 0, True), 20.0, 1.0, 4, 4, 80.0, 84.0)
    monkeypatch.setattr("qtune.training.inputs._time", lambda *_: whole)
    stopped = stopped_run(recipe, monkeypatch, 4)
    assert "20.00 s a step and 1:24 in all are predicted, from measured rates" in capsys.readouterr().err
    train.resume(stopped)
    said = capsys.readouterr().err
    assert "20.00 s a step and 0:21 for what is left after step 3 are predicted, from measured rates" in said
    assert whole.seconds_after(4) is None


@pytest.mark.slow
def test_the_lock_of_a_resumed_run_says_under_which_versions_each_part_was_trained(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 4\nbatch_size = 2\nmicro_batch_size = 1\ncheckpoint_every = 2")
    stopped = stopped_run(recipe, monkeypatch, 3)
    begun = read_lock(stopped)
    assert begun is not None
    assert begun.resumed == ()
    monkeypatch.setattr("qtune.run.lock._version", lambda package: "9.9" if package == "torch" else "1.0")
    train.resume(stopped, accepted=("versions",))
    lock = read_lock(stopped)
    assert lock is not None
    assert replace(lock, resumed=()) == begun
    (part,) = lock.resumed
    assert (part.from_step, part.packages["torch"]) == (2, "9.9")
    assert lock.packages["torch"] == begun.packages["torch"]


# --- stopping and going on -----------------------------------------------------------------------------------------


# A pair of matrices, an encoder, keys and values, factors; the others are tried in float32, and LoRA in both.
IN_BFLOAT16 = list(ADAPTERS) if EVERYTHING else ["lora", "p-tuning-lstm", "prefix-tuning", "ia3"]
IN_FLOAT32 = list(ADAPTERS) if EVERYTHING else ["lora", *(kind for kind in ADAPTERS if kind not in IN_BFLOAT16)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, "float32") for kind in IN_FLOAT32), *((kind, "bfloat16") for kind in IN_BFLOAT16)]
)
def test_a_killed_run_goes_on_exactly(
    write_recipe: WriteRecipe,
    unbroken: Callable[[str, str], RunDir],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    dtype: str,
) -> None:
    """Bit for bit, on the same processor, in either dtype."""
    quantization = f'minimum_share = 0.0\ncompute_dtype = "{dtype}"'
    recipe = write_recipe(adapter=ADAPTERS[kind], training=TWO_EPOCHS, quantization=quantization)
    with monkeypatch.context() as patch:
        kill_in_step(patch, 8)
        with pytest.raises(Killed):
            run(recipe, "output.name=broken")
    broken = latest_run(recipe)
    assert complete_checkpoints(broken.checkpoints)[-1].name == "checkpoint-6"  # the first of the second epoch's steps
    assert train.resume(broken) == broken
    assert_same_run(broken, unbroken(kind, dtype))


@pytest.mark.slow
def test_a_run_that_is_killed_before_its_first_checkpoint_begins_again(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training=TWO_EPOCHS + "\nsteps = 4".replace("epochs", ""), adapter=ADAPTERS["lora"])
    recipe.write_text(recipe.read_text().replace("epochs = 2\n", ""))
    unbroken = run(recipe)
    with monkeypatch.context() as patch:
        kill_in_step(patch, 3)
        with pytest.raises(Killed):
            run(recipe)
    assert_same_run(train.resume(latest_run(recipe)), unbroken)


@pytest.mark.slow
def test_a_run_that_is_killed_between_an_epochs_last_step_and_its_evaluation_makes_up_for_it(
    write_recipe: WriteRecipe, unbroken: Callable[[str, str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(adapter=ADAPTERS["lora"], training=TWO_EPOCHS.replace("every = 3", "every = 5"))

    def evaluate(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(QloraTrainer, "evaluate", evaluate)
        with pytest.raises(Killed):
            run(recipe)
    assert_same_run(train.resume(latest_run(recipe)), unbroken("lora", "float32"))


@pytest.mark.slow
def test_a_run_that_started_from_another_goes_on_without_it_once_a_step_is_saved(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint holds the whole trained state; before there is one, the run begins as the earlier one has ended."""
    recipe = write_recipe(adapter=ADAPTERS["prompt-tuning-residual"], training=TWO_EPOCHS)
    first = run(recipe, "training.steps=1", "output.name=first")
    own = f"adapter.start_from={first.path}"
    unbroken = run(recipe, own, "output.name=unbroken")
    broken = {}
    for name, step in (("late", 8), ("early", 2)):
        with monkeypatch.context() as patch:
            kill_in_step(patch, step)
            with pytest.raises(Killed):
                run(recipe, own, f"output.name={name}")
        broken[name] = RunDir(recipe.parent / "runs" / name)
    moved = first.path.rename(first.path.with_name("moved"))
    text = recipe.read_text().replace('\ninitialization = "rows"', f'\nstart_from = "{first.path}"')
    recipe.write_text(text)
    # A recipe only says which run is meant: of the early one, which has saved nothing, it is told what is missing.
    from qtune.commands.run import _to_resume

    assert _to_resume(str(recipe), ["output.name=late"]) == (broken["late"], [])
    with pytest.raises(RunError) as caught:
        train.resume(broken["early"])
    assert str(caught.value) == (
        f'{broken["early"].resolved_file}: adapter.start_from = "{first.path}": is no longer a finished run; put it '
        "back there, for no step of this run is saved, and it begins again as that one has ended"
    )
    capsys.readouterr()
    train.resume(broken["late"], ["training.log_every=1"])
    assert f"{first.path}, which this run has started from, is no longer there" in capsys.readouterr().err
    assert_same_run(broken["late"], unbroken)
    assert resumed_recipe(broken["late"]).recipe.adapter.start_from == str(first.path)
    assert proof.prove(broken["late"]).startswith("steps 10 to 10 were repeated")
    moved.rename(first.path)
    assert_same_run(train.resume(broken["early"]), unbroken)


@pytest.mark.slow
def test_a_checkpoint_that_was_not_finished_does_not_count(
    write_recipe: WriteRecipe, unbroken: Callable[[str, str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(adapter=ADAPTERS["p-tuning-lstm"], training=TWO_EPOCHS)
    original = train.save_adapter

    def killed_while_saving(model, folder):
        if folder.name == "checkpoint-6":
            (folder / f".{STATE_FILE}").write_bytes(b"half")
            raise Killed
        original_state(model, folder)

    from qtune.training import trainer

    original_state = trainer.save_trained_state
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_trained_state", killed_while_saving)
        with pytest.raises(Killed):
            run(recipe)
    broken = latest_run(recipe)
    assert (broken.checkpoints / "checkpoint-6").is_dir()
    assert complete_checkpoints(broken.checkpoints)[-1].name == "checkpoint-3"

    def killed_at_the_end(model, folder, initial=None):
        original(model, folder, initial)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_adapter", killed_at_the_end)
        with pytest.raises(Killed):
            train.resume(broken)
    assert not broken.is_finished
    assert_same_run(train.resume(broken), unbroken("p-tuning-lstm", "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5, 10], ids=["in an epoch", "at the end of an epoch", "at the last step"])
def test_ctrl_c_saves_and_says_how_to_go_on(
    write_recipe: WriteRecipe, unbroken: Callable[[str, str], RunDir], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    # The LSTM's dropout draws random numbers wherever it runs: a checkpoint more must not draw one more.
    recipe = write_recipe(adapter=ADAPTERS["p-tuning-lstm"], training=TWO_EPOCHS)
    before = signal.getsignal(signal.SIGINT)

    def press(self, args, state, control, **_):
        if state.global_step == step - 1:
            CTRL_C.press()

    with monkeypatch.context() as patch:
        patch.setattr(OptimizerPhase, "on_pre_optimizer_step", press)
        if step == 10:
            stopped = run(recipe)  # what was asked for is done anyway
        else:
            with pytest.raises(Interrupted) as caught:
                run(recipe)
            stopped = latest_run(recipe)
            assert str(caught.value) == (
                f"stopped at step {step} of 10, which is saved\ngo on with: qtune run --resume {stopped.path}"
            )
            assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert records(stopped, "note")[0]["message"] == "stopping after this step; once more stops at once"
    if step != 10:
        train.resume(stopped)
    assert_same_run(stopped, unbroken("p-tuning-lstm", "float32"))


@pytest.mark.slow
def test_a_signal_between_an_epochs_last_step_and_its_end_loses_no_evaluation(
    write_recipe: WriteRecipe, unbroken: Callable[[str, str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There `on_step_end` has passed, and the next one would be of the next epoch's first step."""
    recipe = write_recipe(adapter=ADAPTERS["lora"], training=TWO_EPOCHS)
    original = Metrics.on_log

    def press(self, args, state, control, **logged):
        original(self, args, state, control, **logged)
        if state.global_step == 5 and "loss" in logged["logs"]:
            CTRL_C.press()

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_log", press)
        with pytest.raises(Interrupted, match=r"^stopped at step 5 of 10, which is saved\n"):
            run(recipe)
    stopped = latest_run(recipe)
    assert not records(stopped, "eval")
    train.resume(stopped)
    assert_same_run(stopped, unbroken("lora", "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [4, 2])
def test_an_evaluation_that_was_owed_and_exhausts_patience_ends_the_run_where_it_stood(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    training = f"epochs = 3\nbatch_size = 4\nmicro_batch_size = {micro_batch}\nlearning_rate = 1e-2\npatience = 1"
    recipe = write_recipe(adapter=ADAPTERS["lora"], training=training)
    sums, compute_loss, taken = QloraTrainer._sums, QloraTrainer.compute_loss, list[int]()

    def worse(self, batch):
        (loss, correct, scored), rows = sums(self, batch)
        factor = 1.0 + self.state.global_step
        return torch.stack([factor * loss, correct, scored]), [(factor * of_row, tokens) for of_row, tokens in rows]

    def counted(self, *args, **kwargs):
        taken.append(self.state.global_step + 1)
        return compute_loss(self, *args, **kwargs)

    def press(self, args, state, control, **_):
        if state.global_step == 9:
            CTRL_C.press()

    monkeypatch.setattr(QloraTrainer, "_sums", worse)
    unbroken = run(recipe)
    assert [one["step"] for one in records(unbroken, "eval")] == [5, 10]
    with monkeypatch.context() as patch:
        patch.setattr(OptimizerPhase, "on_pre_optimizer_step", press)
        with pytest.raises(Interrupted, match=r"^stopped at step 10 of 15, which is saved\n"):
            run(recipe)
    stopped = latest_run(recipe)
    monkeypatch.setattr(QloraTrainer, "compute_loss", counted)
    train.resume(stopped)
    assert taken == []
    assert_same_run(stopped, unbroken)


@pytest.mark.slow
def test_the_clock_asks_for_checkpoints_too(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.training.callbacks.time.monotonic", itertools.count().__next__)
    finished = run(write_recipe(training="steps = 4\nbatch_size = 2\ncheckpoint_minutes = 0.01\nkeep_checkpoints = 3"))
    assert [folder.name for folder in complete_checkpoints(finished.checkpoints)] == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    ]


@pytest.mark.slow
def test_a_finished_run_cannot_be_resumed(write_recipe: WriteRecipe) -> None:
    finished = run(write_recipe(training="steps = 1\nbatch_size = 1"))
    with pytest.raises(RunError) as caught:
        train.resume(finished)
    assert str(caught.value) == (
        f"{finished.path}: has ended; there is nothing to resume. A new run goes on from its adapter with: qtune run "
        f"{finished.resolved_file} --set adapter.start_from={finished.path}"
    )
    ended = CliRunner().invoke(cli.app, ["run", "--resume", str(finished.path), "--set", "training.steps=9"])
    assert str(ended.exception) == f"{caught.value} --set training.steps=9"


def test_rows_that_have_changed_cannot_be_gone_on_with(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 4\nbatch_size = 2\nmicro_batch_size = 1\ncheckpoint_every = 2")
    with monkeypatch.context() as patch:
        kill_in_step(patch, 3)
        with pytest.raises(Killed):
            run(recipe)
    rows = recipe.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace("It is 1.", "It is one."))
    stopped = latest_run(recipe)
    with pytest.raises(RunError) as caught:
        train.resume(stopped)
    said = f"{stopped.path}: is no longer what it was: rows: the training rows are not those that the run began with"
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("or go on with what is here now: --accept-drift rows")


def stopped_run(recipe: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> RunDir:
    with monkeypatch.context() as patch:
        kill_in_step(patch, step)
        with pytest.raises(Killed):
            run(recipe, "output.name=broken")
    return latest_run(recipe)


@pytest.mark.slow
def test_what_was_measured_of_each_part_of_a_resumed_run_is_kept(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = stopped_run(write_recipe(training=TWO_EPOCHS), monkeypatch, step=8)
    first = read_memory(broken)
    assert first is not None
    assert first.measured is not None
    assert first.earlier is None
    train.resume(broken)
    both = read_memory(broken)
    assert both is not None
    assert both.measured is not None
    assert both.earlier == ({name: first.measured[name] for name in ("device", "phases")},)
    assert first.measured["phases"]["forward"]["visits"] > both.measured["phases"]["forward"]["visits"] > 0
    trace_run(broken, savings=False)  # adds to the file, and takes nothing away
    traced = read_memory(broken)
    assert traced is not None
    assert traced.traced is not None
    assert traced.earlier == both.earlier


@pytest.mark.slow
def test_a_run_goes_on_in_other_micro_batches_with_the_same_losses(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training=TWO_EPOCHS)
    unbroken = run(recipe)
    broken = stopped_run(recipe, monkeypatch, step=8)
    tried = memory_for(monkeypatch, rows=1)
    changes = ["training.micro_batch_size=1", "training.gradient_checkpointing=true", 'memory.loss_tile="1MiB"']
    # Three steps a line, from step 7 on; a checkpoint after each, of which one is kept.
    changes += ["training.log_every=3", "training.checkpoint_every=1", "training.keep_checkpoints=1"]
    train.resume(broken, changes)

    assert set(tried) == {1}  # nothing larger was even tried
    seen = {record["step"]: record for record in records(broken, "train")}
    assert sorted(seen) == [*range(1, 7), 9]
    expected = [record["loss"] for record in records(unbroken, "train")]
    assert [seen[step]["loss"] for step in range(1, 7)] == expected[:6]
    assert seen[9]["loss"] == pytest.approx(sum(expected[6:9]) / 3, rel=1e-4)
    assert [record["loss"] for record in records(broken, "eval")] == pytest.approx(
        [record["loss"] for record in records(unbroken, "eval")], rel=1e-4
    )
    for name, tensor in final_state(unbroken).items():
        torch.testing.assert_close(final_state(broken)[name], tensor, rtol=1e-2, atol=1e-4, msg=name)
    assert [folder.name for folder in complete_checkpoints(broken.checkpoints)] == ["checkpoint-10"]
    lines = broken.resolved_file.read_text().splitlines()
    assert "micro_batch_size = 1  # --set: on resuming" in lines
    assert "log_every = 3  # --set: on resuming" in lines
    number = recipe.read_text().splitlines().index("batch_size = 4") + 1
    assert f"batch_size = 4  # recipe: tiny.toml:{number}" in lines  # what did not change keeps its origin
    assert load_recipe(broken.resolved_file).recipe.memory.loss_tile == "1MiB"


@pytest.mark.slow
def test_what_would_make_another_run_is_refused_when_a_run_goes_on(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = stopped_run(write_recipe(training=TWO_EPOCHS), monkeypatch, step=5)
    before = {file.name: file.read_bytes() for file in broken.path.glob("*.*")}
    may = (
        "training.micro_batch_size, training.gradient_checkpointing, training.lean_step, memory.budget, "
        "memory.embeddings, memory.activations, memory.layers, memory.keep_dequantized, memory.loss_tile, "
        "quantization.keep_copy, training.log_every, "
        "training.eval_every, training.sample_answers, training.checkpoint_every, training.checkpoint_minutes, "
        "training.keep_checkpoints, training.trackers, training.rehearse, data.allow, output.gguf"
    )
    asked = (
        "--set training.gradient_checkpointing=auto --set memory.keep_dequantized=auto "
        "--set training.learning_rate=0.5 --set adapter.kind=ia3 --set training.log_every=2"
    )
    with pytest.raises(RecipeError) as caught:
        train.resume(broken, ["training.learning_rate=0.5", "adapter.kind=ia3", "training.log_every=2"])
    assert str(caught.value) == "\n".join(
        f"--set {key}: decides what is learned, so the rest would not be the same run; start a new one with: qtune run "
        f"{broken.resolved_file} {asked} (on resuming these may change: {may})"
        for key in ("adapter.kind", "training.learning_rate")
    )
    assert {file.name: file.read_bytes() for file in broken.path.glob("*.*")} == before
    # Said again as it was, a value changes nothing.
    assert resumed_recipe(broken, ["training.learning_rate=1e-2"]) is not None
    shown = run_warm_qtune("run", "--resume", broken.path, "--set", "training.seed=1")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("error: --set training.seed: decides what is learned, so the rest")


def test_another_budget_lets_the_micro_batch_follow_from_memory_again(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 2\nbatch_size = 4")
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_model", killed)
        with pytest.raises(Killed):
            run(recipe)
    broken = latest_run(recipe)
    assert resumed_recipe(broken).recipe.training.micro_batch_size == 4
    follows = resumed_recipe(broken, ["memory.budget=8GiB"]).recipe
    assert (follows.training.micro_batch_size, follows.training.gradient_checkpointing) == ("auto", "auto")
    assert follows.memory.keep_dequantized == "auto"
    kept = resumed_recipe(broken, ["memory.budget=8GiB", "training.micro_batch_size=1"])
    assert kept.recipe.training.micro_batch_size == 1


# --- in processes of their own -------------------------------------------------------------------------------------


def wait_for_step(process, metrics: Path, step: int) -> None:
    """Until the run has written the record of `step`."""
    while process.poll() is None:
        if metrics.is_file() and re.search(rf'"step": {step},', metrics.read_text()):
            return
        time.sleep(0.02)
    pytest.fail(f"ended too early:\n{process.communicate()[1]}")


@pytest.mark.slow
def test_sigkill_and_sigint_do_not_change_what_is_learned(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(
        adapter=ADAPTERS["p-tuning-lstm"],
        training="steps = 30\nbatch_size = 4\nmicro_batch_size = 2\nlearning_rate = 1e-2\ncheckpoint_every = 1",
    )
    unbroken = run(recipe, "output.name=unbroken")
    broken = RunDir(recipe.parent / "runs" / "tiny")

    killed = warm_qtune_process("run", recipe)
    wait_for_step(killed, broken.metrics_file, 7)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL

    interrupted = warm_qtune_process("run", "--resume", broken.path)
    wait_for_step(interrupted, broken.metrics_file, 12)
    interrupted.send_signal(signal.SIGINT)
    _, messages = interrupted.communicate()
    assert interrupted.returncode == 130, messages
    assert f"go on with: qtune run --resume {broken.path}" in messages.replace("\n", " ")

    finished = run_warm_qtune("run", "--resume", recipe, "--set", "training.keep_checkpoints=1")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{broken.path}\n"
    assert_same_run(broken, unbroken)
