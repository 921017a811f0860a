"""Every "auto" of a recipe becomes a value with a reason, by the device and nothing else."""

from dataclasses import replace

import pytest
import torch

from qtune.device.present import Device, present_device
from qtune.errors import InputError
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe

GIB = 2**30
AMPERE = Device("cuda", "RTX 3060", 12 * GIB, 11 * GIB, bf16=True, capability=(8, 6))
TURING = Device("cuda", "RTX 2080", 8 * GIB, 7 * GIB, bf16=False, capability=(7, 5))
OLD_CPU = Device("cpu", "CPU, 2 threads", 8 * GIB, 6 * GIB, bf16=False)
NEW_CPU = replace(OLD_CPU, bf16=True)
KINDS = ["lora", "p-tuning", "prompt-tuning", "prefix-tuning", "ia3"]


def recipe(**tables: dict) -> Recipe:
    given = {"model": {"base": "org/model"}, "data": {"train": "rows.jsonl"}}
    return parse_recipe({name: {**given.get(name, {}), **tables.get(name, {})} for name in {*given, *tables}})


@pytest.mark.parametrize(
    ("device", "dtype", "reason", "scaling"),
    [
        (AMPERE, "bfloat16", "RTX 3060 has bfloat16 products in hardware", False),
        (TURING, "float16", "RTX 2080 has no bfloat16 products; float16 with loss scaling", True),
        (
            OLD_CPU,
            "float32",
            "bfloat16 products were measured to be no faster on this processor",
            False,
        ),
        (NEW_CPU, "bfloat16", "its products were measured to be faster than float32's on this processor", False),
    ],
    ids=["ampere", "turing", "cpu", "cpu with bf16"],
)
def test_the_device_chooses_the_dtype_and_says_why(device: Device, dtype: str, reason: str, scaling: bool) -> None:
    plan = make_plan(recipe(), device)
    assert plan.compute_dtype == dtype
    assert plan.reasons["quantization", "compute_dtype"] == reason
    assert plan.loss_scaling is scaling
    assert plan.adapter_dtype == "float32"


def test_what_the_recipe_says_is_kept_and_has_no_reason_of_ours() -> None:
    given = recipe(
        model={"attention": "eager"},
        quantization={"compute_dtype": "float16"},
        adapter={"dtype": "bfloat16"},
        training={
            "batch_size": 12,
            "micro_batch_size": 3,
            "gradient_checkpointing": True,
            "optimizer": "paged-adamw-8bit",
            "learning_rate": 0.5,
            "lean_step": False,
        },
        memory={
            "embeddings": "device", "activations": "host", "loss_tile": "1.5MiB", "keep_dequantized": False,
        },
    )  # fmt: skip
    plan = make_plan(given, AMPERE)
    assert (plan.attention, plan.compute_dtype, plan.adapter_dtype) == ("eager", "float16", "bfloat16")
    assert (plan.micro_batch_size, plan.accumulation_steps) == (3, 4)
    assert (plan.gradient_checkpointing, plan.optimizer, plan.learning_rate) == (True, "paged-adamw-8bit", 0.5)
    assert (plan.embeddings, plan.activations, plan.loss_tile_bytes) == ("device", "host", 3 * 2**19)
    assert (plan.lean_step, plan.keep_dequantized) == (False, False)
    assert plan.reasons == {}


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({}, "the gradients of peft's layers to rounding, with less memory and fewer operations"),
        (
            {"adapter": {"kind": "lora", "dora": True}},
            "norms and rotations as one operation each; DoRA's layers stay peft's",
        ),
        ({"quantization": {"kind": "int8"}}, "norms and rotations as one operation each; int8 layers stay peft's"),
        (
            {"adapter": {"kind": "p-tuning"}},
            "norms and rotations as one operation each; p-tuning has no layers of its own to compute otherwise",
        ),
    ],
)
def test_the_lean_step_is_taken_and_says_what_stays_pefts(tables: dict, said: str) -> None:
    plan = make_plan(recipe(**tables), AMPERE)
    assert plan.lean_step
    assert plan.reasons["training", "lean_step"] == said


def test_on_a_device_where_gradients_differ_the_layers_are_pefts() -> None:
    plan = make_plan(recipe(), replace(AMPERE, lean_problem="gradients differ by 3.0e-01"))
    assert not plan.lean_step
    assert plan.reasons["training", "lean_step"] == (
        "qtune's functions do not agree with peft's layers on RTX 3060: gradients differ by 3.0e-01"
    )


@pytest.mark.parametrize(
    ("batch", "length", "size"),
    [(16, 2048, 2), (16, 256, 16), (16, 300, 8), (7, 1000, 1), (6, 1000, 3), (1, 10, 1), (4, 100_000, 1)],
)
def test_the_micro_batch_divides_the_batch_and_keeps_to_4096_tokens(batch: int, length: int, size: int) -> None:
    plan = make_plan(recipe(training={"batch_size": batch}, data={"max_length": length}), AMPERE)
    assert plan.micro_batch_size == size
    assert plan.micro_batch_size * plan.accumulation_steps == batch
    assert plan.reasons["training", "micro_batch_size"] == f"at most 4096 tokens at once, {size} x {length}"


@pytest.mark.parametrize("batch", [2, 8, 12, 16, 64])
def test_in_float32_on_a_processor_two_processes_take_the_groups_of_one(batch: int) -> None:
    given = recipe(training={"batch_size": batch}, data={"max_length": 64})
    alone, shared = (make_plan(given, replace(OLD_CPU, processes=count)) for count in (1, 2))
    assert alone.micro_batch_size == shared.micro_batch_size == batch // 2
    assert (alone.accumulation_steps, shared.accumulation_steps) == (2, 1)
    assert "the same groups for two processes" in alone.reasons["training", "micro_batch_size"]


@pytest.mark.parametrize(("device", "batch"), [(NEW_CPU, 8), (AMPERE, 8), (OLD_CPU, 6), (OLD_CPU, 9)])
def test_elsewhere_or_with_few_rows_all_go_at_once(device: Device, batch: int) -> None:
    given = recipe(training={"batch_size": batch}, data={"max_length": 64})
    assert make_plan(given, device).micro_batch_size == batch


def test_rows_that_were_looked_at_decide_the_micro_batch_and_not_what_they_may_not_exceed() -> None:
    given = recipe(training={"batch_size": 16}, data={"max_length": 2048})
    assert make_plan(given, NEW_CPU).micro_batch_size == 2
    plan = make_plan(given, NEW_CPU, longest=90)
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.max_length) == (16, 1, 2048)
    assert plan.reasons["training", "micro_batch_size"] == "at most 4096 tokens at once, 16 x 90"


def test_another_micro_batch_keeps_the_batch() -> None:
    plan = make_plan(recipe(training={"batch_size": 8}), AMPERE)
    smaller = plan.with_micro_batch(1, "it fits")
    assert (smaller.micro_batch_size, smaller.accumulation_steps) == (1, 8)
    assert smaller.reasons["training", "micro_batch_size"] == "it fits"
    with pytest.raises(ValueError, match="a batch of 8 rows is no whole number of micro-batches of 3"):
        plan.with_micro_batch(3, "")


@pytest.mark.parametrize("kind", KINDS)
def test_cards_checkpoint_activations(kind: str) -> None:
    given = recipe(adapter={"kind": kind})
    assert make_plan(given, AMPERE).gradient_checkpointing is True
    assert make_plan(given, OLD_CPU).gradient_checkpointing is False


def test_lora_gets_the_rate_of_qlora_s_table_and_few_free_numbers_many_times_that() -> None:
    plans = {kind: make_plan(recipe(adapter={"kind": kind}), OLD_CPU) for kind in KINDS}
    assert plans["lora"].learning_rate == 2e-4  # arXiv:2305.14314, table 9: 7B and 13B
    assert "arXiv:2305.14314" in plans["lora"].reasons["training", "learning_rate"]
    assert all(plans[kind].learning_rate >= 10 * 2e-4 for kind in KINDS if kind != "lora")


def test_soft_prompts_spend_context() -> None:
    counts = {kind: recipe(adapter={"kind": kind}).adapter.prompt_length for kind in KINDS}
    assert counts == {"lora": 0, "p-tuning": 16, "prompt-tuning": 16, "prefix-tuning": 16, "ia3": 0}


def test_the_device_that_is_here_is_what_torch_sees() -> None:
    device = present_device()
    assert device.kind == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.zeros(1, device=device.torch_name).device.type == device.kind
    assert 0 < device.free_bytes <= device.total_bytes


@pytest.mark.parametrize(
    ("processes", "given", "rows", "times"), [(1, 4, 4, 4), (2, 4, 4, 2), (4, 8, 4, 1), (16, 4, 1, 1)]
)
def test_processes_share_the_rows_of_a_step(processes: int, given: int, rows: int, times: int) -> None:
    several = replace(AMPERE, processes=processes)
    plan = make_plan(recipe(training={"batch_size": 16, "micro_batch_size": given}), several)
    assert (plan.micro_batch_size, plan.accumulation_steps) == (rows, times)
    assert plan.micro_batch_size * plan.accumulation_steps * processes == 16
    reason = plan.reasons.get(("training", "micro_batch_size"))
    assert reason == (
        None
        if given == rows
        else f"{given} is no part of the {16 // processes} rows of a step that each of {processes} takes"
    )


def test_a_step_that_cannot_be_shared_out_evenly_is_refused_with_the_ways_out() -> None:
    with pytest.raises(InputError) as refused:
        make_plan(recipe(training={"batch_size": 6}), replace(AMPERE, processes=4))
    assert str(refused.value) == (
        "training.batch_size = 6: the rows of a step cannot be shared out evenly among 4 processes; 4 or 8 could; or "
        "start 2 or 3 or 6 processes"
    )
