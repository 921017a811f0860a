"""The order of rows in an epoch: random steps, and within a step rows of like length next to each other.

A step takes the same rows as plain shuffling would, so the optimization problem is unchanged; only which rows share
a micro-batch, and thus how much is padded, is chosen by length.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class StepSampler(Sampler[int]):
    """Row numbers of one epoch; the same for the same seed and epoch, on every machine.

    `batch_size` is the effective one: micro-batch x accumulation x processes. The last step may be smaller.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> np.ndarray:
        """The row numbers of the current epoch, [rows]."""
        shuffled = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.lengths))
        steps = [shuffled[start : start + self.batch_size] for start in range(0, len(shuffled), self.batch_size)]
        # Stable, so that rows of one length keep their random order.
        grouped = [step[np.argsort(-self.lengths[step], kind="stable")] for step in steps]
        return np.concatenate(grouped) if grouped else shuffled

    def steps(self) -> Iterator[list[int]]:
        """The rows of each step of the current epoch."""
        order = self.order().tolist()
        yield from (order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size))


def rows_of_step(lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, step: int) -> list[int]:
    """The row numbers of an optimizer step, which are counted from 1."""
    sampler = StepSampler(lengths, batch_size, seed)
    epoch, place = divmod(step - 1, -(-len(sampler) // batch_size))
    sampler.set_epoch(epoch)
    return [int(row) for row in sampler.order()[place * batch_size : (place + 1) * batch_size]]


def padding_share(lengths: np.ndarray, micro_batch_size: int) -> float:
    """Share of the positions that is padding when rows of these lengths, in this order, are padded in micro-batches."""
    if not len(lengths):
        return 0.0
    micro_batches = [lengths[start : start + micro_batch_size] for start in range(0, len(lengths), micro_batch_size)]
    positions = sum(len(rows) * int(rows.max()) for rows in micro_batches)
    return 1 - int(lengths.sum()) / positions
