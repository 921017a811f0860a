"""Scores of free text: those of the papers, on the papers' own examples and beside a plain table."""

import random

import pytest

from qtune.tuned.text_scores import common_subsequence, is_free_text, repetition, rouge_l, token_f1, words_of


@pytest.mark.parametrize(
    ("answer", "score"),
    [("police kill the gunman", 3 / 4), ("the gunman kill police", 2 / 4), ("the gunman police killed", 2 / 4)],
)
def test_rouge_l_is_that_of_its_papers_example(answer: str, score: float) -> None:
    """Lin 2004, section 3.1: the reference is "police killed the gunman"."""
    assert rouge_l(answer, "police killed the gunman") == pytest.approx(score)


def test_the_longest_common_subsequence_is_that_of_the_table_by_which_it_is_defined() -> None:
    draw = random.Random(0)
    for _ in range(100):
        one, other = ([draw.choice("abcd") for _ in range(draw.randint(0, 90))] for _ in range(2))
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, first in enumerate(one):
            for j, second in enumerate(other):
                table[i + 1][j + 1] = table[i][j] + 1 if first == second else max(table[i][j + 1], table[i + 1][j])
        assert common_subsequence(one, other) == table[-1][-1]


def test_token_f1_counts_words_as_often_as_they_stand_in_both() -> None:
    """By hand: "the cat" of three given and four wanted words, P = 2/3 and R = 2/4."""
    assert token_f1("The cat, the!", "the CAT sat down.") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert (token_f1("", ""), token_f1("a", ""), token_f1("b", "c")) == (1.0, 0.0, 0.0)


def test_a_script_without_spaces_has_a_word_for_each_character() -> None:
    assert words_of("東京 is Tokyo。") == ["東", "京", "is", "tokyo"]
    assert rouge_l("東京です", "京都です") == pytest.approx(3 / 4)


def test_repetition_is_the_share_of_runs_of_four_words_that_came_before() -> None:
    """ "a b c d" three times: nine runs of four words, four of them different."""
    assert repetition("a b c d " * 3) == pytest.approx(1 - 4 / 9)
    assert repetition("all words of this text differ") == 0.0
    assert repetition("too few words") == 0.0


@pytest.mark.parametrize(
    ("expected", "is_free"),
    [
        (["positive", "negative"] * 5, False),
        (["Charles the Bald", "1492"], False),
        (['{"command": "set_timer", "amount": 41, "unit": "minutes", "loud": true}'] * 3, False),
        (["Thank you for writing to us. Your order has left the warehouse this morning."] * 3, True),
        (["{curly} braces alone do not make a text into JSON, whatever it begins with"] * 3, True),
        ([], False),
    ],
    ids=["labels", "short answers", "JSON", "letters", "braces", "nothing"],
)
def test_the_rows_choose_whether_answers_are_asked_for_to_the_letter(expected: list[str], is_free: bool) -> None:
    assert is_free_text(expected) == is_free
