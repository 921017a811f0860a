"""An evaluation as lines of a table: what its rows can be asked for, of both models, with 95 % intervals over rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from qtune.run.summary import number
from qtune.tuned.free_text import rouge_l, words
from qtune.verdicts.interval import Fall, paired_fall

if TYPE_CHECKING:
    from qtune.tuned.evaluation import Comparison, Evaluation, RowLoss
    from qtune.tuned.forgotten import Forgetting, PieceLoss

Line = tuple[str, str, str, str]
"""What, base, tuned, and the change with its interval; "" where none was kept."""


@dataclass(frozen=True)
class AnswerScores:
    """The measure that the rows have chosen: one value for each row and model, the higher the nearer."""

    name: str
    base: tuple[float, ...]
    tuned: tuple[float, ...]
    is_free: bool
    exact: int
    """Tuned answers that are to the letter what was expected."""

    @property
    def rise(self) -> Fall | None:
        """How much the mean rose from base to tuned; None: too few rows."""
        return paired_fall(self.tuned, self.base, [1] * len(self.base), are_shares=True)


def answer_scores(evaluation: "Evaluation") -> AnswerScores | None:
    """Exact matches, or ROUGE-L where the expected answers are free text; None where nothing was asked."""
    compared, is_free = evaluation.judged_answers, evaluation.tuned.text is not None
    if not compared:
        return None
    score = _likeness if is_free else _exactness
    base = tuple(score(one.expected, one.base) for one in compared)
    tuned = tuple(score(one.expected, one.tuned) for one in compared)
    exact = sum(one.tuned == one.expected for one in compared)
    return AnswerScores("ROUGE-L" if is_free else "answers exactly right", base, tuned, is_free, exact)


def _likeness(expected: str, answer: str) -> float:
    return rouge_l(words(expected), words(answer))


def _exactness(expected: str, answer: str) -> float:
    return float(answer == expected)


def worst_first(evaluation: "Evaluation") -> "tuple[str, list[tuple[str, Comparison]]]":
    """A title, and the rows with a mark of the tuned answer, those first that are farthest from what was expected."""
    compared, scores = evaluation.judged_answers, answer_scores(evaluation)
    if scores is None:
        return "", []
    order = sorted(range(len(compared)), key=scores.tuned.__getitem__)
    if scores.is_free:
        return "Answers, the least alike first (ROUGE-L before the tuned one)", [
            (f"{scores.tuned[at]:.2f}", compared[at]) for at in order
        ]
    wrong = sum(not one.is_right for one in compared)
    title = f"Answers, wrong ones first ({wrong} of {len(compared)})" if wrong else "Answers, all of them right"
    return title, [("✓" if compared[at].is_right else "✗", compared[at]) for at in order]


def score_table(evaluation: "Evaluation") -> list[Line]:
    """The lines that the rows have chosen."""
    base, tuned, rows = evaluation.base, evaluation.tuned, evaluation.judged_rows
    return [
        *_loss_lines((base.loss, tuned.loss), rows),
        ("tokens right", f"{base.token_accuracy:.1%}", f"{tuned.token_accuracy:.1%}", ""),
        *_answer_lines(evaluation),
    ]


def forgetting_table(forgetting: "Forgetting") -> list[Line]:
    """The losses on the text that is about none of the rows: what rose there was forgotten."""
    return _loss_lines((forgetting.base, forgetting.tuned), forgetting.pieces)


def _loss_lines(means: tuple[float, float], rows: "Sequence[RowLoss | PieceLoss]") -> list[Line]:
    """Loss and perplexity of base and tuned model. means: of either, over the rows' tokens."""
    tokens = [one.tokens for one in rows]
    losses = [one.base for one in rows], [one.tuned for one in rows]
    fall = paired_fall(*losses, tokens)
    perplexities = [_perplexity(mean, own, tokens) for mean, own in zip(means, losses, strict=True)]
    return [
        ("loss, nats per token", number(means[0]), number(means[1]), _change(fall, -1, number)),
        (f"perplexity{', 95 % interval' if fall else ''}", perplexities[0], perplexities[1], _ratio(fall)),
    ]


def _answer_lines(evaluation: "Evaluation") -> list[Line]:
    scores, before, after = answer_scores(evaluation), evaluation.base.text, evaluation.tuned.text
    if scores is None:
        return []
    if before is None or after is None:
        base, tuned = fmean(scores.base), fmean(scores.tuned)
        right = (scores.name, f"{base:.1%}", f"{tuned:.1%}", _change(scores.rise, 1, _points, most=1.0))
        return [right, *([_unended(evaluation)] if any_cut(evaluation) else [])]
    change = _change(scores.rise, 1, "{:.3f}".format, most=1.0)
    return [
        ("like the expected answer (ROUGE-L)", f"{before.rouge_l:.3f}", f"{after.rouge_l:.3f}", change),
        *_exactly_right(evaluation),
        ("words in common (F1)", f"{before.word_f1:.3f}", f"{after.word_f1:.3f}", ""),
        ("length, times the expected", f"{before.length:.2f}", f"{after.length:.2f}", ""),
        ("words said again", f"{before.repeated:.1%}", f"{after.repeated:.1%}", ""),
        _unended(evaluation),
    ]


def _exactly_right(evaluation: "Evaluation") -> list[Line]:
    """Free text is seldom what was expected to the letter; where it is, a rounded mean does not tell. That no answer is
    has a line, too: it is what who trains commands among sentences looks for."""
    compared = evaluation.judged_answers
    base = sum(one.base == one.expected for one in compared)
    tuned = sum(one.is_right for one in compared)
    many = len(compared)
    return [("answers exactly right", f"{base} of {many}", f"{tuned} of {many}", "")] if many else []


def any_cut(evaluation: "Evaluation") -> bool:
    """Whether an answer of either model reached its limit before its end."""
    return any(one.base_was_cut or one.tuned_was_cut for one in evaluation.judged_answers)


def _unended(evaluation: "Evaluation") -> Line:
    compared = evaluation.judged_answers
    base = sum(one.base_was_cut for one in compared)
    tuned = sum(one.tuned_was_cut for one in compared)
    return ("answers cut at their limit", f"{base} of {len(compared)}", f"{tuned} of {len(compared)}", "")


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _change(fall: Fall | None, sign: int, text: Callable[[float], str], most: float = math.inf) -> str:
    """ "−1.98 (−2.01 to −1.96)": with the sign of the change, the interval from low to high.

    most: what a change can be; the interval is a normal one, which does not know that a share ends at 1.
    """
    if fall is None:
        return ""
    ends = (sign * max(-most, min(most, one)) for one in (fall.low, fall.mean, fall.high))
    low, mean, high = sorted(ends)

    def signed(value: float) -> str:
        return f"{'−' if value < 0 else '+'}{text(abs(value))}"

    return f"{signed(mean)} ({signed(low)} to {signed(high)})"


def _perplexity(mean: float, losses: Sequence[float], tokens: Sequence[int]) -> str:
    """exp(loss) with its interval, which is taken over the loss: perplexity itself is skewed."""
    interval = paired_fall(losses, [0.0] * len(losses), tokens)
    if interval is None:
        return _exp(mean)
    return f"{_exp(interval.mean)} ({_exp(interval.low)} to {_exp(interval.high)})"


def _exp(loss: float) -> str:
    """The perplexity of a loss; one more digit near 1, where it ends."""
    if not loss < MOST_NATS:
        return "no number" if math.isnan(loss) else "∞"
    value = math.exp(loss)
    return f"{value:.4f}" if value < 1.1 else f"{value:,.0f}" if value >= 1000 else number(value)


MOST_NATS = 100.0
"""A mean loss beyond which a perplexity is no figure that anybody reads."""


def _ratio(fall: Fall | None) -> str:
    """By how much perplexity is divided, or multiplied: the exponential of the loss's fall, or of its rise."""
    if fall is not None and fall.mean < 0:
        return f"× {_exp(-fall.mean)} ({_exp(-fall.high)} to {_exp(-fall.low)})"
    return "" if fall is None else f"÷ {_exp(fall.mean)} ({_exp(fall.low)} to {_exp(fall.high)})"
