"""Time from work and rates: a kernel takes the longest of what it does, a step the longer of card and processor."""

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WriteRecipe, run_warm_qtune
from test_memory_trace import CARD, recipe_with, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from qtune.check import check
from qtune.device.cards import CARDS, card_named, described
from qtune.device.present import Device, present_device
from qtune.device.rates import Rates, data_sheet_rates, not_believed
from qtune.kernels import on_cpu
from qtune.memory.forecast import forecast
from qtune.memory.longest import RowLengths, Rows
from qtune.memory.predict import Longest, training_step
from qtune.memory.tracing.work import Kernel, Place, Work
from qtune.memory.trl_step import trace_trl
from qtune.plan import make_plan
from qtune.recipe.file import load_recipe
from qtune.screens.time import UNKNOWN, draw_steps, lines, seconds, whole_run
from qtune.timing import measure
from qtune.timing.forecast import StepModel, TimeForecast, step_of, time_of
from qtune.timing.known import keep_rates, known_rates
from qtune.timing.price import Cost, cost_by, duration, kernel_seconds, training_part

RATES = Rates(
    kind="measured",
    source="a made up card",
    products={"bfloat16": 1e12, "float32": 1e11},
    attention=5e11,
    moved=1e9,
    copied=1e9,
    thin=5e8,
    dequantized=2.5e8,
    scattered=1e6,
    kernel_seconds=1e-6,
    host_link=1e8,
    launch_seconds=1e-3,
    own_launch_seconds=2e-3,
)
HERE = present_device()
FORWARD = Place("forward")


def kernel(**given: object) -> Kernel:
    plain = Kernel("op", "elementwise", 1, 0, 0, torch.bfloat16)
    return plain._replace(**given)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_measured_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured on this computer is no part of a test."""
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))


# --- the price of work ------------------------------------------------------------------------------------------------


def test_a_kernel_takes_the_longest_of_what_it_does_and_a_start() -> None:
    assert kernel_seconds(kernel(bytes=10**9), RATES) == pytest.approx(1 + 1e-6)
    assert kernel_seconds(kernel(bytes=10**9, flops=3 * 10**12), RATES) == pytest.approx(3 + 1e-6)
    assert kernel_seconds(kernel(bytes=10**9, scattered=2 * 10**6), RATES) == pytest.approx(2 + 1e-6)
    assert kernel_seconds(kernel(launches=5), RATES) == pytest.approx(5e-6)


def test_each_kind_of_work_has_its_own_rate() -> None:
    def of(**given: object) -> float:
        return round(kernel_seconds(kernel(**given), RATES), 4)

    assert of(kind="thin products", bytes=10**9) == 2
    assert of(kind="dequantization", bytes=10**9) == 4
    assert of(kind="host transfers", bytes=10**9) == 10
    assert of(kind="attention", flops=10**12) == 2
    assert of(kind="products", flops=10**12, dtype=torch.float32) == 10


def test_a_kernel_of_our_own_takes_the_processor_its_own_time() -> None:
    work: Work = Counter({(FORWARD, kernel(op="add")): 3, (FORWARD, kernel(op="rms_norm")): 2})
    (cost,) = cost_by(work, RATES, lambda place, kernel: None).values()
    assert (cost.launches, cost.own_launches) == (5, 2)
    assert duration([cost], RATES).processor_seconds == pytest.approx(3 * 1e-3 + 2 * 2e-3)


def test_a_card_hides_the_shorter_of_computing_and_launching_and_a_cpu_does_both() -> None:
    cost = [Cost(launches=1000, seconds=3.0)]
    on_card = duration(cost, RATES)
    assert (on_card.seconds, on_card.waits_for_processor) == (3.0, False)
    hurried = duration(cost, replace(RATES, launch_seconds=4e-3))
    assert (hurried.seconds, hurried.waits_for_processor) == (4.0, True)
    on_cpu = duration(cost, replace(RATES, is_own_processor=True))
    assert (on_cpu.seconds, on_cpu.waits_for_processor) == (4.0, False)


def test_costs_add_up_by_any_group() -> None:
    work: Work = Counter({(FORWARD, kernel(bytes=10)): 3, (Place("backward"), kernel(kind="copies", bytes=5)): 2})
    by_kind = cost_by(work, RATES, lambda place, one: one.kind)
    assert {name: (cost.launches, cost.bytes) for name, cost in by_kind.items()} == {
        "elementwise": (3, 30),
        "copies": (2, 10),
    }
    total = sum(by_kind.values(), Cost())
    assert total.seconds == pytest.approx(
        sum(cost_by(work, RATES, lambda place, one: place.phase).values(), Cost()).seconds
    )


# --- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_cards_figures_fit_its_generation(card) -> None:
    """Per multiprocessor a generation does so many times as many 16-bit products as fp32 operations (NVIDIA's
    whitepapers): Pascal 1 or 2, Turing without tensor cores 2 and with them 4 or 8, Volta 8, A100 and A30 16, GeForce
    from Ampere on 2, their workstation siblings 4, Hopper about 15, data center Blackwell 30."""
    ratio = card.tensor_teraflops / card.fp32_teraflops
    assert min(abs(ratio / whole - 1) for whole in (1, 2, 4, 8, 14, 15, 16, 30)) < 0.03
    # Bytes per fp32 operation have been between 1/200 and 1/6 from Pascal to Blackwell.
    assert 5 < card.fp32_teraflops * 1000 / card.gigabytes_per_second < 200


def test_a_named_card_has_a_data_sheet_and_a_size_alone_has_none() -> None:
    found = known_rates(Device("cuda", "NVIDIA H100 80GB HBM3", 80 << 30, 80 << 30, True, (9, 0)))
    assert found is not None
    assert found == data_sheet_rates(card_named("H100"))
    assert found.kind == "data sheet"
    assert found.products["bfloat16"] < 989e12
    assert found.moved < 3350e9
    assert known_rates(described(8)) is None


def test_what_was_measured_stands_for_the_data_sheet_from_then_on() -> None:
    card = card_named("H100").device()
    keep_rates(replace(card, name="NVIDIA H100 80GB HBM3"), RATES)
    assert known_rates(card) == RATES
    assert known_rates(card_named("RTX 3060").device()) == data_sheet_rates(card_named("RTX 3060"))


def test_rates_of_another_version_are_not_used() -> None:
    card = card_named("H100").device()
    file = keep_rates(card, RATES)
    file.write_text(json.dumps({"kind": "measured", "speed": 1}))
    assert known_rates(card) == data_sheet_rates(card_named("H100"))


def test_a_measurement_far_beyond_the_data_sheet_is_not_believed() -> None:
    card = card_named("H100")
    sheet = data_sheet_rates(card)
    assert not_believed(sheet, card) == []
    hasty = replace(sheet, products={"bfloat16": 9e17}, moved=4e12, thin=6e12)
    assert not_believed(hasty, card) == [
        "products 9e+17 a second, data sheet 9.89e+14",
        "thin 6e+12 a second, data sheet 3.35e+12",
    ]


def test_the_products_that_are_measured_are_those_that_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 on some processors is oneDNN's, which is twice as fast as PyTorch's own there."""
    taken: list[str] = []
    for name in ("linear", "mm"):
        own = getattr(on_cpu, name)
        monkeypatch.setattr(on_cpu, name, lambda *a, own=own, name=name: [taken.append(name), own(*a)][1])
    shapes = replace(measure.CPU, tokens=32, rows=1, length=32, seconds=0.001)
    here = measure._Measured(torch.device("cpu"), shapes, torch.float32, time.perf_counter)
    assert here.products(torch.float32) > 0
    assert {"linear", "mm"} <= set(taken)


@pytest.mark.slow
def test_every_rate_of_this_computer_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CPU", replace(measure.CPU, tokens=32, rows=1, length=32, seconds=0.01))
    found = measure.measured_rates(replace(HERE, bf16=False))
    assert found.kind == "measured"
    assert str(HERE.name) in found.source
    assert found.is_own_processor
    assert found.products["float32"] > 0
    for name in (
        "attention",
        "moved",
        "thin",
        "dequantized",
        "scattered",
        "host_link",
        "launch_seconds",
        "copied",
        "own_launch_seconds",
    ):
        assert getattr(found, name) > 0, name


@pytest.mark.slow
def test_the_step_whose_launches_are_timed_is_the_one_whose_launches_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "TINY_LAYERS", 2)
    tiny = measure._Tiny(HERE, lean=True)
    with Operations() as done:
        tiny.step_seconds(lambda: 0.0, counted=1, uncounted=0)
    counted: Counter[str] = Counter()
    for (_, kernel), count in training_part(tiny.work()).items():
        counted[kernel.op] += count * kernel.launches
    for name in ("rms_norm", "rotate", "gated_backward", "dequantize_nested", "addmm_"):
        own = f"qtune::{name}" if name != "addmm_" else "aten::addmm_"
        assert done.seen[own] == counted[name] > 0, name


class Operations(TorchDispatchMode):
    """Counts what is executed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


# --- a run ------------------------------------------------------------------------------------------------------------


def line_through(near: tuple[int, float], far: tuple[int, float], **rates: object) -> StepModel:
    at_near, at_far = (Cost(launches=100, seconds=seconds) for _, seconds in (near, far))
    return StepModel(near[0], far[0], at_near, at_far, Cost(launches=10, seconds=1.0), replace(RATES, **rates))  # type: ignore[arg-type]


def test_micro_batches_between_two_lengths_are_on_a_line_and_a_step_ends_with_one_update() -> None:
    model = line_through((100, 1.0), (200, 3.0))
    assert model.seconds([100]) == pytest.approx(1 + 1)
    assert model.seconds([150, 200]) == pytest.approx(2 + 3 + 1)
    assert model.seconds([25]) == pytest.approx(0 + 1)
    # The processor: 100 launches for each micro-batch and 10 for the update.
    assert line_through((100, 1.0), (200, 3.0), launch_seconds=1.0).seconds([100, 100]) == pytest.approx(210)


def test_steps_follow_one_another_and_the_last_may_be_smaller() -> None:
    model = line_through((100, 1.0), (200, 3.0))
    found = model.seconds_of_steps(np.array([100, 100, 200, 100, 200]), 2)
    assert found == pytest.approx([3.0, 5.0, 4.0])


def of_lengths(train: list[int], validation: tuple[int, ...] = (), **training: object) -> TimeForecast:
    recipe = recipe_with(training={"batch_size": 2, "micro_batch_size": 1, **training})
    device = card_named("H100").device()
    longest = Longest(max(train), equal=len(set(train)) == 1)
    data = RowLengths(np.array(train), np.array(validation, dtype=np.int64), 1.0)
    found = time_of(tiny(), recipe, forecast(tiny(), recipe, device, Rows(longest, "told", data)))
    assert found is not None
    return found


@pytest.mark.slow
def test_an_epoch_of_equal_rows_is_its_steps_and_a_run_its_epochs() -> None:
    found = of_lengths([64] * 10, epochs=3)
    assert (found.steps_per_epoch, found.steps) == (5, 15)
    assert found.step_seconds == pytest.approx(found.longest_step.seconds)
    assert found.epoch_seconds == pytest.approx(5 * found.step_seconds)
    assert found.run_seconds == pytest.approx(15 * found.step_seconds)
    assert found.tokens_per_second == pytest.approx(2 * 64 / found.step_seconds)


@pytest.mark.slow
def test_evaluations_take_time_as_often_as_they_come() -> None:
    quiet, once, often = (
        of_lengths([64] * 8, (64, 64), eval_every=every).run_seconds for every in ("never", "epoch", 1)
    )
    assert quiet
    assert once
    assert often
    assert often - quiet == pytest.approx(4 * (once - quiet))
    assert once > quiet
    found = of_lengths([64] * 8, (64, 64), eval_every="epoch")
    assert found.evaluation_seconds == pytest.approx(once - quiet)
    first = of_lengths([64] * 8, (64, 64), eval_every="epoch", evaluate_first=True)
    assert first.evaluation_seconds == pytest.approx(2 * found.evaluation_seconds), "that of step 0 is one more"
    parts = f"4 steps of {seconds(found.step_seconds)} and {seconds(once - quiet)} of evaluations"
    assert whole_run(found, once) == (
        f"{seconds(once)} for the run: {parts}; loading, sample answers and checkpoints come on top"
    )


@pytest.mark.slow
def test_shorter_rows_take_less_time_and_the_longest_step_is_said_beside_the_mean_one() -> None:
    mixed, equal = of_lengths([128] * 2 + [16] * 30), of_lengths([128] * 32)
    assert mixed.longest_step == equal.longest_step
    assert mixed.model.at_near.seconds < mixed.model.at_far.seconds
    assert mixed.epoch_seconds <= equal.epoch_seconds


def test_where_rows_are_not_known_a_step_is_said_and_no_run() -> None:
    recipe = recipe_with(training={"gradient_checkpointing": True})
    found = forecast(tiny(), recipe, card_named("H100").device(), Rows(Longest(128), "told"))
    time = time_of(tiny(), recipe, found)
    assert time is not None
    assert (time.steps_per_epoch, time.epoch_seconds, time.run_seconds) == (None, None, None)
    said = "\n".join(lines(time))
    assert "of the processor for" in said
    assert "predicted from a data sheet: H100" in said
    assert time_of(tiny(), recipe, replace(found, plan=make_plan(recipe, described(24)))) is None


def test_processes_that_share_a_step_take_less_of_it_each_and_add_up_their_gradients() -> None:
    recipe = recipe_with(training={"batch_size": 8, "micro_batch_size": 1, "gradient_checkpointing": True})
    card, rows = card_named("H100").device(), Rows(Longest(128), "told")
    alone, four = (forecast(tiny(), recipe, replace(card, processes=count), rows) for count in (1, 4))
    assert (alone.plan.accumulation_steps, four.plan.accumulation_steps) == (8, 2)
    assert four.prediction.peak == alone.prediction.peak, "each holds the whole base, and as many rows at once"
    one, shared = time_of(tiny(), recipe, alone), time_of(tiny(), recipe, four)
    assert one is not None
    assert shared is not None
    # In a ring of four each card sends every gradient one and a half times.
    rates = data_sheet_rates(card_named("H100"))
    gradients = max(four.prediction.timeline["gradients"])
    assert gradients > 0
    assert (one.between_seconds, shared.between_seconds) == (0.0, pytest.approx(1.5 * gradients / rates.host_link))
    assert shared.step_seconds < one.step_seconds
    assert "4 processes, each with such a device; " in "\n".join(lines(shared))
    assert "processes" not in "\n".join(lines(one))


# --- on the screen ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_check_says_what_an_epoch_and_the_run_take_where_this_device_was_measured(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(training="epochs = 2\nbatch_size = 4\nmicro_batch_size = 2"))
    assert check(recipe).time is None
    keep_rates(HERE, replace(RATES, is_own_processor=True, source="this computer"))
    value = json.loads(check(recipe).to_json())["time"]
    assert (value["kind"], value["steps_per_epoch"], value["steps"]) == ("measured", 5, 10)
    assert value["epoch_seconds"] == pytest.approx(5 * value["step_seconds"])


@pytest.mark.slow
def test_profile_says_what_a_step_takes_and_what_each_technique_costs(write_recipe: WriteRecipe) -> None:
    file = write_recipe(training="batch_size = 4\nmicro_batch_size = 2")
    shown = run_warm_qtune("profile", file, "--gpu", "RTX 3060", "--explain").stdout
    assert "for a step of the longest rows" in shown
    assert "the processor is the limit" in shown  # the model is tiny
    assert "RTX 3060: NVIDIA's figures" in shown
    assert "layers that keep all" in shown  # what a card with room does
    said = shown.replace("\n", " ")
    assert "training.lean_step = true: the gradients of peft's layers to rounding" in said
    assert "training.gradient_checkpointing = false: a step fits without it: " in said
    assert "% time" in shown or "no time" in shown
    unknown = run_warm_qtune("profile", file, "--vram", "8GiB", "--no-savings").stdout
    assert UNKNOWN.removeprefix("time: ") in " ".join(unknown.split())


def test_fit_says_what_its_changes_cost_in_time() -> None:
    before, after = (duration([Cost(launches=1, seconds=value)], RATES) for value in (2.0, 2.5))
    assert str(draw_steps([before])) == "time: 2.00 s for a step of the longest rows, predicted"
    assert str(draw_steps([before, after])) == (
        "time: 2.50 s for a step of the longest rows, +25% beside 2.00 s as it was asked for, predicted"
    )
    assert str(draw_steps([None])) == UNKNOWN


@pytest.mark.slow
def test_a_plan_with_checkpointing_is_predicted_to_take_longer() -> None:
    device = card_named("RTX 3060").device()
    kept, again = (
        step_of(tiny(), recipe, make_plan(recipe, device), Longest(128, equal=True))
        for recipe in (recipe_with(training={"gradient_checkpointing": on}) for on in (False, True))
    )
    assert kept is not None
    assert again is not None
    assert again.device_seconds > kept.device_seconds
    assert step_of(tiny(), recipe_with(), make_plan(recipe_with(), described(8)), Longest(128)) is None


# --- TRL's step -------------------------------------------------------------------------------------------------------


def test_trls_step_scores_each_position_twice_in_the_backward_and_keeps_no_logits() -> None:
    """Its head recomputes each tile of logits for the gradient: one product forward, two backward."""
    recipe = recipe_with(training={"gradient_checkpointing": True})
    plan = make_plan(recipe, CARD)
    step = training_step(recipe, plan, Longest(128, equal=True))
    found = trace_trl(tiny(), recipe, plan, step, (8, 9))
    head = 2 * (2 * 127) * 64 * 256
    products = Counter()
    for (place, one), count in found.work.items():
        if "products" in one.kind and place.phase in ("forward", "backward") and place.part == "loss":
            products[place.phase] += count * one.flops
    assert products == {"forward": head, "backward": 2 * head}
