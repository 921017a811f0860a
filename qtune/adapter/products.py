"""The products of a LoRA layer on a frozen linear one, as autograd never needs to see them.

A layer computes y = x Wᵀ + b + s (x Aᵀ) Bᵀ (Hu et al. 2021, arXiv:2106.09685, section 4.1). The update is written
first, scaled by its own product, and the large product is added to it in its epilogue: no tensor of the size of y is
made for the update, for its scale or for the sum. The gradient of x is built in the same way.

A quantized W is dequantized where it is multiplied and freed there, in the backward from the layer's own packed weight
(bitsandbytes' MatMul4Bit keeps that outside of `save_for_backward`: bitsandbytes#2034). The allocator hands the block
to the next weight, so that no more than one of them is in memory and none is overwritten that is still to be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from peft.tuners import lora
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn

from qtune.kernels import on_cpu
from qtune.model.kept_weights import weight_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class Layer:
    """One LoRA layer with one plain adapter on it: where its weights are, and whether peft would do what we do."""

    def __init__(self, module: Any, adapter: str) -> None:
        self.module, self.adapter = module, adapter
        self.base: Any = module.base_layer
        self._inner, self._outer = module.lora_A[adapter], module.lora_B[adapter]
        self.dropout: nn.Module = module.lora_dropout[adapter]
        self.has_dropout = not isinstance(self.dropout, nn.Identity)
        self.is_packed = isinstance(self.base, bitsandbytes.nn.Linear4bit)

    @property
    def a(self) -> nn.Parameter:
        """[rank, in]"""
        return self._inner.weight

    @property
    def b(self) -> nn.Parameter:
        """[out, rank]"""
        return self._outer.weight

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) (arXiv:2312.03732)."""
        return float(self.module.scaling[self.adapter])

    @property
    def rank(self) -> int:
        """Inner dimension of the update."""
        return self.a.shape[0]

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[out]; frozen."""
        bias = self.base.bias
        return None if bias is None else bias.to(dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in], in a buffer of its own where the base is quantized."""
        if not self.is_packed:
            weight: Tensor = self.base.weight
            return weight.to(dtype)
        return weight_of(self.base, dtype)

    def is_plain(self) -> bool:
        """Whether the update is on, alone and not merged: otherwise the layer is peft's."""
        module = self.module
        is_on = not module.disable_adapters and not module.merged_adapters
        return is_on and module.active_adapters == [self.adapter]

    def computes_in(self, dtype: torch.dtype) -> bool:
        """Whether peft's layer would multiply in this type too."""
        return not self.is_packed or self.base.compute_dtype in (None, dtype)


def plain_layer(module: nn.Module) -> Layer | None:
    """The layer of a peft module that `products` can take over: LoRA and rsLoRA, on NF4, FP4 or an unquantized linear
    layer. None for DoRA and other variants, int8, biases in the update, several adapters: those stay peft's."""
    if type(module) not in (Linear4bit, lora.Linear):
        return None
    found: Any = module
    adapters = list(found.lora_A)
    if len(adapters) != 1 or found.lora_variant or found.fan_in_fan_out:
        return None
    layer = Layer(module, adapters[0])
    base = layer.base
    if not layer.is_packed and type(base) is not nn.Linear:
        return None
    is_frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    return layer if is_frozen and found.lora_B[layer.adapter].bias is None else None


@dataclass(frozen=True)
class Weights:
    """The adapter's weights of a stack, in the type of its products."""

    a: Tensor
    """[sum of ranks, in]"""
    b: list[Tensor]
    """[out, rank] each"""


class _Copies:
    """What a stack keeps beside the parameters."""

    def __init__(self, stack: Stack, dtype: torch.dtype) -> None:
        first, layers = stack.layers[0].a, stack.layers
        self.dtype, self.kind = dtype, (first.device, first.dtype)
        self.versions: list[int] | None = None
        """Of the parameters that were copied; None: of none, or nobody knows."""
        self._own_a = len(layers) > 1 or first.dtype is not dtype
        self._own_b = [layer.b.dtype is not dtype for layer in layers]
        rows = stack.places[-1].stop
        a = first.detach().new_empty(rows, first.shape[1], dtype=dtype) if self._own_a else first.detach()
        b = [
            torch.empty_like(layer.b.detach(), dtype=dtype) if own else layer.b.detach()
            for layer, own in zip(layers, self._own_b, strict=True)
        ]
        self.weights = Weights(a, b)
        self.made = ([a] if self._own_a else []) + [tensor for tensor, own in zip(b, self._own_b, strict=True) if own]

    def pairs(self, stack: Stack) -> tuple[list[Tensor], list[Tensor]]:
        """(targets, sources) of copies."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for layer, place, b, own in zip(stack.layers, stack.places, self.weights.b, self._own_b, strict=True):
            if self._own_a:
                pairs.append((self.weights.a[place], layer.a.detach()))
            if own:
                pairs.append((b, layer.b.detach()))
        return [target for target, _ in pairs], [source for _, source in pairs]


class Stack:
    """Layers with one input: their A one under the other, and all weights in the type that is computed in.

    Copies are made where the type differs, and where several A must lie together; otherwise the parameters serve.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        ranks = [layer.rank for layer in self.layers]
        self.places = [slice(sum(ranks[:place]), sum(ranks[: place + 1])) for place in range(len(ranks))]
        """Of each layer, in the stacked A."""
        self._copies: _Copies | None = None

    def parameters(self) -> list[nn.Parameter]:
        """A and B of each layer, in turn."""
        return [parameter for layer in self.layers for parameter in (layer.a, layer.b)]

    def versions(self) -> list[int]:
        """Changes when a parameter does."""
        return [parameter._version for parameter in self.parameters()]

    def up_to_date(self, dtype: torch.dtype) -> list[int]:
        """Makes `weights` what the parameters are now, in `dtype`; returns their versions."""
        versions = self.versions()
        copies = self._copies
        if copies is None or copies.dtype is not dtype or copies.versions != versions:
            renew([self], dtype)
        return versions

    @property
    def weights(self) -> Weights:
        """The adapter's weights as `up_to_date` has left them."""
        assert self._copies is not None
        return self._copies.weights

    def forget(self) -> None:
        """The parameters are not what they were, whatever their versions say: a fused optimizer counts no change."""
        if self._copies is not None:
            self._copies.versions = None

    @torch.no_grad()
    def held(self, dtype: torch.dtype) -> list[Tensor]:
        """The copies for products in `dtype`; allocated now, if they have not been yet."""
        return self.copies(dtype).made

    def copies(self, dtype: torch.dtype) -> _Copies:
        """Room for the copies in `dtype`, whatever is in it."""
        first = self.layers[0].a
        kept = self._copies
        if kept is None or kept.dtype is not dtype or kept.kind != (first.device, first.dtype):
            kept = self._copies = _Copies(self, dtype)
        return kept

    def inner(self, x: Tensor) -> Tensor:
        """u = s x Aᵀ of all layers, each with its scale: [rows, sum of ranks]."""
        a = self.weights.a.t()
        scales = [layer.scale for layer in self.layers]
        if len(set(scales)) == 1:
            return on_cpu.scaled_product(x, a, scales[0])
        u = on_cpu.mm(x, a)
        for place, scale in zip(self.places, scales, strict=True):
            u[:, place].mul_(scale)
        return u

    def output(self, place: int, x: Tensor, u: Tensor, out: Tensor | None = None) -> Tensor:
        """What one of the layers returns, [rows, out]. x: [rows, in]; u: [rows, sum of ranks]."""
        layer = self.layers[place]
        b, bias = self.weights.b[place].t(), layer.bias(u.dtype)
        mine = u[:, self.places[place]]
        y = on_cpu.mm(mine, b, out=out) if bias is None else torch.addmm(bias, mine, b, out=out)
        return on_cpu.add_product(y, x, layer.weight(x.dtype).t())

    def inner_gradient(self, grads: Sequence[Tensor | None], rows: int) -> Tensor:
        """d loss / d u, [rows, sum of ranks]; grads: [rows, out] of each output, None where it was not used."""
        given = next(grad for grad in grads if grad is not None)
        weights = self.weights
        du = given.new_empty(rows, weights.a.shape[0])
        for layer, place, b, grad in zip(self.layers, self.places, weights.b, grads, strict=True):
            if grad is None:
                du[:, place].zero_()
            else:
                on_cpu.scaled_product(grad, b, layer.scale, du[:, place])
        return du

    def input_gradient(self, grads: Sequence[Tensor | None], du: Tensor | None, out: Tensor | None = None) -> Tensor:
        """d loss / d x, [rows, in]; du: what goes through the updates, None where that is another input's."""
        dx = None if du is None else on_cpu.mm(du, self.weights.a, out=out)
        for layer, grad in zip(self.layers, grads, strict=True):
            if grad is None:
                continue
            weight = layer.weight(grad.dtype)
            dx = on_cpu.mm(grad, weight, out=out) if dx is None else on_cpu.add_product(dx, grad, weight)
            del weight  # or the next one would come beside it
        assert dx is not None
        return dx

    def weight_gradients(self, x: Tensor, u: Tensor, grads: Sequence[Tensor | None], du: Tensor) -> list[Tensor]:
        """d loss / d A, stacked [sum of ranks, in], then d loss / d B of each layer; in the parameters' types."""
        product = torch.ops.qtune.product_in.default
        d_a = product(du.t(), x, self.layers[0].a.dtype)
        d_b = [
            torch.zeros_like(layer.b) if grad is None else product(grad.t(), u[:, place], layer.b.dtype)
            for layer, place, grad in zip(self.layers, self.places, grads, strict=True)
        ]
        return [d_a, *d_b]

    def by_parameter(self, found: Sequence[Tensor]) -> list[Tensor]:
        """What `weight_gradients` returns, in the order of `parameters`."""
        d_a, *d_b = found
        return [tensor for place, b in zip(self.places, d_b, strict=True) for tensor in (d_a[place], b)]


@torch.no_grad()
def renew(stacks: Sequence[Stack], dtype: torch.dtype) -> None:
    """Makes the copies of all stacks what their parameters are now, at once."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for stack in stacks:
        mine, theirs = stack.copies(dtype).pairs(stack)
        targets += mine
        sources += theirs
    if targets:
        torch._foreach_copy_(targets, sources)
    for stack in stacks:  # last: memory may have run out
        stack.copies(dtype).versions = stack.versions()
