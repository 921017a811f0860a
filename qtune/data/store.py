"""Examples on disk: one folder for each source under each set of rules, made once, mapped into memory afterwards.

The folder's name is a hash of everything that decides its content, so nothing stale can be found under it.
"""

import errno
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from qtune.cache import FULL, not_writable
from qtune.data.examples import COLUMNS, EncodedBatch, RowRules
from qtune.data.kept import discard, read_about, write_about
from qtune.data.rows import BadRow
from qtune.errors import InputError
from qtune.whole import rename_unless_there

# Raised when the code that makes examples changes what it makes.
VERSION = 9
EXAMPLES = "examples.arrow"
# Places of this many rows are kept for each list; the counts are always of all.
LISTED = 100


@dataclass(frozen=True)
class Stored:
    """The examples of one source, and what became of its other rows (at most LISTED of each are listed)."""

    folder: Path
    rows: int
    bad: tuple[BadRow, ...]
    bad_count: int
    dropped: tuple[str, ...]
    dropped_count: int
    out_of_order: tuple[str, ...] = ()
    out_of_order_count: int = 0
    """Rows left out because of the order of their turns."""
    unused: Mapping[str, int] = field(default_factory=dict)
    """Columns and keys that nothing reads, with the number of rows that have them."""
    rows_with_unused: int = 0
    mapped: Mapping[str, int] = field(default_factory=dict)
    """Our names of the recipe's `columns`, with the number of rows that have the column."""
    shapes: Mapping[str, int] = field(default_factory=dict)
    """Shapes of rows, with the number of rows that have each."""

    @property
    def examples(self) -> Dataset:
        """The examples, read from disk as they are needed."""
        return Dataset.from_file(str(self.folder / EXAMPLES))


def together(parts: Iterable[Stored]) -> Stored:
    """What became of the rows of all parts, of which there is at least one; the folder is the first one's."""
    first, *others = parts
    for part in others:
        counts = {
            name: Counter(getattr(first, name)) + Counter(getattr(part, name))
            for name in ("unused", "mapped", "shapes")
        }
        room = LISTED - len(first.bad)
        first = Stored(
            first.folder,
            first.rows + part.rows,
            (*first.bad, *(bad for number, bad in enumerate(part.bad) if bad.ends_file or number < room)),
            first.bad_count + part.bad_count,
            (*first.dropped, *part.dropped)[:LISTED],
            first.dropped_count + part.dropped_count,
            (*first.out_of_order, *part.out_of_order)[:LISTED],
            first.out_of_order_count + part.out_of_order_count,
            rows_with_unused=first.rows_with_unused + part.rows_with_unused,
            **{name: dict(counted.most_common()) for name, counted in counts.items()},
        )
    return first


def store_key(source: str, template: str, rules: RowRules) -> str:
    """The name of the folder: `source` and `template` are fingerprints of the rows and of the tokenizer."""
    parts = json.dumps([VERSION, source, template, asdict(rules)], sort_keys=True)
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


def open_store(folder: Path) -> Stored | None:
    """What an earlier run has left under this name, None if nothing, or if it is not what was written: then it is
    said, and removed."""
    about = read_about(folder, folder / EXAMPLES)
    if about is None:
        return None
    try:
        return stored_of(folder, about)
    except (KeyError, TypeError):
        discard(folder)
        return None


def stored_of(folder: Path, about: Mapping[str, Any]) -> Stored:
    """What about.json says; a KeyError where something is missing."""
    return Stored(
        folder,
        about["rows"],
        tuple(BadRow(**bad) for bad in about["bad"]),
        about["bad_count"],
        tuple(about["dropped"]),
        about["dropped_count"],
        tuple(about["out_of_order"]),
        about["out_of_order_count"],
        about["unused"],
        about["rows_with_unused"],
        about["mapped"],
        about["shapes"],
    )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or folder that gets its own name when it is finished."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".unfinished-"))
    except OSError as error:
        raise not_writable(path.parent, error) from error
    try:
        yield temporary / path.name
        rename_unless_there(temporary / path.name, path)
    except OSError as error:
        if error.errno not in FULL:  # of the rows, which are read meanwhile
            raise
        raise not_writable(path.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def not_written(folder: Path) -> InputError:
    """What is said of a folder that is not in the cache, or is another one, though it was written just now."""
    return not_writable(folder.parent, OSError(errno.EIO, f"{folder.name} is not what was written"))


class Tally:
    """What becomes of rows, batch by batch: every count, and the first LISTED places of each kind."""

    def __init__(self) -> None:
        self.rows = self.bad_count = self.dropped_count = self.out_of_order_count = self.rows_with_unused = 0
        self.bad: list[BadRow] = []
        self.dropped: list[str] = []
        self.out_of_order: list[str] = []
        self.unused: Counter[str] = Counter()
        self.mapped: Counter[str] = Counter()
        self.shapes: Counter[str] = Counter()

    def add(self, batch: EncodedBatch) -> None:
        """Counts a batch."""
        self.rows += batch.rows
        self.bad_count += len(batch.bad)
        self.dropped_count += len(batch.dropped)
        # A file that could not be read to its end is listed in any case: its rows are not even counted.
        room = LISTED - len(self.bad)
        self.bad.extend(one for number, one in enumerate(batch.bad) if one.ends_file or number < room)
        self.dropped.extend(batch.dropped[: LISTED - len(self.dropped)])
        self.out_of_order_count += len(batch.out_of_order)
        self.out_of_order.extend(batch.out_of_order[: LISTED - len(self.out_of_order)])
        self.unused.update(batch.unused)
        self.mapped.update(batch.mapped)
        self.shapes.update(batch.shapes)
        self.rows_with_unused += batch.rows_with_unused

    def to_json(self) -> dict[str, Any]:
        """As about.json has it."""
        return {
            "rows": self.rows,
            "bad": [asdict(one) for one in self.bad],
            "bad_count": self.bad_count,
            "dropped": self.dropped,
            "dropped_count": self.dropped_count,
            "out_of_order": self.out_of_order,
            "out_of_order_count": self.out_of_order_count,
            "unused": dict(self.unused.most_common()),
            "rows_with_unused": self.rows_with_unused,
            "mapped": self.mapped,
            "shapes": dict(self.shapes.most_common()),
        }


def write_store(folder: Path, batches: Iterable[EncodedBatch]) -> Stored:
    """Writes the batches as they come, then gives the folder its name: it is whole or not there."""
    with written_whole(folder) as temporary:
        temporary.mkdir()
        tally = Tally()
        with pa.OSFile(str(temporary / EXAMPLES), "wb") as sink, pa.ipc.new_stream(sink, COLUMNS) as writer:
            for batch in batches:
                writer.write_batch(batch.examples)
                tally.add(batch)
        write_about(temporary, temporary / EXAMPLES, tally.to_json())
    stored = open_store(folder)
    if stored is None:  # another process has removed it, or the disk does not give back what it took
        raise not_written(folder)
    return stored
