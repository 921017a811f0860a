"""How memory looks on the screen: a table by category, a stacked bar, ways compared, a run's phases, a fit's steps."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtune.device.cards import fitting_cards
from qtune.recipe.text import show_value
from qtune.screens.time import seconds
from qtune.sizes import GIB, saving_text, size_text

if TYPE_CHECKING:
    from qtune.errors import Problem
    from qtune.memory.allowance import Verdict
    from qtune.memory.fit import Fitted
    from qtune.memory.predict import Prediction
    from qtune.memory.profile import Measured, Profile
    from qtune.memory.savings import Way
    from qtune.recipe.schema import KeyPath, Recipe

BAR = 60
LETTERS = {
    "base weights 4-bit": "4",
    "base weights int8": "8",
    "base weights fp16": "6",
    "base weights bf16": "b",
    "base weights fp32": "f",
    "quantization constants": "q",
    "embeddings": "E",
    "head": "H",
    "adapter": "A",
    "gradients": "G",
    "optimizer state": "S",
    "checkpointed activations": "C",
    "activations": "V",
    "recomputed activations": "R",
    "logits and loss": "L",
    "dequantized workspace": "D",
    "other": "o",
}
"""Each category's letter in the bar: it is read without colour, in a log file too."""


StepSeconds = Callable[["Prediction"], float]
"""Seconds of a step that was traced."""


def draw_forecast(profile: "Profile") -> RenderableType:
    """What the recipe's own step takes. A CPU's memory is no card's: nothing is said of cards then."""
    found, plan, rows = profile.forecast.prediction, profile.forecast.plan, profile.forecast.rows
    is_card = plan.device.kind == "cuda"
    needed = f", {size_text(found.need.total_bytes)} needed" if is_card else ""
    title = (
        f"{profile.recipe.model.base} on {plan.device.name}: {size_text(found.peak.bytes)} traced at its peak{needed}"
    )
    often = "once" if plan.accumulation_steps == 1 else f"{plan.accumulation_steps} times"
    about = (
        f"{plan.micro_batch_size} x {rows.longest.length} tokens at once, {often} a step; "
        f"peak in {found.peak.phase}, {found.peak.module or 'outside the model'}\n"
        f"length: {rows.known_from}"
    )
    parts: list[RenderableType] = [Text(title, style="bold"), Text(about), Text(""), categories_table(found.peak.alive)]
    parts += [stacked_bar(found.peak.alive), Text(""), _need(found, profile.forecast.budget_bytes, is_card=is_card)]
    parts.append(Text(""))
    parts.append(_phases(found))
    how = f"{found.layers_executed} of {found.layers} layers executed" if found.layers_executed < found.layers else ""
    parts += [Text(""), Text(f"traced without a GPU in {found.seconds:.1f} s{', ' + how if how else ''}", style="dim")]
    if profile.refusal is not None:
        parts += [Text(""), refusal_text(profile.refusal)]
    if not is_card:
        parts.append(Text("this is the memory of a run on the processor; for a card add --gpu or --vram", style="dim"))
    return Group(*parts)


def draw_savings(
    profile: "Profile", sizes: tuple[int, ...], step_seconds: "StepSeconds | None" = None
) -> Iterator[RenderableType]:
    """The usual ways beside the recipe, and what each technique saves, as far as they were traced.

    step_seconds: of a step that was traced, where the rates of the device are known.
    """
    if profile.ways:
        is_card = profile.forecast.plan.device.kind == "cuda"
        yield from (Text(""), _ways(profile, sizes if is_card else (), step_seconds))
    if profile.attribution:
        yield from (Text(""), _attribution(profile.attribution, profile.forecast.prediction, step_seconds))


def refusal_text(refusal: "Problem") -> Text:
    """That a run would not begin, whatever its memory."""
    return Text.assemble(("qtune run would refuse this model: ", "bold"), str(refusal))


def categories_table(alive: dict[str, int]) -> Table:
    """Bytes alive at one moment by category."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("at the peak")
    table.add_column("size", justify="right")
    table.add_column("share", justify="right")
    table.add_column("bar")
    total = sum(alive.values()) or 1
    for name, value in alive.items():
        blocks = round(20 * value / total)
        table.add_row(f"{letter_of(name)} {name}", size_text(value), f"{value / total:.1%}", "█" * blocks or "▏")
    table.add_row("total", size_text(total), "", "", style="bold")
    return table


def letter_of(category: str) -> str:
    """A category's letter; one that this version does not know is drawn as a point."""
    return LETTERS.get(category, ".")


def stacked_bar(alive: dict[str, int]) -> Text:
    """One line of letters, each category as wide as its share."""
    total = sum(alive.values()) or 1
    line, drawn, summed = "", 0, 0
    for name, value in alive.items():
        summed += value
        until = round(BAR * summed / total)
        line += letter_of(name) * (until - drawn)
        drawn = until
    return Text(f"[{line}]")


def _need(found: "Prediction", budget_bytes: int, *, is_card: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_row("tensors at the peak", size_text(found.need.traced_bytes), "traced")
    if is_card:
        need = found.need
        table.add_row("context of CUDA", size_text(need.context_bytes), "allowance, as measured on an H100")
        table.add_row("cuBLAS workspaces", size_text(need.workspace_bytes), "allowance")
        table.add_row("gaps between tensors", size_text(need.gap_bytes), "allowance: PyTorch's allocator, played")
        verdict = f"of {size_text(budget_bytes)}: {need.verdict(budget_bytes)}"
        table.add_row("needed free on the card", size_text(need.total_bytes), verdict, style="bold")
    if found.paged_bytes:
        table.add_row(
            "paged optimizer state",
            size_text(found.paged_bytes),
            "managed memory: moves to the host when the card is full",
        )
    if found.host_bytes:
        table.add_row(
            "in host memory", size_text(found.host_bytes), "pinned; the host's allocator rounds up to a power of two"
        )
    return table


def _phases(found: "Prediction") -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("phase")
    table.add_column("peak", justify="right")
    table.add_column("where")
    for phase, moment in found.by_phase.items():
        table.add_row(phase, size_text(moment.bytes), moment.module or moment.op)
    return table


def _ways(profile: "Profile", sizes: tuple[int, ...], step_seconds: "StepSeconds | None") -> Table:
    """Shares are of the first way's peak: full fine-tuning. Without sizes no cards are named."""
    ours, whole = profile.forecast.prediction.peak.bytes, profile.ways[0].prediction.peak.bytes
    table = Table(box=None, padding=(0, 2, 0, 0))
    figures = ("peak", "share", "recipe saves")
    timed = ["a step"] if step_seconds is not None else []
    for name in ("way of training", *figures, *timed, *(["fits cards of"] if sizes else [])):
        table.add_column(name, justify="right" if name in (*figures, *timed) else "left")
    for way in profile.ways:
        peak = way.prediction.peak.bytes
        saved = f"{1 - ours / peak:.0%}" if way.name != "this recipe" else ""
        cards = [fitting_cards(way.prediction.need.total_bytes, sizes)] if sizes else []
        took = [] if step_seconds is None else [seconds(step_seconds(way.prediction))]
        table.add_row(way.name, size_text(peak), f"{peak / whole:.0%}", saved, *took, *cards)
    return table


def _attribution(attribution: "list[Way]", ours: "Prediction", step_seconds: "StepSeconds | None") -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    timed = ["for"] if step_seconds is not None else []
    for name in ("technique", "saves", *timed, "without it"):
        table.add_column(name, justify="right" if name in ("saves", *timed) else "left")
    for way in sorted(attribution, key=lambda way: -way.prediction.peak.bytes):
        price = [] if step_seconds is None else [_price(step_seconds(ours), step_seconds(way.prediction))]
        table.add_row(way.name, saving_text(way.prediction.peak.bytes, ours.peak.bytes), *price, way.how)
    return table


def _price(with_it: float, without: float) -> str:
    """What a technique does to the time of a step: "+28 % time", "no time" within half a per cent."""
    change = with_it / without - 1
    return "no time" if abs(change) < 0.005 else f"{change:+.0%} time"


def draw_measured(found: "Measured") -> RenderableType:
    """The answer to `qtune profile RUN`: predicted, measured and the difference by phase; what stays between steps."""
    measured = found.measured
    cuda = measured["device"] != "cpu"
    key = "allocated_peak_bytes" if cuda else "tensor_peak_bytes"
    table = Table(box=None, padding=(0, 2, 0, 0))
    other = "reserved" if cuda else "resident (RSS)"
    for name in ("phase", "predicted", "measured", "error", other):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase, peaks in measured["phases"].items():
        expected = found.prediction.by_phase.get(phase) if found.prediction else None
        seen = peaks[key]
        error = f"{expected.bytes / seen - 1:+.1%}" if expected and seen else ""
        beside = peaks["reserved_peak_bytes"] if cuda else peaks["resident_peak_bytes"]
        table.add_row(
            phase,
            size_text(expected.bytes) if expected else "",
            size_text(seen) if seen else "",
            error,
            size_text(beside),
        )
    parts: list[RenderableType] = [Text(f"measured on {measured['device']}: {measured['method']}"), Text(""), table]
    if found.differs:
        told = ", ".join(f"{phase} {error:+.1%}" for phase, error in found.differs.items())
        parts += [Text(""), Text(f"traced and measured differ: {told} (workspaces of libraries left out)")]
    if "at_peak" in measured:
        alive = measured["at_peak"]["alive"]
        parts += [Text(""), categories_table(alive), stacked_bar(alive)]
    if measured["static"]:
        parts += [Text(""), *_static(measured["static"])]
    if found.ways and measured["peak_bytes"]:
        parts += [Text(""), _saved(found)]
    if found.attribution and found.prediction:
        parts += [Text(""), _attribution(found.attribution, found.prediction, None)]
    return Group(*parts)


def _saved(found: "Measured") -> Table:
    """The measured peak against the usual ways of training the same model on the same batch."""
    ours = found.measured["peak_bytes"]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("the same step in other ways", "traced peak", "this run saves", "how"):
        table.add_column(name, justify="right" if name in ("traced peak", "this run saves") else "left")
    for way in found.ways:
        peak = way.prediction.peak.bytes
        table.add_row(way.name, size_text(peak), f"{1 - ours / peak:.0%}", way.how)
    return table


def _static(static: dict[str, int]) -> Iterator[RenderableType]:
    yield Text("what stays between steps: " + ", ".join(f"{name} {size_text(value)}" for name, value in static.items()))


def draw_fit(found: "Fitted", recipe: "Recipe", *, length_is_allowed: bool) -> RenderableType:
    """What was asked, every step of the search, how it ended, and what `qtune run` then settles by itself."""
    plan = found.plan
    asked = found.asked
    needed = f"{asked.rows} x {found.rows.longest.length} tokens at once need {size_text(asked.need.total_bytes)}"
    changes, own = _assignments(found.changes), _assignments(found.left)
    parts: list[RenderableType] = [
        Text(f"{recipe.model.base} on {plan.device.name}, {size_text(found.budget_bytes)}", style="bold"),
        Text(f"as qtune run would do it, {needed}: {asked.need.verdict(found.budget_bytes)}"),
        Text(f"length: {found.rows.known_from}"),
    ]
    if found.trials:
        parts += [Text(""), _trials(found)]
    if asked.is_enough:
        ended = f"fits {size_text(found.budget_bytes)} as it is"
    elif found.fits:
        ended = f"fits {size_text(found.budget_bytes)} with {size_text(found.need.total_bytes)}: {changes}"
    else:
        smallest = math.ceil(100 * found.need.total_bytes / GIB) / 100  # rounded down it would not be enough
        ended = (
            f"{_against(found.need.verdict(found.budget_bytes), size_text(found.budget_bytes))}; with all that saves, "
            f"the smallest budget that would surely do is {smallest:.2f} GiB"
        )
        if not length_is_allowed:
            ended += "\nshorter rows need less: --allow length"
    if own and found.fits:
        ended += f"\nqtune run settles by itself: {own}"
    return Group(*parts, Text(""), Text(ended, style="bold"))


def _against(verdict: "Verdict", budget: str) -> str:
    """ "does not fit 8.00 GiB", or "8.00 GiB is too close to say"."""
    return f"{budget} is too close to say" if verdict == "too close to say" else f"{verdict} {budget}"


def _assignments(values: "dict[KeyPath, Any]") -> str:
    """Keys and values as a recipe writes them."""
    return ", ".join(f"{'.'.join(map(str, path))} = {show_value(value)}" for path, value in values.items())


def _trials(found: "Fitted") -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    is_timed = any(trial.pace is not None for trial in found.trials)
    timed = ["for"] if is_timed else []
    for name in ("change", "a row needs", "and then", *timed, "", "price"):
        table.add_column(name, justify="right" if name in ("a row needs", "and then", *timed) else "left")
    for trial in found.trials:
        before, after = size_text(trial.before.total_bytes), size_text(trial.need.total_bytes)
        pace = [] if not is_timed else ["" if trial.pace is None else _price(trial.pace, 1.0)]
        if trial.verdict == "kept":
            mark = trial.need.verdict(found.budget_bytes)
            table.add_row(trial.what, before, after, *pace, mark, trial.why)
        else:
            reason = trial.why if trial.verdict == "not possible" else "left as it was"
            table.add_row(trial.what, before, after, *pace, trial.verdict, reason, style="dim")
    return table
