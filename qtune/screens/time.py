"""How time looks on the screen: a step, an epoch, a run on a device, and what each technique costs."""

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from qtune.console import clock

if TYPE_CHECKING:
    from qtune.timing.forecast import TimeForecast
    from qtune.timing.price import Duration

UNKNOWN = "time: not known; name the card with --gpu, or measure this device: qtune doctor --measure"


def seconds(value: float) -> str:
    """ "0.44 s", "12.3 s", then "2:05" as a clock has it."""
    if value < 10:
        return f"{value:.2f} s"
    return f"{value:.1f} s" if value < 60 else clock(value)


def whole_run(forecast: "TimeForecast", run_seconds: float) -> str:
    """What the time of a run is made of, and what comes on top of it. run_seconds: the forecast's."""
    told, more = f"{seconds(run_seconds)} for the run: {forecast.steps:,} steps of {seconds(forecast.step_seconds)}", ""
    if forecast.evaluation_seconds is None:
        more = "evaluations, "
    elif forecast.evaluation_seconds:
        told += f" and {seconds(forecast.evaluation_seconds)} of evaluations"
    return f"{told}; loading, {more}sample answers and checkpoints come on top"


def draw_time(found: "TimeForecast | None") -> RenderableType:
    """What is predicted, of what, and by whose rates."""
    return Text(UNKNOWN, style="dim") if found is None else Text("\n").join(map(Text, lines(found)))


def draw_steps(steps: "list[Duration | None]") -> RenderableType:
    """A step of the recipe as it was asked for and, where it was changed, as it ended; a micro-batch that did not fit
    would have taken that time all the same."""
    known = [step.seconds for step in steps if step is not None]
    if len(known) < len(steps):
        return Text(UNKNOWN, style="dim")
    if len(known) == 1:
        return Text(f"time: {seconds(known[0])} for a step of the longest rows, predicted")
    before, after = known
    return Text(
        f"time: {seconds(after)} for a step of the longest rows, {after / before - 1:+.0%} beside {seconds(before)} "
        "as it was asked for, predicted"
    )


def lines(forecast: "TimeForecast") -> list[str]:
    """A step; the run where its rows are known; whose rates."""
    step = forecast.longest_step
    if step.is_own_processor:
        parts = f"{seconds(step.device_seconds)} of computing, {seconds(step.processor_seconds)} of launching"
    else:
        card, processor = seconds(step.device_seconds), seconds(step.processor_seconds)
        limit = "the processor" if step.waits_for_processor else "the card"
        parts = f"{card} of the card, {processor} of the processor for {step.launches:,} launches; {limit} is the limit"
    said = [f"time: {seconds(step.seconds)} for a step of the longest rows ({parts})"]
    if forecast.epoch_seconds is not None and forecast.run_seconds is not None:
        mean, epoch = map(seconds, (forecast.step_seconds, forecast.epoch_seconds))
        said.append(f"      {mean} for the mean step, {epoch} for an epoch of {forecast.steps_per_epoch:,} steps")
        said.append(f"      {whole_run(forecast, forecast.run_seconds)}")
    if forecast.processes > 1:
        between = f"{1000 * forecast.between_seconds:.1f} ms of each step for adding up their gradients over its bus"
        said.append(f"      {forecast.processes} processes, each with such a device; {between}")
    said.append(f"      {forecast.tokens_per_second:,.0f} tokens/s; predicted from {evidence(forecast)}")
    return said


def evidence(found: "TimeForecast") -> str:
    """The kind of rates, and whose."""
    return f"{'a data sheet' if found.kind == 'data sheet' else 'measured rates'}: {found.source}"
