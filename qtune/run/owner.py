"""Who works in a run's folder: one process at a time, and a dead one does not count.

owner.json names the process, its computer and when it started. The file is locked as long as its process lives, so
that the kernel lets go of it when that dies, however it dies; where a file system has no locks, the process is looked
for by its number and the time of its start, for numbers are used again.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtune.errors import Problem, RunError
from qtune.records import NotARecord, plain, record_of
from qtune.run.folder import RunDir

FILE = "owner.json"


@dataclass(frozen=True)
class Owner:
    """The process that works in a run's folder."""

    pid: int
    host: str
    process_started: float
    """When the process began, in seconds since 1970: with `pid` it names one process."""
    since: str
    """When it took the folder, in local time."""
    doing: str = "training"

    def __str__(self) -> str:
        where = "" if self.host == socket.gethostname() else f" on {self.host}"
        return f"process {self.pid}{where}, which is {self.doing} there since {self.since}"


@contextmanager
def owned(run_dir: RunDir, doing: str = "training") -> Iterator[None]:
    """The run's folder is this process's while the block runs.

    Raises:
        RunError: another process has it; the message says which.
    """
    file = run_dir.path / FILE
    descriptor = _taken(file, run_dir)
    try:
        me = Owner(os.getpid(), socket.gethostname(), _started(os.getpid()) or 0.0, _now(), doing)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(plain(me)) + "\n").encode(), 0)
        yield
    finally:
        # First the name, then the lock: whoever waits for the lock finds the name gone, and asks again.
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)


def require_free(run_dir: RunDir) -> None:
    """Raises a RunError where another process works in the run's folder; `owned` asks again."""
    if (owner := owner_of(run_dir)) is not None:
        raise _refusal(run_dir, owner)


def owner_of(run_dir: RunDir) -> Owner | None:
    """The living process that works in a run's folder; None where there is none, or it is this one."""
    file = run_dir.path / FILE
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _read(file)
        return None if owner is not None and _is_me(owner) else owner or _unknown()
    except OSError:  # a file system without locks
        owner = _read(file)
        return owner if owner is not None and not _is_me(owner) and _is_alive(owner) else None
    finally:
        os.close(descriptor)
    return None


def _taken(file: Path, run_dir: RunDir) -> int:
    """A descriptor of the file, which is locked."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise RunError(Problem(str(file), f"cannot be written: {error.strerror}")) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise _refusal(run_dir, _read(file) or _unknown()) from error
        except OSError:  # a file system without locks
            owner = _read(file)
            if owner is not None and not _is_me(owner) and _is_alive(owner):
                os.close(descriptor)
                raise _refusal(run_dir, owner) from None
        if _is_named(file, descriptor):
            return descriptor
        os.close(descriptor)  # its owner has just ended and taken the name away


def _refusal(run_dir: RunDir, owner: Owner) -> RunError:
    return RunError(Problem(str(run_dir.path), f"belongs to {owner}; wait until it has ended, or end it"))


def _is_named(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _read(file: Path) -> Owner | None:
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
        return record_of(Owner, values)
    except (OSError, ValueError, RecursionError, NotARecord):
        return None


def _unknown() -> Owner:
    """An owner that has the lock and has not written its name yet."""
    return Owner(0, socket.gethostname(), 0.0, "a moment ago", "at work")


def _is_me(owner: Owner) -> bool:
    """Whether it is this process: a container has the numbers of another one, and often the same few."""
    return owner.pid == os.getpid() and owner.host == socket.gethostname() and _has_begun_then(owner)


def _is_alive(owner: Owner) -> bool:
    """Whether the process still runs; one of another computer is taken to."""
    if owner.host != socket.gethostname():
        return True
    return _has_begun_then(owner)


def _has_begun_then(owner: Owner) -> bool:
    started = _started(owner.pid)
    return started is not None and abs(started - owner.process_started) < 1.0


def _started(pid: int) -> float | None:
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
