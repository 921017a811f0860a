"""What a file system refuses, in a sentence with the way out: full, broken, read-only, gone, or too long a name.

And how many bytes a folder holds, and what is in it that is no file.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qtune.errors import QtuneError, WorkError

_FREE, _PERMIT = "free some of it, or name another place", "give yourself the right to it, or name another place"
WAYS_OUT = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: "its file system takes no larger files; name another place",
    errno.EIO: "the disk or the network share is at fault, and the system's log (dmesg) says more",
    errno.ESTALE: "the network share was mounted anew; start again",
    errno.EROFS: "it can only be read; name another place",
    errno.EACCES: _PERMIT,
    errno.EPERM: _PERMIT,
    errno.ENOENT: "it has been there before or was to be made; put it back, or name another place",
    errno.EEXIST: "something else has that name; remove it, or name another place",
    errno.ENOTDIR: "a file has the name of a folder; name another place",
    errno.EISDIR: "a folder has the name of a file; name another place",
    errno.ENOTEMPTY: "somebody else writes into it",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "its links lead to each other",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this computer",
    errno.EBUSY: "somebody else uses it",
    errno.ETXTBSY: "somebody else uses it",
    errno.ENODEV: "the disk is gone",
    errno.ENXIO: "the disk is gone",
    errno.ETIMEDOUT: "the network share does not answer",
    errno.EHOSTDOWN: "the network share does not answer",
}

# Rust's libraries (safetensors, tokenizers) and Arrow say the system's number in their text, each in its own way.
_NUMBERS = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
# PyTorch's writer keeps no number; where it says why, it is in the system's words.
_TORCH = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+|basic_ios::clear|iostream error|open file failed")
_WORDS = re.compile(r"open file failed with strerror: (.+)")


def refusal_of(error: BaseException) -> str | None:
    """What the file system has refused, and what helps; None where the error is about something else."""
    number = _number_of(error)
    if number is None:
        return "a file could not be written; the disk may be full" if _is_of_torch(error) else None
    if number not in WAYS_OUT:
        return None
    name = getattr(error, "filename", None)
    other = getattr(error, "filename2", None)
    place = f"{name}: " if name is not None and not isinstance(name, int) else ""
    if place and other is not None:
        place = f"{name} -> {other}: "
    # Python itself raises some with words of its own: "No usable temporary directory found in …".
    words = error.strerror if isinstance(error, OSError) and error.strerror else os.strerror(number)
    return f"{place}{words}; {WAYS_OUT[number]}"


def free_bytes(folder: Path) -> int:
    """Free where a folder is or would be made; nothing where that cannot be said."""
    for place in (folder.absolute(), *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return 0


def bytes_in(folder: Path) -> int:
    """Bytes of the files below a folder, links aside. What other processes take away meanwhile counts as nothing."""
    total = 0
    for place, _, names in os.walk(folder):  # which passes over folders that are gone
        for name in names:
            with suppress(OSError):
                found = Path(place, name).lstat()
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


NO_FILE = "is a pipe or a device, which may never end, and no file; remove it"


def no_file_in(folder: Path, *, below: bool = True) -> Path | None:
    """The first thing in a folder that is neither file nor folder; None where there is none. A link is what it leads
    to, and nothing where it leads nowhere.

    below: whether folders in it are looked into.
    """
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            with suppress(OSError):
                kind = Path(place, name).stat().st_mode
                if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                    return Path(place, name)
        if not below:
            break
    return None


@contextmanager
def told(kind: type[WorkError], way_on: Callable[[], str] | str = "") -> Iterator[None]:
    """What the file system refuses inside is raised as `kind`, with how to go on; it is asked for only then."""
    try:
        yield
    except Exception as error:
        if isinstance(error, QtuneError) or (refused := refusal_of(error)) is None:
            raise
        way = way_on() if callable(way_on) else way_on
        raise kind(f"{refused}\n{way}" if way else refused) from error


def _number_of(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := _NUMBERS.search(str(error)):
        return int(found[1] or found[2])
    if _is_of_torch(error) and (found := _WORDS.search(str(error))):
        return next((number for number in WAYS_OUT if os.strerror(number) == found[1].strip()), None)
    return None


def _is_of_torch(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and _TORCH.search(str(error)) is not None
