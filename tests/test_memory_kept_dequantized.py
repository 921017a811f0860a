"""As many layers keep their weights dequantized as memory is left for, where that makes the faster step."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from test_memory_trace import CARD, CPU, recipe_with, tiny
from transformers import AutoConfig

from qtune.device.cards import card_named
from qtune.device.rates import data_sheet_rates
from qtune.memory.budget import Search, as_run, levers
from qtune.memory.forecast import forecast
from qtune.memory.kept_dequantized import KEEP_DEQUANTIZED, fastest_kept, most, plan_at_first, weights_bytes
from qtune.memory.kept_layers import CHECKPOINTING, Steps
from qtune.memory.longest import Rows
from qtune.memory.predict import Longest
from qtune.memory.savings import _switched_off
from qtune.memory.tracing.bare_model import bare_model
from qtune.model.quantization import quantization_config
from qtune.plan import make_plan
from qtune.recipe.faults import Faulty
from qtune.recipe.parse import changed
from qtune.recipe.schema import FourBit
from qtune.screens.levers import in_words

LAYERS = 32
RATES = data_sheet_rates(card_named("H100"))


def step(layers: bool | int, rows: int) -> SimpleNamespace:
    """1000 bytes, 50 for a row and 10 for each layer that keeps its weights; of every other one reading them back takes
    what two rows take."""
    kept = LAYERS if layers is True else int(layers)
    flops = 10**12 * (100 * rows + 2 * (LAYERS - kept))
    work = [("forward", "layers", False, "mm", "products", 1, 0, flops, "bfloat16", 0, 1)]
    return SimpleNamespace(bytes=1000 + 50 * rows + 10 * kept, work=work)


def steps(limit: int) -> Steps:
    return Steps(lambda layers, rows: step(layers, rows), lambda one: one.bytes, limit, LAYERS)


@pytest.mark.parametrize("limit", range(1050, 1400, 7))
def test_the_most_layers_are_those_that_trying_all_of_them_finds(limit: int) -> None:
    fitting = [layers for layers in range(LAYERS + 1) if step(layers, 1).bytes <= limit]
    layers, prediction = most(steps(limit), 1)
    assert (LAYERS if layers is True else int(layers)) == max(fitting)
    assert prediction.bytes <= limit


@pytest.mark.parametrize("limit", range(1400, 1900, 30))
def test_no_micro_batch_that_was_looked_at_makes_a_faster_step(limit: int) -> None:
    best = fastest_kept(steps(limit), [1, 2, 4, 8], 8, RATES)

    def seconds(layers: bool | int, rows: int) -> int:
        return 8 // rows * int(step(layers, rows).work[0][7])

    tried = [(layers, rows) for layers in range(LAYERS + 1) for rows in (2, 4, 8)]
    fitting = [seconds(*one) for one in tried if step(*one).bytes <= limit]
    assert seconds(best.layers, best.rows) == min(fitting)


def test_where_it_makes_no_faster_step_nothing_is_kept() -> None:
    same = Steps(lambda layers, rows: step(False, rows), lambda one: one.bytes, 9000, LAYERS)
    assert fastest_kept(same, [4], 4, RATES).layers is False


@pytest.mark.slow
def test_what_is_left_of_a_card_is_filled_and_the_plan_says_why() -> None:
    config, longest = tiny(layers=6, hidden_size=512, intermediate_size=1024), Longest(256)
    recipe = recipe_with(training={"batch_size": 2, "micro_batch_size": 2})
    twice, none, every = (
        Search(config, CARD, longest, 0).trace(
            changed(recipe, {CHECKPOINTING: layers, KEEP_DEQUANTIZED: keep}), 2
        ).need.total_bytes
        for layers, keep in ((True, False), (False, False), (False, True))
    )  # fmt: skip
    for limit, expected, reason in (
        (every, {True}, "all of them, for there is room: "),
        ((none + every) // 2, set(range(2, 6)), " of 6 layers fit: "),
        (none, {False}, "without them: "),
        ((twice + none) // 2, {False}, "memory is asked for it last, and some layers are computed twice to save some"),
    ):
        found, plan = as_run(Search(config, CARD, longest, limit), recipe)
        assert found.need.total_bytes <= limit
        assert plan.keep_dequantized in expected
        assert plan.gradient_checkpointing is False or limit < none
        assert reason in plan.reasons[KEEP_DEQUANTIZED]
    for given in (False, 3):
        fixed = changed(recipe, {KEEP_DEQUANTIZED: given})
        _, plan = as_run(Search(config, CARD, longest, every), fixed)
        assert plan.keep_dequantized == given
        assert KEEP_DEQUANTIZED not in plan.reasons


WITHOUT: dict[str, tuple[dict[str, Any], str]] = {
    "unquantized": ({"quantization": {"kind": "none"}}, "there are no 4-bit weights to dequantize"),
    "int8": ({"quantization": {"kind": "int8"}}, "there are no 4-bit weights to dequantize"),
    "layers elsewhere": ({"memory": {"layers": "host"}}, "the layers wait elsewhere, which saves memory"),
    "peft's step": ({"training": {"lean_step": False}}, "the lean step alone keeps them"),
}


@pytest.mark.parametrize("device", [CPU, CARD], ids=["cpu", "card"])
@pytest.mark.parametrize(("given", "reason"), WITHOUT.values(), ids=WITHOUT)
def test_where_it_means_nothing_the_plan_says_so(given: dict[str, Any], reason: str, device: Any) -> None:
    plan = plan_at_first(recipe_with(**given), device, tiny())
    assert (plan.keep_dequantized, plan.reasons[KEEP_DEQUANTIZED]) == (False, reason)


@pytest.mark.parametrize("name", ["layers elsewhere", "peft's step"])
def test_what_was_kept_before_is_not_in_the_way_of_layers_elsewhere_or_pefts(name: str) -> None:
    """A run that goes on so had settled it by itself."""
    given, reason = WITHOUT[name]
    recipe = recipe_with(**{**given, "memory": {**given.get("memory", {}), "keep_dequantized": True}})
    plan = make_plan(recipe, CARD)
    assert (plan.keep_dequantized, plan.reasons[KEEP_DEQUANTIZED]) == (False, reason)


@pytest.mark.parametrize("kind", ["int8", "none"])
def test_weights_that_are_not_in_4_bits_cannot_be_asked_to_stay(kind: str) -> None:
    for given in (True, 3):
        with pytest.raises(Faulty) as refused:
            recipe_with(quantization={"kind": kind}, memory={"keep_dequantized": given})
        said = f"only 4-bit weights are dequantized, and quantization.kind is {kind}; remove the key"
        assert [(fault.path, fault.message) for fault in refused.value.faults] == [(KEEP_DEQUANTIZED, said)]
    assert recipe_with(quantization={"kind": kind}, memory={"keep_dequantized": False})


def test_one_process_has_every_part_of_sharded_layers_and_can_keep_them() -> None:
    recipe = recipe_with(memory={"layers": "sharded", "keep_dequantized": True})
    assert make_plan(recipe, CARD).keep_dequantized is True
    assert make_plan(recipe, replace(CARD, processes=2)).keep_dequantized is False


def test_a_processor_keeps_all_where_memory_is_ample() -> None:
    plan = plan_at_first(recipe_with(), CPU, tiny())
    assert plan.keep_dequantized is True
    assert plan.reasons[KEEP_DEQUANTIZED] == "no weight is read back twice, and memory is ample"
    large = tiny(layers=32, hidden_size=4096, intermediate_size=14336)
    plan = plan_at_first(recipe_with(), CPU, large)
    assert plan.keep_dequantized is False
    assert plan.reasons[KEEP_DEQUANTIZED] == "it would take up to 29.00 GiB of 8.00 GiB"
    budget = recipe_with(memory={"budget": "1MiB"})
    assert plan_at_first(budget, CPU, tiny()).keep_dequantized is False
    several = replace(CPU, processes=16, free_bytes=8 * 2**20)
    assert plan_at_first(recipe_with(training={"batch_size": 16}), several, tiny()).keep_dequantized is False
    assert plan_at_first(recipe_with(), replace(several, processes=1), tiny()).keep_dequantized is True
    asked = plan_at_first(recipe_with(memory={"keep_dequantized": 1}), CPU, large)
    assert (asked.keep_dequantized, KEEP_DEQUANTIZED in asked.reasons) == (1, False)


def test_of_experts_nothing_is_known_on_a_processor() -> None:
    plan = plan_at_first(recipe_with(), CPU, AutoConfig.for_model("mixtral"))
    assert plan.reasons[KEEP_DEQUANTIZED] == "how much memory that takes is not known for such a model"
    assert plan.keep_dequantized is False


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "olmo2"])
def test_weights_take_no_more_than_the_bound(family: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes, **heads)
    model = bare_model(config, torch.float32, quantization_config(FourBit(), torch.float32), "eager")
    weights = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    taken = sum(4 * module.in_features * module.out_features for module in weights)
    bound = weights_bytes(config, torch.float32)
    assert bound is not None
    assert 0 < taken <= bound


@pytest.mark.slow
def test_a_processor_without_room_gives_them_up_before_anything_else() -> None:
    config, rows = tiny(layers=4, hidden_size=256, intermediate_size=512), Rows(Longest(64), "the test")
    recipe = recipe_with(quantization={"compute_dtype": "float32"})
    kept = forecast(config, recipe, CPU, rows)
    assert kept.plan.keep_dequantized is True
    small = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"budget": "90MiB"})})
    assert kept.prediction.need.total_bytes < 90 * 2**20
    search = Search(config, CPU, rows.longest, kept.prediction.need.total_bytes - 1)
    _, plan = as_run(search, small)
    assert plan.keep_dequantized is False
    assert plan.reasons[KEEP_DEQUANTIZED] == "there is no room for it"
    assert (plan.gradient_checkpointing, plan.micro_batch_size) == (False, kept.plan.micro_batch_size)


def test_it_is_the_first_lever_and_explained() -> None:
    recipe = recipe_with(memory={"keep_dequantized": True})
    plan = make_plan(recipe, CARD)
    first = next(levers(recipe, plan))
    assert (first.words, first.why) == (
        "memory.keep_dequantized = false",
        "weights are dequantized for every product: more time, same result",
    )
    explained = {name: (how, other) for name, how, other in _switched_off(recipe, plan)}
    how, other = explained["weights kept dequantized"]
    assert (how, other.memory.keep_dequantized) == ("dequantized for every product", False)
    plain = recipe_with(memory={"keep_dequantized": False})
    assert all(lever.key != KEEP_DEQUANTIZED for lever in levers(plain, make_plan(plain, CARD)))


def test_what_it_does_is_said_in_words() -> None:
    assert in_words(KEEP_DEQUANTIZED, True, 32) == (
        "every layer keeps its 4-bit weights dequantized: more memory, less time, the same results"
    )
    assert in_words(KEEP_DEQUANTIZED, False, 32) == (
        "no layer keeps its 4-bit weights dequantized: less memory, more time, the same results"
    )
    assert in_words(KEEP_DEQUANTIZED, 5, 32) == (
        "the first 5 of 32 layers keep their 4-bit weights dequantized: less time, the same results"
    )
