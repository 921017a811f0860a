"""The table of an evaluation: the measures that its rows have chosen, each with its interval."""

import math
from dataclasses import replace

import pytest

from qtune.report import results
from qtune.screens import evaluation as screen
from qtune.tuned.evaluation import Comparison, Evaluation, RowLoss, Score
from qtune.tuned.forgotten import Forgetting, PieceLoss
from qtune.tuned.free_text import text_score
from qtune.verdicts.learning import learned_against_base
from qtune.verdicts.scores import answer_scores, forgetting_table, score_table, worst_first

EXPECTED = "Thank you for writing. Your order has left the warehouse and arrives on {day}."
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
BASE = "I am a model and cannot know this. I am a model and cannot know this…"


def free_text() -> Evaluation:
    """Six letters that end in a stop: the base repeats itself and does not end, the tuned one errs in the day alone."""
    compared = tuple(
        Comparison("t", "Where is it?", EXPECTED.format(day=day), BASE, EXPECTED.format(day="Sunday")) for day in DAYS
    )
    rows = tuple(RowLoss("t", 10, 2.0 + 0.1 * at, 0.5 + 0.1 * at) for at in range(6))
    expected = [one.expected for one in compared]
    texts = (
        text_score(expected, [one.base for one in compared]),
        text_score(expected, [one.tuned for one in compared]),
    )
    scores = Score(2.25, 0.4, 0.0, texts[0]), Score(0.75, 0.8, 0.0, texts[1])
    return Evaluation("runs/x", "test rows", 6, 6, 60, 0, *scores, compared, rows)


def lines(evaluation: Evaluation) -> dict[str, tuple[str, ...]]:
    return {name: figures for name, *rest in score_table(evaluation) for figures in [tuple(rest)]}


def test_free_text_is_measured_by_order_of_words_length_repetition_and_end_and_not_to_the_letter() -> None:
    """By hand: of 16 words and stops all but the day in order; the base never ends."""
    table = lines(free_text())
    assert list(table) == [
        "loss, nats per token",
        "perplexity, 95 % interval",
        "tokens right",
        "like the expected answer (ROUGE-L)",
        "answers exactly right",
        "words in common (F1)",
        "length, times the expected",
        "words said again",
        "answers cut at their limit",
    ]
    assert table["like the expected answer (ROUGE-L)"][1] == f"{15 / 16:.3f}"
    assert table["like the expected answer (ROUGE-L)"][2].startswith("+0.")
    assert table["length, times the expected"][1] == "1.00"
    assert table["words said again"][1] == "0.0%"
    assert table["answers cut at their limit"] == ("6 of 6", "0 of 6", "")


def test_free_text_that_is_right_to_the_letter_is_counted() -> None:
    evaluation = free_text()
    right = replace(evaluation.comparisons[0], tuned=evaluation.comparisons[0].expected)
    table = lines(replace(evaluation, comparisons=(right, *evaluation.comparisons[1:])))
    assert table["answers exactly right"] == ("0 of 6", "1 of 6", "")


def test_losses_and_perplexities_have_intervals_and_their_changes_too() -> None:
    """Rows that all fall by 1.5 nats: no noise in the difference, a perplexity divided by e to the 1.5."""
    table = lines(free_text())
    assert table["loss, nats per token"] == ("2.25", "0.750", "−1.50 (−1.50 to −1.50)")
    assert table["perplexity, 95 % interval"][2] == "÷ 4.48 (4.48 to 4.48)"
    value, low, high = (
        float(text.strip("()")) for text in table["perplexity, 95 % interval"][0].replace("to ", "").split()
    )
    # Six values 0.1 apart: standard deviation 0.1871, Student's t of 5 degrees of freedom 2.571.
    half = 2.571 * 0.18708 / math.sqrt(6)
    assert (value, low, high) == pytest.approx((math.exp(2.25), math.exp(2.25 - half), math.exp(2.25 + half)), rel=5e-3)


def test_answers_that_can_be_given_to_the_letter_are_asked_for_to_the_letter() -> None:
    answers = [Comparison("t", "Q", "yes", "no", "yes" if at else "no") for at in range(6)]
    table = lines(replace(free_text(), comparisons=tuple(answers), tuned=Score(0.75, 0.8, 5 / 6)))
    assert table["answers exactly right"][:2] == ("0.0%", "83.3%")
    assert table["answers exactly right"][2].startswith("+83.3 (")
    assert len(table) == 4
    one_is_cut = (replace(answers[0], tuned="yes, it is, and…"), *answers[1:])
    table = lines(replace(free_text(), comparisons=one_is_cut, tuned=Score(0.75, 0.8, 5 / 6)))
    assert table["answers cut at their limit"] == ("0 of 6", "1 of 6", "")
    of_itself = tuple(replace(one, is_base_cut=False, is_tuned_cut=False) for one in one_is_cut)
    assert "answers cut at their limit" not in lines(
        replace(free_text(), comparisons=of_itself, tuned=Score(0.75, 0.8, 5 / 6))
    )


def test_a_share_rises_by_no_more_than_all_of_it() -> None:
    """29 of 30: the normal interval would reach 103 %."""
    answers = tuple(Comparison("t", "Q", "yes", "no", "yes" if at else "no") for at in range(30))
    change = lines(replace(free_text(), comparisons=answers, tuned=Score(0.75, 0.8, 29 / 30)))["answers exactly right"][
        2
    ]
    assert change.startswith("+96.7 (+89.")
    assert change.endswith(" to +100.0)")


def test_the_answers_that_are_farthest_off_come_first() -> None:
    compared = (*free_text().comparisons, replace(free_text().comparisons[0], tuned="Sorry."))
    title, shown = worst_first(replace(free_text(), comparisons=compared))
    assert title == "Answers, the least alike first (ROUGE-L before the tuned one)"
    assert [mark for mark, _ in shown] == ["0.11"] + ["0.94"] * 6
    assert shown[0][1].tuned == "Sorry."
    silent = replace(free_text(), comparisons=())
    assert worst_first(silent) == ("", [])
    assert answer_scores(silent) is None


def test_the_verdict_speaks_in_the_measure_of_its_rows() -> None:
    found = learned_against_base(free_text(), "runs/x")
    assert "; ROUGE-L 0.12 → 0.94, 0 of 6 exactly right; 6 rows are few" in found.sentence


def test_the_verdict_names_that_no_answer_is_right_and_a_rise_that_is_noise() -> None:
    kept = free_text().comparisons
    no_better = tuple(replace(one, tuned=f"{one.base} {'Yes.' if at % 2 else BASE}") for at, one in enumerate(kept))
    found = learned_against_base(replace(free_text(), comparisons=no_better), "runs/x")
    assert "(no more than noise), 0 of 6 exactly right" in found.sentence


def test_older_evaluations_have_no_interval_of_their_losses() -> None:
    table = lines(replace(free_text(), row_losses=()))
    assert table["loss, nats per token"] == ("2.25", "0.750", "")
    assert table["perplexity"] == ("9.49", "2.12", "")


def test_where_rows_are_too_few_for_an_interval_screen_and_page_say_so(capsys: pytest.CaptureFixture) -> None:
    """The column was empty without a word."""
    whole = free_text()
    few = replace(whole, comparisons=whole.comparisons[:4], row_losses=whole.row_losses[:4], rows=4)
    assert {change for *_, change in score_table(few)} == {""}
    told = "changes are not told from noise: an interval takes 5 rows"
    for evaluation, is_told in ((few, True), (whole, False)):
        screen.show(evaluation)
        assert (told in " ".join(capsys.readouterr().out.split())) is is_told
        assert (told in str(results.evaluation(evaluation))) is is_told


def test_a_perplexity_that_rises_is_multiplied() -> None:
    """What was forgotten stood there as a division by 0.5."""
    pieces = tuple(PieceLoss(tokens=40, base=2.0 + at / 10, tuned=2.7 + at / 10) for at in range(6))
    found = {name: change for name, *_, change in forgetting_table(Forgetting("text", pieces))}
    assert found["perplexity, 95 % interval"] == "× 2.01 (2.01 to 2.01)"
