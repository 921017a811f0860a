"""A large file is taken for what it was by what the system says of it, and only where that still belongs to it."""

import os
from pathlib import Path

import pytest

from qtune.data.files import DataFile
from qtune.data.sources import content_digest
from qtune.data.stream_seen import Seen


def data_file(path: Path) -> DataFile:
    return DataFile(path, path.name, "jsonl")


@pytest.fixture
def file(tmp_path: Path) -> DataFile:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    return data_file(path)


def test_a_byte_that_is_changed_under_the_same_size_and_time_is_seen(file: DataFile, tmp_path: Path) -> None:
    seen = Seen(tmp_path / "cache")
    before, state = seen.digest(file), file.path.stat()
    assert before == content_digest(file)
    file.path.write_text(file.path.read_text().replace("two", "too"))
    os.utime(file.path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (file.path.stat().st_size, file.path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert seen.digest(file) == content_digest(file) != before


def test_what_was_kept_is_compared_and_of_another_file_it_is_no_answer(file: DataFile, tmp_path: Path) -> None:
    seen = Seen(tmp_path / "cache")
    digest = seen.digest(file)
    (kept,) = (tmp_path / "cache").glob("*.seen")
    content = kept.read_bytes()
    for damaged in (bytes([content[0] ^ 1]) + content[1:], content[:-1], content[:64], b""):
        kept.write_bytes(damaged)
        assert seen.digest(file) == digest
        assert kept.read_bytes() == content
    other = tmp_path / "others.jsonl"
    other.write_text('{"text": "three"}\n')
    seen.digest(data_file(other))
    (theirs,) = set((tmp_path / "cache").glob("*.seen")) - {kept}
    kept.write_bytes(theirs.read_bytes())
    assert seen.digest(file) == digest
