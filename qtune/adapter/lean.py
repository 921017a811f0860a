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
from qtune.adapter.products import renew
from qtune.model.fast_blocks import install_fast_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel
    from torch import Tensor, nn

    from qtune.adapter.products import Layer, Stack


class AdapterCopies:
    """The adapter's weights in the type that is computed in, made at the start of each forward, all at once.

    Autograd's count of changes does not see every one of them (fused optimizers and bitsandbytes' write past it), so
    that nothing is trusted to be unchanged from one forward to the next, and an optimizer's step says so as well.
    """

    def __init__(self, stacks: list[Stack], dtype: torch.dtype) -> None:
        self.stacks, self.dtype = stacks, dtype

    def renew(self, *_: Any) -> None:
        """Makes every copy what its parameter is now, where a gradient is wanted."""
        if torch.is_grad_enabled():
            renew(self.stacks, self.dtype)

    def forget(self, *_: Any) -> None:
        """The parameters have changed; what is computed next makes its copies anew, whoever asks."""
        for stack in self.stacks:
            stack.forget()

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
        for module in _doors(model):
            module.register_forward_pre_hook(copies.renew)
        model.base_model.adapter_copies = copies


def _doors(model: PeftModel) -> list[nn.Module]:
    """What every forward through the layers calls: the backbone; where a class has none apart from its head, peft's
    wrapper, which calls the network's forward past its hooks, and the network itself."""
    network: Any = model.get_base_model()
    return [network.base_model] if network.base_model is not network else [model.base_model, network]


def copies_of(model: Any) -> AdapterCopies | None:
    """What `install_lean_step` has put beside the adapter's weights; None where nothing is beside them."""
    found = getattr(getattr(model, "base_model", None), "adapter_copies", None)
    return found if isinstance(found, AdapterCopies) else None


def adapter_copies(model: Any) -> list[Tensor]:
    """What stands in memory beside the adapter's own weights once `install_lean_step` has been called."""
    copies = copies_of(model)
    return [] if copies is None else copies.held()


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
