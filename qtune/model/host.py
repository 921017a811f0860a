"""What a card can do without between uses: the embedding table and the LM head, kept in host memory or compressed, and
saved activations, kept in host memory.

From the host nothing is computed otherwise than on the card: rows are looked up there and sent over, the head comes
over in blocks of vocabulary rows, and a saved activation comes back as the bits that left. Only the sums over blocks of
the head are taken in another order. Where the host is the device (no card), the same path runs with plain copies.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtune.errors import ModelError, Problem
from qtune.model.stored_rows import CompressedRows, HostRows, StoredRows, host_weight, on_card, row_blocks, stored_rows
from qtune.sizes import MIB

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from peft import PeftModel
    from transformers import PreTrainedModel

SMALLEST_BYTES = MIB
"""Saved tensors below this stay on the card: copying them takes longer than they are worth."""


# --- embeddings and head -------------------------------------------------------------------------------------------


def frozen_tables(model: PreTrainedModel) -> list[Any]:
    """The input embeddings and the LM head. A head that is no plain linear layer, a quantized one for example, stays on
    the card, and embeddings that are tied to such a one stay with it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(head) is nn.Linear:
        return [embedding, head]
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    return [] if tied else [embedding]


def store_embeddings(model: PreTrainedModel, how: str, device: str | torch.device) -> None:
    """Keeps the embeddings and the head of a frozen model as [memory] embeddings says.

    how: "device": as they are; "host": in host memory, pinned where `device` is a card; "int8", "nf4": compressed.

    They may have been loaded to the host or to the device. Tied weights stay one. In the modules' place on the device
    stands a parameter of the same shape and dtype without the memory: one NaN, seen as [vocab, hidden]. Libraries find
    the embeddings by that shape (peft), read the model's device and dtype from it, and whoever multiplied with it would
    notice at once.

    Raises:
        ModelError: the rows cannot be compressed in whole blocks.
    """
    if how == "device":
        return
    device = torch.device(device)
    stored: dict[int, tuple[StoredRows, nn.Parameter]] = {}
    for module in frozen_tables(model):
        weight = module.weight
        if id(weight) not in stored:
            rows = _on_host(weight, device) if how == "host" else CompressedRows(weight, how, device)
            stand_in = torch.full((1, 1), torch.nan, dtype=weight.dtype, device=device).expand(weight.shape)
            stored[id(weight)] = rows, nn.Parameter(stand_in, requires_grad=False)
        # Not a buffer: `Module.to` must leave it where it is.
        module.stored_rows, module.weight = stored[id(weight)]
        module.to(device)  # a bias, a scale
        is_head = isinstance(module, nn.Linear)
        module.forward = types.MethodType(_multiply_in_blocks if is_head else _look_up, module)
        if not is_head:
            # The look-up puts other rows under the module's own forward, where a pad's number means nothing.
            module.padding_idx = None
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was loaded to the card is gone, and its space should be anyone's


def _on_host(weight: Tensor, device: torch.device) -> HostRows:
    is_card = device.type == "cuda"
    host = weight.detach().to("cpu") if is_card else weight.detach()
    return HostRows(host.pin_memory() if is_card else host)


def refuse_trained_embeddings(model: PeftModel) -> None:
    """Other storage is for what is frozen.

    Raises:
        ModelError: the adapter trains the embeddings or the head, and they are in host memory or compressed.
    """
    kept = {module for module in model.modules() if stored_rows(module) is not None}
    for name, module in model.named_modules():
        if (base := getattr(module, "base_layer", None)) in kept:
            where = "keeps in host memory" if host_weight(base) is not None else "compresses"
            reason = (
                f"the adapter trains {name.rpartition('.')[2]}, which [memory] embeddings {where}, where "
                'nothing is trained; use embeddings = "device", or take it out of adapter.target_modules'
            )
            raise ModelError(Problem("memory.embeddings", reason))


def _look_up(self: nn.Embedding, ids: Tensor) -> Tensor:
    """[batch, length] ids -> [batch, length, hidden] on the ids' device."""
    stored = stored_rows(self)
    assert stored is not None
    rows = stored.look_up(ids)
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


def _multiply_in_blocks(self: nn.Linear, hidden: Tensor) -> Tensor:
    """[..., hidden] -> logits [..., vocab]."""
    rows = stored_rows(self)
    assert rows is not None
    logits: Tensor = _StreamedLinear.apply(hidden, rows)
    return logits if self.bias is None else logits + self.bias


class _StreamedLinear(torch.autograd.Function):
    """hidden @ rows.T for rows that come in blocks, once forward and once backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: StoredRows) -> Tensor:
        ctx.rows, ctx.dtype = rows, hidden.dtype
        low = hidden.to(rows.dtype)
        logits = low.new_empty(*hidden.shape[:-1], rows.shape[0])
        for start, stop in row_blocks(rows):
            logits[..., start:stop] = functional.linear(low, rows.block(start, stop, hidden.device))
        return logits

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor, None]:
        rows = ctx.rows
        low = grad_logits.to(rows.dtype)
        grad = torch.zeros(*low.shape[:-1], rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32),
                           device=low.device)  # fmt: skip
        for start, stop in row_blocks(rows):
            grad += low[..., start:stop] @ rows.block(start, stop, low.device)
        return grad.to(ctx.dtype), None


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
