"""What one pass over a file that is too large to keep leaves behind: its blocks, and the figures of its examples.

The pass reads, renders, tokenizes and judges every row as a run will, and keeps no ids and no text: 64 bytes for each
example, 32 for each of its answers and 52 for each block. So steps, memory, findings and bad rows are known before the
first step, and any row can be found again. Under the same name (contents, template, rules) the pass is not made twice;
of a source with many files, a pass that was stopped has done with those that it had come through.
"""

import hashlib
import json
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from qtune.data.encoding import encoded
from qtune.data.examples import EncodedBatch, RowEncoder, RowRules
from qtune.data.files import DataFile, Progress
from qtune.data.findings import LISTED
from qtune.data.kept import discard, read_about, write_about
from qtune.data.rows import BadRow, Row
from qtune.data.store import Stored, Tally, not_written, stored_of, written_whole
from qtune.data.stream_blocks import DIGEST_BYTES, Block, BlockReader, blocks_of
from qtune.data.template import ChatTemplate
from qtune.errors import DataError, Problem

# Raised when the code that makes examples, blocks or figures changes what it makes.
VERSION = 2

HASHES = ("row_hash", "prompt_hash", "first_prompt_hash", "row_prompt_hash", "answer_hash", "opening_hash")
FIGURES = np.dtype(
    [(name, "<i4") for name in ("length", "scored", "largest_id", "row")] + [(name, "<i8") for name in HASHES]
)
"""Of an example; `row` is the place of its row in the block."""
ASKED = np.dtype([("example", "<i8"), ("hash", "<i8")])
"""A hash of what is asked in an example (`examples.COLUMNS`), of which an answer has two."""
BLOCKS = np.dtype(
    [
        ("group", "<i4"),
        ("offset", "<i8"),
        ("before", "<i8"),
        ("rows", "<i4"),
        ("nbytes", "<i8"),
        ("examples", "<i4"),
        ("digest", "u1", (DIGEST_BYTES,)),
    ]
)
MOST_OPEN = 4
"""Files at once: a window may reach over a few small ones."""
FIGURES_FILE, ASKED_FILE, BLOCKS_FILE = "figures.bin", "asked.bin", "blocks.npy"
DIGESTS = {BLOCKS_FILE: "blocks_blake2b", ASKED_FILE: "asked_blake2b"}
"""Of files beside the figures, as about.json has them."""


@dataclass(frozen=True, eq=False)
class Index:
    """The blocks and figures of a file, on disk, and what became of its rows."""

    file: DataFile
    rules: RowRules
    stored: Stored
    blocks: np.ndarray
    figures: np.ndarray
    asked: np.ndarray
    notes: Mapping[str, int]
    """How many examples have each note."""
    note_places: Mapping[str, list[str]]
    note_examples: Mapping[str, int]
    """The number of the first example that has it."""
    ends: np.ndarray = field(init=False)
    """Of each block: the number of the example that comes after it, [blocks]."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", np.cumsum(self.blocks["examples"], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.figures)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the same files, instead of getting what is in them."""
        return open_index, (self.stored.folder, self.file, self.rules)

    def block_of(self, example: int) -> int:
        """The block that an example stands in."""
        return int(np.searchsorted(self.ends, example, side="right"))

    def first_of(self, block: int) -> int:
        """The number of a block's first example."""
        return int(self.ends[block - 1]) if block else 0


def index_key(store: str) -> str:
    """The folder's name; `store` is the name under which the same examples would be kept as a whole (`store_key`)."""
    parts = json.dumps(["index", VERSION, store])
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


def open_index(folder: Path, file: DataFile, rules: RowRules) -> Index | None:
    """What an earlier pass has left; None where there is nothing, or not what was written: that is removed."""
    about = read_about(folder, folder / FIGURES_FILE)
    if about is None:
        return None
    try:
        if any(_digest(folder / file) != about[name] for file, name in DIGESTS.items()):
            raise ValueError("the blocks are not what was written")
        blocks = np.load(folder / BLOCKS_FILE, mmap_mode="r")
        figures, asked = _mapped(folder / FIGURES_FILE, FIGURES), _mapped(folder / ASKED_FILE, ASKED)
        return Index(
            file,
            rules,
            stored_of(folder, about),
            blocks,
            figures,
            asked,
            about["notes"],
            about["note_places"],
            about["note_examples"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        discard(folder)
        return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _mapped(file: Path, dtype: "np.dtype[np.void]") -> np.ndarray:
    if not file.stat().st_size:
        return np.zeros(0, dtype)  # no empty file can be mapped
    return np.memmap(file, dtype, mode="r")


def make_index(
    file: DataFile, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, rules: RowRules, folder: Path
) -> Index:
    """Goes through all rows once, and gives the folder its name when everything is there."""
    tally, notes = Tally(), _Notes()
    examples, blocks = 0, []
    with written_whole(folder) as temporary:
        temporary.mkdir()
        with (temporary / FIGURES_FILE).open("wb") as sink, (temporary / ASKED_FILE).open("wb") as asked:
            for block, batch in _passed(file, tokenizer, template, rules):
                tally.add(batch)
                notes.add(batch.examples, examples)
                sink.write(_figures_of(batch).tobytes())
                asked.write(_asked_in(batch, examples).tobytes())
                blocks.append(_entry(block, batch.examples.num_rows))
                examples += batch.examples.num_rows
        np.save(temporary / BLOCKS_FILE, np.array(blocks, BLOCKS))
        digests = {name: _digest(temporary / file) for file, name in DIGESTS.items()}
        write_about(temporary, temporary / FIGURES_FILE, {**digests, **tally.to_json(), **notes.to_json()})
    index = open_index(folder, file, rules)
    if index is None:
        raise not_written(folder)
    return index


def _passed(
    file: DataFile, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, rules: RowRules
) -> Iterator[tuple[Block, EncodedBatch]]:
    """All blocks in order with their examples."""
    read, waiting = Progress(), deque[Block]()

    def rows() -> Iterator[list[Row | BadRow]]:
        for block, rows_of_block in blocks_of(file, read):
            waiting.append(block)
            yield list(rows_of_block)

    def estimated(seen: int) -> int:
        return round(seen * max(1.0, file.path.stat().st_size / max(1.0, read.bytes_read)))

    what = f"checking {file.name}, which will be read in blocks"
    for batch in encoded(what, rows(), estimated, tokenizer, template, rules):
        yield waiting.popleft(), batch


def _figures_of(batch: EncodedBatch) -> np.ndarray:
    figures = np.zeros(batch.examples.num_rows, FIGURES)
    for name in FIGURES.names or ():
        figures[name] = batch.origins if name == "row" else batch.examples[name].to_numpy()
    return figures


def _asked_in(batch: EncodedBatch, before: int) -> np.ndarray:
    """The hashes of a batch's examples, of which there are so many before them."""
    hashes = batch.examples["asked_hashes"]
    asked = np.zeros(len(hashes.flatten()), ASKED)
    asked["hash"] = hashes.flatten().to_numpy()
    asked["example"] = before + np.repeat(np.arange(len(hashes)), hashes.value_lengths().to_numpy())
    return asked


def _entry(block: Block, examples: int) -> tuple[Any, ...]:
    digest = np.frombuffer(block.digest.ljust(DIGEST_BYTES, b"\0"), np.uint8)
    return block.group, block.offset, block.before, block.rows, block.nbytes, examples, digest


class _Notes:
    """How many examples have each note, and where the first of them are."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        self.first: dict[str, int] = {}

    def add(self, examples: pa.RecordBatch, before: int) -> None:
        for number, note in enumerate(examples["notes"].to_pylist()):
            for kind in note.split():
                self.counts[kind] += 1
                self.first.setdefault(kind, before + number)
                if len(listed := self.places.setdefault(kind, [])) < LISTED:
                    listed.append(examples["place"][number].as_py())

    def to_json(self) -> dict[str, Any]:
        return {"notes": self.counts, "note_places": self.places, "note_examples": self.first}


class IndexReader:
    """Makes the examples of a file again, block by block; best in their order."""

    def __init__(self, index: Index, encoder: RowEncoder) -> None:
        self.index = index
        self._encoder = encoder
        self._reader = BlockReader(index.file)

    def block(self, number: int) -> pa.RecordBatch:
        """All examples of a block, with `examples.COLUMNS`.

        Raises:
            DataError: the file is no longer what it was.
        """
        examples = self._encoder(self._rows(number)).examples
        first = self.index.first_of(number)
        return self._same(examples, np.arange(first, int(self.index.ends[number])))

    def some(self, numbers: np.ndarray) -> pa.RecordBatch:
        """Examples of one block by their numbers, which ascend; no other row of it is rendered or tokenized.

        Raises:
            DataError: the file is no longer what it was.
        """
        block = self.index.block_of(int(numbers[0]))
        first = self.index.first_of(block)
        rows_of = np.asarray(self.index.figures["row"][first : int(self.index.ends[block])])
        wanted = np.unique(rows_of[numbers - first])
        rows = self._rows(block)
        made = self._encoder([rows[int(row)] for row in wanted]).examples
        whole = first + np.flatnonzero(np.isin(rows_of, wanted))
        return self._same(made, whole).take(pa.array(np.searchsorted(whole, numbers)))

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        self._reader.close()

    def _same(self, made: pa.RecordBatch, numbers: np.ndarray) -> pa.RecordBatch:
        """The examples, if they are those of these numbers: another template or tokenizer makes others of a row."""
        known = self.index.figures[numbers]
        if made.num_rows != len(numbers) or any(
            not np.array_equal(made[name].to_numpy(), known[name]) for name in ("row_hash", "length", "scored")
        ):
            message = "its rows become other examples than when they were checked; begin a new run"
            raise DataError(Problem(self.index.file.name, message))
        return made

    def _rows(self, number: int) -> list[Row | BadRow]:
        entry = self.index.blocks[number]
        values = {name: int(entry[name]) for name in ("group", "offset", "before", "rows", "nbytes")}
        return self._reader.read(Block(**values, digest=entry["digest"].tobytes()))


class IndexReaders:
    """A reader for each of some indexes; few of their files are open at once, and equal rules share an encoder."""

    def __init__(self, indexes: Sequence[Index], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self.indexes = indexes
        self._tokenizer, self._template = tokenizer, template
        self._encoders: list[RowEncoder] = []
        self._open: OrderedDict[int, IndexReader] = OrderedDict()

    def of(self, number: int) -> IndexReader:
        """The reader of an index."""
        if number not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            index = self.indexes[number]
            self._open[number] = IndexReader(index, self._encoder(index.rules))
        self._open.move_to_end(number)
        return self._open[number]

    def close(self) -> None:
        """Closes all files."""
        for reader in self._open.values():
            reader.close()
        self._open.clear()

    def _encoder(self, rules: RowRules) -> RowEncoder:
        known = next((encoder for encoder in self._encoders if encoder.rules == rules), None)
        if known is None:
            known = RowEncoder(self._tokenizer, self._template, rules)
            self._encoders.append(known)
        return known
