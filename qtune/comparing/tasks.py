"""Compared runs -> what benchmarks said of them, as far as all were asked the same in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from qtune.comparing.runs import ComparedRun


@dataclass(frozen=True)
class TaskLine:
    """A metric of a task: of the first configuration's base, and the mean of each configuration's tuned runs."""

    task: str
    metric: str
    base: float
    tuned: tuple[float, ...]


def task_lines(groups: Sequence[Sequence[ComparedRun]]) -> tuple[tuple[TaskLine, ...], str | None]:
    """The lines, and what is to be said where benchmarks of some runs stand in none of them.

    groups: the runs of each configuration.
    """
    found = [run.tasks for group in groups for run in group]
    asked = [one for one in found if one is not None]
    if not asked:
        return (), None
    ways = {(one.harness, one.fewshot, one.limit) for one in asked}
    if len(asked) < len(found) or len(ways) > 1:
        why = "not all of these runs were asked them" if len(asked) < len(found) else "they were not asked alike"
        return (), f"benchmarks are not compared: {why}; ask each with the same qtune eval RUN --tasks"
    by_run = [{(one.task, one.metric): one for one in scores.scores} for scores in asked]
    shared = [name for name in by_run[0] if all(name in scores for scores in by_run)]
    ends, at = [], 0
    for group in groups:
        ends.append(by_run[at : at + len(group)])
        at += len(group)
    lines = tuple(
        TaskLine(*name, by_run[0][name].base, tuple(fmean(one[name].tuned for one in runs) for runs in ends))
        for name in shared
    )
    return lines, None
