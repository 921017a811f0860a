"""The screen of `qtune check`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from qtune.console import clock, table
from qtune.control_characters import visible
from qtune.screens.answer import BESIDE_THE_PROCESS
from qtune.screens.memory import draw_ways
from qtune.screens.time import evidence, seconds, whole_run
from qtune.sizes import size_text, texts_apart

if TYPE_CHECKING:
    from qtune.check import Check
    from qtune.data.figures import Lengths
    from qtune.data.prepare import SourceReport
    from qtune.data.samples import Sample
    from qtune.preflight import Disk

# Rows are shown up to here; the middle of longer ones is left out.
SHOWN_CHARACTERS = 1500
BAR = 24


def draw_check(check: "Check") -> RenderableType:
    """The examination from the recipe to the verdict; without a row to train on, the verdict alone."""
    shown = [] if check.is_empty else [*_recipe(check), *_rows(check), *_samples(check), *_costs(check)]
    return Group(*_with_gaps([*shown, *_findings(check)]))


def _with_gaps(parts: list[RenderableType]) -> Iterator[RenderableType]:
    for number, part in enumerate(parts):
        if number:
            yield Text()
        yield part


def _recipe(check: "Check") -> Iterator[RenderableType]:
    yield table(f"{check.resolved.file}", ("key", "value", "from"), check.values)
    if check.paths:
        yield Text(check.paths, style="dim")


def _rows(check: "Check") -> Iterator[RenderableType]:
    prepared = check.prepared
    sources = [
        (
            source.split,
            source.name,
            _shapes(source),
            f"{source.weight:g}",
            f"{source.stored.rows:,}",
            f"{source.stored.bad_count:,}",
            f"{source.stored.dropped_count + source.stored.out_of_order_count:,}",
        )
        for source in prepared.sources
    ]
    columns = ("split", "source", "rows are", "weight", "rows", "bad", "dropped")
    yield table("Data", columns, sources, right=(3, 4, 5, 6))
    ending = f"its turns end with {prepared.end_of_turn}" if prepared.end_of_turn else "its turns have no end token"
    yield Text(f"Chat template: {prepared.template.origin}; {ending}")
    are_refused = any(split.refused for split in check.splits)
    splits = [
        (
            split.name,
            f"{split.examples:,}",
            f"{split.tokens:,}",
            f"{split.scored:,}",
            f"{split.scored / max(1, split.tokens):.0%}",
            *([f"{split.refused:,}"] if are_refused else []),
        )
        for split in check.splits
    ]
    counted = ("split", "examples", "tokens", "scored", "share", *(["too long"] if are_refused else []))
    yield table("Tokens", counted, splits, right=range(1, len(counted)))
    for split in check.splits[:1]:
        for name, lengths in (("prompt", split.prompt), ("answer", split.answer), ("whole row", split.total)):
            yield _histogram(f"{name} tokens", lengths)


def _shapes(source: "SourceReport") -> str:
    """The shape of a source's rows; several with the number of rows of each."""
    shapes = source.stored.shapes
    return ", ".join(f"{name} {count:,}" for name, count in shapes.items()) if len(shapes) > 1 else source.row_format


def _histogram(title: str, lengths: "Lengths") -> RenderableType:
    most = max(1, *lengths.counts)
    drawn = Text.assemble(
        (title, "bold"),
        f": {lengths.smallest} to {lengths.largest}, median {lengths.median}, 95 % up to {lengths.p95}\n",
    )
    width = len(f"{lengths.edges[-1] - 1}")
    for start, end, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        bar = "█" * -(-count * BAR // most)
        edges = f"{start:>{width}} to {end - 1:>{width}}" if end - 1 > start else f"{start:>{width}}{'':{width + 4}}"
        drawn.append(f"  {edges}  ", style="dim")
        drawn.append(f"{bar:<{BAR}}", style="cyan")
        drawn.append(f"  {count:,}\n")
    drawn.right_crop(1)
    return drawn


def _samples(check: "Check") -> Iterator[RenderableType]:
    if check.samples:
        yield Text.assemble(
            ("Rows as the model sees them", "bold"), ": ", ("⟦scored⟧", "green"), ", ", ("special tokens", "magenta")
        )
    for sample in check.samples:
        heading = Text(f"{sample.place}, {sample.tokens} tokens", style="dim")
        lost = f"; not used: {', '.join(sample.unused)}" if sample.unused else ""
        heading.append(lost, style="yellow")
        yield Group(heading, _Indented(draw_sample(sample)))


@dataclass(frozen=True)
class _Indented:
    """A text two columns in; folded on a terminal, and whole where lines may have any length."""

    text: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if options.no_wrap:
            yield Text("\n").join(Text("  ").append_text(line) for line in self.text.split("\n"))
        else:
            yield Padding(self.text, (0, 0, 0, 2), expand=False)


def draw_sample(sample: "Sample") -> Text:
    """A row with its scored tokens between ⟦ and ⟧, also where there are no colours."""
    drawn = Text()
    inside = False
    for piece in sample.pieces:
        if piece.scored != inside:
            drawn.append("⟦" if piece.scored else "⟧", style="bold green")
            inside = piece.scored
        colour = "magenta" if piece.special else "green" if piece.scored else ""
        drawn.append(
            visible(piece.text), style=f"underline {colour}".strip() if piece.scored and piece.special else colour
        )
    if inside:
        drawn.append("⟧", style="bold green")
    if len(drawn) <= SHOWN_CHARACTERS:
        return drawn
    half = SHOWN_CHARACTERS // 2
    left_out = Text(f"\n… {len(drawn) - 2 * half:,} characters …\n", style="dim")
    return Text.assemble(drawn[:half], left_out, drawn[-half:])


def _costs(check: "Check") -> Iterator[RenderableType]:
    batches = check.batches
    beside = f"; {batches.refused:,} too long to be trained on" if batches.refused else ""
    count = f"{check.prepared.packed_rows:,} packed into {batches.rows:,}" if batches.packed else f"{batches.rows:,}"
    step = f"{batches.batch_size} {'packed ' if batches.packed else ''}rows"
    rows = [
        ("rows per epoch", f"{count}, {batches.tokens:,} tokens{beside}"),
        *([("streamed", check.prepared.stream.in_words)] if check.prepared.stream else []),
        (
            "steps",
            f"{batches.steps:,} of {step} in micro-batches of {batches.micro_batch_size}; "
            f"{batches.steps_per_epoch:,} in an epoch",
        ),
        (
            "padding",
            f"{batches.padding_grouped:.1%} of all positions, grouped by length within each step; "
            f"{batches.padding_shuffled:.1%} in random order",
        ),
        *([] if isinstance(check.memory, str) else [("length", check.memory.rows.known_from)]),
        ("memory", _memory(check)),
        ("time", _time(check)),
        ("disk", _disk(check.disk)),
    ]
    yield table("Costs", ("what", "how much"), rows)
    if check.ways is not None and not isinstance(check.memory, str):
        yield Text("What would make it fit", style="bold")
        yield draw_ways(check.ways, check.memory.budget_bytes, check.memory.prediction.layers)


def _disk(disk: "Disk | None") -> str:
    if disk is None:
        return "not known, no model with this adapter can be built from its config.json alone"
    return (
        f"checkpoints {size_text(disk.checkpoints_bytes)}, a merged export {size_text(disk.export_bytes)}; "
        f"free {size_text(disk.free_bytes)}; the token cache holds {size_text(disk.cache_bytes)}"
    )


def _memory(check: "Check") -> str:
    forecast = check.memory
    if isinstance(forecast, str):
        return f"not known, the step could not be traced: {forecast}"
    peak, need = forecast.prediction.peak, forecast.prediction.need
    batch = f"{forecast.plan.micro_batch_size} x {forecast.rows.longest.length} tokens"
    whole, there = texts_apart(need.total_bytes, forecast.budget_bytes)
    beside = f"; {whole} with driver and allocator" if need.driver_bytes else ""
    on_top = "" if forecast.plan.device.kind == "cuda" else BESIDE_THE_PROCESS
    return (
        f"{size_text(peak.bytes)} at the peak of a step, traced ({peak.phase}, {batch}){beside}, of "
        f"{there}: {need.verdict(forecast.budget_bytes)}{on_top}"
    )


def _time(check: "Check") -> str:
    """Predicted, where the device's rates are known, and measured, where that was asked for."""
    said = []
    if (duration := check.time) is not None and duration.epoch_seconds is not None and duration.run_seconds is not None:
        said.append(
            f"about {whole_run(duration, duration.run_seconds)}; {seconds(duration.epoch_seconds)} per epoch, "
            f"{duration.tokens_per_second:,.0f} tokens/s, predicted from {evidence(duration)}"
        )
    if check.step_seconds is not None:
        total = check.step_seconds * check.batches.steps
        said.append(f"about {clock(total)}: {check.step_seconds:.2f} s per step, measured on a few micro-batches")
    if check.rehearsal is not None:
        said.append(str(check.rehearsal))
    if not said:
        return "not measured; qtune check --time loads the model and runs a few micro-batches"
    return "; ".join(said)


def _findings(check: "Check") -> Iterator[RenderableType]:
    stopping = check.stopping
    for finding in check.findings:
        waived = finding.level == "error" and finding not in stopping
        word, colour = {"error": ("error", "bold red"), "warning": ("warning", "yellow")}[finding.level]
        head = Text.assemble(
            ("allowed" if waived else word, "dim" if waived else colour), f"  {finding.kind}: {finding.sentence}"
        )
        more = f" and {finding.count - len(finding.places):,} more" if finding.count > len(finding.places) else ""
        if finding.places:
            head.append(f"\n         at {', '.join(finding.places)}{more}")
        if finding not in stopping:  # those are listed again below, with what to do
            head.append(f"\n         {finding.advice}", style="dim")
        yield head
    for problem in check.problems:
        yield Text.assemble(("error", "bold red"), f"  {problem}")
    for warning in check.preflight.warnings:
        yield Text.assemble(("warning", "yellow"), f"  {warning}")
    bad = sum(source.stored.bad_count for source in check.prepared.sources)
    if bad and check.data.on_bad_row == "error":
        yield Text.assemble(
            ("error", "bold red"), f"  bad-rows: {bad:,} bad {'row' if bad == 1 else 'rows'}, each named with the error"
        )
    if not stopping and not check.preflight.refusals:
        yield Text.assemble(("ok", "bold green"), "  nothing stands in the way of a run")
