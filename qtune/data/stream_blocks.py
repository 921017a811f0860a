"""A file in blocks of some rows: where each begins, and its rows read again from there, as they were.

A block is what is read, checked and encoded at once, so it is what a stream holds in memory of a file. Its position is
a byte offset in JSON lines (behind the decompression, where there is one) and a row group in Parquet. A digest tells
whether the file still has there what it had.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from qtune.data.encoding import BATCH_CHARACTERS, BATCH_ROWS, characters_of
from qtune.data.files import DECOMPRESSION_ERRORS, DataFile, Progress, open_bytes
from qtune.data.rows import TABLE_ERRORS, BadRow, Row, json_lines, table_rows
from qtune.errors import DataError, Problem, first_line
from qtune.recipe.row_kinds import LINE_KINDS

PIECE_BYTES = 1 << 20
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Block:
    """Rows that follow one another in a file."""

    group: int
    """The row group of a Parquet file; 0 in lines."""
    offset: int
    """The first byte of lines; the first row in its row group."""
    before: int
    """Lines or rows of the file before the first one."""
    rows: int
    nbytes: int
    """Of lines; 0 in Parquet."""
    digest: bytes
    """Of the bytes of lines, of the values of a table's rows."""


def blocks_of(file: DataFile, progress: Progress | None = None) -> Iterator[tuple[Block, Sequence[Row | BadRow]]]:
    """The blocks of a file in their order with their rows; `progress` is kept up as they are read."""
    progress = progress or Progress()
    expected = TABLE_ERRORS if file.kind == "parquet" else DECOMPRESSION_ERRORS
    try:
        yield from (_line_blocks if file.kind in LINE_KINDS else _table_blocks)(file, progress)
    except expected as error:
        what = f"not a whole .{file.compression} file" if file.compression else f"cannot be read as .{file.kind}"
        bad = BadRow(file.name, f"{what}: {first_line(error)}", ends_file=True)
        yield Block(0, 0, 0, 1, 0, b""), [bad]


class _Counted:
    """Lines of a stream, counted and hashed."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.offset = self.lines = 0
        self.digest = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def readline(self, size: int = -1, /) -> bytes:
        raw = self.stream.readline(size)
        self.offset += len(raw)
        self.lines += raw.endswith(b"\n")
        self.digest.update(raw)
        return raw

    def block(self, start: int, before: int, rows: int) -> Block:
        """The block of rows that began at a byte and ends where the stream stands."""
        return Block(0, start, before, rows, self.offset - start, self.digest.digest())


def _line_blocks(file: DataFile, progress: Progress) -> Iterator[tuple[Block, list[Row | BadRow]]]:
    with open_bytes(file, progress) as stream:
        counted = _Counted(stream)
        rows: list[Row | BadRow] = []
        start, before, characters = 0, 0, 0

        for row in json_lines(counted, file.name):
            rows.append(row)
            characters += _characters(row)
            if len(rows) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
                yield counted.block(start, before, len(rows)), rows
                rows, characters = [], 0
                start, before = counted.offset, counted.lines
                counted.digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        if rows:
            yield counted.block(start, before, len(rows)), rows


def _table_blocks(file: DataFile, progress: Progress) -> Iterator[tuple[Block, list[Row | BadRow]]]:
    with _opened(file) as table:
        row_bytes = file.path.stat().st_size / max(1, table.metadata.num_rows)
        before = 0
        for group in range(table.metadata.num_row_groups):
            rows: list[Row] = []
            start = characters = 0
            for row in _group_rows(table, file, group, before):
                rows.append(row)
                characters += _characters(row)
                progress.bytes_read += row_bytes
                if len(rows) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
                    yield Block(group, start, before + start, len(rows), 0, _digest(rows)), list(rows)
                    start += len(rows)
                    rows, characters = [], 0
            if rows:
                yield Block(group, start, before + start, len(rows), 0, _digest(rows)), list(rows)
            before += table.metadata.row_group(group).num_rows


def _characters(row: Row | BadRow) -> int:
    return characters_of(row.value if isinstance(row, Row) else row.message)


def _digest(rows: Sequence[Row]) -> bytes:
    """Of what the rows hold: the bytes of a table depend on how it is cut into pages."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for row in rows:
        digest.update(repr(row.value).encode(errors="surrogatepass"))
    return digest.digest()


def _opened(file: DataFile) -> pq.ParquetFile:
    # Page by page: a row group may be larger than memory.
    return pq.ParquetFile(file.path, pre_buffer=False, buffer_size=PIECE_BYTES)


def _group_rows(table: pq.ParquetFile, file: DataFile, group: int, before: int, skipped: int = 0) -> Iterator[Row]:
    """The rows of a row group; the first `skipped` are not even turned into values."""
    at = 0
    for batch in table.iter_batches(batch_size=BATCH_ROWS, row_groups=[group]):
        start = min(max(0, skipped - at), batch.num_rows)
        yield from table_rows([batch.slice(start)], file.name, before + at + start)
        at += batch.num_rows


class BlockReader:
    """Reads blocks of one file, best in their order: then it goes on where it stands.

    Going back, or far ahead, is a seek in lines that are not compressed and to the start of a row group in Parquet.
    Compressed lines are decompressed up to the place, and nothing else is done with them.
    """

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self._opened = ExitStack()
        self._stream: BinaryIO | None = None
        self._table: pq.ParquetFile | None = None
        self._rows: Iterator[Row] = iter(())
        self._at = (0, 0)
        """Of a table: the row group, and the row in it that comes next."""

    def read(self, block: Block) -> list[Row | BadRow]:
        """The rows of a block.

        Raises:
            DataError: the file has something else there now, or can no longer be read.
        """
        try:
            rows = self._lines(block) if self.file.kind in LINE_KINDS else self._table_rows(block)
        except TABLE_ERRORS as error:
            self.close()
            raise DataError(Problem(self.file.name, f"can no longer be read: {first_line(error)}")) from error
        if rows is None:
            self.close()
            place = f"{self.file.name}:{block.before + 1}"
            message = (
                f"the {block.rows} rows from here on are not those that were checked: the file was changed meanwhile; "
                "put it back as it was, or begin a new run with it"
            )
            raise DataError(Problem(place, message))
        return rows

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        self._opened.close()
        self._stream = self._table = None

    def _lines(self, block: Block) -> list[Row | BadRow] | None:
        if self._stream is None:
            self._stream = self._opened.enter_context(open_bytes(self.file, Progress()))
            self._at = (0, 0)
        if self._at[1] != block.offset:
            self._go_to(block.offset)
        raw = _read(self._stream, block.nbytes)
        self._at = (0, block.offset + len(raw))
        if hashlib.blake2b(raw, digest_size=DIGEST_BYTES).digest() != block.digest:
            return None
        return list(json_lines(io.BytesIO(raw), self.file.name, block.before))

    def _go_to(self, offset: int) -> None:
        assert self._stream is not None
        if not self.file.compression:
            self._stream.seek(offset)
            return
        if offset < self._at[1]:
            self.close()
            self._stream = self._opened.enter_context(open_bytes(self.file, Progress()))
            self._at = (0, 0)
        left = offset - self._at[1]
        while left and (piece := self._stream.read(min(PIECE_BYTES, left))):
            left -= len(piece)

    def _table_rows(self, block: Block) -> list[Row | BadRow] | None:
        if self._table is None:
            self._table = self._opened.enter_context(_opened(self.file))
            self._at = (-1, 0)
        if block.group >= self._table.metadata.num_row_groups:
            return None
        if self._at != (block.group, block.offset):
            before = block.before - block.offset
            self._rows = _group_rows(self._table, self.file, block.group, before, skipped=block.offset)
        rows = [row for _, row in zip(range(block.rows), self._rows, strict=False)]
        self._at = (block.group, block.offset + len(rows))
        return list(rows) if _digest(rows) == block.digest else None


def _read(stream: Any, size: int) -> bytes:
    """So many bytes, or those that are left: a decompressing stream may give fewer at once."""
    pieces = []
    while size and (piece := stream.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
