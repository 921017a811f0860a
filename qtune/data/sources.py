"""The sources of a split -> their rows, with what tells whether they have changed since the last time."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from huggingface_hub import constants

from qtune.data.files import DataFile, Progress, data_files
from qtune.data.folders import reads_one_split
from qtune.data.rows import BadRow, Row, read_rows, without_inner_nulls
from qtune.errors import DataError, Problem, first_line
from qtune.network import is_reachable, offline_datasets
from qtune.recipe.schema import Data, FileSource, HubSource

HUB = "hub:"


@dataclass(frozen=True)
class Source:
    """Rows from files or from a hub dataset, with their shape ("auto" until it is detected) and weight."""

    name: str
    row_format: str
    columns: Mapping[str, str]
    weight: float
    entry: FileSource | HubSource
    """What the recipe says of it."""
    files: tuple[DataFile, ...] = ()
    hub: Dataset | None = field(default=None, compare=False)

    def rows(self, progress: Progress | None = None) -> Iterator[Row | BadRow]:
        """Every row of the source in order, read as a stream; `progress` is kept up on the way."""
        for file in self.files:
            yield from read_rows(file, progress)
        if self.hub is not None:
            for number, value in enumerate(self.hub, 1):
                yield Row(f"{self.name}:{number}", without_inner_nulls(value))

    @property
    def fingerprint(self) -> str:
        """A hash of names and contents."""
        return self.fingerprint_by(content_digest)

    def fingerprint_by(self, digest_of: Callable[[DataFile], bytes]) -> str:
        """The same, where somebody may know what `content_digest` of a file is."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            digest.update(f"{file.name}\0".encode())
            digest.update(digest_of(file))
        if self.hub is not None:
            digest.update(f"{self.name}\0{self.hub._fingerprint}".encode())
        return digest.hexdigest()

    def estimated_rows(self, rows_read: int, progress: Progress) -> int:
        """How many rows there are in all, if the others are as long as those that have been read."""
        if self.hub is not None:
            return len(self.hub)
        size = sum(file.path.stat().st_size for file in self.files)
        return round(rows_read * max(1.0, size / max(1.0, progress.bytes_read)))


def content_digest(file: DataFile) -> bytes:
    """A hash of the bytes of a file, 64 bytes long."""
    with file.path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()


def find_sources(given: object, data: Data, folder: Path, split: str = "train") -> list[Source]:
    """The sources that a key of [data] names: a text, a table, or a list of them.

    `split` is what of a folder with several splits is meant.

    Raises:
        DataError: with every source that is missing.
    """
    entries = given if isinstance(given, tuple) else (given,)
    sources: list[Source] = []
    problems: list[Problem] = []
    for entry in entries:
        try:
            sources.append(_source(entry, data, folder, split))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return sources


def _source(entry: object, data: Data, folder: Path, split: str) -> Source:
    if isinstance(entry, str) and entry.startswith(HUB):
        entry = HubSource(hub=entry.removeprefix(HUB))
    if isinstance(entry, str):
        entry = FileSource(path=entry)
    if not isinstance(entry, (FileSource, HubSource)):
        raise TypeError(entry)
    row_format = data.format if entry.format == "auto" else entry.format
    columns = {**data.columns, **entry.columns}
    if isinstance(entry, FileSource):
        files = tuple(data_files(entry.path, folder, split))
        return Source(_named(entry.path, files, folder, split), row_format, columns, entry.weight, entry, files)
    name = f"{HUB}{entry.hub}[{entry.split}]"
    return Source(name, row_format, columns, entry.weight, entry, hub=_hub_dataset(entry, name))


def _named(path: str, files: Sequence[DataFile], folder: Path, split: str) -> str:
    """The source as it is shown; a folder of which only one split is read says so."""
    whole = folder / Path(path).expanduser()
    return f"{path} ({split} split)" if whole.is_dir() and reads_one_split(whole) and files else path


def _hub_dataset(source: HubSource, name: str) -> Dataset:
    """Where the hub cannot be reached, what is kept of the data set on this computer.

    Raises:
        DataError: it cannot be had.
    """
    is_online = is_reachable()
    try:
        with nullcontext() if is_online else offline_datasets():
            return load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
    except (ConnectionError, FileNotFoundError) as error:
        if is_online:
            raise DataError(Problem(name, f"the hub dataset cannot be loaded: {first_line(error)}")) from error
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        message = f"is not on this computer, and {why}; rows can also be a local file or folder"
        raise DataError(Problem(name, message)) from error
    # `datasets` raises its own errors for missing names and passes those of the network and of the hub's client on.
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(Problem(name, f"the hub dataset cannot be loaded: {first_line(error)}")) from error
