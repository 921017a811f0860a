"""The screen of `qtune list`."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from qtune.console import table
from qtune.sizes import size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qtune.run.listing import ListedRun

UNITS = (("d", 86_400), ("h", 3_600), ("min", 60))


def draw_runs(runs: "Sequence[ListedRun]", directory: Path, now: float) -> RenderableType:
    """The runs as a table, and below it how to go on with those that are stopped; `now` is what their age is counted
    from, in seconds since 1970."""
    if not runs:
        return Text(f"no runs in {directory}")
    bases = {_short_base(run.base) for run in runs}
    shared = next(iter(bases)) if len(bases) == 1 and len(runs) > 1 else None
    rows = [
        (
            run.name,
            run.state,
            *([] if shared else [_short_base(run.base)]),
            run.adapter or "?",
            "" if run.loss_start is None else f"{run.loss_start:.3f} -> {run.loss_end:.3f}",
            "" if run.validation is None else f"{run.validation:.4f}",
            size_text(run.size_bytes),
            age_text(now - run.changed),
        )
        for run in runs
    ]
    figures = ("training loss", "best validation", "size", "age")
    columns = ("run", "state", *([] if shared else ["base"]), "adapter", *figures)
    title = f"Runs in {directory}" + (f", all on {shared}" if shared else "")
    drawn = table(title, columns, rows, right=range(len(columns) - len(figures), len(columns)))
    ways = [f"go on with {run.name}: {run.resume}" for run in runs if run.resume is not None]
    # A command that is broken over lines by hand cannot be pasted.
    return Group(drawn, *(Text(way, no_wrap=True, overflow="ignore") for way in ways))


def age_text(seconds: float) -> str:
    """ "3 d", "5 h", "12 min", of less "now"."""
    return next((f"{int(seconds // size)} {unit}" for unit, size in UNITS if seconds >= size), "now")


def _short_base(base: str | None) -> str:
    """A hub id whole, of a folder its name."""
    if base is None:
        return "?"
    return Path(base).name if base.startswith("/") else base
