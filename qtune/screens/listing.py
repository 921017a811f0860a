"""The screen of `qtune list`."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from qtune.console import IfItFits, table
from qtune.run.folder import EXPORTED
from qtune.run.summary import number
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
            _training_loss(run),
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
    ways = [
        f"{f'go on with {run.name}' if run.lost is None else f'save the adapter of {run.name} again'}: {run.resume}"
        for run in runs
        if run.resume is not None
    ]
    ways += [f"train {run.name} again: {run.anew}" for run in runs if run.anew is not None]
    narrow = Group(Text(title, style="bold"), *(_in_lines(run, now, is_shared=bool(shared)) for run in runs))
    # A command that is broken over lines by hand cannot be pasted.
    return Group(IfItFits(drawn, narrow), *(Text(way, no_wrap=True, overflow="ignore") for way in ways))


def _in_lines(run: "ListedRun", now: float, *, is_shared: bool) -> Text:
    """A run without a table: its name, and below it what is known of it, a line for each kind of thing.

    is_shared: whether the title says the base of all.
    """
    loss = _training_loss(run)
    best = None if run.validation is None else f"best validation {run.validation:.4f}"
    lines = [
        f"{run.name}: {run.state}",
        f"{run.adapter or '?'}{'' if is_shared else f' on {_short_base(run.base)}'}",
        ", ".join(filter(None, (loss and f"training loss {loss}", best))),
        f"{size_text(run.size_bytes)}, {age_text(now - run.changed)} old".replace(", now old", ", now"),
    ]
    return Text("\n  ".join(filter(None, lines)))


def _training_loss(run: "ListedRun") -> str:
    """From what to what it went; nothing where no step was logged."""
    if run.loss_start is None or run.loss_end is None:
        return ""
    return f"{number(run.loss_start)} -> {number(run.loss_end)}"


def age_text(seconds: float) -> str:
    """ "3 d", "5 h", "12 min", of less "now"."""
    return next((f"{int(seconds // size)} {unit}" for unit, size in UNITS if seconds >= size), "now")


def _short_base(base: str | None) -> str:
    """A hub id whole; a folder as it is called from here; of one elsewhere its name, with the one around it where it is
    called as every export is."""
    if base is None or not base.startswith("/"):
        return base or "?"
    path = Path(base)
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return str(Path(path.parent.name) / path.name) if path.name == EXPORTED else path.name
