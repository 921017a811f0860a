"""What a run has come to, read off its losses and weights: nothing learned, or more lost than gained."""

import math

import torch
from torch import Tensor

from qtune.errors import TrainingError
from qtune.run.summary import Losses


def rise_of(losses: Losses, vocabulary: int) -> str | None:
    """A sentence about a loss that ended above its start; None where it did not. `vocabulary` is in tokens."""
    if len(losses.values) < 2 or losses.end <= losses.start:
        return None
    sentence = f"the loss ended above its start: {losses.start:.3g} -> {losses.end:.3g}"
    guess = math.log(vocabulary)
    if losses.end >= 0.99 * guess:
        return f"{sentence}; guessing among all {vocabulary:,} tokens gives {guess:.3g}. {LOWER_RATE}"
    return f"{sentence}; a lower training.learning_rate or more steps may help"


LOWER_RATE = "Training has diverged: lower training.learning_rate"


def require_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Training has changed something.

    Raises:
        TrainingError: every trained tensor is what it was before the first step.
    """
    if all(torch.equal(before[name], tensor.cpu()) for name, tensor in after.items()):
        raise TrainingError(
            "nothing was trained: every weight of the adapter is what it was before the first step. Too small a "
            "training.learning_rate for the adapter's dtype, or gradients that are all zero, end like this"
        )
