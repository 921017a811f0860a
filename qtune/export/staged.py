"""An output folder that appears complete or not at all."""

import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qtune.errors import ExportError, InputError, Problem

# Beside the weights: index, config, tokenizer (a large vocabulary is 35 MB), model card, verify.json.
SIDE_FILES_BYTES = 64 * 2**20


@contextmanager
def staged_folder(output: Path, expected_bytes: int, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends well, and is removed otherwise.

    An export that was killed leaves `.NAME.partial-PID` behind, never a folder that looks finished; the next export
    to the same name clears it away.

    Raises InputError when `output` is there and `force` is not given, or when the disk has less than `expected_bytes`
    free; ExportError when the disk fills up on the way.
    """
    refuse_existing(output, force=force)
    output.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(output)
    refuse_small_disk(output.parent, expected_bytes + SIDE_FILES_BYTES)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        with _terminated_by_exception():
            yield partial
            _take_the_name(partial, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(f"{output.parent}: the disk is full; nothing was left behind") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """SIGTERM ends the block by an exception, so that it cleans up behind itself; only the main thread gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse_existing(output: Path, *, force: bool) -> None:
    """Raises InputError when something would be overwritten without being asked for."""
    if output.exists() and not force:
        raise InputError(Problem(str(output), "is there already; another --output, or --force to replace it"))


def refuse_small_disk(folder: Path, needed_bytes: int) -> None:
    """Raises InputError when a folder's disk has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise InputError(
            Problem(str(folder), f"needs {needed_bytes / 2**30:.2f} GiB, the disk has {free / 2**30:.2f} GiB free")
        )


def _take_the_name(partial: Path, output: Path) -> None:
    """Renames; an old folder steps aside first and is deleted last."""
    old = output.parent / f".{output.name}.partial-{os.getpid()}-old"
    if output.exists():
        output.rename(old)
    partial.rename(output)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _clear_leftovers(output: Path) -> None:
    """Removes what killed exports left behind; those that still run keep theirs."""
    for leftover in output.parent.glob(f".{output.name}.partial-*"):
        pid = int(leftover.name.rpartition("partial-")[2].partition("-")[0])
        if not _is_alive(pid):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
