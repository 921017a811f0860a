"""Prepared data -> findings: what was noted on each row, and what shows only when all rows are seen together."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from qtune.data.alternatives import LOSSES, end_of_turn_advice, template_advice
from qtune.data.conversation import Conversation
from qtune.data.examples import opening_of
from qtune.data.findings import (
    ENOUGH_ROWS,
    FEW_ROWS,
    LISTED,
    OPENING_SHARE,
    SAME_ANSWER_SHARE,
    STRAY_SHARE,
    STRAY_TIMES,
    Finding,
    found,
)
from qtune.data.prepare import Prepared
from qtune.data.stream import RowStream
from qtune.data.stream_findings import StreamColumns
from qtune.recipe.schema import Data

REFUSAL_SHARE = 0.01


@dataclass(frozen=True)
class Columns:
    """The figures of a split's examples, each [examples], and how often each note stands on them."""

    name: str
    length: np.ndarray
    scored: np.ndarray
    largest_id: np.ndarray
    row_hash: np.ndarray
    prompt_hash: np.ndarray
    answer_hash: np.ndarray
    opening_hash: np.ndarray
    asked: np.ndarray
    """Hashes of what is asked in all examples, `prompts.Prompts.asked` of one after the other."""
    asked_in: np.ndarray
    """The example of each of these."""
    notes: Counter[str]
    note_places: dict[str, list[str]]
    examples: Dataset

    def __len__(self) -> int:
        return len(self.length)

    def has_prompts(self, hashes: np.ndarray) -> np.ndarray:
        """Whether prompts stand here, too, by their hashes: [hashes]."""
        return np.isin(hashes, self.prompt_hash)

    def has_asked(self, hashes: np.ndarray) -> np.ndarray:
        """Whether the same is asked here, too, by the hashes of `prompts.Prompts.asked`: [hashes]."""
        return np.isin(hashes, self.asked)

    def places(self, rows: Iterable[int]) -> list[str]:
        """Where the first of some rows stand."""
        return [self.examples[int(row)]["place"] for _, row in zip(range(LISTED), rows, strict=False)]

    def conversation_with(self, note: str) -> tuple[str, str]:
        """The place of the first example with a note, and its conversation as JSON."""
        place = self.note_places[note][0]
        rows = self.examples.select_columns(["place", "conversation"])
        return place, next(row["conversation"] for row in rows if row["place"] == place)


FIGURES = ("length", "scored", "largest_id", "row_hash", "prompt_hash", "answer_hash", "opening_hash")


@dataclass(frozen=True)
class Inspection:
    """The figures of each split, and everything that is found, errors first."""

    splits: dict[str, Columns | StreamColumns]
    findings: list[Finding]


def inspect(prepared: Prepared, data: Data, vocabulary: int) -> Inspection:
    """Looks at every example. `vocabulary` is the number of rows of the model's embedding."""
    whole = {
        name: _columns(name, examples)
        for name, examples in prepared.examples.items()
        if not isinstance(examples, RowStream)
    }
    splits: dict[str, Columns | StreamColumns] = {**whole}
    if (stream := prepared.stream) is not None:
        aside = whole["validation"] if len(stream.set_aside) else None
        noted, places = (aside.notes, set(aside.examples["place"])) if aside else (Counter[str](), set[str]())
        splits = {"train": StreamColumns.of(stream, noted, places), **splits}
    return Inspection(splits, _findings(prepared, data, vocabulary, splits))


def _columns(name: str, examples: Dataset) -> Columns:
    """Reads the figures of all examples, not their ids."""
    parts: dict[str, list[np.ndarray]] = {figure: [] for figure in (*FIGURES, "asked", "answers")}
    notes: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    arrow = examples.select_columns([*FIGURES, "asked_hashes", "notes", "place"]).with_format("arrow")
    for batch in arrow.iter(batch_size=10_000):
        for figure in FIGURES:
            parts[figure].append(batch[figure].to_numpy())
        parts["asked"].append(pc.list_flatten(batch["asked_hashes"]).to_numpy())
        parts["answers"].append(pc.list_value_length(batch["asked_hashes"]).to_numpy())
        for note, place in zip(batch["notes"].to_pylist(), batch["place"].to_pylist(), strict=True):
            for kind in note.split():
                notes[kind] += 1
                if len(listed := places.setdefault(kind, [])) < LISTED:
                    listed.append(place)
    figures = {name: np.concatenate(part or [np.array([], dtype=np.int64)]) for name, part in parts.items()}
    figures["asked_in"] = np.repeat(np.arange(len(figures["length"])), figures.pop("answers"))
    return Columns(name=name, notes=notes, note_places=places, examples=examples, **figures)


def _findings(
    prepared: Prepared, data: Data, vocabulary: int, splits: dict[str, Columns | StreamColumns]
) -> list[Finding]:
    findings = [
        *_of_template(prepared),
        *_of_vocabulary(prepared, vocabulary),
        *_needed_outside(prepared, vocabulary),
        *_of_sources(prepared, data),
    ]
    train = splits["train"]
    if 0 < len(train) < FEW_ROWS:
        findings.append(found("few-rows", "train", len(train), len(train)))
    for split in splits.values():
        findings += _of_notes(split, data, prepared)
        if isinstance(split, StreamColumns):
            findings += split.findings(vocabulary)
            continue
        findings += _out_of_vocabulary(split, vocabulary)
        if split is not train:
            findings += _overlap(train, split)
    if not isinstance(train, StreamColumns):
        findings += [*_duplicates(train), *_repetition(train)]
        if not prepared.packed:
            findings += _strays(train)
    return sorted(findings, key=lambda finding: finding.level != "error")


def _of_template(prepared: Prepared) -> Iterable[Finding]:
    if prepared.template.is_default:
        yield found("default-template", "", 0, 0, detail=prepared.template.origin)
    if "strftime_now" in prepared.template.text:
        yield found("dated-template", "", 0, 0)


def _of_vocabulary(prepared: Prepared, vocabulary: int) -> Iterable[Finding]:
    outside = {name: token for name, token in prepared.tokenizer.get_vocab().items() if token >= vocabulary}
    if not outside:
        return
    names = sorted(outside, key=lambda name: outside[name])
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    detail = f"{max(outside.values()) + 1} against {vocabulary}; {shown} {'has' if len(names) == 1 else 'have'} none"
    yield found("tokens-without-embedding", "", 0, 0, detail=detail)


def _needed_outside(prepared: Prepared, vocabulary: int) -> Iterable[Finding]:
    """Tokens that are in every batch or answer, whatever the rows hold."""
    ids = prepared.tokenizer.get_vocab()
    needed = {"the padding": prepared.tokenizer.pad_token, "the end of turn": prepared.end_of_turn}
    for what, token in needed.items():
        if token is not None and ids.get(str(token), 0) >= vocabulary:
            detail = f"{what}, {token}, is token {ids[str(token)]}; the model has {vocabulary}"
            yield found("out-of-vocabulary", "", 0, 0, detail=detail)


def _of_sources(prepared: Prepared, data: Data) -> Iterable[Finding]:
    for source in prepared.sources:
        stored = source.stored
        if stored.bad_count and data.on_bad_row == "skip":
            places = [f"{bad.place} ({bad.message})" for bad in stored.bad]
            yield found("skipped", source.split, stored.bad_count, stored.rows, places)
        if stored.dropped_count:
            yield found("dropped", source.split, stored.dropped_count, stored.rows, list(stored.dropped))
        if stored.out_of_order_count:
            places = list(stored.out_of_order)
            yield found("out-of-order", source.split, stored.out_of_order_count, stored.rows, places)
        if stored.unused:
            names = ", ".join(f"{name} in {count:,}" for name, count in stored.unused.items())
            yield found("unused", source.split, stored.rows_with_unused, stored.rows, detail=f"{source.name}: {names}")


def _of_notes(split: Columns | StreamColumns, data: Data, prepared: Prepared) -> Iterable[Finding]:
    for note, count in split.notes.items():
        kind = note
        if note == "rewritten-turn" and data.on_rewritten_turn != "error":
            kind = {"split": "split-turns", "last": "last-turn-only"}[data.on_rewritten_turn]
        if note == "refusal" and (count < ENOUGH_ROWS or count < REFUSAL_SHARE * len(split)):
            continue
        hint = _hint(kind, split, prepared)
        yield found(kind, split.name, count, len(split), split.note_places[note], hint=hint)


def _hint(kind: str, split: Columns | StreamColumns, prepared: Prepared) -> str:
    """What to do about a finding with this very template; "" where the kind's own advice is all that is known."""
    if kind == "no-end-of-turn":
        return end_of_turn_advice(prepared.template)
    if kind not in LOSSES:
        return ""
    place, conversation = split.conversation_with(kind)
    return template_advice(kind, Conversation.from_json(conversation, place), prepared.template, prepared.tokenizer)


def _out_of_vocabulary(split: Columns, vocabulary: int) -> Iterable[Finding]:
    outside = np.flatnonzero(split.largest_id >= vocabulary)
    if len(outside):
        detail = f"id {split.largest_id.max()}, the model has {vocabulary}"
        yield found("out-of-vocabulary", split.name, len(outside), len(split), split.places(outside), detail)


def _overlap(train: Columns | StreamColumns, split: Columns) -> Iterable[Finding]:
    """Rows of which something is asked in training too: their last question, to the letter or nearly, or an earlier
    one."""
    exact = train.has_prompts(split.prompt_hash)
    # Of each answer one of both hashes; the last one of a row is what it is asked.
    asked = train.has_asked(split.asked).reshape(-1, 2).any(axis=1)
    asked_in = split.asked_in[::2]
    last, earlier = np.zeros((2, len(split)), bool)
    np.logical_or.at(earlier, asked_in, asked)
    last[asked_in] = asked  # of a row that is named more than once the last one stays
    shared = np.flatnonzero(exact | earlier)
    if len(shared):
        nearly = {
            "but for white space, case, a system message or the turns behind it": last & ~exact,
            "in an earlier turn alone": earlier & ~last & ~exact,
        }
        detail = "; ".join(f"{rows.sum():,} of them {how}" for how, rows in nearly.items() if rows.any())
        yield found("overlap", split.name, len(shared), len(split), split.places(shared), detail)


def _duplicates(train: Columns) -> Iterable[Finding]:
    _, first = np.unique(train.row_hash, return_index=True)
    copies = np.setdiff1d(np.arange(len(train)), first)
    if len(copies):
        yield found("duplicate", "train", len(copies), len(train), train.places(copies))


def _strays(train: Columns) -> Iterable[Finding]:
    """Of rows that stand alone in a batch; packed ones are as long as data.max_length, all of them."""
    if len(train) < ENOUGH_ROWS:
        return
    most = max(1, int(STRAY_SHARE * len(train)))
    usual = int(np.sort(train.length)[-1 - most])
    rows = np.flatnonzero(train.length > STRAY_TIMES * usual)
    if len(rows):
        longest, others = int(train.length.max()), int(np.delete(train.length, rows).max())
        leave = f'data.max_length = {others} with data.on_long_row = "drop" leaves them out; see whether they are meant'
        detail = f"{longest:,} tokens, the others at most {others:,}"
        yield found("stray-length", "train", len(rows), len(train), train.places(rows), detail, leave)


def _repetition(train: Columns) -> Iterable[Finding]:
    if len(train) < ENOUGH_ROWS:
        return
    for kind, hashes, share in (
        ("same-answer", train.answer_hash, SAME_ANSWER_SHARE),
        ("boilerplate", train.opening_hash, OPENING_SHARE),
    ):
        values, counts = np.unique(hashes[hashes != 0], return_counts=True)
        if len(counts) and counts.max() >= max(ENOUGH_ROWS, share * len(train)):
            rows = np.flatnonzero(hashes == values[counts.argmax()])
            start = str(train.examples[int(rows[0])]["answer_start"])
            sample = opening_of(start) if kind == "boilerplate" else start
            yield found(kind, "train", len(rows), len(train), train.places(rows), f"“{sample}…”")
