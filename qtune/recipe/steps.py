"""Runs of so few steps that little can come of them: said before one wonders why. Pure arithmetic."""

import math

from qtune.recipe.schema import Training

FEW_STEPS = 30
"""Optimizer steps of a run below which that is said. Ours: no source names one. AdamW moves a number by about the
learning rate in each step, so that their number bounds how far a run can come."""
SMALLEST_BATCH = 4
"""Rows of a step that are still proposed."""


def few_steps(training: Training, rows: int) -> str | None:
    """A sentence on a run of few steps, with values that make more of them; None for others.

    rows: that are trained on, packed ones where they are packed. Steps that the recipe names itself are meant.
    """
    per_epoch = -(-rows // training.batch_size)
    steps = math.ceil(training.epochs * per_epoch)
    if training.steps is not None or not rows or steps >= FEW_STEPS:
        return None
    epochs = math.ceil(FEW_STEPS / per_epoch)
    ways = [f"training.epochs = {epochs} makes {epochs * per_epoch}"]
    smaller = [size for size in (2**power for power in range(2, 20)) if SMALLEST_BATCH <= size < training.batch_size]
    for size in reversed(smaller):
        if (more := math.ceil(training.epochs * -(-rows // size))) >= FEW_STEPS:
            ways.insert(0, f"training.batch_size = {size} makes {more}")
            break
    what = "step is" if steps == 1 else "steps are"
    return f"training: {steps} {what} few ({rows:,} rows, {training.batch_size} in a step); {', '.join(ways)}"
