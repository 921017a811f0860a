"""Figures of prepared data: how long its parts are, and how much of them is scored."""

from dataclasses import dataclass

import numpy as np

from qtune.data.inspection import Columns
from qtune.data.stream_findings import StreamColumns

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


def split_figures(split: Columns | StreamColumns) -> SplitFigures:
    """The figures of a split."""
    if isinstance(split, StreamColumns):
        return SplitFigures(
            split.name,
            len(split),
            split.tokens,
            split.scored_tokens,
            lengths_of_counts(split.prompt_counts),
            lengths_of_counts(split.answer_counts),
            lengths_of_counts(split.length_counts),
        )
    return SplitFigures(
        split.name,
        len(split),
        int(split.length.sum()),
        int(split.scored.sum()),
        lengths_of(split.length - split.scored),
        lengths_of(split.scored),
        lengths_of(split.length),
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
