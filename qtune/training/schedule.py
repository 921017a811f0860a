"""The learning rate of each step, as a factor of its peak. No step of a run is taken at rate 0."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def schedule_of(kind: str, warmup: float, steps: int) -> Schedule:
    """The factor of step 0, 1, …, `steps` - 1.

    It rises over the first ceil(`warmup` * `steps`) of them, falls ("cosine", "linear") or stays ("constant") behind.
    transformers (5.23, optimization.py) begins the rise at 0, so that a first step changes nothing and a run of one
    step trains nothing; here step n of w has n / (w + 1) of the peak, and the step behind the rise has all of it.
    """
    rising = min(math.ceil(warmup * steps), steps - 1)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        if kind == "constant":
            return 1.0
        gone = (step - rising) / max(1, steps - rising)
        return 0.5 * (1.0 + math.cos(math.pi * gone)) if kind == "cosine" else 1.0 - gone

    return factor
