"""The figures of a stream's rows, and what shows only when all of them are seen together, in bounded memory.

Figures lie on the disk and are looked at in pieces. Copies are found by sorting hashes there; what most rows share, by
looking at some rows for what may be it and counting that in all of them.
"""

import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qtune.data.examples import opening_of
from qtune.data.findings import (
    ENOUGH_ROWS,
    LISTED,
    OPENING_SHARE,
    SAME_ANSWER_SHARE,
    Finding,
    found,
)
from qtune.data.stream import FIGURES_AT_ONCE, RowStream

LOOKED_AT = 100_000
"""Rows in which a hash that a fifth of all rows have is looked for: the chance to miss it is below 10^-9000."""


class Counts(NamedTuple):
    """How many rows have so many tokens, [tokens + 1] each."""

    prompt: np.ndarray
    """Tokens that are not scored."""
    scored: np.ndarray
    length: np.ndarray


@dataclass(frozen=True, eq=False)
class StreamColumns:
    """The figures of a stream's training rows; `inspection.Columns` where they fit in memory."""

    name: str
    notes: Counter[str]
    note_places: dict[str, list[str]]
    stream: RowStream

    @classmethod
    def of(cls, stream: RowStream, notes_aside: Counter[str], places_aside: Container[str]) -> "StreamColumns":
        """Of the training rows; notes_aside and places_aside are of those set aside, which were counted with them."""
        notes: Counter[str] = Counter()
        places: dict[str, list[str]] = {}
        for index in stream.indexes:
            notes.update(index.notes)
            for note, listed in index.note_places.items():
                ours = [place for place in listed if place not in places_aside]
                places[note] = [*places.get(note, ()), *ours][:LISTED]
        return cls("train", notes - notes_aside, places, stream)

    def __len__(self) -> int:
        return len(self.stream)

    def conversation_with(self, note: str) -> tuple[str, str]:
        """The place of the first example with a note, and its conversation as JSON."""
        before = 0
        for index in self.stream.indexes:
            if note in index.note_examples:
                example = self.stream.example_of_number(before + index.note_examples[note])
                return example["place"], example["conversation"]
            before += len(index)
        raise KeyError(note)

    def has_prompts(self, hashes: np.ndarray) -> np.ndarray:
        """Whether prompts stand here, too, by their hashes: [hashes]."""
        return self.stream.has_prompts(hashes)

    def has_asked(self, hashes: np.ndarray) -> np.ndarray:
        """Whether the same is asked here, too, by the hashes of `prompts.Prompts.asked`: [hashes]."""
        return self.stream.has_asked(hashes)

    def counts_within(self, most: int) -> "Counts":
        """How many of the rows with at most `most` tokens have so many of them."""
        counts = dict.fromkeys(("prompt", "scored", "length"), np.zeros(1, np.int64))
        for _, part in self.stream.all_figures("length", "scored"):
            within = part["length"] <= most
            length, scored = part["length"][within], part["scored"][within]
            for name, values in {"prompt": length - scored, "scored": scored, "length": length}.items():
                size = max(len(counts[name]), int(values.max(initial=0)) + 1)
                more = np.bincount(values, minlength=size)
                more[: len(counts[name])] += counts[name]
                counts[name] = more
        return Counts(**counts)

    def findings(self, vocabulary: int) -> Iterator[Finding]:
        """What of the training rows shows only when they are seen together."""
        yield from self._out_of_vocabulary(vocabulary)
        yield from self._copies()
        yield from self._repetition()

    def _places(self, rows: Iterable[int]) -> list[str]:
        return [self.stream.example(int(row))["place"] for _, row in zip(range(LISTED), rows, strict=False)]

    def _out_of_vocabulary(self, vocabulary: int) -> Iterator[Finding]:
        count, largest = 0, 0
        rows: list[int] = []
        for first, part in self.stream.all_figures("largest_id"):
            outside = np.flatnonzero(part["largest_id"] >= vocabulary)
            count += len(outside)
            largest = max(largest, int(part["largest_id"].max()))
            rows += (first + outside[:LISTED]).tolist()
        if count:
            detail = f"id {largest}, the model has {vocabulary}"
            yield found("out-of-vocabulary", self.name, count, len(self), self._places(rows), detail)

    def _copies(self) -> Iterator[Finding]:
        count, some = 0, np.zeros(0, np.int64)
        with _sorted_hashes(self.stream) as hashes:
            for start in range(1, len(hashes), FIGURES_AT_ONCE):
                part = hashes[start - 1 : start + FIGURES_AT_ONCE]
                same = part[1:][part[1:] == part[:-1]]
                count += len(same)
                some = np.concatenate([some, same[:LISTED]])[:LISTED]
        if count:
            yield found("duplicate", self.name, count, len(self), self._places(self._later_ones(some)))

    def _later_ones(self, hashes: np.ndarray) -> list[int]:
        """The rows with these hashes that have another one before them; the first LISTED."""
        seen: set[int] = set()
        later: list[int] = []
        for first, part in self.stream.all_figures("row_hash"):
            for at in np.flatnonzero(np.isin(part["row_hash"], hashes)):
                value = int(part["row_hash"][at])
                if value in seen:
                    later.append(first + int(at))
                seen.add(value)
            if len(later) >= LISTED:
                break
        return later

    def _repetition(self) -> Iterator[Finding]:
        if len(self) < ENOUGH_ROWS:
            return
        for kind, name, share in (
            ("same-answer", "answer_hash", SAME_ANSWER_SHARE),
            ("boilerplate", "opening_hash", OPENING_SHARE),
        ):
            value, count, rows = self._most_frequent(name)
            if value and count >= max(ENOUGH_ROWS, share * len(self)):
                start = str(self.stream.example(rows[0])["answer_start"])
                sample = opening_of(start) if kind == "boilerplate" else start
                yield found(kind, self.name, count, len(self), self._places(rows), f"“{sample}…”")

    def _most_frequent(self, name: str) -> tuple[int, int, list[int]]:
        """The hash that most rows have, how many, and the first of them; 0 stands for none."""
        seen = self.stream.figures(name, self.stream.some(LOOKED_AT))
        values, counts = np.unique(seen[seen != 0], return_counts=True)
        if not len(values):
            return 0, 0, []
        likely = values[np.argsort(-counts, kind="stable")[:LISTED]]
        totals = np.zeros(len(likely), np.int64)
        rows: list[list[int]] = [[] for _ in likely]
        for first, part in self.stream.all_figures(name):
            for place, value in enumerate(likely):
                same = np.flatnonzero(part[name] == value)
                totals[place] += len(same)
                rows[place] += (first + same[: LISTED - len(rows[place])]).tolist()
        most = int(totals.argmax())
        return int(likely[most]), int(totals[most]), rows[most]


@contextmanager
def _sorted_hashes(stream: RowStream) -> Iterator[np.ndarray]:
    """The hashes of all rows, ascending, in a file that is removed afterwards."""
    if not len(stream):
        yield np.zeros(0, np.int64)
        return
    cache = stream.indexes[0].stored.folder.parent
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unfinished-") as folder:
        hashes = np.memmap(Path(folder) / "hashes", np.int64, mode="w+", shape=(len(stream),))
        for first, part in stream.all_figures("row_hash"):
            hashes[first : first + len(part["row_hash"])] = part["row_hash"]
        hashes.sort()
        yield hashes


def sum_of_counts(counts: np.ndarray) -> int:
    """The tokens of all rows, of which is known how many have so many: [tokens + 1]."""
    return int((np.arange(len(counts)) * counts).sum())
