"""What happens between two steps: metrics to the file and the screen, checkpoints by the clock, stopping safely."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qtune.errors import TrainingError
from qtune.memory.measured.meter import Meter
from qtune.run.metrics import EvalRecord, Metric, NoteRecord, TrainRecord, append_metric, grouped


def after_divergence(checkpoints: Sequence[Path]) -> str:
    """What to do about it; a checkpoint to go on from is named only where there is one."""
    advice = "Lower training.learning_rate or raise training.warmup, and begin again"
    return f"{advice}; {checkpoints[-1]} was saved before" if checkpoints else advice


Show = Callable[[Metric], None]


class Metrics(TrainerCallback):
    """Writes metrics.jsonl, and shows each record as it is written."""

    def __init__(self, file: Path, show: Show, meter: Meter, checkpoints: Callable[[], Sequence[Path]] = tuple) -> None:
        """`checkpoints` are those that are complete, oldest first, whenever it is called."""
        self.file = file
        self.show = show
        self.meter = meter
        self.checkpoints = checkpoints
        self.began = time.monotonic()
        self._rows: tuple[Sequence[float], Sequence[int]] = ((), ())

    def take_rows(self, losses: Sequence[float], tokens: Sequence[int]) -> None:
        """Keeps the validation rows' summed losses and scored tokens for the record of their evaluation."""
        self._rows = losses, tokens

    def note(self, message: str) -> None:
        """Records something that happened."""
        self._write(NoteRecord(message, self._seconds()))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        logs = logs or {}
        where = (state.global_step, state.max_steps, round(state.epoch or 0.0, 4), self._seconds())
        if "eval_loss" in logs:
            means = float(logs["eval_loss"]), float(logs["eval_accuracy"])
            self._write(EvalRecord(*where, *means, *grouped(*self._rows)))
        elif "loss" in logs:
            now, peak = memory_now(self.meter)
            record = TrainRecord(
                *where,
                loss=float(logs["loss"]),
                accuracy=float(logs.get("accuracy", 0.0)),
                learning_rate=float(logs["learning_rate"]),
                gradient_norm=float(logs.get("grad_norm", 0.0)),
                tokens_per_second=round(logs["tokens_per_second"], 1),
                memory_bytes=now,
                memory_peak_bytes=peak,
                step_seconds=round(logs["step_seconds"], 4),
                predicted_step_seconds=_rounded(logs.get("predicted_step_seconds")),
            )
            self._write(record)
            if not record.is_finite:
                raise TrainingError(
                    f"the loss is {record.loss} at step {record.step}: training has diverged. "
                    f"{after_divergence(self.checkpoints())}"
                )

    def _seconds(self) -> float:
        return round(time.monotonic() - self.began, 2)

    def _write(self, record: Metric) -> None:
        append_metric(self.file, record)
        self.show(record)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def memory_now(meter: Meter) -> tuple[int, int]:
    """(bytes now, bytes at peak): the allocator's on CUDA, the process's resident set on a CPU."""
    if torch.cuda.is_available():
        peaks = [phase.allocated_peak_bytes for phase in meter.phases.values()]
        return torch.cuda.memory_allocated(), max([torch.cuda.max_memory_allocated(), *peaks])
    peaks = [phase.resident_peak_bytes for phase in meter.phases.values()]
    now = psutil.Process().memory_info().rss
    return now, max([now, *peaks])


class Intervals(TrainerCallback):
    """A checkpoint brings back the intervals of logging, evaluating and saving that it was made under.

    transformers 5.23 reads them from there (`DefaultFlowCallback`) and only warns where the arguments say otherwise.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)
        state.train_batch_size = args.per_device_train_batch_size


class OptimizerPhase(TrainerCallback):
    """Tells the meter which step begins, and where the optimizer's phase begins and ends."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.meter.watch(kwargs["model"], kwargs.get("optimizer"))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.step = state.global_step + 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.meter.enter("optimizer")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.enter("idle")


class CheckpointClock(TrainerCallback):
    """Asks for a checkpoint when the last one is older than some minutes."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.last = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if time.monotonic() - self.last >= self.seconds:
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.last = time.monotonic()


class StopOnSignal(TrainerCallback):
    """Ctrl-C or a SIGTERM ends the run after the step, with a checkpoint; a second one ends it at once."""

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.requested = False
        self.on_request = on_request

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals while training runs, and gives them back."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.on_request()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        # The epoch "ends" because the run stops: its checkpoint is written, and nobody waits for an evaluation, which
        # is made up for on resuming. A run that has taken its last step is done and ends like any other.
        if self.requested and state.global_step < state.max_steps:
            control.should_evaluate = False
            control.should_save = False
        return control
