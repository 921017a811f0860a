"""The meter of a real run: peaks by phase from the allocator (CUDA), from the ledger, and from the kernel.

The trainer says where it is with `meter.enter(phase)`. On CUDA the allocator's own statistics are read and reset at
each change of phase; that costs microseconds. No allocator knows what a block is for, and the CPU's keeps no count at
all: so the ledger runs over a few chosen steps (the first ones and each new largest batch) and names what is alive.
The resident set is read at every change of phase.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch

from qtune.errors import Failure, Phase, first_line
from qtune.memory.measured import process
from qtune.memory.tracing import adoption, categories
from qtune.memory.tracing.categories import in_order
from qtune.memory.tracing.cuda import workspace
from qtune.memory.tracing.history import Moment, history_of
from qtune.memory.tracing.ledger import Ledger, follow_modules
from qtune.model.checkpointed import switched_layers
from qtune.sizes import GIB, KIB, MIB

if TYPE_CHECKING:
    from pathlib import Path


SNAPSHOT_STEPS = 2
"""The optimizer's state exists from the second step on."""
SNAPSHOT_ENTRIES = 200_000
"""Allocator events kept for a snapshot; two steps of a 7B model make fewer."""


@dataclass
class PhasePeaks:
    """What was seen in one phase, over all its visits. Zero: not measured there."""

    visits: int = 0
    seconds: float = 0.0
    allocated_peak_bytes: int = 0
    """CUDA: torch.cuda.max_memory_allocated."""
    reserved_peak_bytes: int = 0
    """CUDA: torch.cuda.max_memory_reserved."""
    device_used_bytes: int = 0
    """CUDA: total - free of the whole card at the end of the phase, other processes included."""
    tensor_peak_bytes: int = 0
    """The ledger's live bytes, in the steps that it ran over."""
    resident_peak_bytes: int = 0
    """The process's peak resident set."""


@dataclass
class SeenBatch:
    """A micro-batch of the run. Whether it is padded stays on its device until it is asked for, which waits for it."""

    rows: int
    length: int
    padding: torch.Tensor | None
    """Scalar: whether any position is padding; None: there is no mask."""
    scored: int | None = None
    """Labelled tokens, once the loss has counted them."""

    @property
    def positions(self) -> int:
        """What memory grows with."""
        return self.rows * self.length

    def joined(self, other: SeenBatch | None) -> SeenBatch:
        """The larger of two; of two as large, what the larger memory needs of each."""
        if other is None or other.positions < self.positions:
            return self
        if other.positions > self.positions:
            return other
        both = [one.padding for one in (self, other) if one.padding is not None]
        counts = [one.scored for one in (self, other) if one.scored is not None]
        return SeenBatch(self.rows, self.length, torch.stack(both).any() if both else None, max(counts, default=None))

    def to_json(self) -> dict[str, int]:
        """rows, length, padded (0 or 1) and, once it is known, scored."""
        report = {
            "rows": self.rows,
            "length": self.length,
            "padded": int(self.padding is not None and bool(self.padding)),
        }
        return report if self.scored is None else report | {"scored": self.scored}


REST = "activations, logits and loss"
"""On CUDA, without a ledger: what the allocator counts beyond what stays between steps."""
LOADED = "what was loaded so far"
"""On CUDA, before there is a model to walk over: all that the allocator counts."""


class Meter:
    """Measures a run phase by phase; `result()` is the plain value that goes into memory.json."""

    def __init__(
        self, device: torch.device, first_steps: int = 2, longest_steps: int = 3, snapshot: Path | None = None
    ) -> None:
        """`snapshot`: a file for the CUDA allocator's history up to the end of SNAPSHOT_STEPS steps, or of the run.

        https://pytorch.org/memory_viz draws it (PyTorch docs, "Understanding CUDA Memory Usage").
        """
        self.device = device
        self._snapshot = snapshot
        self.snapshot_written = ""
        """In words, where it is or why it is not; empty until then."""
        self.cuda = device.type == "cuda"
        self.phases: dict[str, PhasePeaks] = {}
        self.phase: Phase | None = None
        self._since = 0.0
        self._resets = process.reset_peak()
        self._model: torch.nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._first_steps = {"forward": first_steps, "eval": first_steps}
        self._longest_steps = {"forward": longest_steps, "eval": longest_steps}
        self.largest: dict[str, SeenBatch] = {}
        """The largest batch that was measured in "forward" and in "eval"."""
        self._counted: dict[str, int] = {}
        self.batch: SeenBatch | None = None
        self.step = 0
        """The optimizer step at work, from 1."""
        self._ledger: Ledger | None = None
        self._handles: list[Any] = []
        self._ledger_batch: SeenBatch | None = None
        """The largest micro-batch of the step that the ledger runs over."""
        self._best: Moment | None = None
        self._best_batch: SeenBatch | None = None
        self._static: dict[str, int] = {}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        if self._snapshot is not None:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=SNAPSHOT_ENTRIES)

    @property
    def is_counting(self) -> bool:
        """Whether the ledger runs over the step at work, which makes it slower."""
        return self._ledger is not None

    def watch(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Whose tensors to name: call it once the model (and, when it exists, the optimizer) is built."""
        self._model = model
        self._optimizer = optimizer or self._optimizer

    def enter(self, phase: Phase, batch: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> None:
        """The trainer begins `phase`; `batch` is the input_ids [rows, length] where a forward begins.

        mask: its attention mask; one without padding is not used, and takes no memory in attention.
        """
        self._close_phase()
        if batch is not None:
            # No bool() here: the processor would wait for the card in every micro-batch.
            padding = None if mask is None else mask.logical_not().any()
            self.batch = SeenBatch(batch.shape[0], batch.shape[1], padding)
        elif phase not in ("forward", "backward"):
            self.batch = None
        if "optimizer" in (phase, self.phase) and categories.OPTIMIZER not in self._static:
            self._static = self._static | self.static()
        if self._ledger is not None:
            self._tell_ledger(phase)
        begins_step = phase == "forward" and self.phase != "backward"
        if self._ledger is None and (begins_step or phase == "eval") and self._wanted(phase):
            self._open_ledger(phase)
        self.phase = phase
        if batch is not None and self.batch is not None:
            if self.cuda or self._ledger is not None:
                self.largest[phase] = self.batch.joined(self.largest.get(phase))
            if self._ledger is not None:
                self._ledger_batch = self.batch.joined(self._ledger_batch)
        self._since = time.perf_counter()

    def scored(self, count: int) -> None:
        """How many labelled tokens the batch at work has; the loss knows."""
        if self.batch is None:
            return
        self.batch.scored = count
        for seen in (self.largest.get("eval" if self.phase == "eval" else "forward"), self._ledger_batch):
            if seen is not None and seen.positions == self.batch.positions:
                seen.scored = max(count, seen.scored or 0)

    def failure(self, error: BaseException) -> Failure:
        """What is known now that memory has run out; to be asked while the tensors of the failed step are alive."""
        phase = self.phase or "load"
        alive: dict[str, int] = {}
        counted = ""
        if self._ledger is not None:
            self._adopt_training(self._ledger)
            # The fullest moment, not the last: autograd lets go of a failed backward's tensors at once.
            history = history_of(self._ledger, self._checkpointing())
            alive, counted = dict(history.peak(phase).alive or history.last().alive), "tensor by tensor"
        elif self._model is not None:
            static = self.static()
            alive, counted = {name: static[name] for name in in_order(static)}, "what stays between steps"
        if self.cuda:
            free, total = torch.cuda.mem_get_info(self.device)
            own = torch.cuda.memory_reserved(self.device)
            rest = torch.cuda.max_memory_allocated(self.device) - sum(alive.values())
            if self._ledger is None and rest > 0:
                alive[REST if self._model is not None else LOADED] = rest
                counted = f"{counted}; the rest by the allocator" if counted else "by the allocator"
        else:
            memory = psutil.virtual_memory()
            free, total, own = memory.available, memory.total, psutil.Process().memory_info().rss
        said, wanted = _request(error)
        batch = None if self.batch is None else self.batch.to_json()
        return Failure(phase, self.step, batch, said, wanted, alive, counted, own, free, total)

    def close(self) -> None:
        """The run is over (or failed): close the open phase and let go of the model."""
        self._close_phase()
        self._close_ledger()
        self._write_snapshot()
        self.phase, self._model, self._optimizer = None, None, None

    def result(self) -> dict[str, Any]:
        """Everything measured so far, ready for JSON."""
        self._close_phase()
        self._close_ledger()
        peaks = [p.allocated_peak_bytes if self.cuda else p.tensor_peak_bytes for p in self.phases.values()]
        counted = "tensor by tensor in chosen steps"
        method = f"the allocator's statistics; {counted}" if self.cuda else f"{counted}; resident set of the process"
        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name(self.device) if self.cuda else "cpu",
            "method": method,
            "resident_by_phase": self._resets,
            "peak_bytes": max(peaks, default=0),
            "phases": {name: asdict(peaks) for name, peaks in self.phases.items()},
            "static": self._static,
            "largest_batch": {phase: batch.to_json() for phase, batch in self.largest.items()},
        }
        if self._best is not None:
            result["at_peak"] = asdict(self._best)
            if self._best_batch is not None:
                result["at_peak"]["batch"] = self._best_batch.to_json()
        return result

    def static(self) -> dict[str, int]:
        """Bytes that stay between steps, by category: weights by dtype, constants, adapter, gradients, optimizer."""
        ledger = Ledger(device=self.device.type)
        self._adopt_all(ledger)
        sizes: dict[str, int] = {}
        for life in ledger.lives:
            sizes[life.category] = sizes.get(life.category, 0) + life.size
        return sizes

    def _wanted(self, kind: Phase) -> bool:
        """Whether the step that begins is to be counted: one of the first, or larger than any counted so far."""
        if self._model is None or self.batch is None:
            return False
        if self._first_steps[kind] > 0:
            self._first_steps[kind] -= 1
        elif self._longest_steps[kind] > 0 and self.batch.positions > self._counted.get(kind, 0):
            self._longest_steps[kind] -= 1
        else:
            return False
        self._counted[kind] = max(self._counted.get(kind, 0), self.batch.positions)
        return True

    def _checkpointing(self) -> bool:
        if self._model is None:
            return False
        if layers := switched_layers(self._model):
            return all(layer.gradient_checkpointing for layer in layers)
        return any(getattr(module, "gradient_checkpointing", False) for module in self._model.modules())

    def _adopt_all(self, ledger: Ledger) -> None:
        if self._model is not None:
            adoption.adopt_model(ledger, self._model)
        self._adopt_training(ledger)

    def _adopt_training(self, ledger: Ledger) -> None:
        if self._model is not None and self._optimizer is not None:
            adoption.adopt_gradients(ledger, self._model.parameters())
            adoption.adopt_optimizer(ledger, self._optimizer)

    def _open_ledger(self, phase: str) -> None:
        assert self._model is not None
        ledger = Ledger(device=self.device.type, workspace=lambda func, args: workspace(func, args, self.cuda))
        self._adopt_all(ledger)
        ledger.enter(phase)
        self._handles = follow_modules(ledger, self._model)
        ledger.__enter__()
        self._ledger = ledger

    def _tell_ledger(self, phase: str) -> None:
        """A step under the ledger goes from its first forward to the end of its optimizer step."""
        assert self._ledger is not None
        if phase in ("backward", "optimizer") or (phase == "forward" and self.phase == "backward"):
            if phase == "optimizer" and self._model is not None:
                adoption.adopt_gradients(self._ledger, self._model.parameters())
            self._ledger.enter(phase)
        else:
            self._close_ledger()

    def _close_ledger(self) -> None:
        if self._ledger is None:
            return
        ledger, self._ledger = self._ledger, None
        batch, self._ledger_batch = self._ledger_batch, None
        ledger.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        if self._optimizer is not None:
            adoption.adopt_optimizer(ledger, self._optimizer)
        history = history_of(ledger, self._checkpointing())
        for name in ("forward", "backward", "optimizer", "eval"):
            if peak_bytes := history.peak(name).bytes:
                seen = self.phases.setdefault(name, PhasePeaks())
                seen.tensor_peak_bytes = max(seen.tensor_peak_bytes, peak_bytes)
        peak = history.peak()
        if self._best is None or peak.bytes > self._best.bytes:
            self._best, self._best_batch = peak, batch

    def _close_phase(self) -> None:
        """Read the statistics of the phase that ends and begin new peaks."""
        if self.phase is None:
            return
        seen = self.phases.setdefault(self.phase, PhasePeaks())
        now = time.perf_counter()
        seen.visits += 1
        seen.seconds += now - self._since
        self._since = now
        seen.resident_peak_bytes = max(seen.resident_peak_bytes, process.peak_bytes())
        process.reset_peak()
        if self.cuda:
            free, total = torch.cuda.mem_get_info(self.device)
            seen.allocated_peak_bytes = max(seen.allocated_peak_bytes, torch.cuda.max_memory_allocated(self.device))
            seen.reserved_peak_bytes = max(seen.reserved_peak_bytes, torch.cuda.max_memory_reserved(self.device))
            seen.device_used_bytes = max(seen.device_used_bytes, total - free)
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.phase == "optimizer" and seen.visits == SNAPSHOT_STEPS:
            self._write_snapshot()

    def _write_snapshot(self) -> None:
        if self._snapshot is None:
            return
        file, self._snapshot = self._snapshot, None
        try:
            torch.cuda.memory._dump_snapshot(str(file))
            self.snapshot_written = f"{file}; https://pytorch.org/memory_viz draws it"
        except (OSError, RuntimeError) as error:  # a full disk ends no training for the sake of a picture
            self.snapshot_written = f"could not be written: {error}"
        torch.cuda.memory._record_memory_history(enabled=None)


def _request(error: BaseException) -> tuple[str, int]:
    """What an allocator said, up to the size that it refused, and that size in bytes; 0 if it named none.

    CUDA: "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"; CPU: "… you tried to allocate 4096 bytes. …".
    """
    first = first_line(error)
    request = re.match(r".*?tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", first, re.IGNORECASE)
    if request is None:
        return first, 0
    units = {"bytes": 1, "kib": KIB, "mib": MIB, "gib": GIB}
    return request[0], int(float(request[1]) * units[request[2].lower()])
