"""The screen of `qtune eval`."""

from typing import TYPE_CHECKING

from qtune import console

if TYPE_CHECKING:
    from qtune.tuned.evaluate import Evaluation


def show(evaluation: "Evaluation", shown: int = 5) -> None:
    """Prints the scores and `shown` rows, the wrong ones first."""
    rows = (
        f"{evaluation.rows} of {evaluation.rows_held_out} {evaluation.source}, {evaluation.scored_tokens} scored tokens"
    )
    scores = [
        ["loss, nats per token", *(f"{score.loss:.4f}" for score in (evaluation.base, evaluation.tuned))],
        ["tokens right", *(f"{score.token_accuracy:.1%}" for score in (evaluation.base, evaluation.tuned))],
    ]
    if evaluation.base.exact_match is not None:
        exact = (evaluation.base.exact_match, evaluation.tuned.exact_match or 0.0)
        scores.append(["answers exactly right", *(f"{share:.1%}" for share in exact)])
    console.out(console.table(rows, ["", "base", "tuned"], scores, right=(1, 2)))
    if evaluation.answers_cut:
        console.out(f"{evaluation.answers_cut} expected answers are longer than --max-new-tokens and cannot match")
    chosen = sorted(evaluation.comparisons, key=lambda row: row.is_right)[:shown]
    if chosen:
        cells = [[row.request, row.expected, row.base, f"{'✓' if row.is_right else '✗'} {row.tuned}"] for row in chosen]
        console.out("")
        console.out(console.table("Answers, wrong ones first", ["request", "expected", "base", "tuned"], cells))
