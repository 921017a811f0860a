"""What is planned and traced of layers of which every process holds a part. That they train: test_training_ranks.py."""

from dataclasses import replace

import pytest
from test_memory_trace import CARD, CPU, recipe_with
from test_memory_trace import tiny as tiny_config

from qtune.memory.predict import Longest, predict
from qtune.memory.tracing import categories
from qtune.plan import make_plan

LAYERS = 8


def resident_bytes(where: str, processes: int) -> int:
    """4-bit weights on a card at the beginning of a step."""
    recipe = recipe_with(memory={"layers": where}, training={"gradient_checkpointing": True, "batch_size": 8})
    plan = make_plan(recipe, replace(CARD, processes=processes))
    config = tiny_config(layers=LAYERS, hidden_size=256, intermediate_size=512)
    history = predict(config, recipe, plan, Longest(128, equal=True)).history
    return int(history.at(0).alive[categories.WEIGHTS_4BIT])


@pytest.mark.slow
def test_a_card_holds_its_part_of_all_layers_and_three_that_are_brought_together() -> None:
    whole = resident_bytes("device", 1)
    for processes in (2, 4):
        # absmax travels with the codes; each weight begins at a multiple of 256 bytes
        assert resident_bytes("sharded", processes) == pytest.approx(whole * (1 / processes + 3 / LAYERS), rel=0.1)


def test_one_process_has_every_part() -> None:
    recipe = recipe_with(memory={"layers": "sharded"})
    assert make_plan(recipe, CPU).layers == "device"
    assert make_plan(recipe, replace(CPU, processes=2)).layers == "sharded"
