"""Rows of the vocabulary that are no plain parameter: frozen embeddings or an LM head in host memory, or compressed.

Both are asked in the same two ways: for the rows of some tokens, and for a block of rows to multiply with.

Compressed rows are made of blocks of 64 numbers: int8 codes with one fp32 scale (symmetric absmax), or NF4 codes with
one fp32 absmax (QLoRA, arXiv:2305.14314, section 3): 8.5 and 4.5 bits a weight. No block reaches over a row's end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from qtune.errors import ModelError, Problem
from qtune.sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 64
"""Numbers that share a scale."""
BLOCK_BYTES = 64 * MIB
"""Weights that come at once outside the loss, which goes by its own tile."""


class StoredRows(ABC):
    """A frozen matrix [vocab, hidden], as `shape` and `dtype` say it, however it is stored."""

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def block(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows [start, stop) on a device: [stop - start, hidden], anybody's to keep or to drop."""

    @abstractmethod
    def look_up(self, ids: Tensor) -> Tensor:
        """[...] ids -> [..., hidden] on the ids' device."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What memory holds of it."""

    @abstractmethod
    def through(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Replaces what memory holds by what `convert` makes of it."""

    def row_bytes(self) -> int:
        """Of one row that has come."""
        return self.shape[1] * self.dtype.itemsize


class HostRows(StoredRows):
    """In host memory: rows are looked up there and sent over, blocks cross the bus."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape, self.dtype = weight, weight.shape, weight.dtype

    def block(self, start: int, stop: int, device: torch.device) -> Tensor:
        """A copy, also where the host is the device."""
        return on_card(self.weight[start:stop], device)

    def look_up(self, ids: Tensor) -> Tensor:
        """Waits for the card, to see the ids."""
        return functional.embedding(ids.to(self.weight.device), self.weight).to(ids.device)

    def tensors(self) -> list[Tensor]:
        """The weight."""
        return [self.weight]

    def through(self, convert: Callable[[Tensor], Tensor]) -> None:
        """The weight, through `convert`."""
        self.weight = convert(self.weight)


class CompressedRows(StoredRows):
    """On the device in 8 or 4 bits; what is asked for is read back to the type that it was compressed from."""

    def __init__(self, weight: Tensor, kind: str, device: torch.device) -> None:
        """weight: [vocab, hidden], anywhere; it comes to the device block by block. kind: "int8" or "nf4".

        Raises:
            ModelError: `hidden` is no multiple of 64.
        """
        count, width = weight.shape
        if width % BLOCK:
            reason = f'"{kind}" stores blocks of {BLOCK} numbers, and a row has {width}; use "device" or "host"'
            raise ModelError(Problem("memory.embeddings", reason))
        self.kind, self.shape, self.dtype = kind, weight.shape, weight.dtype
        codes = (torch.int8, width) if kind == "int8" else (torch.uint8, width // 2)
        self.codes = torch.empty(count, codes[1], dtype=codes[0], device=device)
        self.scales = torch.empty(count, width // BLOCK, dtype=torch.float32, device=device)
        compress = _int8 if kind == "int8" else _nf4
        for start, stop in row_blocks(self):
            piece = weight[start:stop].detach().to(device)
            self.codes[start:stop], self.scales[start:stop] = compress(piece)

    def block(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Read back; `device` is where the codes are."""
        return self._read(self.codes[start:stop], self.scales[start:stop])

    def look_up(self, ids: Tensor) -> Tensor:
        """Read back row by row."""
        flat = ids.flatten()
        return self._read(self.codes[flat], self.scales[flat]).view(*ids.shape, self.shape[1])

    def tensors(self) -> list[Tensor]:
        """Codes and scales."""
        return [self.codes, self.scales]

    def through(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Codes and scales, through `convert`."""
        self.codes, self.scales = convert(self.codes), convert(self.scales)

    def _read(self, codes: Tensor, scales: Tensor) -> Tensor:
        shape = (len(codes), self.shape[1])
        if self.kind == "int8":
            rows = codes.to(self.dtype)
            rows.view(-1, BLOCK).mul_(scales.view(-1, 1))
            return rows
        read: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            codes.reshape(-1, 1), scales.reshape(-1), BLOCK, "nf4", shape, self.dtype
        )
        return read


def _int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    blocks = rows.float().view(len(rows), -1, BLOCK)
    scales = blocks.abs().amax(dim=2) / 127
    codes = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(2)).round_()
    return codes.to(torch.int8).view(len(rows), -1), scales


def _nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(rows.contiguous(), BLOCK, "nf4", torch.uint8)
    return codes.view(len(rows), -1), absmax.view(len(rows), -1)


def row_blocks(rows: StoredRows) -> Iterator[tuple[int, int]]:
    """(first, end) of blocks of rows of at most BLOCK_BYTES, at least one row each."""
    count = max(1, BLOCK_BYTES // rows.row_bytes())
    for start in range(0, rows.shape[0], count):
        yield start, min(start + count, rows.shape[0])


def on_card(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on the device, also where the host is the device.

    From pinned memory the copy does not block: what uses it waits in the same stream, and nobody writes to `host`
    (PyTorch's tutorial on pin_memory and non_blocking, "Host to device").
    """
    return host.to(device, non_blocking=True, copy=True)


def stored_rows(module: Any) -> StoredRows | None:
    """How a module's weight is stored where it is no plain parameter; None for any other module."""
    rows = getattr(module, "stored_rows", None)
    return rows if isinstance(rows, StoredRows) else None


def host_weight(module: Any) -> Tensor | None:
    """The weight [vocab, hidden] that a module keeps in host memory; None for any other module."""
    rows = stored_rows(module)
    return rows.weight if isinstance(rows, HostRows) else None
