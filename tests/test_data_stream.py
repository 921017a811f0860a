"""Rows that are read from their files while they are trained on are the rows that would have been prepared as a whole."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qtune.data import stream, stream_blocks, stream_findings
from qtune.data.figures import split_figures
from qtune.data.files import data_files
from qtune.data.inspection import inspect
from qtune.data.prepare import Prepared, prepare, survey
from qtune.data.rows import BadRow, Row, read_rows
from qtune.data.stream_blocks import BlockReader, blocks_of
from qtune.data.stream_order import WindowSampler
from qtune.errors import DataError
from qtune.memory.longest import longest_of
from qtune.recipe.schema import Data
from qtune.run.lock import rows_hash

VOCABULARY = 320


def row(number: int) -> dict[str, Any]:
    """Rows of different lengths, some of them twice, with questions that are asked again."""
    number = number if number % 17 else 3
    answer = f"It is {2 * number + 1}.{' Really.' * (number % 5)}"
    if number % 3 == 0:
        answer = f"The answer to what you have asked me, dear friend, is the number {number}, as everybody knows it."
    turns = [
        {"role": "user", "content": f"What is {number} and {number + 1}{'?' * (1 + number % 7)}"},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns * (1 + number % 2), **({"source": "a book"} if number % 4 == 0 else {})}


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


ROWS = [row(number) for number in range(130)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of nine rows, and figures in pieces of 32: what goes over their borders is looked at."""
    monkeypatch.setattr(stream_blocks, "BATCH_ROWS", 9)
    monkeypatch.setattr(stream, "FIGURES_AT_ONCE", 32)
    monkeypatch.setattr(stream_findings, "FIGURES_AT_ONCE", 32)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """A file of rows of the kind that its name says; tables in row groups of 50."""
    file = folder / name
    match "".join(file.suffixes):
        case ".jsonl":
            file.write_text(lines(rows))
        case ".jsonl.gz":
            file.write_bytes(gzip.compress(lines(rows).encode()))
        case ".jsonl.zst":
            file.write_bytes(pa.Codec("zstd").compress(lines(rows).encode(), asbytes=True))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=50)
    return file


FILES = ("rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet")


def both(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> tuple[Prepared, Prepared]:
    """The same rows as a whole, and streamed."""
    changes = {"validation": 0.1, "max_length": 256, **changes}
    whole, streamed = (
        survey(Data.model_validate(changes | {"streaming": streams}), tokenizer, folder, cache=folder / "cache")
        for streams in (False, True)
    )
    return whole, streamed


@pytest.mark.parametrize("name", FILES)
def test_streamed_rows_are_those_that_would_have_been_prepared(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    written(tmp_path, name, ROWS)
    whole, streamed = both(tmp_path, tokenizer, train=name)
    assert streamed.stream is not None
    assert len(streamed.train) == len(whole.train) > 100
    assert [streamed.train[number] for number in range(len(whole.train))] == list(whole.train)
    assert [streamed.stream.example(number) for number in (0, 7, 63, 100)] == [
        whole.examples["train"][number] for number in (0, 7, 63, 100)
    ]
    assert list(streamed.examples["validation"]) == list(whole.examples["validation"])


def test_several_sources_follow_one_another_in_a_stream(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    written(tmp_path, "a.jsonl", ROWS[:40])
    written(tmp_path, "b.parquet", ROWS[40:90])
    written(tmp_path, "c.jsonl.gz", ROWS[90:])
    whole, streamed = both(tmp_path, tokenizer, train=("a.jsonl", "b.parquet", "c.jsonl.gz"))
    assert [streamed.train[number] for number in range(len(whole.train))] == list(whole.train)
    assert [streamed.row(number)["place"] for number in (0, 50, 110)] == [
        whole.examples["train"][number]["place"] for number in (0, 50, 110)
    ]


def test_what_is_found_in_a_stream_is_what_is_found_in_the_same_rows_as_a_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    other = [*ROWS[:100], *ROWS[:7], {"text": "a row of another kind"}]
    written(tmp_path, "a.jsonl", ROWS)
    written(tmp_path, "b.jsonl", other)
    given = {"train": ("a.jsonl", "b.jsonl"), "max_length": 150, "allow": ("too-long",), "on_bad_row": "skip"}
    whole, streamed = both(tmp_path, tokenizer, **given)
    data = Data.model_validate(given)
    for vocabulary in (VOCABULARY, 250):
        seen, expected = (inspect(one, data, vocabulary) for one in (streamed, whole))
        kinds = {finding.kind for finding in expected.findings}
        assert {"duplicate", "boilerplate", "unused"} <= kinds
        assert [(one.kind, one.sentence.partition("(“")[0], one.hint) for one in seen.findings] == [
            (one.kind, one.sentence.partition("(“")[0], one.hint) for one in expected.findings
        ]
    assert split_figures(seen.splits["train"]) == split_figures(expected.splits["train"])
    assert rows_hash(streamed) == rows_hash(whole)
    assert streamed.tokens == whole.tokens
    long, known = (longest_of(one, data) for one in (streamed, whole))
    assert long.longest == known.longest
    assert long.data is not None and known.data is not None
    assert (long.data.rows, long.data.scored_share) == (known.data.rows, known.data.scored_share)
