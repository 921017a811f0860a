"""Rows that are read while they are trained on are the rows that would have been prepared as a whole."""

import bz2
import gzip
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qtune.data import encoding, stream, stream_blocks, stream_findings, stream_index, stream_split
from qtune.data import prepare as prepare_module
from qtune.data.batches import StepSampler
from qtune.data.figures import split_figures
from qtune.data.files import DataFile, data_files
from qtune.data.inspection import inspect
from qtune.data.prepare import Prepared, prepare, survey
from qtune.data.rows import BadRow, Row, read_rows
from qtune.data.sources import find_sources
from qtune.data.stream_blocks import BlockReader, blocks_of
from qtune.data.stream_choice import GROWTH, Choice, choose_streaming
from qtune.data.stream_order import WindowSampler
from qtune.errors import DataError, WorkError
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
    monkeypatch.setattr(stream_index, "VERSION", "blocks of nine rows")  # another test may have kept its own
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
        case ".jsonl.bz2":
            file.write_bytes(bz2.compress(lines(rows).encode()))
        case ".jsonl.xz":
            file.write_bytes(lzma.compress(lines(rows).encode()))
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


@pytest.mark.parametrize("on_long_row", ["drop", "cut-left"])
def test_rows_that_give_no_example_or_several_keep_their_places(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, on_long_row: str
) -> None:
    documents = [{"text": f"{number} " + "a long book " * (number % 40)} for number in range(60)]
    mixed = [one for pair in zip(ROWS[:60], documents, strict=True) for one in pair]
    text = lines(mixed).replace('"assistant"', '"nobody"', 3) + "{}\n" + lines(ROWS[60:70])
    (tmp_path / "rows.jsonl").write_text(text)
    rules = {"max_length": 100, "on_long_row": on_long_row, "on_bad_row": "skip", "validation": 0.2}
    whole, streamed = both(tmp_path, tokenizer, train="rows.jsonl", **rules)
    (stored,), (expected,) = ([source.stored for source in one.sources] for one in (streamed, whole))
    assert replace(stored, folder=tmp_path) == replace(expected, folder=tmp_path)
    assert stored.bad_count == 3  # of the three words two are in one row; and one row is empty
    numbers = range(len(whole.train))
    assert [streamed.train[number] for number in numbers] == list(whole.train)
    assert [streamed.row(number) for number in numbers] == list(whole.examples["train"])
    assert list(streamed.examples["validation"]) == list(whole.examples["validation"])


def test_answers_that_begin_alike_are_quoted_up_to_where_they_do(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    shared = "As I said to you before,"
    answers = [f"{shared} number {at} is a word of its own, and {at} is another" for at in range(60)]
    written(tmp_path, "rows.jsonl", [{"prompt": f"Say {at}", "completion": one} for at, one in enumerate(answers)])
    for prepared in both(tmp_path, tokenizer, train="rows.jsonl"):
        findings = inspect(prepared, Data.model_validate({"train": "rows.jsonl"}), VOCABULARY).findings
        (found,) = (one for one in findings if one.kind == "boilerplate")
        assert f"“{shared}…”" in found.sentence


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
    for most, has_refused, has_used in ((10_000, False, True), (150, True, True), (1, True, False)):
        shown = split_figures(seen.splits["train"], most)
        assert shown == split_figures(expected.splits["train"], most)
        assert (shown.refused > 0, shown.examples > 0) == (has_refused, has_used)
    assert rows_hash(streamed) == rows_hash(whole)
    for one in (data, data.model_copy(update={"allow": (), "max_length": 40})):
        long, known = (longest_of(rows, one) for rows in (streamed, whole))
        assert long.longest == known.longest
        assert long.data is not None
        assert known.data is not None
        assert (long.data.rows, long.data.scored_share) == (known.data.rows, known.data.scored_share)
        assert np.array_equal(long.data.train, known.data.train)


def blocks(file: Path) -> list[tuple[stream_blocks.Block, list[Row | BadRow]]]:
    (found,) = data_files(file.name, file.parent)
    return [(block, list(rows)) for block, rows in blocks_of(found)]


@pytest.mark.parametrize("name", [*FILES, "rows.jsonl.bz2", "rows.jsonl.xz"])
def test_a_block_is_read_again_from_where_it_begins_in_any_order(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, name, ROWS)
    (found,) = data_files(name, tmp_path)
    first = blocks(file)
    assert len(first) == (16 if name == "rows.parquet" else 15)  # three row groups, each with a short last block
    assert [row for _, rows in first for row in rows] == list(read_rows(found))
    reader = BlockReader(found)
    for block, rows in random.Random(0).sample(first, len(first)):
        assert reader.read(block) == rows
    reader.close()


BROKEN = {
    "empty lines and a mark": b"\xef\xbb\xbf" + b"\n\n".join(json.dumps(one).encode() for one in ROWS[:30]) + b"\n \n",
    "no end of the last line": lines(ROWS[:30]).encode().rstrip(b"\n"),
    "bad rows": b'{"a": 1, "a": 2}\n[1]\n\xff\xfe\xfd\n' + lines(ROWS[:20]).encode() + b"{broken\n",
    "several lines": lines(ROWS[:20]).encode() + b'{\n"text": "a"\n}\n',
    "nothing": b"",
    "no row": b"\n\n\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_blocks_hold_the_rows_and_faults_that_a_file_has_when_it_is_read_as_a_whole(tmp_path: Path, name: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(BROKEN[name])
    (found,) = data_files(file.name, tmp_path)
    assert [row for _, rows in blocks(file) for row in rows] == list(read_rows(found))
    reader = BlockReader(found)
    for block, rows in blocks(file):
        assert reader.read(block) == rows
    reader.close()


def test_a_line_that_is_too_long_belongs_to_its_block_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.data.rows.LONGEST_ROW_BYTES", 400)
    file = tmp_path / "rows.jsonl"
    # The ninth row ends a block, and what is left of its line must not begin the next one.
    file.write_text(lines([{"text": "a"}] * 8 + [{"text": "b" * 3000}] + [{"text": "c"}] * 12))
    (found,) = data_files(file.name, tmp_path)
    known = list(read_rows(found))
    assert [isinstance(one, BadRow) for one in known] == [False] * 8 + [True] + [False] * 12
    assert [row for _, rows in blocks(file) for row in rows] == known
    reader = BlockReader(found)
    assert [row for block, _ in reversed(blocks(file)) for row in reversed(reader.read(block))] == known[::-1]
    reader.close()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_changed_under_a_run_is_noticed_where_it_was_changed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    written(tmp_path, name, ROWS)
    streamed = prepare(
        Data(train=name, streaming=True, validation=0.0, shuffle_rows=0), tokenizer, tmp_path, cache=tmp_path / "cache"
    )
    assert streamed.stream is not None
    streamed.train[0]
    changed = list(ROWS)
    changed[70] = {"messages": [*ROWS[70]["messages"][:1], {"role": "assistant", "content": "Another answer."}]}
    written(tmp_path, name, changed)
    streamed.stream.close()
    first = 63 if name != "rows.parquet" else 68  # of the block that row 70 stands in
    assert (
        streamed.train[first - 1]
        == prepare(
            Data(train=name, streaming=False, validation=0.0), tokenizer, tmp_path, cache=tmp_path / "cache"
        ).train[first - 1]
    )
    with pytest.raises(DataError) as raised:
        streamed.train[first]
    (problem,) = raised.value.problems
    assert problem.place == f"{name}:{first + 1}"
    assert problem.message.startswith("the 9 rows from here on are not those that were checked")


def test_a_bad_row_in_the_last_line_is_named_before_anything_is_trained(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(ROWS) + '{"messages": [{"role": "user", "content": "Who?"}]}\n')
    errors = []
    for streams in (True, False):
        with pytest.raises(DataError) as raised:
            prepare(Data(train=file.name, streaming=streams), tokenizer, tmp_path, cache=tmp_path / "cache")
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    assert errors[0].startswith("rows.jsonl:131: the last turn (messages[0]) is user's; expected an assistant turn")


def test_the_pass_is_made_once_for_the_same_contents(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, "rows.jsonl", ROWS)
    data = Data(train=file.name, streaming=True)

    def said() -> str:
        prepare(data, tokenizer, tmp_path, cache=tmp_path / "cache")
        return capsys.readouterr().err

    assert "checking rows.jsonl, which will be read in blocks, 130 rows" in said()
    assert said() == ""
    file.touch()  # another time of change: the contents are read, the rows are not judged again
    assert said() == ""
    file.write_text(lines(ROWS[1:]))
    assert "129 rows" in said()


def test_a_pass_that_is_stopped_has_done_with_the_files_before(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, rows in enumerate((ROWS[:50], ROWS[50:90], ROWS[90:])):
        written(tmp_path, f"{number}.jsonl", rows)
    original = stream_index.blocks_of

    def stopped(file: DataFile, *more: Any) -> Iterator[Any]:
        yield from original(file, *more)
        if file.name == "1.jsonl":
            raise KeyboardInterrupt

    data = Data(train="*.jsonl", streaming=True, validation=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(stream_index, "blocks_of", stopped)
        with pytest.raises(KeyboardInterrupt):
            survey(data, tokenizer, tmp_path, cache=tmp_path / "cache")
    capsys.readouterr()
    prepared = survey(data, tokenizer, tmp_path, cache=tmp_path / "cache")
    said = capsys.readouterr().err
    assert [name in said for name in ("0.jsonl", "1.jsonl", "2.jsonl")] == [False, True, True]
    assert [(source.name, source.stored.rows) for source in prepared.sources] == [("*.jsonl", 130)]
    assert len(prepared.train) == 130


@pytest.mark.parametrize("name", ["figures.bin", "asked.bin", "blocks.npy", "about.json"])
def test_an_index_that_is_damaged_is_made_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    written(tmp_path, "rows.jsonl", ROWS)
    data = Data(train="rows.jsonl", streaming=True, validation=0.0)
    first = rows_hash(prepare(data, tokenizer, tmp_path, cache=tmp_path / "cache"))
    (damaged,) = (tmp_path / "cache").glob(f"*/{name}")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    again = prepare(data, tokenizer, tmp_path, cache=tmp_path / "cache")
    assert "checking rows.jsonl" in capsys.readouterr().err
    assert rows_hash(again) == first


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python, NumPy and Arrow hold at most, in the pass and in an epoch after it."""
    # What is read ahead to find out whether workers pay is bounded as well, here by 20 rows; and one core has none.
    monkeypatch.setattr(encoding, "ROWS_WORTH_WORKERS", 20)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    arrow: list[int] = []
    keep = stream.RowStream._keep

    def noted(self: stream.RowStream, block: int, examples: pa.RecordBatch) -> None:
        keep(self, block, examples)
        arrow.append(pa.total_allocated_bytes())

    monkeypatch.setattr(stream.RowStream, "_keep", noted)
    peaks, tokens = [], []
    for rows in (120, 480):  # two windows of 18 rows stand in at most eight blocks of nine
        file = tmp_path / f"{rows}.jsonl"
        file.write_text(lines([{"text": f"{number} " + "a book " * 60} for number in range(rows)]))
        arrow.clear()
        tracemalloc.start()
        streamed = survey(
            Data(train=file.name, streaming=True, shuffle_rows=18, validation=0.0, max_length=2048),
            tokenizer,
            tmp_path,
            cache=tmp_path / "cache",
        )
        assert streamed.stream is not None
        for number in streamed.stream.order(4, 1):
            streamed.train[number]
        assert len(streamed.train) == rows
        peaks.append(tracemalloc.get_traced_memory()[1] + max(arrow) - min(arrow))
        tracemalloc.stop()
        tokens.append(sum(int(part["length"].sum()) for _, part in streamed.train.all_figures("length")))
    # Ids and labels alone of the other 360 rows would take eight bytes a token.
    assert peaks[1] - peaks[0] < 0.1 * 8 * (tokens[1] - tokens[0])


def lengths_of(rows: np.ndarray) -> np.ndarray:
    return 10 + (rows * 7919) % 31


@pytest.mark.parametrize(("rows", "batch_size", "window"), [(100, 8, 30), (100, 8, 100), (96, 8, 12), (37, 20, 7)])
def test_every_window_is_shuffled_by_itself_and_every_row_comes_once(rows: int, batch_size: int, window: int) -> None:
    sampler = WindowSampler(rows, lengths_of, batch_size, 3, window)
    sampler.set_epoch(2)
    order = np.array(list(sampler))
    assert sorted(order) == list(range(rows))
    assert len(sampler) == rows
    steps = list(sampler.steps())
    assert [len(step) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    for place in random.Random(0).sample(range(len(steps)), len(steps)):  # whatever was asked for before
        assert sampler.step(place).tolist() == steps[place]
        assert sampler.place_of(steps[place][0]) == place
        lengths = lengths_of(np.array(steps[place]))
        assert (np.diff(lengths) <= 0).all()
    # A step may mix two windows, and nothing comes from further away.
    assert all(
        abs(row // window - place * batch_size // window) <= 1 + batch_size // window
        for place, step in enumerate(steps)
        for row in step
    )
    if window > batch_size:  # else a step has the rows of all its windows in any epoch
        sampler.set_epoch(0)
        assert list(sampler) != order.tolist()


@pytest.mark.parametrize("window", [41, 1000])
def test_a_window_of_all_rows_is_the_order_of_rows_in_memory(window: int) -> None:
    rows = np.arange(41)
    for epoch in (0, 1, 5):
        streamed = WindowSampler(41, lengths_of, 8, 7, window)
        whole = StepSampler(lengths_of(rows), 8, 7)
        streamed.set_epoch(epoch)
        whole.set_epoch(epoch)
        assert list(streamed) == list(whole)


def test_without_a_window_rows_come_in_the_order_of_their_files() -> None:
    sampler = WindowSampler(30, lengths_of, 4, 7, 0)
    assert [sorted(step) for step in sampler.steps()] == [list(range(at, min(at + 4, 30))) for at in range(0, 30, 4)]
    assert [sampler.place_of(row) for row in (0, 3, 4, 29)] == [0, 0, 1, 7]


@pytest.mark.slow
def test_a_process_beside_this_one_makes_the_same_blocks(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "a.jsonl.gz", ROWS[:70])
    written(tmp_path, "b.parquet", ROWS[70:])
    monkeypatch.setattr(stream, "ROWS_WORTH_WORKERS", 1)
    data = {"train": ("a.jsonl.gz", "b.parquet"), "shuffle_rows": 40}
    whole, streamed = both(tmp_path, tokenizer, **data)
    assert streamed.stream is not None
    order = streamed.stream.order(6, 1)
    try:
        for _ in range(2):  # the second epoch begins at the first block again
            for number in order:
                assert streamed.train[number] == whole.train[number]
        os.kill(next(iter(streamed.stream._pool._processes)), signal.SIGKILL)
        with pytest.raises(WorkError, match=r"the process that reads rows ahead was ended from outside.*shuffle_rows"):
            list(map(streamed.train.__getitem__, order))
    finally:
        streamed.stream.close()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["worker", "stream_worker"])
def test_a_process_beside_one_that_is_killed_does_not_stay(tmp_path: Path, module: str) -> None:
    script = tmp_path / "beside.py"
    script.write_text(
        "import os, sys, time\nfrom multiprocessing import get_context\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        f"from qtune.data import {module} as beside\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('forkserver'), beside.start, (None, None, None))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.stdout.close()
    parent.kill()
    parent.wait()
    gone, left = psutil.wait_procs([child], timeout=60)
    for process in left:
        process.kill()
    assert gone == [child]


def test_no_more_than_two_windows_are_kept(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    written(tmp_path, "rows.jsonl", ROWS)
    _, streamed = both(tmp_path, tokenizer, train="rows.jsonl", shuffle_rows=20)
    assert streamed.stream is not None
    made: list[int] = []
    keep = streamed.stream._keep

    def noted(block: int, examples: object) -> None:
        made.append(block)
        keep(block, examples)

    streamed.stream._keep = noted
    for number in streamed.stream.order(6, 1):
        streamed.train[number]
        assert len(streamed.stream._blocks) <= 8  # twice what 20 rows and those that are set aside can stand in
    assert sorted(made) == list(range(15))  # and each block was made once


@pytest.mark.parametrize("alike", [30, 100, 120])
def test_of_a_stream_the_same_rows_are_set_aside_where_many_have_one_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, alike: int
) -> None:
    rows = [{"question": f"What is {max(0, place - alike)}?", "answer": f"It is {place}."} for place in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(4):
        whole, streamed = both(tmp_path, tokenizer, train="rows.jsonl", validation_seed=seed)
        kept, also = (
            list(one.examples["validation"]["place"]) if "validation" in one.examples else []
            for one in (whole, streamed)
        )
        assert kept == also
        assert len(kept) <= 24


@pytest.mark.slow
def test_of_a_stream_no_more_rows_are_set_aside_than_tell_a_mean_loss(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in (stream_split, prepare_module):
        monkeypatch.setattr(module, "MOST_SET_ASIDE", 6)
    written(tmp_path, "rows.jsonl", ROWS)
    whole, streamed = both(tmp_path, tokenizer, train="rows.jsonl", validation=0.2)
    kept, all_of_share = (set(one.examples["validation"]["place"]) for one in (streamed, whole))
    assert len(kept) == 6
    assert kept < all_of_share
    assert "6 rows are set aside for validation: of a stream, no larger share than that" in capsys.readouterr().err
    assert not kept & {streamed.row(number)["place"] for number in range(len(streamed.train))}


def test_a_disk_that_cannot_keep_rows_decides_and_what_cannot_be_streamed_is_said(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, "rows.jsonl", ROWS)

    def choice(free: int, **changes: Any) -> Choice:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        data = Data.model_validate({"train": "rows.jsonl", **changes})
        return choose_streaming(data, find_sources(data.train, data, tmp_path), tmp_path / "not there")

    kept = GROWTH * file.stat().st_size
    assert not choice(2 * kept).streams
    assert choice(2 * kept - 2).streams
    assert choice(2 * kept, streaming=True).streams
    assert not choice(0, streaming=False).streams
    packed = choice(0, packing=True)
    assert not packed.streams
    assert packed.is_tight
    assert packed.reason.endswith("packing or weights do not let them be streamed")
    (tmp_path / "rows.csv").write_text("question,answer\nWho?,I\n")
    with pytest.raises(DataError, match=r"streaming = true: rows.csv: only JSON lines and Parquet are read in blocks"):
        choice(0, streaming=True, train="rows.csv")


@pytest.mark.parametrize("text", ["", "{}\n" * 3])
def test_a_stream_without_a_row_is_refused_as_other_files_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    said = []
    for streaming in (True, False):
        data = Data(train="rows.jsonl", streaming=streaming, format="messages", on_bad_row="skip")
        with pytest.raises(DataError) as raised:
            prepare(data, tokenizer, tmp_path, cache=tmp_path / "cache")
        said.append(str(raised.value))
        surveyed = survey(data, tokenizer, tmp_path, cache=tmp_path / "cache")
        said.append([finding.kind for finding in inspect(surveyed, data, VOCABULARY).findings])
    assert said[:2] == said[2:]
    empty = "; rows.jsonl holds no row: one is a line of JSONL, or one below CSV's names"
    assert said[0] == f"data.train: no row is left to train on{'' if text else empty}"
