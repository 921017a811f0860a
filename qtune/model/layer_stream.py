"""Frozen 4-bit layers that wait in host memory or on disk, and come to the device one ahead of their use.

On the device there are a few blocks, each large enough for any layer. Whoever multiplies with a weight asks for it then
and there, in the forward, in a checkpoint's recomputation and in the backward, and is given views of the block that
holds the layer at that moment; nobody keeps them. (bitsandbytes' MatMul4Bit keeps the packed weight of the forward
outside of `save_for_backward`; in a block that has been filled anew since, that is another layer's, and gradients are
wrong while loss and logits are right: bitsandbytes#2034.)

On a card a layer crosses the bus in one copy on a stream of its own, while the layer before it is computed. From the
disk a thread reads it first. Where the host is the device the same blocks are filled by plain copies.
"""

from __future__ import annotations

import os
import tempfile
import types
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch.nn import functional

from qtune.cache import cache_folder
from qtune.errors import ModelError, Problem
from qtune.kernels.ops import dequantized
from qtune.model.checkpointed import switched_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

BLOCKS = 2
"""On the device: of the layer that is computed, and of the one that comes next."""

ALIGNMENT = 256
"""Bytes: where a tensor may begin in a block."""


@dataclass(frozen=True)
class Region:
    """A tensor's place in a block."""

    start: int
    """In bytes."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        """The end of its bytes."""
        return self.start + prod(self.shape) * self.dtype.itemsize

    def of(self, block: Tensor) -> Tensor:
        """The tensor that lies there; block: [bytes] of uint8."""
        return block[self.start : self.stop].view(self.dtype).view(self.shape)


class Packed:
    """A 4-bit weight that travels: what of it lies in its layer's block, and the small tables that stay."""

    def __init__(self, module: Any, start: int) -> None:
        weight, state = module.weight, module.weight.quant_state
        self.module, self.state = module, state
        travels = {"codes": weight.data, "absmax": state.absmax}
        if state.nested:
            travels["nested"] = state.state2.absmax
        self.pieces: dict[str, Region] = {}
        for name, tensor in travels.items():
            piece = Region(-(-start // ALIGNMENT) * ALIGNMENT, tuple(tensor.shape), tensor.dtype)
            self.pieces[name], start = piece, piece.stop
        self.stop = start
        self.code, self.nested_code, self.offset = state.code, None, None
        if state.nested:
            self.nested_code, self.offset = state.state2.code, state.offset

    def be_nowhere(self) -> None:
        """The weight is to be had from the stream alone; what it was is let go of."""
        for tensor in (
            self.module.weight,
            self.state.absmax,
            *([self.state.state2.absmax] if self.state.nested else []),
        ):
            tensor.data = tensor.data.new_empty(0)
        self.module.quant_state = self.state

    def leave(self, home: Tensor) -> None:
        """The weight and its absmax are what lies in `home`, the layer's block on the host."""
        self.module.weight.data = self.pieces["codes"].of(home)
        self.state.absmax = self.pieces["absmax"].of(home)
        if self.state.nested:
            self.state.state2.absmax = self.pieces["nested"].of(home)
        self.module.quant_state = self.module.weight.quant_state

    def write(self, home: Tensor) -> None:
        """Copies what travels into the layer's block on the host."""
        self.pieces["codes"].of(home).copy_(self.module.weight.data)
        self.pieces["absmax"].of(home).copy_(self.state.absmax)
        if self.state.nested:
            self.pieces["nested"].of(home).copy_(self.state.state2.absmax)

    def stay(self, convert: Callable[[Tensor], Tensor]) -> None:
        """The small tables, through `convert`."""
        self.code = convert(self.code)
        if self.nested_code is not None and self.offset is not None:
            self.nested_code, self.offset = convert(self.nested_code), convert(self.offset)

    def tables(self) -> list[Tensor]:
        """What stays on the device of this weight."""
        return [tensor for tensor in (self.code, self.nested_code, self.offset) if tensor is not None]

    def views(self, block: Tensor) -> tuple[Tensor, QuantState]:
        """The weight as it lies in a block on the device."""
        state, nested = self.state, None
        if state.nested:
            nested = QuantState(
                absmax=self.pieces["nested"].of(block), code=self.nested_code, blocksize=state.state2.blocksize,
                dtype=state.state2.dtype,
            )  # fmt: skip
        here = QuantState(
            absmax=self.pieces["absmax"].of(block), shape=state.shape, code=self.code, blocksize=state.blocksize,
            quant_type=state.quant_type, dtype=state.dtype, offset=self.offset, state2=nested,
        )  # fmt: skip
        return self.pieces["codes"].of(block), here


class LayerStream:
    """The layers of one model: where they wait, and which of them are on the device."""

    def __init__(self, layers: Sequence[Sequence[Any]], where: str, device: torch.device, blocks: int = BLOCKS) -> None:
        """layers: the `Linear4bit` modules of each layer, in the order of the forward. where: "host", "disk" or, of a
        model on the meta device, "sharded", which is `ShardedStream`'s elsewhere."""
        self.where, self.device = where, device
        self.layers: list[list[Packed]] = []
        self.homes: list[Tensor] = []
        for modules in layers:
            packed: list[Packed] = []
            for module in modules:
                packed.append(Packed(module, packed[-1].stop if packed else 0))
            self.layers.append(packed)
            self.homes.append(self._home(packed))
            for weight in packed:
                weight.leave(self.homes[-1])
                weight.stay(lambda tensor: tensor.to(device))
        size = max(home.numel() for home in self.homes)
        self.blocks = self._made_blocks(size, min(blocks, len(layers)))
        self.parts = 1
        """Among how many processes a layer is shared out."""
        self.own_parts: list[Tensor] = []
        """What a process holds of shared layers, in a trace."""
        self.loads = 0
        """Layers that have come to the device so far."""
        self.holds: list[int | None] = [None] * len(self.blocks)
        self._now: int | None = None
        self.made_views: dict[tuple[int, int, int], tuple[Tensor, QuantState]] = {}
        is_card = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if is_card else None
        self.arrived: list[Any] = [None] * len(self.blocks)
        """The event of a block's copy, or the future of one, until somebody has waited for it."""
        self._thread = ThreadPoolExecutor(1, "layers") if where == "disk" and device.type != "meta" else None
        self._staging = torch.empty(size, dtype=torch.uint8).pin_memory() if is_card and where == "disk" else None

    def _made_blocks(self, size: int, count: int) -> list[Tensor]:
        # A layer that is brought together from parts takes as much once more until they are in their places.
        spare = 1 if self.where == "sharded" else 0
        return [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(count + spare)]

    def _home(self, packed: list[Packed]) -> Tensor:
        """A layer's block, filled, where it waits."""
        size = packed[-1].stop
        is_real = packed[0].module.weight.device.type != "meta"
        pinned = is_real and self.where == "host" and self.device.type == "cuda"
        # Zeros, so that what lies between two tensors is the same in every process.
        home = torch.zeros(size, dtype=torch.uint8, device="cpu" if is_real else "meta", pin_memory=pinned)
        for weight in packed:
            weight.write(home)
        return _on_disk(home) if is_real and self.where == "disk" else home

    def through(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Every tensor of the stream's own, through `convert`: a trace gives them another kind of storage, in which
        nothing is anywhere yet and nothing is read from a disk."""
        if self.where == "sharded":
            self.own_parts = [convert(home.new_empty(-(-home.numel() // self.parts))) for home in self.homes]
        self.homes, self.blocks = [convert(home) for home in self.homes], [convert(block) for block in self.blocks]
        for weight in (weight for packed in self.layers for weight in packed):
            weight.stay(convert)
        self.made_views.clear()
        self._thread = None

    def rest(self) -> None:
        """As after a step: the first layers are here. For a trace, whose tensors hold nothing anyway."""
        self.holds, self._now = list(range(len(self.blocks))), 0

    def tables(self) -> list[Tensor]:
        """What stays on the device of every weight."""
        return [table for packed in self.layers for weight in packed for table in weight.tables()]

    def read(self, layer: int, place: int) -> tuple[Tensor, QuantState]:
        """(codes, state) of the layer's weight at `place`, on the device, for what is queued there next and no longer;
        the layer after it is sent for."""
        if layer != self._now:
            self._turn_to(layer)
        block = self.holds.index(layer)
        self._wait_for(block)
        key = (layer, place, block)
        if key not in self.made_views:
            self.made_views[key] = self.layers[layer][place].views(self.blocks[block])
        return self.made_views[key]

    def _turn_to(self, layer: int) -> None:
        """A layer is about to be computed: it has to be here, and its successors should be on their way."""
        last = len(self.homes) - 1
        is_ascending = layer == 0 or (layer != last and (self._now is None or layer > self._now))
        step = 1 if is_ascending else -1
        self._now = layer
        wanted = [place for place in range(layer, layer + step * len(self.blocks), step) if 0 <= place <= last]
        for coming in wanted:
            if coming not in self.holds:
                free = next(block for block, held in enumerate(self.holds) if held not in wanted)
                self._load(coming, free)

    def _load(self, layer: int, block: int) -> None:
        """Sends for a layer. What the device has been given to do so far may still read what the block holds."""
        self._wait_for(block)
        self.holds[block] = layer
        self.loads += 1
        used = None if self._side is None else torch.cuda.current_stream(self.device).record_event()
        if self._thread is not None:
            self.arrived[block] = self._thread.submit(self._from_disk, layer, block, used)
        else:
            self.arrived[block] = self._copy(self.homes[layer], block, used)

    def _copy(self, home: Tensor, block: int, used: Any) -> Any:
        target = self.blocks[block][: home.numel()]
        if self._side is None:
            torch.ops.qtune.load_layer.default(target, home)
            return None
        with torch.cuda.stream(self._side):
            self._side.wait_event(used)
            torch.ops.qtune.load_layer.default(target, home)
            return self._side.record_event()

    def _from_disk(self, layer: int, block: int, used: Any) -> Any:
        """In the reading thread. A card copies from pinned memory alone without being waited for."""
        home = self.homes[layer]
        if self._staging is None or self._side is None:
            return self._copy(home, block, used)
        self._side.synchronize()  # the layer before has left the pinned memory
        staged = self._staging[: home.numel()]
        staged.copy_(home)
        return self._copy(staged, block, used)

    def _wait_for(self, block: int) -> None:
        """What is queued from here on finds the block filled."""
        arrived = self.arrived[block]
        if isinstance(arrived, Future):
            arrived = arrived.result()
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        self.arrived[block] = None


def _on_disk(home: Tensor) -> Tensor:
    """The same bytes, mapped from a file that nobody else sees and that goes with the process, however that ends.

    Raises:
        OSError: the disk is full.
    """
    folder = cache_folder() / "layers"
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:  # not through the mapping: on a full disk that is a signal, no error
            file.write(home.numpy().data)
        return torch.from_file(name, shared=False, size=home.numel(), dtype=torch.uint8)
    finally:
        Path(name).unlink()


@dataclass(frozen=True)
class Address:
    """A weight in a stream."""

    stream: LayerStream
    layer: int
    weight: int


def stream_of(model: nn.Module) -> LayerStream | None:
    """What brings a model's layers to the device; None where they are there."""
    return next((place.stream for module in model.modules() if (place := _place(module)) is not None), None)


def _place(module: nn.Module) -> Address | None:
    place = getattr(module, "place_in_stream", None)
    return place if isinstance(place, Address) else None


def is_streamed(module: nn.Module) -> bool:
    """Whether a module's weight waits elsewhere."""
    return _place(module) is not None


def packed_weight(module: Any) -> tuple[Tensor, QuantState]:
    """(codes, state) of a `Linear4bit`, on the device, for what is computed next and no longer."""
    place = _place(module)
    if place is None:
        return module.weight, module.weight.quant_state
    return place.stream.read(place.layer, place.weight)


def stream_layers(
    network: PreTrainedModel,
    where: str,
    device: str | torch.device,
    blocks: int = BLOCKS,
    *,
    stream_type: type[LayerStream] = LayerStream,
    parts: int = 1,
) -> None:
    """Keeps the 4-bit weights of a frozen model's layers in host memory (`where` = "host") or on disk, and everything
    else on the device, except what the host keeps already. Loaded may all of it be to the host.

    stream_type: what brings them. parts: among how many processes "sharded" layers of a model on the meta device are
    shared out.

    A module's own weight is then the host's: whoever reads weights one by one finds them there.

    Raises:
        ModelError: the model has no layers in 4 bits.
    """
    device = torch.device(device)
    layers = [list(_four_bit(layer)) for layer in switched_layers(network)]
    if not layers or not all(layers):
        reason = f'the layers of {type(network).__name__} are not in 4 bits, and only such can wait there; use "device"'
        raise ModelError(Problem("memory.layers", reason))
    stream = stream_type(layers, where, device, blocks)
    stream.parts = parts
    for number, modules in enumerate(layers):
        for place, module in enumerate(modules):
            module.place_in_stream = Address(stream, number, place)
            module.forward = types.MethodType(_multiply, module)
    _move_the_rest(network, device)
    if hasattr(network, "hf_device_map"):
        vars(network)["hf_device_map"] = {"": str(device)}  # what accelerate compares with the device of a run


def join_stream(model: nn.Module) -> None:
    """Puts what has come to a model since, an adapter, where its layers are computed: peft puts it beside weights."""
    if (stream := stream_of(model)) is not None:
        _move_the_rest(model, stream.device)


def _four_bit(layer: nn.Module) -> Iterator[Any]:
    return (module for module in layer.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))


def _move_the_rest(network: nn.Module, device: torch.device) -> None:
    for module in network.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and not is_streamed(module):
            module.to(device)
            continue
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            is_kept = is_streamed(module) and name == "weight"
            if not is_kept and tensor.device != device:
                tensor.data = tensor.data.to(device)


class _Product(torch.autograd.Function):
    """x Wᵀ + b for the weight of a streamed module, which is asked for where it is multiplied, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        bias = None if module.bias is None else module.bias.to(x.dtype)  # frozen
        return functional.linear(x, _weight(module, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ _weight(ctx.module, grad.dtype), None


def _weight(module: Any, dtype: torch.dtype) -> Tensor:
    """[out, in], in a buffer of its own."""
    return dequantized(*packed_weight(module)).to(dtype)


def _multiply(self: Any, x: Tensor) -> Tensor:
    """`Linear4bit.forward` of bitsandbytes 0.50: computed in the layer's type, returned in the input's."""
    given = x.dtype
    if not self.compute_type_is_set:
        self.set_compute_type(x)
        self.compute_type_is_set = True
    if self.compute_dtype is not None:
        x = x.to(self.compute_dtype)
    y: Tensor = _Product.apply(x, self)
    return y.to(given)
