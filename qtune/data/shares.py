"""The micro-batches of each step, shared out among the processes of a run.

A step takes the rows that one process would take, in the same micro-batches; process r of N computes the r-th, the
(r+N)-th and so on. So the sum over processes is the sum that one process computes, in another order at most.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from qtune.data.batches import StepSampler
from qtune.data.masks import IGNORED
from qtune.data.stream_order import WindowSampler

Collator = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


class ShareSampler(Sampler[list[int]]):
    """One process's micro-batches of an epoch, as lists of row numbers.

    An epoch's last step may have fewer micro-batches than the processes could take; one that has none left gets an
    empty list, so that all take as many.
    """

    def __init__(self, rows: StepSampler | WindowSampler, micro_batch_size: int, rank: int, processes: int) -> None:
        self.rows = rows
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.processes = processes

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has another order."""
        self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.rows.batch_size)
        return whole * self._of_step(self.rows.batch_size) + (self._of_step(rest) if rest else 0)

    def _of_step(self, rows: int) -> int:
        """How many micro-batches of a step of so many rows every process takes."""
        micro_batches = -(-rows // self.micro_batch_size)
        return -(-micro_batches // self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.rows.steps():
            micro_batches = [step[at : at + self.micro_batch_size] for at in range(0, len(step), self.micro_batch_size)]
            own = micro_batches[self.rank :: self.processes]
            yield from own
            yield from [[]] * (self._of_step(len(step)) - len(own))


def with_blanks(collate: Collator, row: dict[str, Any]) -> Collator:
    """A collator that makes of no rows at all a batch that teaches nothing: `row`, without a label."""
    blank = {**row, "labels": [IGNORED] * len(row["labels"])}

    def collated(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return collate(rows or [blank])

    return collated
