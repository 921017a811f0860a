"""Which layers of a model repeat, and the same model with fewer of them."""

from __future__ import annotations

import copy
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qtune.memory.tracing.ledger import backbone_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Signature = dict[tuple[str, str], Any]
"""What a layer is made of: (its module's name, what about it) -> value."""


@dataclass(frozen=True)
class Repetition:
    """`front` layers of their own, then groups of `period` layers, one like the other to the end.

    The first group may differ from the others: it is never put in the place of another one.
    """

    front: int
    period: int


def repetition(each: list[Signature], text: PretrainedConfig) -> Repetition | None:
    """How the layers of a model repeat, from their signatures; None where they do not.

    Two layers are the same when all of their modules are: class, shapes and types of the parameters, numbers and words
    that the modules keep (window, attention type, whether there are experts); and when the configuration's lists with
    one entry for each layer have the same for both. A number that counts the layers does not part them.
    """
    layers = int(text.num_hidden_layers)
    if len(each) != layers:
        return None
    lists = [list(v) for v in vars(text).values() if isinstance(v, (list, tuple)) and len(v) == layers]
    entries = [(signature, [str(items[layer]) for items in lists]) for layer, signature in enumerate(each)]
    kinds = [entries.index(entry) for entry in entries]
    shapes = [Repetition(_front(kinds, period), period) for period in range(1, layers // GROUPS + 1)]
    shortest = min(shapes, key=lambda shape: depth_for(layers, shape), default=None)
    return shortest if shortest is not None and is_worth_it(layers, shortest) else None


def _front(kinds: list[int], period: int) -> int:
    """How many layers come before the first group, whose successors are all alike."""
    odd = [layer for layer in range(len(kinds) - period) if kinds[layer] != kinds[layer + period]]
    return max(0, odd[-1] + 1 - period) if odd else 0


GROUPS = 4
"""Groups of layers in the shallower of two traces: first, second, last but one, last. The deeper one has one more."""


def depth_for(layers: int, shape: Repetition) -> int:
    """Layers of the shallower of the two traces."""
    return shape.front + GROUPS * shape.period + (layers - shape.front) % shape.period


def is_worth_it(layers: int, shape: Repetition) -> bool:
    """Whether two shallow traces are less work than one whole."""
    return 2 * depth_for(layers, shape) + shape.period < layers


def signatures(model: torch.nn.Module) -> list[Signature]:
    """What each layer of the model's longest list of layers is made of."""
    container = dict((backbone_of(model) or model).named_modules()).get(layer_container(model))
    each = [_signature(layer) for layer in container.children()] if container is not None else []
    for key in {key for signature in each for key in signature}:
        having = [(layer, signature) for layer, signature in enumerate(each) if key in signature]
        if len(having) > 1 and _counts([(layer, signature[key]) for layer, signature in having]):
            for _, signature in having:
                signature[key] = "the layer's number"
    return each


def _signature(layer: torch.nn.Module) -> Signature:
    signature: Signature = {}
    for name, module in layer.named_modules():
        signature[name, "class"] = type(module)
        for about, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                signature[name, f"tensor {about}"] = (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        for about, value in vars(module).items():
            if (plain := _plain(value)) is not _NOT_PLAIN:
                signature[name, about] = plain
    return signature


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """A value by which layers can be told apart; the code of a function that stands in for the module's own."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = tuple(_plain(item) for item in value)
        return _NOT_PLAIN if _NOT_PLAIN in items else items
    if isinstance(value, (types.FunctionType, types.MethodType)):
        return getattr(getattr(value, "__func__", value), "__code__", _NOT_PLAIN)
    return _NOT_PLAIN


def _counts(values: list[tuple[int, Any]]) -> bool:
    """Whether these values, each with its layer's number, count the layers."""
    if not all(isinstance(value, int) and not isinstance(value, bool) for _, value in values):
        return False
    return len({value - layer for layer, value in values}) == 1


def layer_container(model: torch.nn.Module) -> str:
    """Dotted name, inside the backbone, of the list that holds the layers: the longest one; empty if there is none."""
    backbone = backbone_of(model) or model
    lists = [(len(m), name) for name, m in backbone.named_modules() if isinstance(m, torch.nn.ModuleList) and name]
    return max(lists, default=(0, ""))[1]


def shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture with fewer layers; lists with one entry for each layer are cut."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    full = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == full:
            setattr(text, name, type(value)(value[:layers]))
    text.num_hidden_layers = layers
    return config
