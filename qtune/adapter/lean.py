"""The lean step, installed: the parts of a model with a LoRA adapter that compute in functions of ours.

What is installed is exact: what peft and transformers would return, loss and gradients to rounding. It is taken where
gradients are wanted; every other call of the model is theirs.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch

from qtune.adapter.fast_lora import SHARING, Shared, plain_layers, take_over
from qtune.adapter.fast_mlp import gated_mlp, take_over_mlp
from qtune.model.fast_blocks import install_fast_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel
    from torch import Tensor

    from qtune.adapter.products import Layer, Stack


class AdapterCopies:
    """The adapter's weights in the type that is computed in, made at the start of each forward, all at once."""

    def __init__(self, stacks: list[Stack], dtype: torch.dtype) -> None:
        self.stacks, self.dtype = stacks, dtype

    def renew(self, *_: Any) -> None:
        """Makes every copy what its parameter is now, where a gradient is wanted."""
        if not torch.is_grad_enabled():
            return
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for stack in self.stacks:
            copies, originals = stack.to_copy(self.dtype)
            targets += copies
            sources += originals
        if targets:
            torch._foreach_copy_(targets, sources)

    def held(self) -> list[Tensor]:
        """The copies, beside the parameters."""
        return [tensor for stack in self.stacks for tensor in stack.held(self.dtype)]


def install_lean_step(model: PeftModel, dtype: torch.dtype, *, recompute: bool) -> None:
    """Puts our functions into a model, for training.

    dtype: that products are computed in, by autocast where the adapter's is another.
    recompute: whether the model's layers are checkpointed, so that an MLP should keep nothing but its input.
    """
    install_fast_blocks(model)
    stacks: list[Stack] = []
    for module, layers in list(plain_layers(model)):
        stacks += _into_module(module, layers, recompute)
    if stacks:
        copies = AdapterCopies(stacks, dtype)
        model.base_model.register_forward_pre_hook(copies.renew)
        model.base_model.adapter_copies = copies


def adapter_copies(model: Any) -> list[Tensor]:
    """What stands in memory beside the adapter's own weights once `install_lean_step` has been called."""
    found = getattr(getattr(model, "base_model", None), "adapter_copies", None)
    return found.held() if isinstance(found, AdapterCopies) else []


def _into_module(module: Any, layers: dict[str, Layer], recompute: bool) -> list[Stack]:
    """Takes over what can be in one module; the stacks that it will compute with."""
    if {"gate_proj", "up_proj", "down_proj"} <= layers.keys():
        mlp = gated_mlp(module, layers, recompute=recompute)
        if mlp is not None:
            take_over_mlp(module, mlp)
            return [mlp.into, mlp.down]
    stacks: list[Stack] = []
    left = dict(layers)
    for names in SHARING:
        together = [left[name] for name in names if name in left and not left[name].has_dropout]
        widths = {layer.a.shape[1] for layer in together}
        if len(together) == len(names) and len(widths) == 1:
            shared = Shared(together)
            for place, name in enumerate(names):
                take_over(left.pop(name), shared, place)
            _bound(module, shared)
            stacks.append(shared.stack)
    stacks += [take_over(layer, None, 0) for layer in left.values()]
    return stacks


def _bound(module: Any, shared: Shared) -> None:
    """What one layer has computed for the others waits no longer than the call of the module that they are in."""
    original: Callable[..., Any] = module.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            shared.forget()

    module.forward = types.MethodType(forward, module)
