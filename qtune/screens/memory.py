"""How memory looks on the screen: a table by category, a stacked bar, ways compared, a run's phases, a fit's steps."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from qtune.console import BareTable
from qtune.device.cards import described, fitting_cards
from qtune.memory.tracing.categories import ABOUT, CATEGORIES
from qtune.plan import why_others_take_less
from qtune.recipe.text import show_changes, show_value
from qtune.screens.levers import in_words, lines_of
from qtune.screens.time import seconds
from qtune.sizes import GIB, digits_apart, saving_text, share_saved, size_text, texts_apart

if TYPE_CHECKING:
    from qtune.device.present import Device
    from qtune.errors import Problem
    from qtune.memory.allowance import Verdict
    from qtune.memory.fit import Fitted
    from qtune.memory.predict import Prediction
    from qtune.memory.profile import Measured, Profile
    from qtune.memory.savings import Variant
    from qtune.memory.tracing.history import Moment
    from qtune.memory.ways_to_fit import Way, WaysToFit
    from qtune.plan import Plan
    from qtune.recipe.schema import Recipe

BAR = 60
LETTERS = {category.name: category.letter for category in CATEGORIES}


def _traced_in(prediction: "Prediction", whole_seconds: float | None) -> str:
    """How long one waited, which is for every step that was traced on the way; of a kept trace, what it took then."""
    if whole_seconds is None or whole_seconds < prediction.seconds:
        return f"traced before, in {prediction.seconds:.1f} s, without a GPU"
    return f"traced without a GPU in {whole_seconds:.1f} s"


StepSeconds = Callable[["Prediction"], float]
"""Seconds of a step that was traced."""


def draw_forecast(profile: "Profile", refusals: "Sequence[Problem]" = ()) -> RenderableType:
    """What the recipe's own step takes, below the answer (`screens.answer`). A CPU's memory is no card's: nothing is
    said of cards then.

    refusals: why a run would not begin, whatever its memory.
    """
    prediction, plan = profile.forecast.prediction, profile.forecast.plan
    is_card = plan.device.kind == "cuda"
    at = f"Where a step's memory is at its fullest ({prediction.peak.phase}, {_place(prediction.peak)}):"
    executed, layers = prediction.layers_executed, prediction.layers
    how = f", {executed} of {layers} layers executed" if executed < layers else ""
    need = _need(prediction, profile.forecast.budget_bytes, is_card=is_card)
    alive = prediction.peak.alive
    parts: list[RenderableType] = [Text(at, style="bold"), categories_table(alive)]
    parts += [stacked_bar(alive), Text(""), need, Text(""), _phases(prediction)]
    parts += [Text(""), Text(f"{_traced_in(prediction, profile.seconds)}{how}", style="dim")]
    if refusals:
        parts += [Text(""), refusals_text(refusals)]
    if not is_card:
        parts.append(Text("this is the memory of a run on the processor; for a card add --gpu or --vram", style="dim"))
    return Group(*parts)


def draw_savings(
    profile: "Profile", sizes: tuple[int, ...], step_seconds: "StepSeconds | None" = None
) -> Iterator[RenderableType]:
    """The usual ways beside the recipe, and what each technique saves, as far as they were traced.

    step_seconds: of a step that was traced, where the rates of the device are known.
    """
    if profile.baselines:
        is_card = profile.forecast.plan.device.kind == "cuda"
        yield from (Text(""), _baselines(profile, sizes if is_card else (), step_seconds))
        if (why := _why_others_take_less(profile)) is not None:
            yield Text(why)
    if profile.attribution:
        yield from (Text(""), _attribution(profile.attribution, profile.forecast.prediction, step_seconds))
        yield from (Text(""), Text("\n".join(_choices(profile.forecast.plan))))


def draw_ways(ways: "WaysToFit", budget_bytes: int, layers: int) -> RenderableType:
    """All remedies: each change alone, and the lines of a recipe that fits with the least loss of time. layers: that
    the model has."""
    table = BareTable()
    is_timed = any(way.pace is not None for way in ways.single)
    timed = ["for"] if is_timed else []
    for name in ("each change alone", "needs", "", *timed, "price"):
        table.add_column(name, justify="right" if name in ("needs", *timed) else "left")
    digits = digits_apart([way.need.total_bytes for way in (*ways.single, *filter(None, [ways.best]))], budget_bytes)
    for way in ways.single:
        pace = [] if not is_timed else ["" if way.pace is None else _price(way.pace, 1.0)]
        needs = size_text(way.need.total_bytes, digits)
        table.add_row(way.words, needs, way.need.verdict(budget_bytes), *pace, _with_layers(way, layers))
    parts: list[RenderableType] = [table, Text("")] if ways.single else []
    if ways.best is None:
        told = f"No change of these, and not all together, makes it surely fit {size_text(budget_bytes)}: "
        return Group(*parts, Text(f"{told}shorter rows do (data.max_length), or a larger card", style="bold"))
    slower = "" if ways.best.pace is None else f", {_price(ways.best.pace, 1.0)}"
    needs, there = size_text(ways.best.need.total_bytes, digits), size_text(budget_bytes, digits)
    head = f"Fits with {needs} of {there}{slower}; in the recipe:"
    some = ways.best.changes.get(CHECKPOINTING)
    explained = {f"gradient_checkpointing = {some}": in_words(CHECKPOINTING, some, layers)} if _is_some(some) else {}
    lines = [f"{one}  # {explained[one]}" if one in explained else one for one in ways.best.lines.splitlines()]
    return Group(*parts, Text(head, style="bold"), Text("\n".join(lines)))


CHECKPOINTING = ("training", "gradient_checkpointing")


def _is_some(layers: object) -> bool:
    """Whether a number of layers is meant, and not all or none of them."""
    return isinstance(layers, int) and not isinstance(layers, bool)


def _with_layers(way: "Way", layers: int) -> str:
    """The price of a change, and of how many layers it is one."""
    some = way.changes.get(CHECKPOINTING)
    return f"{way.price}: {in_words(CHECKPOINTING, some, layers)}" if _is_some(some) else way.price


def _choices(plan: "Plan") -> Iterator[str]:
    """What a step's time and memory hang on, where the recipe leaves it open, each with its reason."""
    values = {
        ("training", "lean_step"): plan.lean_step,
        ("training", "gradient_checkpointing"): plan.gradient_checkpointing,
        ("training", "micro_batch_size"): plan.micro_batch_size,
        ("memory", "embeddings"): plan.embeddings,
        ("memory", "keep_dequantized"): plan.keep_dequantized,
    }
    for path, value in values.items():
        if path in plan.reasons:
            yield f"{'.'.join(path)} = {show_value(value)}: {plan.reasons[path]}"


def refusals_text(refusals: "Sequence[Problem]") -> Text:
    """That a run would not begin, whatever its memory, a line for each reason."""
    lines = [Text.assemble(("qtune run would refuse this: ", "bold"), str(refusal)) for refusal in refusals]
    return Text("\n").join(lines)


def categories_table(alive: dict[str, int]) -> BareTable:
    """Bytes alive at one moment by category."""
    table = BareTable()
    table.add_column("at the peak")
    table.add_column("size", justify="right")
    table.add_column("share", justify="right")
    table.add_column("what it is")
    total = sum(alive.values()) or 1
    for name, value in alive.items():
        table.add_row(f"{letter_of(name)} {name}", size_text(value), f"{value / total:.1%}", ABOUT.get(name, ""))
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


def _need(prediction: "Prediction", budget_bytes: int, *, is_card: bool) -> BareTable:
    table = BareTable(show_header=False)
    table.add_row("tensors at the peak", size_text(prediction.need.traced_bytes), "the sum above, traced")
    if is_card:
        need = prediction.need
        table.add_row("context of CUDA", size_text(need.context_bytes), "before any tensor, as measured on an H100")
        table.add_row("cuBLAS workspaces", size_text(need.workspace_bytes), "buffers of the library that multiplies")
        table.add_row("gaps between tensors", size_text(need.gap_bytes), "PyTorch's allocator, played with this step")
        needs, there = texts_apart(need.total_bytes, budget_bytes)
        table.add_row("needed free on the card", needs, f"of {there}: {need.verdict(budget_bytes)}", style="bold")
    if prediction.paged_bytes:
        table.add_row(
            "paged optimizer state",
            size_text(prediction.paged_bytes),
            "managed memory: moves to the host when the card is full",
        )
    if prediction.host_bytes:
        table.add_row(
            "in host memory",
            size_text(prediction.host_bytes),
            "pinned; the host's allocator rounds up to a power of two",
        )
    return table


def _phases(prediction: "Prediction") -> BareTable:
    table = BareTable()
    table.add_column("phase of a step")
    table.add_column("peak", justify="right")
    table.add_column("where")
    for phase, moment in prediction.by_phase.items():
        table.add_row(phase, size_text(moment.bytes), _place(moment))
    return table


def _place(moment: "Moment") -> str:
    """Where a step was, as the model names its parts, without what peft puts before them; else the operation."""
    return moment.module.removeprefix("base_model.model.") if moment.module else f"{moment.op}, outside the model"


def _why_others_take_less(profile: "Profile") -> str | None:
    """What a usual way does for which it takes less than the recipe; None where none does."""
    ours, plan = profile.forecast.prediction.peak.bytes, profile.forecast.plan
    less = [way.name for way in profile.baselines if way.prediction.peak.bytes < ours]
    return why_others_take_less(less, plan.gradient_checkpointing, plan.keep_dequantized)


def _baselines(profile: "Profile", sizes: tuple[int, ...], step_seconds: "StepSeconds | None") -> BareTable:
    """Shares are of the first way's peak: full fine-tuning. Without sizes no cards are named."""
    ours, whole = profile.forecast.prediction.peak.bytes, profile.baselines[0].prediction.peak.bytes
    table = BareTable()
    figures = ("peak", "share", "recipe saves")
    timed = ["a step"] if step_seconds is not None else []
    for name in ("way of training", *figures, *timed, *(["fits cards of"] if sizes else [])):
        table.add_column(name, justify="right" if name in (*figures, *timed) else "left")
    for way in profile.baselines:
        peak = way.prediction.peak.bytes
        saved = "" if way.name == "this recipe" else share_saved(ours, peak)
        cards = [fitting_cards(way.prediction.need.total_bytes, sizes)] if sizes else []
        took = [] if step_seconds is None else [seconds(step_seconds(way.prediction))]
        table.add_row(way.name, size_text(peak), f"{peak / whole:.0%}", saved, *took, *cards)
    return table


def _attribution(attribution: "list[Variant]", ours: "Prediction", step_seconds: "StepSeconds | None") -> BareTable:
    table = BareTable()
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


PHASES = {"idle": "between steps"}
"""Phases whose names say too little."""


def draw_measured(run: "Measured") -> RenderableType:
    """The answer to `qtune profile RUN`: predicted, measured and the difference by phase; what stays between steps."""
    measured = run.measured
    cuda = measured["device"] != "cpu"
    key = "allocated_peak_bytes" if cuda else "tensor_peak_bytes"
    table = BareTable()
    other = "reserved" if cuda else "resident (RSS)"
    for name in ("phase", "predicted", "measured", "error", other):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase, peaks in measured["phases"].items():
        expected = run.prediction.by_phase.get(phase) if run.prediction else None
        seen = peaks[key]
        error = f"{expected.bytes / seen - 1:+.1%}" if expected and seen else ""
        beside = peaks["reserved_peak_bytes"] if cuda else peaks["resident_peak_bytes"]
        table.add_row(
            PHASES.get(phase, phase),
            size_text(expected.bytes) if expected else "",
            size_text(seen) if seen else "",
            error,
            size_text(beside),
        )
    last = "" if run.parts == 1 else f"; of the last of {run.parts} parts of the run"
    told = f"measured on {measured['device']}: {measured['method']}{last}"
    parts: list[RenderableType] = [Text(told), Text(""), table]
    if run.differs:
        told = ", ".join(f"{phase} {error:+.1%}" for phase, error in run.differs.items())
        parts += [Text(""), Text(f"traced and measured differ: {told} (workspaces of libraries left out)")]
    if "at_peak" in measured:
        alive = measured["at_peak"]["alive"]
        parts += [Text(""), categories_table(alive), stacked_bar(alive)]
    if measured["static"]:
        parts += [Text(""), *_static(measured["static"])]
    if run.baselines and measured["peak_bytes"]:
        parts += [Text(""), _saved(run)]
    if run.attribution and run.prediction:
        parts += [Text(""), _attribution(run.attribution, run.prediction, None)]
    return Group(*parts)


def _saved(run: "Measured") -> BareTable:
    """The measured peak against the usual ways of training the same model on the same batch."""
    ours = run.measured["peak_bytes"]
    table = BareTable()
    for name in ("the same step in other ways", "traced peak", "this run saves", "how"):
        table.add_column(name, justify="right" if name in ("traced peak", "this run saves") else "left")
    for way in run.baselines:
        peak = way.prediction.peak.bytes
        table.add_row(way.name, size_text(peak), share_saved(ours, peak), way.how)
    return table


def _static(static: dict[str, int]) -> Iterator[RenderableType]:
    yield Text("what stays between steps: " + ", ".join(f"{name} {size_text(value)}" for name, value in static.items()))


def _of_it(device: "Device", budget_bytes: int, digits: int) -> str:
    """How much of a card is meant, where its name does not say that: "a card with 8 GiB" has 8 GiB."""
    is_said = device == described(budget_bytes / GIB) and digits == 2
    return "" if is_said else f", {size_text(budget_bytes, digits)}"


def draw_fit(fitted: "Fitted", recipe: "Recipe", *, length_is_allowed: bool) -> RenderableType:
    """What was asked, every step of the search, how it ended, and what `qtune run` then settles by itself."""
    plan = fitted.plan
    asked = fitted.asked
    digits = _digits(fitted)
    budget = size_text(fitted.budget_bytes, digits)
    first = size_text(asked.need.total_bytes, digits)
    needed = f"{asked.rows} x {fitted.rows.longest.length} tokens at once need {first}"
    parts: list[RenderableType] = [
        Text(
            f"{recipe.model.base} on {plan.device.name}{_of_it(plan.device, fitted.budget_bytes, digits)}", style="bold"
        ),
        Text(f"as qtune run would do it, {needed}: {asked.need.verdict(fitted.budget_bytes)}"),
        Text(f"length: {fitted.rows.known_from}"),
    ]
    if fitted.trials:
        parts += [Text(""), _trials(fitted, digits)]
    if asked.is_enough:
        ended = f"fits {budget} as it is"
    elif fitted.fits:
        at_once = f"{plan.micro_batch_size} {'row' if plan.micro_batch_size == 1 else 'rows'} at once"
        ended_at = f"{size_text(fitted.need.total_bytes, digits)}, {at_once}"
        ended = f"fits {budget} with {ended_at}: {show_changes(fitted.changes)}"
    else:
        smallest = math.ceil(100 * fitted.need.total_bytes / GIB) / 100  # rounded down it would not be enough
        against = _against(fitted.need.verdict(fitted.budget_bytes), budget)
        ended = f"{against}; with all that saves, the smallest budget that would surely do is {smallest:.2f} GiB"
        if not length_is_allowed:
            ended += "\nshorter rows need less: --allow length"
    if fitted.left and fitted.fits:
        own = lines_of(fitted.left, plan, asked.prediction.layers)
        ended += "\n".join(["\nqtune run settles by itself, as far as there is room:", *own])
    if fitted.host_bytes and fitted.fits:
        ended += f"\nwhat waits in the computer's own memory takes {size_text(fitted.host_bytes)} of it"
    return Group(*parts, Text(""), Text(ended, style="bold"))


def _against(verdict: "Verdict", budget: str) -> str:
    """ "does not fit 8.00 GiB", or "8.00 GiB is too close to say"."""
    return f"{budget} is too close to say" if verdict == "too close to say" else f"{verdict} {budget}"


def _digits(fitted: "Fitted") -> int:
    """Of every size on the screen: with fewer, one that does not fit would look like one that does."""
    needs = [fitted.asked.need, fitted.need, *(need for one in fitted.trials for need in (one.before, one.need))]
    return digits_apart([need.total_bytes for need in needs], fitted.budget_bytes)


def _trials(fitted: "Fitted", digits: int) -> BareTable:
    table = BareTable()
    is_timed = any(trial.pace is not None for trial in fitted.trials)
    timed = ["for"] if is_timed else []
    for name in ("tried", "a row needs", "and then", *timed, "", "price"):
        table.add_column(name, justify="right" if name in ("a row needs", "and then", *timed) else "left")
    for trial in fitted.trials:
        before, after = size_text(trial.before.total_bytes, digits), size_text(trial.need.total_bytes, digits)
        pace = [] if not is_timed else ["" if trial.pace is None else _price(trial.pace, 1.0)]
        if trial.verdict == "kept":
            mark = trial.need.verdict(fitted.budget_bytes)
            table.add_row(trial.what, before, after, *pace, mark, trial.why)
        else:
            reason = trial.why if trial.verdict == "not possible" else "left as it was"
            table.add_row(trial.what, before, after, *pace, trial.verdict, reason, style="dim")
    return table
