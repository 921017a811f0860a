"""A file or a folder appears whole or not at all: it is made under another name, and renamed when it is complete."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def place_taken(file: Path, *, force: bool) -> str | None:
    """Why a file cannot be written here, before there is anything to write; None where it can."""
    if file.is_dir():
        return "is a folder, and a file is to be written; choose another --output"
    if file.exists() and not force:
        return "is there already; choose another --output, or replace it with --force"
    return None


@contextmanager
def whole(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """A name beside `path` under which a file or folder is made; it becomes `path` when the block ends well.

    What was there before is replaced, and seen unchanged until then. When the block fails, nothing of the new is left.
    A process that is killed leaves `.NAME.partial-PID-…` behind, which `clear_leftovers` and `clear_all_leftovers`
    remove.

    keep_existing: a `path` that another process has finished meanwhile stays, for it is equal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _on_its_way(path)
    try:
        yield partial
        if not keep_existing:
            _take_the_name(partial, path)
        else:
            rename_unless_there(partial, path)
    except OSError as error:
        if error.filename == str(partial):  # nobody knows the other name
            error.filename = str(path)
            del error.filename2  # of a renaming, whose other name this is
        raise
    finally:
        # What cannot be removed must not hide why the block has failed; the next one clears it away.
        with suppress(OSError):
            _remove(partial)


@contextmanager
def passing(path: Path) -> Iterator[Path]:
    """A folder beside `path` for as long as the block runs, named as what is on its way there, and that never arrives:
    what a killed process leaves of it is removed with the rest.

    Raises:
        OSError: it cannot be made.
    """
    folder = _on_its_way(path)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _on_its_way(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(3)}")


def write_text(file: Path, text: str) -> None:
    """Writes a text file whole, and to the disk: a reader sees the old text or the new one, also after a power cut."""
    with whole(file) as partial, partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """The names in a folder, to the disk: without it a power cut may take back a file that was written and renamed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not on every platform can a folder be opened
        return
    try:
        os.fsync(descriptor)
    except OSError:  # nor synced on every file system
        pass
    finally:
        os.close(descriptor)


def clear_leftovers(path: Path) -> None:
    """Removes what killed processes have left of `path`; those that still run keep theirs."""
    _clear(path.parent, re.escape(path.name))


def clear_all_leftovers(folder: Path) -> None:
    """As `clear_leftovers`, of everything that was to be in a folder. Where none can be listed none is removed."""
    with suppress(OSError):
        _clear(folder, ".+")


def _clear(folder: Path, name: str) -> None:
    pattern = re.compile(rf"\.{name}\.partial-([0-9]{{1,9}})-[0-9a-f]+(-old)?")
    for leftover in folder.iterdir():
        found = pattern.fullmatch(leftover.name)
        if found is not None and not _is_alive(int(found[1])):
            with suppress(OSError):
                _remove(leftover)


def _take_the_name(partial: Path, path: Path) -> None:
    """Renames; an old folder, which a rename does not replace, steps aside first and is deleted last."""
    if path.is_symlink() and partial.is_dir():
        path.unlink()  # of the link alone: no folder takes the place of one
    if not path.is_dir():
        partial.replace(path)
        return
    old = partial.with_name(f"{partial.name}-old")
    path.rename(old)
    partial.rename(path)
    _remove(old)


def rename_unless_there(partial: Path, path: Path) -> None:
    """Gives a name, unless another process has been faster: what it has made is equal, and stays."""
    if path.exists():
        return
    try:
        partial.rename(path)
    except OSError:
        if not path.exists():  # no other process was faster by a moment
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
