"""One file -> its rows, each with the place it stands at; what cannot be read becomes a bad row, never a traceback.

Files are read as streams: memory is bounded by the longest row, not by the file.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from qtune.data.files import DECOMPRESSION_ERRORS, DataFile, open_bytes

# A row beyond this is a file in the wrong format (one line without an end), not an example to learn from.
LONGEST_ROW_BYTES = 64 << 20
TEXT_PIECE_BYTES = 1 << 20


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


def read_rows(file: DataFile) -> Iterator[Row | BadRow]:
    """The rows of a file in their order."""
    reader = _READERS[file.kind]
    expected = _TABLE_ERRORS if reader in (_parquet, _arrow) else DECOMPRESSION_ERRORS
    try:
        yield from reader(file)
    except expected as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"not a whole .{file.compression} file" if file.compression else f"cannot be read as .{file.kind}"
        yield BadRow(file.name, f"{what}: {reason}", ends_file=True)


# Damaged tables also have names that are not UTF-8, and years beyond Python's.
_TABLE_ERRORS = (*DECOMPRESSION_ERRORS, ValueError, OverflowError)


def _json_lines(file: DataFile) -> Iterator[Row | BadRow]:
    with open_bytes(file) as stream:
        for number, raw in _lines(stream):
            place = f"{file.name}:{number}"
            text = _decoded(raw, place)
            if isinstance(text, BadRow):
                yield text
                if text.ends_file:
                    return
            elif text.strip():
                yield _json_row(text, place)


def _json_row(text: str, place: str) -> Row | BadRow:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        message = str(error) if not isinstance(error, json.JSONDecodeError) else f"{error.msg} at column {error.colno}"
        return BadRow(place, f"not valid JSON: {message}; expected one object like {{…}} on the line")
    except RecursionError:
        return BadRow(place, "not usable JSON: nested too deeply")
    return _row_of(value, place)


def _row_of(value: object, place: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(place, f"a row is {_kind_of(value)}; expected an object with named columns")
    return Row(place, value)


def _json_document(file: DataFile) -> Iterator[Row | BadRow]:
    """A list of objects, or objects one after the other (as in JSON lines), read piece by piece."""
    with open_bytes(file) as stream:
        scan = _JsonScan(stream)
        if scan.skip("") == "[":
            scan.at += 1
        while scan.skip(","):
            place = f"{file.name}:{scan.line}"
            if scan.text[scan.at] == "]":
                return
            found = scan.value(place)
            if isinstance(found, BadRow):
                yield found
                return
            yield _row_of(found[0], place)


class _JsonScan:
    """The JSON values of a stream, one at a time, with the line of each."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.text = ""
        self.at = 0
        self.line = 1
        self.ended = False
        self.rest = b""
        self.first = True
        self.decoder = json.JSONDecoder(parse_constant=_refuse_constant)

    def more(self, size: int = 1 << 20) -> bool:
        """Reads on and drops what was used; False at the end."""
        data = self.stream.read(size)
        raw = self.rest + data
        if self.first:
            raw, self.first = raw.removeprefix(b"\xef\xbb\xbf"), False
        # A character may be cut at the end of a piece: up to 3 bytes of it wait for the next one.
        text = raw.decode("utf-8", errors="surrogateescape")
        kept = len(text) - len(text.rstrip("".join(map(chr, range(0xDC80, 0xDD00))))) if data else 0
        kept = min(kept, 3)
        self.rest = raw[len(raw) - kept :] if kept else b""
        self.text = self.text[self.at :] + (text[: len(text) - kept] if kept else text)
        self.at = 0
        self.ended = not data
        return bool(data)

    def skip(self, separators: str) -> str:
        """Moves to the next character that is neither space nor one of `separators`; "" at the end."""
        while True:
            match = re.compile(rf"[\s{separators}]*").match(self.text, self.at)
            end = match.end() if match else self.at
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended or not (self.more() or self.text):
                return ""

    def value(self, place: str) -> tuple[Any] | BadRow:
        """The value at the current position, in a tuple."""
        size = 1 << 20
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                incomplete = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                too_long = len(self.text) - self.at > LONGEST_ROW_BYTES
                if incomplete and not self.ended and not too_long:
                    self.more(size)
                    size *= 2
                    continue
                where = self.line + self.text.count("\n", self.at, min(error.pos, len(self.text)))
                reason = f"{error.msg.removesuffix(' starting at')} on line {where}"
                return BadRow(place, f"not valid JSON: {reason}; the rows after it cannot be read", ends_file=True)
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                return BadRow(place, f"not usable JSON: {reason}; the rows after it cannot be read", ends_file=True)
            if end == len(self.text) and not self.ended and self.more():
                continue  # a number may go on in the next piece
            used = self.text[self.at : end]
            self.line += used.count("\n")
            self.at = end
            if _has_broken_bytes(used):
                return BadRow(place, "not UTF-8 text; save the file as UTF-8", ends_file=True)
            return (value,)


def _csv(file: DataFile) -> Iterator[Row | BadRow]:
    delimiter = "\t" if file.kind == "tsv" else ","
    csv.field_size_limit(LONGEST_ROW_BYTES)
    with open_bytes(file) as stream:
        texts = (raw.decode("utf-8", errors="surrogateescape") for _, raw in _lines(stream))
        reader = csv.reader(texts, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            place = f"{file.name}:{reader.line_num + 1}"
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
                header = [name.strip() for name in fields]
                if _has_broken_bytes("".join(header)) or len(set(header)) < len(header):
                    reason = "is not UTF-8" if _has_broken_bytes("".join(header)) else "names a column twice"
                    yield BadRow(place, f"the header {reason}: {_short(delimiter.join(header))}", ends_file=True)
                    return
            elif _has_broken_bytes("".join(fields)):
                yield BadRow(place, "not UTF-8 text; save the file as UTF-8")
            elif len(fields) != len(header):
                yield BadRow(place, f"{len(fields)} fields; the header names {len(header)} columns")
            else:
                yield Row(place, dict(zip(header, fields, strict=True)))


def _parquet(file: DataFile) -> Iterator[Row | BadRow]:
    with pq.ParquetFile(file.path) as table:
        yield from _batches(table.iter_batches(batch_size=1024), file)


def _arrow(file: DataFile) -> Iterator[Row | BadRow]:
    """Both of Arrow's formats: the stream that `datasets` writes and the file with a footer (Feather)."""
    with pa.memory_map(str(file.path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(source))
        yield from _batches(batches, file)


def _batches(batches: Iterator[pa.RecordBatch], file: DataFile) -> Iterator[Row | BadRow]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # offsets in a damaged file may point anywhere
        for start in range(0, batch.num_rows, 1024):
            for value in batch.slice(start, 1024).to_pylist():
                number += 1
                yield Row(f"{file.name}:{number}", without_inner_nulls(value))


def without_inner_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives every struct every key that any row has; the keys that a row's structs lack come back as null."""
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _text(file: DataFile) -> Iterator[Row | BadRow]:
    """The whole file is one document; beyond 1 MiB it goes on in further rows, cut between lines."""
    lines: list[str] = []
    size, start = 0, 1
    with open_bytes(file) as stream:
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


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends, each at most LONGEST_ROW_BYTES + 1 long; a byte order mark is dropped."""
    number = 0
    while raw := stream.readline(LONGEST_ROW_BYTES + 1):
        number += 1
        yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        while len(raw) > LONGEST_ROW_BYTES and not raw.endswith(b"\n"):
            raw = stream.readline(LONGEST_ROW_BYTES + 1)


def _decoded(raw: bytes, place: str) -> str | BadRow:
    if len(raw) > LONGEST_ROW_BYTES:
        return BadRow(place, f"a line of more than {LONGEST_ROW_BYTES >> 20} MiB; expected one row on each line")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return BadRow(place, "UTF-16 text; save the file as UTF-8", ends_file=True)
        return BadRow(place, f"not UTF-8 text: byte 0x{raw[error.start]:02x} at position {error.start + 1}")


def _has_broken_bytes(text: str) -> bool:
    """Whether decoding with surrogateescape met bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _kind_of(value: object) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
