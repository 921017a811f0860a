"""The device that training runs on, as a value: the one that is here, or a card that is only described."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import distributed

from qtune.device.processes import other_holders
from qtune.device.products import bf16_pays_on_cpu
from qtune.errors import OutOfMemory, first_line
from qtune.sizes import gib_text


@dataclass(frozen=True)
class Device:
    """What the choice of dtypes and of the micro-batch depends on.

    `name` is the card's own name; `torch_name` what torch calls it. `bf16` says whether bfloat16 products are worth
    it: run by the hardware of a card, or measured to be faster than float32's on this CPU. `capability` is CUDA's
    compute capability, None on a CPU.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    total_bytes: int
    free_bytes: int
    bf16: bool
    capability: tuple[int, int] | None = None
    processes: int = 1
    """How many processes share the rows of a step, each with a device like this one of its own."""
    lean_problem: str | None = None
    """What speaks against the lean step on it (`adapter/lean_check.py`); None: nothing, as far as anybody has asked."""

    @property
    def torch_name(self) -> str:
        """ "cuda:0" or "cpu". One process drives one device, which CUDA_VISIBLE_DEVICES or its launcher selects."""
        return "cuda:0" if self.kind == "cuda" else "cpu"


def present_device() -> Device:
    """The first CUDA device, or the CPU.

    Raises:
        OutOfMemory: the card has no room even for the driver's own part of this process.
    """
    if torch.cuda.is_available():
        free, total = _card_memory()
        capability = torch.cuda.get_device_capability(0)
        # torch.cuda.is_bf16_supported() counts emulation, which is slower than fp16; Ampere (8.0) brought the hardware.
        name = torch.cuda.get_device_name(0)
        return Device("cuda", name, total, free, capability >= (8, 0), capability, _processes())
    memory, name = psutil.virtual_memory(), _name_of_cpu(torch.get_num_threads())
    return Device("cpu", name, memory.total, memory.available, bf16_pays_on_cpu(), processes=_processes())


def _name_of_cpu(threads: int) -> str:
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _processes() -> int:
    """How many have joined a run with this one (`training.ranks`)."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _card_memory() -> tuple[int, int]:
    """(free, total) bytes; asking is the first thing that needs a CUDA context, a few hundred MiB on the card."""
    try:
        return torch.cuda.mem_get_info(0)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        card = torch.cuda.get_device_properties(0)
        holders = ", ".join(f"{one.name} (pid {one.pid})" for one in other_holders(str(card.uuid)) or ())
        who = f"it is held by {holders}" if holders else "nvidia-smi may show what holds it"
        way_on = "free some, or choose another card with CUDA_VISIBLE_DEVICES"
        raise OutOfMemory(f"{card.name} has no memory left to begin with; {who}: {way_on}") from error


def memory_ran_out(error: BaseException, way_out: str) -> OutOfMemory:
    """One sentence for memory that ran out: where, how much is free, who else is there, and `way_out`."""
    if isinstance(error, OutOfMemory):
        return error
    try:
        device = present_device()
    except OutOfMemory as none_left:
        return none_left
    others = []
    if device.kind == "cuda":
        others = other_holders(str(torch.cuda.get_device_properties(0).uuid)) or []
    held = f", others hold some: {', '.join(f'{one.name} (pid {one.pid})' for one in others)}" if others else ""
    free, total = gib_text(device.free_bytes), gib_text(device.total_bytes)
    return OutOfMemory(
        f"memory ran out on {device.name}: {first_line(error)}; {free} of {total} are free now{held}. {way_out}"
    )


@contextmanager
def one_sentence(way_out: str) -> Iterator[None]:
    """Memory that runs out in the block is one sentence, and no traceback.

    Raises:
        OutOfMemory: in the place of whatever a library raised.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise memory_ran_out(error, way_out) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the card or in the host.

    PyTorch has a class for its CUDA allocator's refusals. The CPU's allocator raises a plain RuntimeError
    ("DefaultCPUAllocator: can't allocate memory", c10/core/impl/alloc_cpu.cpp), the driver's own calls one with
    "CUDA error: out of memory", and cuBLAS, when it finds no room for a handle, CUBLAS_STATUS_ALLOC_FAILED.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    signs = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in said for sign in signs)
