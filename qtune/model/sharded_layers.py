"""Frozen 4-bit layers of which every process holds a part on its device: PyTorch's FSDP2 brings a layer together.

A layer's packed weights and their absmax are one block of bytes, of which `fully_shard` leaves each process 1/N.
Whoever multiplies asks for the layer there (`layer_stream`), which gathers it and the one that comes next; the one
before is let go of. They are bytes to FSDP too: weights that are stored as bfloat16 can be changed where their bytes
look like no number (bitsandbytes#1945), and accelerate 1.15 leaves weights of bytes out of its shards
(accelerate#3983), so neither is used.

Nothing is taken on trust: before the first step every layer is gathered once and compared with what was cut up, byte by
byte, and what this process holds is counted.

All processes have to go through the layers the same number of times, forward and backward, or they wait for one another
for ever: so a process whose memory runs out cannot try again, and nobody goes through them alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from qtune.device.peers import noticing_loss
from qtune.errors import ModelError, Problem, SaidElsewhere
from qtune.model.layer_stream import LayerStream
from qtune.sizes import size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

_INSTEAD = 'without memory.layers = "sharded" each process holds the whole base; with "host" or "disk" it waits there'


class _Block(nn.Module):
    """A layer's bytes as a parameter, which is what FSDP knows."""

    def __init__(self, block: Tensor) -> None:
        super().__init__()
        self.block = nn.Parameter(block, requires_grad=False)


class ShardedStream(LayerStream):
    """The layers of one model, spread over the processes."""

    def __init__(self, layers: Sequence[Sequence[Any]], where: str, device: torch.device, blocks: int = 2) -> None:
        super().__init__(layers, where, device, blocks)
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        self.shards: list[Any] = []
        for number, home in enumerate(self.homes):
            self.shards.append(_cut_up(home.to(device, copy=True), mesh))
            for weight in self.layers[number]:
                weight.be_nowhere()
            self._require_same(number, home)
            self.homes[number] = _own_part(self.shards[-1])

    def __str__(self) -> str:
        held, whole = sum(home.numel() for home in self.homes), sum(packed[-1].stop for packed in self.layers)
        return (
            f"each process holds {size_text(held)} of {size_text(whole)} of 4-bit layers; brought together, every "
            "layer was the same, byte by byte"
        )

    def _made_blocks(self, size: int, count: int) -> list[Tensor]:
        return [torch.empty(0, dtype=torch.uint8, device=self.device)] * count

    def _require_same(self, number: int, home: Tensor) -> None:
        """Raises:
        ModelError: the layer is not what it was once it has been cut up and brought together, or is not smaller.
        """
        shard = self.shards[number]
        part, parts = _own_part(shard).numel(), distributed.get_world_size()
        with noticing_loss():
            shard.unshard()
            block = shard.block.data
            same = torch.equal(block.cpu(), home)
            shard.reshard()
            smaller = part <= -(-home.numel() // parts) and block.untyped_storage().nbytes() == 0
            agreed = torch.tensor([int(same), int(smaller)])
            distributed.all_reduce(agreed, op=distributed.ReduceOp.MIN)
        if not agreed[0]:
            reason = f"layer {number} is not the same after FSDP has cut it up and brought it together"
        elif not agreed[1]:
            reason = f"FSDP has left {part} of {home.numel()} bytes of layer {number} with one of {parts} processes"
        else:
            return
        if distributed.get_rank():  # all have agreed, and one says it
            raise SaidElsewhere(ModelError.exit_code)
        raise ModelError(Problem('memory.layers = "sharded"', f"{reason} (torch {torch.__version__}); {_INSTEAD}"))

    def _load(self, layer: int, block: int) -> None:
        """Sends for a layer, in the place of the one that the block holds."""
        self._wait_for(block)
        held = self.holds[block]
        with noticing_loss():
            if held is not None:
                self.shards[held].reshard()
            self.arrived[block] = self.shards[layer].unshard(async_op=True)
        self.holds[block] = layer
        self.loads += 1

    def _wait_for(self, block: int) -> None:
        if self.arrived[block] is None:
            return
        with noticing_loss():
            self.arrived[block].wait()
        self.arrived[block] = None
        held = self.holds[block]
        assert held is not None
        self.blocks[block] = self.shards[held].block.data
        self.made_views = {key: view for key, view in self.made_views.items() if key[2] != block}


def _cut_up(block: Tensor, mesh: DeviceMesh) -> FSDPModule:
    shard = _Block(block)
    fully_shard(shard, mesh=mesh, reshard_after_forward=True)
    assert isinstance(shard, FSDPModule)
    return shard


def _own_part(shard: Any) -> Tensor:
    """What this process holds of a layer, [bytes]."""
    part: Tensor = shard.block.to_local()
    return part
