"""The trace is the step that runs: a real one's bytes on the CPU."""

import gc
from functools import partial

import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Trainer

from qtune.adapter.attach import attach_adapter
from qtune.adapter.lean import install_lean_step
from qtune.device.present import Device
from qtune.errors import ModelError
from qtune.memory import predict as prediction
from qtune.memory.predict import Longest, build, predict, training_step
from qtune.memory.tracing import adoption, categories
from qtune.memory.tracing.bare_model import bare_model
from qtune.memory.tracing.cuda import workspace
from qtune.memory.tracing.history import History, history_of
from qtune.memory.tracing.ledger import Ledger, follow_modules
from qtune.memory.tracing.step import forward_backward, parameter_groups, prepare, trained, update
from qtune.model.kept_weights import keep_weights
from qtune.model.load import attention_rule, load_base
from qtune.model.loss import install_loss
from qtune.plan import Plan, make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe

CPU = Device("cpu", "a processor", 8 * 2**30, 8 * 2**30, bf16=False)
CARD = Device("cuda", "a card", 24 * 2**30, 24 * 2**30, bf16=True, capability=(8, 9))


def tiny(layers: int = 2, **changes) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, "num_hidden_layers": layers, "vocab_size": 256, "pad_token_id": 0, **changes})


def recipe_with(**tables) -> Recipe:
    given = {"model": {"base": "tiny"}, "data": {"train": "rows.jsonl", "max_length": 128}}
    given["training"] = {"batch_size": 2, "micro_batch_size": 2}
    for name, table in tables.items():
        given[name] = {**given.get(name, {}), **table}
    return parse_recipe(given)


def executed(folder: str, recipe: Recipe, plan: Plan, longest: Longest) -> History:
    """The second of two real CPU steps under the ledger."""
    network = load_base(recipe.model.model_copy(update={"base": folder}), recipe.quantization, plan)
    model = attach_adapter(network, recipe.adapter, plan)
    install_loss(model.get_base_model())
    install_lean_step(model, getattr(torch, plan.compute_dtype))
    keep_weights(model, plan.keep_dequantized, getattr(torch, plan.compute_dtype))
    step = training_step(recipe, plan, longest)
    prepare(model, step)
    optimizer = step.optimizer(parameter_groups(model))
    warm_up = Ledger()
    forward_backward(model, step, warm_up)
    update(model, step, optimizer, warm_up)
    if step.accumulates:
        forward_backward(model, step, warm_up)
    ledger = Ledger(workspace=lambda func, args: workspace(func, args, cuda=False))
    adoption.adopt_model(ledger, model)
    adoption.adopt_optimizer(ledger, optimizer)
    adoption.adopt_gradients(ledger, trained(model))
    handles = follow_modules(ledger, model)
    with ledger:
        forward_backward(model, step, ledger)
        gc.collect()  # prefix-tuning's cache is in a cycle, and dies when Python gets to it
        update(model, step, optimizer, ledger)
    for handle in handles:
        handle.remove()
    return history_of(ledger, plan.gradient_checkpointing)


ADAPTERS = {"lora": {"kind": "lora", "rank": 4}, "p-tuning": {"kind": "p-tuning", "virtual_tokens": 8}}


OTHERS = {
    "dora": {"kind": "lora", "rank": 4, "dora": True, "dropout": 0.1},
    "prompt-tuning": {"kind": "prompt-tuning", "virtual_tokens": 8},
    "prompt-tuning residual": {"kind": "prompt-tuning", "virtual_tokens": 8, "residual": True},
    "prefix-tuning": {"kind": "prefix-tuning", "virtual_tokens": 8},
    "ia3": {"kind": "ia3"},
}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", OTHERS)
def test_traced_bytes_of_every_kind_of_adapter_are_the_executed_ones(tmp_path, adapter):
    config = tiny(layers=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    training = {"gradient_checkpointing": True, "optimizer": "paged-adamw-8bit" if adapter == "dora" else "adamw"}
    recipe = recipe_with(adapter=OTHERS[adapter], training=training)
    plan, longest = make_plan(recipe, CPU), Longest(128, equal=True)
    real = executed(str(tmp_path), recipe, plan, longest)
    traced = predict(config, recipe, plan, longest).history
    for phase in ("forward", "backward", "optimizer"):
        assert traced.peak(phase).bytes == pytest.approx(real.peak(phase).bytes, rel=0.01), phase


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True, 1, 2])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_traced_bytes_are_the_executed_ones(tmp_path, adapter, checkpointing):
    config = tiny(layers=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    recipe = recipe_with(adapter=ADAPTERS[adapter], training={"gradient_checkpointing": checkpointing})
    plan, longest = make_plan(recipe, CPU), Longest(128, equal=True)
    real = executed(str(tmp_path), recipe, plan, longest)
    traced = predict(config, recipe, plan, longest).history
    for phase in ("forward", "backward", "optimizer"):
        assert traced.peak(phase).bytes == pytest.approx(real.peak(phase).bytes, rel=0.01), phase


KEPT = [("lora", True, False), ("lora", 2, 1), ("lora", True, True), ("p-tuning", True, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "keep", "checkpointing"), KEPT)
def test_traced_bytes_with_weights_that_stay_dequantized_are_the_executed_ones(tmp_path, adapter, keep, checkpointing):
    config = tiny(layers=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    given = {"adapter": ADAPTERS[adapter], "training": {"gradient_checkpointing": checkpointing}}
    recipe, without = (recipe_with(**given, memory={"keep_dequantized": one}) for one in (keep, False))
    plan, longest = make_plan(recipe, CPU), Longest(128, equal=True)
    real = executed(str(tmp_path), recipe, plan, longest)
    traced = predict(config, recipe, plan, longest).history
    plain = predict(config, without, make_plan(without, CPU), longest).history
    for phase in ("forward", "backward", "optimizer"):
        assert traced.peak(phase).bytes == pytest.approx(real.peak(phase).bytes, rel=0.01), phase
        assert traced.peak(phase).bytes > plain.peak(phase).bytes
    layers = 3 if keep is True else keep
    kept = layers * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) * 4
    for history in (traced, real):  # nothing is dequantized there
        assert history.peak("optimizer").alive[categories.WORKSPACE] == kept


@pytest.mark.slow
def test_a_shortened_trace_of_some_layers_that_keep_theirs_is_the_whole_one():
    config, longest = tiny(layers=16), Longest(128)
    recipe = recipe_with(memory={"keep_dequantized": 2}, training={"gradient_checkpointing": False})
    plan = make_plan(recipe, CARD)
    short = predict(config, recipe, plan, longest, plays_allocator=False)
    whole = predict(config, recipe, plan, longest)
    assert short.layers_executed < 16 == whole.layers_executed
    assert short.history.peak("backward").bytes == whole.history.peak("backward").bytes
    assert short.work == whole.work


def test_gradients_of_earlier_micro_batches_are_alive_in_the_next(tmp_path):
    config = tiny(layers=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    once = recipe_with(adapter={"kind": "lora", "rank": 32})
    recipe = recipe_with(adapter={"kind": "lora", "rank": 32}, training={"batch_size": 8})
    plan, longest = make_plan(recipe, CPU), Longest(128, equal=True)
    assert plan.accumulation_steps == 4
    real = executed(str(tmp_path), recipe, plan, longest)
    traced = predict(config, recipe, plan, longest).history
    for phase in ("forward", "backward", "optimizer"):
        assert traced.peak(phase).bytes == pytest.approx(real.peak(phase).bytes, rel=0.01), phase
    alone = predict(config, once, make_plan(once, CPU), longest).history
    gradients = traced.peak("optimizer").alive[categories.GRADIENTS]
    assert traced.peak("forward").bytes - alone.peak("forward").bytes == gradients > 0


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_parameters_are_grouped_as_the_trainer_groups_them(adapter):
    recipe = recipe_with(adapter=ADAPTERS[adapter], quantization={"kind": "none"})
    model = build(tiny(attention_bias=True), recipe, make_plan(recipe, CPU))
    model.requires_grad_(True)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups = [{id(p) for p in group["params"]} for group in parameter_groups(model)]
    expected = [{id(p) for name, p in model.named_parameters() if (name in decayed) == kept} for kept in (True, False)]
    assert groups == expected


def test_a_first_token_is_scored_only_behind_virtual_ones():
    scored = {}
    for adapter, table in ADAPTERS.items():
        recipe = recipe_with(adapter=table)
        step = training_step(recipe, make_plan(recipe, CPU), Longest(128, evaluated=256))
        scored[adapter] = step.batch.scored, step.eval_batch.scored
    assert scored == {"lora": (2 * 127, 2 * 255), "p-tuning": (2 * 128, 2 * 256)}


def test_categories_at_rest_are_what_a_count_by_hand_gives():
    recipe = recipe_with(adapter={"kind": "lora", "rank": 4, "target_modules": ["q_proj"]})
    alive = predict(tiny(layers=1), recipe, make_plan(recipe, CARD)).history.at(0).alive
    linear = 64 * 64 * 2 + 32 * 64 * 2 + 64 * 128 * 3  # q, o; k, v; gate, up, down
    assert alive["base weights 4-bit"] == linear // 2
    assert alive["embeddings"] == alive["head"] == 256 * 64 * 2
    assert alive["adapter"] == (64 * 4 + 4 * 64) * (4 + 2)  # fp32, and the copy that products read
    assert alive["base weights bf16"] == 3 * 512  # three norms of 128 bytes, each rounded up
    # Code book (64 B), 8-bit absmax (one a block of 64), an fp32 absmax for 256 of them, its book (1 KiB), an offset.
    assert alive["quantization constants"] == sum(
        512 + 512 * -(-(weights // 64) // 512) + 512 + 1024 + 512
        for weights in (4096, 4096, 2048, 2048, 8192, 8192, 8192)
    )


def test_what_belongs_to_nothing_else_is_the_buffers_at_rest():
    recipe = recipe_with(adapter={"kind": "lora", "rank": 4, "target_modules": ["q_proj"]})
    alive = predict(tiny(layers=1), recipe, make_plan(recipe, CARD)).history.at(0).alive
    assert alive["other"] == 2 * 512  # the rotary frequencies and their original, 8 of them, each rounded up


def test_the_workspace_is_the_largest_weight_dequantized_and_its_absmax_twice():
    recipe = recipe_with(adapter={"kind": "lora", "rank": 4, "target_modules": ["q_proj"]})
    history = predict(tiny(layers=1), recipe, make_plan(recipe, CARD)).history
    most = history.bytes[history.names.index("dequantized workspace")].max()
    assert most == 64 * 128 * 2 + 2 * (64 * 128 // 64) * 4


@pytest.mark.slow
def test_a_checkpointed_backward_holds_less_than_a_layer_would_have_kept(monkeypatch):
    monkeypatch.setattr(prediction, "install_lean_step", partial(install_lean_step, tile_bytes=0))

    def kept(layers: int) -> int:
        recipe = recipe_with(training={"gradient_checkpointing": False})
        found = kept_for_the_backward(predict(wide(layers), recipe, make_plan(recipe, CARD)).history)
        return found["activations"]

    def wide(layers: int) -> LlamaConfig:
        return tiny(layers=layers, intermediate_size=512)

    recipe = recipe_with(training={"gradient_checkpointing": True})
    history = predict(wide(2), recipe, make_plan(recipe, CARD)).history
    recomputed = int(history.bytes[history.names.index("recomputed activations")].max())
    intermediate = 2 * 128 * 512 * 2
    assert recomputed < kept(3) - kept(2) - intermediate  # gate and up are never whole


def test_adamw_keeps_eight_bytes_for_each_adapter_parameter():
    recipe = recipe_with(adapter={"kind": "lora", "rank": 4, "target_modules": ["q_proj"]})
    history = predict(tiny(layers=1), recipe, make_plan(recipe, CARD)).history
    alive = history.peak("optimizer").alive
    assert alive["gradients"] == 2 * 1024
    assert alive["adapter"] == 3 * 1024  # A and B in fp32 and in the type of their products
    assert alive["optimizer state"] == 2 * 2 * 1024 + 2 * 512  # two moments, and a step count for each parameter


def test_paged_state_is_counted_apart():
    config = tiny(hidden_size=1024, intermediate_size=2048, layers=1)
    adapter = {"kind": "lora", "rank": 128, "target_modules": ["q_proj"]}
    paged, plain = (
        predict(config, recipe, make_plan(recipe, CARD)).history
        for recipe in (
            recipe_with(adapter=adapter, training={"optimizer": name}) for name in ("paged-adamw-8bit", "adamw-8bit")
        )
    )
    assert paged.paged == 2 * 2 * 1024 * 128  # A and B, two moments of one byte each
    assert plain.paged == 0
    gap = plain.peak("optimizer").alive["optimizer state"] - paged.peak("optimizer").alive["optimizer state"]
    assert gap == paged.paged


def kept_for_the_backward(history: History) -> dict[str, int]:
    """What is alive at the first tick of the backward."""
    return history.at(next(tick for tick, label in enumerate(history.labels) if label.phase == "backward")).alive


def test_a_checkpointed_forward_keeps_one_hidden_state_for_each_layer():
    recipe = recipe_with(training={"gradient_checkpointing": True})
    deep, shallow = (
        kept_for_the_backward(predict(tiny(layers=layers), recipe, make_plan(recipe, CARD)).history)
        for layers in (3, 2)
    )
    hidden = 2 * 128 * 64 * 2  # rows x length x hidden x bf16
    assert deep["checkpointed activations"] - shallow["checkpointed activations"] == hidden


def test_dropout_on_cuda_keeps_one_byte_for_each_element():
    kept = []
    for dropout in (0.0, 0.1):
        adapter = {"kind": "lora", "rank": 4, "target_modules": ["q_proj"], "dropout": dropout}
        recipe = recipe_with(adapter=adapter, training={"gradient_checkpointing": False})
        history = predict(tiny(layers=2), recipe, make_plan(recipe, CARD)).history
        kept.append(kept_for_the_backward(history)["activations"])
    elements = 2 * 128 * 64  # of the second layer: the first one's input comes from frozen embeddings
    assert kept[1] - kept[0] == elements


def test_bad_configurations_are_errors_with_a_reason():
    recipe = recipe_with()
    config = tiny()
    config.num_attention_heads = 0
    with pytest.raises(ModelError, match=r"no model can be built from its config.json"):
        predict(config, recipe, make_plan(recipe, CARD))
    missing = recipe_with(adapter={"kind": "lora", "target_modules": ["no_such_layer"]})
    with pytest.raises(ModelError, match="no_such_layer"):
        predict(tiny(), missing, make_plan(missing, CARD))


def test_a_bare_model_has_no_storage():
    model = bare_model(tiny(layers=1), torch.bfloat16, None, "sdpa")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.slow
def test_the_same_models_are_used_again_for_other_batches_and_count_the_same():
    config = tiny(layers=12)
    recipe = recipe_with(training={"batch_size": 8, "micro_batch_size": 1})
    plan = make_plan(recipe, CARD)

    def found(rows: int) -> History:
        return predict(config, recipe, plan.with_micro_batch(rows, "a test"), Longest(128)).history

    fresh = found(4)
    found(1)
    again = found(4)
    assert numpy.array_equal(again.bytes, fresh.bytes)
    assert again.labels == fresh.labels


@pytest.mark.slow
def test_a_step_that_cannot_be_traced_says_so_and_that_a_run_may_work():
    config = AutoConfig.for_model("rwkv", hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, vocab_size=256)
    recipe = recipe_with(adapter={"kind": "lora", "rank": 4})
    with pytest.raises(ModelError, match=r"rwkv cannot be traced without its weights: .* A run may"):
        predict(config, recipe, make_plan(recipe, CARD, attention_rule(config)))
