"""Ctrl-C before there is anything to give back ends the process at once; afterwards it is an exception, once.

While the libraries are imported an exception is often lost in one of them, or takes seconds to get out of it.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qtune.startup.launched import launched

CODE = 130
"""What shells say of a process that SIGINT has ended: 128 + 2."""


def end_at_once(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """Says so, and ends the process without asking anybody in it."""
    try:
        sys.stdout.flush()
        if launched().is_leader:
            os.write(2, b"stopped\n")
    finally:
        os._exit(CODE)


def _once(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C is an exception that cleans up on its way; one that a library has swallowed is no end, so that
    the second one is."""
    signal.signal(signal.SIGINT, end_at_once)
    raise KeyboardInterrupt


def keep_nothing_yet() -> None:
    """From here on, until `take_interrupts`, Ctrl-C ends the process at once."""
    signal.signal(signal.SIGINT, end_at_once)


def take_interrupts() -> None:
    """From here on Ctrl-C is an exception, and the second one the end. What trains has its own handler meanwhile."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _once)


def take_again() -> None:
    """Whoever has caught a Ctrl-C and goes on says so: the next one is the first again."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        take_interrupts()


@contextmanager
def nothing_to_keep() -> Iterator[None]:
    """While the block runs, Ctrl-C ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
