"""What a process beside the leader does in a run: the same steps on its share of the rows, no file and no word.

The leader's own story is `training/train.py`. The places at which all processes meet come in the same order in both:
the course, the rows, how training begins, the trainer, its steps, the end.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from qtune import console
from qtune.errors import Interrupted, PeerLostError, QtuneError, SaidElsewhere
from qtune.memory.measured.meter import Meter
from qtune.plan import Plan
from qtune.recipe.file import Resolved
from qtune.run.checkpoints import step_of
from qtune.run.folder import RunDir
from qtune.run.metrics import Metric
from qtune.training.build import build_model, make_trainer
from qtune.training.callbacks import Metrics, StopOnSignal
from qtune.training.depends import base_now
from qtune.training.inputs import Inputs, gather
from qtune.training.ranks import Ranks
from qtune.training.rehearsal import rehearse

LOOKED_AT = 16
"""Rows of each split whose tokens are compared."""


@dataclass(frozen=True)
class Course:
    """What the leader has decided before a weight is read."""

    run_dir: RunDir
    plan: Plan
    checkpoint: Path | None


@dataclass(frozen=True)
class Beginning:
    """What the leader has decided before the first step."""

    evaluates_first: bool
    rehearses: bool
    takes_steps: bool
    """Whether there is a step left to take."""


def rows_seen(inputs: Inputs) -> str:
    """A digest of the rows, as their lengths and the tokens of some show them."""
    prepared = inputs.prepared
    digest = hashlib.sha256(np.ascontiguousarray(prepared.lengths).tobytes())
    for place in range(0, len(prepared.train), max(1, len(prepared.train) // LOOKED_AT)):
        digest.update(np.asarray(prepared.row(place)["input_ids"]).tobytes())
    if (rows := prepared.validation) is not None:
        for place in range(0, len(rows), max(1, len(rows) // LOOKED_AT)):
            digest.update(np.asarray(rows[place]["input_ids"]).tobytes())
    return digest.hexdigest()


def require_same_files(ranks: Ranks, inputs: Inputs) -> None:
    """Refuses processes that have read other rows, or would train on another base.

    Raises:
        InputError: in the leader, which says it. SaidElsewhere: in the others.
    """
    if ranks.are_several:
        ranks.require_alike("the rows", rows_seen(inputs))
        ranks.require_alike("the base's files", base_now(inputs))


@contextmanager
def ending_together(ranks: Ranks) -> Iterator[None]:
    """The leader's errors before it tells the course are the end of the others, which wait for that."""
    try:
        yield
    except QtuneError as error:
        ranks.told(SaidElsewhere(error.exit_code))
        raise


def follow(ranks: Ranks, resolved_of: Callable[[], Resolved], accepted: Sequence[str] = ()) -> RunDir:
    """Takes every step of a run with its leader. resolved_of: the recipe, read once the leader has found it right.

    Raises:
        SaidElsewhere: the leader did not come to the run's end, or was asked to stop before it.
        InputError, WorkError: something is wrong with this process alone.
    """
    try:
        course: Course | SaidElsewhere = ranks.heard()
        if isinstance(course, SaidElsewhere):
            raise course
        inputs = gather(resolved_of(), course.run_dir, accepted=accepted)
        plan = replace(course.plan, device=inputs.plan.device)
        # The leader alone compares with the predicted time and tells trackers.
        inputs = replace(inputs, plan=plan, time=None, resolved=_without_trackers(inputs))
        require_same_files(ranks, inputs)
        _follow(ranks, inputs, course)
        if not ranks.heard():
            raise SaidElsewhere(Interrupted.exit_code)
    except PeerLostError as error:
        raise SaidElsewhere from error
    return course.run_dir


def _follow(ranks: Ranks, inputs: Inputs, course: Course) -> None:
    meter = Meter(torch.device(inputs.plan.device.torch_name))
    try:
        model, tiled = build_model(inputs, after=step_of(course.checkpoint) if course.checkpoint else 0)
        beginning: Beginning = ranks.heard()
        stop = StopOnSignal(lambda: None)
        metrics = Unwritten(course.run_dir.metrics_file, lambda record: None, meter)
        trainer = make_trainer(
            inputs,
            course.run_dir,
            model,
            tiled,
            metrics,
            stop,
            evaluate_first=beginning.evaluates_first,
            ranks=ranks,
        )
        if beginning.rehearses:
            rehearse(trainer, inputs, course.run_dir)
        if not beginning.takes_steps:
            assert course.checkpoint is not None
            trainer.take_state_of(course.checkpoint)
            return
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(course.checkpoint) if course.checkpoint else None)
    finally:
        meter.close()
        inputs.prepared.close()


class Unwritten(Metrics):
    """Takes what a trainer tells, and writes nothing; what happens in this process alone is said."""

    def note(self, message: str, *_: object, **__: object) -> None:
        """Says what the user should know of this process, as memory that ran out."""
        console.say_of_process(message)

    def on_log(self, *_: object, **__: object) -> None:
        """The leader records the step."""

    def _write(self, record: Metric) -> None:
        """Nothing: the leader writes."""


def _without_trackers(inputs: Inputs) -> Resolved:
    """The recipe as it is, but for trackers, which are told by the leader."""
    recipe = inputs.recipe
    training = recipe.training.model_copy(update={"trackers": ()})
    return replace(inputs.resolved, recipe=recipe.model_copy(update={"training": training}))
