"""Independent traces side by side: the same results in the same order, whatever happens to the second process."""

import os
import signal
import time

import pytest

from qtune.memory.tracing import in_parallel as module
from qtune.memory.tracing.in_parallel import side_by_side


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(module, "may_fork", lambda: True)


def numbered(count: int) -> list:
    return [lambda number=number: (number, os.getpid()) for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6])
def test_results_come_in_the_order_of_the_tasks_every_other_one_from_a_second_process(count):
    found = side_by_side(numbered(count))
    assert [number for number, _ in found] == list(range(count))
    assert {process for _, process in found[::2]} <= {os.getpid()}
    assert os.getpid() not in {process for _, process in found[1::2]}


def test_where_forking_is_not_safe_everything_is_done_here(monkeypatch):
    monkeypatch.setattr(module, "may_fork", lambda: False)
    assert {process for _, process in side_by_side(numbered(4))} == {os.getpid()}


def test_a_second_process_that_is_killed_costs_time_and_nothing_else():
    here = os.getpid()

    def dies():
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done here"

    assert side_by_side([lambda: 0, dies, lambda: 2, lambda: 3]) == [0, "done here", 2, 3]


def test_a_second_process_that_hangs_is_given_up(monkeypatch):
    here = os.getpid()

    def hangs():
        if os.getpid() != here:
            time.sleep(600)
        return "done here"

    monkeypatch.setattr(module, "LEAST_PATIENCE", 0.2)
    assert side_by_side([lambda: 0, hangs]) == [0, "done here"]


def test_an_error_is_raised_here_and_what_was_done_before_it_is_kept():
    def wrong():
        raise ValueError("no such card")

    with pytest.raises(ValueError, match="no such card"):
        side_by_side([lambda: 0, lambda: 1, lambda: 2, wrong])
    with pytest.raises(ValueError, match="no such card"):
        side_by_side([wrong, lambda: 1])
