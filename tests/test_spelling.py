"""A mistyped word is answered with the known ones that are near, and with nothing that is not."""

from pathlib import Path

import pytest

from qtune.spelling import did_you_mean, meant_file

KEYS = ["rank", "alpha", "target_modules"]


def test_two_swapped_letters_are_seen_through() -> None:
    assert did_you_mean("rnak", KEYS) == "did you mean 'rank'?"


def test_several_are_offered_the_nearest_first_where_that_is_asked() -> None:
    cards = ["RTX 3060", "RTX 3090", "H100"]
    assert did_you_mean("RTX 3096", cards, most=2) == "did you mean 'RTX 3090' or 'RTX 3060'?"


def test_the_beginning_of_a_long_word_is_enough_and_a_few_letters_are_not() -> None:
    assert did_you_mean("smollm", ["smollm2-135m-instruct"]) == "did you mean 'smollm2-135m-instruct'?"
    assert did_you_mean("learning", ["learning_rate", "lean_step"]) == "did you mean 'learning_rate'?"
    assert did_you_mean("smo", ["smollm2-135m-instruct"], "none") == "none"


def test_a_word_that_is_like_none_gets_the_other_answer() -> None:
    assert did_you_mean("zzz", KEYS, "known: all of them") == "known: all of them"
    assert did_you_mean("zzz", KEYS) == ""


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("mail.jsonl", "mails.jsonl"),
        ("mails", "mails.jsonl"),
        ("mials.csv", "mails.jsonl"),
        ("tain.jsonl", "train.jsonl"),
        ("rows.jsonl", None),
        ("test.jsonl", None),
        ("nowhere/mail.jsonl", None),
        ("x" * 300, None),
    ],
)
def test_a_mistyped_file_is_answered_with_the_one_beside_it(tmp_path: Path, written: str, meant: str | None) -> None:
    (tmp_path / "data").mkdir()
    for name in ("mails.jsonl", "train.jsonl", ".hidden"):
        (tmp_path / "data" / name).touch()
    assert meant_file(f"data/{written}", tmp_path) == (f"; did you mean 'data/{meant}'?" if meant else "")


def test_a_recipe_is_not_offered_where_no_recipe_can_be_meant(tmp_path: Path) -> None:
    """Neither as a model nor as rows."""
    for name in ("nobase.toml", "gold.toml"):
        (tmp_path / name).touch()
    assert "nobase.toml" in meant_file("nobase", tmp_path), "as what is run it is"
    assert meant_file("nobase", tmp_path, but=".toml") == ""
    (tmp_path / "gold.jsonl").touch()
    assert "gold.jsonl" in meant_file("gold", tmp_path, but=".toml")


@pytest.mark.parametrize(
    ("ending", "meant"),
    [
        (".jsonl", ".jsonl"), (".csv", ".csv"), (".parquet", ".parquet"),
        (".jsnl", ".jsonl"), (".json", ".jsonl"), (".paquet", ".parquet"),
    ],
)  # fmt: skip
def test_of_files_that_differ_by_their_ending_the_one_with_the_nearest_is_meant(
    tmp_path: Path, ending: str, meant: str
) -> None:
    for name in ("hives.csv", "hives.jsonl", "hives.parquet"):
        (tmp_path / name).touch()
    assert meant_file(f"hive{ending}", tmp_path) == f"; did you mean 'hives{meant}'?"
