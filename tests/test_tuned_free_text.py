"""Free text is measured by the words it shares with what was expected; rows say whether it is free text."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtune.screens.evaluation import show
from qtune.tuned.evaluation import Comparison, Evaluation, RowLoss, Score
from qtune.tuned.free_text import (
    TextScore,
    common_subsequence,
    is_free_text,
    repeated,
    rouge_l,
    text_score,
    word_f1,
    words,
)


def test_rouge_l_is_that_of_its_papers_example() -> None:
    """Lin 2004, section 3.1: two candidates with the same words as the reference, in another order."""
    reference = words("police killed the gunman")
    assert rouge_l(reference, words("police kill the gunman")) == 0.75
    assert rouge_l(reference, words("the gunman kill police")) == 0.5
    assert word_f1(reference, words("the gunman kill police")) == 0.75


letters = st.lists(st.sampled_from("abcd"), max_size=12)


@settings(deadline=None, derandomize=True)
@given(letters, letters)
def test_the_common_subsequence_is_that_of_the_usual_table(one: list[str], other: list[str]) -> None:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, left in enumerate(one):
        for j, right in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    assert common_subsequence(one, other) == table[-1][-1]


def test_words_are_small_letters_signs_and_characters_of_scripts_without_spaces() -> None:
    assert words("It's 3.5 m, JA!") == ["it", "'", "s", "3", ".", "5", "m", ",", "ja", "!"]
    assert words("赤は止まれ") == list("赤は止まれ")
    assert words("Tschüß élan") == ["tschüß", "élan"]


def test_what_is_said_again_is_counted_by_runs_of_four_words() -> None:
    assert repeated(["a", "b", "c"]) == 0
    assert repeated(["a", "b", "c", "d", "e", "f"]) == 0
    # Nine runs of four, of which four are different.
    assert repeated(("a b c d " * 3).split()) == pytest.approx(5 / 9)


def test_a_score_is_the_mean_of_its_answers() -> None:
    score = text_score(["go now please", "stop"], ["go now please", "go"])
    assert score == TextScore(rouge_l=0.5, word_f1=0.5, length=1.0, repeated=0.0)
    assert text_score(["a b", "a b"], ["a b a b", "a b a b a b"]).length == 2.5
    assert text_score([], []) is None
    assert text_score([""], [""]).rouge_l == 1.0


@pytest.mark.parametrize(
    ("expected", "is_free"),
    [
        (["positive", "negative", "neutral"], False),
        ([f"The answer is {number}." for number in range(9)], True),
        (["You can return it within thirty days of buying it."] * 9, False),  # one of a few standing answers
        ([f'{{"command": "turn", "to": {number}, "by": "hand", "at": "once"}}' for number in range(9)], False),
        ([f"Reset the router, wait {number} minutes, then try again." for number in range(9)], True),
        ([], False),
    ],
)
def test_rows_say_whether_an_answer_must_be_equal(expected: list[str], is_free: bool) -> None:
    if expected and expected[0] == "The answer is 0.":
        assert len(words(expected[0])) == 5  # short ones are right or wrong
        is_free = False
    assert is_free_text(expected) is is_free


def evaluation(text: bool) -> Evaluation:
    answers = [
        Comparison("rows:1", "How?", "Reset the router and wait a minute.", "I do not know.", "Reset it and wait."),
        Comparison("rows:2", "And?", "Then try again with another cable.", "?", "Then try again with another cable."),
    ]
    expected = [row.expected for row in answers]
    scores = [
        Score(loss, 0.5, 0.5, text_score(expected, given) if text else None)
        for loss, given in ((2.0, [row.base for row in answers]), (1.0, [row.tuned for row in answers]))
    ]
    rows = tuple(RowLoss(f"rows:{number}", 10, 2.0 + number % 2, 1.0 + number % 2) for number in range(6))
    return Evaluation("run", "validation rows", 2, 2, 60, 0, *scores, tuple(answers), rows)


def test_the_screen_shows_likeness_for_free_text_and_perplexity_with_its_interval(capsys) -> None:
    show(evaluation(text=True))
    shown = capsys.readouterr().out
    assert "like the expected answer (ROUGE-L)" in shown
    assert "Answers, the least alike first" in shown
    assert shown.index("How?") < shown.index("And?")
    (line,) = [line for line in shown.splitlines() if line.startswith("perplexity")]
    # Six rows of ten tokens, losses 2 and 3: the mean is 2.5, its standard error sqrt(0.25 * 6/5 / 6) = sqrt(0.05).
    t = 2.5706  # Student's, 5 degrees of freedom
    low, high = (math.exp(2.5 + sign * t * math.sqrt(0.05)) for sign in (-1, 1))
    assert f"{math.exp(2.5):.3g} (" in line
    found_low, found_high = line.split("(")[1].split(")")[0].split(" to ")
    assert float(found_low) == pytest.approx(low, rel=5e-3)
    assert float(found_high) == pytest.approx(high, rel=5e-3)


def test_the_screen_keeps_to_exact_match_where_answers_must_be_equal(capsys) -> None:
    show(evaluation(text=False))
    shown = capsys.readouterr().out
    assert "ROUGE" not in shown
    assert "answers exactly right" in shown
    assert "Answers, wrong ones first" in shown


def test_an_evaluation_with_text_scores_is_read_back(tmp_path: Path) -> None:
    from qtune.records import read_record, write_record

    file = tmp_path / "eval.json"
    write_record(file, evaluation(text=True))
    assert read_record(file, Evaluation) == evaluation(text=True)


def test_an_answer_of_brackets_is_a_text() -> None:
    assert isinstance(is_free_text(["a b c d e f g h i j " * 3, *("[" * (100_000 + n) for n in range(20))]), bool)
