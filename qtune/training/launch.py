"""`qtune run --processes N`: so many processes on this computer, started, listened to and ended together.

They are told who they are in torchrun's variables, so that under torchrun, `accelerate launch`, Slurm or Ray nothing of
this file is needed. What it adds: signals reach each process once, and the first that fails ends the run with a
sentence.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from qtune import console

GRACE_SECONDS = 30.0
"""How long the others may take to end by themselves once one has failed: they notice it, and may be saving."""
LOOKS_SECONDS = 0.1
PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when the one that has started it dies."""


def launch(arguments: Sequence[str], processes: int) -> int:
    """Runs `qtune` with these arguments in so many processes; the exit code of the whole."""
    address = ("127.0.0.1", _free_port())
    started = [_started(arguments, rank, processes, address) for rank in range(processes)]
    try:
        with _passing_signals_on(started):
            return _waited_for(started)
    finally:
        _end(started)


def _started(
    arguments: Sequence[str], rank: int, processes: int, address: tuple[str, int]
) -> "subprocess.Popen[bytes]":
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": address[0],
        "MASTER_PORT": str(address[1]),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "qtune", *arguments],
        env=environment,
        # A terminal's Ctrl-C would reach them beside this process, which passes it on: twice is "at once".
        start_new_session=True,
        preexec_fn=_end_with_the_launcher if sys.platform == "linux" else None,
    )


def _end_with_the_launcher() -> None:
    """Between fork and exec: a launcher that is killed leaves nobody behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@contextmanager
def _passing_signals_on(started: "Sequence[subprocess.Popen[bytes]]") -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _waited_for(started: "Sequence[subprocess.Popen[bytes]]") -> int:
    """Until all have ended, or one has failed and the others had their time."""
    first: int | None = None
    until = float("inf")
    while any(process.poll() is None for process in started) and time.monotonic() < until:
        if first is None:
            first = _failed(started)
            until = time.monotonic() + GRACE_SECONDS if first is not None else until
        time.sleep(LOOKS_SECONDS)
    if first is None:
        first = _failed(started)
    if first is None:
        return 0
    code = started[first].returncode
    if code < 0:
        left = [rank for rank, process in enumerate(started) if process.poll() is None]
        waited = f"; {_named(left)} did not end by {'itself' if len(left) == 1 else 'themselves'}" if left else ""
        console.say_error(
            f"process {first} of {len(started)}, counted from 0, was ended by {signal.Signals(-code).name}, and the "
            f"run with it{waited}"
        )
    leader = started[0].poll()
    return leader if leader is not None and leader > 0 else max(code, 1)


def _failed(started: "Sequence[subprocess.Popen[bytes]]") -> int | None:
    """The first process that has failed. One that was killed before others, which end because it is gone."""
    failed = [rank for rank, process in enumerate(started) if process.poll()]
    return min(failed, key=lambda rank: started[rank].returncode >= 0, default=None)


def _named(ranks: Sequence[int]) -> str:
    return f"process {ranks[0]}" if len(ranks) == 1 else f"processes {', '.join(map(str, ranks))}"


def _end(started: "Sequence[subprocess.Popen[bytes]]") -> None:
    for process in started:
        if process.poll() is None:
            process.kill()
    for process in started:
        process.wait()
