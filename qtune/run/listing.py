"""The runs of a folder, each in a line: what it trained, how far it came, what it learned, how large and old it is."""

import os
from dataclasses import dataclass
from pathlib import Path

from qtune.disk import bytes_in
from qtune.errors import Problem, RunError
from qtune.run.checkpoints import step_of, usable_checkpoints
from qtune.run.finished import GONE, adapter_lack
from qtune.run.folder import RunDir, next_folder
from qtune.run.owner import owner_of
from qtune.run.resolved import read_values
from qtune.run.resumption import (
    asked_name,
    beginning_anew,
    is_exported,
    newest_unfinished,
    no_way_on,
    resuming,
    unfinished_runs,
)
from qtune.run.summary import Summary, summary_of


@dataclass(frozen=True)
class ListedRun:
    """One run; figures that its files do not have, or that cannot be read, are None."""

    name: str
    state: str
    base: str | None
    adapter: str | None
    loss_start: float | None
    loss_end: float | None
    validation: float | None
    """The lowest validation loss."""
    size_bytes: int
    changed: float
    """When it was last written to, in seconds since 1970."""
    resume: str | None
    """The command that goes on with it, or saves its adapter again where a file of that is lost; None where it has
    ended, goes on already or is damaged."""
    lost: str | None = None
    """What is missing of its adapter, in words; None where nothing is, or none was saved."""
    anew: str | None = None
    """The command that trains it again, where nothing is left to go on with."""


def list_runs(directory: Path) -> list[ListedRun]:
    """The runs in a folder, the latest first, or the one that it is; a damaged one is listed with what is wrong.

    Raises:
        RunError: there is no such folder.
    """
    if not directory.is_dir():
        raise RunError(Problem(str(directory), "is a file, no folder" if directory.exists() else "no such folder"))
    runs = [RunDir(file.parent) for file in directory.glob("*/resolved.toml")] or _itself(directory)
    listed = [one for run in runs if (one := _listed(run)) is not None]
    return sorted(listed, key=lambda one: (-one.changed, one.name))


def listed_folder(directory: Path) -> Path:
    """The folder of the runs that `list_runs` finds: the one around a run that was named itself."""
    if any(directory.glob("*/resolved.toml")) or not _itself(directory):
        return directory
    around = Path(os.path.normpath(directory.absolute())).parent
    return around if directory.is_absolute() else Path(os.path.relpath(around))


def _itself(directory: Path) -> list[RunDir]:
    """The run that a folder is; a folder of runs may have a stray resolved.toml, and is none."""
    return [RunDir(directory)] if RunDir(directory).resolved_file.is_file() else []


def _listed(run_dir: RunDir) -> ListedRun | None:
    """A run in a line; None where its folder was taken away meanwhile."""
    base = adapter = summary = resume = lost = anew = None
    try:
        run_dir.require_files()
        values = {one.path: one.plain_text for one in read_values(run_dir)}
        base, adapter = values.get(("model", "base")), values.get(("adapter", "kind"))
        summary = summary_of(run_dir)
        lost = adapter_lack(run_dir)
        state, is_stopped = _state(run_dir, summary, lost)
        if is_stopped and (why := no_way_on(run_dir)) is not None:
            there = ", but its export is there" if is_exported(run_dir) else ""
            state, anew = f"{state}; {why}{there}", beginning_anew(run_dir)
        elif is_stopped:
            resume = resuming(run_dir)
    except RunError as error:
        wrong = error.problems[0]
        file = wrong.place.removeprefix(f"{run_dir.path}").lstrip("/")
        state = f"damaged: {file}: {wrong.message}" if file else f"damaged: {wrong.message}"
    losses = summary.losses if summary else None
    best = summary.best if summary else None
    written = [time for file in (run_dir.metrics_file, run_dir.resolved_file) if (time := _time_of(file)) is not None]
    if not written:
        return None
    return ListedRun(
        run_dir.name,
        state,
        base,
        adapter,
        losses.start if losses else None,
        losses.end if losses else None,
        best.judged_loss if best else None,
        bytes_in(run_dir.path),
        written[0],
        resume,
        lost,
        anew,
    )


def _time_of(file: Path) -> float | None:
    """When a file was last written to; None where there is none."""
    try:
        return file.stat().st_mtime if file.is_file() else None
    except OSError:
        return None


def _state(run_dir: RunDir, summary: Summary, lost: str | None) -> tuple[str, bool]:
    """How far a run has come, and whether there is something to go on with. lost: what is missing of its adapter."""
    if lost == GONE and owner_of(run_dir) is None:
        return f"{summary.steps_taken} taken, no adapter", True
    if lost is not None and owner_of(run_dir) is None:
        return f"finished, {summary.steps_taken}, but of its adapter {lost}", True
    if run_dir.is_finished:
        return f"finished, {summary.steps_taken}", False
    # One that was cut may be of steps that the run has not come to again since.
    saved = max(map(step_of, usable_checkpoints(run_dir.checkpoints)), default=0)
    reached = max(summary.step, saved)  # a step may be saved and not be logged
    total = f" of {summary.steps:,}" if summary.steps else ""
    if (owner := owner_of(run_dir)) is not None:
        return f"{owner.doing}, " + (f"step {reached:,}{total}" if reached else "before the first step"), False
    if not reached:
        return "stopped before the first step", True
    kept = "" if saved == reached else f"; step {saved:,} is saved" if saved else "; no step is saved"
    return f"stopped at step {reached:,}{total}{kept}", True


def said_of_next(directory: Path, name: str) -> list[str]:
    """What is said before a run of recipes called `name` begins: that the name is taken, which nothing is
    lost by, and what it is called then; that the last one was stopped."""
    said = []
    if (stopped := said_of_stopped(directory, name)) is not None:
        said.append(stopped)
    if (path := next_folder(directory, name)) is not None and path.name != name:
        said.append(f"{directory / name} is there: a new run will be {path}")
    return said


def others_to_resume(run_dir: RunDir) -> list[RunDir]:
    """The runs of the same recipe that could go on as well, the latest first."""
    name = asked_name(run_dir)
    runs = [] if name is None else unfinished_runs(run_dir.path.parent, name)
    return [run for run in runs if run.path != run_dir.path and _that_can_go_on(run) is not None]


def _that_can_go_on(run_dir: RunDir) -> ListedRun | None:
    """A run, unless somebody works in it, it is damaged or nothing was begun in it."""
    listed = _listed(run_dir) if run_dir.has_begun else None
    return None if listed is None or listed.resume is None else listed


def said_of_stopped(directory: Path, name: str) -> str | None:
    """What is said of a run of recipes called `name` that could go on, where another begins; None: there is none."""
    run_dir = newest_unfinished(directory, name)
    if run_dir is None or (listed := _that_can_go_on(run_dir)) is None:
        return None
    was = f"{run_dir.path} {'was ' if listed.state.startswith('stopped') else 'is not finished: '}{listed.state}"
    return f"{was}; it goes on with: {listed.resume}"
