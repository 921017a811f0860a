"""Benchmarks of both models as a table: base, tuned, and the change with its interval over the questions."""

from qtune.run.summary import number
from qtune.tuned.task_scores import TaskScore, TaskScores
from qtune.verdicts.interval import paired_fall

COLUMNS = ("task", "metric", "base", "tuned", "change, 95 % interval")


def task_table(found: TaskScores) -> list[tuple[str, ...]]:
    """A line for each task and metric, under `COLUMNS`."""
    return [(one.task, one.metric, number(one.base), number(one.tuned), change(one)) for one in found.scores]


def asked_how(found: TaskScores) -> str:
    """By what the benchmarks were asked, and how."""
    few = "" if found.fewshot is None else f", {found.fewshot} solved examples before each"
    some = "" if found.limit is None else f", at most {found.limit} questions of each"
    return f"lm-evaluation-harness {found.harness}{few}{some}"


def change(score: TaskScore) -> str:
    """ "+0.20 (−0.01 to +0.41)"; without an interval where the metric is no mean over questions, or there are few."""
    told = _signed(score.tuned - score.base)
    base, tuned = score.base_rows, score.tuned_rows
    are_shares = all(0 <= value <= 1 for value in (*base, *tuned))
    rise = paired_fall(tuned, base, [1] * len(base), are_shares=are_shares) if base else None
    return told if rise is None else f"{told} ({_signed(rise.low)} to {_signed(rise.high)})"


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{number(abs(value))}"
