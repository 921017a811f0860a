"""Rows before there is a tokenizer: how many there are, how long, and which of them no run could use."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from qtune.data.conversation import ROLES, Conversation, RowError
from qtune.data.files import DataFile, data_files
from qtune.data.formats import (
    detect_format,
    meant_columns,
    renamed,
    to_conversation,
    unknown_columns,
    with_the_files_names,
)
from qtune.data.rows import BadRow, Row, read_rows

ENOUGH = 20_000
"""Rows that are looked at: beyond them nothing in a first recipe depends on how many there are."""
ASKED = 50
"""Rows whose columns are asked what they mean: an empty cell in the first one hides what its columns are."""
BYTES_PER_TOKEN = 6
"""More than texts of any language have, so that a text has not fewer tokens than its bytes make with it."""


@dataclass(frozen=True)
class FirstLook:
    """What the rows of a source are like, as far as that can be told from their text."""

    columns: dict[str, str]
    """The columns to rename, our names to the file's, by the first rows; empty where nothing is to be renamed."""
    rows: int
    """Looked at, ENOUGH of them at most."""
    bad_count: int
    first_bad: BadRow | None
    row_bytes: tuple[int, ...]
    """Of the texts of each row, in UTF-8; documents, which are cut into pieces, do not count."""
    longest_place: str = ""
    """Of the longest of them."""
    document_bytes: tuple[int, ...] = ()
    """Of each document."""
    shapes: tuple[tuple[str, int], ...] = ()
    """Shapes of rows that can be used (`recipe.schema.RowFormat`), with how many have each, the most first."""
    roles: tuple[str, ...] = ()
    """Whose messages there are, in the order of `conversation.ROLES`."""
    answers: tuple[int, int] = (0, 0)
    """The fewest and the most of the assistant's messages in a row."""
    has_unweighted: bool = False
    """Whether a message asks with weight = 0 not to be learned."""

    @property
    def is_whole(self) -> bool:
        """Whether all rows were looked at, as far as that is known."""
        return self.rows < ENOUGH

    @property
    def usable(self) -> int:
        """Rows that can be used, a document as one."""
        return self.rows - self.bad_count

    def too_long(self, max_length: int) -> int:
        """How many rows no tokenizer would bring below `max_length` tokens."""
        return sum(size > BYTES_PER_TOKEN * max_length for size in self.row_bytes)

    def examples(self, max_length: int) -> int:
        """How many the rows make at least: documents are cut into pieces of `max_length` tokens."""
        pieces = sum(max(1, size // (BYTES_PER_TOKEN * max_length)) for size in self.document_bytes)
        return self.usable - len(self.document_bytes) + pieces


def first_look(data: str, folder: Path) -> FirstLook:
    """Looks at the first rows of what `data.train` would name; relative paths start at `folder`.

    Raises:
        DataError: there are no such files, or they are of no kind that holds rows.
    """
    all_rows = _rows(data_files(data, folder))
    first = list(islice(all_rows, ASKED))
    columns, row_format = _meant_by([row for row in first if isinstance(row, Row)])
    rows = bad_count = longest = 0
    first_bad: BadRow | None = None
    sizes: list[int] = []
    longest_place = ""
    documents: list[int] = []
    shapes: Counter[str] = Counter()
    seen = _Messages()
    for row in chain(first, all_rows):
        rows += 1
        shape, found = ("", row) if isinstance(row, BadRow) else _read(row, row_format, columns)
        if isinstance(found, BadRow):
            first_bad, bad_count = first_bad or found, bad_count + 1
        elif found.is_document:
            documents.append(_bytes(found))
        else:
            seen.take(found)
            size = _bytes(found)
            if size > longest:
                longest, longest_place = size, row.place
            sizes.append(size)
        if not isinstance(found, BadRow):
            shapes[shape] += 1
        if rows == ENOUGH:
            break
    return FirstLook(
        columns,
        rows,
        bad_count,
        first_bad,
        tuple(sizes),
        longest_place,
        tuple(documents),
        tuple(shapes.most_common()),
        tuple(role for role in ROLES if role in seen.roles),
        (min(seen.answers, default=0), max(seen.answers, default=0)),
        seen.has_unweighted,
    )


class _Messages:
    """What is seen of the messages of many rows."""

    def __init__(self) -> None:
        self.roles: set[str] = set()
        self.answers: set[int] = set()
        self.has_unweighted = False

    def take(self, talk: Conversation) -> None:
        """One row more."""
        answers = [message for message in talk.messages if message["role"] == "assistant"]
        self.roles |= {message["role"] for message in talk.messages}
        self.answers.add(len(answers))
        self.has_unweighted |= any(message.get("weight") == 0 for message in answers)


def _meant_by(rows: Sequence[Row]) -> tuple[dict[str, str], str]:
    """What most of the rows call their columns, our names to theirs, and the shape that they have then; of two that are
    as many, what came first."""
    meant: Counter[tuple[tuple[tuple[str, str], ...], str]] = Counter()
    for row in rows:
        columns = meant_columns(row.value)
        if (row_format := detect_format(renamed(row.value, columns))) is not None:
            meant[tuple(columns.items()), row_format] += 1
    if not meant:
        return {}, ""
    (pairs, row_format), _ = meant.most_common(1)[0]
    return dict(pairs), row_format


def _rows(files: list[DataFile]) -> Iterator[Row | BadRow]:
    for file in files:
        yield from read_rows(file)


def _read(row: Row, usual: str, columns: dict[str, str]) -> tuple[str, Conversation | BadRow]:
    """A row as preparing it would read it, and its shape: its own where it has another than the first one."""
    value = renamed(row.value, columns)
    row_format = detect_format(value) or usual
    if not row_format:
        return "", BadRow(row.place, unknown_columns(row.value))
    try:
        return row_format, to_conversation(value, row_format, row.place)
    except RowError as fault:
        return row_format, BadRow(row.place, with_the_files_names(str(fault), columns))


def _bytes(conversation: Conversation) -> int:
    return len(conversation.to_json().encode(errors="replace"))
