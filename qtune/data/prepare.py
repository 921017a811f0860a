"""The [data] table -> datasets that training and evaluation read, every row accounted for.

rows -> conversations -> ids and labels happen once per source and are kept on disk (`store`); splitting, weights and
packing are choices of rows and cost nothing. Rows that the disk cannot keep are checked once and streamed (`stream`).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from qtune import console
from qtune.cache import cache_folder, remove_unused
from qtune.data.choice import rows_set_aside, weighted_rows
from qtune.data.encoding import encode_source
from qtune.data.examples import RowRules
from qtune.data.files import DataFile
from qtune.data.formats import detect_format, renamed, unknown_columns
from qtune.data.mapped_columns import Named, columns_of, first_rows, missing_columns, require_mapped, sources_of
from qtune.data.packing import pack
from qtune.data.rows import BadRow
from qtune.data.sources import Source, find_sources
from qtune.data.store import Stored, open_store, store_key, together
from qtune.data.stream import MOST_LENGTHS, RowStream
from qtune.data.stream_choice import WHOLE, Choice, choose_streaming
from qtune.data.stream_index import Index, index_key, make_index, open_index
from qtune.data.stream_seen import Seen
from qtune.data.stream_split import MOST_SET_ASIDE, examples_set_aside, kept_examples
from qtune.data.template import ChatTemplate, Renderer, choose_template, template_key
from qtune.errors import DataError, Problem
from qtune.recipe.schema import Data

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

    @property
    def is_empty(self) -> bool:
        """Whether nothing was found in it that could be a row: also none that is bad or was left out."""
        stored = self.stored
        return not (stored.rows or stored.bad_count or stored.dropped_count or stored.out_of_order_count)


@dataclass(frozen=True)
class Prepared:
    """Datasets with the columns input_ids [length] and labels [length] (-100: not scored; not shifted).

    Packed training rows also have seq_lengths. `examples` holds the same splits, not packed and not weighted, with
    everything that is known of each example (`examples.COLUMNS`). Streamed training rows are one `RowStream` in both
    places.
    """

    train: Dataset | RowStream
    validation: Dataset | None
    examples: dict[str, Any]
    sources: tuple[SourceReport, ...]
    template: ChatTemplate
    end_of_turn: str | None
    packed: bool
    lengths: np.ndarray
    """Tokens of each row of `train`, [rows], for grouping by length; of a long stream, of MOST_LENGTHS rows spread over
    it."""
    tokenizer: PreTrainedTokenizerBase
    """What the rows were tokenized with."""
    order: np.ndarray | None = None
    """The example that each row of `train` is, [rows]; None where several are packed into one, or rows are streamed."""
    streaming: Choice = WHOLE
    """Whether the training rows are streamed, and why."""
    packed_rows: int = 0
    """How many rows, each as often as its weight says, are packed into those of `train`; 0 where none are."""

    @property
    def stream(self) -> RowStream | None:
        """The training rows where they are streamed."""
        return self.train if isinstance(self.train, RowStream) else None

    def row(self, number: int) -> dict[str, Any]:
        """A row of `train`; of a stream without those around it, which a step would need."""
        found: dict[str, Any] = self.train[number] if self.stream is None else self.stream.example(number)
        return found

    def close(self) -> None:
        """Ends what reads streamed rows ahead; asking for a row begins it anew."""
        if self.stream is not None:
            self.stream.close()

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
    maker = _Maker(data, tokenizer, template, cache, lambda: sources_of(data, folder, split))
    sources = find_sources(data.train, data, folder, split)
    streaming = choose_streaming(data, sources, cache)
    if streaming.streams:
        return _streamed(maker, sources, folder, seed, streaming)
    if streaming.is_tight:
        console.say(streaming.reason)
    train, weights = maker.split("train", sources)
    examples = {"train": train}
    if isinstance(data.validation, float):
        chosen = rows_set_aside(train, data.validation, seed if data.validation_seed is None else data.validation_seed)
        kept = np.setdiff1d(np.arange(len(train)), chosen)
        examples["train"], weights = train.select(kept), weights[kept]
        if len(chosen):
            examples["validation"] = train.select(chosen)
    else:
        examples["validation"], _ = maker.split("validation", find_sources(data.validation, data, folder, "validation"))
    examples |= maker.tests(folder)
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
        streaming,
        len(order) if data.packing else 0,
    )


def _streamed(maker: "_Maker", sources: Sequence[Source], folder: Path, seed: int, streaming: Choice) -> Prepared:
    """`survey` of training rows that stay in their files. Validation and test rows are prepared as ever."""
    data, tokenizer, template = maker.data, copy.deepcopy(maker.tokenizer), maker.template
    if data.streaming == "auto":
        console.say(f"the training rows are streamed: {streaming.reason}")
    indexes = maker.indexes("train", sources)
    set_aside = np.zeros(0, np.int64)
    examples: dict[str, Any] = {}
    if isinstance(data.validation, float):
        split_seed = seed if data.validation_seed is None else data.validation_seed
        set_aside = examples_set_aside(indexes, data.validation, split_seed)
        if len(set_aside):
            examples["validation"] = kept_examples(indexes, set_aside, tokenizer, template, maker.cache)
        if data.validation * sum(map(len, indexes)) > MOST_SET_ASIDE:
            console.say(f"{len(set_aside):,} rows are set aside for validation: of a stream, no larger share than that")
    else:
        examples["validation"], _ = maker.split("validation", find_sources(data.validation, data, folder, "validation"))
    examples |= maker.tests(folder)
    stream = RowStream(indexes, set_aside, data.shuffle_rows, tokenizer, template)
    validation = examples.get("validation")
    return Prepared(
        stream,
        None if validation is None else validation.select_columns(TRAINED),
        {"train": stream, **examples},
        tuple(maker.reports),
        template,
        Renderer.of(tokenizer, template.text).end_of_turn,
        False,
        stream.figures("length", stream.some(MOST_LENGTHS)),
        maker.tokenizer,
        streaming=streaming,
    )


ALIKE = 3
"""Bad lines of one file, of which the same is said, that have a line each; more of them share one."""


def named_together(bad_rows: Sequence[BadRow]) -> list[tuple[str, str]]:
    """(place, message) of all bad rows, in their order; "rows.csv:2 to 101, 105" of many with one fault in one file."""
    alike: dict[tuple[str, str], list[int]] = {}
    for bad in bad_rows:
        file, _, line = bad.place.rpartition(":")
        if file and line.isdecimal():
            alike.setdefault((file, bad.message), []).append(int(line))
    named: dict[tuple[str, str], None] = {}
    for bad in bad_rows:
        file = bad.place.rpartition(":")[0]
        lines = alike.get((file, bad.message), [])
        named[f"{file}:{_ranges(lines)}" if len(lines) > ALIKE else bad.place, bad.message] = None
    return list(named)


def _ranges(lines: Sequence[int]) -> str:
    """Line numbers as they rise: "2 to 101, 105"."""
    parts: list[list[int]] = []
    for line in sorted(set(lines)):
        if parts and line == parts[-1][-1] + 1:
            parts[-1][1:] = [line]
        else:
            parts.append([line])
    return ", ".join(" to ".join(map(str, part)) for part in parts)


def refuse_bad_rows(prepared: Prepared, data: Data) -> None:
    """Raises a DataError that lists the bad rows, if there are any that the recipe does not skip.

    A file that cannot be read to its end is never skipped: nobody knows how many rows are lost.
    """
    count = sum(source.stored.bad_count for source in prepared.sources)
    skipping = data.on_bad_row == "skip"
    listed = [bad for bad in prepared.bad_rows if bad.ends_file or not skipping]
    if listed:
        problems = [Problem(place, message) for place, message in named_together(listed)]
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
        train = [source for source in prepared.sources if source.split == "train"]
        empty = ", ".join(source.name for source in train if source.is_empty)
        said = f"; {empty} holds no row: one is a line of JSONL, or one below CSV's names" if empty else ""
        raise DataError(Problem("data.train", f"no row is left to train on{said}"))


class _Maker:
    """Makes or finds the examples of sources, and keeps the reports."""

    def __init__(
        self,
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        cache: Path,
        named: Callable[[], Sequence[Named]],
    ) -> None:
        self.data = data
        self.named = named
        """Finds every source of the recipe, for a message that speaks of others."""
        self.tokenizer = tokenizer
        self.template = template
        self.template_key = template_key(template, tokenizer)
        self.cache = cache
        self.reports: list[SourceReport] = []

    def split(self, name: str, sources: Sequence[Source]) -> tuple[Dataset, np.ndarray]:
        """The examples of the sources one after the other, and the weight of each example."""
        parts, weights = [], []
        for source in sources:
            row_format = source.row_format if source.row_format != "auto" else _detected(source, name, self.named)
            rules = self._rules(source, row_format)
            fingerprint = source.fingerprint
            folder = self.cache / store_key(fingerprint, self.template_key, rules)
            stored = open_store(folder) or encode_source(source, self.tokenizer, self.template, rules, folder)
            require_mapped(source, stored, name, self.named)
            self.reports.append(SourceReport(source.name, name, row_format, source.weight, stored, fingerprint))
            parts.append(stored.examples)
            weights.append(np.full(len(parts[-1]), source.weight))
        return concatenate_datasets(parts), np.concatenate(weights)

    def tests(self, folder: Path) -> dict[str, Dataset]:
        """The test rows, where the recipe names some."""
        if self.data.test is None:
            return {}
        return {"test": self.split("test", find_sources(self.data.test, self.data, folder, "test"))[0]}

    def indexes(self, name: str, sources: Sequence[Source]) -> list[Index]:
        """What a pass over each source finds, or has found before."""
        found, seen = [], Seen(self.cache)
        for source in sources:
            row_format = source.row_format if source.row_format != "auto" else _detected(source, name, self.named)
            rules = self._rules(source, row_format)
            indexes = [self._index(replace(source, files=(file,)), file, rules, seen) for file in source.files]
            stored = together(index.stored for index in indexes)
            require_mapped(source, stored, name, self.named)
            fingerprint = source.fingerprint_by(seen.digest)
            self.reports.append(SourceReport(source.name, name, row_format, source.weight, stored, fingerprint))
            found += indexes
        return found

    def _index(self, alone: Source, file: DataFile, rules: RowRules, seen: Seen) -> Index:
        """Of one file; `alone`: its source without the others, whose name it goes by."""
        folder = self.cache / index_key(store_key(alone.fingerprint_by(seen.digest), self.template_key, rules))
        known = open_index(folder, file, rules)
        return known or make_index(file, self.tokenizer, self.template, rules, folder)

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


def _detected(source: Source, split: str, others: Callable[[], Sequence[Named]]) -> str:
    """The shape of the first rows that can be read; the first that is known counts."""
    first = first_rows(source)
    if not first:
        return "messages"  # nothing but bad rows, which are reported with their own reasons
    shape = next((name for row in first if (name := detect_format(renamed(row.value, source.columns)))), None)
    if shape is None:
        present = columns_of(first)
        missing = [ours for ours, theirs in source.columns.items() if theirs not in present]
        # With the names of `columns` put right the shape may be known: what else is wrong can only be said then.
        problems = missing_columns(source, missing, present, split, others()) if missing else []
        raise DataError(problems or Problem(first[0].place, unknown_columns(first[0].value)))
    return shape


def _lengths(packed: Dataset) -> np.ndarray:
    """Tokens of each packed row, [rows]."""
    arrow = packed.select_columns(["seq_lengths"]).with_format("arrow")
    parts = [[sum(row) for row in batch["seq_lengths"].to_pylist()] for batch in arrow.iter(batch_size=10_000)]
    return np.array([length for part in parts for length in part], dtype=np.int64)
