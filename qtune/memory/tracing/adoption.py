"""The category of each storage: said by whoever holds the tensor, else inferred from how it was allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qtune.adapter.lean import adapter_copies
from qtune.memory.tracing.categories import (
    ACTIVATIONS,
    ADAPTER,
    CHECKPOINTED,
    CONSTANTS,
    EMBEDDINGS,
    GRADIENTS,
    HEAD,
    HOST,
    LOSS,
    OPTIMIZER,
    OTHER,
    PAGED,
    RECOMPUTED,
    WEIGHTS_4BIT,
    WORKSPACE,
)  # fmt: skip
from qtune.memory.tracing.ledger import LOSS_REGION
from qtune.model.kept_weights import kept_weights
from qtune.model.layer_stream import is_streamed, stream_of
from qtune.model.stored_rows import HostRows, stored_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qtune.memory.tracing.ledger import Ledger, Life
    from qtune.model.layer_stream import LayerStream

PAGED_FROM = 100_000
"""Elements of a parameter from which bitsandbytes keeps a paged optimizer's state in managed memory."""

_DTYPE_WORDS = {"uint8": "4-bit", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def dtype_word(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bf16'; packed 4-bit codes are stored as uint8 and called '4-bit'."""
    name = str(dtype).removeprefix("torch.")
    return _DTYPE_WORDS.get(name, name)


def quantization_constants(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that bitsandbytes needs to read a quantized weight back: absmax, code book, nested absmax, SCB."""
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
        state = state.state2
    scale = getattr(weight, "SCB", None)
    if isinstance(scale, torch.Tensor):
        yield scale


def _weight_of(module: Any) -> torch.Tensor | None:
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    return weight if isinstance(weight, torch.Tensor) else None


def static_tensors(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    """Every parameter, quantization constant and buffer of a model with its category.

    Trainable parameters beside frozen ones are the adapter; where everything trains, the weights are base weights.
    """
    get_input = getattr(model, "get_input_embeddings", lambda: None)
    get_output = getattr(model, "get_output_embeddings", lambda: None)
    embedding, head = _weight_of(get_input()), _weight_of(get_output())
    parameters = list(model.parameters())
    frozen_too = any(not p.requires_grad for p in parameters)
    waiting = {id(module.weight) for module in model.modules() if is_streamed(module)}
    for parameter in parameters:
        if id(parameter) in waiting:
            continue
        yield from ((constant, CONSTANTS) for constant in quantization_constants(parameter))
        if parameter.requires_grad and frozen_too:
            yield parameter, ADAPTER
        elif parameter is embedding:
            yield parameter, EMBEDDINGS
        elif parameter is head:
            yield parameter, HEAD
        else:
            yield parameter, f"base weights {dtype_word(parameter.dtype)}"
    for module in model.modules():  # Linear8bitLt moves its row scales from the weight into its state
        scale = getattr(getattr(module, "state", None), "SCB", None)
        if isinstance(scale, torch.Tensor):
            yield scale, CONSTANTS
    yield from ((buffer, OTHER) for buffer in model.buffers())


def loaded_tensors(model: torch.nn.Module, *, cuda: bool = False) -> Iterator[tuple[torch.Tensor, str]]:
    """Everything that a loaded model holds, with its category.

    cuda: a weight in host memory is beside the card, wherever its stand-in was traced; on a CPU it is memory like any.
    """
    yield from static_tensors(model)
    yield from ((copy, ADAPTER) for copy in adapter_copies(model))
    yield from ((kept.held, WORKSPACE) for kept in kept_weights(model) if kept.held is not None)
    if (stream := stream_of(model)) is not None:
        yield from _streamed_tensors(stream, cuda=cuda)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if (rows := stored_rows(module)) is not None:
            is_host = isinstance(rows, HostRows)
            for tensor in rows.tensors():
                is_apart = is_host and (cuda or tensor.device.type != module.weight.device.type)
                yield tensor, HOST if is_apart else HEAD if module is head else EMBEDDINGS


def _streamed_tensors(stream: LayerStream, *, cuda: bool) -> Iterator[tuple[torch.Tensor, str]]:
    """The layers where they wait, and what of them is on the device. Of a file memory holds no more than it likes."""
    yield from ((block, WEIGHTS_4BIT) for block in stream.blocks)
    yield from ((table, CONSTANTS) for table in stream.tables())
    yield from ((part, WEIGHTS_4BIT) for part in stream.own_parts)
    if stream.where == "host":
        is_apart = cuda or stream.homes[0].device.type != stream.blocks[0].device.type
        yield from ((home, HOST if is_apart else WEIGHTS_4BIT) for home in stream.homes)


def adopt_model(ledger: Ledger, model: torch.nn.Module) -> None:
    """Enter everything that a loaded model holds."""
    for tensor, category in loaded_tensors(model):
        ledger.adopt(tensor, category)


def adopt_gradients(ledger: Ledger, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Say which storages are gradients; call it before the optimizer step, while they are alive."""
    for parameter in parameters:
        if parameter.grad is not None:
            ledger.adopt(parameter.grad, GRADIENTS)


def adopt_optimizer(ledger: Ledger, optimizer: torch.optim.Optimizer, *, paged: bool = False) -> None:
    """Say which storages are optimizer state; call it after the step that makes them.

    paged: states as large as bitsandbytes pages (100,000 elements; bitsandbytes.optim.optimizer, `get_state_buffer`)
    are in managed memory on CUDA, whatever device the ledger saw them on.
    """
    for parameter, state in optimizer.state.items():
        is_paged = paged and parameter.numel() >= PAGED_FROM
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                ledger.adopt(value, PAGED if is_paged and name in ("state1", "state2") else OPTIMIZER)


def category_of(life: Life, phase_end: int, checkpointing: bool) -> str:
    """The category of one storage.

    `phase_end` is the first tick after the phase it was born in: what outlives a forward was kept for the backward.
    """
    if life.category:
        return life.category
    if "dequantize" in life.op:
        return WORKSPACE
    if life.module == LOSS_REGION:
        return LOSS
    if life.recomputed:
        return RECOMPUTED
    if life.phase == "forward" and life.died >= phase_end:
        return CHECKPOINTED if checkpointing else ACTIVATIONS
    return OTHER
