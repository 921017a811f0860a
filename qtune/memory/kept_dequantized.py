"""How many layers keep their weights dequantized: as many as are left room for, where that makes the fastest step.

What is saved is reading NF4 back, twice a layer for every micro-batch, and a launch for each weight. On a card memory
is asked last for that: traced for Llama 3.1 8B on an H100, a GiB that ends computing a layer twice saves 6.7 ms of a
step of 4 x 2,048 tokens and 11.5 of one of 1 x 2,048 (which the processor limits), a GiB of kept weights 1.4 and 5.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qtune.memory.kept_layers import SIZES, seconds
from qtune.model.load import attention_rule
from qtune.plan import keeps_nothing, make_plan
from qtune.sizes import size_in_bytes, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig

    from qtune.device.present import Device
    from qtune.device.rates import Rates
    from qtune.memory.kept_layers import Steps
    from qtune.memory.predict import Prediction
    from qtune.plan import Plan
    from qtune.recipe.schema import KeyPath, Recipe

KEEP_DEQUANTIZED: KeyPath = ("memory", "keep_dequantized")

AMPLE = 8
"""A processor's memory is ample for kept weights that take so small a part of what is free."""


def plan_at_first(recipe: Recipe, device: Device, config: PretrainedConfig, longest: int | None = None) -> Plan:
    """The plan before memory is asked by traces. On a processor a bound of the weights' bytes is enough to say whether
    they stay dequantized: its memory is seldom the limit, and a run there traces nothing before it begins.

    longest: tokens of the longest row, as `make_plan` takes it.
    """
    plan = make_plan(recipe, device, attention_rule(config), longest)
    if recipe.memory.keep_dequantized != "auto" or keeps_nothing(recipe, device, lean_step=plan.lean_step) is not None:
        return plan
    if device.kind != "cpu":
        return plan
    most = weights_bytes(config, getattr(torch, plan.compute_dtype))
    if most is None:
        return plan.with_dequantized_kept(False, "how much memory that takes is not known for such a model")
    most *= device.processes  # which share its memory
    budget = recipe.memory.budget
    free = device.free_bytes if budget == "auto" else size_in_bytes(budget, "memory.budget")
    if most > free // AMPLE:
        reason = f"it would take up to {size_text(most)} of {size_text(free)}"
        return plan.with_dequantized_kept(False, reason)
    return plan.with_dequantized_kept(True, "no weight is read back twice, and memory is ample")


def weights_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int | None:
    """At most so much do the dequantized weights of a model's layers take; None for experts and other shapes."""
    text = config.get_text_config()
    hidden, wide = getattr(text, "hidden_size", None), getattr(text, "intermediate_size", None)
    has_experts = any("expert" in name and isinstance(value, int) for name, value in vars(text).items())
    if not isinstance(hidden, int) or not isinstance(wide, int) or has_experts:
        return None
    heads, size = getattr(text, "num_attention_heads", None), getattr(text, "head_dim", None)
    attended = max(hidden, heads * size) if isinstance(heads, int) and isinstance(size, int) else hidden
    return int(text.num_hidden_layers) * (4 * hidden * attended + 3 * hidden * wide) * dtype.itemsize


@dataclass(frozen=True)
class Dequantized:
    """A step whose layers keep as many weights as fit."""

    layers: bool | int
    """That keep theirs, as the recipe's key says it."""
    rows: int
    prediction: Prediction
    seconds: float
    """Of a whole step."""


def fastest_kept(steps: Steps, sizes: Sequence[int], batch: int, rates: Rates) -> Dequantized:
    """The fastest step of any of the micro-batches `sizes` (ascending), each of which fits without kept weights.

    Fewer rows at once read weights back more often, but leave more room to end that. batch: rows of a whole step.
    """
    found: list[Dequantized] = []
    for rows in sorted(sizes, reverse=True)[:SIZES]:
        without = steps.traced(False, rows)
        found.append(Dequantized(False, rows, without, seconds(without, batch // rows, rates)))
        layers, prediction = most(steps, rows)
        if layers is not False:
            found.append(Dequantized(layers, rows, prediction, seconds(prediction, batch // rows, rates)))
        if layers is True:  # fewer rows at once have nothing more to gain
            break
    return min(found, key=lambda one: one.seconds)


def most(steps: Steps, rows: int) -> tuple[bool | int, Prediction]:
    """The most layers that can keep theirs while `rows` at once fit, as they do without; and that step.

    Each layer takes the same: two ends give a guess, which is checked by its own trace.
    """
    none, every = steps.traced(False, rows), steps.traced(True, rows)
    if steps.fits(every):
        return True, every
    slope = max(1.0, (steps.cost(every) - steps.cost(none)) / steps.layers)
    guess = max(0, min(steps.layers - 1, int((steps.limit - steps.cost(none)) / slope)))
    while guess and not steps.fits(steps.traced(guess, rows)):
        guess -= 1
    while (
        guess + 1 < steps.layers
        and steps.cost(steps.traced(guess or False, rows)) + slope <= steps.limit
        and steps.fits(steps.traced(guess + 1, rows))
    ):
        guess += 1
    return (guess, steps.traced(guess, rows)) if guess else (False, none)
