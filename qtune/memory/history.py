"""What the lives in a ledger add up to: bytes over time, the peak, what was alive there. Pure arithmetic."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy

from qtune.memory import categories

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtune.memory.ledger import Ledger


@dataclass(frozen=True)
class Moment:
    """One instant of a step."""

    tick: int
    bytes: int
    phase: str
    module: str
    op: str
    alive: dict[str, int] = field(default_factory=dict)
    """Bytes by category, in the order of `categories.ORDER`; they add up to `bytes`."""


class History:
    """The written-down lives as arrays, asked for curves and moments."""

    def __init__(self, ledger: Ledger, checkpointing: bool, excluded: tuple[str, ...] = (categories.PAGED,)) -> None:
        self.lives = ledger.lives
        self.phases = [*ledger.phases, (len(ledger.lives), "end")]
        ends = _phase_ends(self.phases, len(self.lives))
        self.category = [categories.category_of(life, int(ends[life.born]), checkpointing) for life in self.lives]
        counted = numpy.array([name not in excluded for name in self.category], dtype=numpy.int64)
        self.size = numpy.array([life.size for life in self.lives], dtype=numpy.int64) * counted
        self.born = numpy.array([life.born for life in self.lives], dtype=numpy.int64)
        self.died = numpy.minimum(
            numpy.array([life.died for life in self.lives], dtype=numpy.int64), len(self.lives) - 1
        )
        self.curve = self._curve(numpy.ones(len(self.lives), dtype=bool))

    def _curve(self, chosen: NDArray[numpy.bool_]) -> NDArray[numpy.int64]:
        """Live bytes of the chosen storages at each tick."""
        steps = numpy.zeros(len(self.lives) + 1, dtype=numpy.int64)
        numpy.add.at(steps, self.born[chosen], self.size[chosen])
        numpy.subtract.at(steps, self.died[chosen] + 1, self.size[chosen])
        return numpy.cumsum(steps)[:-1]

    def curves(self) -> dict[str, NDArray[numpy.int64]]:
        """Live bytes at each tick by category."""
        names = numpy.array(self.category)
        return {name: self._curve(names == name) for name in in_order(set(self.category))}

    def spans(self, phase: str | None = None) -> list[tuple[int, int]]:
        """Half-open tick ranges of a phase (of the whole history without one)."""
        pairs = zip(self.phases, self.phases[1:], strict=False)
        return [(a, b) for (a, name), (b, _) in pairs if b > a and phase in (None, name)]

    def peak(self, phase: str | None = None) -> Moment:
        """The moment with the most bytes alive, within a phase or overall."""
        best = -1
        for first, last in self.spans(phase):
            tick = first + int(numpy.argmax(self.curve[first:last]))
            if best < 0 or self.curve[tick] > self.curve[best]:
                best = tick
        return self.at(best) if best >= 0 else Moment(0, 0, phase or "", "", "")

    def at(self, tick: int) -> Moment:
        """The moment of one birth, with what was alive then."""
        alive: Counter[str] = Counter()
        for row in numpy.nonzero((self.born <= tick) & (self.died >= tick))[0]:
            alive[self.category[row]] += int(self.size[row])
        life = self.lives[tick]
        shown = {name: alive[name] for name in in_order(alive) if alive[name]}
        return Moment(tick, int(self.curve[tick]), life.phase, life.module, life.op, shown)


def _phase_ends(phases: list[tuple[int, str]], ticks: int) -> NDArray[numpy.int64]:
    """For each tick, the first tick of the next different phase."""
    ends = numpy.full(ticks, ticks, dtype=numpy.int64)
    for (first, name), (after, following) in itertools.pairwise(phases):
        if name != following:
            ends[first:after] = after
    return ends


def in_order(names: set[str] | Counter[str] | dict[str, int]) -> list[str]:
    """Category names in the order of the tables; unknown ones last, by name."""
    rank = {name: place for place, name in enumerate(categories.ORDER)}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))
