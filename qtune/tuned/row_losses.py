"""The loss of each row that a model is shown."""

import math
from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from qtune import console
from qtune.data.collate import PaddedCollator
from qtune.data.masks import IGNORED
from qtune.errors import WorkError
from qtune.tuned.generate import batches_of

TOKENS_PER_BATCH = 4096


@torch.no_grad()
def row_losses(
    model: PreTrainedModel | PeftModel, examples: Dataset, pad: int, shown: console.Bar
) -> tuple[list[float], int]:
    """The summed negative log-likelihood of each row's scored tokens but its first token, in nats, and how many of all
    were the likeliest.

    model: with `install_loss`.
    """
    collate = PaddedCollator(pad)
    losses, correct = [0.0] * len(examples), 0
    for rows in batches_of([(length, 0) for length in examples["length"]], TOKENS_PER_BATCH):
        batch = collate(
            [
                {"input_ids": one["input_ids"], "labels": [IGNORED, *one["labels"][1:]]}
                for one in (examples[row] for row in rows)
            ]
        )
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False)
        for row, loss in zip(rows, output.row_losses.tolist(), strict=True):
            losses[row] = loss
        correct += int(output.correct)
        shown.advance(len(rows))
    return losses, correct


def require_finite_losses(losses: Sequence[float], places: Sequence[str], name: str) -> None:
    """Every row's loss is a number.

    Raises:
        WorkError: some are not; it says whether that is due to rows or to the model, which is "base" or "tuned".
    """
    broken = [place for place, loss in zip(places, losses, strict=True) if not math.isfinite(loss)]
    if not broken:
        return
    if len(broken) < len(losses):
        more = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
        raise WorkError(
            f"the {name} model's loss is no number on rows {', '.join(broken[:8])}{more}, and is one on the others; "
            "look at them, or compute in another type (quantization.compute_dtype)"
        )
    reason = "training has diverged, or its adapter is damaged" if name == "tuned" else "it computes no numbers at all"
    raise WorkError(f"the {name} model's loss is no number on any row: {reason}")
