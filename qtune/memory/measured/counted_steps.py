"""Steps of a run that the ledger runs over: which they are, and the fullest moment of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qtune.memory.tracing import adoption
from qtune.memory.tracing.cuda import workspace
from qtune.memory.tracing.history import Moment, history_of
from qtune.memory.tracing.ledger import Ledger, follow_modules
from qtune.model.checkpointed import switched_layers

if TYPE_CHECKING:
    import torch

    from qtune.errors import Phase
    from qtune.memory.measured.batch import SeenBatch

FIRST_STEPS = 2
"""That the ledger runs over; the optimizer's state exists from the second on."""
LONGEST_STEPS = 3
"""Later ones that it runs over, each with a larger batch than any before."""


@dataclass
class Watched:
    """Whose tensors are named; None until it is built."""

    model: torch.nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None

    @property
    def is_checkpointed(self) -> bool:
        """Whether every layer is computed twice."""
        if self.model is None:
            return False
        if layers := switched_layers(self.model):
            return all(layer.gradient_checkpointing for layer in layers)
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    def adopt(self, ledger: Ledger) -> None:
        """Names everything that is there."""
        if self.model is not None:
            adoption.adopt_model(ledger, self.model)
        self.adopt_training(ledger)

    def adopt_training(self, ledger: Ledger) -> None:
        """Names what training has made: gradients, and the optimizer's state."""
        if self.model is not None and self.optimizer is not None:
            adoption.adopt_gradients(ledger, self.model.parameters())
            adoption.adopt_optimizer(ledger, self.optimizer)

    def sizes(self, device_type: str) -> dict[str, int]:
        """Bytes of everything that is there, by category."""
        ledger = Ledger(device=device_type)
        self.adopt(ledger)
        sizes: dict[str, int] = {}
        for life in ledger.lives:
            sizes[life.category] = sizes.get(life.category, 0) + life.size
        return sizes


@dataclass
class CountedSteps:
    """Opens the ledger where a step begins that is one of the first, or larger than any counted so far."""

    device: torch.device
    watched: Watched
    names_tensors: bool
    """Whether any step is counted."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Live bytes at the fullest moment of each phase."""
    best: Moment | None = None
    """The fullest of all."""
    best_batch: SeenBatch | None = None
    """The largest micro-batch of its step."""

    def __post_init__(self) -> None:
        self._first = dict.fromkeys(("forward", "eval"), FIRST_STEPS if self.names_tensors else 0)
        self._longest = dict.fromkeys(("forward", "eval"), LONGEST_STEPS if self.names_tensors else 0)
        self._counted: dict[str, int] = {}
        self._ledger: Ledger | None = None
        self._handles: list[Any] = []
        self._batch: SeenBatch | None = None

    @property
    def is_open(self) -> bool:
        """Whether the ledger runs."""
        return self._ledger is not None

    def enter(self, phase: Phase, before: Phase | None, batch: SeenBatch | None) -> None:
        """The trainer begins `phase` after the phase `before`, with a micro-batch where a forward begins."""
        if self._ledger is not None:
            self._tell(phase, before)
        begins_step = phase == "forward" and before != "backward"
        if self._ledger is None and (begins_step or phase == "eval") and self._wanted(phase, batch):
            self._open(phase)

    def again(self, phase: Phase) -> None:
        """A batch that did not fit is tried again: the ledger runs over it once more."""
        if self.names_tensors:
            self._first[phase] += 1

    def saw(self, batch: SeenBatch) -> None:
        """A micro-batch of the step that is counted."""
        self._batch = batch.joined(self._batch)

    def scored(self, positions: int, count: int) -> None:
        """Labelled tokens of a micro-batch of so many positions."""
        if self._batch is not None and self._batch.positions == positions:
            self._batch.scored = max(count, self._batch.scored or 0)

    def alive(self, phase: Phase) -> dict[str, int]:
        """What was alive at the fullest moment of a phase that failed, by category; the ledger must run.

        Not at the last moment: autograd lets go of a failed backward's tensors at once.
        """
        assert self._ledger is not None
        self.watched.adopt_training(self._ledger)
        history = history_of(self._ledger, self.watched.is_checkpointed)
        return dict(history.peak(phase).alive or history.last().alive)

    def close(self) -> None:
        """Takes what the ledger has seen, where it runs."""
        if self._ledger is None:
            return
        ledger, self._ledger = self._ledger, None
        batch, self._batch = self._batch, None
        ledger.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        if self.watched.optimizer is not None:
            adoption.adopt_optimizer(ledger, self.watched.optimizer)
        history = history_of(ledger, self.watched.is_checkpointed)
        for name in ("forward", "backward", "optimizer", "eval"):
            if peak_bytes := history.peak(name).bytes:
                self.peaks[name] = max(self.peaks.get(name, 0), peak_bytes)
        peak = history.peak()
        if self.best is None or peak.bytes > self.best.bytes:
            self.best, self.best_batch = peak, batch

    def _wanted(self, kind: Phase, batch: SeenBatch | None) -> bool:
        if self.watched.model is None or batch is None:
            return False
        if self._first[kind] > 0:
            self._first[kind] -= 1
        elif self._longest[kind] > 0 and batch.positions > self._counted.get(kind, 0):
            self._longest[kind] -= 1
        else:
            return False
        self._counted[kind] = max(self._counted.get(kind, 0), batch.positions)
        return True

    def _open(self, phase: Phase) -> None:
        assert self.watched.model is not None
        on_cuda = self.device.type == "cuda"
        ledger = Ledger(device=self.device.type, workspace=lambda func, args: workspace(func, args, on_cuda))
        self.watched.adopt(ledger)
        ledger.enter(phase)
        self._handles = follow_modules(ledger, self.watched.model)
        ledger.__enter__()
        self._ledger = ledger

    def _tell(self, phase: Phase, before: Phase | None) -> None:
        """A step under the ledger goes from its first forward to the end of its optimizer step."""
        assert self._ledger is not None
        if phase in ("backward", "optimizer") or (phase == "forward" and before == "backward"):
            if phase == "optimizer" and self.watched.model is not None:
                adoption.adopt_gradients(self._ledger, self.watched.model.parameters())
            self._ledger.enter(phase)
        else:
            self.close()
