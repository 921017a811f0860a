"""What happens between two steps: metrics to the file and the screen, checkpoints by the clock, stopping safely."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qtune.errors import TrainingError
from qtune.memory.measured.meter import Meter
from qtune.run.folder import write_atomically

AFTER_DIVERGENCE = "Lower training.learning_rate or raise training.warmup, and go on from the last checkpoint"

Show = Callable[[dict[str, Any]], None]


class Metrics(TrainerCallback):
    """Writes metrics.jsonl, one record per line, and shows each record as it is written.

    A record has a `kind`: "train" (loss, accuracy, learning_rate, gradient_norm, tokens_per_second, step_seconds,
    predicted_step_seconds where it is known, memory_bytes, memory_peak_bytes), "eval" (loss, accuracy) or "note"
    (message); and step, steps, epoch, seconds since the start.
    """

    def __init__(self, file: Path, show: Show, meter: Meter) -> None:
        self.file = file
        self.show = show
        self.meter = meter
        self.began = time.monotonic()

    def note(self, message: str) -> None:
        """Records something that happened."""
        self._write({"kind": "note", "message": message})

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        logs = logs or {}
        where = {"step": state.global_step, "steps": state.max_steps, "epoch": round(state.epoch or 0.0, 4)}
        if "eval_loss" in logs:
            self._write({"kind": "eval", **where, "loss": logs["eval_loss"], "accuracy": logs["eval_accuracy"]})
        elif "loss" in logs:
            now, peak = memory_now(self.meter)
            self._write(
                {
                    "kind": "train",
                    **where,
                    "loss": logs["loss"],
                    "accuracy": logs.get("accuracy", 0.0),
                    "learning_rate": logs["learning_rate"],
                    "gradient_norm": logs.get("grad_norm", 0.0),
                    "tokens_per_second": round(logs["tokens_per_second"], 1),
                    **{
                        name: round(logs[name], 4)
                        for name in ("step_seconds", "predicted_step_seconds")
                        if name in logs
                    },
                    "memory_bytes": now,
                    "memory_peak_bytes": peak,
                }
            )
            if not math.isfinite(logs["loss"]):
                raise TrainingError(
                    f"the loss is {logs['loss']} at step {state.global_step}: training has diverged. {AFTER_DIVERGENCE}"
                )

    def _write(self, record: dict[str, Any]) -> None:
        record["seconds"] = round(time.monotonic() - self.began, 2)
        # JSON has no NaN: null is what a reader in any language understands.
        written = {
            key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in record.items()
        }
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(written) + "\n")
        self.show(record)


def forget_after(file: Path, step: int) -> None:
    """Removes the records of steps that a resumed run will take again."""
    if not file.is_file():
        return
    records = [line for line in file.read_text(encoding="utf-8").splitlines() if _is_kept(line, step)]
    write_atomically(file, "".join(line + "\n" for line in records))


def has_evaluation(file: Path, step: int) -> bool:
    """Whether a metrics file has the evaluation of a step."""
    records = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()
    return any(record["kind"] == "eval" and record["step"] == step for record in records)


def _is_kept(line: str, step: int) -> bool:
    try:
        return int(json.loads(line).get("step", 0)) <= step
    except ValueError:  # the last line of a killed run
        return False


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
