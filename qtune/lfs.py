"""Git LFS pointers: a clone without LFS has small texts where large files should be."""

from pathlib import Path

# Source: the specification of Git LFS, docs/spec.md: the version line comes first.
_FIRST_LINE = b"version https://git-lfs.github.com/spec/"
ADVICE = "is a Git LFS pointer, not the file itself: the clone was made without Git LFS; run `git lfs pull` there"


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file only says which file should be there."""
    with file.open("rb") as stream:
        return stream.read(len(_FIRST_LINE)) == _FIRST_LINE


def lfs_pointers(folder: Path) -> list[Path]:
    """The pointers among the files of a folder."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and is_lfs_pointer(file)]
