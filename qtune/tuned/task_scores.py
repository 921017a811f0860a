"""tasks.json: what benchmarks said of the base and the tuned model. Reading it needs no library that computes."""

from dataclasses import dataclass

from qtune.run.folder import RunDir
from qtune.run.measured_adapter import read_figures


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task for both models."""

    task: str
    metric: str
    """As the harness calls it, "acc" or "exact_match (strict-match)"."""
    base: float
    tuned: float
    base_rows: tuple[float, ...] = ()
    """The questions' own values, where the metric is their mean."""
    tuned_rows: tuple[float, ...] = ()


@dataclass(frozen=True)
class TaskScores:
    """What RUN/tasks.json holds: the scores, and what they were made with."""

    harness: str
    """Version of lm-evaluation-harness."""
    fewshot: int | None
    limit: int | None
    """Questions of each task that were asked at most; None: all."""
    scores: tuple[TaskScore, ...]
    adapter: str | None = None
    """`run.measured_adapter.adapter_name` of what was asked; None in files of older versions."""

    @property
    def in_words(self) -> str:
        """What was asked: "arc_easy, gsm8k (20 questions of each)"."""
        asked = "all questions" if self.limit is None else f"{self.limit} questions of each"
        return f"{', '.join(sorted({score.task for score in self.scores}))} ({asked})"

    def loses(self, earlier: "TaskScores") -> bool:
        """Whether tasks or questions of an earlier one are not among those of this one."""
        fewer = self.limit is not None and (earlier.limit is None or earlier.limit > self.limit)
        return fewer or not {score.task for score in earlier.scores} <= {score.task for score in self.scores}


def read_tasks(run_dir: RunDir) -> TaskScores | None:
    """RUN/tasks.json, as the last `qtune eval --tasks` has written it; None where there was none
    of this adapter.

    Raises:
        RunError: it is damaged.
    """
    return read_figures(run_dir, run_dir.tasks_file, TaskScores)
