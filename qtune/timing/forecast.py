"""How long a step, an epoch and the whole run will take on a device, before anything is downloaded.

The recipe's step is traced at the length of the mean micro-batch and at that of the longest one; what lies between is
on a line through both, for work grows with length nearly so. A step is all of its micro-batches and one update.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qtune.data.batches import StepSampler
from qtune.device.rates import source_in_words
from qtune.errors import ModelError
from qtune.memory.cached import traced_work
from qtune.memory.predict import Longest
from qtune.memory.tracing.categories import GRADIENTS
from qtune.memory.tracing.work import from_rows
from qtune.model.geometry import load_geometry
from qtune.timing.known import beside_here, known_rates
from qtune.timing.price import Cost, Duration, cost_by, duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PretrainedConfig

    from qtune.device.rates import Rates
    from qtune.memory.forecast import Forecast
    from qtune.memory.longest import RowLengths, Rows
    from qtune.memory.predict import Prediction
    from qtune.memory.tracing.work import Work
    from qtune.plan import Plan
    from qtune.recipe.schema import Recipe


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepModel:
    """What a step takes by the padded lengths of its micro-batches: a line through two lengths that were traced."""

    near: int
    far: int
    """Tokens of a row; the same where all micro-batches are of one length."""
    at_near: Cost
    at_far: Cost
    """Of one micro-batch of that length."""
    update: Cost
    rates: Rates

    def seconds(self, lengths: Sequence[int] | NDArray[np.int64]) -> float:
        """Of one step."""
        return float(self.seconds_of_steps(np.asarray(lengths), len(lengths))[0])

    def seconds_of_steps(self, lengths: NDArray[np.int64], each: int) -> NDArray[np.float64]:
        """Of steps of `each` micro-batches whose lengths follow one another; the last step may have fewer."""
        starts = np.arange(0, len(lengths), each)
        device = np.add.reduceat(self._line(lengths, self.at_near.seconds, self.at_far.seconds), starts)
        ends = (self.at_near.processor_seconds(self.rates), self.at_far.processor_seconds(self.rates))
        launching = np.add.reduceat(self._line(lengths, *ends), starts)
        processor = launching + self.update.processor_seconds(self.rates)
        device = np.maximum(device + self.update.seconds, max(self.at_near.beside, self.at_far.beside))
        together = np.add if self.rates.is_own_processor else np.maximum
        found: NDArray[np.float64] = together(device, processor)
        return found

    def _line(self, lengths: NDArray[np.int64], at_near: float, at_far: float) -> NDArray[np.float64]:
        """Nothing takes less than no time."""
        slope = (at_far - at_near) / (self.far - self.near) if self.far > self.near else at_far / self.far
        return np.maximum(at_near + slope * (lengths - self.near), 0.0)


@dataclass(frozen=True)
class TimeForecast:
    """How long training will take. Loading, sample answers, checkpoints and what the first step takes longer are not in
    it."""

    kind: str
    """Of the rates: "data sheet" or "measured"."""
    source: str
    """In words: whose rates, from where, when."""
    model: StepModel
    longest_step: Duration
    """A step whose micro-batches are all as large as the largest."""
    step_seconds: float
    """The mean step of an epoch."""
    tokens_per_second: float
    """Tokens of the rows, padding not counted."""
    steps_per_epoch: int | None
    """None, as all that follows, where the rows are not known."""
    steps: int | None
    epoch_seconds: float | None
    run_seconds: float | None
    """Steps and evaluations."""
    processes: int = 1
    """How many share each step, each with such a device."""
    between_seconds: float = 0.0
    """Of each step, in which they add up their gradients."""
    evaluation_seconds: float | None = None
    """Of `run_seconds`, for all evaluations; None where the rows are not known."""

    def seconds_after(self, step: int) -> float | None:
        """What is left of the run after a step, evaluations in proportion; None where the rows are not known, and after
        its last step."""
        if self.run_seconds is None or not self.steps or step >= self.steps:
            return None
        return self.run_seconds * (self.steps - step) / self.steps

    def to_json(self) -> dict[str, Any]:
        """Plain values: what is shown."""
        names = ("kind", "source", "step_seconds", "tokens_per_second", "steps_per_epoch", "steps", "epoch_seconds")
        step = {**asdict(self.longest_step), "seconds": self.longest_step.seconds}
        return {
            **{name: getattr(self, name) for name in names},
            "run_seconds": self.run_seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "processes": self.processes,
            "between_seconds": self.between_seconds,
            "longest_step": step,
        }


def time_of(config: PretrainedConfig, recipe: Recipe, forecast: Forecast) -> TimeForecast | None:
    """How long the run of a forecast takes on the forecast's device; None where no rates of it are known.

    Raises:
        ModelError: as the forecast itself.
    """
    rates = known_rates(forecast.plan.device)
    if rates is None:
        return None
    plan, rows = forecast.plan, forecast.rows
    if rows.data is None:
        return _of_one_length(recipe, plan, rows.longest.length, forecast.prediction, rates)
    return _of_data(config, recipe, plan, rows, rows.data, forecast.prediction, rates)


def attempted_time(recipe: Recipe, forecast: Forecast | str | None) -> TimeForecast | None:
    """`time_of` a forecast; None where there is none, or its other rows cannot be traced: nothing depends on it."""
    if forecast is None or isinstance(forecast, str) or known_rates(forecast.plan.device) is None:
        return None
    try:
        return time_of(load_geometry(recipe.model), recipe, forecast)
    except ModelError:
        log.debug("the time could not be predicted", exc_info=True)
        return None


def step_duration(prediction: Prediction, plan: Plan, rates: Rates) -> Duration:
    """A whole step of micro-batches like the one that was traced."""
    between = between_seconds(prediction, plan, rates)
    return _Step.of(from_rows(prediction.work), rates, between).duration(plan.accumulation_steps, rates)


def between_seconds(prediction: Prediction, plan: Plan, rates: Rates) -> float:
    """What adding up the gradients takes that several processes have of one step; nothing for one.

    In a ring each sends 2 (N - 1) / N of the bytes (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce
    algorithms"), here at the rate of the bus between a card and its host. Cards with a link of their own need less;
    over a network between computers it takes more.
    """
    processes = plan.device.processes
    gradients = max(prediction.timeline.get(GRADIENTS, [0]))
    return 2 * (processes - 1) / processes * gradients / rates.host_link


def step_of(config: PretrainedConfig, recipe: Recipe, plan: Plan, longest: Longest) -> Duration | None:
    """A whole step of such rows under any plan, for comparing plans; None where no rates of its device are known.

    Raises:
        ModelError: the step cannot be traced.
    """
    rates = known_rates(plan.device)
    if rates is None:
        return None
    return _Step.of(traced_work(config, recipe, plan, longest), rates).duration(plan.accumulation_steps, rates)


@dataclass(frozen=True)
class _Step:
    """What one micro-batch, one update and one batch of an evaluation cost."""

    micro_batch: Cost
    update: Cost
    evaluation: Cost

    @classmethod
    def of(cls, work: Work, rates: Rates, between: float = 0.0) -> _Step:
        """between: seconds in which processes add up their gradients, before the update."""
        costs = cost_by(work, rates, lambda place, kernel: place.phase)
        found = {phase: costs.get(phase, Cost()) for phase in ("forward", "backward", "optimizer", "eval")}
        return cls(found["forward"] + found["backward"], found["optimizer"] + Cost(seconds=between), found["eval"])

    def duration(self, micro_batches: int, rates: Rates) -> Duration:
        return duration([self.micro_batch] * micro_batches + [self.update], rates)


def _of_one_length(recipe: Recipe, plan: Plan, length: int, prediction: Prediction, rates: Rates) -> TimeForecast:
    """Every row as long as the longest, for nothing is known of them."""
    between = between_seconds(prediction, plan, rates)
    step = _Step.of(from_rows(prediction.work), rates, between)
    estimate = step.duration(plan.accumulation_steps, rates)
    tokens = recipe.training.batch_size * length
    steps = recipe.training.steps
    return TimeForecast(
        rates.kind,
        source_in_words(rates, beside_here()),
        StepModel(length, length, step.micro_batch, step.micro_batch, step.update, rates),
        estimate,
        estimate.seconds,
        tokens / estimate.seconds,
        None,
        steps,
        None,
        None if steps is None else steps * estimate.seconds,
        plan.device.processes,
        between,
    )


def _of_data(
    config: PretrainedConfig,
    recipe: Recipe,
    plan: Plan,
    rows: Rows,
    data: RowLengths,
    prediction: Prediction,
    rates: Rates,
) -> TimeForecast:
    """The steps of the first epoch, each with its own micro-batches."""
    training, micro = recipe.training, plan.micro_batch_size
    processes, between = plan.device.processes, between_seconds(prediction, plan, rates)
    # The leader's share: the first of every so many, of every step, which is never fewer than another's.
    padded = _micro_batches(data.train, micro, training.batch_size, training.seed)[::processes]
    mean, longest = int(np.ceil(padded.mean())), int(padded.max())

    def at(length: int) -> _Step:
        scored = max(1, int(np.ceil(data.scored_share * length)))
        same = Longest(length, scored, rows.longest.equal, rows.longest.evaluated)
        return _Step.of(traced_work(config, recipe, plan, same), rates, between)

    near, far = at(mean), at(longest)
    model = StepModel(mean, longest, near.micro_batch, far.micro_batch, far.update, rates)
    epoch_seconds = float(model.seconds_of_steps(padded, plan.accumulation_steps).sum())
    # Where the rows stand for more, their epoch is a part of the whole one.
    of_some = data.rows / len(data.train)
    epoch_seconds *= of_some
    steps_per_epoch = -(-data.rows // training.batch_size)
    steps = training.steps or round(training.epochs * steps_per_epoch)
    one_evaluation = _evaluation_seconds(data, rows, micro, far, rates) / processes
    evaluations = _evaluations(recipe, steps, steps_per_epoch) * one_evaluation
    return TimeForecast(
        rates.kind,
        source_in_words(rates, beside_here()),
        model,
        step_duration(prediction, plan, rates),
        epoch_seconds / steps_per_epoch,
        float(data.train.sum()) * of_some / epoch_seconds,
        steps_per_epoch,
        steps,
        epoch_seconds,
        steps * epoch_seconds / steps_per_epoch + evaluations,
        processes,
        between,
        evaluations,
    )


def _micro_batches(lengths: NDArray[np.int64], micro: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """Padded length of each micro-batch of the first epoch, in order; steps are whole numbers of them."""
    ordered = lengths[StepSampler(lengths, batch_size, seed).order()]
    return np.maximum.reduceat(ordered, np.arange(0, len(ordered), micro))


def _evaluations(recipe: Recipe, steps: int, steps_per_epoch: int) -> int:
    """How often a run goes through its validation rows."""
    every, first = recipe.training.eval_every, int(recipe.training.evaluate_first)
    if every == "never":
        return first
    return first + (-(-steps // steps_per_epoch) if every == "epoch" else steps // int(every))


def _evaluation_seconds(data: RowLengths, rows: Rows, micro: int, step: _Step, rates: Rates) -> float:
    """One evaluation: its batches, each in proportion to its padded length."""
    if not len(data.validation):
        return 0.0
    longest = rows.longest.evaluated or rows.longest.length
    padded = np.maximum.reduceat(data.validation, np.arange(0, len(data.validation), micro))
    one = duration([step.evaluation], rates)
    device = one.device_seconds * padded / longest
    together = np.add if rates.is_own_processor else np.maximum
    return float(together(device, one.processor_seconds).sum())
