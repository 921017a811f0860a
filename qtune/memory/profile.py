"""`qtune profile`: what a recipe will need, or what a run needed beside what was predicted for it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qtune.device import Device, present_device
from qtune.errors import Problem, RunError
from qtune.memory import cards
from qtune.memory.budget import budget_bytes, settled
from qtune.memory.cache import predicted
from qtune.memory.longest import Rows, longest_rows
from qtune.memory.predict import Longest
from qtune.model import attention_rule, load_config
from qtune.plan import make_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qtune.memory.predict import Prediction
    from qtune.memory.savings import Way
    from qtune.plan import Plan
    from qtune.recipe import Recipe
    from qtune.recipe_file import Resolved
    from qtune.run_dir import RunDir


@dataclass(frozen=True)
class Forecast:
    """What a recipe will need on a device: the plan that `qtune run` makes there, and its step, traced."""

    plan: Plan
    rows: Rows
    prediction: Prediction
    budget_bytes: int
    """What may be spent: [memory] budget, or what was free when the question was asked."""

    @property
    def fits(self) -> bool:
        """Whether the step is predicted to stay inside the budget."""
        return self.prediction.need.fits(self.budget_bytes)

    def to_json(self) -> dict[str, Any]:
        """The prediction of a run as it stands in memory.json, sizes in bytes."""
        found = asdict(self.prediction)
        return {
            "device": self.plan.device.name,
            "micro_batch_size": self.plan.micro_batch_size,
            "longest": asdict(self.rows.longest),
            "known_from": self.rows.known_from,
            "needed_bytes": self.prediction.need.total_bytes,
            "budget_bytes": self.budget_bytes,
            **{name: found[name] for name in ("peak", "by_phase", "need", "paged_bytes", "phases", "timeline")},
        }


def forecast(config: PretrainedConfig, recipe: Recipe, device: Device, rows: Rows) -> Forecast:
    """The plan of `qtune run`, `profile` and `check`: on a card what it leaves open follows from memory, by tracing.

    Raises:
        ModelError: no model can be built from the configuration, or the adapter does not fit it.
    """
    plan = make_plan(recipe, device, attention_rule(config))
    if device.kind == "cuda":
        plan = settled(config, recipe, plan, rows.longest)
    prediction = predicted(config, recipe, plan, rows.longest)
    return Forecast(plan, rows, prediction, budget_bytes(recipe, plan))


@dataclass(frozen=True)
class Profile:
    """Everything that the screen shows about a recipe's memory."""

    recipe: Recipe
    forecast: Forecast
    ways: list[Way]
    attribution: list[Way]


@dataclass(frozen=True)
class Measured:
    """A run's measurement and, on the kind of device that it ran on, the prediction for it and for the usual ways."""

    measured: dict[str, Any]
    prediction: Prediction | None
    ways: list[Way]
    failure: dict[str, Any] | None = None
    """The report of the memory that ran out, if it did (`memory.out_of_memory.Report`)."""


def device_for(gpu: str | None, vram: str | None) -> Device:
    """The card that is asked about: by name, by size, or the one that is here."""
    if gpu is not None:
        return cards.card_named(gpu).device()
    if vram is not None:
        return cards.described(cards.size_in_bytes(vram) / cards.GIB)
    return present_device()


def profile(
    resolved: Resolved, device: Device, length: int | None = None, *, savings: bool = True, explain: bool = False
) -> Profile:
    """Traces the recipe on `device`, and with `savings` the usual ways of training the same model.

    length: of the longest row; left out, it is read from the recipe's data where that is possible.

    Raises:
        ModelError: the configuration cannot be read, or no model can be built from it.
    """
    from qtune.memory.savings import Way, attribution, ways

    recipe = resolved.recipe
    config = load_config(recipe.model)
    found = forecast(config, recipe, device, longest_rows(resolved, length))
    plan, longest = found.plan, found.rows.longest
    ours = Way("this recipe", "as `qtune run` does it", found.prediction)
    compared = [*ways(config, recipe, plan, longest), ours] if savings else []
    explained = attribution(config, recipe, plan, longest) if explain else []
    return Profile(recipe, found, compared, explained)


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
        known = json.loads(run_dir.memory_file.read_text(encoding="utf-8"))
        found = known["measured"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            Problem(str(run_dir.memory_file), "has no measurement: the run did not reach its end")
        ) from error
    recipe = resolved_recipe(run_dir)
    device = present_device()
    if (device.kind == "cpu") != (found["device"] == "cpu"):
        return Measured(found, None, [], known.get("failure"))
    config = load_config(recipe.model)
    plan, longest = _measured_batch(found, make_plan(recipe, device, attention_rule(config)))
    prediction = predicted(config, recipe, plan, longest)
    compared = ways(config, recipe, plan, longest)
    known["ways"] = [
        {"name": way.name, "how": f"traced: {way.how}", "peak_bytes": way.prediction.peak.bytes} for way in compared
    ]
    known["predicted_for_measured"] = {phase: moment.bytes for phase, moment in prediction.by_phase.items()}
    run_dir.write_json(run_dir.memory_file, known)
    return Measured(found, prediction, compared, known.get("failure"))


def _measured_batch(measured: dict[str, Any], plan: Plan) -> tuple[Plan, Longest]:
    """The plan and rows of the largest batches that were measured: short runs need not meet the longest rows."""
    largest = measured.get("largest_batch", {})
    train, held_out = largest.get("forward"), largest.get("eval")
    if train is None:
        return plan, Longest(plan.max_length)
    scored = train.get("scored")
    each = None if scored is None else -(-scored // train["rows"])
    equal = not train.get("padded", True)
    longest = Longest(train["length"], each, equal, evaluated=held_out["length"] if held_out else None)
    return replace(plan, micro_batch_size=train["rows"]), longest
