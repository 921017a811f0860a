"""The ledger: every tensor storage from birth to death, as the operations of a step make and drop them.

It is a `TorchDispatchMode`, so it sees real tensors and fake ones alike: the same ledger runs over a traced step
(no storage behind the tensors) and over a real one on the CPU. It only writes down lives; what they add up to is read
from them in `history.py`, and what they are for in `adoption.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDING = 512
"""The CUDA caching allocator rounds each request up to 512 bytes (kMinBlockSize in c10/cuda/CUDACachingAllocator.h)."""

LOSS_REGION = "loss"
"""`Life.module` of everything after the backbone: the head, the loss, and where the backward begins."""

Workspace = Callable[[Any, Sequence[Any]], list[tuple[int, str]]]

STILL_ALIVE = 2**62
"""`Life.died` of a storage that has not been freed."""


def rounded(nbytes: int, rounding: int = ROUNDING) -> int:
    """Bytes that an allocator with blocks of `rounding` bytes hands out for a request of `nbytes`."""
    return -(-nbytes // rounding) * rounding


@dataclass(slots=True)
class Life:
    """One storage: its size, the ticks between which it was alive, and where it was made."""

    size: int
    """Bytes, rounded as the allocator does."""
    born: int
    """Tick of its allocation; ticks count allocations, so a peak is always at one."""
    died: int
    """Last tick at which it was still alive; `STILL_ALIVE` until it is freed."""
    op: str
    """The operation that made it, e.g. 'mm.default'; 'adopted' for tensors that were there before."""
    phase: str
    """What the step was doing: forward, backward, optimizer, ..."""
    module: str
    """Dotted name of the innermost module at work; empty outside the model."""
    category: str = ""
    """Set where it is known for certain (weights, gradients, optimizer state); else `adoption.py` infers it."""
    recomputed: bool = False
    """Made by a forward inside a backward: gradient checkpointing at work."""


class Ledger(TorchDispatchMode):
    """Writes down the life of every storage that an operation returns while the mode is on.

    Storages die whenever Python and autograd let go of them, mode on or off. Inputs that no operation made under the
    ledger (parameters, batches) are entered with `adopt`.
    """

    def __init__(self, rounding: int = ROUNDING, workspace: Workspace | None = None, device: str | None = None) -> None:
        """`workspace`: what a kernel allocates for itself, from its function and arguments: [(bytes, name), ...].

        device: the type of device whose memory is counted; a step on a card also has tensors in host memory.
        """
        super().__init__()
        self.rounding = rounding
        self.workspace = workspace
        self.device = device
        self.lives: list[Life] = []
        self.phases: list[tuple[int, str]] = [(0, "static")]
        """(first tick, phase), in order."""
        self.phase = "static"
        self.module = ""
        self.depth = 0
        """How many module forwards are open; above zero inside a backward means recomputation."""
        self.live_bytes = 0
        self._row: dict[int, int] = {}
        self._refs: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def tick(self) -> int:
        """The number of storages born so far; the last birth is at tick - 1."""
        return len(self.lives)

    def enter(self, phase: str) -> None:
        """From the next birth on, storages belong to `phase`."""
        self.phase = phase
        self.module = LOSS_REGION if phase == "backward" else ""
        self.phases.append((self.tick, phase))

    @contextmanager
    def inside(self, module: str) -> Iterator[None]:
        """Storages born in this block belong to `module` (a stretch of the step that is no module, e.g. the loss)."""
        before, self.module = self.module, module
        try:
            yield
        finally:
            self.module = before

    def adopt(self, tensor: torch.Tensor, category: str) -> None:
        """Enter a tensor that is alive already, or say for certain what a known one is for."""
        row = self._enter(tensor, "adopted")
        if row is not None:
            self.lives[row].category = category

    def category(self, tensor: torch.Tensor) -> str:
        """What a tensor's storage was said to be for; empty where nobody has said."""
        row = self._row.get(tensor.untyped_storage()._cdata)
        return "" if row is None else self.lives[row].category

    def pulse(self, buffers: list[tuple[int, str]]) -> range:
        """Buffers inside one kernel, alive together and, until `end_pulse`, beside its outputs: their rows."""
        first = self.tick
        recomputed = self.depth > 0 and self.phase == "backward"
        for nbytes, op in buffers:
            size = rounded(nbytes, self.rounding)
            self.lives.append(Life(size, self.tick, STILL_ALIVE, op, self.phase, self.module, "", recomputed))
        return range(first, self.tick)

    def end_pulse(self, rows: range) -> None:
        """The kernel is done: its buffers were alive up to now."""
        for row in rows:
            self.lives[row].died = self.tick - 1

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.record(func, args, out)
        return out

    def record(self, func: Any, args: Sequence[Any], out: Any) -> None:
        """What an operation returned, and what its kernel took for itself: first, as most kernels do."""
        taken = self.workspace(func, args) if self.workspace is not None else ()
        buffers = self.pulse(taken) if taken else range(0)
        if isinstance(out, torch.Tensor):
            self._enter(out, func.__name__)
        elif isinstance(out, (tuple, list)):
            for item in out:
                if isinstance(item, torch.Tensor):
                    self._enter(item, func.__name__)
                elif isinstance(item, (tuple, list)):
                    for inner in item:
                        if isinstance(inner, torch.Tensor):
                            self._enter(inner, func.__name__)
        self.end_pulse(buffers)

    def _enter(self, tensor: torch.Tensor, op: str) -> int | None:
        """Row of the tensor's storage, new or known; None for tensors without one."""
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return None
        if self.device is not None and tensor.device.type != self.device:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._row.get(key)
        if known is not None:
            return known
        row = len(self.lives)
        size = rounded(storage.nbytes(), self.rounding)
        recomputed = self.depth > 0 and self.phase == "backward"
        self.lives.append(Life(size, row, STILL_ALIVE, op, self.phase, self.module, "", recomputed))
        self.live_bytes += size
        self._row[key] = row
        self._refs[key] = weakref.ref(storage, lambda _, key=key: self._leave(key))  # type: ignore[misc]
        return row

    def _leave(self, key: int) -> None:
        life = self.lives[self._row.pop(key)]
        del self._refs[key]
        life.died = max(self.tick - 1, life.born)
        self.live_bytes -= life.size


def follow_modules(ledger: Ledger, model: torch.nn.Module, depth: int = 6) -> list[Any]:
    """Tell the ledger which module is at work, forward and backward; returns handles whose `remove()` ends it.

    Forward: hooks around each module's call. Backward: a gradient arriving at a module's output says that its
    backward begins. What follows the backbone is the head and the loss, and so is the beginning of the backward.
    Modules deeper than `depth` names are counted with their parents.
    """
    get_output: Any = getattr(model, "get_output_embeddings", lambda: None)
    backbone, head = backbone_of(model), get_output()
    handles: list[Any] = []
    stack: list[str] = []
    named: list[Callable[[], torch.Tensor | None]] = [lambda: None]

    def before(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any) -> None:
            stack.append(ledger.module)
            ledger.module, ledger.depth = name, ledger.depth + 1

        return hook

    def after(name: str) -> Any:
        def arrives(_: Any) -> None:
            ledger.module = name

        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            encloses_backbone = ledger.module == LOSS_REGION and module is not head
            ledger.module, ledger.depth = stack.pop() if stack else "", max(ledger.depth - 1, 0)
            if encloses_backbone:
                return
            if module is backbone:
                stack[:] = [LOSS_REGION] * len(stack)
                ledger.module = LOSS_REGION
            first = first_tensor(output)
            # An outer module that hands on its inner module's output keeps the inner, more precise name.
            if first is not None and first.requires_grad and not first.is_leaf and first is not named[0]():
                first.register_hook(arrives)
                named[0] = weakref.ref(first)

        return hook

    for name, module in model.named_modules():
        if name and name.count(".") < depth:
            shown = LOSS_REGION if module is head else name
            handles.append(module.register_forward_pre_hook(before(shown)))
            handles.append(module.register_forward_hook(after(shown), always_call=True))
    return handles


def first_tensor(output: Any) -> torch.Tensor | None:
    """The tensor that a module hands on: its output, or the first of a tuple or a ModelOutput."""
    if isinstance(output, dict):
        output = next(iter(output.values()), None)
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def backbone_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """The part of a causal LM that ends in hidden states: everything but the head."""
    get_base: Any = getattr(model, "get_base_model", None)
    causal = model if get_base is None else get_base()
    prefix = getattr(causal, "base_model_prefix", "")
    found = getattr(causal, prefix, None) if prefix else None
    return found if isinstance(found, torch.nn.Module) else None
