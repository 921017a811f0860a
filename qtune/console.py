"""What people see: results on stdout, messages and progress on stderr. The only module that prints or knows rich."""

import json
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from qtune.control_characters import escaped_in_json, visible
from qtune.startup.launched import launched

PLAIN_WIDTH = 120
"""Of a file or a pipe, which have none of their own, unless QTUNE_WIDTH says one; 80 would fold the tables that people
redirect, and many a program sets COLUMNS."""
LONGEST_NAME = 36
"""Characters at the beginning of a table's row that are not folded: no key of a recipe is longer."""


class _SafeConsole(Console):
    """Rows, answers and file names may hold anything; what would command a terminal is shown as an escape instead."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """rich's rendering; only the codes that rich itself makes for the terminal pass as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def print(self, *objects: Any, **options: Any) -> None:
        """rich's, but a line with a command stays one line, and whole: one that is broken or cut cannot be pasted. The
        terminal shows it on as many lines as it needs. What an indented line goes on with is indented as well."""
        width = None if self.soft_wrap else self.width
        super().print(*(_by_lines(one, width) for one in objects), **({"crop": False} | options))


ERROR = "error: "
_COMMAND = re.compile(
    r"(?m:^|: |`| {2}|&& )(?:qtune|python|pip|bash|ollama|vllm|llama-server|llama-cli|hf|accelerate|torchrun) \S"
)


def _by_lines(renderable: Any, width: int | None) -> Any:
    """A text, or a group of them, whose lines with commands are not wrapped, and whose indented lines are wrapped with
    their indentation. width: of a console that wraps, in columns."""
    if isinstance(renderable, Group):
        return Group(*(_by_lines(one, width) for one in renderable.renderables))
    if not isinstance(renderable, (str, Text)):
        return renderable
    text = renderable if isinstance(renderable, Text) else Text(renderable)
    lines = list(text.split("\n", allow_blank=True))
    shaped = [_line(line, width) for line in lines]
    return renderable if all(map(operator.is_, shaped, lines)) else Group(*shaped)


def _line(line: Text, width: int | None) -> Text | Padding | Group:
    """The line itself where nothing is to be said of how it is wrapped. A command that ends a sentence too long for one
    line stands below it."""
    indent = len(line.plain) - len(line.plain.lstrip(" "))
    # The name of a verb that an error is about is no command.
    if command := _COMMAND.search(line.plain, len(ERROR) if line.plain.startswith(ERROR) else 0):
        if width is None or line.cell_len <= width or not command[0].startswith(": "):
            return _whole(line)
        said, below = line[: command.start() + 1], line[command.start() + 2 :]
        return Group(_line(said, width), _whole(Text.assemble(" " * (indent + 2), below)))
    if not indent or width is None or not indent < width < line.cell_len:
        return line
    return Padding(line[indent:], (0, 0, 0, indent), expand=False)


def _whole(line: Text) -> Text:
    whole = line.copy()
    whole.no_wrap, whole.overflow = True, "ignore"
    return whole


def _console(*, stderr: bool, of_process: bool = False) -> Console:
    """A console; of a process that follows another one it is quiet, unless what is said is `of_process` itself."""
    stream = sys.stderr if stderr else sys.stdout
    terminal = stream.isatty()
    # Rows, answers and paths are shown as they are: "[red]" or ":smile:" in them is no instruction.
    asked = os.environ.get("QTUNE_WIDTH", "")
    width = None if terminal else int(asked) if asked.isdecimal() and int(asked) > 0 else PLAIN_WIDTH
    return _SafeConsole(
        file=stream,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=not terminal,
        width=width,
        quiet=not (launched().is_leader or of_process),
    )


def out(result: RenderableType) -> None:
    """Prints a result to stdout."""
    _console(stderr=False).print(result)


def out_raw(text: str) -> None:
    """Writes streamed text to stdout without a line end and without rich; control characters become visible."""
    if launched().is_leader:
        sys.stdout.write(visible(text))
        sys.stdout.flush()


def out_json(value: Any) -> None:
    """Prints plain values to stdout as JSON, for other programs."""
    sys.stdout.write(json_text(value))
    sys.stdout.flush()


def json_text(value: Any) -> str:
    """JSON with a line end. Its own escapes stand for every character that a terminal would obey, or cannot show."""
    can_show_all = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    return escaped_in_json(json.dumps(value, indent=2, ensure_ascii=not can_show_all)) + "\n"


_drawn_on: ContextVar[Console | None] = ContextVar("_drawn_on", default=None)
"""The console that a display redraws itself on: what is said meanwhile goes above it, and not into its line."""


@contextmanager
def drawing_on(console: Console) -> Iterator[None]:
    """While the block runs, a display redraws itself on this console."""
    token = _drawn_on.set(console)
    try:
        yield
    finally:
        _drawn_on.reset(token)


def say(message: RenderableType) -> None:
    """Prints a message about the work to stderr."""
    live_console().print(message)


def say_of_process(message: str) -> None:
    """Prints to stderr what concerns this process alone, one of several, and says which it is."""
    _console(stderr=True, of_process=True).print(Text(f"{launched()}: {message}"))


def say_error(message: str) -> None:
    """Prints an error to stderr: `error: ` and the message, which keeps its own lines; of several processes, which."""
    whose = "" if launched().is_leader else f"{launched()}: "
    _console(stderr=True, of_process=True).print(Text.assemble((ERROR, "bold red"), f"{whose}{message}"))


def live_console() -> Console:
    """The console of stderr, for displays that redraw themselves: one for all that do so at a time."""
    return _drawn_on.get() or _console(stderr=True)


BETWEEN = 2
"""Spaces between two columns of a table."""


class BareTable(Table):
    """rich's table without lines, and without the spaces behind the last word of a line: a file would keep them."""

    def __init__(self, *, padding: tuple[int, int, int, int] = (0, BETWEEN, 0, 0), **options: Any) -> None:
        super().__init__(box=None, padding=padding, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """rich's way to draw it."""
        filled = [one for one in super().__rich_console__(console, options) if isinstance(one, Segment)]
        for line in Segment.split_lines(filled):
            yield from _without_end(line)
            yield Segment.line()


def _without_end(line: list[Segment]) -> list[Segment]:
    """A line without the spaces that it ends with."""
    kept = list(line)
    while kept and not kept[-1].text.rstrip(" "):
        kept.pop()
    return [*kept[:-1], Segment(kept[-1].text.rstrip(" "), kept[-1].style)] if kept else []


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, right: Sequence[int] = ()
) -> Table:
    """A plain table; `right` names the columns (by index) that hold figures. What stands first names its row: on a
    narrow terminal the other columns are folded, so that it can be read and copied whole."""
    drawn = BareTable(title=title, title_justify="left", title_style="bold", pad_edge=False)
    is_name = max((len(str(row[0])) for row in rows), default=0) <= LONGEST_NAME
    for index, name in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index in right else "left"
        no_wrap = index == 0 and is_name
        drawn.add_column(name, justify=justify, header_style="dim", overflow="fold", no_wrap=no_wrap)
    for row in rows:
        drawn.add_row(*row)
    return drawn


@dataclass(frozen=True)
class IfItFits:
    """What is shown where a table is too wide for the terminal, whose lines would be broken inside of words."""

    table: Table
    narrow: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """rich's way to draw it."""
        fits = Measurement.get(console, options.update(width=MEASURED_WIDTH), self.table).maximum <= options.max_width
        yield self.table if fits else self.narrow


MEASURED_WIDTH = 10_000
"""Wider than any table: rich measures within what there is."""


def on_its_side(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, right: Sequence[int] = ()
) -> IfItFits:
    """A table; where it is too wide, a line for each column and a column for each row."""
    return IfItFits(table(title, columns, rows, right=right), Turned(title, tuple(columns), tuple(rows)))


@dataclass(frozen=True)
class Turned:
    """A table on its side: a line for each of `columns`, and a column for each of `rows`. Of these there are as many
    beside each other as need no word broken; the others follow below, each with all of its cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Sequence[str | Text], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """rich's way to draw it."""
        first = 0
        while first < len(self.rows):
            last = len(self.rows)
            while last > first + 1 and self._longest_word(first, last) > self._room(last - first, options.max_width):
                last -= 1
            if first:
                yield ""
            yield self._part(first, last, options.max_width)
            first = last

    def _part(self, first: int, last: int, width: int) -> Table:
        names, *lines = (
            [name, *(row[index] for row in self.rows[first:last])] for index, name in enumerate(self.columns)
        )
        part = table("" if first else self.title, list(map(str, names)), lines, right=range(1, len(names)))
        for column in part.columns[1:]:  # left to itself, rich takes what is too much from some columns alone
            column.max_width = self._room(last - first, width)
        return part

    def _room(self, count: int, width: int) -> int:
        """What each of so many columns has, at least 1."""
        names = max(map(len, self.columns))
        return max(1, (width - names) // count - BETWEEN)

    def _longest_word(self, first: int, last: int) -> int:
        cells = (str(cell) for row in self.rows[first:last] for cell in row)
        return max((len(word) for cell in cells for word in cell.split()), default=0)


@dataclass
class Bar:
    """A running progress display; `total` may be None while it is not known."""

    description: str
    total: float | None
    done: float = 0
    _progress: Progress | None = None
    _said: int = 0
    """Quarters that a file has a line of."""
    _part: str = ""

    def advance(self, steps: float = 1) -> None:
        """Counts `steps` more of the work as done."""
        self.update(self.done + steps)

    def end(self) -> None:
        """The work is done, also where it was less than was thought: a file does not end at 84 %."""
        if self.total and self._said < 4:
            self.update(self.total)

    def tell(self, next_part: str) -> None:
        """Says which part of the work is next, where nobody knows how many there are. Each has a line in a file; the
        same one behind itself has no second one."""
        if next_part == self._part:
            return
        self._part = next_part
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=f"{self.description}: {next_part}")
        else:
            say(f"{self.description}: {next_part}")

    def update(self, done: float, *, total: float | None = None, description: str | None = None) -> None:
        """Sets how much is done, and the total or the description where they changed."""
        self.done = done
        self.total = self.total if total is None else total
        self.description = description or self.description
        shown = round(done, 6)  # shares of a row add up to whole ones, but for rounding
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], completed=shown, total=self.total, description=self.description
            )
        elif self.total:
            quarter = min(4, int(4 * shown / self.total))
            if quarter > self._said:
                self._said = quarter
                say(f"{self.description}: {min(100, round(100 * shown / self.total))} %")


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Bar]:
    """Shows how far some work is: a bar on a terminal, elsewhere a line as it begins and one for each quarter."""
    console = live_console()
    if not console.is_terminal or console.quiet:
        say(f"{description} …")
        bar = Bar(description, total)
        yield bar
        bar.end()
        return
    words = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
    # Where nobody knows how much there is, a bar would say nothing.
    columns = (*words, BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn()) if total else words
    with drawing_on(console), Progress(*columns, console=console, transient=True) as drawn:
        drawn.add_task(description, total=total)
        yield Bar(description, total, _progress=drawn)


SILENCE_SECONDS = 3.0
"""Without a line in a file, after which the next part of what is waited for has one of its own."""


@contextmanager
def waiting(for_what: str) -> Iterator[Callable[[str], None]]:
    """Says what is waited for: on a terminal as long as that lasts, elsewhere in a line of its own, as it begins.

    Yields what is told which part is next: the terminal shows it, a file has a line of it after SILENCE_SECONDS.
    """
    console = live_console()
    if not console.is_terminal or console.quiet:
        say(f"{for_what} …")
        yield _after_silence(for_what)
        return
    with drawing_on(console), console.status(Text(for_what), refresh_per_second=4) as status:
        yield lambda part: status.update(Text(f"{for_what}: {part}"))


def _after_silence(for_what: str) -> Callable[[str], None]:
    said = time.monotonic()

    def tell(part: str) -> None:
        nonlocal said
        if time.monotonic() - said >= SILENCE_SECONDS:
            said = time.monotonic()
            say(f"{for_what}: {part}")

    return tell


def clock(seconds: float | None) -> str:
    """ "1:23:45", "2:05", or "–" while it is not known."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
