"""Training rows that are read from their files while they are trained on: neither memory nor the cache holds them all.

How it works, from the files to a step:

1. One pass (`stream_index`) reads and judges every row and keeps where each block of some 500 rows begins, a digest of
   it, and figures of its examples. A row that cannot be used is found here, not hours later. The next run on the same
   files begins with what is kept.
2. Rows are set aside for validation by the hash of what they ask first (`stream_split`), as they are elsewhere.
3. The order (`stream_order`) is a function of seed and step: rows are shuffled within windows of `shuffle_rows`.
4. Whoever asks for a row here gets it from its block, which is read, checked against its digest, rendered and tokenized
   once an epoch, and forgotten when its window is past. A process beside this one makes the blocks that come next.

So a checkpoint holds no position: step k says which rows come next, and the index where they stand. A run that goes on
begins to read there. Only compressed files are decompressed from their start; nothing else is done with what is passed.
"""

import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from qtune.data import stream_worker
from qtune.data.encoding import ROWS_WORTH_WORKERS
from qtune.data.stream_index import Index, IndexReaders
from qtune.data.stream_order import WindowSampler
from qtune.data.stream_worker import TRAINED
from qtune.data.template import ChatTemplate
from qtune.errors import WorkError
from qtune.sizes import size_text

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

BYTES_PER_TOKEN = 8
"""An id and a label, four bytes each."""
MOST_LENGTHS = 1 << 20
"""Rows whose lengths stand for those of all where only their distribution matters."""
FIGURES_AT_ONCE = 1 << 20
"""Rows whose figures are looked at together: what memory is needed for figures does not depend on the file."""


class RowStream(Dataset[dict[str, list[int]]]):
    """The training rows of some files, one after the other, without those that are set aside.

    Rows have numbers from 0; examples of the files are counted through and include those that are set aside. As a
    map-style dataset it gives input_ids and labels.
    """

    def __init__(
        self,
        indexes: Sequence[Index],
        set_aside: np.ndarray,
        window: int,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
    ) -> None:
        """set_aside: numbers of examples, ascending. window: rows that are shuffled among each other; 0 for none."""
        self.indexes = tuple(indexes)
        self.set_aside = set_aside
        self.window = window
        self._starts = np.cumsum([0, *map(len, indexes)], dtype=np.int64)
        self._before = set_aside - np.arange(len(set_aside))
        """Of each example that is set aside: the training rows before it."""
        self._first_blocks = np.cumsum([0, *(len(index.ends) for index in indexes)], dtype=np.int64)
        """Blocks are counted through all sources, too."""
        self._blocks: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._span, self._kept = 1, 2
        self._tokenizer, self._template = tokenizer, template
        self._readers = IndexReaders(self.indexes, tokenizer, template)
        weakref.finalize(self, self._readers.close)  # whoever drops a stream has closed its files
        self._ahead: dict[int, Future[pa.RecordBatch]] = {}
        self._pool: ProcessPoolExecutor | None = None

    def __len__(self) -> int:
        return int(self._starts[-1]) - len(self.set_aside)

    def order(self, batch_size: int, seed: int) -> WindowSampler:
        """The order of an epoch, for whose steps blocks are kept from now on."""
        self._span = max(self.window, batch_size)
        starts = self._blocks_of(np.append(np.arange(0, len(self), self._span), len(self) - 1))
        # A step may reach from one window into the next.
        self._kept = 2 * (int(np.diff(starts).max()) + 1)
        return WindowSampler(len(self), lambda rows: self.figures("length", rows), batch_size, seed, self.window)

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """The examples that rows are, [rows]."""
        return rows + np.searchsorted(self._before, rows, side="right")

    def figures(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A figure of some rows, [rows]."""
        numbers = self.numbers(rows)
        values = np.zeros(len(rows), np.int64)
        for source, inside in self._by_source(numbers):
            values[inside] = self.indexes[source].figures[name][numbers[inside] - self._starts[source]]
        return values

    def all_figures(self, *names: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The figures of all rows in pieces of bounded size, each with the number of its first row."""
        for first in range(0, len(self), FIGURES_AT_ONCE):
            rows = np.arange(first, min(first + FIGURES_AT_ONCE, len(self)))
            yield first, {name: self.figures(name, rows) for name in names}

    def has_prompts(self, hashes: np.ndarray) -> np.ndarray:
        """Whether prompts stand here, too, by their hashes: [hashes]."""
        there = np.zeros(len(hashes), bool)
        for _, part in self.all_figures("prompt_hash"):
            there |= np.isin(hashes, part["prompt_hash"])
        return there

    def has_asked(self, hashes: np.ndarray) -> np.ndarray:
        """Whether the same is asked here, too, by the hashes of `prompts.Prompts.asked`: [hashes]."""
        there = np.zeros(len(hashes), bool)
        for index, start in zip(self.indexes, self._starts.tolist(), strict=False):
            for first in range(0, len(index.asked), FIGURES_AT_ONCE):
                part = index.asked[first : first + FIGURES_AT_ONCE]
                trained = ~np.isin(start + part["example"], self.set_aside)
                there |= np.isin(hashes, part["hash"][trained])
        return there

    @property
    def window_bytes(self) -> int:
        """Ids and labels of the windows that are in memory: the one at hand, the one before, the one that comes."""
        rows = min(len(self), 3 * max(self.window, 1))
        mean = float(self.figures("length", self.some(MOST_LENGTHS)).mean())
        return round(rows * mean * BYTES_PER_TOKEN)

    @property
    def in_words(self) -> str:
        """The order of the rows, and what of them is in memory."""
        order = f"shuffled {self.window:,} at a time" if self.window else "in the order of their files"
        return f"{order}, {size_text(self.window_bytes)} of them in memory"

    def some(self, count: int) -> np.ndarray:
        """At most `count` row numbers, spread evenly over all of them."""
        if len(self) <= count:
            return np.arange(len(self))
        return np.arange(count, dtype=np.int64) * len(self) // count

    def longest(self) -> int:
        """The first of the rows with the most tokens."""
        best, longest = 0, -1
        for first, part in self.all_figures("length"):
            at = int(part["length"].argmax())
            if part["length"][at] > longest:
                best, longest = first + at, int(part["length"][at])
        return best

    def example(self, row: int) -> dict[str, Any]:
        """Everything that is known of one row (`examples.COLUMNS`), read from its file for this alone.

        Raises:
            DataError: the file is no longer what it was.
        """
        return self.example_of_number(int(self.numbers(np.array([row]))[0]))

    def example_of_number(self, number: int) -> dict[str, Any]:
        """`example` of an example that may be set aside."""
        source = self._source_of(number)
        made = self._readers.of(source).some(np.array([number - self._starts[source]]))
        found: dict[str, Any] = made.to_pylist()[0]
        return found

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        """input_ids and labels of a row, each [length].

        Raises:
            DataError: its file is no longer what it was.
        """
        number = int(self.numbers(np.array([row]))[0])
        source = self._source_of(number)
        inside = number - int(self._starts[source])
        index = self.indexes[source]
        block = index.block_of(inside)
        examples = self._block(int(self._first_blocks[source]) + block, row)
        at = inside - index.first_of(block)
        return {name: examples[name][at].as_py() for name in TRAINED}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[row] for row in range(len(self)))

    def close(self) -> None:
        """Closes files and ends the process that reads ahead; asking for a row begins anew."""
        self._readers.close()
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _source_of(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _blocks_of(self, rows: np.ndarray) -> np.ndarray:
        """The blocks that rows stand in, [rows]."""
        numbers = self.numbers(rows)
        found = np.zeros(len(numbers), np.int64)
        for source, inside in self._by_source(numbers):
            ends, there = self.indexes[source].ends, numbers[inside] - self._starts[source]
            found[inside] = self._first_blocks[source] + np.searchsorted(ends, there, side="right")
        return found

    def _by_source(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The indexes that some examples are in, each with which of the examples these are."""
        sources = np.searchsorted(self._starts, numbers, side="right") - 1
        yield from ((int(source), sources == source) for source in np.unique(sources))

    def _block(self, block: int, row: int) -> pa.RecordBatch:
        """The examples of the block of a row; with those of its window, which are wanted soon, in the files' order."""
        if block not in self._blocks:
            window = row // self._span
            if len(self) >= ROWS_WORTH_WORKERS:
                self._keep(block, self._made_beside(block, window))
            else:
                for other in self._window(window):
                    if other not in self._blocks:
                        source, number = self._placed(other)
                        self._keep(other, self._readers.of(source).block(number).select(TRAINED))
        self._blocks.move_to_end(block)
        return self._blocks[block]

    def _keep(self, block: int, examples: pa.RecordBatch) -> None:
        self._blocks[block] = examples
        while len(self._blocks) > self._kept:
            self._blocks.popitem(last=False)

    def _window(self, number: int) -> range:
        """The blocks of a window; none behind the last one."""
        first = number * self._span
        if first >= len(self):
            return range(0)
        start, last = self._blocks_of(np.array([first, min(first + self._span, len(self)) - 1])).tolist()
        return range(start, last + 1)

    def _placed(self, block: int) -> tuple[int, int]:
        """The source of a block, and its number there."""
        source = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        return source, block - int(self._first_blocks[source])

    def _made_beside(self, block: int, window: int) -> pa.RecordBatch:
        """A block from the process beside this one, which then makes the rest of its window and the next one.

        Raises:
            WorkError: the system has killed that process.
        """
        if self._pool is None:
            self._pool = stream_worker.beside(self.indexes, self._tokenizer, self._template)
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        wanted = [*self._window(window), *self._window(window + 1)]
        for passed in [other for other in self._ahead if other not in wanted]:
            self._ahead.pop(passed).cancel()
        try:
            for other in wanted:
                if other not in self._ahead and other not in self._blocks:
                    self._ahead[other] = self._pool.submit(stream_worker.block, *self._placed(other))
            return self._ahead.pop(block).result()
        except BrokenProcessPool as error:
            self._pool = None
            self._ahead.clear()
            message = (
                "the process that reads rows ahead was ended from outside, most likely for want of memory; a smaller "
                "data.shuffle_rows takes less"
            )
            raise WorkError(message) from error
