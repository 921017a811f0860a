"""Where what can be made again is kept: built-in models, dequantized GGUF files, encoded rows, predictions."""

import errno
import os
from contextlib import suppress
from pathlib import Path

from qtune.errors import InputError, Problem

FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_folder() -> Path:
    """QTUNE_CACHE, else XDG_CACHE_HOME/qtune, else ~/.cache/qtune."""
    if own := os.environ.get("QTUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "qtune"


def mark_used(path: Path) -> None:
    """Notes that something kept was used just now. What another user has made, in a cache that is shared, keeps its
    time: only its owner may set that."""
    with suppress(OSError):
        os.utime(path)


def not_writable(folder: Path, error: OSError) -> InputError:
    """What is said where nothing can be kept, with the way out."""
    reason = error.strerror or str(error)
    return InputError(
        Problem(str(folder), f"the cache cannot be written: {reason}; QTUNE_CACHE can name another folder")
    )
