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
from qtune.memory.measured.batch import SeenBatch
from qtune.memory.measured.counted_steps import CountedSteps, Watched
from qtune.memory.measured.snapshot import SNAPSHOT_STEPS, Snapshot
from qtune.memory.tracing import categories
from qtune.memory.tracing.categories import in_order
from qtune.sizes import GIB, KIB, MIB

if TYPE_CHECKING:
    from pathlib import Path


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


REST = "activations, logits and loss"
"""On CUDA, without a ledger: what the allocator counts beyond what stays between steps."""
LOADED = "what was loaded so far"
"""On CUDA, before there is a model to walk over: all that the allocator counts."""


class Meter:
    """Measures a run phase by phase; `result()` is the plain value that goes into memory.json."""

    def __init__(self, device: torch.device, *, names_tensors: bool = True, snapshot: Path | None = None) -> None:
        """names_tensors: whether the ledger runs over some steps, which makes them slower.

        snapshot: a file for the CUDA allocator's history of the first steps.
        """
        self.device = device
        self.cuda = device.type == "cuda"
        self.phases: dict[str, PhasePeaks] = {}
        self.phase: Phase | None = None
        self._since = 0.0
        self._resets = process.reset_peak()
        self._watched = Watched()
        self._counted = CountedSteps(device, self._watched, names_tensors)
        self.largest: dict[str, SeenBatch] = {}
        """The largest batch that was measured in "forward" and in "eval"."""
        self.batch: SeenBatch | None = None
        self.step = 0
        """The optimizer step at work, from 1."""
        self._static: dict[str, int] = {}
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        self.snapshot = Snapshot(snapshot)

    @property
    def is_counting(self) -> bool:
        """Whether the ledger runs over the step at work, which makes it slower."""
        return self._counted.is_open

    def watch(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Whose tensors to name: call it once the model (and, when it exists, the optimizer) is built."""
        self._watched.model = model
        self._watched.optimizer = optimizer or self._watched.optimizer

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
        self._counted.enter(phase, self.phase, self.batch)
        self.phase = phase
        if batch is not None and self.batch is not None:
            if self.cuda or self.is_counting:
                self.largest[phase] = self.batch.joined(self.largest.get(phase))
            if self.is_counting:
                self._counted.saw(self.batch)
        self._since = time.perf_counter()

    def scored(self, count: int) -> None:
        """How many labelled tokens the batch at work has; the loss knows."""
        if self.batch is None:
            return
        self.batch.scored = count
        self._counted.scored(self.batch.positions, count)
        seen = self.largest.get("eval" if self.phase == "eval" else "forward")
        if seen is not None and seen.positions == self.batch.positions:
            seen.scored = max(count, seen.scored or 0)

    def tries_evaluation_again(self) -> None:
        """A batch of the evaluation that did not fit comes once more, as it is."""
        self._counted.again("eval")

    def failure(self, error: BaseException) -> Failure:
        """What is known now that memory has run out; to be asked while the tensors of the failed step are alive."""
        phase = self.phase or "load"
        alive: dict[str, int] = {}
        counted = ""
        if self.is_counting:
            alive, counted = self._counted.alive(phase), "tensor by tensor"
        elif self._watched.model is not None:
            static = self.static()
            alive, counted = {name: static[name] for name in in_order(static)}, "what stays between steps"
        if self.cuda:
            free, total = torch.cuda.mem_get_info(self.device)
            own = torch.cuda.memory_reserved(self.device)
            rest = torch.cuda.max_memory_allocated(self.device) - sum(alive.values())
            if not self.is_counting and rest > 0:
                alive[REST if self._watched.model is not None else LOADED] = rest
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
        self._counted.close()
        self.snapshot.write()
        self.phase, self._watched.model, self._watched.optimizer = None, None, None

    def result(self) -> dict[str, Any]:
        """Everything measured so far, ready for JSON."""
        self._close_phase()
        self._counted.close()
        for name, peak_bytes in self._counted.peaks.items():
            self.phases.setdefault(name, PhasePeaks()).tensor_peak_bytes = peak_bytes
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
        if self._counted.best is not None:
            result["at_peak"] = asdict(self._counted.best)
            if self._counted.best_batch is not None:
                result["at_peak"]["batch"] = self._counted.best_batch.to_json()
        return result

    def static(self) -> dict[str, int]:
        """Bytes that stay between steps, by category: weights by dtype, constants, adapter, gradients, optimizer."""
        return self._watched.sizes(self.device.type)

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
            self.snapshot.write()


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
