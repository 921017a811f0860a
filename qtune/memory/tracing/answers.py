"""What a trace answers when code asks a tensor without storage for its value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qtune.memory.tracing.fake_tensors import RememberingMode
    from qtune.memory.tracing.step import Batch


OUTLIER_SHARE = 0.025
"""Columns of a layer's input with a value of 6 or more, which LLM.int8() multiplies apart (arXiv:2208.07339). Measured:
2.3 % of all columns in SmolLM2 135M over 2,048 tokens, nearly all of them before `down_proj`; 2.7 % in a 1B model of
random weights over 4,096 (H100, 2026-11-27)."""


class Values:
    """Answers the few questions about data that decide shapes: how many positions are scored, is there padding.

    `batch` is the one at work; a step changes it between training and evaluation.
    """

    def __init__(self, batch: Batch, mode: RememberingMode) -> None:
        self.batch = batch
        self.mode = mode

    @property
    def scored(self) -> int:
        """What `nonzero` over labels finds."""
        return self.batch.rows * self.batch.length if self.batch.scored is None else self.batch.scored

    @property
    def length(self) -> int:
        """What a position compares with (rope scaling by length)."""
        return self.batch.length

    def answer(self, func: Any, args: Sequence[Any]) -> Any:
        """What an operation returns whose result depends on values, or that fake tensors do not know; otherwise
        NotImplemented."""
        known = _ANSWERS.get(func)
        return NotImplemented if known is None else known(self, *args)

    def _nonzero(self, x: torch.Tensor) -> torch.Tensor:
        return self.mode.new((min(self.scored, x.numel()), x.dim()), torch.long)

    def _chosen(self, x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> Any:
        """x where a mask says so, which is where labels are: [scored, ...]."""
        masks = [index for index in indices if index is not None and index.dtype is torch.bool]
        if len(masks) != 1 or indices[0] is not masks[0] or len(indices) > 1:
            return NotImplemented
        return self.mode.new((min(self.scored, masks[0].numel()), *x.shape[masks[0].dim() :]), x.dtype)

    def _masked_select(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.mode.new((min(self.scored, mask.numel()),), x.dtype)

    def _constant(self, x: torch.Tensor) -> torch.Tensor:
        return self.mode.new(x.shape, x.dtype, x.stride())

    def _rows_in_int8(self, x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """LLM.int8() of x [..., hidden]: codes, row scales, and which columns are outliers."""
        rows, new = x.numel() // x.shape[-1], self.mode.new
        outliers = round(OUTLIER_SHARE * x.shape[-1])
        return new(x.shape, torch.int8), new((rows,), torch.float32), new((outliers,), torch.long)

    def _product_in_int8(
        self, x: torch.Tensor, _: Any, codes: torch.Tensor, __: Any, ___: Any, outliers: torch.Tensor, *____: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The product, and the outlier columns of x [rows, in], which bitsandbytes keeps for the backward."""
        new = self.mode.new
        return new((*x.shape[:-1], codes.shape[0]), x.dtype), new((*x.shape[:-1], len(outliers)), x.dtype)

    def _grouped_product(self, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor, *_: Any) -> Any:
        """The experts' product of rows sorted by expert, a [rows, in] and b [experts, in, out]; or, for the gradient of
        the experts, a [out, rows] and b [rows, in]. The kernels take fp32 and fp16 as well; torch 2.13's description
        of them for fake tensors only bfloat16 (_meta_registrations.py, `_meta_grouped_mm_common`). Rows of the result
        begin at multiples of 16 bytes.
        """
        if a.dtype is torch.bfloat16:
            return NotImplemented
        shape = [*(() if b.dim() == 3 else (len(ends),)), a.shape[0], b.shape[-1]]
        aligned = 16 // a.element_size()
        row = -(-shape[-1] // aligned) * aligned
        strides = [shape[-2] * row, row, 1][-len(shape) :]
        return self.mode.new(shape, a.dtype, strides)

    def _scalar(self, tensor: torch.Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.is_floating_point() else self.length


_ANSWERS: dict[Any, Any] = {
    torch.ops.aten.nonzero.default: Values._nonzero,
    torch.ops.aten.index.Tensor: Values._chosen,
    torch.ops.aten.masked_select.default: Values._masked_select,
    torch.ops.aten.lift_fresh.default: Values._constant,
    torch.ops.aten._local_scalar_dense.default: Values._scalar,
    torch.ops.aten._grouped_mm.default: Values._grouped_product,
    torch.ops.bitsandbytes.int8_vectorwise_quant.default: Values._rows_in_int8,
    torch.ops.bitsandbytes.int8_mixed_scaled_mm.default: Values._product_in_int8,
}
