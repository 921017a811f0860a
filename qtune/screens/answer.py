"""What `qtune profile` is asked, answered first: does it fit, how long does it take, in what way is it done."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from qtune.console import BareTable
from qtune.recipe.text import show_changes
from qtune.screens.levers import in_words
from qtune.screens.time import UNKNOWN, seconds, whole_run
from qtune.sizes import size_text, texts_apart

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qtune.memory.profile import Profile
    from qtune.plan import Plan
    from qtune.timing.forecast import TimeForecast


BESIDE_THE_PROCESS = "; the process and its libraries come on top, and a run's own figures include them"
"""Of what a step takes on a processor, whose memory has no driver's share to be counted."""


def draw_answer(profile: "Profile", time: "TimeForecast | None", *, is_timed: bool = True) -> RenderableType:
    """A line for each question. time: None where no rates of the device are known; is_timed: whether it was asked."""
    plan, rows = profile.forecast.plan, profile.forecast.rows
    often = "once" if plan.accumulation_steps == 1 else f"{plan.accumulation_steps} times"
    table = BareTable(show_header=False)
    table.add_row("does it fit?", Text(_fits(profile), style="bold"))
    if is_timed:
        table.add_row("how long?", _how_long(time))
    at_once = f"{plan.micro_batch_size} {'row' if plan.micro_batch_size == 1 else 'rows'}"
    table.add_row("in what way?", f"{at_once} of at most {rows.longest.length} tokens at once, {often} a step")
    if settled := list(_settled(plan, profile.forecast.prediction.layers)):
        table.add_row("auto chose?", "\n".join(settled))
    table.add_row("known from?", rows.known_from)
    return Group(Text(f"{profile.recipe.model.base} on {plan.device.name}", style="bold"), table)


def _settled(plan: "Plan", layers: int) -> "Iterator[str]":
    """What memory has decided where the recipe says "auto", a line each: what was given up to fit, or bought with what
    was left over. layers: that the model has."""
    is_card, values = (
        plan.device.kind == "cuda",
        {
            ("memory", "embeddings"): plan.embeddings,
            ("training", "gradient_checkpointing"): plan.gradient_checkpointing,
            ("memory", "keep_dequantized"): plan.keep_dequantized,
            ("training", "micro_batch_size"): plan.micro_batch_size,
        },
    )
    usual = ("device", False, *([plan.micro_batch_size] if not is_card or plan.accumulation_steps == 1 else []))
    for key, value in values.items():
        if key in plan.reasons and value not in usual:
            yield f"{show_changes({key: value})}: {in_words(key, value, layers)}"


def _fits(profile: "Profile") -> str:
    """The memory that is needed beside what there is. On a processor nothing is refused for want of it."""
    forecast = profile.forecast
    prediction = forecast.prediction
    if forecast.plan.device.kind != "cuda":
        peak = size_text(prediction.peak.bytes)
        free = size_text(forecast.budget_bytes)
        verdict = "Fits" if prediction.peak.bytes <= forecast.budget_bytes else "More than is free"
        took = f"a step on this processor takes {peak} at its peak, of {free} that are free"
        return f"{verdict}: {took}{BESIDE_THE_PROCESS}"
    verdict = forecast.verdict
    needed, there = texts_apart(prediction.need.total_bytes, forecast.budget_bytes)
    return f"{verdict[:1].upper()}{verdict[1:]}: {needed} needed, of {there}"


def _how_long(time: "TimeForecast | None") -> str:
    """The run where its rows are known, else a step."""
    if time is None:
        return UNKNOWN.removeprefix("time: ")
    whose = "a data sheet" if time.kind == "data sheet" else "measured rates"
    if time.run_seconds is None or time.steps is None:
        return f"{seconds(time.longest_step.seconds)} a step of the longest rows; predicted from {whose}"
    return f"{whole_run(time, time.run_seconds)}; predicted from {whose}"
