"""As few layers are computed twice as memory allows, where that makes the fastest step."""

from types import SimpleNamespace

import pytest
from test_memory_trace import CARD, CPU, recipe_with, tiny

from qtune.device.cards import card_named
from qtune.device.rates import data_sheet_rates
from qtune.memory.budget import Search, as_run
from qtune.memory.forecast import forecast
from qtune.memory.kept_layers import CHECKPOINTING, Steps, could_fill, fastest, fewest
from qtune.memory.longest import Rows
from qtune.memory.predict import Longest, predict
from qtune.plan import make_plan
from qtune.recipe.parse import changed

LAYERS = 32
RATES = data_sheet_rates(card_named("H100"))
FLOPS = 10**13
"""Of a layer's forward for one row; so many that launches are nothing beside them."""


def step(layers: bool | int, rows: int, curve: float = 0.0) -> SimpleNamespace:
    """1000 bytes of weights; a row takes 1 in a layer that is computed twice, and 10 in another one; a backward is two
    forwards, and one more where a layer is computed twice."""
    twice = LAYERS if layers is True else int(layers)
    bytes_ = 1000 + rows * (twice + 10 * (LAYERS - twice)) + int(curve * twice * (LAYERS - twice))
    flops = rows * FLOPS * (3 * LAYERS + twice)
    # A launch for each layer of a micro-batch, of which one row has as many as eight.
    work = [("forward", "layers", False, "mm", "products", 1000, 0, flops, "bfloat16", 0, 1)]
    return SimpleNamespace(bytes=bytes_, work=work)


def steps(limit: int, curve: float = 0.0) -> Steps:
    return Steps(lambda layers, rows: step(layers, rows, curve), lambda one: one.bytes, limit, LAYERS)


@pytest.mark.parametrize("curve", [-0.4, 0.0, 0.4])
@pytest.mark.parametrize("limit", range(1000, 1340, 7))
def test_the_fewest_layers_are_those_that_trying_all_of_them_finds(limit, curve):
    asked = steps(limit, curve)
    fitting = [layers for layers in range(LAYERS + 1) if step(layers, 1, curve).bytes <= limit]
    found = fewest(asked, 1)
    if step(True, 1, curve).bytes > limit and step(False, 1, curve).bytes > limit:
        assert found is None
    else:
        assert found is not None
        layers, prediction = found
        assert prediction.bytes <= limit
        # Where memory is no straight line several stretches may fit; no neighbour with fewer layers does.
        assert layers is False or (LAYERS if layers is True else layers) - 1 not in fitting
        if not curve:
            assert (LAYERS if layers is True else int(layers)) == min(fitting)


@pytest.mark.parametrize("limit", range(1040, 4000, 90))
def test_no_micro_batch_that_was_looked_at_makes_a_faster_step(limit):
    sizes = [rows for rows in (1, 2, 4, 8) if step(True, rows).bytes <= limit]
    best = fastest(steps(limit), sizes, 8, RATES)
    rows, layers = (max(sizes), True) if best is None else (best.rows, best.layers)

    def work(rows: int, layers: bool | int) -> float:
        return 8 // rows * step(layers, rows).work[0][7]

    for other in sorted(sizes)[-3:]:
        for twice in [True, *range(LAYERS)]:
            if step(twice, other).bytes <= limit:
                assert work(rows, layers) <= work(other, twice or False) * 1.001


def test_with_room_for_everything_nothing_is_computed_twice():
    best = fastest(steps(10**6), [1, 2, 4, 8], 8, RATES)
    assert best is not None
    assert (best.layers, best.rows) == (False, 8)


def test_without_room_nothing_is_decided():
    assert fastest(steps(1000), [1], 8, RATES) is None


@pytest.mark.slow
def test_a_card_is_filled_and_the_plan_says_why():
    config, longest = tiny(layers=6), Longest(512)
    recipe = recipe_with(training={"batch_size": 4, "micro_batch_size": 4})
    every, none = (
        Search(config, CARD, longest, 0).trace(changed(recipe, {CHECKPOINTING: layers}), 4).need.total_bytes
        for layers in (True, False)
    )
    for limit, expected in ((none, {False}), ((every + none) // 2, set(range(1, 6)))):
        found, plan = as_run(Search(config, CARD, longest, limit), recipe)
        assert found.need.total_bytes <= limit
        assert (plan.micro_batch_size, plan.gradient_checkpointing in expected) == (4, True)
        reason = plan.reasons[CHECKPOINTING]
        some = f"computing {plan.gradient_checkpointing} of 6 layers twice is enough for a step to fit: "
        assert reason.startswith("a step fits without it: " if expected == {False} else some)
    found, plan = as_run(Search(config, CARD, longest, every), recipe)
    assert plan.gradient_checkpointing is True


@pytest.mark.slow
def test_memory_lies_between_the_ends_and_falls_with_every_layer_that_is_computed_twice():
    config = tiny(layers=4)
    peaks = []
    for layers in (False, 1, 2, 3, True):
        recipe = recipe_with(training={"gradient_checkpointing": layers})
        peaks.append(predict(config, recipe, make_plan(recipe, CARD), Longest(512)).history.peak("backward").bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_more_layers_than_there_are_mean_all_of_them():
    peaks = []
    for layers in (7, True):
        recipe = recipe_with(training={"gradient_checkpointing": layers})
        traced = predict(tiny(layers=2), recipe, make_plan(recipe, CARD), Longest(128))
        peaks.append((traced.history.peak("backward").bytes, sum(traced.work.values())))
    assert peaks[0] == peaks[1]


@pytest.mark.slow
def test_a_processor_with_room_computes_nothing_twice_and_one_without_as_little_as_must_be():
    config, longest = tiny(layers=4), Longest(512)
    rows = Rows(longest, "the test")
    recipe = recipe_with()
    assert forecast(config, recipe, CPU, rows).plan.gradient_checkpointing is False
    every, none = (
        Search(config, CPU, longest, 0).trace(changed(recipe, {CHECKPOINTING: layers}), 2).need.total_bytes
        for layers in (True, False)
    )
    for limit, expected in (((every + none) // 2, {1, 2, 3}), (every, {True}), (every // 2, {True})):
        found, plan = as_run(Search(config, CPU, longest, limit), recipe)
        assert plan.gradient_checkpointing in expected
        assert found.is_enough == (limit >= every)


def test_a_step_is_worth_tracing_on_a_processor_only_near_its_memory():
    config, recipe = tiny(layers=4), recipe_with()
    plan = make_plan(recipe, CPU)
    assert not could_fill(config, plan, 128)
    assert could_fill(config, plan, 10**7)
    checkpointed = make_plan(recipe_with(training={"gradient_checkpointing": True}), CPU)
    assert not could_fill(config, checkpointed, 10**7)
