"""The training display: drawn from the records of metrics.jsonl, redrawn on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qtune.console import clock, drawing_on, live_console, say
from qtune.run.metrics import AnswersRecord, EvalRecord, Metric, NoteRecord, SampleAnswer, TrainRecord
from qtune.sizes import gib_text

SECONDS_BETWEEN_LINES = 5.0
"""Plain lines of training records; a log file needs no line for every step."""


class TrainingDisplay:
    """Shows records as they are written. Use as a context manager, so that the terminal is given back."""

    def __init__(self) -> None:
        self._latest: TrainRecord | EvalRecord | None = None
        self._figures: dict[str, str] = {}
        self._started: tuple[float, int] | None = None
        self._last_line = float("-inf")
        self._answers: AnswersRecord | None = None
        self._beside: str | None = None
        self._beside_line = float("-inf")
        self._shown = ExitStack()
        console = live_console()
        is_live = console.is_terminal and not console.quiet
        self._live = Live(console=console, refresh_per_second=4, transient=False) if is_live else None

    def __enter__(self) -> "TrainingDisplay":
        if self._live:
            self._shown.enter_context(drawing_on(self._live.console))
            self._shown.enter_context(self._live)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.close()

    def show(self, record: Metric) -> None:
        """Takes the next record of metrics.jsonl."""
        if isinstance(record, NoteRecord):
            say(record.message)
            return
        if self._live and self._beside is not None:
            self._live.update(self._drawing(self._latest))
        self._beside = None
        if isinstance(record, AnswersRecord):
            say(answers_text(record, self._answers))
            self._answers = record
            return
        if self._started is None:
            self._started = (time.monotonic(), record.step)
        self._latest = record
        self._figures |= _figures(record)
        if self._live:
            self._live.update(self._drawing(record))
        elif self._is_due(record):
            self._last_line = time.monotonic()
            say(plain_line(record, self._seconds_left()))

    def beside(self, what: str, share: float | None = None) -> None:
        """Says what is done between two steps, and how far it has come: on a terminal until the next record, elsewhere
        in a line as it begins and in one every SECONDS_BETWEEN_LINES."""
        now, is_new = time.monotonic(), what != self._beside
        self._beside = what
        told = what if share is None else f"{what}, {share:.0%}"
        if self._live:
            self._live.update(self._drawing(self._latest, told))
        elif is_new or now - self._beside_line >= SECONDS_BETWEEN_LINES:
            self._beside_line = now
            say(f"{told} …")

    def _is_due(self, record: TrainRecord | EvalRecord) -> bool:
        is_end = record.step in (1, record.steps)
        return record.kind == "eval" or is_end or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES

    def _seconds_left(self) -> float | None:
        """From the pace since this process began, so that a resumed run does not count the earlier one's steps."""
        latest = self._latest
        if latest is None or not latest.steps or self._started is None or latest.step <= self._started[1]:
            return None
        began, first = self._started
        return (time.monotonic() - began) / (latest.step - first) * (latest.steps - latest.step)

    def _drawing(self, latest: TrainRecord | EvalRecord | None, beside: str | None = None) -> RenderableType:
        below = [] if beside is None else [Text(f"{beside} …", style="dim")]
        if latest is None:
            return Group(*below)
        bar = Table.grid(padding=(0, 1))
        steps = latest.steps or 1
        bar.add_row(
            f"step {latest.step}/{steps}",
            ProgressBar(total=steps, completed=latest.step, width=40),
            f"epoch {latest.epoch:.2f}",
            Text(f"{clock(self._seconds_left())} left", style="cyan"),
        )
        figures = {
            name: Text.assemble((f"{name} ", "dim"), self._figures[name]) for name in ORDER if name in self._figures
        }
        # What is learned, then what it costs: together they do not fit into 80 columns.
        costs = [figures.pop(name) for name in ("tokens/s", "s/step", "memory") if name in figures]
        return Group(bar, *(Text("   ").join(row) for row in (figures.values(), costs) if row), *below)


ORDER = ("loss", "accuracy", "eval loss", "lr", "tokens/s", "s/step", "memory")


def _figures(record: TrainRecord | EvalRecord) -> dict[str, str]:
    """What a record tells, as names and formatted values."""
    if isinstance(record, EvalRecord):
        return {"eval loss": f"{record.judged_loss:.4f}"}
    now, peak = gib_text(record.memory_bytes), gib_text(record.memory_peak_bytes)
    return {
        "loss": f"{record.loss:.4f}",
        "accuracy": f"{record.accuracy:.1%}",
        "lr": f"{record.learning_rate:.2e}",
        "tokens/s": f"{record.tokens_per_second:,.0f}",
        **_step(record),
        "memory": f"{now}, peak {peak.removesuffix(' GiB') if now.endswith(' GiB') else peak}",
    }


def _step(record: TrainRecord) -> dict[str, str]:
    """Seconds of a step, and in brackets what was predicted."""
    if record.step_seconds is None:
        return {}
    predicted = record.predicted_step_seconds
    return {"s/step": f"{record.step_seconds:.2f}{'' if predicted is None else f' (predicted {predicted:.2f})'}"}


ANSWER_WIDTH = 100
"""Characters of a question or an answer on the screen; metrics.jsonl and the report have more."""


def answers_text(record: AnswersRecord, before: AnswersRecord | None = None) -> str:
    """What the model says after a step: under each question the answer, and the expected one where it is another.

    before: what it said when it was asked last, with the questions: to the same ones only the new answers are shown.
    """
    if before is not None and [one.request for one in before.answers] == [one.request for one in record.answers]:
        return _answers_again(record, before)
    lines = [_heading(record)]
    for one in record.answers:
        is_right = one.answer == one.expected
        lines.append(f"  asked   {_question_line(one.request) or one.place}{_others(one)}")
        if one.last_turn:
            lines.append(f"  then    {_one_line(one.last_turn)}")
        lines.append(f"{'✓' if is_right else ' '} says    {_one_line(one.answer)}")
        if not is_right:
            lines.append(f"  wanted  {_one_line(one.expected)}")
    return "\n".join(lines)


def _answers_again(record: AnswersRecord, before: AnswersRecord) -> str:
    """A line for each answer to questions that stand above already."""
    if record.answers == before.answers:
        return f"step {record.step}: the same answers as at step {before.step}"
    lines = [_heading(record)]
    for one, earlier in zip(record.answers, before.answers, strict=True):
        said = f"(the same as at step {before.step})" if one.answer == earlier.answer else _one_line(one.answer)
        lines.append(f"{'✓' if one.answer == one.expected else ' '} says    {said}")
    return "\n".join(lines)


def _heading(record: AnswersRecord) -> str:
    cut = [one for one in record.answers if one.was_cut]
    counted = f"; {len(cut)} of {len(record.answers)} {'was' if len(cut) == 1 else 'were'} cut"
    return f"step {record.step}: what it answers now{f'{counted}{_limit_of(cut)}' if cut else ''}"


def _limit_of(cut: Sequence[SampleAnswer]) -> str:
    """What has stopped answers, in words."""
    late = sum(one.is_late is True for one in cut)
    if late == len(cut):
        return " when the time for answers was over"
    if late:
        return f", {late} of them when the time for answers was over"
    return " at the limit" if None in {one.is_late for one in cut} else " at the limit of tokens"


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= ANSWER_WIDTH else f"{text[: ANSWER_WIDTH - 1]}…"


def _others(one: SampleAnswer) -> str:
    return f" ({one.other_turns})" if one.other_turns else ""


def _question_line(text: str) -> str:
    """How a question begins and how it ends: what is asked often stands behind a long text, or rows begin alike."""
    text = " ".join(text.split())
    begin = ANSWER_WIDTH // 3
    return text if len(text) <= ANSWER_WIDTH else f"{text[:begin]} … {text[begin + 3 - ANSWER_WIDTH :]}"


def plain_line(record: TrainRecord | EvalRecord, seconds_left: float | None) -> str:
    """One record as one line of a log."""
    if isinstance(record, EvalRecord):
        return (
            f"step {record.step}: validation loss {record.judged_loss:.4f}{record.about_rows}, {record.accuracy_text}"
        )
    figures = "  ".join(f"{name} {value}" for name, value in _figures(record).items())
    left = f"  {clock(seconds_left)} left" if seconds_left is not None else ""
    return f"step {record.step}/{record.steps}  epoch {record.epoch:.2f}  {figures}{left}"
