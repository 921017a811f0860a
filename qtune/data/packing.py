"""Short rows -> packed rows of at most max_length tokens, by best fit.

Each document keeps its own positions (from 0) and sees only itself; `collate.PackedCollator` says so to the model.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from qtune.data.kept import read_about, write_about
from qtune.data.masks import IGNORED
from qtune.data.store import not_written, written_whole

# Raised when the code that packs changes what it makes.
VERSION = 2
ROWS = "packed.arrow"
GROUPS_AT_ONCE = 1000
PACKED = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "labels", "seq_lengths")])


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most `capacity`: best fit, the longest first.

    Source: "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830), section 3.1. The groups are in the
    order of their first index, so that packing keeps the rows about where they were.
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free space, group), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect_left(room, (length, -1))
        if at < len(room):
            free, group = room.pop(at)
            groups[group].append(index)
        else:
            free, group = capacity, len(groups)
            groups.append([index])
        if free - length > 0:
            insort(room, (free - length, group))
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])


def pack(examples: Dataset, max_length: int, folder: Path) -> Dataset:
    """A dataset of packed rows, kept in `folder`: input_ids and labels [packed length], seq_lengths [documents].

    The first token of a document is never scored: what stands before it belongs to another one.
    """
    lengths = np.asarray(examples.with_format("numpy")["length"][:])
    groups = best_fit(lengths.tolist(), max_length)
    digest = hashlib.blake2b(f"{VERSION} {max_length} {examples._fingerprint}".encode(), digest_size=16)
    kept = folder / digest.hexdigest()
    if read_about(kept, kept / ROWS) is None:
        with written_whole(kept) as temporary:
            temporary.mkdir()
            with pa.OSFile(str(temporary / ROWS), "wb") as sink, pa.ipc.new_stream(sink, PACKED) as writer:
                for start in range(0, len(groups), GROUPS_AT_ONCE):
                    writer.write_batch(_joined(examples, groups[start : start + GROUPS_AT_ONCE], lengths))
            write_about(temporary, temporary / ROWS, {"rows": len(groups)})
        if read_about(kept, kept / ROWS) is None:
            raise not_written(kept)
    return Dataset.from_file(str(kept / ROWS))


def _joined(examples: Dataset, groups: list[list[int]], lengths: np.ndarray) -> pa.RecordBatch:
    """The rows of each group end to end: only the borders of Arrow's lists change, the ids stay as they are."""
    order = [index for group in groups for index in group]
    table = examples.select_columns(["input_ids", "labels"]).with_format("arrow")[order]
    ids, labels = (table[name].combine_chunks() for name in ("input_ids", "labels"))
    row_starts = np.concatenate([[0], np.cumsum(lengths[order])])
    scored = labels.flatten().to_numpy().copy()
    scored[row_starts[:-1]] = IGNORED
    documents = np.concatenate([[0], np.cumsum([len(group) for group in groups])])
    borders = pa.array(row_starts[documents], pa.int32())
    return pa.RecordBatch.from_arrays(
        [
            pa.ListArray.from_arrays(borders, ids.flatten()),
            pa.ListArray.from_arrays(borders, pa.array(scored, pa.int32())),
            pa.ListArray.from_arrays(pa.array(documents, pa.int32()), pa.array(lengths[order], pa.int32())),
        ],
        schema=PACKED,
    )
