"""Traced time and memory of today's step, and of TRL's, against those that an H200 took (tools/bench_card.py)."""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from bench_card import VARIANTS
from memory_table import MODELS, config_of

from qtune.device.cards import card_named
from qtune.device.rates import Rates, data_sheet_rates
from qtune.memory.predict import Longest, predict, training_step
from qtune.memory.tracing.trace import Traced
from qtune.memory.trl_step import trace_trl
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.timing.price import cost_by, duration, training_part

pytestmark = pytest.mark.slow

MEASURED = json.loads((Path(__file__).parent / "measured" / "h200_time.json").read_text(encoding="utf-8"))
STEPS: dict[str, dict[str, Any]] = {f"{one['what']} {one['rows']} x {one['length']}": one for one in MEASURED["steps"]}
H200 = card_named("H200")
WORKSPACES = 64 / 1024
"""GiB of cuBLAS beside the tensors of a process."""


@cache
def traced(name: str) -> Traced:
    """Llama 3.1 8B, NF4, LoRA of rank 16 on all linear layers."""
    config = config_of(next(model for model in MODELS if model[0] == "Llama 3.1 8B"))
    what, rows, length = (STEPS[name][key] for key in ("what", "rows", "length"))
    differs = VARIANTS.get(what, {})
    training = {"batch_size": rows, "micro_batch_size": rows, "gradient_checkpointing": True}
    recipe = parse_recipe(
        {
            "model": {"base": "traced"},
            "data": {"train": "rows.jsonl", "max_length": length},
            "training": training | differs.get("training", {}),
            "memory": differs.get("memory", {}),
        }
    )
    assert isinstance(recipe, Recipe)
    plan, longest = make_plan(recipe, H200.device()), Longest(length, length, equal=True)
    if what == "TRL":
        step = training_step(recipe, plan, longest)
        return trace_trl(config, recipe, plan, step, H200.capability, plays_allocator=False)
    return predict(config, recipe, plan, longest, plays_allocator=False)


LIMITED_BY_THE_CARD = [name for name, one in STEPS.items() if one["rows"] == 4]


def seconds(name: str, rates: Rates) -> float:
    costs = cost_by(training_part(traced(name).work), rates, lambda place, kernel: kernel.kind)
    return duration(costs.values(), rates).seconds


@pytest.mark.parametrize("source", ["data sheet", "measured"])
@pytest.mark.parametrize("name", LIMITED_BY_THE_CARD)
def test_a_step_that_the_card_limits_takes_what_it_took_within_ten_per_cent(name: str, source: str) -> None:
    """Measured: by `qtune doctor --measure`, in the same hour."""
    rates = data_sheet_rates(H200) if source == "data sheet" else Rates(**MEASURED["measured_rates"])
    assert seconds(name, rates) == pytest.approx(STEPS[name]["seconds"], rel=0.10)


def test_a_step_that_the_processor_limits_takes_what_it_took_where_nothing_else_ran() -> None:
    alone = MEASURED["step_of_one_trainer_alone_1x2048"]
    found = seconds(f"{alone['what']} 1 x 2048", Rates(**MEASURED["measured_rates"]))
    assert found == pytest.approx(alone["seconds"], rel=0.10)


@pytest.mark.parametrize("name", STEPS)
def test_the_peak_of_each_is_the_traced_one(name: str) -> None:
    # The workspaces of one process were counted to the first trainer that took a step.
    found, counted = traced(name).history.peak().bytes / 2**30, STEPS[name]["peak_gib"]
    assert min(abs(found / counted - 1), abs((found + WORKSPACES) / counted - 1)) < 0.005
