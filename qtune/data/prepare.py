"""The [data] table -> datasets that training and evaluation read, every row accounted for.

rows -> conversations -> ids and labels happen once per source and are kept on disk (`store`); splitting, weights and
packing are choices of rows and cost nothing.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from qtune.cache import cache_folder, remove_unused
from qtune.data.choice import rows_set_aside, weighted_rows
from qtune.data.encoding import encode_source
from qtune.data.examples import RowRules
from qtune.data.formats import detect_format, renamed, unknown_columns, unknown_name
from qtune.data.packing import pack
from qtune.data.rows import BadRow, Row
from qtune.data.sources import Source, find_sources
from qtune.data.store import Stored, open_store, store_key
from qtune.data.template import ChatTemplate, Renderer, choose_template, template_key
from qtune.errors import DataError, Problem
from qtune.recipe.schema import Data
from qtune.spelling import did_you_mean

TRAINED = ["input_ids", "labels"]
MOST_ROWS = 500_000_000
"""Of an epoch: their numbers, eight bytes each, are shuffled in memory."""


@dataclass(frozen=True)
class SourceReport:
    """What became of the rows of one source."""

    name: str
    split: str
    row_format: str
    weight: float
    stored: Stored
    fingerprint: str
    """`Source.fingerprint`, read once: it is a hash of everything that the source holds."""


@dataclass(frozen=True)
class Prepared:
    """Datasets with the columns input_ids [length] and labels [length] (-100: not scored; not shifted).

    Packed training rows also have seq_lengths. `examples` holds the same splits, not packed and not weighted, with
    everything that is known of each example (`examples.COLUMNS`).
    """

    train: Dataset
    validation: Dataset | None
    examples: dict[str, Dataset]
    sources: tuple[SourceReport, ...]
    template: ChatTemplate
    end_of_turn: str | None
    packed: bool
    lengths: np.ndarray
    """Tokens of each row of `train`, [rows], for grouping by length."""
    tokenizer: PreTrainedTokenizerBase
    """What the rows were tokenized with."""
    order: np.ndarray | None = None
    """The example that each row of `train` is, [rows]; None where several are packed into one."""

    @property
    def bad_rows(self) -> list[BadRow]:
        """Rows that could not be used, of all sources; as many as are listed."""
        return [bad for source in self.sources for bad in source.stored.bad]

    @property
    def held_out(self) -> str | None:
        """The split that `qtune eval` reads: "test", else "validation"."""
        return next((split for split in ("test", "validation") if split in self.examples), None)


def prepare(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    seed: int = 42,
    cache: Path | None = None,
    split: str = "train",
) -> Prepared:
    """Reads, renders and tokenizes every source; relative paths start at `folder`.

    `split` is what data.train means of a folder that holds several splits.

    Raises:
        DataError: a source is missing, or rows are bad and the recipe does not skip them.
    """
    prepared = survey(data, tokenizer, folder, seed=seed, cache=cache, split=split)
    refuse_bad_rows(prepared, data)
    return prepared


def survey(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    seed: int = 42,
    cache: Path | None = None,
    split: str = "train",
) -> Prepared:
    """`prepare` that goes on over bad rows, so that a check can report everything at once.

    Raises:
        DataError: a source is missing, or its rows have no known shape.
    """
    template = choose_template(data.chat_template, tokenizer, folder)
    cache = cache or cache_folder() / "examples"
    remove_unused(cache)
    maker = _Maker(data, tokenizer, template, cache)
    train, weights = maker.split("train", find_sources(data.train, data, folder, split))
    examples = {"train": train}
    if isinstance(data.validation, float):
        chosen = rows_set_aside(train, data.validation, seed if data.validation_seed is None else data.validation_seed)
        kept = np.setdiff1d(np.arange(len(train)), chosen)
        examples["train"], weights = train.select(kept), weights[kept]
        if len(chosen):
            examples["validation"] = train.select(chosen)
    else:
        examples["validation"], _ = maker.split("validation", find_sources(data.validation, data, folder, "validation"))
    if data.test is not None:
        examples["test"], _ = maker.split("test", find_sources(data.test, data, folder, "test"))
    if weights.sum() > MOST_ROWS:
        message = f"the weights make {weights.sum():.3g} rows of an epoch, and at most {MOST_ROWS:,} can be ordered"
        raise DataError(Problem("data.train", f"{message}; lower them, or raise training.epochs instead"))
    order = weighted_rows(weights, seed)
    weighted = examples["train"].select(order)
    columns = {split: rows.select_columns(TRAINED) for split, rows in examples.items()}
    columns["train"] = (
        pack(weighted, data.max_length, maker.cache) if data.packing else weighted.select_columns(TRAINED)
    )
    end_of_turn = Renderer.of(tokenizer, template.text).end_of_turn
    return Prepared(
        columns["train"],
        columns.get("validation"),
        examples,
        tuple(maker.reports),
        template,
        end_of_turn,
        data.packing,
        _lengths(columns["train"]) if data.packing else np.asarray(weighted.with_format("numpy")["length"][:]),
        tokenizer,
        None if data.packing else order,
    )


def refuse_bad_rows(prepared: Prepared, data: Data) -> None:
    """Raises a DataError that lists the bad rows, if there are any that the recipe does not skip.

    A file that cannot be read to its end is never skipped: nobody knows how many rows are lost.
    """
    count = sum(source.stored.bad_count for source in prepared.sources)
    skipping = data.on_bad_row == "skip"
    listed = [bad for bad in prepared.bad_rows if bad.ends_file or not skipping]
    if listed:
        problems = [Problem(bad.place, bad.message) for bad in listed]
        if count > len(listed) and not skipping:
            problems.append(Problem("", f"… and {count - len(listed)} more bad rows"))
        if not any(bad.ends_file for bad in listed):
            ways = [
                f"fix {'them' if count > 1 else 'it'}",
                *dict.fromkeys(f"[data] {bad.advice}" for bad in listed if bad.advice),
            ]
            advice = f'{", or ".join(ways)}, or leave out what is bad with [data] on_bad_row = "skip"'
            problems.append(Problem("", f"{count} bad {'rows' if count > 1 else 'row'}; {advice}"))
        raise DataError(problems)
    if not len(prepared.train):
        raise DataError(Problem("data.train", "no row is left to train on"))


class _Maker:
    """Makes or finds the examples of sources, and keeps the reports."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, cache: Path) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.template = template
        self.template_key = template_key(template, tokenizer)
        self.cache = cache
        self.reports: list[SourceReport] = []

    def split(self, name: str, sources: Sequence[Source]) -> tuple[Dataset, np.ndarray]:
        """The examples of the sources one after the other, and the weight of each example."""
        parts, weights = [], []
        for source in sources:
            row_format = source.row_format if source.row_format != "auto" else _detected(source)
            rules = self._rules(source, row_format)
            fingerprint = source.fingerprint
            folder = self.cache / store_key(fingerprint, self.template_key, rules)
            stored = open_store(folder) or encode_source(source, self.tokenizer, self.template, rules, folder)
            _require_mapped(source, stored)
            self.reports.append(SourceReport(source.name, name, row_format, source.weight, stored, fingerprint))
            parts.append(stored.examples)
            weights.append(np.full(len(parts[-1]), source.weight))
        return concatenate_datasets(parts), np.concatenate(weights)

    def _rules(self, source: Source, row_format: str) -> RowRules:
        data = self.data
        return RowRules(
            row_format,
            source.columns,
            data.system,
            data.system_prompt,
            data.loss_on,
            data.on_rewritten_turn,
            data.max_length,
            data.on_long_row,
            data.on_turn_order,
            source.row_format == "auto",
        )


def _detected(source: Source) -> str:
    """The shape of the first rows that can be read; the first that is known counts."""
    first: list[Row] = [row for row in islice(source.rows(), 100) if isinstance(row, Row)]
    if not first:
        return "messages"  # nothing but bad rows, which are reported with their own reasons
    shape = next((name for row in first if (name := detect_format(renamed(row.value, source.columns)))), None)
    if shape is None:
        present = {key for row in first for key in row.value}
        missing = [
            _missing_column(ours, theirs, present) for ours, theirs in source.columns.items() if theirs not in present
        ]
        raise DataError([*missing, Problem(first[0].place, unknown_columns(first[0].value))])
    return shape


def _require_mapped(source: Source, stored: Stored) -> None:
    """Raises a DataError for names in `columns` that mean nothing: no shape has the one, or no row the other."""
    problems = []
    for ours, theirs in source.columns.items():
        problem = unknown_name(ours)
        if problem:
            problems.append(Problem(f"data.columns.{ours}", problem))
        elif stored.rows > stored.bad_count and not stored.mapped.get(ours):
            present = {key for row in islice(source.rows(), 100) if isinstance(row, Row) for key in row.value}
            problems.append(_missing_column(ours, theirs, present))
    if problems:
        raise DataError(problems)


def _missing_column(ours: str, theirs: str, present: Collection[str]) -> Problem:
    advice = did_you_mean(theirs, sorted(present), f"found {', '.join(sorted(present))}")
    return Problem(f"data.columns.{ours}", f"no row has a column {theirs!r}; {advice}")


def _lengths(packed: Dataset) -> np.ndarray:
    """Tokens of each packed row, [rows]."""
    arrow = packed.select_columns(["seq_lengths"]).with_format("arrow")
    parts = [[sum(row) for row in batch["seq_lengths"].to_pylist()] for batch in arrow.iter(batch_size=10_000)]
    return np.array([length for part in parts for length in part], dtype=np.int64)
