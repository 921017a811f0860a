"""LoRA on a frozen linear layer as one autograd function, for one layer or for several with the same input.

peft computes the update beside the layer: eight operations, each with a tensor of its own and a saved input. Here a
layer saves its input and the small inner product once, q, k and v (gate and up) share both, and what peft's layer
would return is returned to rounding. The module stays peft's: names, files, merging, switching the adapter off, and
every call without gradients are untouched.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qtune.adapter.products import Layer, Stack, plain_layer
from qtune.kernels import on_cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read one input in transformers' causal LMs."""


class Products(torch.autograd.Function):
    """(x [..., in], dropped x or None, stack, its parameters) -> one [..., out] for each layer of the stack."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, stack: Stack, *parameters: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        read = rows if dropped is None else dropped.reshape(rows.shape)
        versions = stack.up_to_date(x.dtype)
        u = stack.inner(read)
        outputs = tuple(
            stack.output(place, rows, u).view(*x.shape[:-1], layer.b.shape[0])
            for place, layer in enumerate(stack.layers)
        )
        ctx.stack, ctx.versions, ctx.has_dropout = stack, versions, dropped is not None
        ctx.set_materialize_grads(False)
        # The frozen product's gradient needs no input: with dropout, what the update read is all that is kept.
        ctx.save_for_backward(x if dropped is None else dropped, u)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        stack: Stack = ctx.stack
        nothing = (None,) * (3 + 2 * len(stack.layers))
        if all(grad is None for grad in grads):
            return nothing
        require_unchanged(stack, ctx.versions)
        x, u = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        du = stack.inner_gradient(flat, len(rows))
        dx = d_dropped = None
        if ctx.has_dropout:
            d_dropped = on_cpu.mm(du, stack.weights.a).view(x.shape)
        if ctx.needs_input_grad[0]:
            dx = stack.input_gradient(flat, None if ctx.has_dropout else du).view(x.shape)
        weights = stack.by_parameter(stack.weight_gradients(rows, u, flat, du))
        return dx, d_dropped, None, *weights


def require_unchanged(stack: Stack, versions: list[int]) -> None:
    """Autograd's own rule for what it saves.

    Raises:
        RuntimeError: the adapter was changed between a forward and its backward.
    """
    if stack.versions() != versions:
        raise RuntimeError("a LoRA weight was changed between the forward and the backward that needs it")


def compute_dtype(x: Tensor, layers: Sequence[Layer]) -> torch.dtype | None:
    """The type in which peft's layers would multiply `x`; None where they would use several."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif all(layer.a.dtype == x.dtype for layer in layers):
        dtype = x.dtype
    else:
        return None
    return dtype if all(layer.computes_in(dtype) for layer in layers) else None


def is_ours(x: Tensor, layers: Sequence[Layer]) -> torch.dtype | None:
    """The type to compute in where the layers' call is ours, None where it is peft's: without gradients (evaluation,
    generation), with the adapter off or merged, or in mixed types."""
    if not torch.is_grad_enabled() or x.numel() == 0 or not all(layer.is_plain() for layer in layers):
        return None
    return compute_dtype(x, layers)


class Shared:
    """Layers with one input: the first one to be called computes for all, the others are handed theirs.

    What waits belongs to one input; a layer that is called with another one computes alone, as peft's would.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.stack = Stack(layers)
        self.alone = [Stack([layer]) for layer in layers]
        self._input: Tensor | None = None
        self._dtype: torch.dtype | None = None
        self._waiting: dict[int, Tensor] = {}

    def output(self, place: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What layer `place` returns for x."""
        if self._input is x and self._dtype is dtype and place in self._waiting:
            return self._waiting.pop(place)
        if place != 0 or not all(layer.is_plain() and layer.computes_in(dtype) for layer in self.stack.layers):
            return products(x, dtype, self.alone[place])[0]
        first, *others = products(x, dtype, self.stack)
        self._input, self._dtype, self._waiting = x, dtype, dict(enumerate(others, 1))
        return first

    def forget(self) -> None:
        """Lets go of what nobody came for."""
        self._input = None
        self._waiting.clear()


def products(x: Tensor, dtype: torch.dtype, stack: Stack) -> tuple[Tensor, ...]:
    """What each layer of the stack returns for x, in the type that peft's layer would return it in."""
    outputs: tuple[Tensor, ...] = Products.apply(x.to(dtype), None, stack, *stack.parameters())
    # bitsandbytes' layers return the type of their input, torch's that of their product.
    if x.dtype == dtype:
        return outputs
    return tuple(y.to(x.dtype) if layer.is_packed else y for y, layer in zip(outputs, stack.layers, strict=True))


def take_over(layer: Layer, shared: Shared | None, place: int) -> Stack:
    """Gives one peft module our forward; returns what it computes with when it is alone."""
    original: Callable[..., Tensor] = layer.module.forward
    alone = shared.alone[place] if shared is not None else Stack([layer])

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = None if args or kwargs else is_ours(x, [layer])
        if dtype is None:
            return original(x, *args, **kwargs)
        if layer.has_dropout and self.training:
            cast = x.to(dtype)
            output: Tensor = Products.apply(cast, layer.dropout(cast), alone, layer.a, layer.b)[0]
            return output.to(x.dtype) if layer.is_packed else output
        return products(x, dtype, alone)[0] if shared is None else shared.output(place, x, dtype)

    layer.module.forward = types.MethodType(forward, layer.module)
    return alone


def plain_layers(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Layer]]]:
    """Each module with the layers among its children that can be taken over, by name."""
    for module in model.modules():
        found = {name: plain_layer(child) for name, child in module.named_children()}
        plain = {name: layer for name, layer in found.items() if layer is not None}
        if plain:
            yield module, plain
