"""Models larger than the memory: weights stay on the disk, each module reads its own when it runs and drops them.

A forward pass takes the memory of its largest module, and computes exactly: float32 activations on the values that the
weights have. Quantized weights make their way through bitsandbytes itself, and adapters are peft's own, so that the
trained model of a comparison owes nothing to the code that merged.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtune.export.adapter_weights import WEIGHTS
from qtune.export.basis import Basis
from qtune.export.layout import Layout, empty_model, layout_of
from qtune.export.verify.exact import is_low
from qtune.model.checkpoint import Checkpoint, tensors_of
from qtune.model.completeness import require_complete
from qtune.model.packed import ROW_SCALES, read_statistics

DORA = "lora_magnitude_vector.weight"

Read = Callable[[str], Tensor]
"""A parameter's name in the model -> its values in float32, or as they are stored where they are no numbers."""


def streamed_exported(folder: Path, device: torch.device, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """An exported folder as a model that reads its weights to `device` while it runs."""
    model = empty_model(folder, trust_remote_code=trust_remote_code)
    checkpoint = require_complete(folder, model.config)
    layout = layout_of(
        empty_model(folder, trust_remote_code=trust_remote_code), list(checkpoint.tensors), replace_layers=False
    )
    _stream(model, _reader(checkpoint, layout, None, device), device)
    return model.eval()


def streamed_trained(
    base: Path, adapter: Path, basis: Basis, device: torch.device, *, trust_remote_code: bool = False
) -> PeftModel:
    """The model that was trained, quantized on `device` module by module while it runs, peft's adapter in memory."""
    model = empty_model(base, trust_remote_code=trust_remote_code)
    checkpoint = require_complete(base, model.config)
    layout = layout_of(empty_model(base, trust_remote_code=trust_remote_code), list(checkpoint.tensors))
    with warnings.catch_warnings():
        # An adapter that was trained on GPT-2's layers in 4 bits says nothing of how they are stored.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
        warnings.filterwarnings("ignore", "for weight: copying from a non-meta parameter")  # `_fill_adapter` does it
        adapted = PeftModel.from_pretrained(model, str(adapter), low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    _fill_adapter(adapted, tensors_of(adapter / WEIGHTS), device)
    _stream(adapted.get_base_model(), _reader(checkpoint, layout, basis, device), device)
    return adapted.eval()


def _fill_adapter(adapted: PeftModel, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Puts the adapter's tensors into memory; peft leaves them where the base is, on the meta device."""
    if adapted.peft_config[adapted.active_adapter].is_prompt_learning:
        vectors = tensors["prompt_embeddings"].float().to(device)
        adapted.prompt_encoder[adapted.active_adapter].embedding.weight = nn.Parameter(vectors, requires_grad=False)
    for name, module in adapted.named_modules():
        for key, parameter in module._parameters.items():
            path = f"{name}.{key}".replace(".modules_to_save.default.", ".").replace(".default", "")
            if path.endswith(DORA):  # saved without the name of its only parameter
                path = path.removesuffix(".weight")
            if parameter is not None and parameter.is_meta and path in tensors:
                wide = tensors[path].float() if is_low(tensors[path]) else tensors[path]
                module._parameters[key] = nn.Parameter(wide.to(device), requires_grad=False)


def _reader(checkpoint: Checkpoint, layout: Layout, basis: Basis | None, device: torch.device) -> Read:
    """Reads a parameter by its name in the model; a tied one from where it is stored. `basis`: how training held it."""
    names = {parameter: name for name, parameter in layout.parameters.items()}

    def read(parameter: str) -> Tensor:
        name = names[parameter] if parameter in names else names[layout.tied[parameter]]
        stored = checkpoint.read_finite(name).to(device)
        if basis is not None and (statistics := read_statistics(name, checkpoint)):
            values = _unpacked(stored, statistics, basis).float()
            return values.T if parameter in layout.transposed else values
        if not stored.is_floating_point():
            return stored
        if basis is None or parameter in layout.kept_in_fp32:
            return stored.float()
        held = stored.to(basis.load_dtype)
        if basis.kind == "none" or parameter not in layout.quantized:
            return held.float()
        turned = parameter in layout.transposed
        values = _through_bitsandbytes(held.T.contiguous() if turned else held, basis).float()
        return values.T if turned else values

    return read


def _unpacked(codes: Tensor, statistics: dict[str, Tensor], basis: Basis) -> Tensor:
    """[out, in] as a layer dequantizes the codes that a checkpoint brought."""
    values: Tensor
    if ROW_SCALES in statistics:
        values = int8_vectorwise_dequant(codes, statistics[ROW_SCALES].to(codes.device))
        return values
    state = QuantState.from_dict(dict(statistics), device=codes.device)
    state.dtype = basis.compute_dtype
    values = dequantize_4bit(codes, state)
    return values


def _through_bitsandbytes(weight: Tensor, basis: Basis) -> Tensor:
    """[out, in] quantized as loading does and dequantized as each product does."""
    values: Tensor
    if basis.kind == "int8":
        codes, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
        values = int8_vectorwise_dequant(codes, scales)
        return values
    packed, state = quantize_4bit(weight, quant_type=basis.kind, compress_statistics=basis.double_quantization)
    state.dtype = basis.compute_dtype
    values = dequantize_4bit(packed, state)
    return values


def _stream(model: PreTrainedModel, read: Read, device: torch.device) -> None:
    """Gives every module with weights on the meta device hooks that load and drop them."""
    _fill_buffers(model, device)
    wrapped: set[nn.Module] = set()
    for name, module in list(model.named_modules()):
        if module in wrapped:
            continue
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if inner is not module:
            # Adapters look at their base layer's weight before and after it runs (DoRA takes its norm).
            wrapped.add(inner)
        if any(parameter.is_meta for parameter in inner.parameters(recurse=False)):
            load, drop = _hooks(name.removesuffix(".original_module"), inner, read)
            module.register_forward_pre_hook(load)
            module.register_forward_hook(drop)


def _hooks(name: str, module: nn.Module, read: Read) -> tuple[Callable[..., None], Callable[..., None]]:
    empty = {key: value for key, value in module._parameters.items() if value is not None and value.is_meta}

    def load(*_: Any) -> None:
        for key in empty:
            module._parameters[key] = nn.Parameter(read(f"{name}.{key}"), requires_grad=False)

    def drop(*_: Any) -> None:
        module._parameters.update(empty)

    return load, drop


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies), computed as loading computes them."""
    for module in model.modules():
        empty = {key: value for key, value in module._buffers.items() if value is not None and value.is_meta}
        if empty:
            for key, value in empty.items():
                module._buffers[key] = torch.empty_like(value, device=device)
            model._init_weights(module)
