"""Tensors -> safetensors shards and their index, written one tensor at a time."""

import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from qtune.errors import ExportError
from qtune.model.checkpoint import DTYPES
from qtune.model.folder import INDEX, SINGLE
from qtune.sizes import GIB

# Small enough to resume a broken download, large enough that a 70B model is not hundreds of files.
SHARD_BYTES = 4 * GIB

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: known by shape and dtype before its values are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it will take on disk."""
        return prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Sequence[Planned], shard_bytes: int = SHARD_BYTES) -> list[list[Planned]]:
    """Tensors in their order, cut into shards of at most `shard_bytes` (a larger tensor gets a shard of its own)."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def write_shards(
    folder: Path, shards: Sequence[Sequence[Planned]], produce: Callable[[Planned], torch.Tensor]
) -> list[Path]:
    """Writes every shard, asking `produce` for one tensor after the other; memory stays at one tensor.

    One shard becomes `model.safetensors`; several get an index, as transformers writes them. Files are flushed to the
    disk before this returns.

    Raises:
        ExportError: `produce` returns another shape or dtype than planned.
    """
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        # Wider elements first: every tensor then starts at a multiple of its element size.
        ordered = sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)
        with (folder / name).open("wb") as file:
            file.write(header(ordered))
            for planned in ordered:
                _write_tensor(file, planned, produce(planned))
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        names = [*names, INDEX]
    return [folder / name for name in names]


def header(tensors: Sequence[Planned]) -> bytes:
    """The head of a safetensors file: its length as 8 bytes, then JSON with every tensor's dtype, shape and place.

    Source: the format's description, https://github.com/huggingface/safetensors#format.
    """
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        described[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, planned: Planned, tensor: torch.Tensor) -> None:
    if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
        raise ExportError(
            f"{planned.name}: expected {planned.dtype} {list(planned.shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
    if tensor.numel():
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
