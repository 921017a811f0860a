"""Intervals of means over rows and over seeds, by drawing both again: the percentile bootstrap.

Rows and seeds are both a sample of what could have been: other rows of the same kind, other starts and orders. A draw
takes as many rows as there are, with replacement, the same ones for every run that is compared (their difference then
leaves out how hard the rows are), and of each configuration as many of its runs as there are (Davison and Hinkley,
Bootstrap Methods and their Application, 1997, sections 3.8 and 5.3). With three seeds an interval is too narrow: three
values, drawn again, hardly differ more than they do. Draws depend on nothing but the number of rows and runs. Where
every answer is right, or wrong, every draw says the same: then the interval is what so many rows leave open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtune.recipe.steps import FEWEST
from qtune.verdicts.interval import unseen_share

DRAWS = 4000
CONFIDENCE = 0.95
NUMBERS_AT_ONCE = 4_000_000
"""Rows of all draws that are in memory at once, 8 bytes each, twice."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its 95 % interval; both None where there were too few rows for one."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Drawn:
    """A mean over rows and runs, and the same mean of every draw [draws]."""

    mean: float
    draws: Numbers
    rows: int
    is_binary: bool = False
    """Whether each value is an answer that is right, 1, or wrong, 0."""

    def interval(self) -> Interval:
        """Its own."""
        return _interval(self.mean, self.draws, self.rows, (0.0, 1.0) if self.is_binary else None)

    def less(self, other: "Drawn") -> Interval:
        """The difference to another one on the same rows, drawn together."""
        bounds = (-1.0, 1.0) if self.is_binary and other.is_binary else None
        return _interval(self.mean - other.mean, self.draws - other.draws, self.rows, bounds)


def drawn(
    values: Sequence[Sequence[float]], weights: Sequence[float], salt: int, *, are_answers: bool = False
) -> Drawn:
    """The mean of `values` [runs, rows], each row with its weight [rows], and that of every draw.

    salt: makes the draws of runs independent of those of another configuration; those of rows are the same for all.
    are_answers: a value is the score of one, which may be 0 or 1 and nothing else.
    """
    table, weight = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    runs, rows = table.shape
    is_binary = are_answers and bool(np.isin(table, (0, 1)).all())
    of_runs = np.random.default_rng((rows, runs, salt)).multinomial(runs, np.full(runs, 1 / runs), DRAWS) / runs
    draw, equal = np.random.default_rng(rows), np.full(rows, 1 / rows)
    parts = []
    at_once = max(1, NUMBERS_AT_ONCE // rows)
    for first in range(0, DRAWS, at_once):
        of_rows = draw.multinomial(rows, equal, min(at_once, DRAWS - first)) * weight
        parts.append(of_rows @ table.T / of_rows.sum(axis=1, keepdims=True))
    means = np.concatenate(parts)
    return Drawn(float((table @ weight).mean() / weight.sum()), (means * of_runs).sum(axis=1), rows, is_binary)


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Of `values` [rows], each with its weight [rows]: what `drawn` gives as the mean of one run, without a draw."""
    return float(np.asarray(values, dtype=float) @ np.asarray(weights, dtype=float) / np.sum(weights))


def _interval(mean: float, draws: Numbers, rows: int, bounds: tuple[float, float] | None) -> Interval:
    if rows < FEWEST:  # a few rows, drawn again, are always the same rows
        return Interval(mean, None, None)
    if bounds is not None and np.ptp(draws) < 1e-9:
        least, most = bounds
        return Interval(mean, max(mean - unseen_share(rows), least), min(mean + unseen_share(rows), most))
    low, high = np.quantile(draws, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(mean, float(low), float(high))
