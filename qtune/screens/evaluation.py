"""The screen of `qtune eval`."""

from typing import TYPE_CHECKING

from qtune import console
from qtune.run.metrics import CUT
from qtune.tuned.asked import asked_text, shared_system, shortened
from qtune.tuned.evaluation import EXTRA_TOKENS, FREE_TEXT_TIMES
from qtune.verdicts.scores import answer_scores, any_cut, score_table, worst_first

if TYPE_CHECKING:
    from qtune.tuned.evaluation import Evaluation


SHOWN = 80
"""Characters of each turn before the last words of the user; the report has more."""


def show(evaluation: "Evaluation", shown: int = 5) -> None:
    """Prints the scores and `shown` rows, the worst ones first."""
    asked = f"{evaluation.rows_judged} of {evaluation.rows_held_out} {evaluation.source}"
    rows = f"{asked}, {evaluation.scored_tokens} scored tokens"
    scores = [list(line) for line in score_table(evaluation)]
    console.out(console.table(rows, ["", "base", "tuned", "change, 95 % interval"], scores, right=(1, 2, 3)))
    for sentence in (evaluation.about_interval, evaluation.about_rows, evaluation.about_answers):
        if sentence:
            console.out(sentence)
    if evaluation.answers_cut:
        console.out(f"{evaluation.answers_cut} expected answers are longer than --max-new-tokens and cannot match")
    if any_cut(evaluation):
        console.out(_about_limits(evaluation))
    title, answers = worst_first(evaluation)
    if answers[:shown]:
        system = shared_system([row.turns for _, row in answers[:shown]])
        cells = [
            [asked_text(row.request, row.turns, system, SHOWN), row.expected, row.base, f"{mark} {row.tuned}"]
            for mark, row in answers[:shown]
        ]
        console.out("")
        some = f"; {shown} of {len(answers)} shown, --show {len(answers)} shows all" if shown < len(answers) else ""
        if system is not None:
            console.out(
                f"each request begins with the system message: {shortened(' '.join(system.split()), 2 * SHOWN)}"
            )
        console.out(console.table(f"{title}{some}", ["request", "expected", "base", "tuned"], cells))


def _about_limits(evaluation: "Evaluation") -> str:
    """What the mark behind an answer says that was stopped."""
    scores = answer_scores(evaluation)
    is_free = scores is not None and scores.is_free
    length = f"{FREE_TEXT_TIMES} times the length" if is_free else "the length"
    return (
        f"{CUT} behind an answer: the model was stopped before it had ended, at {length} of the expected answer and "
        f"{EXTRA_TOKENS} tokens more, or at --max-new-tokens"
    )
