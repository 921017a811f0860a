"""What a run has come to, in the few figures that its end shows; read off metrics.jsonl."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from qtune.run.folder import RunDir
from qtune.run.history import history_of
from qtune.run.metrics import EvalRecord, Metric, NoteRecord, TrainRecord, adapter_step, ended_step, seconds_of

START = 20
"""Logged steps that are taken for the start of a long run: most is learned early, and a mean over more would not show
it."""
LEAST = 5
"""Logged steps that make a start and an end, as far as there are as many: with fewer no interval is given."""
NEIGHBOURS = 3
"""Logged steps in a row that show that a loss has broken out: one batch may be a hard one, and another."""
OUTBREAK = 2.0
"""Nats per token above its beginning: a likelihood of each token below a seventh."""


@dataclass(frozen=True)
class Losses:
    """The logged training losses of a run in their order, in nats per token.

    What a run's training loss was at its end is asked here and nowhere else. One batch is easier than another, so it is
    a mean: of the last tenth of the logged steps, of LEAST at least, and never of more than half of them.
    """

    values: Sequence[float]
    """Those that are numbers."""
    has_diverged: bool = False
    """Whether the last one is none."""

    @property
    def first(self) -> Sequence[float]:
        """Those that make the start: as many as make the end, START at most."""
        return self.values[: min(self.count, START)]

    @property
    def last(self) -> Sequence[float]:
        """Those that make the end."""
        return self.values[-self.count :]

    @property
    def start(self) -> float:
        """The training loss that the run began with."""
        return fmean(self.first)

    @property
    def end(self) -> float:
        """The training loss that it ended with; NaN where it has diverged."""
        return math.nan if self.has_diverged else fmean(self.last)

    @property
    def outbreak(self) -> float | None:
        """How high the loss has stood for NEIGHBOURS logged steps, where that is twice the first logged one and
        OUTBREAK above it; None where it has not: batches differ, and by so much they do not."""
        if len(self.values) <= NEIGHBOURS:
            return None
        highest = max(min(self.values[at : at + NEIGHBOURS]) for at in range(1, len(self.values) - NEIGHBOURS + 1))
        return highest if highest >= max(2 * self.values[0], self.values[0] + OUTBREAK) else None

    @property
    def count(self) -> int:
        """How many make the end."""
        return max(1, min(max(LEAST, len(self.values) // 10), len(self.values) // 2))

    @property
    def text(self) -> str:
        """From what to what it went, and what these are."""
        return f"{number(self.start)} -> {number(self.end)} ({self.taken_over})"

    @property
    def taken_over(self) -> str:
        """Of what the start and the end are means, in words."""
        first, last = len(self.first), len(self.last)
        if len(self.values) == 1:
            return "the only logged step"
        if last == 1:
            return "first and last logged step"
        return f"means of the first {'' if first == last else f'{first} '}and the last {last} logged steps"


def number(loss: float) -> str:
    """A loss with three digits: "2.37", "1.00", "0.00572"."""
    return f"{loss:#.3g}".rstrip(".") if math.isfinite(loss) else "no number"


def training_losses(records: Sequence[Metric]) -> Losses | None:
    """The training losses among the records of a run; None where none of them is a number."""
    train = [record for record in records if isinstance(record, TrainRecord)]
    finite = [record.loss for record in train if record.is_finite]
    return Losses(finite, not train[-1].is_finite) if finite else None


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
    ended_step: int | None = None
    """The step after which the run has ended, where it was to take more."""
    reached: int = 0
    """The last step of any record: not each is logged."""
    epoch: float = 0.0
    """Passes over the rows when `step` was logged."""

    @property
    def steps_taken(self) -> str:
        """Of a run that has ended, in words: "12 steps", or "2 of 12 steps"."""
        taken = "" if self.ended_step is None else f"{self.ended_step:,} of "
        return f"{taken}{self.steps:,} steps"

    @property
    def best(self) -> EvalRecord | None:
        """The evaluation with the lowest loss of the rows that training has not seen, the earliest of equal ones; None
        where there was none."""
        finite = [one for one in self.validation if not math.isnan(one.judged_loss)]
        return min(finite, key=lambda one: (one.judged_loss, one.step), default=None)


def summary_of(run_dir: RunDir) -> Summary:
    """Reads the figures of a run.

    Raises:
        RunError: metrics.jsonl is damaged.
    """
    records = history_of(run_dir)
    train = [record for record in records if isinstance(record, TrainRecord)]
    return Summary(
        run_dir,
        train[-1].step if train else 0,
        train[-1].steps if train else 0,
        seconds_of(records),
        training_losses(records),
        tuple(record for record in records if isinstance(record, EvalRecord)),
        max((record.memory_peak_bytes for record in train), default=0),
        adapter_step(records),
        ended_step(records),
        max((record.step for record in records if not isinstance(record, NoteRecord)), default=0),
        train[-1].epoch if train else 0.0,
    )
