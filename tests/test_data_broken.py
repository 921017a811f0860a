"""Broken data, one file for each way: named by file and line, in words a newcomer understands, never a traceback."""

import tomllib
from pathlib import Path
from typing import get_args

import pytest
from chat_families import FAMILIES, R1, tokenizer_of

from qtune.data.findings import KINDS, gate, stopping
from qtune.data.inspection import inspect
from qtune.data.prepare import named_together, prepare, survey
from qtune.data.rows import BadRow
from qtune.errors import DataError, GateError, Problem
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Data, Waivable

FOLDER = Path(__file__).parent / "broken"
CASES = tomllib.loads((FOLDER / "expected.toml").read_text(encoding="utf-8"))["broken"]
BAD_ROWS = [case for case in CASES if "message" in case]
FINDINGS = [case for case in CASES if "finding" in case]
TOKENIZERS = FAMILIES | {R1.name: R1}


def by_file(case):
    return case["file"]


def data_table(**keys) -> Data:
    return parse_recipe({"model": {"base": "none"}, "data": {"validation": 0, **keys}}).data


def test_every_broken_file_is_expected_to_be_caught():
    assert {case["file"] for case in CASES} == {path.name for path in FOLDER.iterdir()} - {"expected.toml"}
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", BAD_ROWS, ids=by_file)
def test_a_bad_row_is_named_with_what_was_found(case, tmp_path):
    tokenizer = tokenizer_of(TOKENIZERS[case.get("family", "chatml")])
    data = data_table(train=case["file"], **case.get("data", {}))
    with pytest.raises(DataError) as caught:
        prepare(data, tokenizer, FOLDER, cache=tmp_path)
    assert caught.value.problems[0] == Problem(case["place"], case["message"])


@pytest.mark.parametrize("case", FINDINGS, ids=by_file)
def test_a_finding_names_its_row(case, tmp_path):
    tokenizer = tokenizer_of(TOKENIZERS[case.get("family", "chatml")])
    data = data_table(train=case["file"], **case.get("data", {}))
    prepared = survey(data, tokenizer, FOLDER, cache=tmp_path)
    findings = inspect(prepared, data, len(tokenizer)).findings
    (finding,) = [finding for finding in findings if finding.kind == case["finding"]]
    assert finding.places[0] == case["place"]
    if KINDS[finding.kind].level == "error":
        with pytest.raises(GateError, match=finding.kind):
            gate(findings)
        assert finding not in stopping(findings, (finding.kind,))


def test_all_bad_rows_are_listed_with_their_number_and_the_way_on(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n{"text": "fine"}\n{"text": " "}\n')
    with pytest.raises(DataError) as caught:
        prepare(data_table(train="rows.jsonl"), tokenizer_of(FAMILIES["chatml"]), tmp_path, cache=tmp_path / "cache")
    assert str(caught.value) == (
        "rows.jsonl:2: text = 1: not a text\n"
        "rows.jsonl:4: text is empty\n"
        '2 bad rows; fix them, or leave out what is bad with [data] on_bad_row = "skip"'
    )


def test_beyond_a_hundred_bad_rows_the_rest_is_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + '{"text": 1}\n' * 250)
    with pytest.raises(DataError) as caught:
        prepare(data_table(train="rows.jsonl"), tokenizer_of(FAMILIES["chatml"]), tmp_path, cache=tmp_path / "cache")
    assert [str(problem) for problem in caught.value.problems[:2]] == [
        "rows.jsonl:2 to 101: text = 1: not a text",
        "… and 150 more bad rows",
    ]


def test_many_rows_with_one_fault_share_a_line_that_names_them_all_and_others_have_their_own():
    alike = [BadRow(f"a.csv:{line}", "not a text") for line in (2, 3, 4, 9, 7)]
    few = [BadRow(f"b.csv:{line}", "not a text") for line in (2, 3, 4)]
    other = [BadRow("a.csv:5", "is empty"), BadRow("c.parquet", "cannot be read"), BadRow("a.csv:row x", "is empty")]
    assert named_together([*alike[:2], other[0], *alike[2:], *few, *other[1:]]) == [
        ("a.csv:2 to 4, 7, 9", "not a text"),
        ("a.csv:5", "is empty"),
        *((f"b.csv:{line}", "not a text") for line in (2, 3, 4)),
        ("c.parquet", "cannot be read"),
        ("a.csv:row x", "is empty"),
    ]


def test_skipped_rows_are_counted_and_listed(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    data = data_table(train="rows.jsonl", on_bad_row="skip")
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    prepared = prepare(data, tokenizer, tmp_path, cache=tmp_path / "cache")
    assert len(prepared.train) == 1
    (finding,) = [one for one in inspect(prepared, data, len(tokenizer)).findings if one.kind == "skipped"]
    assert finding.sentence == "1 of 2 train rows: the row cannot be used and is left out"
    assert finding.places == ("rows.jsonl:2 (text = 1: not a text)",)


def test_a_file_that_breaks_off_is_not_skipped(tmp_path):
    data = data_table(train=str(FOLDER / "cut_off.jsonl.gz"), on_bad_row="skip")
    with pytest.raises(DataError, match=r"not a whole \.gz file"):
        prepare(data, tokenizer_of(FAMILIES["chatml"]), tmp_path, cache=tmp_path)


def test_the_gate_says_what_to_do_and_how_to_go_on_all_the_same(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    data = data_table(train="too_long.jsonl", max_length=64)
    prepared = survey(data, tokenizer, FOLDER, cache=tmp_path)
    with pytest.raises(GateError) as caught:
        gate(inspect(prepared, data, len(tokenizer)).findings)
    assert str(caught.value) == (
        "the data would train the wrong thing\n"
        "  too-long: 1 of 2 train rows: the row is longer than max_length\n"
        "    at too_long.jsonl:2\n"
        '    raise max_length, or decide with on_long_row = "drop", "cut-left" or "cut-right"; '
        'to go on all the same: [data] allow = ["too-long"]'
    )


def test_exactly_the_errors_can_be_waived():
    assert set(get_args(Waivable)) == {name for name, kind in KINDS.items() if kind.level == "error"}


def test_a_token_outside_the_models_embedding_stops_the_run(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    data = data_table(train="duplicate.jsonl")
    prepared = survey(data, tokenizer, FOLDER, cache=tmp_path)
    with pytest.raises(GateError, match=r"out-of-vocabulary: 3 of 3 train rows: .*\(id \d+, the model has 300\)"):
        gate(inspect(prepared, data, 300).findings)


def test_rows_that_stand_in_training_and_in_validation_are_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    (tmp_path / "test.jsonl").write_text('{"question": "x", "answer": "b"}\n{"question": "c", "answer": "e"}\n')
    data = data_table(train="train.jsonl", validation="test.jsonl")
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    prepared = prepare(data, tokenizer, tmp_path, cache=tmp_path / "cache")
    (finding,) = [one for one in inspect(prepared, data, len(tokenizer)).findings if one.kind == "overlap"]
    assert (finding.split, finding.count, finding.places) == ("validation", 1, ("test.jsonl:2",))
