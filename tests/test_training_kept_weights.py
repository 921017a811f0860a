"""Through a whole run weights that stay dequantized change nothing, and they are the first to go where memory ends."""

from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from test_training_train import (
    ADAPTERS,
    TWO_EPOCHS,
    assert_same_run,
    final_state,
    memory_for,
    records,
    run,
    stopped_run,
)

from qtune.memory.measured.meter import Meter
from qtune.model.kept_weights import KeptWeight, kept_weights
from qtune.training import train
from qtune.training.trainer import DEQUANTIZED_ANEW, QloraTrainer

OFF = "memory.keep_dequantized=false"

pytestmark = pytest.mark.slow


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[KeptWeight]:
    """The weights that were read back to be kept."""
    found: list[KeptWeight] = []
    original = KeptWeight.make

    def make(self: KeptWeight) -> None:
        if self.held is None:
            found.append(self)
        original(self)

    monkeypatch.setattr(KeptWeight, "make", make)
    # With rates that another test has measured a run traces its step for its time, and the trace keeps weights as well.
    monkeypatch.setattr("qtune.training.inputs.known_rates", lambda device: None)
    return found


def out_of_memory_notes(finished: Any) -> list[str]:
    notes = [record["message"] for record in records(finished, "note")]
    return [note for note in notes if note.startswith("out of memory")]


@pytest.mark.parametrize("kind", ["lora", "p-tuning-mlp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_the_same_without_and_after_it_was_killed(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, made: list[KeptWeight], kind: str, dtype: str
) -> None:
    quantization = f'minimum_share = 0.0\ncompute_dtype = "{dtype}"'
    recipe = write_recipe(adapter=ADAPTERS[kind], training=TWO_EPOCHS, quantization=quantization)
    without = run(recipe, OFF)
    assert made == []
    whole = run(recipe)
    assert len(made) == len(set(map(id, made))) > 0  # each once
    assert all(kept.held is None or kept.module.kept_weight is None for kept in made)  # and let go of at the end
    assert_same_run(whole, without)
    assert "keep_dequantized = true  # rule: no weight is read back twice" in whole.resolved_file.read_text()
    broken = stopped_run(recipe, monkeypatch, step=5)
    train.resume(broken)
    assert_same_run(broken, without)


def test_where_memory_ends_they_go_before_a_micro_batch_is_split(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 3\nbatch_size = 8\nmicro_batch_size = 4\nlearning_rate = 1e-2")
    roomy = run(recipe)
    original, tried = QloraTrainer.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        tried.append((len(inputs["input_ids"]), bool(kept_weights(self.model))))
        if len(tried) == 4:  # in the second micro-batch of a step: its first one is taken again
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    monkeypatch.setattr(QloraTrainer, "compute_loss", compute_loss)
    narrow = run(recipe)
    assert tried == [(4, True)] * 4 + [(4, False)] * 3  # 20 rows: the third step is the last one's four
    assert out_of_memory_notes(narrow) == [DEQUANTIZED_ANEW]
    assert [record["loss"] for record in records(narrow, "train")] == [
        record["loss"] for record in records(roomy, "train")
    ]
    for name, tensor in final_state(roomy).items():
        assert torch.equal(final_state(narrow)[name], tensor), name


def test_memory_that_ends_while_they_are_made_leaves_none(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 2\nbatch_size = 4")
    without = run(recipe, OFF)
    original, left = KeptWeight.make, [5]

    def make(self: KeptWeight) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        original(self)

    monkeypatch.setattr(KeptWeight, "make", make)
    narrow = run(recipe)
    assert_same_run(narrow, without)
    assert out_of_memory_notes(narrow) == [DEQUANTIZED_ANEW]


def test_what_a_rehearsal_gave_up_the_run_tries_again(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 2\nbatch_size = 4\nmicro_batch_size = 4\nrehearse = true")
    original, seen = QloraTrainer.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append(bool(kept_weights(self.model)))
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(QloraTrainer, "compute_loss", compute_loss)
    run(recipe)
    assert seen == [True, False, True, True]


def test_an_evaluation_that_does_not_fit_lets_go_of_them_before_it_is_split(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(training="steps = 2\nbatch_size = 4\neval_every = 1")
    roomy = run(recipe)
    original, failed = Meter.scored, []

    def scored(self: Meter, count: int) -> None:
        original(self, count)
        if self.phase == "eval" and not failed:
            failed.append(count)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Meter, "scored", scored)
    narrow = run(recipe)
    assert out_of_memory_notes(narrow) == [DEQUANTIZED_ANEW]
    assert_same_run(narrow, roomy)


def test_after_them_micro_batches_are_split_as_ever(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = memory_for(monkeypatch, rows=2)
    narrow = run(write_recipe(training="steps = 1\nbatch_size = 4\nmicro_batch_size = 4"))
    assert tried == [4, 4, 2, 2]
    assert out_of_memory_notes(narrow) == [
        "out of memory: micro-batches are now split into 2; the batch stays the same"
    ]
