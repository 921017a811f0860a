"""`qtune profile`: what a recipe will need, or what a run needed beside what was predicted for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtune.device import Device, present_device
from qtune.errors import Problem, RunError
from qtune.memory import cards
from qtune.memory.budget import choose_micro_batch
from qtune.memory.cache import predicted
from qtune.memory.predict import Longest
from qtune.model import load_config
from qtune.plan import make_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qtune.memory.predict import Prediction
    from qtune.memory.savings import Way
    from qtune.plan import Plan
    from qtune.recipe import Recipe
    from qtune.run_dir import RunDir


@dataclass(frozen=True)
class Profile:
    """Everything that the screen shows about a recipe's memory."""

    recipe: Recipe
    plan: Plan
    longest: Longest
    prediction: Prediction
    ways: list[Way]
    attribution: list[Way]


@dataclass(frozen=True)
class Measured:
    """A run's measurement and, on the kind of device that it ran on, the prediction for it and for the usual ways."""

    measured: dict[str, Any]
    prediction: Prediction | None
    ways: list[Way]


def device_for(gpu: str | None, vram: str | None) -> Device:
    """The card that is asked about: by name, by size, or the one that is here."""
    if gpu is not None:
        return cards.card_named(gpu).device()
    if vram is not None:
        return cards.described(cards.size_in_bytes(vram) / cards.GIB)
    return present_device()


def profile(
    recipe: Recipe, device: Device, length: int | None = None, *, savings: bool = True, explain: bool = False
) -> Profile:
    """Traces the recipe on `device`, and with `savings` the usual ways of training the same model.

    Raises:
        ModelError: the configuration cannot be read, or no model can be built from it.
    """
    from qtune.memory.savings import Way, attribution, ways

    config = load_config(recipe.model)
    plan, longest = planned(config, recipe, device, length)
    prediction = predicted(config, recipe, plan, longest)
    ours = Way("this recipe", "as `qtune run` does it", prediction)
    compared = [*ways(config, recipe, plan, longest), ours] if savings else []
    explained = attribution(config, recipe, plan, longest) if explain else []
    return Profile(recipe, plan, longest, prediction, compared, explained)


def planned(config: PretrainedConfig, recipe: Recipe, device: Device, length: int | None) -> tuple[Plan, Longest]:
    """The plan that `qtune run` makes, its micro-batch from memory, and the rows that it is made for."""
    plan = make_plan(recipe, device)
    longest = Longest(length or plan.max_length)
    if recipe.training.micro_batch_size == "auto" and device.kind == "cuda":
        plan = choose_micro_batch(config, recipe, plan, longest).plan
    return plan, longest


def read_run(run_dir: RunDir) -> Measured:
    """What a run measured, beside the traced step of its recipe and of the usual ways of training the same model.

    Predictions are for the kind of device that the run used; on another kind there are none. What is found is added to
    the run's memory.json, each way with how its figure was obtained.

    Raises:
        RunError: the run has no measurement (it was killed before its end).
    """
    from qtune.load_run import resolved_recipe
    from qtune.memory.savings import ways

    try:
        found = json.loads(run_dir.memory_file.read_text(encoding="utf-8"))["measured"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            Problem(str(run_dir.memory_file), "has no measurement: the run did not reach its end")
        ) from error
    recipe = resolved_recipe(run_dir)
    device = present_device()
    if (device.kind == "cpu") != (found["device"] == "cpu"):
        return Measured(found, None, [])
    config = load_config(recipe.model)
    plan = make_plan(recipe, device)
    tokens = int(found.get("longest_batch_tokens", 0))
    longest = Longest(-(-tokens // plan.micro_batch_size) or recipe.data.max_length)
    prediction = predicted(config, recipe, plan, longest)
    compared = ways(config, recipe, plan, longest)
    traced = {
        "predicted": {phase: moment.bytes for phase, moment in prediction.by_phase.items()},
        "ways": [
            {"name": way.name, "how": f"traced: {way.how}", "peak_bytes": way.prediction.peak.bytes} for way in compared
        ],
    }
    run_dir.write_json(run_dir.memory_file, {"measured": found, **traced})
    return Measured(found, prediction, compared)
