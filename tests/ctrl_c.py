"""Ctrl-C ends the suite, whichever test it meets: what is tested catches it, too, and would go on."""

import os
import signal


class CtrlC:
    """Counts the SIGINTs of this process beside whoever handles them, and those that a test sends itself."""

    def __init__(self) -> None:
        self.reading, writing = os.pipe()
        os.set_blocking(self.reading, False)
        os.set_blocking(writing, False)
        self.own = 0
        # Python writes a signal's number there when it comes, before any handler has it.
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def press(self) -> None:
        """As a person would, but by a test and for it."""
        self.own += 1
        os.kill(os.getpid(), signal.SIGINT)

    def was_pressed(self) -> bool:
        """Whether one has come since the last time that nobody has sent by `press`."""
        try:
            came = os.read(self.reading, 4096).count(signal.SIGINT)
        except BlockingIOError:
            came = 0
        came, self.own = came - self.own, 0
        return came > 0


CTRL_C = CtrlC()
