"""The screen of `qtune eval`."""

from math import exp
from typing import TYPE_CHECKING

from qtune import console
from qtune.tuned.free_text import rouge_l, words
from qtune.verdicts.interval import paired_fall

if TYPE_CHECKING:
    from qtune.tuned.evaluate import Comparison, Evaluation


def show(evaluation: "Evaluation", shown: int = 5) -> None:
    """Prints the scores and `shown` rows, the wrong ones first."""
    rows = (
        f"{evaluation.rows} of {evaluation.rows_held_out} {evaluation.source}, {evaluation.scored_tokens} scored tokens"
    )
    scores = [
        ["loss, nats per token", *(f"{score.loss:.4f}" for score in (evaluation.base, evaluation.tuned))],
        ["tokens right", *(f"{score.token_accuracy:.1%}" for score in (evaluation.base, evaluation.tuned))],
    ]
    if (perplexity := _perplexity(evaluation)) is not None:
        scores.insert(1, perplexity)
    if evaluation.base.text is not None and evaluation.tuned.text is not None:
        before, after = evaluation.base.text, evaluation.tuned.text
        scores += [
            ["like the expected answer (ROUGE-L)", f"{before.rouge_l:.3f}", f"{after.rouge_l:.3f}"],
            ["words in common (F1)", f"{before.word_f1:.3f}", f"{after.word_f1:.3f}"],
            ["length, times the expected", f"{before.length:.2f}", f"{after.length:.2f}"],
            ["words said again", f"{before.repeated:.1%}", f"{after.repeated:.1%}"],
        ]
    if evaluation.base.exact_match is not None:
        exact = (evaluation.base.exact_match, evaluation.tuned.exact_match or 0.0)
        scores.append(["answers exactly right", *(f"{share:.1%}" for share in exact)])
    console.out(console.table(rows, ["", "base", "tuned"], scores, right=(1, 2)))
    if evaluation.answers_cut:
        console.out(f"{evaluation.answers_cut} expected answers are longer than --max-new-tokens and cannot match")
    is_free = evaluation.tuned.text is not None
    chosen = sorted(evaluation.comparisons, key=_likeness if is_free else _rightness)[:shown]
    if chosen:
        cells = [[row.request, row.expected, row.base, f"{'✓' if row.is_right else '✗'} {row.tuned}"] for row in chosen]
        console.out("")
        title = "Answers, the least alike first" if is_free else "Answers, wrong ones first"
        console.out(console.table(title, ["request", "expected", "base", "tuned"], cells))


def _rightness(row: "Comparison") -> bool:
    return row.is_right


def _likeness(row: "Comparison") -> float:
    return rouge_l(words(row.expected), words(row.tuned))


def _perplexity(evaluation: "Evaluation") -> list[str] | None:
    """The perplexity of both models, each with its 95 % interval over the rows; None where those are too few."""
    tokens = [row.tokens for row in evaluation.row_losses]
    nothing = [0.0] * len(tokens)
    shown = ["perplexity (95 % interval)"]
    for losses in ([row.base for row in evaluation.row_losses], [row.tuned for row in evaluation.row_losses]):
        mean = paired_fall(losses, nothing, tokens)
        if mean is None or mean.high > MOST_NATS:
            return None
        shown.append(f"{exp(mean.mean):.4g} ({exp(mean.low):.4g} to {exp(mean.high):.4g})")
    return shown


MOST_NATS = 100.0
"""A mean loss beyond which a perplexity is no figure that anybody reads."""
