"""What a card can do without between uses, kept in host memory: the embedding table, the LM head, saved activations.

Nothing is computed otherwise than on the card: rows are looked up on the host and sent over, the head comes over in
blocks of vocabulary rows, and a saved activation comes back as the bits that left. Only the sums over blocks of the
head are taken in another order. Where the host is the device (no card), the same path runs with plain copies.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtune.errors import ModelError, Problem
from qtune.sizes import MIB

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    from peft import PeftModel
    from transformers import PreTrainedModel

BLOCK_BYTES = 64 * MIB
"""Weights of the head that cross the bus at once outside the loss, which goes by its own tile."""

SMALLEST_BYTES = MIB
"""Saved tensors below this stay on the card: copying them takes longer than they are worth."""


# --- embeddings and head -------------------------------------------------------------------------------------------


def modules_for_the_host(model: PreTrainedModel) -> list[Any]:
    """The input embeddings and the LM head. A head that is no plain linear layer, a quantized one for example, stays on
    the card, and embeddings that are tied to such a one stay with it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(head) is nn.Linear:
        return [embedding, head]
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    return [] if tied else [embedding]


def keep_embeddings_on_host(model: PreTrainedModel, device: str | torch.device) -> None:
    """Keeps the embeddings and the head of a frozen model in host memory, pinned where `device` is a card.

    They may have been loaded there or on the device. Tied weights stay one tensor. In the modules' place on the device
    stands a parameter of the same shape and dtype without the memory: one NaN, seen as [vocab, hidden]. Libraries find
    the embeddings by that shape (peft), read the model's device and dtype from it, and whoever multiplied with it would
    notice at once.
    """
    device = torch.device(device)
    is_card = device.type == "cuda"
    moved: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for module in modules_for_the_host(model):
        weight = module.weight
        if id(weight) not in moved:
            host = weight.detach().to("cpu") if is_card else weight.detach()
            stand_in = torch.full((1, 1), torch.nan, dtype=weight.dtype, device=device).expand(weight.shape)
            moved[id(weight)] = host.pin_memory() if is_card else host, nn.Parameter(stand_in, requires_grad=False)
        # Not a buffer: `Module.to` must leave it where it is.
        module.host_weight, module.weight = moved[id(weight)]
        module.to(device)  # a bias, a scale
        is_head = isinstance(module, nn.Linear)
        module.forward = types.MethodType(_multiply_in_blocks if is_head else _look_up, module)
        if not is_head:
            # The look-up puts other rows under the module's own forward, where a pad's number means nothing.
            module.padding_idx = None
    if is_card:
        torch.cuda.empty_cache()  # what was loaded to the card is gone, and its space should be anyone's


def host_weight(module: Any) -> Tensor | None:
    """The weight [vocab, hidden] that a module keeps in host memory; None for any other module."""
    weight = getattr(module, "host_weight", None)
    return weight if isinstance(weight, Tensor) else None


def refuse_trained_embeddings(model: PeftModel) -> None:
    """Host storage is for what is frozen.

    Raises:
        ModelError: the adapter trains the embeddings or the head, and they are in host memory.
    """
    kept = {module for module in model.modules() if host_weight(module) is not None}
    for name, module in model.named_modules():
        if getattr(module, "base_layer", None) in kept:
            reason = (
                f"the adapter trains {name.rpartition('.')[2]}, which [memory] embeddings keeps in host memory, where "
                'nothing is trained; use embeddings = "device", or take it out of adapter.target_modules'
            )
            raise ModelError(Problem("memory.embeddings", reason))


def _look_up(self: nn.Embedding, ids: Tensor) -> Tensor:
    """[batch, length] ids -> [batch, length, hidden] on the ids' device. Waits for the card, to see the ids."""
    host = host_weight(self)
    assert host is not None
    rows = functional.embedding(ids.to(host.device), host).to(ids.device)
    if type(self) is nn.Embedding:
        return rows
    # A family's own embedding does more than look up (Gemma scales): its forward runs on the rows that were found.
    stand_in = self._parameters["weight"]
    self._parameters["weight"] = rows.flatten(0, -2)  # type: ignore[assignment]
    try:
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        return type(self).forward(self, places)
    finally:
        self._parameters["weight"] = stand_in


def on_card(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on the device, also where the host is the device.

    From pinned memory the copy does not block: what uses it waits in the same stream, and nobody writes to `host`
    (PyTorch's tutorial on pin_memory and non_blocking, "Host to device").
    """
    return host.to(device, non_blocking=True, copy=True)


def _multiply_in_blocks(self: nn.Linear, hidden: Tensor) -> Tensor:
    """[..., hidden] -> logits [..., vocab]."""
    weight = host_weight(self)
    assert weight is not None
    logits: Tensor = _StreamedLinear.apply(hidden, weight)
    return logits if self.bias is None else logits + self.bias


class _StreamedLinear(torch.autograd.Function):
    """hidden @ weight.T for a weight in host memory, which crosses the bus once forward and once backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, hidden.dtype
        low = hidden.to(weight.dtype)
        logits = low.new_empty(*hidden.shape[:-1], weight.shape[0])
        for start, stop in blocks(weight, BLOCK_BYTES):
            logits[..., start:stop] = functional.linear(low, on_card(weight[start:stop], hidden.device))
        return logits

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor, None]:
        weight = ctx.weight
        low = grad_logits.to(weight.dtype)
        grad = torch.zeros(*low.shape[:-1], weight.shape[1], dtype=torch.promote_types(weight.dtype, torch.float32),
                           device=low.device)  # fmt: skip
        for start, stop in blocks(weight, BLOCK_BYTES):
            grad += low[..., start:stop] @ on_card(weight[start:stop], low.device)
        return grad.to(ctx.dtype), None


def blocks(weight: Tensor, block_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, end) of blocks of rows of at most so many bytes, at least one row each."""
    rows = max(1, block_bytes // (weight.shape[1] * weight.element_size()))
    for start in range(0, weight.shape[0], rows):
        yield start, min(start + rows, weight.shape[0])


# --- activations ---------------------------------------------------------------------------------------------------


def activations_on_host(
    model: nn.Module,
    left: Callable[[Tensor], None] = lambda tensor: None,
    returned: Callable[[Tensor], None] = lambda tensor: None,
    smallest_bytes: int = SMALLEST_BYTES,
) -> contextlib.AbstractContextManager[Any]:
    """While it is open, what autograd saves goes to host memory and comes back when the backward asks for it.

    With gradient checkpointing these are the inputs of the layers: torch's non-reentrant checkpoint saves them as any
    operation does, so that such hooks see them (torch/utils/checkpoint.py, `_NoopSaveInputs`). Parameters and buffers
    of `model` stay: they are on the card anyway. torch.autograd.graph.save_on_cpu would copy those too.

    `left` hears of each copy on the host, `returned` of each one back on the card.

    Both copies are queued without waiting. The host reads none of them, and the backward of an operation runs in the
    stream of its forward (PyTorch docs, "Stream semantics of backward passes"), so the copy back comes after the copy
    out; the caching host allocator keeps a pinned block until copies that were queued from it are done.
    """
    resident = {t.untyped_storage()._cdata for held in (model.parameters(), model.buffers()) for t in held}

    def pack(tensor: Tensor) -> Any:
        is_small = tensor.numel() * tensor.element_size() < smallest_bytes
        if is_small or tensor.layout is not torch.strided or tensor.untyped_storage()._cdata in resident:
            return tensor
        is_cuda = tensor.device.type == "cuda"
        host = torch.empty_like(tensor, device="cpu", pin_memory=is_cuda)
        left(host)
        host.copy_(tensor, non_blocking=is_cuda)
        return tensor.device, host

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        tensor = on_card(host, device)
        returned(tensor)
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
