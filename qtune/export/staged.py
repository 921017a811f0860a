"""An output folder that appears complete or not at all."""

import errno
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qtune.disk import refusal_of
from qtune.errors import ExportError, InputError, Problem, QtuneError
from qtune.sizes import MIB, gib_text
from qtune.whole import clear_leftovers, whole

# Beside the weights: index, config, tokenizer (a large vocabulary is 35 MB), model card, verify.json.
SIDE_FILES_BYTES = 64 * MIB


@contextmanager
def staged_folder(output: Path, expected_bytes: int, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends well, and is removed otherwise.

    An export that was killed leaves `.NAME.partial-PID-…` behind, never a folder that looks finished; the next export
    to the same name clears it away.

    Raises:
        InputError: `output` is there and `force` is not given, or the disk has less than `expected_bytes` free.
        ExportError: the disk fills up on the way.
    """
    refuse_existing(output, force=force)
    output.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(output)
    refuse_small_disk(output.parent, expected_bytes + SIDE_FILES_BYTES)
    try:
        with _terminated_by_exception(), whole(output) as partial:
            partial.mkdir()
            yield partial
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(f"{output.parent}: the disk is full; nothing was left behind") from error
        if (refused := refusal_of(error)) is not None:
            raise ExportError(f"{refused}; nothing was left behind") from error
        raise
    except Exception as error:  # of safetensors and tokenizers, which say it in their own way
        if isinstance(error, QtuneError) or (refused := refusal_of(error)) is None:
            raise
        raise ExportError(f"{output.parent}: {refused}; nothing was left behind") from error


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
    """Nothing is overwritten without being asked for.

    Raises:
        InputError: the folder is there and `force` is not given, or a file has its name or that of a folder above it.
    """
    for place in (output, *output.parents):
        if place.exists() and not place.is_dir():
            raise InputError(Problem(str(place), "is a file, and an export is a folder; another --output"))
    if output.exists() and not force:
        raise InputError(Problem(str(output), "is there already; another --output, or --force to replace it"))


def refuse_small_disk(folder: Path, needed_bytes: int) -> None:
    """Nothing is begun that the disk cannot hold.

    Raises:
        InputError: the folder's disk has less than `needed_bytes` free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise InputError(Problem(str(folder), f"needs {gib_text(needed_bytes)}, the disk has {gib_text(free)} free"))
