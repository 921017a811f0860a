"""Models larger than the memory: weights stay on the disk, each module reads its own when it runs and drops them.

A forward pass takes the memory of its largest module. Quantized layers are real bitsandbytes layers, and adapters are
peft's own, so that the trained model of a comparison owes nothing to the code that merged.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtune.errors import ModelError, Problem
from qtune.export.adapter_weights import WEIGHTS
from qtune.export.basis import Basis
from qtune.export.layout import Layout, empty_model, layout_of, with_4_bit_layers
from qtune.model.checkpoint import Checkpoint

Read = Callable[[str], Tensor]

NEEDS_MEMORY = (
    "cannot be compared module by module, and the whole models do not fit into the memory; "
    "where there is more of it: qtune export RUN --verify-only DIR"
)


def streamed_exported(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """An exported folder as a model in `dtype` that reads its weights while it runs."""
    checkpoint = Checkpoint.open(folder)
    model = empty_model(folder, trust_remote_code=trust_remote_code)
    layout = layout_of(
        empty_model(folder, trust_remote_code=trust_remote_code), list(checkpoint.tensors), replace_layers=False
    )
    _stream(model, _reader(checkpoint, layout, dtype), None)
    return model.eval()


def streamed_trained(base: Path, adapter: Path, basis: Basis, *, trust_remote_code: bool = False) -> PeftModel:
    """The model that was trained, quantized module by module while it runs, with peft's adapter in memory.

    Raises ModelError for int8, whose layers keep what they quantized, and for DoRA on 4 bits: peft 0.21 copies the
    base layers when it reads one, which are not there.
    """
    is_dora = getattr(PeftConfig.from_pretrained(str(adapter)), "use_dora", False)
    if basis.kind == "int8" or (is_dora and basis.kind != "none"):
        what = "an int8 base" if basis.kind == "int8" else "DoRA on a 4-bit base"
        raise ModelError(Problem(str(base), f"{what} {NEEDS_MEMORY}"))
    checkpoint = Checkpoint.open(base)
    model = empty_model(base, trust_remote_code=trust_remote_code)
    layout = layout_of(empty_model(base, trust_remote_code=trust_remote_code), list(checkpoint.tensors))
    if basis.kind != "none":
        with_4_bit_layers(model)
        vars(model)["is_loaded_in_4bit"] = True
    adapted = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    _fill_adapter(adapted, load_file(adapter / WEIGHTS))
    _stream(adapted.get_base_model(), _reader(checkpoint, layout, basis.load_dtype), basis)
    return adapted.eval()


def _fill_adapter(adapted: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Puts the adapter's tensors into memory; peft leaves them where the base is, on the meta device."""
    for name, module in adapted.named_modules():
        for key, parameter in module._parameters.items():
            path = f"{name}.{key}".replace(".modules_to_save.default.", ".").replace(".default", "")
            if parameter is not None and parameter.is_meta and path in tensors:
                module._parameters[key] = nn.Parameter(tensors[path], requires_grad=False)


def _reader(checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype) -> Read:
    """Reads a parameter by its name in the model; a tied one from where it is stored."""
    names = {parameter: name for name, parameter in layout.parameters.items()}

    def read(parameter: str) -> Tensor:
        stored = checkpoint.read(names[parameter] if parameter in names else names[layout.tied[parameter]])
        kept = parameter in layout.kept_in_fp32 or not stored.is_floating_point()
        return stored if kept else stored.to(dtype)

    return read


def _stream(model: PreTrainedModel, read: Read, basis: Basis | None) -> None:
    """Gives every module with weights on the meta device hooks that load and drop them."""
    _fill_buffers(model)
    wrapped: set[nn.Module] = set()
    for name, module in list(model.named_modules()):
        if module in wrapped:
            continue
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if inner is not module:
            # Adapters look at their base layer's weight before and after it runs (DoRA takes its norm).
            wrapped.add(inner)
        if any(parameter.is_meta for parameter in inner.parameters(recurse=False)):
            load, drop = _hooks(name.removesuffix(".original_module"), inner, read, basis)
            module.register_forward_pre_hook(load)
            module.register_forward_hook(drop)


def _hooks(
    name: str, module: nn.Module, read: Read, basis: Basis | None
) -> tuple[Callable[..., None], Callable[..., None]]:
    empty = {key: value for key, value in module._parameters.items() if value is not None and value.is_meta}

    def load(*_: Any) -> None:
        for key in empty:
            value = read(f"{name}.{key}")
            if isinstance(module, bnb.nn.Linear4bit) and key == "weight" and basis is not None:
                packed = bnb.nn.Params4bit(
                    value,
                    requires_grad=False,
                    quant_type=basis.kind,
                    compress_statistics=basis.double_quantization,
                    module=module,
                )
                module._parameters[key] = packed.to("cpu")
                module.compute_dtype, module.compute_type_is_set = basis.compute_dtype, True
            else:
                module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def drop(*_: Any) -> None:
        module._parameters.update(empty)

    return load, drop


def _fill_buffers(model: PreTrainedModel) -> None:
    """Buffers that no checkpoint holds (rotary frequencies), computed as loading computes them."""
    for module in model.modules():
        empty = {key: value for key, value in module._buffers.items() if value is not None and value.is_meta}
        if empty:
            for key, value in empty.items():
                module._buffers[key] = torch.empty_like(value, device="cpu")
            model._init_weights(module)
