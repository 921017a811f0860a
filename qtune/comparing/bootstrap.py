"""Intervals of means over rows and over seeds, by drawing both again: the percentile bootstrap.

Rows and seeds are both a sample of what could have been: other rows of the same kind, other starts and orders. A draw
takes as many rows as there are, with replacement, the same ones for every run that is compared (their difference then
leaves out how hard the rows are), and of each configuration as many of its runs as there are (Davison and Hinkley,
Bootstrap Methods and their Application, 1997, sections 3.8 and 5.3). With three seeds an interval is too narrow: three
values, drawn again, hardly differ more than they do. Draws depend on nothing but the number of rows and runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtune.recipe.steps import FEWEST

DRAWS = 4000
CONFIDENCE = 0.95

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

    def interval(self) -> Interval:
        """Its own."""
        return _interval(self.mean, self.draws, self.rows)

    def less(self, other: "Drawn") -> Interval:
        """The difference to another one on the same rows, drawn together."""
        return _interval(self.mean - other.mean, self.draws - other.draws, self.rows)


def drawn(values: Sequence[Sequence[float]], weights: Sequence[float], salt: int) -> Drawn:
    """The mean of `values` [runs, rows], each row with its weight [rows], and that of every draw.

    salt: makes the draws of runs independent of those of another configuration; those of rows are the same for all.
    """
    table, weight = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    runs, rows = table.shape
    of_rows = np.random.default_rng(rows).multinomial(rows, np.full(rows, 1 / rows), DRAWS) * weight
    of_runs = np.random.default_rng((rows, runs, salt)).multinomial(runs, np.full(runs, 1 / runs), DRAWS) / runs
    means = of_rows @ table.T / of_rows.sum(axis=1, keepdims=True)
    return Drawn(float((table @ weight).mean() / weight.sum()), (means * of_runs).sum(axis=1), rows)


def _interval(mean: float, draws: Numbers, rows: int) -> Interval:
    if rows < FEWEST:  # a few rows, drawn again, are always the same rows
        return Interval(mean, None, None)
    low, high = np.quantile(draws, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(mean, float(low), float(high))
