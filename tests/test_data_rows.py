"""Files of every kind give the same rows, each with its place, and no bytes can break the reader."""

import bz2
import gzip
import json
import lzma
import random
import sys
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtune.data import sources
from qtune.data.files import COMPRESSIONS, ROW_KINDS, DataFile, Progress, data_files
from qtune.data.rows import BadRow, Row, read_rows
from qtune.data.sources import Source
from qtune.errors import DataError
from qtune.recipe.schema import Data, FileSource

ROWS = [{"question": "Où est le café ?", "answer": 'Là-bas,\n"à droite".'}, {"question": "a, b\tc", "answer": "🙂"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def rows_of(path, folder=None):
    return [row for file in data_files(str(path), folder or path.parent) for row in read_rows(file)]


def values(rows):
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.value for row in rows]


def places(rows, path):
    return [row.place.removeprefix(str(path)) for row in rows]


def test_json_lines_may_have_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\n\n").encode())
    assert values(rows_of(path)) == ROWS
    assert places(rows_of(path), path) == [":1", ":3"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_json_lines_may_end_as_any_system_ends_lines(tmp_path, newline):
    path = tmp_path / "rows.jsonl"
    path.write_text(LINES.rstrip("\n"), newline=newline)
    assert values(rows_of(path)) == ROWS


@pytest.mark.parametrize(
    ("text", "read", "place"),
    [
        ('[\n{"text": "a"},\n{"text": "b"}', 2, ":3"),
        ('[\n{"text": "a"},\n', 1, ":3"),
        ('[{"text": "a"}]\n[{"text": "b"}', 2, ":2"),
        ("[", 0, ":1"),
    ],
)
def test_a_list_that_was_cut_off_between_its_rows_is_not_taken_for_whole(tmp_path, text, read, place):
    path = tmp_path / "rows.json"
    path.write_text(text)
    *rows, bad = rows_of(path)
    assert len(values(rows)) == read
    assert bad == BadRow(
        f"{path}{place}", "the list has no end: the file was cut off; get the whole file", ends_file=True
    )


def test_a_json_file_is_a_list_of_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=2))
    assert values(rows_of(path)) == ROWS
    assert places(rows_of(path), path) == [":2", ":6"]


def test_a_json_file_may_be_json_lines_under_a_wrong_name(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(LINES)
    assert values(rows_of(path)) == ROWS


def test_an_empty_file_has_no_rows(tmp_path):
    for kind in ("jsonl", "json", "csv", "txt"):
        path = tmp_path / f"rows.{kind}"
        path.write_text("")
        assert rows_of(path) == []


@pytest.mark.parametrize(("kind", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables_may_quote_delimiters_and_line_ends(tmp_path, kind, delimiter):
    path = tmp_path / f"rows.{kind}"
    quoted = [[f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in ROWS]
    path.write_text("\n".join(map(delimiter.join, [list(ROWS[0]), *quoted])) + "\n")
    assert values(rows_of(path)) == ROWS
    assert places(rows_of(path), path) == [":2", ":4"]


def test_parquet_and_both_arrow_formats(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "rows.parquet")
    feather.write_feather(table, tmp_path / "rows.feather")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for kind in ("parquet", "feather", "arrow"):
        path = tmp_path / f"rows.{kind}"
        assert values(rows_of(path)) == ROWS
        assert places(rows_of(path), path) == [":1", ":2"]


def test_keys_that_arrow_fills_with_null_are_as_if_absent(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert values(rows_of(tmp_path / "rows.parquet")) == rows


def test_a_folder_that_datasets_has_saved(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert values(rows_of(tmp_path / "saved")) == ROWS


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize(
    ("compression", "compress"),
    [
        ("gz", gzip.compress),
        ("bz2", bz2.compress),
        ("xz", lzma.compress),
        ("zst", lambda data: pa.compress(data, codec="zstd", asbytes=True)),
    ],
)
def test_compressed_files_are_what_is_in_them(tmp_path, kind, compression, compress):
    plain = {"jsonl": LINES, "json": json.dumps(ROWS), "csv": "question,answer\nx,y\n", "txt": "a\nb\n"}[kind].encode()
    (tmp_path / f"rows.{kind}").write_bytes(plain)
    (tmp_path / f"rows.{kind}.{compression}").write_bytes(compress(plain))
    expected = values(rows_of(tmp_path / f"rows.{kind}"))
    assert values(rows_of(tmp_path / f"rows.{kind}.{compression}")) == expected


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time\n\nthere was a row.\n")
    assert values(rows_of(path)) == [{"text": "Once upon a time\n\nthere was a row.\n"}]


def test_a_long_text_file_goes_on_in_further_rows_without_losing_a_character(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("".join(f"line {number}\n" for number in range(300_000)))
    rows = rows_of(path)
    assert len(rows) == 4
    assert "".join(row.value["text"] for row in rows) == path.read_text()


def test_folders_and_patterns_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl.gz", ".hidden.jsonl", "README.md", "note.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = json.dumps({"text": name}).encode() + b"\n"
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert [value["text"] for value in values(rows_of(tmp_path, tmp_path))] == ["a.jsonl", "b.jsonl", "deep/c.jsonl.gz"]
    names = [file.name for file in data_files("**/*.jsonl*", tmp_path)]
    assert [name for name in names if "hidden" not in name] == ["a.jsonl", "b.jsonl", "deep/c.jsonl.gz"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("*.csv", "*.csv: no such file"),
        ("empty", "empty: a folder without data files; known kinds: "),
        ("rows.xlsx", "rows.xlsx: a file of unknown kind; known kinds: "),
        ("rows.parquet.gz", "rows.parquet.gz: .parquet files are compressed inside; unpack the .gz around it"),
    ],
)
def test_sources_that_cannot_be_read_are_named(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.xlsx").write_bytes(b"")
    (tmp_path / "rows.parquet.gz").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        data_files(name, tmp_path)
    assert str(caught.value).startswith(message)


def test_a_json_list_much_larger_than_a_piece_is_read_whole(tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"question": f"é{number}", "answer": "ab🙂" * (number % 7000)} for number in range(500)]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    read = rows_of(path)
    assert values(read) == rows
    assert places(read, path)[:3] == [":2", ":6", ":10"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    row = {"jsonl": json.dumps({"text": "x" * 1000}) + "\n", "csv": "x" * 1000 + "\n", "txt": "x" * 1000 + "\n"}
    row["json"] = row["jsonl"].rstrip() + ",\n"
    path = tmp_path / f"rows.{kind}"
    with path.open("w") as file:
        file.write({"csv": "text\n", "json": "["}.get(kind, ""))
        for _ in range(30):
            file.write(row[kind] * 1000)
        file.write('{"text": "end"}]' if kind == "json" else "")
    (file,) = data_files(str(path), tmp_path)
    tracemalloc.start()
    count = sum(1 for _ in read_rows(file))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == {"txt": 29, "json": 30_001}.get(kind, 30_000)
    assert peak_bytes < 8 << 20 < path.stat().st_size / 3


def test_a_file_without_line_ends_is_refused_without_reading_it_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("qtune.data.rows.LONGEST_ROW_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 5000 + b'"}\n{"text": "fine"}\n')
    bad, fine = rows_of(path)
    assert bad == BadRow(f"{path}:1", "a line of more than 0 MiB; expected one row on each line")
    assert fine == Row(f"{path}:2", {"text": "fine"})


names = st.sampled_from([f"rows.{kind}{end}" for kind in ROW_KINDS for end in ("", *(f".{c}" for c in COMPRESSIONS))])
PIECES = [
    *b'{ } [ ] " , : \\ \\u d83d null NaN 1e999 - messages role {"messages":['.split(),
    *(b"\n", b"\r", b"\t", b" ", b"\x00", b"\xff", b"\xef\xbb\xbf"),
    # the first bytes of Arrow's two formats, Parquet, gzip, bzip2, xz and Zstandard
    *(b"ARROW1\x00\x00", b"\xff\xff\xff\xff\x10\x00\x00\x00", b"PAR1"),
    *(b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"),
]
pieces = st.sampled_from(PIECES)
contents = st.binary(max_size=300) | st.lists(pieces | st.binary(max_size=5), max_size=60).map(b"".join)


@settings(
    max_examples=400, deadline=2000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=names, content=contents)
@pytest.mark.slow
def test_no_bytes_can_raise_or_hang(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    _, kind, *compression = name.split(".")
    started = time.monotonic()
    for row in read_rows(DataFile(path, name, kind, compression[0] if compression else "")):
        assert isinstance(row, (Row, BadRow))
        assert row.place.startswith(name)
    assert time.monotonic() - started < 1


@settings(
    max_examples=100, deadline=2000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kind=st.sampled_from(["parquet", "feather", "arrow"]), data=st.data())
def test_damaged_binary_tables_cannot_raise(tmp_path, kind, data):
    path = tmp_path / f"rows.{kind}"
    table = pa.Table.from_pylist(ROWS * 20)
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "feather":
        feather.write_feather(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    for row in read_rows(DataFile(path, path.name, kind)):
        assert isinstance(row, (Row, BadRow))


def test_python_recursion_does_not_decide_what_a_deep_row_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": ' + "[" * (2 * sys.getrecursionlimit()) + "}\n")
    (bad,) = rows_of(path)
    assert isinstance(bad, BadRow)


def _gzipped(path, text):
    with gzip.open(path, "wt") as stream:
        stream.write(text)


MANY = [{"question": f"{random.Random(n).getrandbits(2000):x}", "answer": "yes"} for n in range(5000)]
WRITERS = {
    "rows.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in MANY)),
    "rows.jsonl.gz": lambda path: _gzipped(path, "".join(json.dumps(row) + "\n" for row in MANY)),
    "rows.json": lambda path: path.write_text(json.dumps(MANY)),
    "rows.csv": lambda path: path.write_text("question,answer\n" + "".join(f"{row['question']},yes\n" for row in MANY)),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(MANY), path),
    "rows.arrow": lambda path: feather.write_feather(
        pa.Table.from_pylist(MANY), path, compression="uncompressed", chunksize=500
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_how_many_rows_there_are_is_estimated_from_the_first_ones(tmp_path, name):
    WRITERS[name](tmp_path / name)
    source, read = Source(name, "auto", {}, 1.0, FileSource(path=name), tuple(data_files(name, tmp_path))), Progress()
    rows = source.rows(read)
    estimates = [source.estimated_rows(number, read) for number, _ in enumerate(rows, 1) if number in (4000, 5000)]
    assert estimates == [pytest.approx(5000, rel=0.25), pytest.approx(5000, rel=0.01)]


def test_lists_that_were_put_together_in_one_file_are_all_read(tmp_path):
    file = tmp_path / "two.json"
    file.write_text('[{"text": "a"},\n{"text": "b"}]\n[{"text": "c"}] {"text": "d"}')
    assert [row.value["text"] for row in rows_of(file)] == ["a", "b", "c", "d"]


def test_a_list_inside_of_a_list_is_no_row(tmp_path):
    file = tmp_path / "nested.json"
    file.write_text('[[{"text": "a"}], {"text": "b"}]')
    bad, row = rows_of(file)
    assert (bad.message, row.value) == ("a row is a list; expected an object with named columns", {"text": "b"})


@pytest.mark.parametrize("text", ['{\n  "text": "a"\n}\n', '[\n{"text": "a"}\n]\n'])
def test_json_over_several_lines_under_the_name_of_json_lines_is_one_error(tmp_path, text):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    (bad,) = rows_of(file)
    assert (bad.message, bad.ends_file) == ("JSON over several lines; name the file .json", True)


def test_a_list_of_rows_on_one_line_is_told_its_name(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('[{"text": "a"}, {"text": "b"}]\n')
    (bad,) = rows_of(file)
    assert bad.message == "a list of 2 objects on one line; name the file .json if these are rows"


def test_columns_without_a_name_are_numbered_and_a_second_header_is_no_row(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(",question,answer,,\n0,red,stop,,\n,question,answer,,\n1,blue,go,,x\n")
    first, bad, last = rows_of(file)
    assert first.value == {"(column 1)": "0", "question": "red", "answer": "stop", "(column 4)": "", "(column 5)": ""}
    assert (bad.place, bad.message) == (f"{file}:3", "the header once more, as where tables were put together")
    assert last.value["(column 5)"] == "x"


def test_a_number_beyond_any_float_is_not_read_as_infinity(tmp_path):
    for name in ("rows.jsonl", "rows.json"):
        (tmp_path / name).write_text('{"text": "a", "n": 1e999}\n')
        (bad,) = rows_of(tmp_path / name)
        assert "the number 1e999 is larger than any float" in bad.message


def test_a_hub_dataset_that_cannot_be_had_is_one_sentence_and_nobody_is_asked_twice(monkeypatch) -> None:
    """Its library would ask six times, waiting longer each time."""
    monkeypatch.setattr(sources, "is_reachable", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(DataError) as caught:
        sources.find_sources("hub:nobody/has-this", Data(train="hub:nobody/has-this"), Path())
    assert str(caught.value) == (
        "hub:nobody/has-this[train]: is not on this computer, and the hub cannot be reached; "
        "rows can also be a local file or folder"
    )
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("line", "column"), [('{"question": "x", "answer": "y"', 32), ('{"question" "x"}', 13), ('{"question": "x"}, ', 18)]
)
def test_what_is_wrong_in_a_line_of_json_is_placed_in_that_line(tmp_path, line, column):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"question": "a", "answer": "b"}}\n{line}\n')
    _, broken = rows_of(file)
    assert broken.place.endswith(":2")
    assert f"at column {column};" in broken.message
