"""How much of a difference is noise: 95 % intervals of mean differences, over rows and over steps.

Rows are what was drawn, so they are the units: tokens of one row depend on each other. A mean over tokens is then a
ratio of two sums over rows, and the interval is the normal one of that ratio (Cochran, Sampling Techniques, 1977,
chapter 6) with Student's t. Both models answer the same rows, so their difference is taken row by row, which leaves out
how hard the rows are (Miller, Adding Error Bars to Evals, 2024, arXiv:2411.00640). Nothing is drawn at random: the same
run always gets the same interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

from qtune.recipe.steps import FEWEST

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Fall:
    """By how much a mean fell and the half width of its interval."""

    mean: float
    half_width: float
    most: float = math.inf
    """No fall and no rise can be larger: 1 of a share."""

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return max(self.mean - self.half_width, -self.most)

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return min(self.mean + self.half_width, self.most)

    @property
    def is_positive(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    @property
    def is_negative(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.high < 0


def unseen_share(rows: int, confidence: float = CONFIDENCE) -> float:
    """The largest share of all rows that may be otherwise where each of `rows` is the same: the bound of Clopper and
    Pearson (Biometrika 26, 1934) for none of them."""
    return float(1 - ((1 - confidence) / 2) ** (1 / rows))


def paired_fall(
    before: Sequence[float],
    after: Sequence[float],
    weights: Sequence[int],
    confidence: float = CONFIDENCE,
    *,
    are_shares: bool = False,
) -> Fall | None:
    """How far the mean fell from `before` to `after`, measured on the same rows.

    before, after: a mean for each row; weights: over how many it was taken (scored tokens; 1 for an answer that is
    right or wrong). are_shares: all of them lie between 0 and 1. Where every answer is right or wrong and every row
    fell by as much, the interval is not empty but what so many rows leave open. None: too few rows, or a value that is
    no number.
    """
    if len(before) < FEWEST or not all(map(math.isfinite, [*before, *after])):
        return None
    falls = [weight * (one - other) for one, other, weight in zip(before, after, weights, strict=True)]
    total, rows = sum(weights), len(falls)
    mean = sum(falls) / total
    residuals = sum((fall - mean * weight) ** 2 for fall, weight in zip(falls, weights, strict=True))
    error = math.sqrt(rows / (rows - 1) * residuals) / total
    if not are_shares:
        return Fall(mean, student_t(rows - 1, confidence) * error)
    is_binary = {*before, *after} <= {0.0, 1.0}
    is_same = is_binary and len({one - other for one, other in zip(before, after, strict=True)}) == 1
    half_width = unseen_share(rows, confidence) if is_same else student_t(rows - 1, confidence) * error
    return Fall(mean, half_width, most=1.0)


def fall_between(first: Sequence[float], last: Sequence[float]) -> Fall | None:
    """How far the mean fell from some steps to others, by Welch's interval (Biometrika 34, 1947): batches differ.

    None: too few steps, or a value that is no number.
    """
    if min(len(first), len(last)) < FEWEST or not all(map(math.isfinite, [*first, *last])):
        return None
    errors = [variance(values) / len(values) for values in (first, last)]
    mean = fmean(first) - fmean(last)
    if not sum(errors):
        return Fall(mean, 0.0)
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(values) - 1) for error, values in zip(errors, (first, last), strict=True)
    )
    return Fall(mean, student_t(freedom) * math.sqrt(sum(errors)))


def student_t(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Student's t for a two-sided interval: Abramowitz & Stegun 26.7.5.

    Within 0.5 % from 4 degrees of freedom on, for a confidence of 90 to 99.5 %; at 99.9 % it is 1.3 % short there.
    """
    x = NormalDist().inv_cdf(0.5 + confidence / 2)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / freedom**power for power, term in enumerate(terms, 1))
