"""What a run has come to, read off its losses and weights: nothing learned, or more lost than gained."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qtune.errors import TrainingError
from qtune.run.metrics import Metric, TrainRecord
from qtune.run.summary import Losses, number
from qtune.verdicts.interval import fall_between


def rise_of(losses: Losses | None, vocabulary: int) -> str | None:
    """A sentence about a loss that ended above its start by more than noise, or that broke out and has not come back;
    None where it did not. `vocabulary` is in tokens."""
    if losses is None or len(losses.values) < 2:
        return None
    sentence = f"the loss ended above its start: {number(losses.start)} -> {number(losses.end)}"
    if has_diverged(losses, vocabulary):
        return f"{sentence}; guessing among all {vocabulary:,} tokens gives {math.log(vocabulary):.3g}. {LOWER_RATE}"
    if (highest := losses.outbreak) is not None and losses.end > losses.values[0]:
        went = f"{number(losses.values[0])} -> {number(losses.end)}, and {number(highest)} in between"
        return f"the loss ended above that of its first logged step: {went}; a lower training.learning_rate may help"
    fall = fall_between(losses.first, losses.last)
    if fall is None or not fall.is_negative:
        return None
    return f"{sentence}; a lower training.learning_rate or more steps may help"


def has_diverged(losses: Losses | None, vocabulary: int) -> bool:
    """Whether a loss ended no better than guessing. One that began with guessing, an untrained base's, has nothing to
    lose."""
    guess = math.log(vocabulary)
    return losses is not None and losses.end >= 0.99 * guess and losses.start < 0.9 * guess


LOWER_RATE = "Training has diverged: lower training.learning_rate"


def require_gradients(records: Sequence[Metric]) -> None:
    """A gradient has reached the adapter in some step. Weight decay alone would change its weights as well.

    Raises:
        TrainingError: none has.
    """
    trained = [record for record in records if isinstance(record, TrainRecord)]
    norms = [record.gradient_norm for record in trained]
    if norms and not any(norms):
        raise TrainingError(NO_GRADIENT.format(steps=f"in all of {len(norms)} logged steps"))
    # Of steps between two records nothing is known: one of them may have been taken.
    if norms and trained[-1].step == len(norms) and not any(math.isfinite(norm) for norm in norms):
        raise TrainingError(OVERFLOW.format(steps=f"in all of {len(norms)} steps"))


NO_GRADIENT = (
    "nothing was trained: the gradient was zero {steps}. The adapter does not reach the loss, or the gradients are too "
    "small for the compute dtype; try another adapter.target_modules or quantization.compute_dtype"
)

OVERFLOW = (
    "the gradients overflow float16 {steps}, at every scale of the loss that was tried, and none of these steps has "
    'changed a weight; begin again with quantization.compute_dtype = "float32"'
)


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
