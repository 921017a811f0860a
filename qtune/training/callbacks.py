"""What happens between two steps: metrics to the file and the screen, checkpoints by the clock, stopping safely."""

import errno
import itertools
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qtune.errors import RunError, TrainingError
from qtune.memory.measured.meter import Meter
from qtune.model.checkpointed import checkpoint_first, free_inputs
from qtune.run.folder import RunDir
from qtune.run.metrics import (
    AnswersRecord,
    EvalRecord,
    Metric,
    NoteRecord,
    SampleAnswer,
    TrainRecord,
    append_metric,
    grouped,
    read_metrics,
)
from qtune.run.resolved import resolved_recipe
from qtune.run.resumption import resuming
from qtune.training.outcome import NO_GRADIENT, OVERFLOW
from qtune.training.outliers import Outliers
from qtune.tuned.evaluation import leaves_out


def after_divergence(checkpoints: Sequence[Path]) -> str:
    """What to do about it; a checkpoint to go on from is named only where there is one."""
    advice = "Lower training.learning_rate or raise training.warmup, and begin again"
    if not checkpoints:
        return advice
    # The folder of a run holds "checkpoints", which holds them.
    run_dir = RunDir(checkpoints[-1].parents[1])
    saved = f"{advice}; {checkpoints[-1]} was saved before"
    try:
        rate = resolved_recipe(run_dir).training.learning_rate
    except RunError:  # somebody has moved it
        return saved
    if not isinstance(rate, float):
        return saved
    command = resuming(run_dir, "--set", f"training.learning_rate={rate / 3:.1g}")
    return f"{saved}\na new run goes on from there at a third of the rate with: {command}"


ZERO_GRADIENTS = 20
"""Logged steps without any gradient after which a run ends: nothing can come of it."""

OVERFLOWS = 40
"""Steps in a row that the scaling of the loss leaves out, after which a run ends. Each halves the scale, which begins
at 2^16: after so many it is 2^-24, the smallest number that float16 has, and no smaller one is worth a try."""


Show = Callable[[Metric], None]


class Beside(Protocol):
    """Shows what is done between two steps, and which share of it is done."""

    def __call__(self, what: str, share: float | None = None) -> None: ...


class Metrics(TrainerCallback):
    """Writes metrics.jsonl, and shows each record as it is written."""

    def __init__(
        self,
        file: Path,
        show: Show,
        meter: Meter,
        checkpoints: Callable[[], Sequence[Path]] = tuple,
        batch: Callable[[int], str] = "the rows of step {}".format,
        *,
        scales_loss: bool = False,
        beside: Beside = lambda what, share=None: None,
    ) -> None:
        """`checkpoints` are those that are complete, oldest first, whenever it is called; `batch` the rows of a step,
        in words. scales_loss: an infinite gradient is left out by the scaling of the loss. beside: shows what is done
        between two steps and recorded nowhere.
        """
        self.file = file
        self.show = show
        self.beside = beside
        self.meter = meter
        self.checkpoints = checkpoints
        self.began = time.monotonic()
        self._waiting: deque[Metric] = deque()
        self.batch = batch
        self.scales_loss = scales_loss
        taken = [one for one in read_metrics(file) if isinstance(one, TrainRecord)]
        self.outliers = Outliers((one.loss, one.gradient_norm) for one in taken)
        self._without_gradient = 0
        self._overflows = sum(1 for _ in itertools.takewhile(_overflowed, reversed(taken)))
        """Steps in a row, up to the last one, whose gradient was left out by the scaling of the loss."""
        self._rows: tuple[Sequence[float], Sequence[int]] = ((), ())
        self._evaluation: EvalRecord | None = None
        self.seen: Sequence[bool | None] = ()
        """Of each validation row: whether training saw its prompt; None where that is not known. Empty: of none."""

    def settle(self) -> None:
        """Writes the records that wait. Each is taken out before it is written, for a signal may come in between, and
        its handler writes those that wait by itself.

        Raises:
            OSError: they still cannot.
        """
        while True:
            try:
                record = self._waiting.popleft()
            except IndexError:
                return
            try:
                append_metric(self.file, record)
            except OSError:
                self._waiting.appendleft(record)
                raise

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Whoever goes on from a checkpoint goes on with the records up to it.
        self.settle()

    def take_rows(self, losses: Sequence[float], tokens: Sequence[int]) -> None:
        """Keeps the validation rows' summed losses and scored tokens for the record of their evaluation."""
        self._rows = losses, tokens

    def take_norm(self, norm: float | Tensor, step: int) -> None:
        """Counts the steps that the scaling of the loss leaves out, whether they are logged or not. Where nothing is
        scaled the norm is not read, for which a card would be waited for.

        Raises:
            TrainingError: so many in a row that no scale is left to try.
        """
        if not self.scales_loss:
            return
        self._overflows = 0 if math.isfinite(float(norm)) else self._overflows + 1
        if self._overflows >= OVERFLOWS:
            self.note(f"the gradient norm is {float(norm)} at step {step}, with {self.batch(step)}")
            raise TrainingError(OVERFLOW.format(steps=f"in each of the last {OVERFLOWS} steps, up to step {step}"))

    def judged(self, loss: float) -> float:
        """The last evaluation's loss of the rows that training has not seen; `loss`, that of all, where there was no
        evaluation."""
        return loss if self._evaluation is None else self._evaluation.judged_loss

    def _of_unseen_rows(self, record: EvalRecord) -> EvalRecord:
        """The record of an evaluation with its rows' losses, those left out that training saw."""
        losses, tokens = self._rows
        seen = self.seen or [False] * len(losses)
        out = leaves_out(seen, tokens)
        kept = [(loss, count) for loss, count, is_out in zip(losses, tokens, out, strict=True) if not is_out]
        groups, group_tokens = grouped([loss for loss, _ in kept], [count for _, count in kept])
        return replace(
            record,
            group_losses=groups,
            group_tokens=group_tokens,
            left_out=sum(out),
            are_seen=any(seen) and not any(out),
            is_seen_unknown=None in seen,
        )

    def note(
        self,
        message: str,
        adapter_step: int | None = None,
        ended_step: int | None = None,
        *,
        diverged: bool = False,
    ) -> None:
        """Records something that happened; the others as in the record."""
        self._write(NoteRecord(message, self._seconds(), adapter_step, ended_step, diverged))

    def answered(self, state: TrainerState, answers: Sequence[SampleAnswer]) -> None:
        """Records what the model says to the sampled rows."""
        where = (state.global_step, state.max_steps, round(state.epoch or 0.0, 4), self._seconds())
        self._write(AnswersRecord(*where, tuple(answers)))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        logs = logs or {}
        where = (state.global_step, state.max_steps, round(state.epoch or 0.0, 4), self._seconds())
        if "eval_loss" in logs:
            means = float(logs["eval_loss"]), float(logs["eval_accuracy"])
            self._evaluation = self._of_unseen_rows(EvalRecord(*where, *means))
            self._write(self._evaluation)
            self._require_finite_evaluation(state.global_step, means[0])
        elif "loss" in logs:
            now, peak = memory_now(self.meter)
            outlier = self.outliers.add(float(logs["loss"]), float(logs.get("grad_norm", 0.0)))
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
                outlier=outlier,
                skipped="skipped" in logs,
            )
            self._write(record)
            if outlier is not None:
                self.note(f"step {record.step} stands out, {outlier}: {self.batch(record.step)}")
            self._require_sound(record)

    def _require_sound(self, record: TrainRecord) -> None:
        """Ends a run of whose step a number is none, or that has had no gradient for long."""
        self._without_gradient = 0 if record.gradient_norm else self._without_gradient + 1
        if self._without_gradient >= ZERO_GRADIENTS:
            raise TrainingError(NO_GRADIENT.format(steps=f"in the last {ZERO_GRADIENTS} logged steps"))
        what = f"the loss is {record.loss}" if not record.is_finite else ""
        if not what and not math.isfinite(record.gradient_norm) and not self.scales_loss:
            what = f"the gradient norm is {record.gradient_norm}"
        if not what:
            return
        self.note(f"{what} at step {record.step}, with {self.batch(record.step)}")
        if record.step == 1:
            raise TrainingError(
                f"{what} at step 1, before any weight was changed: no learning rate has done that. Look at "
                f"{self.batch(1)}, or compute in another type (quantization.compute_dtype)"
            )
        raise TrainingError(
            f"{what} at step {record.step}: training has diverged. {after_divergence(self.checkpoints())}"
        )

    def _require_finite_evaluation(self, step: int, loss: float) -> None:
        """Ends a run whose validation gives no number, and says whether that is due to a few rows or to all of them."""
        if math.isfinite(loss):
            return
        losses = self._rows[0]
        broken = [number for number, one in enumerate(losses, 1) if not math.isfinite(one)]
        if broken and len(broken) < len(losses):
            shown = ", ".join(map(str, broken[:8])) + (f" and {len(broken) - 8} more" if len(broken) > 8 else "")
            raise TrainingError(
                f"the validation loss is {loss} after step {step}: validation rows {shown} of {len(losses)} give no "
                "number, and the others do. Look at them, or compute in another type (quantization.compute_dtype)"
            )
        if step == 0:
            raise TrainingError(
                f"the validation loss is {loss} before any weight was changed: no learning rate has done that. Look at "
                "the validation rows and at the base, or compute in another type (quantization.compute_dtype)"
            )
        raise TrainingError(
            f"the validation loss is {loss} after step {step}: training has diverged. "
            f"{after_divergence(self.checkpoints())}"
        )

    def _seconds(self) -> float:
        return round(time.monotonic() - self.began, 2)

    def _write(self, record: Metric) -> None:
        self._waiting.append(record)
        self.show(record)
        try:
            self.settle()
        except OSError as error:  # a disk that is full for a while stops no training
            if error.errno in (errno.ENOENT, errno.ENOTDIR):  # the run's folder is gone, and all that was saved in it
                raise
            if len(self._waiting) == 1:
                reason = error.strerror or error
                self.show(NoteRecord(f"{self.file} cannot be written ({reason}); its records wait in memory"))


def _overflowed(record: TrainRecord) -> bool:
    return not math.isfinite(record.gradient_norm)


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


class CheckpointedLayers(TrainerCallback):
    """Leaves gradient checkpointing, which transformers turns on in all layers, on in those that the plan says."""

    def __init__(self, layers: bool | int) -> None:
        self.layers = layers

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.layers:
            checkpoint_first(kwargs["model"], self.layers)
            free_inputs(kwargs["model"])


class PeakRate(TrainerCallback):
    """A checkpoint brings back the learning rate that it was made under; a run that goes on at a lower one has its own.

    torch's schedulers keep the peak in `base_lrs`, and each group of the optimizer in "initial_lr".
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        schedule, optimizer = kwargs.get("lr_scheduler"), kwargs.get("optimizer")
        if schedule is None or optimizer is None:
            return
        for number, group in enumerate(optimizer.param_groups):
            before = schedule.base_lrs[number]
            if before != self.rate:
                group["lr"] *= self.rate / before
                group["initial_lr"] = schedule.base_lrs[number] = self.rate
                schedule._last_lr[number] = group["lr"]


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
    """Ctrl-C, SIGTERM or a closed terminal ends the run after the step, with a checkpoint; a second one at once."""

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.requested = False
        self.on_request = on_request

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals while training runs, and gives them back."""
        # `nohup` has asked for the run to go on when the terminal is closed.
        numbers = [signal.SIGINT, signal.SIGTERM]
        numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with suppress(OSError):
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
        # is made up for on resuming. One that is asked for after the epoch's last step stops here: a checkpoint of the
        # next step would no longer be owed that evaluation. A run that has taken its last step is done and ends like
        # any other.
        if self.requested and state.global_step < state.max_steps:
            control.should_evaluate = False
            control.should_save = not control.should_training_stop
            control.should_training_stop = True
        return control
