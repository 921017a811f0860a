"""Short rows -> packed rows of at most max_length tokens, by best fit.

Each document keeps its own positions (from 0) and sees only itself; `collate.PackedCollator` says so to the model.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from qtune.data.masks import IGNORED


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


def pack(examples: Dataset, max_length: int) -> Dataset:
    """A dataset of packed rows: input_ids and labels [packed length], seq_lengths [documents].

    The first token of a document is never scored: what stands before it belongs to another one.
    """
    lengths = np.asarray(examples.with_format("numpy")["length"][:]).tolist()
    groups = best_fit(lengths, max_length)

    def rows() -> object:
        for group in groups:
            documents = [examples[index] for index in group]
            yield {
                "input_ids": [token for one in documents for token in one["input_ids"]],
                "labels": [label for one in documents for label in [IGNORED, *one["labels"][1:]]],
                "seq_lengths": [len(one["input_ids"]) for one in documents],
            }

    return Dataset.from_generator(rows)
