"""`qtune profile`: what a recipe will need, or what a run needed beside what was predicted for it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qtune.adapter.lean_check import examined
from qtune.device.present import Device, present_device
from qtune.errors import RunError
from qtune.memory.cached import predicted
from qtune.memory.forecast import Forecast, forecast
from qtune.memory.longest import longest_rows
from qtune.memory.predict import Longest
from qtune.model.geometry import load_geometry
from qtune.model.load import attention_rule
from qtune.model.quantization import require_kind
from qtune.plan import make_plan
from qtune.run.lock import LockedDevice, read_lock
from qtune.run.memory import RunMemory, measured_memory, write_memory
from qtune.run.resolved import resolved_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from qtune.memory.predict import Prediction
    from qtune.memory.savings import Variant
    from qtune.plan import Plan
    from qtune.recipe.file import Resolved
    from qtune.recipe.schema import Recipe
    from qtune.run.folder import RunDir


@dataclass(frozen=True)
class Profile:
    """Everything that the screen shows about a recipe's memory."""

    recipe: Recipe
    forecast: Forecast
    baselines: list[Variant]
    attribution: list[Variant]
    seconds: float | None = None
    """That the forecast took, with every step that was traced on the way; None where nobody looked at the clock."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        return {
            "memory": self.forecast.figures(),
            "ways": [variant.to_json() for variant in self.baselines],
            "attribution": [variant.to_json() for variant in self.attribution],
        }


@dataclass(frozen=True)
class Measured:
    """A run's measurement and, where its device is known, what is traced for it.

    The step of the largest batch that it measured, the usual ways of training the same model on that batch, and the
    step without each technique.
    """

    measured: dict[str, Any]
    prediction: Prediction | None
    baselines: list[Variant]
    attribution: list[Variant]
    failure: dict[str, Any] | None = None
    """The report of the memory that ran out, if it did (`memory.out_of_memory.Report`)."""
    parts: int = 1
    """Of the run, as many as have left a measurement; it is the last one's."""

    @property
    def differs(self) -> dict[str, float]:
        """`differences`; none where nothing could be traced."""
        return {} if self.prediction is None else differences(self.measured, self.prediction)


def profile(
    resolved: Resolved,
    device: Device,
    length: int | None = None,
    tell: Callable[[str], None] = lambda words: None,
) -> Profile:
    """Traces the recipe's own step on `device`, and those steps from which follows what the recipe leaves open.

    length: of the longest row; left out, it is read from the recipe's data where that is possible. tell: hears what is
    traced next.

    Raises:
        ModelError: the configuration cannot be read, or no model can be built from it.
        InputError: its checkpoint is quantized already, in another kind than the recipe's.
    """
    recipe = resolved.recipe
    config = load_geometry(recipe.model)
    require_kind(config, recipe.quantization)
    rows = longest_rows(resolved, length)
    began = time.monotonic()
    found = forecast(config, recipe, examined(device, recipe), rows, tell)
    return Profile(recipe, found, [], [], time.monotonic() - began)


def compared(
    profiled: Profile,
    *,
    savings: bool = True,
    explain: bool = False,
    tell: Callable[[str], None] = lambda words: None,
) -> Profile:
    """A profile with the usual ways of training the same model, and with what each technique saves."""
    from qtune.memory.savings import Variant, attribution, baselines

    recipe, plan, longest = profiled.recipe, profiled.forecast.plan, profiled.forecast.rows.longest
    config = load_geometry(recipe.model)
    ours = Variant("this recipe", "as `qtune run` does it", profiled.forecast.prediction)
    return replace(
        profiled,
        baselines=[*baselines(config, recipe, plan, longest, tell), ours] if savings else [],
        attribution=attribution(config, recipe, plan, longest, tell) if explain else [],
    )


def trace_run(
    run_dir: RunDir,
    *,
    savings: bool = True,
    explain: bool = False,
    tell: Callable[[str], None] = lambda words: None,
) -> Measured:
    """What a run measured, beside what is traced for it; the second is added to the run's memory.json.

    The run's device need not be here: its lock tells what a trace must know of it. tell: hears what is traced next.

    Raises:
        RunError: the run has no measurement (it was killed before its end).
        ModelError: the base model's configuration is not to be had any more.
    """
    from qtune.memory.savings import attribution, baselines

    memory = measured_memory(run_dir)
    measured = memory.measured or {}
    recipe, device = resolved_recipe(run_dir), _device_of(run_dir, memory)
    if device is None:
        return Measured(measured, None, [], [], memory.failure, len(memory.parts))
    config = load_geometry(recipe.model)
    plan, longest = _measured_batch(measured, make_plan(recipe, device, attention_rule(config)))
    tell(f"{plan.micro_batch_size} x {longest.length} tokens")
    prediction = predicted(config, recipe, plan, longest)
    batch = {
        "rows": plan.micro_batch_size,
        **asdict(longest),
        "is_measured": "forward" in measured.get("largest_batch", {}),
    }
    needed = prediction.need.total_bytes
    traced = {"device": device.name, "batch": batch, "needed_bytes": needed, **_without_work(prediction)}
    traced["differs"] = differences(measured, prediction)
    result = Measured(
        measured,
        prediction,
        baselines(config, recipe, plan, longest, tell) if savings else [],
        attribution(config, recipe, plan, longest, tell) if explain else [],
        memory.failure,
        len(memory.parts),
    )
    # What was traced before and is not asked for now stays.
    told = replace(
        memory,
        traced=traced,
        ways=tuple(variant.to_json() for variant in result.baselines) or memory.ways,
        attribution=tuple(variant.to_json() for variant in result.attribution) or memory.attribution,
    )
    write_memory(run_dir, told)
    return result


def _without_work(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain values; how its time is made up is long, and no part of a run's memory."""
    return {name: value for name, value in asdict(prediction).items() if name != "work"}


NOTABLE = 0.01
"""A difference between traced and measured that is worth a word, as a share of the measured bytes."""


def differences(measured: dict[str, Any], prediction: Prediction) -> dict[str, float]:
    """Phases whose measured peak is not the traced one, with the error as a share of what was measured.

    On a card the allocator counts cuBLAS' workspaces too; on a CPU the ledger counts tensors.
    """
    is_card = measured["device"] != "cpu"
    beside = prediction.need.workspace_bytes if is_card else 0
    errors = {}
    for phase, moment in prediction.by_phase.items():
        seen = measured["phases"].get(phase, {}).get("allocated_peak_bytes" if is_card else "tensor_peak_bytes", 0)
        if seen > beside and abs(error := moment.bytes / (seen - beside) - 1) > NOTABLE:
            errors[phase] = round(error, 4)
    return errors


def is_traced(run_dir: RunDir) -> bool:
    """Whether nothing is left to trace for a run's memory.json, as far as there is a measurement to compare with."""
    try:
        memory = measured_memory(run_dir)
    except RunError:
        return True
    return memory.is_traced or _device_of(run_dir, memory) is None


def _device_of(run_dir: RunDir, memory: RunMemory) -> Device | None:
    """The device of a run from its lock, empty; where an older lock does not tell, one of its kind that is here."""
    lock = read_lock(run_dir)
    device = lock.last_device if lock is not None else LockedDevice()
    if device.kind is not None and device.total_bytes is not None and device.bf16 is not None:
        total, capability = device.total_bytes, device.capability
        two = (capability[0], capability[1]) if capability else None
        return Device(device.kind, device.name, total, total, device.bf16, two, device.processes)
    here = present_device()
    return here if (here.kind == "cpu") == ((memory.measured or {}).get("device") == "cpu") else None


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
    # The last batch of an epoch may have been the largest, and need not divide the effective one.
    effective, rows = plan.micro_batch_size * plan.accumulation_steps, train["rows"]
    return replace(plan, micro_batch_size=rows, accumulation_steps=-(-effective // rows)), longest
