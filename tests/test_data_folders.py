"""Folders and files as they lie on people's disks: splits, notes, pointers, tables with other delimiters."""

import json
import tomllib
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from qtune.data.files import data_files
from qtune.data.rows import BadRow, read_rows
from qtune.errors import DataError, ModelError
from qtune.lfs import ADVICE
from qtune.model.folder import require_weights
from qtune.model.load import load_config, load_tokenizer
from qtune.recipe.schema import Model


def write(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": name}) + "\n")


def read(folder: Path, split: str = "train") -> list[str]:
    return [row.value["text"] for file in data_files(str(folder), folder, split) for row in read_rows(file)]


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl"),
        ("data_train.jsonl", "data_dev.jsonl", "README.md"),
        ("train/a.jsonl", "test/a.jsonl", "notes.txt"),
        ("training/part.jsonl", "eval/part.jsonl"),
        ("train_data.jsonl", "test_data.jsonl"),
        ("train2.jsonl", "test2.jsonl"),
        ("train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00002.jsonl", "test_sft-00001-of-00002.jsonl"),
        ("train-00000-of-00001-a09b74b3ef9c3b56.jsonl", "test-00000-of-00001-9f18d4b22cd9ea01.jsonl"),
        ("gym-train.jsonl", "gym-test-v2.jsonl", "dataset.json", "labels.json", "notes.txt", "vocabulary.txt"),
        ("data/train.jsonl", "data/test.jsonl"),
    ],
)
def test_a_folder_of_splits_gives_the_one_that_is_meant(tmp_path, names):
    write(tmp_path, *names)
    assert read(tmp_path) == [names[0]]


def test_a_word_that_begins_another_thing_is_no_split(tmp_path):
    names = ("development-tools.jsonl", "testing-software.jsonl", "training-gym.jsonl")
    write(tmp_path, *names)
    assert read(tmp_path) == list(names)


@pytest.mark.parametrize(
    ("names", "has", "said", "ways"),
    [
        (
            ("more.jsonl", "test.jsonl", "train.jsonl"),
            "a test and a train",
            "more.jsonl",
            ["train.jsonl", "more.jsonl"],
        ),
        (
            ("more/a.jsonl", "test/a.jsonl", "train/a.jsonl"),
            "a test and a train",
            "more/a.jsonl",
            ["train", "more/a.jsonl"],
        ),
        (
            ("test.jsonl", "test-cases.jsonl", "train.jsonl"),
            "a test and a train",
            "test-cases.jsonl",
            ["train.jsonl", "test-cases.jsonl"],
        ),
        (("test-cases.jsonl", "train.jsonl"), "a train", "test-cases.jsonl", ["train.jsonl", "test-cases.jsonl"]),
        (
            ("train.jsonl", "valid.jsonl", *(f"{n}.jsonl" for n in range(5))),
            "a train and a validation",
            "0.jsonl, 1.jsonl, 2.jsonl and 2 more",
            ["train.jsonl", "0.jsonl"],
        ),
    ],
)
def test_files_beside_splits_are_not_left_out_in_silence(tmp_path, names, has, said, ways):
    write(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    listed = json.dumps([str(tmp_path / way) for way in ways])
    assert str(caught.value) == (
        f"{tmp_path}: has {has} split, and the name of {said} says none of them; name what is meant, as {listed}"
    )
    found = [row.value["text"] for way in ways for file in data_files(way, tmp_path) for row in read_rows(file)]
    assert len(found) == 2


@pytest.mark.parametrize("name", ["dataset.json", "metadata.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "is_read"),
    [
        ('[{"text": "one"}, {"text": "two"}]', True),
        ('{"text": "one"}\n{"text": "two"}\n', True),
        ('{"name": "mine", "rows": [{"text": "one"}]}', False),
        ('["train", "test"]', False),
        ("{broken", False),
    ],
)
def test_what_is_called_as_notes_are_is_read_where_it_holds_rows(tmp_path, name, content, is_read):
    (tmp_path / name).write_text(content)
    (tmp_path / "extra.json").write_text('[{"text": "more"}]')
    assert sorted(read(tmp_path)) == (["more", "one", "two"] if is_read else ["more"])


def test_other_splits_are_found_by_their_names_or_asked_for(tmp_path):
    write(tmp_path, "train.jsonl", "dev.jsonl")
    assert read(tmp_path, "validation") == ["dev.jsonl"]
    with pytest.raises(DataError, match="has a validation and a train split and no test split; name what is meant"):
        read(tmp_path, "test")


def test_a_saved_data_set_is_what_its_state_lists(tmp_path):
    DatasetDict({name: Dataset.from_dict({"text": [name]}) for name in ("train", "validation")}).save_to_disk(tmp_path)
    assert read(tmp_path) == ["train"]
    assert read(tmp_path, "validation") == ["validation"]
    (tmp_path / "train" / "cache-1f2e.arrow").write_bytes(next((tmp_path / "train").glob("data-*")).read_bytes())
    assert read(tmp_path / "train") == ["train"]


DAMAGED = "is damaged: it does not list what lies beside it"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", DAMAGED),
        ('{"splits": ["train"', DAMAGED),
        ("[]", DAMAGED),
        ('{"splits": 3}', DAMAGED),
        ("[" * 100_000, DAMAGED),
        ('{"splits": ["gone"]}', "names 'gone', which is not there"),
        ('{"splits": ["."]}', "names '.', which is not there"),
        ('{"splits": ["train/.."]}', "names 'train/..', which is not there"),
        ('{"splits": [null]}', "names 'None', which is not there"),
    ],
)
def test_a_damaged_list_of_splits_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    write(tmp_path, "train/a.jsonl")
    file = tmp_path / "dataset_dict.json"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        data_files(str(tmp_path), tmp_path)
    assert str(caught.value) == f"{file}: {said}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"_data_files": [{"file": "a.arrow"}]}', DAMAGED),
        ('{"_data_files": "a.arrow"}', DAMAGED),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', "names '../a.arrow', which is not there"),
        ('{"_data_files": [{"filename": "a.arrow"}]}', "names 'a.arrow', which is not there"),
    ],
)
def test_a_damaged_list_of_a_data_sets_files_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        data_files(str(tmp_path), tmp_path)
    assert str(caught.value) == f"{file}: {said}"


def test_files_of_several_kinds_in_one_folder_are_asked_about(tmp_path):
    write(tmp_path, "rows.jsonl", "LICENSE.txt", "dataset_info.json")
    assert read(tmp_path) == ["rows.jsonl"]
    write(tmp_path, "story.txt")
    with pytest.raises(DataError, match=r"holds files of several kinds \(\.jsonl, \.txt\); name those that are meant"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "said", "one_kind", "all_kinds"),
    [
        (["a.csv", "b.jsonl"], "as {}/*.csv, or all of them, as {}/*", "*.csv", ["*"]),
        (["x/a.jsonl", "b.csv.gz"], "as {}/**/*.csv.gz, or all of them, as {}/**/*", "**/*.csv.gz", ["**/*"]),
        (
            ["a.csv", "b.jsonl", "README.txt", "picture.png"],
            'as {}/*.csv, or all of them, as ["{}/*.csv", "{}/*.jsonl"]',
            "*.csv",
            ["*.csv", "*.jsonl"],
        ),
    ],
)
def test_the_patterns_that_are_named_for_files_of_several_kinds_match_them(tmp_path, names, said, one_kind, all_kinds):
    write(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        data_files(str(tmp_path), tmp_path)
    assert str(caught.value).endswith(f"name those that are meant, {said.replace('{}', str(tmp_path))}")
    rows = sorted(name for name in names if name not in ("README.txt", "picture.png"))
    matched = [file.name for one in all_kinds for file in data_files(str(tmp_path / one), tmp_path)]
    assert sorted(matched) == rows
    assert [file.name for file in data_files(str(tmp_path / one_kind), tmp_path)] == [rows[0]]


def test_the_patterns_that_are_named_are_toml_whatever_the_folder_is_called(tmp_path):
    folder = tmp_path / "\U0001f600 \x7f"
    folder.mkdir()
    write(folder, "a.csv", "b.jsonl", "README.txt")
    with pytest.raises(DataError) as caught:
        data_files(str(folder), tmp_path)
    listed = str(caught.value).partition("or all of them, as ")[2]
    assert tomllib.loads(f"train = {listed}")["train"] == [f"{folder}/*.csv", f"{folder}/*.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ADVICE),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page, not rows"),
        (b"\x1f\x8b\x08\x00\x00", "is compressed; name it .jsonl.gz"),
        (b"PK\x03\x04\x14\x00", "is a zip archive"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message.split("`")[0].split("(")[0]):
        data_files("rows.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("rows.csv", "question;answer\na, b;c\n", [":2"]),
        ("rows.csv", "question|answer\na;b|c\n", [":2"]),
        ("rows.csv", "question\tanswer\na, b\tc\n", [":2"]),
        ("rows.tsv", "question,answer\nx,c\n", [":2"]),
        ("rows.csv", "sep=;\nquestion;answer\nx;c\n", [":3"]),
        ("rows.csv", '"question;1",answer\nx,c\n', [":2"]),
        ("rows.csv", "question (en, fr);answer\nx;c\n", [":2"]),
        ("rows.csv", "question (en, fr)\tanswer\nx\tc\n", [":2"]),
        ("rows.csv", "question (a|b|c);answer\nx;c\n", [":2"]),
        ("rows.csv", 'question (en, fr);answer\n"x, y";"c"\n', [":2"]),
        ("rows.tsv", "question\t(fr);answer\nx;c\n", [":2"]),
        ("rows.csv", "question;1,answer\nx,c\n", [":2"]),
        ("rows.csv", "question,answer\na;b;d,c\n", [":2"]),
        ("rows.csv", 'question,answer\n"a;\nb",c\n', [":2"]),
        ("rows.csv", "sep=,\nquestion;1,answer\nx;y,c\n", [":3"]),
    ],
)
def test_the_delimiter_of_a_table_is_read_off_its_header(tmp_path, name, text, places):
    (tmp_path / name).write_text(text)
    (row,) = [row for file in data_files(name, tmp_path) for row in read_rows(file)]
    assert not isinstance(row, BadRow), row
    assert row.value["answer"] == "c"
    assert [row.place.removeprefix(name)] == places


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_key_that_stands_twice_in_an_object_is_not_forgotten(tmp_path, name):
    (tmp_path / name).write_text('{"text": "a", "text": "b"}\n')
    (bad,) = [row for file in data_files(name, tmp_path) for row in read_rows(file)]
    assert isinstance(bad, BadRow)
    assert 'the key "text" stands twice in one object' in bad.message


def test_an_adapter_and_a_run_are_no_base_models(tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError, match=r"is a lora adapter of meta-llama/Llama-3\.2-1B, not a model"):
            load(Model(base=str(tmp_path)))
    (tmp_path / "resolved.toml").write_text("")
    with pytest.raises(ModelError, match="is a run of qtune, not a model"):
        load_config(Model(base=str(tmp_path)))


def test_weights_that_are_missing_or_pickled_are_said(tmp_path):
    with pytest.raises(ModelError, match="it has no weights; only safetensors are read"):
        require_weights(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"its weights are pickled \(pytorch_model\.bin\)"):
        require_weights(str(tmp_path))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(
        ModelError, match=r"1 of 2 files of weights are missing, the first of them model-2\.safetensors"
    ):
        require_weights(str(tmp_path))
