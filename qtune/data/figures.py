"""Figures of prepared data: how long its parts are, what is scored, and a few rows as the model will see them."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qtune.data.inspection import Columns
from qtune.data.masks import IGNORED

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


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one kind, as text."""

    text: str
    scored: bool
    special: bool


@dataclass(frozen=True)
class Sample:
    """A row as the model will see it."""

    place: str
    tokens: int
    pieces: tuple[Piece, ...]
    unused: tuple[str, ...] = ()
    """Columns and keys of its row that nothing reads."""


def split_figures(split: Columns) -> SplitFigures:
    """The figures of a split."""
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


def samples_of(examples: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Sample]:
    """The shortest, the median and the longest example and some between: `count` of them, spread over the lengths."""
    if not len(examples):
        return []
    order = np.argsort(np.asarray(examples.with_format("numpy")["length"][:]), kind="stable")
    chosen = dict.fromkeys(order[np.linspace(0, len(order) - 1, count).round().astype(int)].tolist())
    return [_sample(examples[row], tokenizer) for row in chosen]


def _sample(example: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> Sample:
    ids, labels = example["input_ids"], example["labels"]
    assert isinstance(ids, list)
    assert isinstance(labels, list)
    special = set(tokenizer.added_tokens_decoder)
    kinds = [(label != IGNORED, token in special) for token, label in zip(ids, labels, strict=True)]
    borders = [0, *(at for at in range(1, len(ids)) if kinds[at] != kinds[at - 1]), len(ids)]
    # By decoding ever longer beginnings: what one token says may depend on the one before it.
    texts = [str(tokenizer.decode(ids[:end], skip_special_tokens=False)) for end in borders]
    pieces = [
        Piece(texts[number + 1][len(texts[number]) :], *kinds[start])
        for number, start in enumerate(borders[:-1])
        if start < len(ids)
    ]
    unused = example["unused"]
    assert isinstance(unused, list)
    return Sample(str(example["place"]), len(ids), tuple(pieces), tuple(unused))
