"""What a trace answers when code asks a tensor without storage for its value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qtune.memory.step import Batch

_aten = torch.ops.aten

WHERE = torch.ops.prim.device.default
"""The question for a tensor's device: two of three that a trace is asked. It is worth a short way."""
CPU = torch.device("cpu")


class Values(TorchDispatchMode):
    """Answers the few questions about data that decide shapes: how many positions are scored, is there padding.

    `batch` is the one at work; a step changes it between training and evaluation.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch

    @property
    def scored(self) -> int:
        """What `nonzero` over labels finds."""
        return self.batch.rows * self.batch.length if self.batch.scored is None else self.batch.scored

    @property
    def length(self) -> int:
        """What a position compares with (rope scaling by length)."""
        return self.batch.length

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is WHERE:
            return CPU  # where every tensor of a trace is
        if func is _aten.nonzero.default:
            return torch.empty(min(self.scored, args[0].numel()), args[0].dim(), dtype=torch.long)
        if func is _aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if func is torch.ops.bitsandbytes.int8_vectorwise_quant.default:
            return self._rows_in_int8(args[0])
        if func is torch.ops.bitsandbytes.int8_mixed_scaled_mm.default:
            x, codes = args[0], args[2]
            return torch.empty(*x.shape[:-1], codes.shape[0], dtype=x.dtype), None
        if func is _aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            return self._grouped_product(*args[:3])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _rows_in_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """LLM.int8() of x [..., hidden]: codes, row scales, and no outlier column: they are few, their copies small."""
        rows = x.numel() // x.shape[-1]
        return torch.empty_like(x, dtype=torch.int8), torch.empty(rows), torch.empty(0, dtype=torch.long)

    @staticmethod
    def _grouped_product(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The experts' product of rows sorted by expert, a [rows, in] and b [experts, in, out]; or, for the gradient of
        the experts, a [out, rows] and b [rows, in]. The kernels take fp32 and fp16 as well; torch 2.13's description
        of them for fake tensors only bfloat16 (_meta_registrations.py, `_meta_grouped_mm_common`). Rows of the result
        begin at multiples of 16 bytes.
        """
        shape = [*(() if b.dim() == 3 else (len(ends),)), a.shape[0], b.shape[-1]]
        aligned = 16 // a.element_size()
        row = -(-shape[-1] // aligned) * aligned
        strides = [shape[-2] * row, row, 1][-len(shape) :]
        return torch.empty_strided(shape, strides, dtype=a.dtype)

    def _scalar(self, tensor: torch.Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.is_floating_point() else self.length
