"""A folder that tests damage, and a copy of it as it was: put back by what has changed alone.

Making a folder of runs anew is dozens of folders and a hundred files, each time, and removing one waits for the disk.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

State = tuple[int, int, int, int, int]
"""Inode, rights, bytes, times of the last write and of the last change in ns. What is put back has its copy's time of
writing, which is past: a write at the same tick of the file system's clock shows all the same."""


class KeptFolder:
    """Puts a folder back as its copy is, as often as it is asked."""

    def __init__(self, folder: Path, copy: Path) -> None:
        self.folder, self.copy = folder, copy
        self._known: dict[str, State] = {}
        """Files that are known to be as they are in the copy, and as what."""

    def put_back(self) -> None:
        """Removes what is not in the copy, and copies what is missing or may have changed."""
        there, wanted = dict(_entries(self.folder)), dict(_entries(self.copy))
        for name in sorted(there, reverse=True):  # what is in a folder before the folder
            entry = there[name]
            if name in wanted and _kind(entry) == _kind(wanted[name]) and self._is_as_it_was(entry, name):
                if _kind(entry) == "folder":
                    shutil.copymode(wanted[name].path, entry.path)
                continue
            _remove(there.pop(name))
        for name in sorted(wanted.keys() - there.keys()):
            if _kind(wanted[name]) == "folder":
                (self.folder / name).mkdir(parents=True)
                shutil.copymode(wanted[name].path, self.folder / name)
            else:
                shutil.copy2(wanted[name].path, self.folder / name, follow_symlinks=False)
        self._known = {name: _state(entry) for name, entry in _entries(self.folder) if _kind(entry) != "folder"}

    def _is_as_it_was(self, entry: "os.DirEntry[str]", name: str) -> bool:
        return _kind(entry) == "folder" or self._known.get(name) == _state(entry)


def _entries(folder: Path, before: str = "") -> "Iterator[tuple[str, os.DirEntry[str]]]":
    """Everything below a folder by its path in it, links as such."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield before + entry.name, entry
            if _kind(entry) == "folder":
                yield from _entries(Path(entry.path), f"{before}{entry.name}/")


def _kind(entry: "os.DirEntry[str]") -> str:
    if entry.is_symlink():
        return "link"
    return "folder" if entry.is_dir() else "file"


def _state(entry: "os.DirEntry[str]") -> State:
    found = entry.stat(follow_symlinks=False)
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _remove(entry: "os.DirEntry[str]") -> None:
    path = Path(entry.path)
    if _kind(entry) == "folder":
        path.rmdir()
    else:
        path.unlink()
