"""`qtune profile`: what a recipe will need, or what a run needed beside what was predicted for it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qtune.device import cards
from qtune.device.present import Device, present_device
from qtune.errors import Problem, RunError
from qtune.memory.budget import budget_bytes, settled
from qtune.memory.cached import predicted
from qtune.memory.longest import Rows, longest_rows
from qtune.memory.predict import Longest
from qtune.memory.tracing.bare_model import bare_model
from qtune.model.load import (
    attention_rule,
    is_stored_quantized,
    load_config,
    quantization_config,
    quantized_too_little,
)
from qtune.plan import make_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qtune.memory.allowance import Verdict
    from qtune.memory.predict import Prediction
    from qtune.memory.savings import Way
    from qtune.plan import Plan
    from qtune.recipe.file import Resolved
    from qtune.recipe.schema import Recipe
    from qtune.run.folder import RunDir

log = logging.getLogger(__name__)


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
        """Whether the step is sure to stay inside the budget."""
        return self.prediction.need.fits(self.budget_bytes)

    @property
    def verdict(self) -> Verdict:
        """Whether the step fits the budget, does not, or comes too close to say."""
        return self.prediction.need.verdict(self.budget_bytes)

    def to_json(self) -> dict[str, Any]:
        """The prediction of a run as it stands in memory.json, sizes in bytes."""
        found = asdict(self.prediction)
        return {
            "device": self.plan.device.name,
            "micro_batch_size": self.plan.micro_batch_size,
            "longest": asdict(self.rows.longest),
            "known_from": self.rows.known_from,
            "needed_bytes": self.prediction.need.total_bytes,
            "verdict": self.verdict,
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


def attempted(config: PretrainedConfig, recipe: Recipe, device: Device, rows: Rows) -> Forecast | str:
    """`forecast`; where the step cannot be traced, in words why: a run may fit all the same."""
    try:
        return forecast(config, recipe, device, rows)
    except Exception as error:
        log.debug("the step could not be traced", exc_info=True)
        said = str(error).partition("\n")[0]
        return f"{type(error).__name__}: {said}" if said else type(error).__name__


@dataclass(frozen=True)
class Profile:
    """Everything that the screen shows about a recipe's memory."""

    recipe: Recipe
    forecast: Forecast
    ways: list[Way]
    attribution: list[Way]
    refusal: Problem | None = None
    """Why `qtune run` would not train this model, whatever its memory."""


@dataclass(frozen=True)
class Measured:
    """A run's measurement and, where its device is known, what is traced for it.

    The step of the largest batch that it measured, the usual ways of training the same model on that batch, and the
    step without each technique.
    """

    measured: dict[str, Any]
    prediction: Prediction | None
    ways: list[Way]
    attribution: list[Way]
    failure: dict[str, Any] | None = None
    """The report of the memory that ran out, if it did (`memory.out_of_memory.Report`)."""


def device_for(gpu: str | None, vram: str | None) -> Device:
    """The card that is asked about: by name, by size, or the one that is here."""
    if gpu is not None:
        return cards.card_named(gpu).device()
    if vram is not None:
        return cards.described(cards.size_in_bytes(vram) / cards.GIB)
    return present_device()


def profile(resolved: Resolved, device: Device, length: int | None = None) -> Profile:
    """Traces the recipe's own step on `device`.

    length: of the longest row; left out, it is read from the recipe's data where that is possible.

    Raises:
        ModelError: the configuration cannot be read, or no model can be built from it.
    """
    recipe = resolved.recipe
    config = load_config(recipe.model)
    found = forecast(config, recipe, device, longest_rows(resolved, length))
    return Profile(recipe, found, [], [], refusal(config, recipe, found.plan))


def compared(found: Profile, *, savings: bool = True, explain: bool = False) -> Profile:
    """A profile with the usual ways of training the same model, and with what each technique saves."""
    from qtune.memory.savings import Way, attribution, ways

    recipe, plan, longest = found.recipe, found.forecast.plan, found.forecast.rows.longest
    config = load_config(recipe.model)
    ours = Way("this recipe", "as `qtune run` does it", found.forecast.prediction)
    return replace(
        found,
        ways=[*ways(config, recipe, plan, longest), ours] if savings else [],
        attribution=attribution(config, recipe, plan, longest) if explain else [],
    )


def refusal(config: PretrainedConfig, recipe: Recipe, plan: Plan) -> Problem | None:
    """What `qtune run` would say once the weights are loaded, known before: too little of the model is quantized."""
    if is_stored_quantized(config):
        return None
    dtype = getattr(torch, plan.compute_dtype)
    network = bare_model(config, dtype, quantization_config(recipe.quantization, dtype), plan.attention)
    return quantized_too_little(recipe.model.base, network, recipe.quantization)


TRACED = ("traced", "ways", "attribution")
"""Keys of memory.json that are traced after a run, not during it: on a CPU that would delay a short run noticeably."""


def read_run(run_dir: RunDir, *, savings: bool = True, explain: bool = False) -> Measured:
    """What a run measured, beside what is traced for it; the second is added to the run's memory.json.

    The run's device need not be here: its lock tells what a trace must know of it.

    Raises:
        RunError: the run has no measurement (it was killed before its end).
        ModelError: the base model's configuration is not to be had any more.
    """
    from qtune.memory.savings import attribution, ways
    from qtune.tuned.load import resolved_recipe

    known = _memory_of(run_dir)
    found = known["measured"]
    recipe, device = resolved_recipe(run_dir), _device_of(run_dir, found)
    if device is None:
        return Measured(found, None, [], [], known.get("failure"))
    config = load_config(recipe.model)
    plan, longest = _measured_batch(found, make_plan(recipe, device, attention_rule(config)))
    prediction = predicted(config, recipe, plan, longest)
    batch = {
        "rows": plan.micro_batch_size,
        **asdict(longest),
        "is_measured": "forward" in found.get("largest_batch", {}),
    }
    needed = prediction.need.total_bytes
    without_work = {name: value for name, value in asdict(prediction).items() if name != "work"}
    known["traced"] = {"device": device.name, "batch": batch, "needed_bytes": needed, **without_work}
    result = Measured(
        found,
        prediction,
        ways(config, recipe, plan, longest) if savings else [],
        attribution(config, recipe, plan, longest) if explain else [],
        known.get("failure"),
    )
    for key, traced in (("ways", result.ways), ("attribution", result.attribution)):
        if traced:
            known[key] = [way.to_json() for way in traced]
    run_dir.write_json(run_dir.memory_file, known)
    return result


def is_traced(run_dir: RunDir) -> bool:
    """Whether nothing is left to trace for a run's memory.json, as far as there is a measurement to compare with."""
    try:
        known = _memory_of(run_dir)
    except RunError:
        return True
    return all(key in known for key in TRACED) or _device_of(run_dir, known["measured"]) is None


def _memory_of(run_dir: RunDir) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(run_dir.memory_file.read_text(encoding="utf-8"))
        known["measured"]["device"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            Problem(str(run_dir.memory_file), "has no measurement: the run did not reach its end")
        ) from error
    return known


def _device_of(run_dir: RunDir, measured: dict[str, Any]) -> Device | None:
    """The device of a run from its lock, empty; where an older lock does not tell, one of its kind that is here."""
    try:
        locked = run_dir.read_json(run_dir.lock_file)["device"]
        total, capability = locked["total_bytes"], locked["capability"]
        return Device(
            locked["kind"], locked["name"], total, total, locked["bf16"], tuple(capability) if capability else None
        )
    except (RunError, KeyError, TypeError):
        here = present_device()
        return here if (here.kind == "cpu") == (measured["device"] == "cpu") else None


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
