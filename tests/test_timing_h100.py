"""Traced time against an H100's: kernels as a profiler counted them, steps within 15 % with a data sheet's rates."""

import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from measured_step import with_the_step_that_was_measured  # noqa: F401  a fixture of every test
from memory_table import MODELS, config_of

from qtune.device.cards import card_named
from qtune.device.rates import data_sheet_rates
from qtune.memory.predict import Longest, predict, training_step
from qtune.memory.tracing.work import Work
from qtune.memory.trl_step import trace_trl
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.timing.price import Duration, cost_by, duration, training_part

pytestmark = pytest.mark.slow

MEASURED = json.loads((Path(__file__).parent / "measured" / "h100_time.json").read_text(encoding="utf-8"))
H100 = card_named("H100")


@cache
def traced(what: str, rows: int, length: int, masked: bool, scored: int) -> Work:
    """Llama 3.1 8B, NF4, LoRA of rank 16 on all linear layers, checkpointing."""
    config = config_of(next(model for model in MODELS if model[0] == "Llama 3.1 8B"))
    recipe = parse_recipe(
        {
            "model": {"base": "traced"},
            "data": {"train": "rows.jsonl", "max_length": length},
            "training": {
                "batch_size": rows,
                "micro_batch_size": rows,
                "gradient_checkpointing": True,
                "lean_step": False,
            },
        }
    )
    assert isinstance(recipe, Recipe)
    plan = make_plan(recipe, H100.device())
    longest = Longest(length, -(-scored // rows), equal=not masked)
    if what == "TRL":
        step = training_step(recipe, plan, longest)
        return training_part(trace_trl(config, recipe, plan, step, H100.capability, plays_allocator=False).work)
    return training_part(predict(config, recipe, plan, longest, plays_allocator=False).work)


def step(measured: dict[str, Any]) -> Duration:
    work = traced(*(measured[name] for name in ("what", "rows", "length", "masked", "scored")))
    rates = data_sheet_rates(H100)
    return duration(cost_by(work, rates, lambda place, kernel: kernel.kind).values(), rates)


def seconds(measured: dict[str, Any]) -> float:
    return measured.get("step_seconds") or measured["rows"] * measured["length"] / measured["tokens_per_second"]


@pytest.mark.parametrize(
    "measured", MEASURED["steps"], ids=lambda one: f"{one['what']} {one['rows']} x {one['length']}"
)
def test_a_step_takes_what_it_took_on_the_card_within_15_per_cent(measured: dict[str, Any]) -> None:
    assert step(measured).seconds == pytest.approx(seconds(measured), rel=0.15)


def test_with_one_row_the_card_waits_for_the_processor_and_with_four_it_does_not() -> None:
    four, one = MEASURED["steps"][:2]
    assert not step(four).waits_for_processor
    assert step(one).waits_for_processor


def test_the_cards_part_is_the_time_of_all_kernels_within_5_per_cent() -> None:
    four = MEASURED["steps"][0]
    assert step(four).device_seconds == pytest.approx(four["kernel_seconds"], rel=0.05)


def profiled(*words: str) -> int:
    """Kernels of one step whose name has one of these words, by the profile of two."""
    listed = [line.split(maxsplit=3) for line in MEASURED["kernels_of_two_steps_8b_4x2048"]]
    return sum(int(count) for _, _, count, name in listed if any(word in name for word in words)) // 2


def test_kernels_are_as_many_as_a_profiler_counted() -> None:
    launched: Counter[str] = Counter()
    for (_, kernel), count in traced("qtune", 4, 2048, True, 6642).items():
        launched[kernel.op] += count * kernel.launches
    assert launched["dequantize_4bit"] == profiled("kDequantizeBlockwise<__nv_bfloat16")
    assert launched["attention"] == profiled("sdpa_sm90_flash_fprop")
    assert launched["attention backward"] == profiled("sdpa_sm90_flash_bprop")
    assert launched["silu"] == profiled("silu_kernel")
    assert launched["silu_backward"] == profiled("silu_backward_kernel")
    assert launched["cat"] - 1 == profiled("CatArrayBatchedCopy")  # one of them is the rotary embedding's, small
    assert launched["_to_copy"] == pytest.approx(profiled("bfloat16_copy", "unrolled_elementwise"), rel=0.01)
