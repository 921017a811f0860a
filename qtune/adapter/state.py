"""An adapter on disk: peft's format, and the whole trained state, which training can go on from bit for bit."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from qtune.adapter.prompt_encoder import residual_prompts
from qtune.errors import ModelError, Problem
from qtune.model.checkpoint import DTYPES
from qtune.model.layer_stream import join_stream
from qtune.run.checkpoints import TRAINED_STATE
from qtune.whole import whole

STATE_FILE = TRAINED_STATE
"""Every trained tensor under its module's name. peft's own file has no prompt encoder, only what it computed."""
UNIT = "unit"
"""In its metadata: `ResidualPrompt.unit`."""


def trained_state(model: PeftModel) -> dict[str, Tensor]:
    """Every trained tensor by its name in the model, prompt encoder included. No copies."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained_state(model: PeftModel, folder: Path) -> None:
    """Writes `trained_state` whole or not at all; of a residual prompt with the unit that its vectors are in, which
    measures a little otherwise where the base's embeddings are kept otherwise the next time."""
    state = {name: tensor.contiguous() for name, tensor in trained_state(model).items()}
    units = [encoder.unit for encoder in residual_prompts(model)]
    with whole(folder / STATE_FILE) as partial:
        save_file(state, partial, {UNIT: repr(units[0])} if units else None)


@torch.no_grad()
def load_trained_state(model: PeftModel, folder: Path) -> None:
    """Puts a saved state into a model with the same adapter attached, bit for bit.

    Raises:
        ModelError: the file is missing, or its tensors are not those of this adapter.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise ModelError(Problem(str(file), "no such file: the adapter's state is not complete"))
    saved, here = load_file(file), trained_state(model)
    if saved.keys() != here.keys():
        odd = ", ".join(sorted(saved.keys() ^ here.keys())[:3])
        raise ModelError(Problem(str(file), f"is of another adapter than the recipe's: {odd}"))
    for name, tensor in saved.items():
        if tensor.shape != here[name].shape:
            raise ModelError(
                Problem(str(file), f"{name} is {list(tensor.shape)}, the recipe makes it {list(here[name].shape)}")
            )
        here[name].copy_(tensor)
    with safe_open(file, "pt") as opened:
        unit = (opened.metadata() or {}).get(UNIT)
    if unit is not None:  # older files have none
        for encoder in residual_prompts(model):
            encoder.unit = float(unit)


def save_adapter(model: PeftModel, folder: Path, initial: Path | None = None) -> None:
    """peft's format, which every peft user can load, and the full state beside it, which training can go on from; no
    card.

    initial: PiSSA's adapter before training. Its base was rewritten, so what is saved is the difference, a LoRA of
    twice the rank on the original base (arXiv:2404.02948, appendix C), and no state: that would belong to the rewritten
    base.
    """
    if initial is not None:
        with warnings.catch_warnings():
            # peft 0.21 loads the initial adapter beside the trained one for the difference, and warns of its own doing.
            warnings.filterwarnings("ignore", "PiSSA changes the base weights of the model")
            with without_card(model):
                model.save_pretrained(
                    folder, safe_serialization=True, path_initial_model_for_weight_conversion=str(initial)
                )
        return
    model.eval()  # peft saves what a prompt encoder computes, which must not be what its dropout leaves of it
    with without_card(model):
        model.save_pretrained(folder, safe_serialization=True)
    save_trained_state(model, folder)


@contextmanager
def without_card(model: PeftModel) -> Iterator[None]:
    """What is saved inside gets no README.md: peft's is a template whose places nobody has filled ("[More Information
    Needed]"), and compiling it takes longer than saving the adapter's tensors."""
    model.create_or_update_model_card = lambda *_: None
    try:
        yield
    finally:
        del model.create_or_update_model_card


def adapter_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """What peft has put on a base model: the adapters of its layers, and prompt encoders."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.adapter_layer_names:
                yield from getattr(module, name).parameters()
        elif isinstance(module, PeftModel) and hasattr(module, "prompt_encoder"):
            yield from module.prompt_encoder.parameters()


def load_adapter(network: PreTrainedModel, folder: Path) -> PeftModel:
    """The base model with a saved adapter on it, frozen, bit for bit in the dtype it was saved in."""
    # Left alone, peft 0.21 would round a float32 adapter to the 16 bits of its base before it is asked for anything.
    model = PeftModel.from_pretrained(network, str(folder), autocast_adapter_dtype=True)
    join_stream(model)
    if (saved := _only_dtype(folder / SAFETENSORS_WEIGHTS_NAME)) is not None:
        for parameter in adapter_parameters(model):
            parameter.data = parameter.data.to(saved)
    model.requires_grad_(False)  # peft leaves soft prompts trainable
    return model


def _only_dtype(file: Path) -> torch.dtype | None:
    """The dtype that all tensors of a file have, from its header; None where they differ."""
    with safe_open(file, "pt") as tensors:
        dtypes = {DTYPES[tensors.get_slice(name).get_dtype()] for name in tensors.keys()}  # noqa: SIM118  not a dict
    return dtypes.pop() if len(dtypes) == 1 else None
