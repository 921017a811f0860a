"""One source -> its examples on disk, on every core that is there, in bounded memory."""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qtune import console
from qtune.data import worker
from qtune.data.examples import Batch, RowEncoder, RowRules
from qtune.data.files import Progress
from qtune.data.rows import BadRow, Row
from qtune.data.sources import Source
from qtune.data.store import Stored, write_store

BATCH_ROWS = 500
# Starting a worker costs as much as this many rows (it imports transformers): below it, one process is quicker.
ROWS_WORTH_WORKERS = 20_000


def encode_source(
    source: Source, tokenizer: PreTrainedTokenizerBase, template: str, rules: RowRules, folder: Path
) -> Stored:
    """Makes the examples of a source and writes them to `folder`."""
    read = Progress()
    rows = source.rows(read)
    first = list(islice(rows, ROWS_WORTH_WORKERS))
    is_large = len(first) == ROWS_WORTH_WORKERS
    workers = len(os.sched_getaffinity(0)) if is_large else 1
    total = source.estimated_rows(len(first), read) if is_large else None
    rows_in_words = f"about {total:,} rows" if total else f"{len(first):,} rows"
    with console.progress(f"tokenizing {source.name}, {rows_in_words}", total) as shown:

        def counted(batches: Iterable[Batch]) -> Iterator[Batch]:
            for batch in batches:
                shown.advance(batch.rows)
                yield batch

        every = _batched(_chain(first, rows))
        if workers == 1:
            encoder = RowEncoder(tokenizer, template, rules)
            return write_store(folder, counted(encoder(batch) for batch in every))
        return write_store(folder, counted(_in_parallel(every, tokenizer, template, rules, workers)))


def _chain(first: list[Row | BadRow], rest: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
    """Yields the rows that were read ahead, forgetting them, then the others."""
    waiting = deque(first)
    first.clear()
    while waiting:
        yield waiting.popleft()
    yield from rest


def _batched(rows: Iterator[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def _in_parallel(
    batches: Iterable[list[Row | BadRow]],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    rules: RowRules,
    workers: int,
) -> Iterator[Batch]:
    """The batches in order, at most four per worker under way."""
    # Forking this process, whose tokenizer has threads, could deadlock. The fork server has none, and imports the
    # libraries once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qtune.data.worker"])
    with ProcessPoolExecutor(workers, context, worker.start, (tokenizer, template, rules)) as pool:
        under_way: deque[Future[Batch]] = deque()
        for batch in batches:
            under_way.append(pool.submit(worker.encode, batch))
            if len(under_way) >= 4 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
