"""What a run was and what it learned, as parts of the page: summary, curves, rows, values, versions."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

from qtune.console import clock
from qtune.records import plain
from qtune.report.charts import MOST_POINTS, Series, line_chart
from qtune.report.html import Html, details, element, joined, table
from qtune.report.record import Record
from qtune.run.finished import GONE, adapter_lack
from qtune.run.lock import Lock, LockedDevice
from qtune.run.metrics import EvalRecord, TrainRecord
from qtune.run.owner import owner_of
from qtune.run.shown_rows import ShownRow, ShownRows
from qtune.run.summary import number
from qtune.sizes import GIB, MIB, size_text
from qtune.training.outliers import DEVIATIONS, WINDOW

LONGEST_PIECE = 8000
"""Characters of a piece of a row that are shown; one row may be a whole book."""


def section(title: str, *children: Html | str) -> Html:
    """A part of the page under its heading."""
    return element("section", element("h2", title), *children)


def paragraph(*children: str) -> Html:
    """A paragraph."""
    return element("p", *children)


def summary(record: Record) -> Html:
    """The figures that one looks for first."""
    train, validation = record.facts.train, record.facts.validation
    last = train[-1] if train else None
    state = f"not finished: step {last.step} of {last.steps}" if last else "not finished: no step taken"
    if owner_of(record.run_dir) is None and adapter_lack(record.run_dir) == GONE:
        state = "all steps taken, no adapter"
    figures: dict[str, str] = {
        "state": "finished" if record.run_dir.is_finished else state,
        "trained for": clock(record.seconds),
    }
    if last:
        figures["steps"] = f"{last.step:,} of {last.steps:,}"
    if (losses := record.facts.losses) is not None:
        figures["training loss"] = losses.text
    if validation:
        # NaN is smaller than nothing: a validation that has diverged is no best one.
        best = min(validation, key=lambda one: (math.isnan(one.judged_loss), one.judged_loss))
        figures["validation loss"] = f"{number(validation[-1].judged_loss)}{validation[-1].about_rows}"
        if best is not validation[-1]:
            figures["best validation loss"] = f"{number(best.judged_loss)} at step {best.step:,}"
    if record.adapter_bytes:
        at = record.facts.adapter_step
        figures["adapter"] = size_text(record.adapter_bytes) + ("" if at is None else f", the state of step {at:,}")
    facts = [element("div", element("dt", name), element("dd", value)) for name, value in figures.items()]
    return element("dl", *facts, class_="facts")


def curves(record: Record) -> Html:
    """Loss, learning rate, gradient norm, memory and speed over the steps; what is no number is left out."""

    train, validation = record.facts.train, record.facts.validation

    def points(records: Sequence[TrainRecord | EvalRecord], key: str, scale: float = 1) -> list[tuple[float, float]]:
        return [(one.step, getattr(one, key) / scale) for one in records]

    few, every = ("", "") if not any(one.left_out for one in validation) else (", rows not seen", ", all rows")
    loss = [
        Series("training", points(train, "loss")),
        Series(f"validation{few}", points(validation, "judged_loss"), style="marked"),
        *_standing_out(train, "loss"),
    ]
    accuracy = [
        Series("training", points(train, "accuracy")),
        Series(f"validation{every}", points(validation, "accuracy"), style="marked"),
    ]
    norms = [Series("before clipping", points(train, "gradient_norm")), *_standing_out(train, "gradient_norm")]
    most = max((one.memory_peak_bytes for one in train), default=0)
    unit, size = ("GiB", GIB) if most >= GIB / 10 else ("MiB", MIB)
    memory = [
        Series("now", points(train, "memory_bytes", size)),
        Series("peak so far", _highest_so_far(points(train, "memory_peak_bytes", size)), style="dashed"),
    ]
    charts = [
        line_chart("Loss, nats per scored token", loss, "{:.3g}".format),
        line_chart("Scored tokens that were the likeliest", accuracy, "{:.0%}".format, percent=True),
        line_chart("Learning rate", [Series("", points(train, "learning_rate"))], "{:.2g}".format),
        line_chart("Gradient norm", norms, "{:.3g}".format),
        line_chart(memory_title(record, unit), memory, "{:.3g}".format),
        line_chart("Tokens per second", [Series("", points(train, "tokens_per_second"))], "{:,.0f}".format),
    ]
    drawn = [chart for chart in charts if chart is not None]
    if not drawn:
        return section("Training", paragraph("No step has been taken yet."))
    thinned = [paragraph("Each point is the mean of several steps.")] if len(train) > MOST_POINTS else []
    return section("Training", *thinned, element("div", *drawn, class_="charts"))


def _highest_so_far(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each process counts its own peak from its start, and a run that was resumed has had several."""
    peaks = accumulate((y for _, y in points), max)
    return [(x, peak) for (x, _), peak in zip(points, peaks, strict=True)]


def _standing_out(train: Sequence[TrainRecord], key: str) -> list[Series]:
    """The steps that stand out of the 128 before them, those apart whose update was left out."""
    level = f"{DEVIATIONS:g} σ above the last {WINDOW}"
    named = {f"stands out, {level}": False, f"stands out, {level}, and is skipped": True}
    found = [one for one in train if one.outlier is not None]
    return [
        Series(name, [(one.step, getattr(one, key)) for one in found if one.skipped is skipped], style="crosses")
        for name, skipped in named.items()
    ]


def memory_title(record: Record, unit: str) -> str:
    """What the memory in the metrics is: the allocator's on CUDA, the process's on a CPU."""
    measured = (record.facts.memory and record.facts.memory.measured) or {}
    device = record.facts.lock.last_device if record.facts.lock else LockedDevice()
    on_cpu = measured.get("device") == "cpu" or device.kind == "cpu" or device.name.startswith("CPU")
    return f"Memory of the process, {unit}" if on_cpu else f"Memory allocated on the card, {unit}"


def training_rows(rows: ShownRows) -> Html:
    """Some rows with their scored tokens marked."""
    intro = [
        f"{rows.train_rows:,} rows to train on",
        f" and {rows.validation_rows:,} kept apart. " if rows.validation_rows else ". ",
        f"Chat template: {rows.template}. The loss is taken on the ",
        element("mark", "marked"),
        " tokens only; everything else is read and not learned.",
    ]
    if rows.virtual_tokens:
        intro.append(f" Before each row the model also sees {rows.virtual_tokens} virtual tokens, which are not text.")
    changed = (
        [note("The files have changed since: these are not the rows that were trained on.")] if rows.changed else []
    )
    return section("Rows as the model sees them", *changed, paragraph(*intro), *map(_row, rows.rows))


def _row(row: ShownRow) -> Html:
    head = f"{row.title}: {row.scored} of {row.tokens} tokens scored"
    pieces = []
    for piece in row.pieces:
        text = piece.text
        shown = text if len(text) <= LONGEST_PIECE else f"{text[:LONGEST_PIECE]}… ({len(text):,} characters)"
        pieces.append(element("mark" if piece.scored else "span", shown))
    return element(
        "figure", element("figcaption", element("b", head), element("span", row.place)), element("pre", *pieces)
    )


def values(record: Record) -> Html:
    """Every resolved value with its origin, those that somebody chose first to be seen."""
    rows = []
    for one in record.values:
        name = ".".join(map(str, one.path))
        is_chosen = one.origin.source in ("recipe", "--set")
        rows.append((element("b", name) if is_chosen else name, element("code", one.text), one.origin.in_words))
    chosen = [row for row, one in zip(rows, record.values, strict=True) if one.origin.source != "default"]
    head = ("key", "value", "where it came from")
    left = len(rows) - len(chosen)
    recipe = record.run_dir.recipe_file
    given = (
        [details("The recipe as it was given", element("pre", recipe.read_text(encoding="utf-8", errors="replace")))]
        if recipe.is_file()
        else []
    )
    return section(
        "What was decided, and by whom",
        table(head, chosen, class_="values"),
        details(f"All {len(rows)} values, with the {left} defaults", table(head, rows, class_="values")),
        *given,
    )


def versions(lock: Lock) -> Html:
    """lock.json: what this run depended on."""
    return section("What it depended on", table(("", ""), _flat(plain(lock)), class_="values"))


def _flat(value: object, name: str = "") -> Iterable[tuple[str, Html]]:
    """The leaves of JSON as (dotted name, value)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{number}]")
    elif value is not None:
        yield name, element("code", f"{value}")


def note(*children: str) -> Html:
    """Something that could not be shown, and why."""
    return element("p", joined(children), class_="note")
