"""The longest rows of a recipe: what its largest micro-batch is made of, and so what its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qtune.data.lengths import most_tokens
from qtune.data.masks import IGNORED
from qtune.data.prepare import survey
from qtune.errors import InputError
from qtune.memory.predict import Longest
from qtune.model.load import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

    from qtune.data.prepare import Prepared
    from qtune.data.stream import RowStream
    from qtune.recipe.file import Resolved
    from qtune.recipe.schema import Data


@dataclass(frozen=True, eq=False)
class RowLengths:
    """The rows of an epoch and of an evaluation, as far as time depends on them."""

    train: np.ndarray
    """Tokens of each training row, packed ones where rows are packed."""
    validation: np.ndarray
    scored_share: float
    """Labelled tokens among all of the training rows."""
    streamed_rows: int | None = None
    """Training rows of a stream; of a long one `train` has those of some, spread over it."""

    @property
    def rows(self) -> int:
        """Training rows."""
        return len(self.train) if self.streamed_rows is None else self.streamed_rows


@dataclass(frozen=True)
class Rows:
    """The longest rows, and in words where they are known from."""

    longest: Longest
    known_from: str
    data: RowLengths | None = None
    """All of them, where the data could be read."""


def longest_rows(resolved: Resolved, length: int | None = None) -> Rows:
    """The longest rows of the recipe's data; `length` stands for any; `max_length` where the data cannot be read.

    The rows are prepared as a run prepares them, and come from its cache.
    """
    if length is not None:
        return Rows(Longest(length), "--length, every token scored")
    recipe = resolved.recipe
    try:
        tokenizer = load_tokenizer(recipe.model)
        prepared = survey(recipe.data, tokenizer, resolved.folder, seed=recipe.training.seed)
    except InputError as error:
        first = error.problems[0]
        return unread(recipe.data.max_length, f"{first.place}: {first.message.partition(';')[0]}")
    return (
        longest_of(prepared, recipe.data) if len(prepared.train) else unread(recipe.data.max_length, "there are none")
    )


def unread(max_length: int, reason: str) -> Rows:
    """The most that can come, where rows cannot be looked at."""
    return Rows(Longest(max_length), f"data.max_length, every token scored; the rows cannot be read: {reason}")


def longest_of(prepared: Prepared, data: Data) -> Rows:
    """The longest row that would be trained on, and the most labelled tokens that any of them has.

    A row beyond max_length stops the run until it is cut, dropped or allowed: unless it is, it decides nothing here.

    A micro-batch is padded to its longest row, and rows of like length share one: the largest of a run holds
    micro_batch_size x length positions, exactly. That all of its rows have as many labelled tokens as any row has is
    the most that can come.
    """
    if prepared.stream is not None:
        return _longest_of_stream(prepared, prepared.stream, data)
    lengths = prepared.lengths
    limit = most_tokens(data)
    if not (lengths <= limit).any():
        return unread(data.max_length, f"each is longer than max_length = {limit}")
    longest, scored = int(lengths[lengths <= limit].max()), _most_in_packed(prepared.train) if prepared.packed else 0
    evaluated = None
    for split in ("train", "validation"):
        if split in prepared.examples and not (split == "train" and prepared.packed):
            scored = max(scored, _largest(prepared.examples[split], "scored", limit))
    if "validation" in prepared.examples:
        evaluated = _largest(prepared.examples["validation"], "length", limit) or None
    row = Longest(longest, scored, bool((lengths[lengths <= limit] == longest).all()), evaluated)
    what = "packed rows" if prepared.packed else "training rows"
    beyond = int((lengths > limit).sum())
    left_out = f", {beyond:,} beyond max_length left out" if beyond else ""
    where = "" if prepared.packed else f" ({_place(prepared, longest)})"
    known_from = (
        f"the longest of {len(lengths):,} {what}{where}{left_out}; at most {scored:,} tokens of a row are scored"
    )
    return Rows(row, known_from, _all_of(prepared, limit))


def _longest_of_stream(prepared: Prepared, stream: RowStream, data: Data) -> Rows:
    """The same of rows that are streamed, from their figures piece by piece."""
    limit = most_tokens(data)
    longest = scored = tokens = labelled = beyond = place = 0
    shortest = limit
    for first, part in stream.all_figures("length", "scored"):
        lengths, within = part["length"], part["length"] <= limit
        beyond += int((~within).sum())
        if not within.any():
            continue
        tokens, labelled = tokens + int(lengths[within].sum()), labelled + int(part["scored"][within].sum())
        scored = max(scored, int(part["scored"][within].max()))
        shortest = min(shortest, int(lengths[within].min()))
        if (largest := int(lengths[within].max())) > longest:
            longest, place = largest, first + int(np.flatnonzero(lengths == largest)[0])
    if not longest:
        return unread(data.max_length, f"each is longer than max_length = {limit}")
    evaluated = None
    if (held_out := prepared.examples.get("validation")) is not None:
        scored = max(scored, _largest(held_out, "scored", limit))
        evaluated = _largest(held_out, "length", limit) or None
    left_out = f", {beyond:,} beyond max_length left out" if beyond else ""
    known_from = (
        f"the longest of {len(stream):,} streamed rows ({stream.example(place)['place']}){left_out}; at most "
        f"{scored:,} tokens of a row are scored"
    )
    row = Longest(longest, scored, shortest == longest, evaluated)
    train, share = _within(prepared.lengths, limit), labelled / max(1, tokens)
    return Rows(row, known_from, RowLengths(train, _held_out(prepared, limit), share, len(stream) - beyond))


def _largest(examples: Dataset, name: str, limit: int) -> int:
    """The largest figure of the rows of at most `limit` tokens; 0 where there are none."""
    values = _column(examples, name)[_column(examples, "length") <= limit]
    return int(values.max()) if len(values) else 0


def _place(prepared: Prepared, longest: int) -> str:
    """Where the row stands that decides: the first of its length."""
    examples = prepared.examples["train"]
    return str(examples[int(np.flatnonzero(_column(examples, "length") == longest)[0])]["place"])


def _all_of(prepared: Prepared, limit: int) -> RowLengths:
    """The rows of at most `limit` tokens."""
    scored, lengths = (_column(prepared.examples["train"], name) for name in ("scored", "length"))
    share = float(scored[lengths <= limit].sum()) / max(1.0, float(lengths[lengths <= limit].sum()))
    return RowLengths(_within(np.asarray(prepared.lengths), limit), _held_out(prepared, limit), share)


def _held_out(prepared: Prepared, limit: int) -> np.ndarray:
    """Tokens of each validation row that has at most `limit` of them."""
    held_out = prepared.examples.get("validation")
    return np.zeros(0, dtype=np.int64) if held_out is None else _within(_column(held_out, "length"), limit)


def _within(lengths: np.ndarray, limit: int) -> np.ndarray:
    return lengths[lengths <= limit]


def _most_in_packed(rows: Dataset) -> int:
    """The most labelled tokens of any packed row."""
    most = 0
    for batch in rows.select_columns(["labels"]).with_format("arrow").iter(batch_size=1000):
        labels = batch["labels"].combine_chunks()
        counted = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy() != IGNORED)])
        borders = np.concatenate([[0], np.cumsum(labels.value_lengths().to_numpy())])
        most = max(most, int(np.diff(counted[borders]).max()))
    return most


def _column(examples: Dataset, name: str) -> np.ndarray:
    """One column of figures, [examples]."""
    return np.asarray(examples.with_format("numpy")[name][:])
