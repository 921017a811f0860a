"""The screen of `qtune eval`."""

from typing import TYPE_CHECKING

from qtune import console
from qtune.run.metrics import CUT
from qtune.tuned.evaluation import EXTRA_TOKENS, FREE_TEXT_TIMES
from qtune.verdicts.scores import any_cut, score_table, worst_first

if TYPE_CHECKING:
    from qtune.tuned.evaluation import Evaluation

ABOUT_LIMITS = (
    f"an answer is cut, and ends with {CUT}, {EXTRA_TOKENS} tokens after as many as were expected ({FREE_TEXT_TIMES} "
    "times as many of free text), or at --max-new-tokens"
)


def show(evaluation: "Evaluation", shown: int = 5) -> None:
    """Prints the scores and `shown` rows, the worst ones first."""
    rows = (
        f"{evaluation.rows} of {evaluation.rows_held_out} {evaluation.source}, {evaluation.scored_tokens} scored tokens"
    )
    scores = [list(line) for line in score_table(evaluation)]
    console.out(console.table(rows, ["", "base", "tuned", "change, 95 % interval"], scores, right=(1, 2, 3)))
    if evaluation.answers_cut:
        console.out(f"{evaluation.answers_cut} expected answers are longer than --max-new-tokens and cannot match")
    if any_cut(evaluation):
        console.out(ABOUT_LIMITS)
    title, answers = worst_first(evaluation)
    if answers[:shown]:
        cells = [[row.request, row.expected, row.base, f"{mark} {row.tuned}"] for mark, row in answers[:shown]]
        console.out("")
        console.out(console.table(title, ["request", "expected", "base", "tuned"], cells))
