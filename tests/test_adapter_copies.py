"""Through a whole run every product of an adapter reads its weights as they are at that moment: after a step of the
optimizer, an evaluation, a checkpoint, memory that ran out, and on going on."""

from typing import Any

import pytest
import torch
from conftest import WriteRecipe
from test_training_train import Killed, assert_same_run, latest_run, memory_for, records, run

from qtune.adapter.products import Stack
from qtune.model.checkpointed import switched_layers
from qtune.training import train
from qtune.training.callbacks import Metrics
from qtune.training.trainer import QloraTrainer

RUN = "steps = 6\nbatch_size = 4\nmicro_batch_size = 2\nlearning_rate = 5e-2\neval_every = 2\ncheckpoint_every = 3"
DTYPES = ["float32", "bfloat16"]


def recipe_in(write_recipe: WriteRecipe, dtype: str, training: str = RUN) -> Any:
    return write_recipe(training=training, quantization=f'minimum_share = 0.0\ncompute_dtype = "{dtype}"')


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every product with a stack's copies, in forward and backward: whether they were the parameters' values."""
    found: list[bool] = []

    def watched(name: str) -> None:
        original = getattr(Stack, name)

        def method(self: Stack, *args: Any, **kwargs: Any) -> Any:
            weights = self.weights
            a = torch.cat([layer.a.detach() for layer in self.layers]).to(weights.a.dtype)
            pairs = zip(weights.b, self.layers, strict=True)
            same = all(torch.equal(b, layer.b.detach().to(b.dtype)) for b, layer in pairs)
            found.append(same and torch.equal(weights.a, a))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Stack, name, method)

    watched("inner")
    watched("inner_gradient")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_product_reads_an_old_weight_in_a_run_that_is_killed_and_goes_on(
    write_recipe: WriteRecipe, products: list[bool], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    recipe = recipe_in(write_recipe, dtype)
    whole = run(recipe)
    original = QloraTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(QloraTrainer, "compute_loss", compute_loss)
    with pytest.raises(Killed):
        run(recipe)
    monkeypatch.setattr(QloraTrainer, "compute_loss", original)
    broken = latest_run(recipe)
    train.resume(broken)
    assert_same_run(broken, whole)
    assert len(products) > 400
    assert all(products)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_product_reads_an_old_weight_where_memory_runs_out_and_micro_batches_are_split(
    write_recipe: WriteRecipe, products: list[bool], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    tried = memory_for(monkeypatch, rows=1)
    run(recipe_in(write_recipe, dtype))
    assert tried[:4] == [2, 2, 1, 1]
    assert all(products)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_between_two_steps_change_nothing(
    write_recipe: WriteRecipe, products: list[bool], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    recipe = recipe_in(write_recipe, dtype)
    quiet = run(recipe)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.generate(input_ids=torch.ones(1, 4, dtype=torch.long), max_new_tokens=3, do_sample=False)
        model.train()

    monkeypatch.setattr(Metrics, "on_step_end", on_step_end)
    assert_same_run(run(recipe), quiet)
    assert all(products)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["true", "false", "1"])
def test_a_run_learns_what_it_learns_with_pefts_layers(write_recipe: WriteRecipe, checkpointing: str) -> None:
    recipe = recipe_in(write_recipe, "float32", RUN + f"\ngradient_checkpointing = {checkpointing}")
    ours, theirs = run(recipe), run(recipe, "training.lean_step=false")
    for kind in ("train", "eval"):
        losses = [[record["loss"] for record in records(one, kind)] for one in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("lean", ["true", "false"])
def test_one_layer_of_two_is_checkpointed_and_the_run_goes_on_exactly(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, lean: str
) -> None:
    recipe = recipe_in(write_recipe, "float32", RUN + f"\ngradient_checkpointing = 1\nlean_step = {lean}")
    original, seen = QloraTrainer.compute_loss, []

    def compute_loss(self, model, *args, **kwargs):
        seen.append([layer.gradient_checkpointing for layer in switched_layers(model)])
        if self.state.global_step == 4 and kill:
            raise Killed
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(QloraTrainer, "compute_loss", compute_loss)
    kill = False
    whole = run(recipe)
    kill = True
    with pytest.raises(Killed):
        run(recipe)
    kill = False
    broken = latest_run(recipe)
    train.resume(broken)
    assert_same_run(broken, whole)
    assert all(switches == [True, False] for switches in seen)
    kept = run(recipe, "training.gradient_checkpointing=false")
    losses = [[record["loss"] for record in records(one, "train")] for one in (whole, kept)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_a_single_row_that_does_not_fit_is_tried_with_every_layer_computed_twice(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = "steps = 3\nbatch_size = 2\nmicro_batch_size = 1\nlearning_rate = 1e-2"
    recipe = recipe_in(write_recipe, "float32", training)
    roomy = run(recipe)
    original, tried = QloraTrainer.compute_loss, []

    def compute_loss(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        if model.training:
            tried.append(all(layer.gradient_checkpointing for layer in switched_layers(model)))
            if not tried[-1]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    monkeypatch.setattr(QloraTrainer, "compute_loss", compute_loss)
    narrow = run(recipe, "memory.keep_dequantized=false")  # they would be let go of before
    assert tried == [False] + [True] * 6
    losses = [[record["loss"] for record in records(one, "train")] for one in (narrow, roomy)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    notes = [record["message"] for record in records(narrow, "note")]
    assert "out of memory: every layer is now computed twice; the gradient stays the same" in notes
