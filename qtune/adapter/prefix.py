"""Prefix tuning that can be checkpointed, and that can begin as what the model itself keeps of a text.

The prefix is handed to the model as its key-value cache. transformers takes a cache away from a layer that is computed
twice, because the second time it would be written again (5.23, modeling_layers.py). In training nothing needs what is
written: a cache that only answers with prefix and keys together is the same the second time.
"""

import copy
import functools
import types
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qtune.model.checkpointed import switched_layers


def let_prefix_be_checkpointed(model: PeftModel) -> None:
    """While the model trains, its prefix comes in a cache that is only read, and its layers may keep that."""
    original = model.get_prompt

    def get_prompt(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        cache = original(*args, **kwargs)
        if self.training:
            for layer in cache.layers:
                kind: Any = type(layer)
                layer.__class__ = _only_read(kind)
        return cache

    model.get_prompt = types.MethodType(get_prompt, model)
    layers = switched_layers(model)
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    if layers:
        network = model.get_base_model()
        above = [module for module in network.modules() if module not in layers and hasattr(module, SWITCH)]
        network.register_forward_pre_hook(functools.partial(_leave_it_to_the_layers, above))


SWITCH = "gradient_checkpointing"


def _leave_it_to_the_layers(above: list[Any], network: Any, args: Any) -> None:
    """A model that reads its own switch may hand its layers no cache (GPT-2's, transformers 5.23); which of them are
    computed twice, their own switches say."""
    for module in above:
        setattr(module, SWITCH, False)


@functools.cache
def _only_read(kind: Any) -> Any:
    """A kind of cache layer that answers to new keys and values and stays as it was.

    Whatever it keeps (a sliding window's layer keeps less), a layer puts new tensors in the place of its own: a copy of
    it does so instead. A class, for a method on each layer would hold the layer, and with it the prefix, in a cycle.
    """

    class OnlyRead(kind):
        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            written = copy.copy(self)
            written.__class__ = kind
            answer: tuple[Tensor, Tensor] = written.update(*args, **kwargs)
            return answer

    return OnlyRead


@torch.no_grad()
def prefix_of(model: PeftModel, ids: list[int]) -> Tensor:
    """What the base keeps in its cache of a text, as peft's prefix: [virtual, layers * 2 * hidden of keys].

    The keys are turned to the places 0, 1, 2 …, which are those of a prefix: a model with it answers as if the text
    stood before every row. Source: Li and Liang 2021 (arXiv:2101.00190), section 7.4, start from real words.

    Raises:
        ValueError: a layer keeps another shape than peft's prefix has.
    """
    network = model.get_base_model()
    was_training = network.training
    network.eval()
    made = network(input_ids=torch.tensor([ids], device=network.device), use_cache=True)
    cache = made["past_key_values" if "past_key_values" in made else "cache"]  # transformers 5.24 renamed it
    network.train(was_training)
    # [1, heads, virtual, head] each; peft lays them out as [virtual, layer and kind, heads, head].
    kept = [one for layer in cache.layers for one in (layer.keys, layer.values)]
    table = model.prompt_encoder[model.active_adapter].embedding.weight
    found = torch.stack([one[0].transpose(0, 1).flatten(1) for one in kept], dim=1).flatten(1)
    if found.shape != table.shape:
        raise ValueError(f"the model keeps {list(found.shape)} of a text, its prefix has {list(table.shape)}")
    return found.float()
