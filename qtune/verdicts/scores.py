"""An evaluation as lines of a table: what its rows can be asked for, of both models, with 95 % intervals over rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from qtune.tuned.text_scores import is_free_text, is_json, repetition, rouge_l, token_f1, words_of
from qtune.verdicts.interval import Fall, paired_fall
from qtune.verdicts.verdict import number

if TYPE_CHECKING:
    from qtune.tuned.evaluate import Comparison, Evaluation, Score

CUT = "…"
"""Ends an answer that was stopped at its limit (`evaluate.answer_text`)."""


@dataclass(frozen=True)
class AnswerScores:
    """The measure that the rows have chosen: one value for each row and model, the higher the nearer."""

    name: str
    base: tuple[float, ...]
    tuned: tuple[float, ...]
    is_free: bool

    @property
    def rise(self) -> Fall | None:
        """How much the mean rose from base to tuned; None: too few rows."""
        return paired_fall(self.tuned, self.base, [1] * len(self.base))


def answer_scores(compared: "Sequence[Comparison]") -> AnswerScores | None:
    """Exact matches, or ROUGE-L where the expected answers are free text; None where nothing was asked."""
    if not compared:
        return None
    is_free = is_free_text([one.expected for one in compared])
    score: Callable[[str, str], float] = rouge_l if is_free else _exact
    base, tuned = (
        tuple(score(answer, one.expected) for one, answer in zip(compared, answers, strict=True))
        for answers in ([one.base for one in compared], [one.tuned for one in compared])
    )
    return AnswerScores("ROUGE-L" if is_free else "answers exactly right", base, tuned, is_free)


def _exact(answer: str, expected: str) -> float:
    return float(answer == expected)


def worst_first(compared: "Sequence[Comparison]") -> "tuple[str, list[tuple[str, Comparison]]]":
    """A title, and the rows with a mark of the tuned answer, those first that are farthest from what was expected."""
    chosen = answer_scores(compared)
    if chosen is None:
        return "", []
    order = sorted(range(len(compared)), key=chosen.tuned.__getitem__)
    if chosen.is_free:
        return "Answers, the least alike first", [(f"{chosen.tuned[at]:.2f}", compared[at]) for at in order]
    wrong = sum(not one.is_right for one in compared)
    title = f"Answers, wrong ones first ({wrong} of {len(compared)})" if wrong else "Answers, all of them right"
    return title, [("✓" if compared[at].is_right else "✗", compared[at]) for at in order]


def score_table(evaluation: "Evaluation") -> list[tuple[str, str, str, str]]:
    """(what, base, tuned, change with its interval) for each line; a change is empty where no interval was kept."""
    base, tuned, rows = evaluation.base, evaluation.tuned, evaluation.row_losses
    tokens = [one.tokens for one in rows]
    losses = [one.base for one in rows], [one.tuned for one in rows]
    fall = paired_fall(*losses, tokens)

    def perplexity(score: "Score", own: Sequence[float]) -> str:
        return _perplexity(score.loss, own, tokens)

    lines: list[tuple[str, str, str, str]] = [
        ("loss, nats per token", number(base.loss), number(tuned.loss), _change(fall, -1, number)),
        ("perplexity", perplexity(base, losses[0]), perplexity(tuned, losses[1]), _ratio(fall)),
        ("tokens right", f"{base.token_accuracy:.1%}", f"{tuned.token_accuracy:.1%}", ""),
    ]
    return lines + _answer_lines(evaluation.comparisons)


def _answer_lines(compared: "Sequence[Comparison]") -> list[tuple[str, str, str, str]]:
    chosen = answer_scores(compared)
    if chosen is None:
        return []
    base, tuned = fmean(chosen.base), fmean(chosen.tuned)
    if not chosen.is_free:
        lines = [(chosen.name, f"{base:.1%}", f"{tuned:.1%}", _change(chosen.rise, 1, _points))]
        return lines if all(is_json(one.expected) for one in compared) else [*lines, _f1_line(compared)]
    expected = [one.expected for one in compared]

    def line(name: str, value: Callable[[str], float], text: Callable[[float], str]) -> tuple[str, str, str, str]:
        base, tuned = (text(fmean(map(value, answers))) for answers in _both(compared))
        return f"{name} (expected: {text(fmean(map(value, expected)))})", base, tuned, ""

    unended = [fmean(float(answer.endswith(CUT)) for answer in answers) for answers in _both(compared)]
    return [
        (chosen.name, f"{base:.3f}", f"{tuned:.3f}", _change(chosen.rise, 1, "{:.3f}".format)),
        line("words per answer", lambda text: float(len(words_of(text))), "{:,.0f}".format),
        line("repeated runs of four words", repetition, "{:.1%}".format),
        ("answers that did not end", f"{unended[0]:.1%}", f"{unended[1]:.1%}", ""),
    ]


def _f1_line(compared: "Sequence[Comparison]") -> tuple[str, str, str, str]:
    base, tuned = (
        [token_f1(answer, one.expected) for one, answer in zip(compared, answers, strict=True)]
        for answers in _both(compared)
    )
    rise = paired_fall(tuned, base, [1] * len(base))
    return "words right (F1)", f"{fmean(base):.3f}", f"{fmean(tuned):.3f}", _change(rise, 1, "{:.3f}".format)


def _both(compared: "Sequence[Comparison]") -> tuple[list[str], list[str]]:
    """The answers of the base and of the tuned model."""
    return [one.base for one in compared], [one.tuned for one in compared]


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _change(fall: Fall | None, sign: int, text: Callable[[float], str]) -> str:
    """ "−1.98 (−2.01 to −1.96)": with the sign of the change, the interval from low to high."""
    if fall is None:
        return ""
    low, mean, high = sorted((sign * fall.low, sign * fall.mean, sign * fall.high))

    def signed(value: float) -> str:
        return f"{'−' if value < 0 else '+'}{text(abs(value))}"

    return f"{signed(mean)} ({signed(low)} to {signed(high)})"


def _perplexity(mean: float, losses: Sequence[float], tokens: Sequence[int]) -> str:
    """exp(loss) with its interval, which is taken over the loss: perplexity itself is skewed."""
    interval = paired_fall(losses, [0.0] * len(losses), tokens)
    if interval is None:
        return _exp(mean)
    return f"{_exp(mean)} ({_exp(interval.low)} to {_exp(interval.high)})"


def _exp(loss: float) -> str:
    """The perplexity of a loss; one more digit near 1, where it ends."""
    if not loss < 700:
        return "no number" if math.isnan(loss) else "∞"
    value = math.exp(loss)
    return f"{value:.4f}" if value < 1.1 else f"{value:,.0f}" if value >= 1000 else number(value)


def _ratio(fall: Fall | None) -> str:
    """By how much perplexity is divided: the exponential of the loss's fall."""
    return "" if fall is None else f"÷ {_exp(fall.mean)} ({_exp(fall.low)} to {_exp(fall.high)})"
