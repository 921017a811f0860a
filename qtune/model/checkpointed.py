"""Gradient checkpointing of the first layers of a model: transformers keeps the switch on each layer.

The first ones, for these wait longest: what the last layers keep is freed before the first layer that is computed again
needs room for it, so that the two do not meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


def switched_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be checkpointed, in the order of the forward."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_first(model: nn.Module, wanted: bool | int) -> None:
    """Of a model whose checkpointing is on, leaves it on in so many of the first layers; True: in all."""
    for number, layer in enumerate(switched_layers(model)):
        layer.gradient_checkpointing = wanted is True or number < wanted


def free_inputs(model: PreTrainedModel | PeftModel) -> None:
    """Lets go of the embeddings' output, which nobody's gradient needs; to be called once checkpointing is on.

    transformers makes it a leaf that wants a gradient, which checkpointing in its reentrant form needs: autograd then
    holds it through the whole backward, and computes a gradient for it. Ours is the other form. An output that has a
    history, of embeddings that are trained, stays as it is.
    """
    embeddings: Any = model.get_input_embeddings()
    if not getattr(embeddings, "lets_go", False):
        embeddings.lets_go = True
        embeddings.register_forward_hook(_without_leaf)


def _without_leaf(module: nn.Module, args: Any, output: Any) -> Any:
    is_leaf = isinstance(output, Tensor) and output.requires_grad and output.is_leaf
    return output.detach() if is_leaf else output


def checkpoint_all(model: PeftModel) -> bool:
    """Turns checkpointing on in every layer; whether that changed anything."""
    if all(layer.gradient_checkpointing for layer in switched_layers(model)):
        return False
    model.activation_checkpointing_enable({"use_reentrant": False})
    free_inputs(model)
    return True
