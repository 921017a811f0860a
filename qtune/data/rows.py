"""One file -> its rows, each with the place it stands at; what cannot be read becomes a bad row, never a traceback.

Files are read as streams: memory is bounded by the longest row, not by the file.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from qtune.data.files import DECOMPRESSION_ERRORS, DataFile, Progress, open_bytes
from qtune.data.json_stream import (
    BrokenJson,
    JsonValues,
    has_broken_bytes,
    strict_json,
)
from qtune.data.tool_calls import ARGUMENTS, TOOLS
from qtune.errors import first_line

# A row beyond this is a file in the wrong format (one line without an end), not an example to learn from.
LONGEST_ROW_BYTES = 64 << 20
TEXT_PIECE_BYTES = 1 << 20


class Lines(Protocol):
    """What lines are read from."""

    def readline(self, size: int = -1, /) -> bytes:
        """The next line with its end, of at most `size` bytes; empty at the end."""
        ...


@dataclass(frozen=True)
class Row:
    """A row as its file has it; `place` is "file:line" ("file:row" where a format has no lines)."""

    place: str
    value: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """What is wrong at a place; `ends_file` when nothing after it can be read."""

    place: str
    message: str
    ends_file: bool = False
    advice: str = ""
    """What a recipe could do about rows like this one."""


def read_rows(file: DataFile, progress: Progress | None = None) -> Iterator[Row | BadRow]:
    """The rows of a file in their order; `progress` is kept up as they are read."""
    reader = _READERS[file.kind]
    expected = TABLE_ERRORS if reader in (_parquet, _arrow) else DECOMPRESSION_ERRORS
    try:
        yield from reader(file, progress or Progress())
    except expected as error:
        what = f"not a whole .{file.compression} file" if file.compression else f"cannot be read as .{file.kind}"
        yield BadRow(file.name, f"{what}: {first_line(error)}", ends_file=True)


# Damaged tables also have names that are not UTF-8, and years beyond Python's.
TABLE_ERRORS = (*DECOMPRESSION_ERRORS, ValueError, OverflowError)


def _json_lines(file: DataFile, progress: Progress) -> Iterator[Row | BadRow]:
    with open_bytes(file, progress) as stream:
        yield from json_lines(stream, file.name)


def json_lines(stream: Lines, name: str, before: int = 0) -> Iterator[Row | BadRow]:
    """The rows of JSON lines, of which `before` stand before the stream's first; `name` is the file's in places.

    Not a byte more than the lines up to a row has been read when it is yielded.
    """
    for number, raw in _lines(stream, before):
        place = f"{name}:{number}"
        text = _decoded(raw, place)
        if isinstance(text, BadRow):
            yield text
            if text.ends_file:
                return
        elif text.strip() in ("{", "["):
            yield BadRow(place, "JSON over several lines; name the file .json", ends_file=True)
            return
        elif text.strip():
            yield _json_row(text, place)


def _json_row(text: str, place: str) -> Row | BadRow:
    try:
        value = strict_json(text.rstrip())  # or what is missing at the end would be missed in the next line
    except ValueError as error:
        message = str(error) if isinstance(error, BrokenJson) else "a number has too many digits"
        if isinstance(error, json.JSONDecodeError):
            message = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        return BadRow(place, f"not valid JSON: {message}; expected one object like {{…}} on the line")
    except RecursionError:
        return BadRow(place, "not usable JSON: nested too deeply")
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return BadRow(place, f"a list of {len(value)} objects on one line; name the file .json if these are rows")
    return _row_of(value, place)


def _row_of(value: object, place: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(place, f"a row is {_kind_of(value)}; expected an object with named columns")
    return Row(place, value)


def _json_document(file: DataFile, progress: Progress) -> Iterator[Row | BadRow]:
    """Lists of objects, or objects one after the other (as in JSON lines), read piece by piece."""
    with open_bytes(file, progress) as stream:
        values = JsonValues(stream, LONGEST_ROW_BYTES)
        inside = False
        while character := values.next_character(over_commas=True):
            # Behind the end of a list there may be another one, where files were put together.
            if character == ("]" if inside else "["):
                inside = not inside
                values.step()
                continue
            place = f"{file.name}:{values.line}"
            try:
                value = values.value()
            except BrokenJson as error:
                yield BadRow(place, f"not valid JSON: {error}; the rows after it cannot be read", ends_file=True)
                return
            yield _row_of(value, place)
        if inside:
            yield BadRow(
                f"{file.name}:{values.line}",
                "the list has no end: the file was cut off; get the whole file",
                ends_file=True,
            )


def _csv(file: DataFile, progress: Progress) -> Iterator[Row | BadRow]:
    csv.field_size_limit(LONGEST_ROW_BYTES)
    with open_bytes(file, progress) as stream:
        texts = iter(raw.decode("utf-8", errors="surrogateescape") for _, raw in _lines(stream))
        first = next(texts, "")
        # Excel's own word for it, in a line before the header.
        skipped = 1 if _EXCEL_DELIMITER.match(first) else 0
        second = list(islice(texts, 1))
        delimiter = _delimiter(first, second[0] if second else "", "\t" if file.kind == "tsv" else ",")
        ahead = second if skipped else [first, *second]
        reader = csv.reader(chain(ahead, texts), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            place = f"{file.name}:{reader.line_num + 1 + skipped}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield BadRow(place, f"not valid {file.kind.upper()}: {error}", ends_file=True)
                return
            if fields is None:
                return
            if not fields:
                continue
            if header is None:
                header = _names(fields)
                if has_broken_bytes("".join(header)) or len(set(header)) < len(header):
                    reason = "is not UTF-8" if has_broken_bytes("".join(header)) else "names a column twice"
                    yield BadRow(place, f"the header {reason}: {_short(delimiter.join(header))}", ends_file=True)
                    return
            elif has_broken_bytes("".join(fields)):
                yield BadRow(place, "not UTF-8 text; save the file as UTF-8")
            elif _names(fields) == header:
                yield BadRow(place, "the header once more, as where tables were put together")
            elif len(fields) != len(header):
                yield BadRow(place, f"{len(fields)} fields; the header names {len(header)} columns")
            else:
                yield Row(place, dict(zip(header, fields, strict=True)))


def _names(fields: list[str]) -> list[str]:
    """The columns of a header; those without a name, which spreadsheets write behind the last used one, by number."""
    return [name.strip() or f"(column {number})" for number, name in enumerate(fields, 1)]


_EXCEL_DELIMITER = re.compile(r"sep=(.)\r?\n?\Z")


def _delimiter(header: str, row: str, usual: str) -> str:
    """What separates the columns of a table: what its first line says, the usual one, or the one that is there.

    A name may hold another delimiter than the table's: one that parts the first row into as many fields as the header
    goes before all others.
    """
    told = _EXCEL_DELIMITER.match(header)
    if told:
        return told[1]
    names, fields = (re.sub(r'"[^"]*("|$)', "", line) for line in (header, row))
    fitting = [one for one in ",;\t|" if names.count(one) == fields.count(one) > 0]
    if usual in (fitting or names):
        return usual
    return max(fitting or ",;\t|", key=lambda one: (names.count(one), one == usual))


def _parquet(file: DataFile, progress: Progress) -> Iterator[Row | BadRow]:
    with pq.ParquetFile(file.path) as table:
        row_bytes = file.path.stat().st_size / max(1, table.metadata.num_rows)
        for row in _batches(table.iter_batches(batch_size=1024), file):
            progress.bytes_read += row_bytes
            yield row


def _arrow(file: DataFile, progress: Progress) -> Iterator[Row | BadRow]:
    """Both of Arrow's formats: the stream that `datasets` writes and the file with a footer (Feather)."""
    with pa.memory_map(str(file.path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(source))
        yield from _batches(_counted(batches, progress), file)


def _counted(batches: Iterator[pa.RecordBatch], progress: Progress) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        progress.bytes_read += batch.nbytes
        yield batch


def _batches(batches: Iterator[pa.RecordBatch], file: DataFile) -> Iterator[Row | BadRow]:
    return table_rows(batches, file.name)


def table_rows(batches: Iterable[pa.RecordBatch], name: str, before: int = 0) -> Iterator[Row]:
    """The rows of a table, of which `before` stand before the first batch; `name` is the file's in places."""
    number = before
    for batch in batches:
        batch.validate(full=True)  # offsets in a damaged file may point anywhere
        for start in range(0, batch.num_rows, 1024):
            for value in batch.slice(start, 1024).to_pylist():
                number += 1
                yield Row(f"{name}:{number}", without_inner_nulls(value))


def without_inner_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives every struct every key that any row has; the keys that a row's structs lack come back as null.

    Where a row declares tools, the arguments of its calls stay as they are: null may be one of their values, which the
    call's own tool decides (`tool_calls.without_padding`). Without them nobody can tell, and hardly any is more.
    """
    declares = any(row.get(key) for key in TOOLS)
    return {key: _without_nulls(value, declares, key in _CALLS) for key, value in row.items()}


_CALLS = ("tool_calls", "function_call")


def _without_nulls(value: Any, declares: bool, is_call: bool) -> Any:
    if isinstance(value, dict):
        return {
            key: inner
            if declares and is_call and key in ARGUMENTS
            else _without_nulls(inner, declares, is_call or key in _CALLS)
            for key, inner in value.items()
            if inner is not None
        }
    return [_without_nulls(inner, declares, is_call) for inner in value] if isinstance(value, list) else value


def _text(file: DataFile, progress: Progress) -> Iterator[Row | BadRow]:
    """The whole file is one document; beyond 1 MiB it goes on in further rows, cut between lines."""
    lines: list[str] = []
    size, start = 0, 1
    with open_bytes(file, progress) as stream:
        for number, raw in _lines(stream):
            text = _decoded(raw, f"{file.name}:{number}")
            if isinstance(text, BadRow):
                yield text
                if text.ends_file:
                    return
                continue
            lines.append(text)
            size += len(raw)
            if size >= TEXT_PIECE_BYTES:
                yield Row(f"{file.name}:{start}", {"text": "".join(lines)})
                lines, size, start = [], 0, number + 1
    if "".join(lines).strip():
        yield Row(f"{file.name}:{start}", {"text": "".join(lines)})


_READERS = {
    "jsonl": _json_lines,
    "ndjson": _json_lines,
    "json": _json_document,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "feather": _arrow,
    "txt": _text,
    "md": _text,
}


def _lines(stream: Lines, before: int = 0) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends, each at most LONGEST_ROW_BYTES + 1 long; a byte order mark is dropped."""
    number = before
    while raw := stream.readline(LONGEST_ROW_BYTES + 1):
        number += 1
        rest = raw
        while len(rest) > LONGEST_ROW_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST_ROW_BYTES + 1)
        yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw


def _decoded(raw: bytes, place: str) -> str | BadRow:
    if len(raw) > LONGEST_ROW_BYTES:
        return BadRow(place, f"a line of more than {LONGEST_ROW_BYTES >> 20} MiB; expected one row on each line")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return BadRow(place, "UTF-16 text; save the file as UTF-8", ends_file=True)
        return BadRow(place, f"not UTF-8 text: byte 0x{raw[error.start]:02x} at position {error.start + 1}")


def _kind_of(value: object) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
