"""The training display: drawn from the records of metrics.jsonl, redrawn on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qtune.console import live_console, say

Record = Mapping[str, Any]

SECONDS_BETWEEN_LINES = 5.0
"""Plain lines of training records; a log file needs no line for every step."""


class TrainingDisplay:
    """Shows records as they are written. Use as a context manager, so that the terminal is given back."""

    def __init__(self) -> None:
        self._latest: dict[str, Any] = {}
        self._started: tuple[float, int] | None = None
        self._last_line = float("-inf")
        console = live_console()
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None

    def __enter__(self) -> "TrainingDisplay":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, record: Record) -> None:
        """Takes one record of metrics.jsonl."""
        if self._started is None and "step" in record:
            self._started = (time.monotonic(), record["step"])
        if record["kind"] == "note":
            self._print(f"{record['message']}")
            return
        prefix = "eval_" if record["kind"] == "eval" else ""
        self._latest.update({prefix + key if key in ("loss", "accuracy") else key: record[key] for key in record})
        if self._live:
            self._live.update(self._drawing())
        elif self._is_due(record):
            self._last_line = time.monotonic()
            say(plain_line(record, self._seconds_left()))

    def _print(self, message: str) -> None:
        if self._live:
            self._live.console.print(message)
        else:
            say(message)

    def _is_due(self, record: Record) -> bool:
        is_end = record.get("step") in (1, record.get("steps"))
        return record["kind"] != "train" or is_end or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES

    def _seconds_left(self) -> float | None:
        """From the pace since this process began, so that a resumed run does not count the earlier one's steps."""
        step, steps = self._latest.get("step"), self._latest.get("steps")
        if not step or not steps or self._started is None or step <= self._started[1]:
            return None
        began, first = self._started
        return (time.monotonic() - began) / (step - first) * (steps - step)

    def _drawing(self) -> RenderableType:
        latest = self._latest
        bar = Table.grid(padding=(0, 1))
        steps = latest.get("steps") or 1
        bar.add_row(
            f"step {latest.get('step', 0)}/{steps}",
            ProgressBar(total=steps, completed=latest.get("step", 0), width=40),
            f"epoch {latest.get('epoch', 0):.2f}",
            Text(f"{clock(self._seconds_left())} left", style="cyan"),
        )
        figures = {name: Text.assemble((f"{name} ", "dim"), value) for name, value in _figures(latest).items()}
        # What is learned, then what it costs: together they do not fit into 80 columns.
        costs = [figures.pop(name) for name in ("tokens/s", "s/step", "memory") if name in figures]
        return Group(bar, *(Text("   ").join(row) for row in (figures.values(), costs) if row))


def _figures(record: Record) -> dict[str, str]:
    """What is known, as names and formatted values."""
    formats = {
        "loss": ("loss", "{:.4f}"),
        "accuracy": ("accuracy", "{:.1%}"),
        "eval_loss": ("eval loss", "{:.4f}"),
        "learning_rate": ("lr", "{:.2e}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
    }
    figures = {label: layout.format(record[key]) for key, (label, layout) in formats.items() if key in record}
    if "step_seconds" in record:
        predicted = f" ({record['predicted_step_seconds']:.2f})" if "predicted_step_seconds" in record else ""
        figures["s/step"] = f"{record['step_seconds']:.2f}{predicted}"
    if "memory_bytes" in record:
        now, peak = record["memory_bytes"] / 2**30, record["memory_peak_bytes"] / 2**30
        figures["memory"] = f"{now:.2f} GiB, peak {peak:.2f}"
    return figures


def plain_line(record: Record, seconds_left: float | None) -> str:
    """One record as one line of a log."""
    if record["kind"] == "eval":
        return f"step {record['step']}: validation loss {record['loss']:.4f}, accuracy {record['accuracy']:.1%}"
    figures = "  ".join(f"{name} {value}" for name, value in _figures(record).items())
    left = f"  {clock(seconds_left)} left" if seconds_left is not None else ""
    return f"step {record['step']}/{record['steps']}  epoch {record['epoch']:.2f}  {figures}{left}"


def clock(seconds: float | None) -> str:
    """ "1:23:45", "2:05", or "–" while it is not known."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
