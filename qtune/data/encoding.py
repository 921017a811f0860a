"""One source -> its examples on disk, on every core that is there, in bounded memory."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qtune import console
from qtune.data import worker
from qtune.data.examples import EncodedBatch, RowEncoder, RowRules
from qtune.data.files import Progress
from qtune.data.rows import BadRow, Row
from qtune.data.sources import Source
from qtune.data.store import Stored, write_store
from qtune.data.template import ChatTemplate
from qtune.errors import WorkError

BATCH_ROWS = 500
# Where rows are long, a batch ends here: what is in memory at once is so much, however long they are.
BATCH_CHARACTERS = 2**20
# Starting a worker costs as much as this many rows (it imports transformers): below it, one process is quicker.
ROWS_WORTH_WORKERS = 20_000
CHARACTERS_WORTH_WORKERS = 2**23


def encode_source(
    source: Source, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, rules: RowRules, folder: Path
) -> Stored:
    """Makes the examples of a source and writes them to `folder`."""
    read = Progress()
    batches = encoded(
        f"tokenizing {source.name}",
        _batched(source.rows(read)),
        lambda rows: source.estimated_rows(rows, read),
        tokenizer,
        template,
        rules,
    )
    return write_store(folder, batches)


def encoded(
    what: str,
    batches: Iterator[list[Row | BadRow]],
    estimated_rows: Callable[[int], int],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    rules: RowRules,
) -> Iterator[EncodedBatch]:
    """The examples of batches of rows, batch by batch in their order; many rows on every core.

    what: is shown beside the progress. estimated_rows: how many there are in all, once so many were read.
    """
    first, is_large = _read_ahead(batches)
    count = sum(map(len, first))
    workers = len(os.sched_getaffinity(0)) if is_large else 1
    total = estimated_rows(count) if is_large else None
    rows_in_words = f"about {total:,} rows" if total else f"{count:,} rows"
    every = _chain(first, batches)
    with console.progress(f"{what}, {rows_in_words}", total) as shown:
        if workers == 1:
            encoder = RowEncoder(tokenizer, template, rules)
            made: Iterator[EncodedBatch] = (encoder(batch) for batch in every)
        else:
            made = _in_parallel(every, tokenizer, template, rules, workers)
        for batch in made:
            shown.advance(batch.rows)
            yield batch


def _batched(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    batch: list[Row | BadRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += characters_of(row.value if isinstance(row, Row) else row.message)
        if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def characters_of(value: object) -> int:
    """The length of all texts in a row."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(characters_of, inner))


def _read_ahead(batches: Iterator[list[Row | BadRow]]) -> tuple[list[list[Row | BadRow]], bool]:
    """The first batches, and whether they are worth workers; if not, they are all there are."""
    first: list[list[Row | BadRow]] = []
    rows = characters = 0
    for batch in batches:
        first.append(batch)
        rows += len(batch)
        characters += sum(characters_of(row.value) for row in batch if isinstance(row, Row))
        if rows >= ROWS_WORTH_WORKERS or characters >= CHARACTERS_WORTH_WORKERS:
            return first, True
    return first, False


def _chain(first: list[list[Row | BadRow]], rest: Iterator[list[Row | BadRow]]) -> Iterator[list[Row | BadRow]]:
    """Yields the batches that were read ahead, forgetting them, then the others."""
    waiting = deque(first)
    first.clear()
    while waiting:
        yield waiting.popleft()
    yield from rest


def _in_parallel(
    batches: Iterable[list[Row | BadRow]],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    rules: RowRules,
    workers: int,
) -> Iterator[EncodedBatch]:
    """The batches in order, at most four per worker under way.

    Raises:
        WorkError: the system has killed one of the processes.
    """
    # Forking this process, whose tokenizer has threads, could deadlock. The fork server has none, and imports the
    # libraries once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qtune.data.worker"])
    pool = ProcessPoolExecutor(workers, context, worker.start, (tokenizer, template, rules))
    try:
        under_way: deque[Future[EncodedBatch]] = deque()
        for batch in batches:
            under_way.append(pool.submit(worker.encode, batch))
            if len(under_way) >= 4 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        message = (
            "a process that tokenizes rows was ended from outside, most likely for want of memory; close what else "
            "takes memory, and start again: what is prepared once is kept"
        )
        raise WorkError(message) from error
    finally:
        pool.shutdown(cancel_futures=True)
