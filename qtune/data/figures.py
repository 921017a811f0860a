"""Figures of prepared data: how long its parts are, and how much of them is scored."""

from dataclasses import dataclass

import numpy as np

from qtune.data.inspection import Columns
from qtune.data.stream_findings import StreamColumns, sum_of_counts

BINS = 8


@dataclass(frozen=True)
class Lengths:
    """Tokens of a part of each example: quantiles, and counts per bin between `edges`."""

    smallest: int
    median: int
    p95: int
    largest: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class SplitFigures:
    """A split in figures; `scored` are the tokens that the loss sees."""

    name: str
    examples: int
    tokens: int
    scored: int
    prompt: Lengths
    answer: Lengths
    total: Lengths
    refused: int
    """Examples that are too long to be used, which are in none of the other figures."""


def split_figures(split: Columns | StreamColumns, most: int) -> SplitFigures:
    """The figures of the examples of a split that have at most `most` tokens."""
    if isinstance(split, StreamColumns):
        seen = split.counts_within(most)
        prompt, answer, total = map(lengths_of_counts, seen)
        examples = int(seen.length.sum())
        return SplitFigures(
            split.name,
            examples,
            sum_of_counts(seen.length),
            sum_of_counts(seen.scored),
            prompt,
            answer,
            total,
            len(split) - examples,
        )
    within = split.length <= most
    length, scored = split.length[within], split.scored[within]
    return SplitFigures(
        split.name,
        len(length),
        int(length.sum()),
        int(scored.sum()),
        lengths_of(length - scored),
        lengths_of(scored),
        lengths_of(length),
        len(split) - len(length),
    )


def lengths_of(values: np.ndarray) -> Lengths:
    """Quantiles and a histogram whose bins are whole numbers of tokens wide."""
    if not len(values):
        return Lengths(0, 0, 0, 0, (0, 1), (0,))
    smallest, median, p95, largest = (int(value) for value in np.quantile(values, (0, 0.5, 0.95, 1), method="nearest"))
    width = max(1, -(-(largest + 1 - smallest) // BINS))
    edges = np.arange(smallest, smallest + (BINS + 1) * width, width)
    edges = edges[: np.searchsorted(edges, largest, side="right") + 1]
    counts, _ = np.histogram(values, edges)
    return Lengths(smallest, median, p95, largest, tuple(edges.tolist()), tuple(counts.tolist()))


def lengths_of_counts(counts: np.ndarray) -> Lengths:
    """`lengths_of` values of which only is known how often each number of tokens is there: [tokens + 1]."""
    total = int(counts.sum())
    if not total:
        return Lengths(0, 0, 0, 0, (0, 1), (0,))
    ends = np.cumsum(counts)
    # NumPy's "nearest" rounds half to even, as round does.
    ranks = [round(share * (total - 1)) for share in (0, 0.5, 0.95, 1)]
    smallest, median, p95, largest = (int(np.searchsorted(ends, rank, side="right")) for rank in ranks)
    width = max(1, -(-(largest + 1 - smallest) // BINS))
    edges = np.arange(smallest, smallest + (BINS + 1) * width, width)
    edges = edges[: np.searchsorted(edges, largest, side="right") + 1]
    before = np.concatenate([[0], ends])[np.minimum(edges, len(ends))]
    return Lengths(smallest, median, p95, largest, tuple(edges.tolist()), tuple(np.diff(before).tolist()))
