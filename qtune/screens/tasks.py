"""The screen of `qtune eval --tasks`."""

from typing import TYPE_CHECKING

from qtune import console
from qtune.verdicts.interval import paired_fall
from qtune.verdicts.verdict import number

if TYPE_CHECKING:
    from qtune.tuned.tasks import TaskScore, TaskScores


def show(found: "TaskScores") -> None:
    """Prints one table for all tasks: base, tuned, and the change with its interval over the questions."""
    lines = [[one.task, one.metric, number(one.base), number(one.tuned), change(one)] for one in found.scores]
    few = "" if found.fewshot is None else f", {found.fewshot} solved examples before each"
    some = "" if found.limit is None else f", at most {found.limit} questions of each"
    title = f"Tasks of lm-evaluation-harness {found.harness}{few}{some}"
    columns = ["task", "metric", "base", "tuned", "change, 95 % interval"]
    console.out(console.table(title, columns, lines, right=(2, 3, 4)))


def change(score: "TaskScore") -> str:
    """ "+0.20 (−0.01 to +0.41)"; without an interval where the metric is no mean over questions, or there are few."""
    told = _signed(score.tuned - score.base)
    rise = paired_fall(score.tuned_rows, score.base_rows, [1] * len(score.base_rows)) if score.base_rows else None
    return told if rise is None else f"{told} ({_signed(rise.low)} to {_signed(rise.high)})"


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{number(abs(value))}"
