"""A source of the recipe -> the files it means, and each file as a stream of bytes, decompressed on the way."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from qtune.data.folders import files_of_folder
from qtune.errors import DataError, Problem
from qtune.lfs import ADVICE, is_lfs_pointer
from qtune.recipe.row_kinds import COMPRESSIONS, ROW_KINDS, STREAMED_KINDS, kind_of

_BINARY = ("parquet", "arrow", "feather")
# What a damaged compressed file raises, by the library that reads it; OSError covers gzip's and pyarrow's own.
DECOMPRESSION_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


@dataclass(frozen=True)
class DataFile:
    """A file of rows: its path, the name that errors show, the kind of its rows and its compression ("" for none)."""

    path: Path
    name: str
    kind: str
    compression: str = ""


@dataclass
class Progress:
    """How much of a source's files has been read, in bytes as they lie on disk."""

    bytes_read: float = 0


def data_files(pattern: str, folder: Path, split: str = "train") -> list[DataFile]:
    """The files that a path, glob or folder means, sorted by name; relative ones start at `folder`.

    Of a folder whose files or folders are splits (train, validation, test), those of `split` are meant.

    Raises:
        DataError: nothing matches, a file is of no kind that is known or not what its name says, or a folder holds
            splits without that one, or files of several kinds.
    """
    given = Path(pattern).expanduser()
    base = given if given.is_absolute() else folder / given
    if base.is_file():
        files = [_data_file(base, pattern)]
    elif base.is_dir():
        paths = files_of_folder(base, pattern, split)
        files = [_data_file(path, str(Path(pattern) / path.relative_to(base))) for path in paths]
    else:
        files = [_data_file(path, _shown(path, folder)) for path in _glob(base) if path.is_file()]
    if not files:
        kinds = f"a folder without data files; known kinds: {_known_kinds()}"
        raise DataError(Problem(pattern, kinds if base.is_dir() else "no such file"))
    problems = [Problem(file.name, problem) for file in files if (problem := _disguise(file))]
    if problems:
        raise DataError(problems)
    return files


def refuse_unstreamable(files: Sequence[DataFile]) -> None:
    """Raises a DataError that names the files which cannot be streamed, where all of them are to be."""
    message = "only JSON lines and Parquet are read in blocks; save it as one of them, or remove the key"
    others = [file for file in files if file.kind not in STREAMED_KINDS]
    if others:
        raise DataError([Problem(f"data.streaming = true: {file.name}", message) for file in others])


def _disguise(file: DataFile) -> str | None:
    """What a file is instead of what its name says; None if nothing is known against it."""
    with file.path.open("rb") as stream:
        start = stream.read(200)
    if is_lfs_pointer(file.path):
        return ADVICE
    if file.kind not in ("txt", "md") and start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not rows: what was downloaded is the page around the file"
    packed = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zst"}
    for magic, compression in packed.items():
        if start.startswith(magic) and not file.compression and file.kind not in _BINARY:
            return f"is compressed; name it .{file.kind}.{compression}"
    if start.startswith(b"PK\x03\x04"):
        return "is a zip archive (an .xlsx is one, too); unpack it, or save it as CSV"
    return None


@contextmanager
def open_bytes(file: DataFile, progress: Progress) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed as they are read, and counted as they lie on disk."""
    with io.BufferedReader(_Counted(file.path, progress)) as stored:
        match file.compression:
            case "gz":
                stream: Any = gzip.GzipFile(fileobj=stored)
            case "bz2":
                stream = bz2.BZ2File(stored)
            case "xz":
                stream = lzma.LZMAFile(stored)  # noqa: SIM115 (closed by the with below)
            case "zst":
                stream = _Lines(pa.input_stream(stored, compression="zstd"))
            case _:
                stream = stored
        with stream:
            yield cast("BinaryIO", stream)


class _Counted(io.FileIO):
    """A file that says how much of it has been read."""

    def __init__(self, path: Path, progress: Progress) -> None:
        super().__init__(path, "r")
        self.progress = progress

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer) or 0
        self.progress.bytes_read += size
        return size


class _Lines:
    """`readline` for pyarrow's decompressing stream, which only has `read`."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.stream = stream
        self.buffer = b""

    def read(self, size: int = -1) -> bytes:
        wanted = None if size < 0 else max(0, size - len(self.buffer))
        data = self.buffer + cast("bytes", self.stream.read(wanted))
        self.buffer = b"" if size < 0 else data[size:]
        return data if size < 0 else data[:size]

    def readline(self, limit: int = -1) -> bytes:
        while (end := self.buffer.find(b"\n")) < 0 and (limit < 0 or len(self.buffer) < limit):
            more = cast("bytes", self.stream.read(1 << 20))
            if not more:
                break
            self.buffer += more
        size = len(self.buffer) if end < 0 else end + 1
        size = size if limit < 0 else min(size, limit)
        line, self.buffer = self.buffer[:size], self.buffer[size:]
        return line

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def _data_file(path: Path, name: str) -> DataFile:
    """Reads the kind and the compression off a file name."""
    kind, compression = kind_of(path)
    if kind not in ROW_KINDS:
        raise DataError(Problem(name, f"a file of unknown kind; known kinds: {_known_kinds()}"))
    if compression and kind in _BINARY:
        raise DataError(Problem(name, f".{kind} files are compressed inside; unpack the .{compression} around it"))
    return DataFile(path, name, kind, compression)


def _glob(base: Path) -> Iterator[Path]:
    """The paths that match a pattern with *, ? or [...]; ** is any depth of folders."""
    if not any(mark in str(base) for mark in "*?["):
        return iter(())
    return iter(sorted(Path(base.anchor).glob(str(base.relative_to(base.anchor)))))


def _shown(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _known_kinds() -> str:
    kinds, compressions = (", ".join(f".{end}" for end in ends) for ends in (ROW_KINDS, COMPRESSIONS))
    return f"{kinds}, the text ones also with {compressions}"
