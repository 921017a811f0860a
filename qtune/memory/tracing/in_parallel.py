"""Independent traces, half of them in a second process: tracing is Python, and uses one core."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

Result = TypeVar("Result")

PATIENCE = 4
"""The second process is given up when it takes so many times as long as the first one did, and LEAST_PATIENCE."""
LEAST_PATIENCE = 20.0
"""Seconds."""


def side_by_side(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of `tasks`, in order.

    Every other one comes from a forked process, which has the libraries imported already, where forking is safe: on
    Linux, while CUDA is not in use. What that process cannot do, for whatever reason, is done here; so an error is
    raised here, like any other.
    """
    if len(tasks) < 2 or not may_fork():
        return [task() for task in tasks]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_every_other, args=(tasks, sender), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: of any fork beside threads; the child uses none
        child.start()
    sender.close()
    try:
        began = time.monotonic()
        own = [task() for task in tasks[::2]]
        others: list[Result] = []
        if receiver.poll(LEAST_PATIENCE + PATIENCE * (time.monotonic() - began)):
            with contextlib.suppress(EOFError, OSError):
                others = receiver.recv()
    finally:
        receiver.close()
        child.kill()
        child.join()
    others += [task() for task in tasks[1::2][len(others) :]]
    return [(own, others)[number % 2][number // 2] for number in range(len(tasks))]


def may_fork() -> bool:
    """Whether a second process is safe and has a core to itself."""
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1 and not torch.cuda.is_initialized()


def _every_other(tasks: Sequence[Callable[[], Result]], sender: Connection) -> None:
    """In the second process: sends what it could do of the tasks with odd numbers."""
    done: list[Result] = []
    with contextlib.suppress(BaseException):
        for task in tasks[1::2]:
            done.append(task())  # noqa: PERF401  (what was done before an error counts)
    sender.send(done)
