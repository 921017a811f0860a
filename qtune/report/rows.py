"""Training rows as the model sees them: every token of the rendered conversation, those that are scored told apart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qtune.data.masks import IGNORED
from qtune.data.prepare import Prepared, prepare
from qtune.model.load import load_tokenizer
from qtune.run.folder import RunDir
from qtune.run.lock import rows_hash
from qtune.run.resolved import read_resolved


@dataclass(frozen=True)
class ShownRow:
    """One row: why it was chosen, where it stands, and its text in pieces that are scored or not."""

    title: str
    place: str
    tokens: int
    scored: int
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class ShownRows:
    """The chosen rows, how many there are, and what stands before each of them without being text."""

    rows: tuple[ShownRow, ...]
    train_rows: int
    validation_rows: int
    virtual_tokens: int
    template: str
    changed: bool
    """Whether the files hold other rows now than those that were trained on."""


def rows_of(run_dir: RunDir, trained_on: str | None = None) -> ShownRows:
    """A few rows of a run: the first, one of middle length, the longest, and one that is held out for validation.

    `trained_on` is the run's hash of its training rows (`lock.rows_hash`).

    Raises:
        InputError: the rows or the tokenizer are no longer where the run found them.
    """
    resolved = read_resolved(run_dir)
    recipe = resolved.recipe
    tokenizer = load_tokenizer(recipe.model)
    prepared = prepare(recipe.data, tokenizer, resolved.folder, seed=recipe.training.seed)
    validation = prepared.examples.get("validation")
    return ShownRows(
        tuple(_chosen(prepared, tokenizer)),
        len(prepared.examples["train"]),
        0 if validation is None else len(validation),
        recipe.adapter.prompt_length,
        prepared.template.origin,
        trained_on is not None and rows_hash(prepared) != trained_on,
    )


def _chosen(prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> Iterator[ShownRow]:
    train = prepared.examples["train"]
    by_length = np.argsort(np.asarray(train.with_format("numpy")["length"][:]), kind="stable")
    wanted = {"first row": 0, "middle length": int(by_length[len(by_length) // 2]), "longest": int(by_length[-1])}
    seen = set()
    for title, number in wanted.items():
        if number not in seen:
            seen.add(number)
            yield shown_row(title, train[number], tokenizer)
    if "validation" in prepared.examples:
        yield shown_row("held out for validation", prepared.examples["validation"][0], tokenizer)


def shown_row(title: str, example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> ShownRow:
    """An example of `data.examples` as text with its scored pieces."""
    ids, labels = example["input_ids"], example["labels"]
    scored = [label != IGNORED for label in labels]
    return ShownRow(title, example["place"], len(ids), sum(scored), tuple(pieces_of(ids, scored, tokenizer)))


def pieces_of(
    ids: Sequence[int], scored: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool]]:
    """The text of the ids, cut where scoring begins or ends.

    Pieces are differences of growing prefixes: a piece decoded alone would lose a space at its start with tokenizers
    that write it into the first token.
    """
    end, before = 0, ""
    for is_scored, group in groupby(scored):
        end += len(list(group))
        text = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        yield text[len(before) :], is_scored
        before = text
