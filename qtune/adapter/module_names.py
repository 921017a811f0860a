"""Names that a recipe gives to modules: each has to be that of one, and the nearest is said where it is not."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qtune.errors import Problem
from qtune.recipe.schema import IA3, Adapter
from qtune.spelling import did_you_mean


def unmatched_names(network: PreTrainedModel, adapter: Adapter) -> Iterator[Problem]:
    """The names that the recipe gives to modules and that this model does not have.

    peft (0.21, tuners/tuners_utils.py) is content when any of them matches: a name matches the end of a module's.
    """
    modules = [name for name, _ in network.named_modules()]
    for key in ("target_modules", "feedforward_modules"):
        names = getattr(adapter, key, None)
        for name in names if isinstance(names, tuple) else ():
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                message = f"{name!r}: no module of the base is called so; {_nearest_module(network, name)}"
                yield Problem(f"adapter.{key}", message)
    if isinstance(adapter, IA3):
        for name in sorted({*(adapter.feedforward_modules or ())} - {*(adapter.target_modules or ())}):
            message = f"{name!r}: is not among target_modules, so that it would not be scaled"
            yield Problem("adapter.feedforward_modules", message)


def _nearest_module(network: PreTrainedModel, name: str) -> str:
    """The last words of the layers' names: what a recipe would say. The head takes no adapter, and is none of them."""
    head = network.get_output_embeddings()
    layers = [
        module
        for module, layer in network.named_modules()
        if isinstance(layer, (torch.nn.Linear, Conv1D)) and module and layer is not head
    ]
    known = list(dict.fromkeys(module.rpartition(".")[2] for module in layers))
    return did_you_mean(name.rpartition(".")[2], known, f"its layers are {', '.join(known)}")
