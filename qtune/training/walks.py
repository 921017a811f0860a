"""What a step asks of a whole model, without walking through its thousands of modules each time.

A model of 30 layers with its adapter has 2,500 modules. transformers' trainer walks through all of them four times a
step: to switch to training what is training, to count parameters, to find the gradients to clip, and to let go of them.
That is 20 ms of the processor (AMD EPYC, Zen 5), which a card waits for where launching its kernels is the limit.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from qtune.model.checkpointed import switched_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


def switch_once(model: nn.Module) -> None:
    """`model.train` and `model.eval` walk through the model where it, its layers or the last call say another mode.

    Whoever switches a part of a model alone switches a layer or the model inside of it; that is seen.
    """
    original: Any = model.train
    networks = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    watched = [model, *model.children(), *networks, *switched_layers(model)]
    known: list[bool] = []

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if known != [mode] or any(module.training is not mode for module in watched):
            original(mode)
            known[:] = [mode]
        return self

    model.train = types.MethodType(train, model)  # type: ignore[method-assign]


def forget_gradients_of(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """`model.zero_grad` lets go of the gradients of these parameters: nothing else in the model has any."""

    def zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
        for parameter in trained:
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.detach_().zero_()

    model.zero_grad = types.MethodType(zero_grad, model)  # type: ignore[method-assign]
