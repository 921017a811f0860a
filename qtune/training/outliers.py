"""Steps that stand out: a loss or a gradient norm far above those before it, by the rule of OLMo 2.

A step whose loss or gradient norm is more than six standard deviations above the mean of the last 128 is taken for an
accident: one batch of odd rows, or the beginning of a divergence. Source: OLMo 2 (arXiv:2501.00656) and the skip-step
optimizer of its training code, whose window, threshold and least history (half a window) these are.
"""

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 128
LEAST = WINDOW // 2
DEVIATIONS = 6.0


class Outliers:
    """Remembers the last losses and gradient norms, and says which new ones stand out."""

    def __init__(self, before: Iterable[tuple[float, float]] = ()) -> None:
        """`before`: (loss, gradient norm) of the steps that were taken already, in their order."""
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        for loss, norm in before:
            self.add(loss, norm)

    def add(self, loss: float, norm: float) -> str | None:
        """Takes the next step, and says in words what stands out of it; None where nothing does.

        It is remembered either way, as in OLMo: a new level of the loss stops standing out.
        """
        found = self.found(loss, norm)
        if math.isfinite(loss):
            self._losses.append(loss)
        if math.isfinite(norm):
            self._norms.append(norm)
        return found

    def found(self, loss: float, norm: float) -> str | None:
        """What `add` says, without remembering the step."""
        said = [
            f"{name} {value:.4g} is {above:.1f} standard deviations above the mean of the last {len(last)} steps"
            for name, value, last in (("the loss", loss, self._losses), ("the gradient norm", norm, self._norms))
            if (above := _above(value, last)) > DEVIATIONS
        ]
        return " and ".join(said) or None


def _above(value: float, last: deque[float]) -> float:
    """Standard deviations above the mean; 0 where there is too little to compare with."""
    if len(last) < LEAST or not math.isfinite(value):
        return 0.0
    mean = sum(last) / len(last)
    spread = math.sqrt(sum((one - mean) ** 2 for one in last) / (len(last) - 1))
    return (value - mean) / spread if spread > 0 else 0.0
