"""The screen of `qtune eval --tasks`."""

from typing import TYPE_CHECKING

from qtune import console

if TYPE_CHECKING:
    from qtune.tuned.task_scores import TaskScores


def show(found: "TaskScores") -> None:
    """Prints one table for all tasks."""
    from qtune.verdicts.tasks import COLUMNS, asked_how, task_table

    console.out(console.table(f"Tasks of {asked_how(found)}", COLUMNS, task_table(found), right=(2, 3, 4)))
