"""A run's folder -> what verdicts are made of. Whatever is not there yet is None or empty."""

import shlex
from dataclasses import dataclass

from qtune.export.verification import Proof, proof_today, proven_folders
from qtune.run.folder import RunDir
from qtune.run.history import history_of
from qtune.run.lock import Lock, read_lock
from qtune.run.memory import RunMemory, read_memory
from qtune.run.metrics import EvalRecord, NoteRecord, TrainRecord, adapter_step
from qtune.run.summary import Losses, training_losses
from qtune.tuned.evaluation import Evaluation, read_evaluation
from qtune.tuned.forgotten import Forgetting, read_forgetting
from qtune.tuned.task_scores import TaskScores, read_tasks


@dataclass(frozen=True)
class Facts:
    """What a run has written of its results."""

    run: str
    """The folder, as commands name it."""
    is_finished: bool
    train: tuple[TrainRecord, ...]
    validation: tuple[EvalRecord, ...]
    evaluation: Evaluation | None
    memory: RunMemory | None
    lock: Lock | None
    exports: tuple[tuple[str, Proof], ...]
    """Name of each exported folder inside the run, and what is proven of it."""
    adapter_step: int | None = None
    """The step whose state the adapter is, where that is not the last one."""
    tasks: TaskScores | None = None
    diverged: bool = False
    """Whether the run's end was found no better than guessing."""
    forgetting: Forgetting | None = None

    @property
    def losses(self) -> Losses | None:
        """What was learned, by the training loss; None where no step was logged."""
        return training_losses(self.train)

    @property
    def judged(self) -> tuple[EvalRecord, ...]:
        """The evaluations up to the state that the adapter is."""
        return tuple(one for one in self.validation if self.adapter_step is None or one.step <= self.adapter_step)


def read_facts(run_dir: RunDir) -> Facts:
    """Reads the files of a run.

    Raises:
        RunError: one of them is damaged.
    """
    metrics = history_of(run_dir)
    return Facts(
        run=shlex.quote(str(run_dir.path)),
        is_finished=run_dir.is_finished,
        train=tuple(one for one in metrics if isinstance(one, TrainRecord)),
        validation=tuple(one for one in metrics if isinstance(one, EvalRecord)),
        evaluation=read_evaluation(run_dir),
        memory=read_memory(run_dir),
        lock=read_lock(run_dir),
        exports=tuple((folder.name, proof_today(folder, run_dir.path)) for folder in proven_folders(run_dir.path)),
        adapter_step=adapter_step(metrics),
        tasks=read_tasks(run_dir),
        forgetting=read_forgetting(run_dir),
        diverged=any(isinstance(one, NoteRecord) and one.diverged for one in metrics),
    )
