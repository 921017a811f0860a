"""A run's memory.json as a part of the page: predicted and measured, the timeline of a step, what it saves and why."""

from collections.abc import Mapping, Sequence
from typing import Any

from qtune.device.cards import SIZES, fitting_cards
from qtune.memory.measured.failure_text import failure_text
from qtune.memory.tracing.categories import in_order
from qtune.plan import why_others_take_less
from qtune.report.charts import bar
from qtune.report.drawing import svg
from qtune.report.html import Html, element, table
from qtune.report.sections import paragraph, section
from qtune.report.timeline import Timeline, timeline_drawing
from qtune.run.memory import RunMemory
from qtune.sizes import saving_text, share_saved, size_text

Json = Mapping[str, Any]

# Columns of the phases' table beside the predicted and the measured peak; one that was measured nowhere is left out.
OTHER_COLUMNS = {
    "reserved_peak_bytes": "reserved, peak",
    "device_used_bytes": "card in use",
    "resident_peak_bytes": "process, peak",
}

NAMES = {"idle": "between steps"}
IDLE = "Between steps: rows are read, records written, sample answers given, and before the first one a rehearsal."


def memory(
    record: RunMemory, run: str, checkpointing: str | None = None, kept: str | None = None, resumed: int = 0
) -> Html:
    """The whole part; `run` names the run's folder for the commands that would add to it.

    checkpointing, kept: `gradient_checkpointing` and `keep_dequantized` as they were settled, in TOML. resumed: how
    often the run was.
    """
    measured: Json = record.measured or {}
    traced = record.traced or record.predicted
    drawn = (
        [paragraph(f"Measured on {measured.get('device', '?')}: {measured.get('method', '?')}.")] if measured else []
    )
    drawn.append(paragraph(_predicted_for(record, run)))
    if record.failure:
        drawn += [element("h3", "Memory ran out"), element("pre", failure_text(record.failure))]
    drawn += _parts(record, resumed)
    drawn += _phases(record, traced)
    drawn += _at_peak(measured.get("at_peak"), (traced or {}).get("peak"))
    if measured.get("static"):
        drawn += _between_steps(measured["static"])
    if traced:
        drawn += _timeline(traced)
    if record.ways and record.traced:
        drawn += _savings(record.ways, record.traced, (checkpointing, kept), is_card=measured.get("device") != "cpu")
    if record.attribution and record.traced:
        drawn += _attribution(record.attribution, record.traced["peak"]["bytes"])
    return section("Memory", *drawn)


def _predicted_for(record: RunMemory, run: str) -> str:
    """Which batch the prediction is for."""
    if record.traced:
        batch = record.traced["batch"]
        which = "the largest batch that was measured" if batch["is_measured"] else "the largest batch that could come"
        return (
            f"Predicted: the same step on tensors without storage, for {which}, {batch['rows']} x {batch['length']} "
            "tokens."
        )
    if record.predicted:
        planned = record.predicted
        return (
            f"Predicted before the run for the largest batch that could come, {planned['micro_batch_size']} x "
            f"{planned['longest']['length']} tokens; qtune report {run} predicts for the batch that was measured."
        )
    return f"Nothing is predicted here yet: qtune report {run} traces the step that was measured."


def _parts(record: RunMemory, resumed: int) -> list[Html]:
    """Of which parts of a run the figures are; nothing of one that has only one."""
    parts, told = max(resumed + 1, len(record.parts)), len(record.parts)
    if parts == 1 or not told:
        return []
    some = "" if told == parts else f", and {told} of them {'has' if told == 1 else 'have'} left figures"
    of_all = (
        "Seconds are added up over all parts, with those of steps that had to be taken again; the highest peaks are of "
        "all parts; the rest"
        if told > 1
        else "What stands here"
    )
    return [
        paragraph(f"The run was trained in {parts} parts{some}. {of_all} is of {'the last' if told > 1 else 'it'}.")
    ]


def _phases(record: RunMemory, traced: Json | None) -> list[Html]:
    """Predicted, where that is known, measured and the error of each phase: what the allocator counted, on a CPU the
    tensors. The prediction is of the last part; time is of all parts together, and so are the highest peaks, as far as
    the device is the same.
    """
    measured: Json = record.measured or {}
    last: dict[str, Json] = measured.get("phases", {})
    predicted: dict[str, Json] = traced["by_phase"] if traced else {}
    key = "tensor_peak_bytes" if measured.get("device") == "cpu" else "allocated_peak_bytes"
    what = "tensors" if key == "tensor_peak_bytes" else "allocated"
    of_parts: list[dict[str, Json]] = [part.get("phases", {}) for part in record.parts]
    alike: list[dict[str, Json]] = [part.get("phases", {}) for part in record.parts_on_last_device]
    is_resumed = len(of_parts) > 1
    columns = ({key: f"{what}, highest of all parts"} if is_resumed else {}) | OTHER_COLUMNS
    others = {
        key: name
        for key, name in columns.items()
        if any(phase.get(key) for phases in alike for phase in phases.values())
    }
    rows = []
    for name in dict.fromkeys([*(name for phases in of_parts for name in phases), *predicted]):
        visited = [phases[name] for phases in of_parts if name in phases]
        expected, seen = predicted.get(name, {}).get("bytes"), last.get(name, {}).get(key)
        highest = {other: max(phases.get(name, {}).get(other, 0) for phases in alike) for other in others}
        rows.append(
            (
                NAMES.get(name, name),
                f"{sum(phase['seconds'] for phase in visited):,.1f}" if visited else "",
                *([size_text(expected) if expected else ""] if predicted else []),
                size_text(seen) if seen else "–",
                *([f"{expected / seen - 1:+.1%}" if expected and seen else ""] if predicted else []),
                *(size_text(most) if most else "–" for most in highest.values()),
            )
        )
    of_last, of_all = (", last part", ", all parts") if is_resumed else ("", "")
    before, behind = ([f"{what}, predicted"], ["error"]) if predicted else ([], [])
    head = ("phase", f"seconds{of_all}", *before, f"{what}, measured{of_last}", *behind, *others.values())
    idle = [paragraph(IDLE)] if any("idle" in phases for phases in of_parts) else []
    return [table(head, rows, figures=range(1, len(head))), *idle] if rows else []


def _at_peak(measured: Json | None, predicted: Json | None) -> list[Html]:
    """What is alive at the highest moment, the measured one beside the predicted one."""
    moments = {word: moment for word, moment in (("measured", measured), ("predicted", predicted)) if moment}
    if not moments:
        return []
    told = [f"{size_text(moment['bytes'])} {word} ({_where(moment)})" for word, moment in moments.items()]
    parts: list[Mapping[str, int]] = [moment["alive"] for moment in moments.values()]
    names = in_order({name for alive in parts for name in alive})
    rows = [(name, *(size_text(alive[name]) if name in alive else "–" for alive in parts)) for name in names]
    heights = [parts[0].get(name, 0) for name in names]
    drawn = [
        element(
            "tr",
            element("td", name, class_="name"),
            *(element("td", figure, class_="figure") for figure in figures),
            element("td", bar(height / (max(heights) or 1)), class_="bar"),
        )
        for (name, *figures), height in zip(rows, heights, strict=True)
    ]
    words = (element("th", word, class_="figure") for word in moments)
    head = element("tr", element("th", "alive"), *words, element("th", next(iter(moments))))
    return [
        element("h3", f"The highest moment: {', '.join(told)}"),
        element("div", element("table", element("thead", head), element("tbody", *drawn)), class_="wide"),
    ]


def _where(moment: Json) -> str:
    return " in ".join(part for part in (moment["phase"], moment["module"]) if part)


def _between_steps(static: Mapping[str, int]) -> list[Html]:
    rows = [(name, size_text(value)) for name, value in static.items()]
    return [
        element("h3", f"What stays between steps: {size_text(sum(static.values()))}"),
        table(("", "measured"), rows, figures=(1,)),
    ]


def _timeline(traced: Json) -> list[Html]:
    drawing = timeline_drawing(Timeline.from_json(traced), "What is alive in one training step, as predicted")
    return [element("figure", Html(svg(drawing, alone=False)), class_="wide")]


def _savings(ways: Sequence[Json], traced: Json, spent: tuple[str | None, str | None], *, is_card: bool) -> list[Html]:
    """The usual ways of training this model on this batch, and the run's own: GiB, shares, cards that fit."""
    ours, whole = traced["peak"]["bytes"], ways[0]["peak_bytes"]
    this: Json = {"name": "this run", "how": "", "peak_bytes": ours, "needed_bytes": traced["needed_bytes"]}
    rows = []
    for way in [*ways, this]:
        peak = way["peak_bytes"]
        cards = [fitting_cards(way["needed_bytes"], SIZES)] if is_card else []
        figures = size_text(peak), f"{peak / whole:.0%}", "" if way is this else share_saved(ours, peak)
        rows.append((way["name"], *figures, *cards, way["how"].removeprefix("traced: ")))
    head = ("way of training", "peak", "share", "this run saves", *(["fits cards of"] if is_card else []), "how")
    about = (
        "The usual ways of training this model on the same batch, traced like the run itself. Shares are of full "
        "fine-tuning."
    )
    margin = " A card fits where it also has room for what driver and allocator add." if is_card else ""
    less = [way["name"] for way in ways if way["peak_bytes"] < ours]
    twice, kept = map(_settled, spent)
    why = None if twice is None or kept is None else why_others_take_less(less, twice, kept)
    after = [] if why is None else [paragraph(why)]
    return [element("h3", "What it saves"), paragraph(about + margin), table(head, rows, figures=(1, 2, 3)), *after]


def _settled(value: str | None) -> bool | int | None:
    """A number of layers, or all or none of them; None where the run's recipe does not say."""
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value is not None and value.isdecimal() else None


def _attribution(attribution: Sequence[Json], ours: int) -> list[Html]:
    """What each technique saves: the step without it, everything else unchanged."""
    rows = [
        (
            way["name"],
            saving_text(way["peak_bytes"], ours),
            size_text(way["peak_bytes"]),
            way["how"].removeprefix("traced: "),
        )
        for way in sorted(attribution, key=lambda way: -way["peak_bytes"])
    ]
    about = "One technique switched off at a time. The figures do not add up: each hides some of what another saves."
    head = ("technique", "saves", "peak without it", "without it")
    return [element("h3", "What each technique saves"), paragraph(about), table(head, rows, figures=(1, 2))]
