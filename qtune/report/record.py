"""A run's folder -> what its report shows. Whatever is not there yet is None: a run may be reported while it trains."""

from dataclasses import dataclass

from qtune.export.verification import Proof, proven_folders, read_proof
from qtune.run.folder import RunDir
from qtune.run.lock import Lock, read_lock
from qtune.run.memory import RunMemory, read_memory
from qtune.run.metrics import EvalRecord, NoteRecord, TrainRecord, read_metrics, seconds_of
from qtune.run.resolved import WrittenValue, read_values
from qtune.tuned.evaluate import Evaluation, read_evaluation


@dataclass(frozen=True)
class Record:
    """Everything a run has written so far; `train`, `validation` and `notes` are the records of metrics.jsonl."""

    run_dir: RunDir
    values: tuple[WrittenValue, ...]
    train: tuple[TrainRecord, ...]
    validation: tuple[EvalRecord, ...]
    notes: tuple[NoteRecord, ...]
    seconds: float
    memory: RunMemory | None
    evaluation: Evaluation | None
    lock: Lock | None
    exports: tuple[tuple[str, Proof], ...]
    """Name of each exported folder inside the run, and its verify.json."""

    @property
    def adapter_bytes(self) -> int | None:
        """Size of the adapter's files as peft loads them."""
        files = [file for file in self.run_dir.adapter.glob("adapter_model*") if file.is_file()]
        return sum(file.stat().st_size for file in files) if files else None

    def value(self, table: str, key: str) -> str | None:
        """A resolved value without the quotes of TOML."""
        return next((one.plain_text for one in self.values if one.path == (table, key)), None)


def read_record(run_dir: RunDir) -> Record:
    """Reads the files of a run.

    Raises:
        RunError: one of them is damaged.
    """
    metrics = read_metrics(run_dir.metrics_file)
    return Record(
        run_dir=run_dir,
        values=read_values(run_dir),
        train=tuple(one for one in metrics if isinstance(one, TrainRecord)),
        validation=tuple(one for one in metrics if isinstance(one, EvalRecord)),
        notes=tuple(one for one in metrics if isinstance(one, NoteRecord)),
        seconds=seconds_of(metrics),
        memory=read_memory(run_dir),
        evaluation=read_evaluation(run_dir),
        lock=read_lock(run_dir),
        exports=tuple((folder.name, read_proof(folder)) for folder in proven_folders(run_dir.path)),
    )
