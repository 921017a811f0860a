"""The rows of a stream that are set aside for validation: chosen by their hashes, and kept as any other rows are."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qtune.data.choice import GROUPS, mixed, prompts_set_aside
from qtune.data.examples import COLUMNS
from qtune.data.kept import read_about, write_about
from qtune.data.store import EXAMPLES, not_written, written_whole
from qtune.data.stream_index import Index, IndexReaders
from qtune.data.template import ChatTemplate
from qtune.recipe.steps import held_out_rows

MOST_SET_ASIDE = 4096
"""A share of a file of millions would be evaluated for hours; so many rows know a mean loss well."""
TOO_LARGE = 8
"""Prompts beside those that are wanted: so many may have too many rows, of which each has more than a tenth of all."""
FIGURES_AT_ONCE = 1 << 20


def examples_set_aside(indexes: Sequence[Index], share: float, seed: int) -> np.ndarray:
    """The numbers of the examples that `choice.rows_set_aside` would choose, at most MOST_SET_ASIDE and their equals.

    The figures are read three times in pieces: for the lowest hashes, for the rows that each of these has, and for the
    numbers of those that are chosen.
    """
    total = sum(map(len, indexes))
    if not share or not total:
        return np.zeros(0, np.int64)
    wanted = held_out_rows(share, total)
    found = np.zeros(0, np.int64)
    for group in GROUPS:
        found = _drawn(indexes, group, wanted, total, seed)
        if len(found) >= min(wanted, MOST_SET_ASIDE):
            break
    return found


def _drawn(indexes: Sequence[Index], group: str, wanted: int, total: int, seed: int) -> np.ndarray:
    """The numbers of the examples that are set aside by their groups, of which all or none are."""
    count = min(wanted, MOST_SET_ASIDE)
    lowest = np.zeros(0, np.uint64)
    for hashes in _pieces(indexes, group, seed):
        lowest = np.unique(np.concatenate([lowest, hashes]))[: count + TOO_LARGE]
    rows = np.zeros(len(lowest), np.int64)
    for hashes in _pieces(indexes, group, seed):
        rows += np.bincount(np.searchsorted(lowest, hashes[np.isin(hashes, lowest)]), minlength=len(lowest))
    chosen = prompts_set_aside(lowest, rows, count, total, None if count == wanted else 2 * count)
    found, first = [], 0
    for hashes in _pieces(indexes, group, seed):
        found.append(first + np.flatnonzero(np.isin(hashes, chosen)))
        first += len(hashes)
    return np.concatenate(found)


def _pieces(indexes: Sequence[Index], group: str, seed: int) -> Iterator[np.ndarray]:
    for index in indexes:
        for start in range(0, len(index), FIGURES_AT_ONCE):
            hashes = index.figures[group][start : start + FIGURES_AT_ONCE]
            yield mixed(np.asarray(hashes).astype(np.uint64), seed)


def kept_examples(
    indexes: Sequence[Index],
    numbers: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    cache: Path,
) -> Dataset:
    """Examples by their numbers, which ascend, as a dataset in the cache with `examples.COLUMNS`.

    Raises:
        DataError: a file is no longer what it was.
    """
    digest = hashlib.blake2b(numbers.astype(np.int64).tobytes(), digest_size=16)
    for index in indexes:
        digest.update(index.stored.folder.name.encode())
    kept = cache / digest.hexdigest()
    if read_about(kept, kept / EXAMPLES) is None:
        with written_whole(kept) as temporary:
            temporary.mkdir()
            with pa.OSFile(str(temporary / EXAMPLES), "wb") as sink, pa.ipc.new_stream(sink, COLUMNS) as writer:
                for batch in _made(indexes, numbers, IndexReaders(indexes, tokenizer, template)):
                    writer.write_batch(batch)
            write_about(temporary, temporary / EXAMPLES, {"rows": len(numbers)})
        if read_about(kept, kept / EXAMPLES) is None:
            raise not_written(kept)
    return Dataset.from_file(str(kept / EXAMPLES))


def _made(indexes: Sequence[Index], numbers: np.ndarray, readers: IndexReaders) -> Iterator[pa.RecordBatch]:
    """The examples, block by block."""
    start = 0
    for source, index in enumerate(indexes):
        inside = numbers[(numbers >= start) & (numbers < start + len(index))] - start
        borders = np.flatnonzero(np.diff(np.searchsorted(index.ends, inside, side="right"))) + 1
        for of_block in np.split(inside, borders) if len(inside) else ():
            yield readers.of(source).some(of_block)
        start += len(index)
    readers.close()
