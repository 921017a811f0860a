"""The order in which the rows of a stream are trained on: shuffled in windows that follow one another in the files.

Window w holds the rows w * size to (w + 1) * size, permuted by (seed, epoch, w) alone. So the rows of step k are known
without those of the steps before: going on after a stop needs no more of the past than k, and there is no buffer to be
saved. A window that holds all rows is the order of `batches.StepSampler`, exactly: NumPy seeds (seed, epoch) and
(seed, epoch, 0) alike.
"""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

ROWS_AT_ONCE = 8192
LengthsOf = Callable[[np.ndarray], np.ndarray]


class WindowSampler(Sampler[int]):
    """Row numbers of one epoch, step by step; within a step rows of like length stand next to each other.

    rows: of the stream. lengths_of: their tokens, [numbers] -> [numbers]. window: rows that are shuffled among each
    other; 0 leaves them in the order of the files. `batch_size` is the effective one, as in `StepSampler`.
    """

    def __init__(self, rows: int, lengths_of: LengthsOf, batch_size: int, seed: int, window: int) -> None:
        self.rows = rows
        self.lengths_of = lengths_of
        self.batch_size = batch_size
        self.seed = seed
        self.window = window
        self.epoch = 0
        self._permuted: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return self.rows

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has another order within the windows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for step in self.steps():
            yield from step

    def steps(self) -> Iterator[list[int]]:
        """The rows of each step of the current epoch."""
        # Many at once: whoever goes on in the middle of an epoch counts through all that are past.
        size = self.batch_size * max(1, ROWS_AT_ONCE // self.batch_size)
        for first in range(0, self.rows, size):
            rows = self._grouped(first, min(first + size, self.rows)).tolist()
            yield from (rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size))

    def step(self, place: int) -> np.ndarray:
        """The rows of one step of the current epoch, which are counted from 0: [rows of the step]."""
        start = place * self.batch_size
        return self._grouped(start, min(start + self.batch_size, self.rows))

    def _grouped(self, start: int, end: int) -> np.ndarray:
        """The rows at the places start to end, with which a step begins; within each step the longest first."""
        rows = self._at(start, end)
        steps = np.arange(end - start) // self.batch_size
        # Stable, so that rows of one length keep their random order.
        return rows[np.lexsort((-self.lengths_of(rows), steps))]

    def place_of(self, row: int) -> int:
        """The step of the current epoch in which a row stands."""
        if not self.window:
            return row // self.batch_size
        number = row // self.window
        inside = np.flatnonzero(self._shuffled(number) == row)[0]
        return int((number * self.window + inside) // self.batch_size)

    def _at(self, start: int, end: int) -> np.ndarray:
        """The rows at the places start to end of the epoch, before they are grouped."""
        if not self.window:
            return np.arange(start, end)
        parts = []
        for number in range(start // self.window, -(-end // self.window)):
            first = number * self.window
            parts.append(self._shuffled(number)[max(0, start - first) : end - first])
        return np.concatenate(parts)

    def _shuffled(self, number: int) -> np.ndarray:
        if self._permuted is None or self._permuted[0] != (self.epoch, number):
            first = number * self.window
            generator = np.random.default_rng((self.seed, self.epoch, number))
            permuted = first + generator.permutation(min(self.window, self.rows - first))
            self._permuted = (self.epoch, number), permuted
        return self._permuted[1]
