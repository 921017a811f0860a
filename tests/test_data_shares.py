"""The micro-batches of each step, shared out among processes."""

import itertools

import pytest

from qtune.data.batches import StepSampler
from qtune.data.masks import IGNORED
from qtune.data.shares import ShareSampler, with_blanks

LENGTHS = [3, 9, 4, 4, 7, 1, 8, 2, 6, 5, 11, 10, 12, 13, 14, 3, 3, 5, 8, 8, 2, 21]


def shares(processes: int, micro_batch_size: int, batch_size: int, epoch: int = 1) -> list[list[list[int]]]:
    """What each process is given in an epoch."""
    samplers = [
        ShareSampler(StepSampler(LENGTHS, batch_size, seed=7), micro_batch_size, rank, processes)
        for rank in range(processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    found = [list(sampler) for sampler in samplers]
    assert [len(one) for one in found] == [len(sampler) for sampler in samplers]
    return found


@pytest.mark.parametrize(("processes", "micro_batch_size"), [(2, 4), (2, 2), (4, 2), (4, 1), (8, 1)])
def test_together_the_shares_of_a_step_are_the_micro_batches_of_one_process(
    processes: int, micro_batch_size: int
) -> None:
    alone = StepSampler(LENGTHS, 8, seed=7)
    alone.set_epoch(1)
    order = alone.order().tolist()
    taken = shares(processes, micro_batch_size, 8)
    each = 8 // micro_batch_size // processes
    for step, start in enumerate(range(0, len(order), 8)):
        rows = order[start : start + 8]
        own = [share[step * each : (step + 1) * each] for share in taken]
        in_turn = [batch for turn in itertools.zip_longest(*own, fillvalue=[]) for batch in turn if batch]
        assert in_turn == [rows[at : at + micro_batch_size] for at in range(0, len(rows), micro_batch_size)]


def test_every_process_takes_every_step() -> None:
    taken = shares(processes=8, micro_batch_size=1, batch_size=8)
    assert {len(share) for share in taken} == {3}, "22 rows are two steps of 8 and one of 6"
    assert [share[-1] for share in taken[6:]] == [[], []]


def test_a_share_without_rows_is_a_batch_without_a_label() -> None:
    def collate(rows: list[dict[str, list[int]]]) -> dict[str, object]:
        return {"rows": list(rows)}

    row = {"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6]}
    assert with_blanks(collate, row)([row]) == {"rows": [row]}
    assert with_blanks(collate, row)([]) == {"rows": [{"input_ids": [4, 5, 6], "labels": [IGNORED] * 3}]}
