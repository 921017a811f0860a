"""A model computed exactly: float32 activations on the values that its weights have, whatever they are stored in.

A live model in 16 bits is itself further from its own exact self than a good export is: bfloat16 activations alone cost
a KL divergence of 1e-3 to 1e-2. What is compared is therefore what the weights say, without the noise of the
products. Weights stay as they are stored; each module's are widened while it runs, so that a model takes the memory of
its largest module more.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor, nn
from torch.nn.functional import linear

from qtune.adapter.state import adapter_parameters


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While the block runs, `model` computes in float32: quantized layers on the values that they multiply with (4-bit
    ones rounded to the compute dtype, as in training), 16-bit weights and adapters on their own values."""
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as undo:
        undo.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")  # no TF32 on cards that have it
        # peft looks at the dtype of an adapter's weights before it calls them.
        for parameter in adapter_parameters(model):
            if is_low(parameter):
                undo.callback(setattr, parameter, "data", parameter.data)
                parameter.data = parameter.data.float()
        for module in model.modules():
            if (forward := _exact_forward(module)) is not None:
                _replace_forward(module, forward, undo)
        yield


def is_low(tensor: Tensor | None) -> bool:
    """Whether a tensor holds floating-point numbers that float32 holds more exactly."""
    return tensor is not None and tensor.is_floating_point() and tensor.element_size() < 4


def four_bit_values(layer: bnb.nn.Linear4bit) -> Tensor:
    """[out, in]: what a 4-bit layer multiplies with, in its compute dtype."""
    state = copy.copy(layer.weight.quant_state)
    state.dtype = layer.compute_dtype or state.dtype
    values: Tensor = dequantize_4bit(layer.weight.data, state)
    return values


def int8_values(layer: bnb.nn.Linear8bitLt) -> Tensor:
    """[out, in] in float32: codes and scales of LLM.int8(), which applies the scales to its float32 results."""
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    values: Tensor = int8_vectorwise_dequant(layer.weight.data, scales)
    return values.float()


def _exact_forward(module: nn.Module) -> Callable[..., Any] | None:
    """A forward in float32 for a module that has weights of its own in fewer bits."""
    if isinstance(module, bnb.nn.Linear4bit):
        return lambda inputs: linear(inputs, four_bit_values(module).float(), _wide(module.bias))
    if isinstance(module, bnb.nn.Linear8bitLt):
        return lambda inputs: linear(inputs, int8_values(module), _wide(module.bias))
    if not any(map(is_low, [*module._parameters.values(), *module._buffers.values()])):
        return None
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        parameters, buffers = dict(module._parameters), dict(module._buffers)
        module._parameters.update({name: _wide(value) for name, value in parameters.items()})
        module._buffers.update({name: _wide(value) for name, value in buffers.items()})
        try:
            return own(*args, **kwargs)
        finally:
            module._parameters.update(parameters)
            module._buffers.update(buffers)

    return forward


def _wide(tensor: Any) -> Any:
    if not is_low(tensor):
        return tensor
    wide = tensor.detach().float()
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def _replace_forward(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    before = vars(module).get("forward")
    if before is None:
        undo.callback(delattr, module, "forward")
    else:
        undo.callback(setattr, module, "forward", before)
    module.forward = forward
