"""Gradient checkpointing of the first layers of a model: transformers keeps the switch on each layer.

The first ones, for these wait longest: what the last layers keep is freed before the first layer that is computed again
needs room for it, so that the two do not meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def switched_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be checkpointed, in the order of the forward."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_first(model: nn.Module, wanted: bool | int) -> None:
    """Of a model whose checkpointing is on, leaves it on in so many of the first layers; True: in all."""
    for number, layer in enumerate(switched_layers(model)):
        layer.gradient_checkpointing = wanted is True or number < wanted


def checkpoint_all(model: PeftModel) -> bool:
    """Turns checkpointing on in every layer; whether that changed anything."""
    if all(layer.gradient_checkpointing for layer in switched_layers(model)):
        return False
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return True
