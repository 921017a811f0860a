"""Next-token logits of rows."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qtune.sizes import GIB

# Logits that one group of rows may take, in bytes: a 4-bit model dequantizes every weight once for each group, and a
# model that stays on the disk reads every weight.
GROUP_BYTES = GIB // 4
STREAMED_GROUP_BYTES = GIB


@torch.inference_mode()
def group_logits(
    model: PreTrainedModel | PeftModel, rows: Sequence[Sequence[int]], device: torch.device
) -> list[Tensor]:
    """Logits [length, vocab] of each row in fp32 on the CPU; those of the virtual tokens that peft adds are cut off.

    Rows are padded behind their end, where no earlier position looks.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *(0,) * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -longest:]
    return [one[: len(row)].float().cpu() for one, row in zip(logits, rows, strict=True)]


def logits_of(model: PreTrainedModel | PeftModel, ids: Sequence[int]) -> Tensor:
    """`group_logits` of one row."""
    return group_logits(model, [ids], model.device)[0]


def rows_that_fit(rows: Sequence[Sequence[int]], vocabulary: int, limit_bytes: int) -> int:
    """How many of the first rows make a group whose fp32 logits stay within a limit; at least one."""
    longest = 0
    for count, row in enumerate(rows):
        longest = max(longest, len(row))
        if count and (count + 1) * longest * vocabulary * 4 > limit_bytes:
            return count
    return len(rows)
