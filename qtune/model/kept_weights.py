"""Frozen 4-bit weights that stay dequantized from one product to the next, where memory is spent for that.

Whoever multiplies with a weight asks for it here. Of layers that keep their weights all are dequantized at the first
product, together, so that no activation comes to lie between them, and handed out as they are from then on: they never
change. Every other layer's are dequantized for each product. The numbers are the same.

A product of bitsandbytes' own (of a layer without LoRA, under a soft prompt) is computed here where its layer keeps its
weight, and when that was let go of, by the operations that bitsandbytes 0.50 has for it (`MatMul4Bit`). On a card it
multiplies few rows by a kernel that reads the codes itself, from which this differs by rounding.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qtune.kernels.ops import dequantized
from qtune.model.checkpointed import switched_layers
from qtune.model.layer_stream import is_streamed, packed_weight

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bitsandbytes.functional import QuantState
    from torch import nn


@dataclass(frozen=True)
class _Source:
    """What a weight was dequantized from. It holds the codes' storage, so that no other one can be taken for it."""

    storage: torch.UntypedStorage
    version: int
    state: QuantState

    def is_still(self, codes: Tensor, state: QuantState) -> bool:
        """Whether these are the codes and constants, unmoved and unchanged."""
        same = state is self.state and codes._version == self.version
        return same and codes.untyped_storage()._cdata == self.storage._cdata


class KeptWeight:
    """The weight of one `Linear4bit` whose layer keeps it."""

    def __init__(self, module: Any, dtype: torch.dtype, together: Sequence[KeptWeight]) -> None:
        """dtype: that is computed in. together: the model's, this one too."""
        self.module, self.dtype, self.together = module, dtype, together
        self.held: Tensor | None = None
        """[out, in], from the first product on."""
        self._source: _Source | None = None

    def read(self, dtype: torch.dtype) -> Tensor:
        """[out, in]; in another type than the kept one it is the caller's own."""
        codes, state = packed_weight(self.module)
        if dtype is not self.dtype:
            return dequantized(codes, state).to(dtype)
        if self.held is None:
            for one in self.together:
                one.make()
        elif self._source is None or not self._source.is_still(codes, state):
            self.held = None  # or the new one would come beside it
        self.make()
        assert self.held is not None
        return self.held

    def make(self) -> None:
        """Dequantizes it, where it is not yet."""
        if self.held is None:
            codes, state = packed_weight(self.module)
            self._source = _Source(codes.untyped_storage(), codes._version, state)
            self.held = dequantized(codes, state).to(self.dtype)


def weight_of(module: Any, dtype: torch.dtype) -> Tensor:
    """[out, in] of a `Linear4bit` in the type of a product, which only reads it."""
    kept = _kept(module)
    return dequantized(*packed_weight(module)).to(dtype) if kept is None else kept.read(dtype)


def keep_weights(model: nn.Module, layers: bool | int, dtype: torch.dtype) -> bool:
    """Has the 4-bit weights of so many of the first layers stay dequantized in `dtype`; True: of all, False: of none,
    and those that have stayed are let go of. Whether that changed anything."""
    wanted: dict[int, Any] = {}
    for number, layer in enumerate(switched_layers(model)):
        if layers is True or number < layers:
            wanted |= {id(module): module for module in _four_bit(layer)}
    before = {id(module) for module in _four_bit(model) if _kept(module) is not None}
    if wanted.keys() == before:
        return False
    for module in _four_bit(model):
        module.kept_weight = None
    together: list[KeptWeight] = []
    for module in wanted.values():
        module.kept_weight = KeptWeight(module, dtype, together)
        together.append(module.kept_weight)
        if "forward" not in vars(module):
            module.forward = types.MethodType(_multiply, module)
    return True


def kept_weights(model: nn.Module) -> list[KeptWeight]:
    """Those of all layers that keep theirs."""
    return [kept for module in model.modules() if (kept := _kept(module)) is not None]


def _kept(module: Any) -> KeptWeight | None:
    kept = getattr(module, "kept_weight", None)
    return kept if isinstance(kept, KeptWeight) else None


def _four_bit(model: nn.Module) -> Iterator[Any]:
    return (
        module
        for module in model.modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit) and not is_streamed(module)
    )


class _Product(torch.autograd.Function):
    """(x [..., in], a module with a frozen weight) -> x Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return functional.linear(x, weight_of(module, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.matmul(grad, weight_of(ctx.module, grad.dtype)), None


def _multiply(self: Any, x: Tensor) -> Tensor:
    """Ours where a gradient is wanted, whether or not the weight is still kept: letting go of it changes no number."""
    is_frozen = self.bias is None or not self.bias.requires_grad
    if not (torch.is_grad_enabled() and is_frozen and self.compute_dtype is not None and x.numel()):
        theirs: Tensor = type(self).forward(self, x)
        return theirs
    y: Tensor = _Product.apply(x.to(self.compute_dtype), self)
    return y.to(x.dtype)
