"""Where what can be made again is kept: built-in models, dequantized GGUF files, encoded rows, predictions."""

import errno
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from qtune.errors import InputError, Problem

FULL = (errno.ENOSPC, errno.EDQUOT)
UNUSED_DAYS = 30


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


def remove_unused(folder: Path, mark: str = "about.json") -> None:
    """Removes what nobody has used for UNUSED_DAYS, and what was left unfinished a day ago.

    mark: the file in a folder whose time says when that was used.
    """
    try:
        kept = list(folder.iterdir())
    except OSError:  # not there, or another user's
        return
    now = time.time()
    for path in kept:
        # Other processes use and remove these at the same time.
        with suppress(OSError):
            used = path / mark if path.is_dir() and not path.name.startswith(".") else path
            days = (now - used.stat().st_mtime) / 86400
            if days > (1 if path.name.startswith(".unfinished-") else UNUSED_DAYS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def not_writable(folder: Path, error: OSError) -> InputError:
    """What is said where nothing can be kept, with the way out."""
    reason = error.strerror or str(error)
    return InputError(
        Problem(str(folder), f"the cache cannot be written: {reason}; QTUNE_CACHE can name another folder")
    )
