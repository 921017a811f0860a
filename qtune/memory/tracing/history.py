"""What the lives in a ledger add up to: bytes over time by category, the peak and what was alive there."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy

from qtune.memory.tracing import adoption, categories

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from qtune.memory.tracing.ledger import Ledger


@dataclass(frozen=True)
class Moment:
    """One instant of a step."""

    bytes: int
    phase: str
    module: str
    op: str
    alive: dict[str, int] = field(default_factory=dict)
    """Bytes by category, in the order of `categories.ORDER`; they add up to `bytes`."""


@dataclass(frozen=True)
class Label:
    """Where one allocation of a step was made. `visit` counts the phases of the step as they came."""

    visit: int
    phase: str
    module: str
    op: str


@dataclass(frozen=True)
class History:
    """Live bytes by category at every tick, a tick being one allocation."""

    names: tuple[str, ...]
    """Categories: the rows of `bytes`. Host memory is one of them, and part of no sum."""
    bytes: NDArray[numpy.int64]
    """[categories, ticks]"""
    labels: tuple[Label, ...]
    """One for each tick."""
    paged: int = 0
    """Bytes in host-backed (managed) memory, which the allocator does not count."""

    @property
    def total(self) -> NDArray[numpy.int64]:
        """Live bytes on the device at each tick."""
        found: NDArray[numpy.int64] = self.bytes.sum(axis=0)
        return found - self._host

    @property
    def host(self) -> int:
        """The most bytes that ever waited in host memory."""
        return int(self._host.max(initial=0))

    @property
    def host_at_rest(self) -> int:
        """Bytes in host memory at the first tick, when the model is loaded."""
        return int(self._host[0]) if len(self.labels) else 0

    @property
    def _host(self) -> NDArray[numpy.int64]:
        if categories.HOST not in self.names:
            return numpy.zeros(self.bytes.shape[1], dtype=numpy.int64)
        found: NDArray[numpy.int64] = self.bytes[self.names.index(categories.HOST)]
        return found

    def peak(self, phase: str | None = None) -> Moment:
        """The moment with the most bytes alive, overall or within the visits of one phase; empty if there was none."""
        total = self.total
        if phase is not None:
            total = numpy.where([label.phase == phase for label in self.labels], total, -1)
        if not total.size or total.max() < 0:
            return Moment(0, phase or "", "", "")
        return self.at(int(numpy.argmax(total)))

    def last(self) -> Moment:
        """What is alive at the end."""
        return self.at(len(self.labels) - 1)

    def at(self, tick: int) -> Moment:
        """One tick, with what is alive there."""
        label = self.labels[tick]
        alive = {name: int(size) for name, size in zip(self.names, self.bytes[:, tick], strict=True) if size}
        alive.pop(categories.HOST, None)
        return Moment(sum(alive.values()), label.phase, label.module, label.op, alive)

    def ticks(self, chosen: list[int]) -> History:
        """The history at these ticks alone."""
        return History(self.names, self.bytes[:, chosen], tuple(self.labels[tick] for tick in chosen), self.paged)


def history_of(ledger: Ledger, checkpointing: bool) -> History:
    """Add up a ledger. `checkpointing` names the activations that a forward keeps."""
    lives = ledger.lives
    visit, phase_end = _phases(ledger)
    names = [adoption.category_of(life, int(phase_end[life.born]), checkpointing) for life in lives]
    paged = sum(life.size for life, name in zip(lives, names, strict=True) if name == categories.PAGED)
    rows = tuple(categories.in_order({name for name in names if name != categories.PAGED}))
    place = {name: row for row, name in enumerate(rows)}
    change = numpy.zeros((len(rows), len(lives) + 1), dtype=numpy.int64)
    for life, name in zip(lives, names, strict=True):
        if name != categories.PAGED:
            change[place[name], life.born] += life.size
            change[place[name], min(life.died, len(lives) - 1) + 1] -= life.size
    labels = tuple(Label(int(visit[life.born]), life.phase, life.module, life.op) for life in lives)
    return History(rows, numpy.cumsum(change, axis=1)[:, :-1], labels, paged)


def _phases(ledger: Ledger) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
    """For each tick: the number of its phase's visit, and the first tick of the next different phase."""
    ticks = len(ledger.lives)
    visit, end = numpy.zeros(ticks, dtype=numpy.int64), numpy.full(ticks, ticks, dtype=numpy.int64)
    marks = [*ledger.phases, (ticks, "end")]
    for number, ((first, name), (after, following)) in enumerate(itertools.pairwise(marks)):
        visit[first:after] = number
        if name != following:
            end[first:after] = after
    return visit, end


def join(histories: Iterable[History]) -> History:
    """Histories one after the other, as one step."""
    parts = list(histories)
    rows = tuple(categories.in_order({name for part in parts for name in part.names}))
    blocks = []
    for part in parts:
        block = numpy.zeros((len(rows), part.bytes.shape[1]), dtype=numpy.int64)
        for row, name in enumerate(part.names):
            block[rows.index(name)] = part.bytes[row]
        blocks.append(block)
    labels = tuple(label for part in parts for label in part.labels)
    return History(rows, numpy.concatenate(blocks, axis=1), labels, max((part.paged for part in parts), default=0))
