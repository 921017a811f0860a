"""How many layers are computed twice: as few as a budget allows, where that makes the fastest step.

A layer that is not checkpointed keeps what its backward needs, and is not computed again: memory is spent for time. So
are more rows at once, and both ask for the same memory: what they are worth is read from the traced steps, priced by
the rates of the card.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtune.device.cards import card_named
from qtune.device.rates import data_sheet_rates
from qtune.memory.tracing.work import from_rows
from qtune.timing.known import known_rates
from qtune.timing.price import Cost, cost_by, duration

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PretrainedConfig

    from qtune.device.present import Device
    from qtune.device.rates import Rates
    from qtune.memory.predict import Prediction
    from qtune.plan import Plan
    from qtune.recipe.schema import KeyPath

CHECKPOINTING: KeyPath = ("training", "gradient_checkpointing")

UNKNOWN_CARD = "RTX 3090"
"""Whose data sheet orders the steps of a card of which only the memory is known."""

SIZES = 3
"""So many micro-batches are compared, from the largest that fits."""


@dataclass(frozen=True)
class Steps:
    """The steps that a budget is asked about."""

    traced: Callable[[bool | int, int], Prediction]
    """(layers computed twice, rows at once) -> that step."""
    cost: Callable[[Prediction], int]
    limit: int
    layers: int
    """Of the model."""

    def fits(self, prediction: Prediction) -> bool:
        """Whether a step costs no more than there is."""
        return self.cost(prediction) <= self.limit


@dataclass(frozen=True)
class Kept:
    """A step with as few layers computed twice as fit."""

    layers: bool | int
    """Computed twice, as the recipe's key says it."""
    rows: int
    prediction: Prediction
    seconds: float
    """Of a whole step; 0 where no rates are known."""


def fastest(steps: Steps, sizes: Sequence[int], batch: int, rates: Rates | None) -> Kept | None:
    """The fastest step of any of the micro-batches `sizes` (ascending) with as few layers computed twice as fit.

    batch: rows of a whole step. None where the largest micro-batch with every layer computed twice is the fastest.
    """
    found: list[Kept] = []
    for rows in sorted(sizes, reverse=True)[:SIZES]:
        kept = fewest(steps, rows)
        if kept is None:
            continue
        layers, prediction = kept
        found.append(
            Kept(layers, rows, prediction, 0.0 if rates is None else seconds(prediction, batch // rows, rates))
        )
        if layers is False:  # fewer rows at once have nothing more to gain
            break
    best = min(found, key=lambda one: one.seconds, default=None)
    return None if best is None or (best.layers is True and best.rows == max(sizes)) else best


KEPT_BY_A_LAYER = 16, 8
"""Numbers that a layer keeps for a token, at most: so many times the hidden and the intermediate size."""


def could_fill(config: PretrainedConfig, plan: Plan, length: int) -> bool:
    """Whether rows of this length come so near a processor's memory that the step is worth tracing: by a bound."""
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    wide = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    kept = KEPT_BY_A_LAYER[0] * hidden + KEPT_BY_A_LAYER[1] * wide
    numbers = plan.micro_batch_size * length * int(text.num_hidden_layers) * kept
    return not plan.gradient_checkpointing and 4 * numbers > plan.device.free_bytes / 2


def fewest(steps: Steps, rows: int) -> tuple[bool | int, Prediction] | None:
    """The fewest checkpointed layers with which `rows` at once fit, and that step; None where they never do.

    Memory over layers is nearly a straight line: two ends give a guess, which is checked by its own trace.
    """
    none = steps.traced(False, rows)
    if steps.fits(none):
        return False, none
    every = steps.traced(True, rows)
    if not steps.fits(every):
        return None
    slope = (steps.cost(none) - steps.cost(every)) / steps.layers
    over = steps.cost(none) - steps.limit
    guess = max(1, math.ceil(over / slope)) if slope > 0 else steps.layers
    while guess < steps.layers and not steps.fits(steps.traced(guess, rows)):
        guess += 1
    while guess > 1 and steps.fits(steps.traced(guess - 1, rows)):
        guess -= 1
    return (guess, steps.traced(guess, rows)) if guess < steps.layers else (True, every)


def rates_of(device: Device) -> Rates | None:
    """The rates by which steps on a device are ordered; None for a processor that was not measured."""
    known = known_rates(device)
    return data_sheet_rates(card_named(UNKNOWN_CARD)) if known is None and device.kind == "cuda" else known


def pace_of(device: Device, before: Prediction, after: Prediction) -> float | None:
    """How many times as long one step takes as another one; None where the device's own rates are not known."""
    rates = known_rates(device)
    if rates is None or not before.work or not after.work:
        return None
    return seconds(after, 1, rates) / seconds(before, 1, rates)


def seconds(prediction: Prediction, micro_batches: int, rates: Rates) -> float:
    """Of a step of so many micro-batches like the traced one."""
    costs = cost_by(from_rows(prediction.work), rates, lambda place, kernel: place.phase)
    each = costs.get("forward", Cost()) + costs.get("backward", Cost())
    return duration([*([each] * micro_batches), costs.get("optimizer", Cost())], rates).seconds
