"""Preparing: every row accounted for, once, and kept until something that matters changes."""

import json
import os

import datasets
import numpy as np
import pytest
from chat_families import FAMILIES, tokenizer_of
from datasets import Dataset

from qtune.data import encoding
from qtune.data.choice import GROUPS, rows_set_aside
from qtune.data.masks import IGNORED
from qtune.data.prepare import prepare, survey
from qtune.data.rows import Row
from qtune.errors import DataError
from qtune.recipe.schema import Data, FileSource, HubSource

CHATML = tokenizer_of(FAMILIES["chatml"])


def write_rows(path, count, start=0, repeats=1):
    rows = [
        {"question": f"What is {n}?", "answer": f"It is {'very ' * (n % 9)}{n}."} for n in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * repeats))


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 100)
    return tmp_path


def made(folder, tokenizer=CHATML, **keys):
    keys = {"train": "rows.jsonl", "validation": 0.0, **keys}
    return prepare(Data(**keys), tokenizer, folder, cache=folder / "cache")


def texts(dataset, tokenizer=CHATML):
    return [tokenizer.decode(row["input_ids"]) for row in dataset]


def questions(rows):
    return [json.loads(row["conversation"])["messages"][0]["content"] for row in rows]


def test_rows_become_ids_and_labels_in_their_order(folder):
    prepared = made(folder)
    assert prepared.train.column_names == ["input_ids", "labels"]
    assert (
        texts(prepared.train)[1]
        == "<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\nIt is very 1.<|im_end|>\n"
    )
    assert prepared.lengths.tolist() == [len(row["input_ids"]) for row in prepared.train]
    assert prepared.end_of_turn == "<|im_end|>"
    assert prepared.examples["train"]["place"][:2] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_a_share_of_the_rows_is_set_aside_by_the_seed(folder):
    prepared = made(folder, validation=0.1)
    assert (len(prepared.train), len(prepared.validation)) == (90, 10)
    apart = set(questions(prepared.examples["validation"]))
    assert not apart & set(questions(prepared.examples["train"]))
    again = prepare(Data(train="rows.jsonl", validation=0.1), CHATML, folder, seed=7, cache=folder / "cache")
    assert set(questions(again.examples["validation"])) != apart


def test_copies_of_a_row_are_never_on_both_sides_of_the_split(folder):
    write_rows(folder / "rows.jsonl", 50, repeats=4)
    prepared = made(folder, validation=0.1)
    assert len(prepared.validation) == 20
    assert not set(questions(prepared.examples["validation"])) & set(questions(prepared.examples["train"]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("alike", "others"), [(1, 0), (60, 0), (90, 10), (70, 130), (3, 97)])
def test_a_prompt_that_many_rows_have_does_not_take_them_from_the_run(seed: int, alike: int, others: int) -> None:
    total = alike + others
    prompts = np.array([5] * alike + list(range(100, 100 + others)), dtype=np.uint64)
    train = Dataset.from_dict(dict.fromkeys(GROUPS, prompts))
    chosen = rows_set_aside(train, 0.05, seed)
    assert len(chosen) < total, "something is left to train on"
    assert len(chosen) <= max(2 * 0.05 * total, 0.2 * total)
    if others >= 10:
        assert len(chosen) >= 0.05 * total, "other prompts take the place of one that is too large"
    # A prompt stands on one side alone.
    assert not set(prompts[chosen]) & set(np.delete(prompts, chosen))


def test_eval_reads_the_test_rows_and_else_the_validation_rows(folder):
    write_rows(folder / "test.jsonl", 5, start=500)
    assert made(folder, test="test.jsonl", validation=0.1).held_out == "test"
    assert made(folder, validation=0.1).held_out == "validation"
    assert made(folder).held_out is None


def test_sources_are_taken_by_their_weights(folder):
    write_rows(folder / "half.jsonl", 40, start=1000)
    sources = (FileSource(path="rows.jsonl", weight=2.0), FileSource(path="half.jsonl", weight=0.5))
    prepared = made(folder, train=sources)
    seen = texts(prepared.train)
    assert len(seen) == 220
    assert all(seen.count(text) == 2 for text in seen[:200])
    assert len(set(seen[200:])) == 20
    assert [source.name for source in prepared.sources] == ["rows.jsonl", "half.jsonl"]


def test_each_source_may_have_a_shape_and_columns_of_its_own(folder):
    (folder / "other.csv").write_text("query,reply\nHi,Hello\n")
    (folder / "story.txt").write_text("Once upon a time")
    other = FileSource(path="other.csv", columns={"question": "query", "answer": "reply"})
    prepared = made(folder, train=("rows.jsonl", other, "story.txt"))
    assert [source.row_format for source in prepared.sources] == ["question-answer", "question-answer", "text"]
    assert texts(prepared.train)[100:] == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
        "Once upon a time<|im_end|>",
    ]


def test_a_bad_row_of_renamed_columns_is_named_as_the_file_names_it(folder):
    (folder / "own.csv").write_text("query,reply\nHi,Hello\nHi,\n,Hello\n")
    with pytest.raises(DataError) as caught:
        made(folder, train="own.csv", columns={"question": "query", "answer": "reply"})
    first, second = (problem.message for problem in caught.value.problems[:2])
    assert first.endswith("(answer is 'reply' there)")
    assert second.endswith("(question is 'query' there)")


def test_a_named_shape_is_not_guessed(folder):
    (folder / "rows.jsonl").write_text('{"text": "no", "prompt": "Hi", "completion": "Hello"}\n')
    assert made(folder).sources[0].row_format == "prompt-completion"
    assert texts(made(folder, format="text").train) == ["no<|im_end|>"]


def test_a_hub_dataset_is_read_with_its_config_split_and_revision(folder, monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "Hi", "answer": "Hello"}, {"question": "Hi", "answer": None}])

    monkeypatch.setattr("qtune.data.sources.load_dataset", load)
    source = HubSource(hub="someone/rows", config="small", split="test[:2]", revision="v1")
    with pytest.raises(DataError) as caught:
        made(folder, train=(source,))
    assert asked == [(("someone/rows", "small"), {"split": "test[:2]", "revision": "v1"})]
    assert str(caught.value).startswith("hub:someone/rows[test[:2]]:2: answer is null; expected a text")


def test_a_hub_dataset_that_cannot_be_had_is_an_error_in_one_line(folder):
    with pytest.raises(DataError, match=r"^hub:someone/no-such-rows\[train\]: is not on this computer.+OFFLINE.+$"):
        made(folder, train="hub:someone/no-such-rows")


def test_a_long_text_is_cut_into_pieces_and_nothing_is_lost(folder):
    story = " ".join(f"word{number}" for number in range(300))
    (folder / "story.txt").write_text(story)
    prepared = made(folder, train="story.txt", max_length=64)
    pieces = [row["input_ids"] for row in prepared.train]
    assert {len(piece) for piece in pieces[:-1]} == {64}
    assert CHATML.decode([token for piece in pieces for token in piece]) == story + "<|im_end|>"
    assert [row["labels"] for row in prepared.train] == pieces
    assert prepared.examples["train"][1]["place"] == "story.txt:1 (part 2)"


@pytest.mark.parametrize(
    ("policy", "lengths", "notes"),
    [
        ("error", (51, 43), ("too-long", "")),
        ("drop", (43,), ("",)),
        ("cut-right", (48, 43), ("cut-answer", "")),
        ("cut-left", (48, 43), ("cut-prompt", "")),
    ],
)
def test_long_rows_are_refused_dropped_or_cut(folder, policy, lengths, notes):
    rows = [{"question": "Why? " * 8, "answer": "Yes, yes."}, {"question": "Why? " * 6, "answer": "Yes, yes."}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = made(folder, max_length=48, on_long_row=policy)
    assert tuple(prepared.examples["train"]["length"]) == lengths
    assert tuple(prepared.examples["train"]["notes"]) == notes
    assert prepared.sources[0].stored.dropped == (("rows.jsonl:1",) if policy == "drop" else ())


def test_cutting_from_the_left_keeps_bos_and_the_end_of_the_answer(folder):
    llama = tokenizer_of(FAMILIES["llama3"])
    (folder / "rows.jsonl").write_text(json.dumps({"question": "Why? " * 40, "answer": "Yes, yes."}) + "\n")
    (row,) = made(folder, llama, max_length=40, on_long_row="cut-left").train
    assert row["input_ids"][0] == llama.bos_token_id
    assert llama.decode(row["input_ids"][-2:]).endswith("<|eot_id|>")
    assert llama.decode([label for label in row["labels"] if label != IGNORED]) == "Yes, yes.<|eot_id|>"


def test_packed_rows_hold_all_documents_and_are_made_once(folder):
    prepared = made(folder, packing=True, max_length=256)
    plain = made(folder, max_length=256)
    assert sum(len(row["seq_lengths"]) for row in prepared.train) == 100
    assert prepared.lengths.max() <= 256
    assert prepared.lengths.sum() == plain.lengths.sum()
    files = sorted((folder / "cache").rglob("*.arrow"))
    assert list(made(folder, packing=True, max_length=256).train) == list(prepared.train)
    assert sorted((folder / "cache").rglob("*.arrow")) == files


# --- the cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded_sources(monkeypatch):
    """The names of the sources that are really tokenized, in order."""
    names = []
    real = encoding.encode_source

    def noted(source, *rest):
        names.append(source.name)
        return real(source, *rest)

    monkeypatch.setattr("qtune.data.prepare.encode_source", noted)
    return names


def test_a_second_time_nothing_is_tokenized_again(folder, encoded_sources):
    first = made(folder)
    second = made(folder)
    assert encoded_sources == ["rows.jsonl"]
    assert list(first.train) == list(second.train)


def test_a_new_source_leaves_the_others_as_they_are(folder, encoded_sources):
    made(folder)
    write_rows(folder / "more.jsonl", 5, start=900)
    assert len(made(folder, train=("rows.jsonl", "more.jsonl")).train) == 105
    assert encoded_sources == ["rows.jsonl", "more.jsonl"]


@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": 100},
        {"system_prompt": "Be brief."},
        {"system": "merge"},
        {"loss_on": "last-answer"},
        {"chat_template": "plain"},
        {"on_long_row": "drop"},
        {"on_rewritten_turn": "last"},
        {"format": "alpaca", "columns": {"instruction": "question", "output": "answer"}},
        {"format": "prompt-completion", "columns": {"prompt": "question", "completion": "answer"}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_whatever_changes_the_ids_makes_them_anew(folder, encoded_sources, changed):
    made(folder)
    survey(Data(train="rows.jsonl", validation=0.0, **changed), CHATML, folder, cache=folder / "cache")
    assert encoded_sources == ["rows.jsonl", "rows.jsonl"]


def test_what_only_chooses_rows_does_not(folder, encoded_sources):
    made(folder)
    made(folder, validation=0.2, on_bad_row="skip", packing=True, allow=("too-long",))
    assert encoded_sources == ["rows.jsonl"]


def test_changed_rows_are_made_anew_even_in_a_file_of_the_same_size_and_age(folder, encoded_sources):
    made(folder)
    path = folder / "rows.jsonl"
    before = path.stat()
    path.write_text(path.read_text().replace("What is 7?", "What is 8?"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    made(folder)
    assert encoded_sources == ["rows.jsonl", "rows.jsonl"]


def test_another_tokenizer_or_template_makes_them_anew(folder, encoded_sources):
    made(folder)
    made(folder, tokenizer_of(FAMILIES["qwen2_5"]))
    (folder / "own.jinja").write_text("{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}")
    made(folder, chat_template="own.jinja")
    (folder / "own.jinja").write_text("{% for m in messages %}{{ m.content ~ eos_token ~ '!' }}{% endfor %}")
    made(folder, chat_template="own.jinja")
    assert len(encoded_sources) == 4


def test_work_that_was_interrupted_leaves_nothing_that_could_be_taken_for_whole(folder, monkeypatch):
    real = encoding.RowEncoder.__call__
    calls = []

    def stop_at_second(self, rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(encoding, "BATCH_ROWS", 30)
    monkeypatch.setattr(encoding.RowEncoder, "__call__", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        made(folder)
    assert list((folder / "cache").iterdir()) == []
    assert len(made(folder).train) == 100


def test_what_nobody_used_for_a_month_is_removed(folder, encoded_sources):
    before = list(made(folder, packing=True).train)
    old = 1_000_000_000
    for path in (folder / "cache").rglob("*"):
        os.utime(path, (old, old))
    (folder / "cache" / ".unfinished-1").mkdir()
    write_rows(folder / "more.jsonl", 5)
    made(folder, train="more.jsonl")
    names = [path.name for path in (folder / "cache").iterdir()]
    assert len(names) == 2
    assert ".unfinished-1" in names
    assert list(made(folder, packing=True).train) == before
    assert encoded_sources == ["rows.jsonl", "more.jsonl", "rows.jsonl"]


@pytest.mark.slow
def test_workers_make_the_same_examples_as_one_process(folder, monkeypatch):
    alone = list(made(folder).examples["train"])
    monkeypatch.setattr(encoding, "ROWS_WORTH_WORKERS", 100)
    monkeypatch.setattr(encoding, "BATCH_ROWS", 30)
    monkeypatch.setattr(encoding.os, "sched_getaffinity", lambda _: {0, 1})
    prepared = prepare(Data(train="rows.jsonl", validation=0.0), CHATML, folder, cache=folder / "other")
    assert list(prepared.examples["train"]) == alone


def test_of_long_rows_fewer_are_in_memory_at_once(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(encoding, "CHARACTERS_WORTH_WORKERS", 5000)
    read = []
    rows = (read.append(number) or Row(f"{number}", {"messages": [{"content": "x" * 300}]}) for number in range(1000))
    batches = encoding._batched(rows)
    first, is_large = encoding._read_ahead(batches)
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 4]
    assert is_large
    assert len(read) == 20
    assert sum(map(len, encoding._chain(first, batches))) == 1000
    assert first == []


def test_a_template_that_does_not_exist_is_named(folder):
    with pytest.raises(DataError) as caught:
        made(folder, chat_template="chatlm")
    assert str(caught.value) == (
        "data.chat_template: 'chatlm': no readable template file, nor a built-in template (alpaca, chatml, plain)"
    )


def test_a_base_model_without_a_template_gets_the_stated_one(folder):
    tokenizer = tokenizer_of(FAMILIES["llama3"])
    own, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        prepared = made(folder, tokenizer)
    finally:
        tokenizer.chat_template = own
    assert prepared.template.origin == 'the built-in "alpaca": the tokenizer has none'
    assert texts(prepared.train, tokenizer)[0].endswith(
        "### Instruction:\nWhat is 0?\n\n### Response:\nIt is 0.<|eot_id|>\n\n"
    )


def test_no_row_at_all_is_an_error(folder):
    (folder / "rows.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"^data\.train: no row is left to train on; rows\.jsonl holds no row: "):
        made(folder, packing=True)


def test_shares_and_weights_are_whole_numbers_of_rows(folder):
    prepared = made(folder, train=(FileSource(path="rows.jsonl", weight=1.25),), validation=0.2)
    assert len(prepared.train) == 100
    assert len(set(texts(prepared.train))) == 80


REQUESTS = "".join(f'{{"request": "What is {n}?", "reply": "It is {n}."}}\n' for n in range(9))
COLUMNS = {"question": "request", "answer": "reply"}


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_without_the_columns_of_the_others_is_named_with_the_way_out(tmp_path, split, streaming):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(REQUESTS)
    write_rows(tmp_path / "other.jsonl", 5)
    keys = {"train": ("a.jsonl", "b.jsonl"), "columns": COLUMNS, "streaming": streaming}
    with pytest.raises(DataError) as caught:
        made(tmp_path, **keys, **{split: "other.jsonl"})
    assert str(caught.value).splitlines() == [
        "data.columns.question: no row of other.jsonl has a column 'request', as those of a.jsonl have; found answer, "
        "question",
        "data.columns.answer: no row of other.jsonl has a column 'reply', as those of a.jsonl have; found answer, "
        "question",
        f"data.{split}: names of one source alone are given with it: "
        f'{split} = [{{ path = "other.jsonl", columns = {{ question = "question", answer = "answer" }} }}]',
    ]
    own = FileSource(path="other.jsonl", columns={"question": "question", "answer": "answer"})
    assert len(made(tmp_path, **keys, **{split: (own,)}).examples[split]) == 5


def test_columns_that_a_source_has_under_no_name_are_given_to_the_one_that_has_them(tmp_path):
    rows = [json.dumps({"question": f"What is {n}?", "answer": f"{n}", "persona": "Be kind."}) for n in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    write_rows(tmp_path / "b.jsonl", 5, start=20)
    with pytest.raises(DataError) as caught:
        made(tmp_path, train=("a.jsonl", "b.jsonl"), columns={"system": "persona"})
    assert str(caught.value).splitlines() == [
        "data.columns.system: no row of b.jsonl has a column 'persona', as those of a.jsonl have; found answer, "
        "question",
        "data.train: what only some sources have is named with them, and not in data.columns: "
        'train = [{ path = "a.jsonl", columns = { system = "persona" } }, …]',
    ]
    own = FileSource(path="a.jsonl", columns={"system": "persona"})
    assert len(made(tmp_path, train=(own, "b.jsonl")).train) == 14


def test_a_column_that_no_source_has_is_answered_with_the_nearest(tmp_path):
    write_rows(tmp_path / "a.jsonl", 5)
    write_rows(tmp_path / "b.jsonl", 5)
    with pytest.raises(DataError) as caught:
        made(tmp_path, train="a.jsonl", test="b.jsonl", columns={"answer": "anwser"})
    assert str(caught.value) == "data.columns.answer: no row of a.jsonl has a column 'anwser'; did you mean 'answer'?"
