"""The lean step, installed: the parts of a model with a LoRA adapter that compute in functions of ours.

What is installed is exact: what peft and transformers would return, loss and gradients to rounding. It is taken where
gradients are wanted; every other call of the model is theirs.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch

from qtune.adapter.fast_lora import SHARING, Shared, plain_layers, take_over
from qtune.adapter.fast_mlp import TILE_BYTES, gated_mlp, take_over_mlp
from qtune.adapter.products import renew
from qtune.model.checkpointed import switched_layers
from qtune.model.fast_blocks import install_fast_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel
    from torch import Tensor, nn

    from qtune.adapter.products import Layer, Stack


class AdapterCopies:
    """The adapter's weights of a layer in the type that is computed in, made at the start of its forward, all at once.

    Autograd's count of changes does not see every one of them (fused optimizers and bitsandbytes' write past it), so
    that nothing is trusted to be unchanged from one forward to the next, and an optimizer's step says so as well.
    """

    def __init__(self, stacks: list[Stack], seldom: list[Stack], dtype: torch.dtype) -> None:
        """seldom: stacks that few forwards need, if any; their copies are made where they are needed."""
        self.stacks, self.seldom, self.dtype = stacks, seldom, dtype

    def renew(self, module: nn.Module, _: Any) -> None:
        """Makes every copy what its parameter is now, where a gradient may be wanted: a reentrant checkpoint's forward
        has none, and its recomputation comes past this."""
        if torch.is_grad_enabled() or module.training:
            renew(self.stacks, self.dtype)
            for stack in self.seldom:
                stack.forget()

    def forget(self) -> None:
        """The parameters have changed; what is computed next makes its copies anew, whoever asks."""
        for stack in (*self.stacks, *self.seldom):
            stack.forget()

    def held(self) -> list[Tensor]:
        """The copies, beside the parameters."""
        return [tensor for stack in self.stacks for tensor in stack.held(self.dtype)]


def install_lean_step(model: PeftModel, dtype: torch.dtype, tile_bytes: int = TILE_BYTES) -> None:
    """Puts our functions into a model, for training.

    dtype: that products are computed in, by autocast where the adapter's is another. tile_bytes: of an MLP's tile.
    """
    install_fast_blocks(model)
    layer_of = {id(part): layer for layer in switched_layers(model) for part in layer.modules()}
    by_layer: dict[nn.Module, AdapterCopies] = {}
    for module, layers in list(plain_layers(model)):
        layer = layer_of.get(id(module))
        copies = by_layer.setdefault(module if layer is None else layer, AdapterCopies([], [], dtype))
        stacks, seldom = _into_module(module, layers, layer, tile_bytes)
        copies.stacks += stacks
        copies.seldom += seldom
    for place, copies in by_layer.items():
        place.register_forward_pre_hook(copies.renew)
    model.base_model.adapter_copies = list(by_layer.values())


def copies_of(model: Any) -> list[AdapterCopies]:
    """What `install_lean_step` has put beside the adapter's weights, layer by layer."""
    found: list[AdapterCopies] = getattr(getattr(model, "base_model", None), "adapter_copies", [])
    return found


def adapter_copies(model: Any) -> list[Tensor]:
    """What stands in memory beside the adapter's own weights once `install_lean_step` has been called."""
    return [tensor for copies in copies_of(model) for tensor in copies.held()]


def _into_module(module: Any, layers: dict[str, Layer], layer: Any, tile_bytes: int) -> tuple[list[Stack], list[Stack]]:
    """Takes over what can be in one module, of one of the model's layers; the stacks that it will compute with, and
    those that it needs where layers that share an input are given another one each."""
    if {"gate_proj", "up_proj", "down_proj"} <= layers.keys():
        mlp = gated_mlp(module, layers, layer, tile_bytes)
        if mlp is not None:
            take_over_mlp(module, mlp)
            return [mlp.into, mlp.down], []
    stacks: list[Stack] = []
    seldom: list[Stack] = []
    left = dict(layers)
    for names in SHARING:
        together = [left[name] for name in names if name in left and not left[name].has_dropout]
        widths = {layer.a.shape[1] for layer in together}
        if len(together) == len(names) and len(widths) == 1:
            shared = Shared(together)
            seldom += [take_over(left.pop(name), shared, place) for place, name in enumerate(names)]
            _bound(module, shared)
            stacks.append(shared.stack)
    stacks += [take_over(layer, None, 0) for layer in left.values()]
    return stacks, seldom


def _bound(module: Any, shared: Shared) -> None:
    """What one layer has computed for the others waits no longer than the call of the module that they are in."""
    original: Callable[..., Any] = module.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            shared.forget()

    module.forward = types.MethodType(forward, module)
