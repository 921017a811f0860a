"""A few rows as the model will see them: their text in pieces, those that are scored told apart."""

import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qtune.data.masks import IGNORED
from qtune.data.stream import MOST_LENGTHS, RowStream

Kind = TypeVar("Kind", bound=Hashable)


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


def samples_of(
    examples: Dataset | RowStream, tokenizer: PreTrainedTokenizerBase, count: int, most: int
) -> list[Sample]:
    """The shortest, the median and the longest example of at most `most` tokens and some between: `count` of them,
    spread over the lengths."""
    order = by_length(examples, most) if len(examples) else np.zeros(0, np.int64)
    if not len(order):
        return []
    chosen = dict.fromkeys(order[np.linspace(0, len(order) - 1, count).round().astype(int)].tolist())
    return [_sample(example_of(examples, row), tokenizer) for row in chosen]


def example_of(examples: Dataset | RowStream, row: int) -> dict[str, Any]:
    """Everything that is known of an example."""
    found: dict[str, Any] = examples.example(row) if isinstance(examples, RowStream) else examples[row]
    return found


def by_length(examples: Dataset | RowStream, most: int = sys.maxsize) -> np.ndarray:
    """Numbers of the examples of at most `most` tokens, the shortest first; of a long stream, of some that are spread
    over it."""
    if isinstance(examples, RowStream):
        rows = examples.some(MOST_LENGTHS)
        lengths = examples.figures("length", rows)
    else:
        lengths = np.asarray(examples.with_format("numpy")["length"][:])
        rows = np.arange(len(lengths))
    order = np.argsort(lengths, kind="stable")
    shortest_first: np.ndarray = rows[order[lengths[order] <= most]]
    return shortest_first


def is_scored(example: dict[str, Any]) -> list[bool]:
    """Whether the loss sees a token: [length]."""
    return [label != IGNORED for label in example["labels"]]


def pieces_of(
    ids: Sequence[int], kinds: Sequence[Kind], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, Kind]]:
    """The text of the ids, cut where the kind of the tokens changes.

    Pieces are differences of growing prefixes: a piece decoded alone would lose a space at its start with tokenizers
    that write it into the first token.
    """
    end, before = 0, ""
    for kind, group in groupby(kinds):
        end += len(list(group))
        text = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        yield text[len(before) :], kind
        before = text


def _sample(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Sample:
    ids, special = example["input_ids"], set(tokenizer.added_tokens_decoder)
    kinds = list(zip(is_scored(example), [token in special for token in ids], strict=True))
    pieces = tuple(Piece(text, *kind) for text, kind in pieces_of(ids, kinds, tokenizer))
    return Sample(example["place"], len(ids), pieces, tuple(example["unused"]))
