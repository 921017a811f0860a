"""What training does in a second, and whether that is what was predicted.

A card works on while the processor goes ahead, so a clock read between two steps tells when launches were queued, not
when work was done. Laps end where the trainer waits for the card anyway, to read the loss; what stands between steps
(an evaluation, a checkpoint) is taken out, and steps in which the meter names every tensor are told apart: they are
slower for that reason alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

FAR_SLOWER = 1.5
"""Times the prediction from which a run is said to be slower than it should be."""
FIRST_STEPS = 3
"""Not compared: memory is taken, and kernels are chosen."""
COMPARED_STEPS = 5
"""The least steps for a comparison."""

StepSeconds = Callable[[Sequence[int]], float]
"""Padded lengths of a step's micro-batches -> the seconds that the step is predicted to take."""


@dataclass(frozen=True)
class Lap:
    """The steps between two moments at which all work was done."""

    steps: tuple[tuple[int, ...], ...]
    """Padded lengths of the micro-batches of each."""
    tokens: int
    """Of the rows: padding is not counted."""
    seconds: float
    is_disturbed: bool
    """Whether the meter counted tensors in one of the steps."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of rows."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def step_seconds(self) -> float:
        """The mean step."""
        return self.seconds / max(1, len(self.steps))


class Pace:
    """Laps of a run. `clock` gives seconds, `wait` returns when the device has done all that was queued."""

    def __init__(self, wait: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._wait, self._clock = wait, clock
        self._began: float | None = None
        """Training begins with its first step, not with what is built before it."""
        self._steps: list[tuple[int, ...]] = []
        self._tokens = 0
        self._is_disturbed = False

    def takes(self, tokens: int, lengths: Sequence[int]) -> None:
        """A step begins, of micro-batches with these padded lengths."""
        if self._began is None:
            self._began = self._clock()
        self._tokens += tokens
        self._steps.append(tuple(lengths))

    def disturb(self) -> None:
        """The lap has a step that is slower than the others for the sake of measuring it."""
        self._is_disturbed = True

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens in this block is no training: its time does not count, that of earlier steps' work does."""
        self._wait()
        before = self._clock()
        try:
            yield
        finally:
            self._wait()
            if self._began is not None:
                self._began += self._clock() - before

    def lap(self) -> Lap:
        """Everything since the last lap; to be asked when the work is done."""
        now = self._clock()
        began = now if self._began is None else self._began
        found = Lap(tuple(self._steps), self._tokens, now - began, self._is_disturbed)
        self._began, self._steps, self._tokens, self._is_disturbed = now, [], 0, False
        return found


@dataclass
class ExpectedPace:
    """Measured against predicted, over the steps that can be compared."""

    predicted: StepSeconds
    source: str
    """In words: the rates from which it was predicted."""
    on_card: bool
    steps: int = 0
    measured_seconds: float = 0.0
    predicted_seconds: float = 0.0
    _seen: int = field(default=0, repr=False)
    _is_said: bool = field(default=False, repr=False)

    def add(self, lap: Lap) -> float:
        """Takes a lap; returns what its mean step was predicted to take."""
        expected = sum(self.predicted(lengths) for lengths in lap.steps)
        self._seen += len(lap.steps)
        if self._seen - len(lap.steps) >= FIRST_STEPS and not lap.is_disturbed:
            self.steps += len(lap.steps)
            self.measured_seconds += lap.seconds
            self.predicted_seconds += expected
        return expected / max(1, len(lap.steps))

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None before there is enough to compare."""
        if self.steps < COMPARED_STEPS or not self.predicted_seconds:
            return None
        return self.measured_seconds / self.predicted_seconds

    def warning(self) -> str | None:
        """In words that the run is far slower than predicted: once, when that is known."""
        ratio = self.ratio
        if ratio is None or ratio < FAR_SLOWER or self._is_said:
            return None
        self._is_said = True
        why = "something else may use the processor; top shows what does"
        if self.on_card:
            why = "something else may use the card, or heat or its power limit hold it back; nvidia-smi shows both"
        return (
            f"steps take {ratio:.1f} times as long as predicted, {self.measured_seconds / self.steps:.2f} s instead of "
            f"{self.predicted_seconds / self.steps:.2f} ({self.source}): {why}"
        )

    def __str__(self) -> str:
        """The result of a run."""
        if not self.steps:
            return "too few steps to compare their time with the prediction"
        measured, predicted = self.measured_seconds / self.steps, self.predicted_seconds / self.steps
        return f"{measured:.2f} s a step, predicted {predicted:.2f} ({measured / predicted - 1:+.0%})"
