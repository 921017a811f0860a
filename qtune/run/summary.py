"""What a run has come to, in the few figures that its end shows; read off metrics.jsonl."""

from collections.abc import Sequence
from dataclasses import dataclass

from qtune.run.folder import RunDir
from qtune.run.history import history_of
from qtune.run.metrics import EvalRecord, Metric, TrainRecord, adapter_step, seconds_of

# The start and the end of a run are means of this share of its steps each: one batch is easier than another.
SHARE = 0.1


@dataclass(frozen=True)
class Losses:
    """The logged training losses of a run in their order, in nats per token."""

    values: Sequence[float]

    @property
    def start(self) -> float:
        """The mean of the first tenth."""
        return self._mean(self.values[: self.count])

    @property
    def end(self) -> float:
        """The mean of the last tenth."""
        return self._mean(self.values[-self.count :])

    @property
    def count(self) -> int:
        """How many make the start, and the end."""
        return max(1, round(SHARE * len(self.values)))

    def _mean(self, values: Sequence[float]) -> float:
        return sum(values) / len(values)


def training_losses(records: Sequence[Metric]) -> list[float]:
    """The finite training losses among the records of a run, in their order."""
    return [record.loss for record in records if isinstance(record, TrainRecord) and record.is_finite]


@dataclass(frozen=True)
class Summary:
    """A run as far as it has come."""

    run_dir: RunDir
    step: int
    steps: int
    seconds: float
    losses: Losses | None
    """None where no step was logged."""
    validation: tuple[EvalRecord, ...]
    peak_bytes: int
    adapter_step: int | None
    """The step whose state the adapter is, where that is not the last one."""

    @property
    def best(self) -> EvalRecord | None:
        """The evaluation with the lowest loss, the earliest of equal ones; None where there was none."""
        finite = [one for one in self.validation if one.loss == one.loss]
        return min(finite, key=lambda one: (one.loss, one.step), default=None)


def summary_of(run_dir: RunDir) -> Summary:
    """Reads the figures of a run.

    Raises:
        RunError: metrics.jsonl is damaged.
    """
    records = history_of(run_dir)
    train = [record for record in records if isinstance(record, TrainRecord)]
    losses = training_losses(records)
    return Summary(
        run_dir,
        train[-1].step if train else 0,
        train[-1].steps if train else 0,
        seconds_of(records),
        Losses(losses) if losses else None,
        tuple(record for record in records if isinstance(record, EvalRecord)),
        max((record.memory_peak_bytes for record in train), default=0),
        adapter_step(records),
    )
