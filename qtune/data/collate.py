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

    The mask is the row's length, never the pad id: pad may be a token that rows end with.
    """

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], length, self.pad_id),
            "labels": _padded([row["labels"] for row in rows], length, IGNORED),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], length, 0),
        }


@dataclass(frozen=True)
class PackedCollator:
    """Packed rows (or single ones) with positions that restart at each document, and no attention mask.

    transformers reads the documents off the positions: SDPA and eager attention get a block-diagonal causal mask,
    FlashAttention cumulative lengths. Any attention mask, even all ones, would switch that off, and so would a cache:
    use_cache is False. Padding is one more document, whose tokens nobody sees and nobody scores.

    `flatten` lays all rows into one, [1, tokens], which FlashAttention needs; else [batch, length].
    Source: transformers 5, masking_utils.find_packed_sequence_indices.
    """

    pad_id: int
    flatten: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor | bool]:
        ids = [row["input_ids"] for row in rows]
        labels = [row["labels"] for row in rows]
        documents = [row.get("seq_lengths") or [len(row["input_ids"])] for row in rows]
        if self.flatten:
            ids, labels, documents = ([[one for row in part for one in row]] for part in (ids, labels, documents))
        length = max(map(len, ids))
        positions = [_positions([*lengths, length - sum(lengths)]) for lengths in documents]
        return {
            "input_ids": _padded(ids, length, self.pad_id),
            "labels": _padded(labels, length, IGNORED),
            "position_ids": torch.tensor(positions, dtype=torch.long),
            "use_cache": False,
        }


def collator_for(packed: bool, pad_id: int, attention: str) -> PaddedCollator | PackedCollator:
    """The collator of a prepared dataset under an attention implementation (transformers' name of it)."""
    if not packed:
        return PaddedCollator(pad_id)
    return PackedCollator(pad_id, flatten=attention.startswith("flash"))


def _positions(lengths: Sequence[int]) -> list[int]:
    return [position for length in lengths for position in range(length)]


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    padded = torch.full((len(rows), length), fill, dtype=torch.long)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return padded
