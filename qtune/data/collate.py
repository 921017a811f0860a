"""Examples -> the tensors of one micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtune.data.masks import IGNORED


@dataclass(frozen=True)
class PaddedCollator:
    """Pads on the right to the longest row: input_ids, labels and attention_mask, each [batch, length].

    The mask is the row's length, never the pad id: pad may be a token that rows end with. `multiple` rounds the
    length up, which tensor cores like.
    """

    pad_id: int
    multiple: int = 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        length = -(-max(lengths) // self.multiple) * self.multiple
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for number, used in enumerate(lengths):
            mask[number, :used] = 1
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], length, self.pad_id),
            "labels": _padded([row["labels"] for row in rows], length, IGNORED),
            "attention_mask": mask,
        }


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    padded = torch.full((len(rows), length), fill, dtype=torch.long)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return padded
